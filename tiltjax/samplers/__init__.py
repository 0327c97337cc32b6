"""Draws from the tilt: selection among N candidates, resampling, and the decoding that makes the candidates."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
