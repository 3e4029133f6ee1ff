"""How long the event loop stands still while `DnDLLM` answers, beside an idle loop; a figure, so not a test.

Run `python tests/loop_gap.py` on a machine that does nothing else; it prints one JSON object, times in milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable

from dnd_sdk.integrations.llamaindex import DnDEmbedding, DnDLLM

TICK_S = 0.005


async def gaps(work: Awaitable[object]) -> list[float]:
    """How much later than asked each tick came while `work` was running, in ms, shortest first."""
    task = asyncio.ensure_future(work)
    late = []
    while not task.done():
        asked = time.perf_counter()
        await asyncio.sleep(TICK_S)
        late.append(1000 * (time.perf_counter() - asked - TICK_S))
    await task
    return sorted(late)


async def measure(llm: DnDLLM, embed: DnDEmbedding) -> dict[str, dict[str, float]]:
    """Each kind of work, warm."""

    async def stream() -> None:
        async for _ in await llm.astream_complete("Tell me about rivers."):
            pass

    kinds = {
        "idle": lambda: asyncio.sleep(5),
        "acomplete": lambda: llm.acomplete("Tell me about rivers."),
        "astream_complete": stream,
        "four at once": lambda: asyncio.gather(*(llm.acomplete(f"Tell me about river {i}.") for i in range(4))),
        "embedding": lambda: embed.aget_text_embedding_batch([f"river {i} " * 50 for i in range(100)]),
    }
    found = {}
    for name, work in kinds.items():
        late = await gaps(work())
        found[name] = {"max": late[-1], "p99": late[int(0.99 * (len(late) - 1))], "ticks": len(late)}
    return found


def main() -> None:
    """Load, warm up, measure."""
    llm = DnDLLM(adapter=None, max_new_tokens=64)
    llm.complete("warm up", max_tokens=2)
    print(json.dumps(asyncio.run(measure(llm, DnDEmbedding(llm.dnd))), indent=1))


if __name__ == "__main__":
    main()
