"""Flax NNX modules used as pytrees: one decoder-only transformer by config, with a shared-prompt attention."""
