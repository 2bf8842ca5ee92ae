"""placer decides where the experts of a Mixture-of-Experts model live."""

__version__ = "0.1.0"
