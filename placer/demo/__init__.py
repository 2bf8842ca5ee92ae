"""The demo: text that comes with Python, and every step run on it."""
