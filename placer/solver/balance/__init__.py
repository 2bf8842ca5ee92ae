"""Balancing load alone: packing experts, copies of experts, router groups."""
