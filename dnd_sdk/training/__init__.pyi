from .batches import TokenTask as TokenTask, tokenise_task as tokenise_task
from .commands import run_generator as run_generator, run_zoo as run_zoo
from .conditions import Pools as Pools, encode_pools as encode_pools
from .curriculum import Curriculum as Curriculum
from .frozen_base import FrozenBase as FrozenBase
from .objectives import OBJECTIVES as OBJECTIVES, Lesson as Lesson
from .parts import TrainingParts as TrainingParts, prepare as prepare
from .recipe import new_generator as new_generator, train_generator as train_generator
from .run_dir import RunDir as RunDir, write_tensors as write_tensors
from .settings import (
    PerTaskSettings as PerTaskSettings,
    Stage as Stage,
    TrainSettings as TrainSettings,
    read_settings as read_settings,
)
from .zoo import initial_adapter as initial_adapter, train_shared as train_shared, train_tasks as train_tasks
