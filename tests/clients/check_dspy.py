"""DSPy: a bare call, one held to a schema, a signature with usage, and the same asynchronously."""

from __future__ import annotations

import asyncio
from typing import Literal

import dspy
from common import KEY, MODEL, QUESTION, SAYS, URL, run_example, says
from pydantic import BaseModel


class Ticket(BaseModel):
    """A structured answer."""

    queue: Literal["billing", "login", "shipping"]
    urgent: bool


if __name__ == "__main__":
    lm = dspy.LM(f"openai/{MODEL}", api_base=URL, api_key=KEY, cache=False)
    dspy.configure(lm=lm, track_usage=True)
    assert lm(QUESTION) == [SAYS], lm(QUESTION)
    Ticket.model_validate_json(lm(QUESTION, response_format=Ticket)[0])
    ask = dspy.Predict("question -> answer")
    made = ask(question=QUESTION)
    assert made.answer == "Paris", made
    usage = made.get_lm_usage()[f"openai/{MODEL}"]
    assert usage["total_tokens"] > usage["completion_tokens"] > 0, usage
    assert asyncio.run(ask.acall(question=QUESTION)).answer == "Paris"
    says(run_example("dspy/predict.py"), "answer: Paris")
