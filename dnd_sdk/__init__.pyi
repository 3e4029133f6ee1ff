from .adapters import Adapter as Adapter
from .adapters import AdapterStore as AdapterStore
from .config import Home as Home
from .config import SamplingOptions as SamplingOptions
from .errors import DndError as DndError
from .generator import Generator as Generator
from .lora import LoraLayout as LoraLayout
from .prompts import Role as Role
from .session import DnD as DnD

__version__: str
