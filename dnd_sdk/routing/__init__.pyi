from .decision_log import Decision as Decision, DecisionLog as DecisionLog, read_decisions as read_decisions
from .index import AdapterIndex as AdapterIndex, Hit as Hit, compare_saved as compare_saved
from .logged import log_decision as log_decision
from .measured import measured as measured
from .probability import Probabilities as Probabilities, ScoreMap as ScoreMap
from .replay import replay_decisions as replay_decisions
from .router import RouteDecision as RouteDecision, Router as Router, verdict as verdict
from .similarity import (
    MAX_EXEMPLARS as MAX_EXEMPLARS,
    check_vectors as check_vectors,
    choose_exemplars as choose_exemplars,
    set_similarity as set_similarity,
)
from .support import NOISE_KINDS as NOISE_KINDS, Support as Support, noise_prompts as noise_prompts
from .telling import decision_fields as decision_fields
from .thresholds import (
    Calibration as Calibration,
    RouterData as RouterData,
    THRESHOLDS_FILE as THRESHOLDS_FILE,
    Thresholds as Thresholds,
    fit_thresholds as fit_thresholds,
)
from .vector_file import INDEX_FILE as INDEX_FILE, Key as Key
