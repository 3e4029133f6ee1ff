from .adaptation import Adaptation as Adaptation
from .label_calibration import Calibrated as Calibrated, LabelCalibration as LabelCalibration
from .vetting import Limits as Limits
