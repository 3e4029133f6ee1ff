"""dnd_sdk: prompts in, a task LoRA out, hot-swapped on one resident LLM.

Names resolve on first use, so importing the package loads neither torch nor faiss.
"""

import lazy_loader

from dnd_sdk.machine import wait_briefly

__version__ = "0.1.0"

wait_briefly()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
