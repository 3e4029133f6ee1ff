"""Read requests into the fields of a pydantic class with LlamaIndex; every answer is held to the class's schema.

Run `python examples/llamaindex_structured.py`.
"""

from __future__ import annotations

from typing import Literal

from llama_index.core import PromptTemplate
from pydantic import BaseModel, Field

from dnd_sdk.integrations.llamaindex import DnDLLM

REQUESTS = (
    "You took the annual fee twice. Please put the money back on my card.",
    "Where is order 30418? It was supposed to be here on Friday.",
    "I cannot sign in: the code by text message never comes. I need it today!",
)
ASK = PromptTemplate("Fill in the fields for this support request.\n\nRequest: {text}")


class Ticket(BaseModel):
    """A support ticket."""

    queue: Literal["billing", "shipping", "login"]
    urgent: bool
    order: int | None = Field(description="The number of the order, if one is named.", ge=0, le=99_999)


def main() -> None:
    """Print each request with its ticket."""
    llm = DnDLLM(adapter=None, max_new_tokens=64)
    for text in REQUESTS:
        ticket = llm.structured_predict(Ticket, ASK, text=text)
        print(f"{text}\n  {ticket!r}")


if __name__ == "__main__":
    main()
