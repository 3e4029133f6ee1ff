"""The paper's comparison: a generator beside adapters trained on each held-out task's own rows.

What others may import is listed in `__init__.pyi`; each name is loaded on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
