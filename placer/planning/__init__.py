"""What a user asks for: a plan, advice, a frontier, drift, a table."""
