"""The engine beside plain transformers and peft, as ratios taken in one run: swaps, decoding, clients, waiting.

* Rivals take turns round by round; times are medians, a ratio is the median of the rounds' own ratios.
* Only what the engine and its bank offer to anybody is called, so that the same bench measures other versions of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dnd_sdk.bench.adapting import machine
from dnd_sdk.bench.answering import time_clients, time_decoding, time_shared_prompts
from dnd_sdk.bench.first_token import time_first_token
from dnd_sdk.bench.swapping import time_swaps
from dnd_sdk.bench.workload import FULL, Sizes, Workload

if TYPE_CHECKING:
    from dnd_sdk.session import DnD

SCHEMA_VERSION = 1

Tell = Callable[[int, int, str], None]
"""Told what is done, of how much, and what comes."""


def bench_engine(
    dnd: DnD, sizes: Sizes = FULL, *, clock: Callable[[], float] = time.perf_counter, progress: Tell | None = None
) -> dict[str, Any]:
    """Measure the session's engine with made-up adapters; its store is not touched, and the slots are free again after.

    Args:
        dnd: a session whose base is in this process, with eight slots or more; what is in them may be evicted.
        sizes: how much of everything.
        clock: seconds, rising.
        progress: told what comes next.

    Returns the JSON-able report that `dnd bench engine --json` prints. Raises `ConfigError` when the base is elsewhere
    or there are fewer than eight slots.
    """
    work, started = Workload(dnd, sizes, clock), clock()
    parts: dict[str, Callable[[Workload], Any]] = {
        "decode": time_decoding,
        "clients": time_clients,
        "shared_prompts": time_shared_prompts,
        "first_token": time_first_token,
    }
    steps = ["swap", *parts]

    def tell(n: int, about: str) -> None:
        if progress is not None:
            progress(n, len(steps), about)

    tell(0, "swap")
    measured: dict[str, Any] = {"swap": time_swaps(work)}
    with work.resident():
        for n, (name, measure) in enumerate(parts.items(), 1):
            tell(n, name.replace("_", " "))
            measured[name] = measure(work)
    tell(len(steps), "done")
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "engine",
        **measured,
        "rounds": work.sizes.rounds,
        "took_s": clock() - started,
        "machine": machine(dnd) | _gpu(work) | {"layers_of_lora": len(work.engine.layout.modules)},
    }


def _gpu(work: Workload) -> dict[str, Any]:
    return {"gpu": torch.cuda.get_device_name(work.device) if work.device.type == "cuda" else None}


def render_engine(report: dict[str, Any]) -> str:
    """The report in lines for people."""
    return "\n".join(
        (
            *_swap_lines(report["swap"]),
            *_decode_lines(report["decode"]),
            *_client_lines(report["clients"]),
            *_waiting_lines(report["shared_prompts"], report["first_token"]),
            _machine_line(report["machine"]),
        )
    )


def _swap_lines(swap: dict[str, Any]) -> list[str]:
    lines = []
    for source, block in swap.items():
        one, more = block["registered"]
        lines.append(
            f"swap from {source:12s} {one['ms']:9.3f} ms  ({more['over_one']:.2f} x with {more['n']:,} registered; "
            f"peft's hot-swap {block['peft_ms']:.2f} ms, {block['peft_over_ours']:.1f} x)"
        )
    return lines


def _decode_lines(blocks: list[dict[str, Any]]) -> list[str]:
    return [
        f"decode {b['batch']:3d} rows, {b['adapters']} adapters {b['tokens_s']:9.1f} tokens/s  "
        f"({b['over_base']:.3f} x the base's time)"
        for b in blocks
    ]


def _client_lines(block: dict[str, Any]) -> list[str]:
    return [
        *(
            f"{c['n']:3d} clients, 8 adapters    {c['tokens_s']:9.1f} tokens/s  ({c['over_peft']:.2f} x peft, "
            f"{c['over_transformers']:.2f} x transformers, one by one)"
            for c in block["clients"]
        ),
        f"one by one               peft {block['peft_tokens_s']:.1f}, transformers "
        f"{block['transformers_tokens_s']:.1f} tokens/s; {block['same_answers']:.0%} of their answers are the engine's",
    ]


def _waiting_lines(shared: dict[str, Any], first: dict[str, Any]) -> list[str]:
    about = f"{shared['prompts']} prompts, {shared['head_tokens']} tokens of head in common"
    return [
        *(
            f"{about}: {shared[key]['shared_over_own']:.2f} x the time of heads of their own, {how}"
            for key, how in (("together", "in one call"), ("in_a_row", "one after the other"))
        ),
        f"first token              {first['idle_ms']:9.1f} ms idle",
        f"  beside a long prompt   {first['beside_long_ms']:9.1f} ms  ({first['beside_long_over_idle']:.1f} x idle; "
        f"{first['long_tokens']} tokens alone take {first['long_ms']:.0f} ms)",
        f"  under {first['rows']} decoding rows  {first['under_rows_ms']:9.1f} ms  "
        f"({first['under_rows_over_idle']:.1f} x idle)",
    ]


def _machine_line(on: dict[str, Any]) -> str:
    return (
        f"machine                  {on['gpu'] or on['cpu']}, {on['cores']} cores, torch {on['torch']} with "
        f"{on['torch_threads']} threads, {on['device']} {on['dtype']}, base {on['base']}"
    )
