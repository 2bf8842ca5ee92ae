"""The search for placements with fewer copies or pairs."""
