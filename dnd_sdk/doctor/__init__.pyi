from .checks import Check as Check, examine as examine
from .environment import describe as describe
