"""The E-step: rewards of reference candidates -> the tilted distribution, its normaliser, and how far to trust both."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
