"""Balancing only: packing experts, replicas of experts, router groups."""
