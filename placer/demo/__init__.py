"""The demo: text that every Python carries, and the whole road over it."""
