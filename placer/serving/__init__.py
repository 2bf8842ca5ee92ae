"""Serving: which rank is a token's home, and which replica of an expert serves it.

Legend of the shapes: T tokens, k experts per token (top-k), E logical experts of a layer,
R ranks. Arrays ``[k, T]`` hold one row per place in the router's order.
"""
