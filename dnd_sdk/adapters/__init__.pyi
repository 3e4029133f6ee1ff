from .adapter import Adapter as Adapter, check_name as check_name
from .foreign import find_adapter as find_adapter, import_notes as import_notes
from .peft_folder import check_flat as check_flat
from .store import AdapterStore as AdapterStore
