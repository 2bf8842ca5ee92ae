"""Balancing load alone: packing experts, replicas of experts, router groups."""
