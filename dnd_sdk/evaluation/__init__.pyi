from .answered import report_answered as report_answered
from .methods import METHODS as METHODS, METHODS_HELP as METHODS_HELP, default_methods as default_methods
from .parts import Parts as Parts
from .plot import read_report as read_report, write_plots as write_plots
from .report import render as render
from .runner import evaluate as evaluate
from .settings import MAX_PROMPTS as MAX_PROMPTS, EvalSettings as EvalSettings, Standing as Standing
from .spread import evaluate_on as evaluate_on, evaluate_session as evaluate_session
from .trained import TaskTrainer as TaskTrainer
from .zoo import Zoo as Zoo
