"""The version of placer, which results record."""

__version__ = "0.1.0"
