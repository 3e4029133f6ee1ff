from .comparison import compare as compare, render_paper as render_paper
from .training import PaperTrainer as PaperTrainer
