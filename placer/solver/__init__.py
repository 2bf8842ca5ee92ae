"""The solver: experts to ranks, under slots and caps, with a proved bound."""
