"""Compiled loops of the search over copies: layers, copies, prices, moves."""
