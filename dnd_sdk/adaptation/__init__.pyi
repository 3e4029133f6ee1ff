from .adaptation import Adaptation as Adaptation
from .bases import (
    base_name_of as base_name_of,
    check_known_base as check_known_base,
    check_made_for as check_made_for,
    made_elsewhere as made_elsewhere,
    of_base as of_base,
    stored_for as stored_for,
)
from .label_calibration import Calibrated as Calibrated, LabelCalibration as LabelCalibration
from .parts import Parts as Parts
from .results import AdaptResult as AdaptResult, Decision as Decision, Mode as Mode, adapted_fields as adapted_fields
from .vetting import Limits as Limits
