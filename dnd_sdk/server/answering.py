"""Answers on their way: every choice of one HTTP request is a request of the engine; their pieces meet in one queue.

A client that leaves, a stream that is closed and an error of one choice cancel them all: their rows are free within a
token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from fastapi import Request

from dnd_sdk.adapters import Adapter
from dnd_sdk.server.models import chosen_by
from dnd_sdk.server.problems import Problem, RequestError
from dnd_sdk.server.reading import Asked
from dnd_sdk.server.service import Service, note
from dnd_sdk.session import AdapterChoice, AdaptResult, Completion, Submitted


class Piece(NamedTuple):
    """News of one choice."""

    choice: int
    text: str
    completion: Completion | None = None
    """Its end; `text` is empty then."""


class Answers:
    """The choices of one request, being made."""

    def __init__(self, service: Service, asked: Asked, request: Request) -> None:
        self._service, self._asked, self._request = service, asked, request
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self._submitted: list[Submitted] = []
        self._cancelled = False
        self._began = time.monotonic()
        self.adapted: AdaptResult | None = None
        """What came of the request's own prompts, if it has some."""

    async def start(self) -> None:
        """Choose who answers and hand everything in; raises what is wrong with the request. Nothing runs then."""
        self._service.check_room()
        self._service.n_starting += 1  # else all of a burst would find room
        try:
            choice = await self._choice()
            for i in range(self._asked.n_choices):
                await self._service.run(partial(self._submit, i, choice))
        except BaseException:
            self.cancel()
            raise
        finally:
            self._service.n_starting -= 1
        for i, submitted in enumerate(self._submitted):
            submitted.future.add_done_callback(partial(self._over, i))
        self._watch = asyncio.create_task(self._notice_leaving())

    @property
    def adapter(self) -> Adapter | None:
        """Who answers (the first choice, where several prompts are routed one by one); None: the base."""
        return self._submitted[0].chosen.adapter

    @property
    def route(self) -> dict[str, Any]:
        """What is said of it beside the answers."""
        if self.adapted is not None:
            decision, score = str(self.adapted.decision), self.adapted.score
        else:
            decision, score = "base" if self.adapter is None else "reuse", self._submitted[0].chosen.score
        name = None if self.adapter is None else self.adapter.name
        return {"adapter": name, "decision": decision, "score": score, "ms": round(1000 * self.seconds)}

    @property
    def seconds(self) -> float:
        """Since the request was taken up."""
        return time.monotonic() - self._began

    async def pieces(self) -> AsyncIterator[Piece]:
        """Text as it comes, then each choice's end; raises what went wrong, or that the client has left."""
        left, first = len(self._submitted), True
        try:
            while left:
                news = await self._news.get()
                if isinstance(news, BaseException):
                    raise news
                if first and news.text:
                    self._service.metrics.first_token.observe(self.seconds)
                    first = False
                if news.completion is not None:
                    left -= 1
                    self._count(news.completion)
                yield news
        finally:
            self._watch.cancel()
            self.cancel()

    async def whole(self) -> list[Completion]:
        """All choices, in order."""
        found = {p.choice: p.completion async for p in self.pieces() if p.completion is not None}
        return [found[i] for i in range(len(found))]

    def cancel(self) -> None:
        """End what still runs, and what a thread may still be handing in."""
        self._cancelled = True
        for submitted in self._submitted:
            submitted.future.cancel()

    async def _choice(self) -> AdapterChoice:
        service, asked = self._service, self._asked
        choice = await service.run(partial(chosen_by, service, asked.model))
        wanted = asked.adapting
        if wanted is None:
            return choice
        if wanted.mode == "base":
            return None
        if wanted.prompts is None:
            return choice
        made = await service.run_long(partial(service.dnd.adapt, wanted.prompts, wanted.mode))
        service.metrics.adaptations.labels(made.decision).inc()
        self.adapted = made
        return made.adapter

    def _submit(self, i: int, choice: AdapterChoice) -> None:
        asked, sampling = self._asked, dict(self._asked.sampling)
        if sampling.get("seed") is not None:
            sampling["seed"] += i
        submitted = self._service.dnd.submit(
            asked.prompts[i // asked.n],
            choice,
            tools=asked.tools or None,
            emit=(lambda text: self._tell(partial(Piece, i, text))) if asked.stream else None,
            may_clip=asked.may_clip,
            **sampling,
        )
        self._submitted.append(submitted)
        if self._cancelled:  # whoever waited for this thread has gone
            submitted.future.cancel()

    def _tell(self, news: Callable[[], Piece | BaseException]) -> None:
        # from the thread that runs the base: the loop makes of it what is to be made
        with suppress(RuntimeError):  # the loop is closed: nobody is left
            self._loop.call_soon_threadsafe(lambda: self._news.put_nowait(news()))

    def _over(self, i: int, future: object) -> None:
        self._tell(partial(self._end, i))

    def _end(self, i: int) -> Piece | BaseException:
        try:
            return Piece(i, "", self._submitted[i].completion(0))
        except CancelledError:
            return gone()
        except BaseException as error:  # of the model: the client is told, whatever it is
            return error

    def _count(self, answer: Completion) -> None:
        self._service.metrics.answered(answer)
        self._service.used(answer.adapter)
        seen = self._request.scope.get("dnd", {})
        note(
            self._request,
            model=self._asked.model,
            adapter=answer.adapter,
            prompt_tokens=answer.usage["prompt_tokens"],
            completion_tokens=seen.get("completion_tokens", 0) + answer.usage["completion_tokens"],
        )
        if self._service.settings.log_prompts:
            note(self._request, prompts=self._asked.prompts, answers=[*seen.get("answers", ()), answer.text])

    async def _notice_leaving(self) -> None:
        """The body was read before: what comes next is the client's leaving."""
        try:
            while (await self._request.receive())["type"] != "http.disconnect":
                pass
        finally:
            self.cancel()  # here, too: nobody may have begun to read the pieces
        self._news.put_nowait(gone())


def gone() -> RequestError:
    """The client has left, or its answer was ended for it."""
    return RequestError(Problem(499, "the client has gone", "server_error", None, "cancelled"))
