"""Flax NNX modules used as pytrees: one decoder-only transformer by config, with a shared-prompt attention."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
