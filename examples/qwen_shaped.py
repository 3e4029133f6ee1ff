"""A base of Qwen2.5-0.5B's shape with random weights: what a generator for it costs, without fetching it.

The tokenizer is the small base's, with fewer words than the shape has room for. `python examples/qwen_shaped.py --out
runs/qwen_shaped` makes it; `dnd bench train TASKS --config examples/qwen_shaped.toml` times a small generator on it,
`dnd bench train TASKS --config examples/qwen_shaped_paper.toml` one of the paper's sizes (arXiv 2506.16406).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from dnd_sdk import Home
from dnd_sdk.models import SMALL_BASE, load_base

SHAPE = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "rope_theta": 1_000_000.0,
}


def make(out: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write the base into `out`; `changes` are other settings of its `Qwen2Config`."""
    tokenizer = load_base(SMALL_BASE, Home.find()).tokenizer
    config = Qwen2Config(**SHAPE | changes, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config).bfloat16()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/qwen_shaped"), help="Folder of the new base.")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="Fewer make a smaller base.")
    options = parser.parse_args()
    print(f"made {make(options.out, num_hidden_layers=options.layers)}")


if __name__ == "__main__":
    main()
