"""The running server of a home: where it is, and how to ask it; for the command line, so nothing heavy is loaded.

What others may import is listed in `__init__.pyi`; each name is loaded on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
