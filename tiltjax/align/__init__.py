"""The composition: a session loads a policy, a reward and prompts once; sample, estimate, align, evaluate and save."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
