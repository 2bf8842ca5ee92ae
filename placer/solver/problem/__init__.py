"""What the solver minimises, and which placements are allowed."""
