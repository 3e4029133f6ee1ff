"""How fast the engine answers: decoding batches, many clients at once, prompts with a common head."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from dnd_sdk.bench.adapting import NEXT_TO_NOTHING
from dnd_sdk.bench.rivals import Peft, Plain
from dnd_sdk.bench.timing import Timed, in_turn, ratio
from dnd_sdk.bench.workload import N_ADAPTERS, Workload
from dnd_sdk.engine import CompletionRequest

_WARM_UPS = 1
_CLIENT_REQUESTS = 2
"""Requests that each of several clients sends, one after the other: rows end and begin while others go on."""
_SHORTEST_S = 1e-6
"""Of a token, where load made the longer answer seem the faster one."""


def time_decoding(work: Workload) -> list[dict[str, Any]]:
    """By batch and number of different adapters: seconds of a step of decoding, and over that of the base.

    A step's time is that of long answers less that of answers of one token, so that reading the prompts is not in it.
    """
    cases = [(rows, n) for rows in work.sizes.batches for n in (0, 1, N_ADAPTERS) if n <= rows]
    batches = [_Batch(work, rows, n) for rows, n in cases]
    seconds = _timed(work, *(call for b in batches for call in (b.first, b.whole)))
    steps = {
        case: [max(whole - first, _SHORTEST_S) / b.steps for first, whole in zip(*pair, strict=True)]
        for case, b, pair in zip(cases, batches, zip(seconds[::2], seconds[1::2], strict=True), strict=True)
    }
    return [
        {
            "batch": rows,
            "adapters": n,
            "step_ms": 1e3 * statistics.median(steps[rows, n]),
            "tokens_s": rows / statistics.median(steps[rows, n]),
            "over_base": ratio(steps[rows, n], steps[rows, 0]),
        }
        for rows, n in cases
    ]


class _Batch:
    """Answers of `n_rows` prompts together, by `n_adapters` different adapters; 0: by the base."""

    def __init__(self, work: Workload, n_rows: int, n_adapters: int) -> None:
        self._work = work
        self._adapters = [work.adapters[i % n_adapters] if n_adapters else None for i in range(n_rows)]
        self._made: list[int] = []

    @property
    def steps(self) -> float:
        """Steps of decoding after the first, by the tokens that were made."""
        return max(1.0, statistics.mean(self._made) / len(self._adapters) - 1)

    def first(self) -> None:
        """Answers of one token."""
        self._answer(1)

    def whole(self) -> None:
        """Answers of full length."""
        self._made.append(self._answer(self._work.sizes.decode_tokens))

    def _answer(self, n_tokens: int) -> int:
        return self._work.answer([self._work.request(self._work.story(), a, n_tokens) for a in self._adapters])


def time_clients(work: Workload) -> dict[str, Any]:
    """Tokens per second of several threads that use eight adapters, beside peft and transformers one by one."""
    base = work.engine.base
    rival = Peft(base, work.engine.layout, {a: NEXT_TO_NOTHING * work.weights() for a in work.adapters})
    plain = Plain(base)

    def by_peft(adapter: str, chat: str) -> tuple[int, str]:
        rival.set_adapter(adapter)
        return rival.answer(chat, work.sizes.answer_tokens)

    def by_plain(adapter: str, chat: str) -> tuple[int, str]:
        return plain.answer(chat, work.sizes.answer_tokens)

    same = _same_answers(work, [by_peft, by_plain])
    ours = [_Clients(work, n) for n in work.sizes.clients]
    rivals = [_OneByOne(work, by) for by in (by_peft, by_plain)]
    everybody: list[_Clients | _OneByOne] = [*ours, *rivals]
    seconds = _timed(work, *(c.ask for c in everybody))
    rates = [
        [n / s for n, s in zip(c.made[_WARM_UPS:], t, strict=True)] for c, t in zip(everybody, seconds, strict=True)
    ]
    *own, peft, transformers = rates
    return {
        "peft_tokens_s": statistics.median(peft),
        "transformers_tokens_s": statistics.median(transformers),
        "same_answers": same,
        "clients": [
            {
                "n": n,
                "tokens_s": statistics.median(rate),
                "over_peft": ratio(rate, peft),
                "over_transformers": ratio(rate, transformers),
            }
            for n, rate in zip(work.sizes.clients, own, strict=True)
        ],
    }


_Answer = Callable[[str, str], tuple[int, str]]
"""Answers for an adapter and a chat: how many tokens, and their text."""


def _same_answers(work: Workload, rivals: Sequence[_Answer]) -> float:
    """The share of the rivals' answers that are the engine's, word for word: whether all do the same work."""
    chats = [work.story() for _ in range(work.sizes.rival_requests)]
    found = []
    for adapter, chat in zip(work.adapters, chats, strict=False):
        (ours,) = work.engine.complete([work.request(chat, adapter, work.sizes.answer_tokens)])
        found += [by(adapter, chat)[1].strip() == ours.text.strip() for by in rivals]
    return statistics.mean(found)


class _Clients:
    """Threads that each send one request after the other."""

    def __init__(self, work: Workload, n: int) -> None:
        self._work, self._n = work, n
        self.made: list[int] = []
        """Tokens of each round."""

    def ask(self) -> None:
        """One round; what goes wrong in a thread is raised here."""
        made: list[int] = []
        errors: list[BaseException] = []

        def client(requests: list[CompletionRequest]) -> None:
            try:
                made.extend(self._work.answer([request]) for request in requests)
            except BaseException as e:  # a round with fewer answers would be the fastest
                errors.append(e)

        each = [self._requests(i) for i in range(self._n)]
        threads = [threading.Thread(target=client, args=(requests,)) for requests in each]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        self.made.append(sum(made))

    def _requests(self, client: int) -> list[CompletionRequest]:
        work = self._work
        adapters = [work.adapters[(client + i) % N_ADAPTERS] for i in range(_CLIENT_REQUESTS)]
        return [work.request(work.story(), adapter, work.sizes.answer_tokens) for adapter in adapters]


class _OneByOne:
    """A rival that answers requests of different adapters one after the other."""

    def __init__(self, work: Workload, answer: _Answer) -> None:
        self._work, self._answer = work, answer
        self.made: list[int] = []
        """Tokens of each round."""

    def ask(self) -> None:
        """One round."""
        adapters = [self._work.adapters[i % N_ADAPTERS] for i in range(self._work.sizes.rival_requests)]
        self.made.append(sum(self._answer(a, self._work.story())[0] for a in adapters))


def time_shared_prompts(work: Workload) -> dict[str, Any]:
    """Seconds to answer prompts with a common head of `sizes.head_tokens`, beside prompts with a head each.

    Together in one call, and one call after the other; answers of one token, all by one adapter.
    """
    n, head = work.sizes.sharing, partial(work.head, work.sizes.head_tokens)
    asked: dict[str, list[CompletionRequest]] = {}

    def renew() -> None:  # not timed
        common = head()
        asked["shared"] = [_under(work, common) for _ in range(n)]
        asked["own"] = [_under(work, head()) for _ in range(n)]

    def in_a_row(which: str) -> None:
        for request in asked[which]:
            work.answer([request])

    renew()
    calls = [
        partial(f, which) for f in (lambda which: work.answer(asked[which]), in_a_row) for which in ("own", "shared")
    ]
    own, shared, own_row, shared_row = in_turn(
        *((call, renew) for call in calls), repeats=work.sizes.rounds, clock=work.clock, warm_ups=_WARM_UPS
    )
    return {
        "prompts": n,
        "head_tokens": work.sizes.head_tokens,
        "together": {
            "own_s": statistics.median(own),
            "shared_s": statistics.median(shared),
            "shared_over_own": ratio(shared, own),
        },
        "in_a_row": {
            "own_s": statistics.median(own_row),
            "shared_s": statistics.median(shared_row),
            "shared_over_own": ratio(shared_row, own_row),
        },
    }


def _under(work: Workload, head: str) -> CompletionRequest:
    return work.request(f"{head}\n{work.story()}", work.adapters[0], 1)


def _timed(work: Workload, *calls: Callable[[], Any]) -> list[list[float]]:
    timed: list[Timed] = [(call, lambda: None) for call in calls]
    return in_turn(*timed, repeats=work.sizes.rounds, clock=work.clock, warm_ups=_WARM_UPS)
