from .gate import Gate as Gate, pooled_noise as pooled_noise, pooled_prompts as pooled_prompts, try_gate as try_gate
from .plot import GATE_REPORT as GATE_REPORT
from .report import build_gate_report as build_gate_report, render_gate as render_gate
