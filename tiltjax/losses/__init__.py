"""The M-step and its rivals: arrays in, one value per prompt out. One file is one family; no loss averages."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
