"""Lower bounds that no placement can beat, and how they are proved."""
