"""Checkpoints: the same model with its experts renumbered, and the proof that it is."""
