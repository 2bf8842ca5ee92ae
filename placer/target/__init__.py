"""The target of a plan: serving engines, GPUs and links."""
