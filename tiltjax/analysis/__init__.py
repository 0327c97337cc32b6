"""What a program costs, before it runs and after: FLOPs, traffic, communication, residuals, traces, chips."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
