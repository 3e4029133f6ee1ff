from .adapter import Adapter as Adapter, Problem as Problem, check_name as check_name
from .catalogue import Changes as Changes
from .exemplars import MAX_EXEMPLARS as MAX_EXEMPLARS
from .foreign import find_adapter as find_adapter
from .peft_folder import check_flat as check_flat
from .store import AdapterStore as AdapterStore
