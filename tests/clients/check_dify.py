"""Dify's OpenAI-compatible plugin, by the classes it is built on and the example's credentials."""

from __future__ import annotations

import json
from typing import Any

from common import ENCODER, EXAMPLES, KEY, MODEL, QUESTION, SAYS, URL
from dify_plugin.entities.model.llm import LLMResultChunkDelta
from dify_plugin.entities.model.message import PromptMessageTool, UserPromptMessage
from dify_plugin.errors.model import CredentialsValidateFailedError
from dify_plugin.interfaces.model.openai_compatible.llm import OAICompatLargeLanguageModel
from dify_plugin.interfaces.model.openai_compatible.text_embedding import OAICompatEmbeddingModel

WEATHER = PromptMessageTool(
    name="weather",
    description="The weather in a city.",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)


def invoke(llm: OAICompatLargeLanguageModel, credentials: dict[str, Any], **how: Any) -> list[LLMResultChunkDelta]:
    """The parts of an answer; one without a stream."""
    asked = [UserPromptMessage(content=QUESTION)]
    made = llm.invoke(MODEL, credentials, asked, {"temperature": 0.2, "max_tokens": 64}, **how)
    return [part.delta for part in made]


def main(credentials: dict[str, Any]) -> None:
    llm = OAICompatLargeLanguageModel(model_schemas=[])
    llm.validate_credentials(MODEL, credentials)
    llm.validate_credentials(MODEL, {**credentials, "stream_mode_auth": "use"})
    try:
        llm.validate_credentials("nobody", credentials)
        raise AssertionError("a model that is not there was found")
    except CredentialsValidateFailedError:
        pass
    usages = []
    for stream in (False, True):
        parts = invoke(llm, credentials, stream=stream)
        assert "".join(part.message.content for part in parts) == SAYS and (len(parts) > 2) == stream, parts
        # without usage in the stream it would fetch a tokenizer from the network
        usages.append((parts[-1].usage.prompt_tokens, parts[-1].usage.completion_tokens))
        calls = [
            c for part in invoke(llm, credentials, stream=stream, tools=[WEATHER]) for c in part.message.tool_calls
        ]
        assert [c.function.arguments for c in calls] == ['{"city": "Paris"}'], calls
    assert usages[0] == usages[1] and min(usages[0]) > 0, usages
    text = {**credentials, "mode": "completion"}
    llm.validate_credentials(MODEL, text)
    assert invoke(llm, text, stream=False)[0].message.content == SAYS
    OAICompatEmbeddingModel(model_schemas=[]).validate_credentials(ENCODER, credentials)


if __name__ == "__main__":
    example = json.loads((EXAMPLES / "dify" / "credentials.json").read_text("utf-8"))
    main({**example, "endpoint_url": URL, "api_key": KEY})
