"""Which adapter fits: an index of prompt embeddings, measured thresholds, a decision as a value, its log.

What others may import is listed in `__init__.pyi`; each name is loaded on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
