"""What a plan runs on: serving engines, GPUs and links."""
