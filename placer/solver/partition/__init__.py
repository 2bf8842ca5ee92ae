"""A layer under ``fixed`` as a set partition: the integer program, solved to proof."""
