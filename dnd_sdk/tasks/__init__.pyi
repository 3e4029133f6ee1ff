from .bare import bare_task as bare_task
from .reading import (
    Row as Row,
    Task as Task,
    data_hash as data_hash,
    names_roles as names_roles,
    read_tasks as read_tasks,
    task_names as task_names,
)
