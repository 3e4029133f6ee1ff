from .gate import Gate as Gate, pooled_noise as pooled_noise, pooled_prompts as pooled_prompts, try_gate as try_gate
from .plot import check_gate_report as check_gate_report, gate_texts as gate_texts, is_gate_report as is_gate_report
from .report import build_gate_report as build_gate_report, render_gate as render_gate
