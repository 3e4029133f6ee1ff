from .adapter import Adapter as Adapter, Problem as Problem, check_name as check_name
from .catalogue import Changes as Changes
from .checks import check_base as check_base, check_free as check_free
from .exemplars import MAX_EXEMPLARS as MAX_EXEMPLARS
from .foreign import find_adapter as find_adapter
from .peft_config import base_name_in as base_name_in
from .peft_folder import check_flat as check_flat
from .served import (
    find_served as find_served,
    prune_served as prune_served,
    served_folder as served_folder,
    served_name as served_name,
)
from .store import AdapterStore as AdapterStore
