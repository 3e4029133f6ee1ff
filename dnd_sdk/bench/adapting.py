"""How fast adapting, reusing and decoding are here, as ratios taken in one run, so that figures of machines compare.

* Everything is warmed first; rivals are timed in turn (a, b, a, b, ...). Times are medians, a ratio is the median of
  the rounds' own ratios: load that comes and goes slows both sides of a round.
* Encoding alone is sentence-transformers' own `encode` with the same weights, not this package's encoder.
* Decoding is compared on an adapter scaled to next to nothing: it costs what any adapter costs and writes the base's
  tokens, so both sides do the same work: a short prompt and a long answer, nearly all of it decoding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dnd_sdk.bench.timing import WARM_UPS, host, in_turn, ratio
from dnd_sdk.config import SamplingOptions
from dnd_sdk.engine import CompletionRequest, local_engine
from dnd_sdk.errors import ConfigError, GeneratorError, InputError
from dnd_sdk.machine import peak_rss_mb
from dnd_sdk.models import load_base, resolve

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from dnd_sdk.adapters import Adapter
    from dnd_sdk.session import DnD

SCHEMA_VERSION = 1

DECODE_TOKENS, DECODE_ROUNDS = 32, 3
"""Length of the answer that decoding is timed with, and rounds per repeat: many short ones share the load fairly."""
NEXT_TO_NOTHING = 1e-4
"""Scale of the adapter that decoding is timed with."""

_TOPICS = (
    "a late parcel",
    "a double charge",
    "a broken screen",
    "a lost password",
    "a wrong size",
    "a cancelled order",
)
_ASKS = ("Which team should handle this message?", "Where does this ticket belong?", "Route this request.")
_STORY = "Write a long story about a lighthouse keeper who finds a map."


def sample_prompts(n: int) -> list[str]:
    """`n` different made-up support tickets of 20 to 50 words, for when there is no prompt file at hand."""
    if n < 1:
        raise ConfigError(f"the number of prompts must be at least 1, got {n}")
    more = " I have written twice already and would like an answer before the weekend, please."
    return [
        f"{_ASKS[i % 3]} Customer {1000 + i} writes: hello, I have a problem with {_TOPICS[i % 6]} from order "
        f"{7919 * i % 100_000}.{more * (i % 4 // 2)} What can you do for me?"
        for i in range(n)
    ]


def bench_adapt(
    dnd: DnD,
    prompts: Sequence[str] | None = None,
    *,
    n_prompts: int = 64,
    repeats: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Time adapting by generation, reuse and decoding on a warm session; the store is left as it was.

    Args:
        dnd: a session with a generator.
        prompts: what to adapt to; None makes up `n_prompts` of them.
        n_prompts: ignored when `prompts` are given.
        repeats: rounds per measurement.
        clock: seconds, rising.

    Returns the JSON-able report that `dnd bench adapt --json` prints: seconds, milliseconds and rates by name, `load_s`
    (base and tokenizer, once more, with the libraries imported), `adapt_over_encode` (as the session adapts),
    `uncalibrated_over_encode`, `decode_over_base` (time per token with one adapter / without) and `peak_rss_mb`.
    """
    if dnd.generator is None:
        raise GeneratorError("there is no generator to measure", fix="load a session with a generator for this base")
    chosen = list(prompts) if prompts is not None else sample_prompts(n_prompts)
    if not chosen or repeats < 1:
        raise InputError("a measurement needs one or more prompts and one or more repeats")
    adapting = _time_adapting(dnd, chosen, repeats, clock)
    decoding = _time_decoding(dnd, repeats, clock)
    peak = peak_rss_mb()  # of the session: loading the base once more adds to it
    return {
        "schema_version": SCHEMA_VERSION,
        "n_prompts": len(chosen),
        "repeats": repeats,
        "load_s": _time_loading(dnd, clock),
        **adapting,
        **decoding,
        "peak_rss_mb": peak,
        "machine": machine(dnd),
    }


def render_adapting(report: dict[str, Any]) -> str:
    """The report in a few lines for people."""
    steps = ", ".join(f"{k} {1e3 * v:.0f}" for k, v in report["adapt_steps_s"].items() if k != "total")
    on = report["machine"]
    return "\n".join(
        (
            f"load the base        {report['load_s']:8.2f} s  (once more, with the libraries imported)",
            f"adapt by generation  {1e3 * report['adapt_s']:8.1f} ms  ({report['n_prompts']} prompts; ms: {steps})",
            f"encode alone         {1e3 * report['encode_s']:8.1f} ms  (sentence-transformers)",
            f"adapt / encode       {report['adapt_over_encode']:8.2f} x  ({report['uncalibrated_over_encode']:.2f} x, "
            f"{1e3 * report['uncalibrated_s']:.0f} ms, without calibration)",
            f"reuse, same prompts  {report['reuse_ms']:8.2f} ms",
            f"decode, base         {report['decode_base_tokens_s']:8.1f} tokens/s",
            f"decode, one adapter  {report['decode_adapter_tokens_s']:8.1f} tokens/s",
            f"adapter / base       {report['decode_over_base']:8.3f} x time per token",
            f"peak memory          {report['peak_rss_mb']:8.0f} MB",
            f"machine              {on['cpu']}, {on['cores']} cores, torch {on['torch']} with {on['torch_threads']} "
            f"threads, {on['device']} {on['dtype']}, base {on['base']}",
        )
    )


def machine(dnd: DnD) -> dict[str, Any]:
    """What was measured on what."""
    model = local_engine(dnd.engine, "a measurement").base.model
    return {
        **host(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "base": dnd.base.name,
    }


def _time_loading(dnd: DnD, clock: Callable[[], float]) -> float:
    """Seconds to have base and tokenizer once more; both are let go again."""
    model = local_engine(dnd.engine, "a measurement").base.model
    started = clock()
    load_base(dnd.base.name, dnd.home, device=str(model.device), dtype=str(model.dtype).removeprefix("torch."))
    return clock() - started


def _time_adapting(dnd: DnD, prompts: list[str], repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    encoder, own = _sentence_encoder(dnd), _OwnAdapters(dnd)
    steps: list[dict[str, float]] = []

    def adapt() -> None:
        steps.append(own.adapt(prompts, "generate"))

    try:
        encode_s, plain_s, adapt_s = in_turn(
            (lambda: encoder.encode(prompts), lambda: None),
            (lambda: own.adapt(prompts, "generate", calibrate=False), own.remove),
            (adapt, own.remove),
            repeats=repeats,
            clock=clock,
        )
        own.adapt(prompts, "generate")
        (reuse_s,) = in_turn((lambda: own.adapt(prompts, "auto"), lambda: None), repeats=repeats, clock=clock)
    finally:
        own.remove()
    return {
        "encode_s": statistics.median(encode_s),
        "adapt_s": statistics.median(adapt_s),
        "uncalibrated_s": statistics.median(plain_s),
        "adapt_steps_s": {k: statistics.median(s[k] for s in steps[WARM_UPS:]) for k in steps[0]},
        "adapt_over_encode": ratio(adapt_s, encode_s),
        "uncalibrated_over_encode": ratio(plain_s, encode_s),
        "reuse_ms": 1e3 * statistics.median(reuse_s),
    }


class _OwnAdapters:
    """Adapts, and removes what it added; adapters that were there before stay."""

    def __init__(self, dnd: DnD) -> None:
        self._dnd = dnd
        self._before = {a.name for a in dnd.store.ls()}
        self._added: list[Adapter] = []

    def adapt(
        self, prompts: list[str], mode: Literal["auto", "generate"], calibrate: bool | None = None
    ) -> dict[str, float]:
        """Adapt once and return the seconds per step; raises `GeneratorError` unless it went as asked."""
        result = self._dnd.adapt(prompts, mode=mode, calibrate=calibrate)
        wanted = "generate" if mode == "generate" else "reuse"
        if result.adapter is None or result.decision != wanted:
            raise GeneratorError(f"expected to {wanted}, the session decided {result.decision!r}: {result.reason}")
        if result.adapter.name not in self._before and result.adapter not in self._added:
            self._added.append(result.adapter)
        return result.timings_s

    def remove(self) -> None:
        """Take everything added out of the engine and the store."""
        while self._added:
            adapter = self._added.pop()
            self._dnd.engine.forget(adapter.id)  # else the next swap would find it in its slot
            self._dnd.store.rm(adapter.name)


def _time_decoding(dnd: DnD, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Tokens per second of one completion, by the base and by one adapter."""
    assert dnd.generator is not None
    engine = local_engine(dnd.engine, "a measurement")
    adapter_id = "bench-decode"
    n_tokens: dict[str | None, int] = {}
    options = SamplingOptions(max_new_tokens=DECODE_TOKENS)

    def complete(adapter: str | None) -> None:
        (done,) = engine.complete([CompletionRequest(_STORY, adapter, options)])
        n_tokens[adapter] = done.completion_tokens

    engine.bank.load(adapter_id, dnd.generator.mean() * NEXT_TO_NOTHING)
    try:
        base_s, adapter_s = in_turn(
            (lambda: complete(None), lambda: None),
            (lambda: complete(adapter_id), lambda: None),
            repeats=DECODE_ROUNDS * repeats,
            clock=clock,
        )
    finally:
        engine.bank.evict(adapter_id)
    return {
        "decode_base_tokens_s": n_tokens[None] / statistics.median(base_s),
        "decode_adapter_tokens_s": n_tokens[adapter_id] / statistics.median(adapter_s),
        "decode_over_base": ratio(adapter_s, base_s) * n_tokens[None] / n_tokens[adapter_id],
    }


def _sentence_encoder(dnd: DnD) -> SentenceTransformer:
    """sentence-transformers on the session's own encoder weights and device."""
    from sentence_transformers import SentenceTransformer

    device = local_engine(dnd.engine, "a measurement").base.model.device
    return SentenceTransformer(resolve(dnd.encoder.name, dnd.home), device=str(device))
