"""Replay: a plan on a real expert-parallel run, every byte counted where it is sent.

The exchanges are implementations of transformers' expert parallelism, usable without the
rest: :func:`placer.replay.exchanges.register`.

Legend of the shapes: n rows, k experts per token (top-k), H hidden size, R ranks of the
expert-parallel group, L MoE layers. Slots hold physical experts, equally many per rank.
"""
