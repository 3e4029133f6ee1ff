"""An OpenAI-compatible door to one session: chats, completions, embeddings, adapters, and a page.

What others may import is listed in `__init__.pyi`; each name is loaded on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
