from .bare import bare_task as bare_task
from .reading import (
    ANSWER_TYPES as ANSWER_TYPES,
    MAX_INFERRED_LABELS as MAX_INFERRED_LABELS,
    TASK_METRICS as TASK_METRICS,
    Row as Row,
    Task as Task,
    data_hash as data_hash,
    names_roles as names_roles,
    read_tasks as read_tasks,
    task_names as task_names,
)
