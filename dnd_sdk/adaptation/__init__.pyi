from .adaptation import Adaptation as Adaptation
from .label_calibration import Calibrated as Calibrated, LabelCalibration as LabelCalibration
from .parts import Parts as Parts
from .results import AdaptResult as AdaptResult, Decision as Decision, Mode as Mode
from .vetting import Limits as Limits
