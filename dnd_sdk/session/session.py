"""`DnD`: one resident base and everything an agent needs around it, safe to share between threads.

* Every call carries its own adapter; there is no "current adapter" that two threads could fight over.
* Adapters come into the engine when a call names them, and leave it least recently used.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dnd_sdk.adaptation import Adaptation, AdaptResult, Limits, Mode, Parts
from dnd_sdk.adapters import Adapter
from dnd_sdk.chat import Prompt, Tools
from dnd_sdk.config import Home, callable_of, flag, real_number
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.lora import LoraLayout
from dnd_sdk.models import DEFAULT_BASE
from dnd_sdk.observing import Observer, ObserveResult, PromptStream, StreamSettings
from dnd_sdk.prompts import PromptSet, Role, as_role, clean_prompts, role_text
from dnd_sdk.routing import RouteDecision, choose_exemplars
from dnd_sdk.session.choosing import AdapterChoice, Choosing, asked, of_row, sampling_options
from dnd_sdk.session.elsewhere import given_vllm, load_parts_for
from dnd_sdk.session.loading import DEFAULT_RANK, load_parts
from dnd_sdk.session.results import Completion, completion
from dnd_sdk.session.stream import CompletionStream, Submitted

if TYPE_CHECKING:
    from torch import Tensor


class DnD:
    """Prompts in, an adapter out, hot-swapped on one resident LLM."""

    def __init__(
        self,
        parts: Parts,
        *,
        limits: Limits | None = None,
        stream_settings: StreamSettings | None = None,
        calibrate: bool = True,
    ) -> None:
        """A session over parts that fit each other; `load` makes them.

        `limits` bound what generated weights may be, `stream_settings` what `observe` takes for a task; None: the
        defaults. `calibrate` as for `load`.
        """
        self.parts = parts
        self.base, self.generator, self.encoder = parts.base, parts.generator, parts.encoder
        self.store, self.router, self.engine, self.home = parts.store, parts.router, parts.engine, parts.home
        self._choosing = Choosing(parts)
        self._adaptation = Adaptation(parts, limits or Limits(), calibrate=calibrate)
        self._observer = Observer(parts, lambda prompts: self.adapt(prompts), stream_settings)

    @classmethod
    def load(
        cls,
        base: str = DEFAULT_BASE,
        generator: str | os.PathLike[str] | None = None,
        *,
        encoder: str | None = None,
        home: str | os.PathLike[str] | Home | None = None,
        device: str = "auto",
        dtype: str = "auto",
        n_slots: int | None = None,
        r: int | None = None,
        deterministic: bool = False,
        calibrate: bool = True,
        engine: str = "embedded",
        url: str | None = None,
        key: str | None = None,
        shared: str | os.PathLike[str] | None = None,
        vllm_args: str | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> DnD:
        """Load the models once; everything after shares them.

        Args:
            base: An embedded name (`dnd models ls` lists them), a local folder or a Hugging Face id of a causal LM.
            generator: A generator's folder; None is the one shipped for this base (by name, else by weights), if any.
            encoder: None is the one the generator was made with.
            home: Folder for adapters and weights; None is `DND_HOME`, else the user data folder.
            device: `auto`, `cpu`, `cuda`, ...
            dtype: `auto`, `float32`, `bfloat16` or `float16`.
            n_slots: How many adapters stay swapped in; None is 64, or as many as an eighth of the free memory holds.
            r: Rank of the slots, for imported adapters of a larger rank than the generator's; None is the generator's.
            deterministic: Whether an answer never depends, by a rounding, on what else is answered at the time; slower.
            calibrate: What `adapt` and `observe` do unless told otherwise.
            engine: `embedded`, our own; `vllm`, a vLLM server that runs the base and sees the home; or `vllm-local`, a
                vLLM that is started in this process. Encoder, generator, router and store stay here; `base` says which
                one a server has, whose own affair `dtype` is, and `n_slots` how many adapters vLLM has at a time.
            url: Of that server, such as `http://127.0.0.1:8000`, or `unix:/PATH` of its socket.
            key: What that server asks of whoever calls (its `--api-key`); None: nothing.
            shared: Where that server sees the home folder; None: at the same path.
            vllm_args: Further options for `vllm-local`, as `vllm serve` takes them: `--max-model-len 4096`.
            progress: Told in words about fetching and converting, and of adapters that the home has for other embedded
                bases while it has none for this one; None: of these the log is warned.

        Raises:
            WeightsUnavailableError: A model that can be neither found nor fetched.
            GeneratorError: The generator's folder is missing or damaged.
            LayoutMismatchError: The generator was made for another base, or the server runs another.
            BackendError: The server cannot be reached, or vLLM does not start.
            MissingExtraError: vLLM is to run here and is not installed.
        """
        flag("calibrate", calibrate)
        flag("deterministic", deterministic)
        where = home if isinstance(home, Home) else Home.find(home)
        vllm = given_vllm(engine, url, key, shared, vllm_args, dtype=dtype, deterministic=deterministic)
        if vllm is not None:
            return cls(
                load_parts_for(vllm, base, generator, encoder, where, device, n_slots, r, progress),
                calibrate=calibrate,
            )
        parts = load_parts(base, generator, encoder, where, device, dtype, n_slots, r, deterministic, progress)
        return cls(parts, calibrate=calibrate)

    @property
    def observed(self) -> PromptStream:
        """The stream that `observe` has taken in, this session's and what was kept of earlier ones."""
        return self._observer.stream

    @property
    def layout(self) -> LoraLayout:
        """The LoRA layout that every adapter of this session has."""
        return self.engine.layout

    def adapt(
        self,
        prompts: Sequence[str] | PromptSet,
        mode: Mode = "auto",
        name: str | None = None,
        *,
        role: Role | str | None = None,
        top_k: int = 3,
        calibrate: bool | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> AdaptResult:
        """Decide how to serve the task behind `prompts`, and have its adapter ready.

        Args:
            prompts: Unlabeled prompts of one task; duplicates and blanks are dropped, very many are sampled.
            mode: `"reuse"` never makes an adapter, `"generate"` always does, `"merge"` makes one of the nearest stored
                ones, weighted by similarity.
            name: For an adapter that is made; None names it after its content.
            role: The system prompt these prompts come under (`Role`, or text of any form): part of the task, kept with
                the adapter. None: none.
            top_k: How many adapters `"merge"` takes at most.
            calibrate: Whether a generated adapter also loses its taste for one label of a label task, which up to 32 of
                the prompts, read by the base, show (`adaptation.label_calibration`). Adapters made before stay.
                None: as the session was loaded.
            progress: Told the name of each step as it begins (see `AdaptResult.timings_s`); None: nobody is.

        Raises `InputError` for unusable prompts or role, `ConfigError` for a bad mode, name or top_k, `StorageError`
        when it cannot be stored. Whatever is raised, nothing has changed.
        """
        return self._adaptation.run(prompts, mode, name, as_role(role), top_k, calibrate, progress)

    def route(self, prompts: str | Sequence[str], *, role: Role | str | None = None) -> RouteDecision:
        """What `adapt` would decide for several prompts, or what `"auto"` does for a single one; changes nothing."""
        kept = clean_prompts([prompts] if isinstance(prompts, str) else prompts)
        under = as_role(role)
        pooled, text = self._choosing.pooled(kept.prompts, under), role_text(under)
        return self.router.route_one(pooled, text) if len(pooled) == 1 else self.router.route(pooled, role=text)

    def complete(
        self,
        prompt: Prompt,
        adapter: AdapterChoice = None,
        *,
        role: Role | str | None = None,
        tools: Tools | None = None,
        **sampling: Any,
    ) -> Completion:
        """Answer one prompt.

        Args:
            prompt: Text or chat messages.
            adapter: An adapter or its name, `"auto"` (with `tools` it is the base), or None for the base.
            role: The system message; None is the adapter's own, if it has one and the messages have no other.
            tools: JSON schemas of what the model may call, which the base's chat template shows it; calls come back as
                text, the way the base writes them. None: none. `ConfigError` if that template shows no tools.
            sampling: Fields of `SamplingOptions`; `schema`, which the answer is held to, may also be a dict or a
                pydantic class. With `max_new_tokens` too small for it the text ends in the middle, reason `"length"`.
                With tools it holds all the same: `chat.call_schema` is one that makes the answer a call.

        Raises `AdapterNotFoundError` for an unknown name, `LayoutMismatchError` for an adapter of another base.
        """
        return self.complete_batch([prompt], [adapter], role=role, tools=tools, **sampling)[0]

    def complete_batch(
        self,
        prompts: Sequence[Prompt],
        adapters: Sequence[AdapterChoice] | None = None,
        *,
        role: Role | str | None = None,
        tools: Tools | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Answer several prompts together, each with its own adapter; None: all by the base.

        `role`, `tools` and `sampling` are for all; with a `seed`, row i draws with `seed + i`.
        """
        options, under = sampling_options(sampling), as_role(role)
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise InputError("prompts must be a list", fix="use complete() for a single prompt")
        if isinstance(adapters, str) or not isinstance(adapters, Sequence | None):
            raise InputError(f"adapters must be a list, got {type(adapters).__name__}", fix="give one per prompt")
        wanted = list(adapters) if adapters is not None else [None] * len(prompts)
        if len(wanted) != len(prompts):
            raise InputError(f"{len(prompts)} prompts but {len(wanted)} adapters", fix="give one adapter per prompt")
        chosen = [self._choosing.choose(p, a, under, tools) for p, a in zip(prompts, wanted, strict=True)]
        for adapter in {c.adapter.id: c.adapter for c in chosen if c.adapter is not None}.values():
            self.make_resident(adapter)
        requests = [
            asked(prompt, c, under, tools, of_row(options, row))
            for row, (prompt, c) in enumerate(zip(prompts, chosen, strict=True))
        ]
        return [completion(g, c) for g, c in zip(self.engine.complete(requests), chosen, strict=True)]

    def stream(
        self,
        prompt: Prompt,
        adapter: AdapterChoice = None,
        *,
        role: Role | str | None = None,
        tools: Tools | None = None,
        cancel: threading.Event | None = None,
        **sampling: Any,
    ) -> CompletionStream:
        """Answer one prompt piece by piece: iterate for text, then read `.result`; arguments as for `complete`.

        Setting `cancel`, from any thread and at any time, ends the answer within a token.
        """
        if cancel is not None and not isinstance(cancel, threading.Event):
            raise ConfigError(f"cancel must be a threading.Event or None, got {type(cancel).__name__}")
        cancel = cancel or threading.Event()
        options = sampling_options(sampling)
        request, chosen = self._choosing.request(prompt, adapter, as_role(role), tools, options)
        return CompletionStream(self.engine.stream(replace(request, cancel=cancel)), cancel, chosen)

    def submit(
        self,
        prompt: Prompt,
        adapter: AdapterChoice = None,
        *,
        role: Role | str | None = None,
        tools: Tools | None = None,
        emit: Callable[[str], None] | None = None,
        may_clip: bool = False,
        deadline_s: float | None = None,
        **sampling: Any,
    ) -> Submitted:
        """Choose the adapter, hand the prompt in and return, for asyncio and for many requests without a thread each.

        Arguments as for `complete`. `emit` is told each new piece of text, in the thread that runs the base, so it must
        be quick. `may_clip`: `max_new_tokens` becomes what the context leaves, where that is less, instead of an error.
        `deadline_s`: seconds after which the answer ends as if cancelled; None: never.
        """
        if deadline_s is not None:
            deadline_s = real_number("deadline_s", deadline_s, "0 or more", lambda x: x >= 0.0)
        may_clip, emit = flag("may_clip", may_clip), callable_of("emit", emit)
        options = sampling_options(sampling)
        request, chosen = self._choosing.request(prompt, adapter, as_role(role), tools, options)
        request = replace(request, may_clip=may_clip, deadline_s=deadline_s)
        return Submitted(self.engine.submit(request, emit), chosen)

    def observe(self, prompt: str) -> ObserveResult:
        """Take in one prompt of a mixed stream and say which adapter answers it; adapts to tasks that have enough.

        The prompt that completes a task waits for its adaptation. Raises what `adapt` raises; the next prompt of that
        task then tries again. What was seen is kept in the home now and then, and by `close`.
        """
        return self._observer.observe(prompt)

    def import_adapter(
        self,
        folder: str | os.PathLike[str],
        name: str | None = None,
        prompts: Sequence[str] | PromptSet | None = None,
        note: Callable[[str], None] | None = None,
    ) -> Adapter:
        """Take a PEFT LoRA folder made for this base into the store, checked; see `AdapterStore.import_folder`.

        Folders as XTuner, LLaMA-Factory, trl or Axolotl leave them are fine; `adapter.origin` says whose it is.

        `prompts` of its task let the router find it; None: it is used by name only. `note` is told line by line what
        whoever imports it should know, such as weights that were left out; None: the log is warned.
        """
        exemplars: Tensor | None = None
        if prompts is not None:
            kept = prompts if isinstance(prompts, PromptSet) else clean_prompts(prompts)
            exemplars = choose_exemplars(self._choosing.pooled(kept.prompts))
        # not at the slots' rank: a session with smaller ones can use it, too
        usual = DEFAULT_RANK if self.generator is None else self.generator.layout.r
        return self.store.import_folder(
            folder,
            self.layout,
            base_fingerprint=self.base.fingerprint,
            base_name=self.base.name,
            name=name,
            exemplars=exemplars,
            encoder=None if exemplars is None else self.encoder.name,
            encoder_fingerprint=None if exemplars is None else self.encoder.fingerprint,
            least_r=min(usual, self.layout.r),
            note=note,
        )

    def make_resident(self, adapter: Adapter) -> None:
        """Have the engine hold an adapter; its weights are checked when read."""
        self.parts.make_resident(adapter)

    def close(self) -> None:
        """Keep what was observed and have the engine free every idle adapter.

        The models are freed with the last reference to this session.
        """
        self._observer.save()
        self.engine.close()

    def __enter__(self) -> DnD:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
