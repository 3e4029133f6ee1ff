"""dnd_sdk: prompts in, a task LoRA out, hot-swapped on one resident LLM.

Names resolve on first use, so importing the package loads neither torch nor faiss.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
