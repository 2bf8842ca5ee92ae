"""Runtime maps: a plan in the format that an engine loads at start."""
