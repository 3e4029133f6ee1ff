"""Tools, calls and results go through the base's chat template, and a template that would lose them is found out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from engine_parts import tiny_engine
from helpers import CHAT_TEMPLATE, tiny_tokenizer
from tiny_world import World
from tool_parts import ADD, CALLED, FUNCTION, HERMES_TEMPLATE, LLAMA_TEMPLATE, RESULT

from dnd_sdk.chat import check_renders_tools, renders_tools
from dnd_sdk.chat.template import prompt_ids
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, InputError

QUESTION = {"role": "user", "content": "2 + 3?"}


def shown(messages: Any, tools: Any = None, template: str | None = HERMES_TEMPLATE) -> str:
    """What the model reads."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer.decode(prompt_ids(tokenizer, messages, tools))


def test_tools_calls_and_results_are_rendered_by_the_template() -> None:
    call = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
    assert shown([QUESTION, CALLED, RESULT], [ADD]) == (
        f"<|im_start|>system\nTools:\n{json.dumps(ADD)}\n<|im_end|>\n<|im_start|>user\n2 + 3?<|im_end|>\n"
        f"<|im_start|>assistant\n{call}<|im_end|>\n<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\n"
    )
    llama = shown([QUESTION, CALLED, RESULT], [ADD], LLAMA_TEMPLATE)
    assert '{"name": "add", "parameters": {"a": 2, "b": 3}}<|im_end|>\n<|im_start|>ipython\n5' in llama


def test_calls_in_openais_own_form_are_the_same() -> None:
    wire = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function"}]}
    wire["tool_calls"][0]["function"] = {"name": "add", "arguments": json.dumps(FUNCTION["arguments"])}
    assert shown([QUESTION, wire, RESULT]) == shown([QUESTION, CALLED, RESULT])


@pytest.mark.parametrize("tools", [None, [], ()])
def test_without_tools_nothing_changes(tools: Any) -> None:
    plain = shown([QUESTION], template=CHAT_TEMPLATE)
    nothing = {"tool_calls": None, "tool_call_id": "", "name": "Ann"}
    assert shown([QUESTION], tools) == shown([QUESTION | nothing], tools) == plain
    assert shown([QUESTION], tools, LLAMA_TEMPLATE) == plain


LOSSY = {
    "none at all": None,
    "messages only": CHAT_TEMPLATE,
    "tools but no calls": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHAT_TEMPLATE,
    "no results": HERMES_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"),
    "refuses the role": "{{ raise_exception('no tools here') if messages[-1].role == 'tool' }}" + HERMES_TEMPLATE,
    "adds what is not there": "{{ 1 + none if tools }}" + HERMES_TEMPLATE,
}


@pytest.mark.parametrize("template", LOSSY.values(), ids=LOSSY)
@pytest.mark.parametrize(("messages", "tools"), [([QUESTION], [ADD]), ([QUESTION, CALLED, RESULT], None)])
def test_a_template_that_would_lose_them_is_refused(template: str | None, messages: Any, tools: Any) -> None:
    with pytest.raises(ConfigError, match=r"does not render tools.*\n  fix: use DnDLLM with ReActAgent, or .*Qwen2.5"):
        shown(messages, tools, template)
    if template and "tools else" not in template:
        assert "2 + 3?" in shown([QUESTION], template=template)


def test_both_forms_are_known_to_render_tools() -> None:
    tokenizer = tiny_tokenizer()
    for template, renders in ((HERMES_TEMPLATE, True), (LLAMA_TEMPLATE, True), (CHAT_TEMPLATE, False)):
        tokenizer.chat_template = template
        assert renders_tools(tokenizer) is renders


def test_a_template_is_probed_once_and_again_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, other, probed = tiny_tokenizer(), tiny_tokenizer(), []
    real = type(tokenizer).apply_chat_template

    def counted(self: Any, *args: Any, **how: Any) -> Any:
        probed.append(self)
        return real(self, *args, **how)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)
    both = {"default": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE}
    for template, renders in ((HERMES_TEMPLATE, True), (CHAT_TEMPLATE, False), (None, False), (both, False)):
        tokenizer.chat_template = template
        before = len(probed)
        assert [renders_tools(tokenizer) for _ in range(3)] == [renders] * 3
        assert len(probed) == before + (template is not None)
    both["tool_use"] = HERMES_TEMPLATE
    assert renders_tools(tokenizer) and not renders_tools(other), "changed in place; each tokenizer has its own answer"


@pytest.mark.parametrize(
    ("messages", "tools", "match"),
    [
        ([QUESTION], ["add"], "tool 0 is not a"),
        ([QUESTION], [ADD, {"name": "add"}], "tool 1 is not a"),
        ([QUESTION], [{"type": "function", "function": {"name": ""}}], "tool 0 is not a"),
        ([QUESTION, CALLED | {"tool_calls": [{"function": {}}]}], None, "message 1 has a tool call without"),
        ([QUESTION, CALLED | {"tool_calls": "add"}], None, "message 1 has a tool call without"),
        ([QUESTION, CALLED | {"tool_calls": 7}], None, "message 1 has tool_calls that are not a list"),
        (
            [CALLED | {"tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}],
            None,
            "message 0 has a tool call whose arguments are not JSON",
        ),
        ([QUESTION, {"role": "assistant", "content": None}], None, "message 1 is not a"),
        ([QUESTION, {"role": "assistant", "content": 3, "tool_calls": CALLED["tool_calls"]}], None, "message 1 is not"),
    ],
)
def test_malformed_tools_and_calls_are_refused(messages: Any, tools: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        shown(messages, tools)


def test_what_the_template_says_of_calls_is_said() -> None:
    twice = CALLED | {"tool_calls": CALLED["tool_calls"] * 2}
    with pytest.raises(InputError, match="one call at a time"):
        shown([QUESTION, twice], template=LLAMA_TEMPLATE)


def test_the_engine_counts_the_tools() -> None:
    engine = tiny_engine()
    engine.base.tokenizer.chat_template = HERMES_TEMPLATE
    plain, offered = engine.prompt_ids([QUESTION], 1), engine.prompt_ids([QUESTION], 1, [ADD])
    assert len(offered) > len(plain) + len(json.dumps(ADD))
    with pytest.raises(InputError, match="shorten the prompt"):
        engine.prompt_ids([QUESTION], 1, [ADD] * 9)


def test_complete_and_stream_offer_the_tools(world: World) -> None:
    dnd = world.session()
    with pytest.raises(ConfigError, match="does not render tools"):
        dnd.complete("hi", tools=[ADD])
    with pytest.raises(ConfigError, match="does not render tools"):
        dnd.stream("hi", tools=[ADD])
    dnd.base.tokenizer.chat_template = HERMES_TEMPLATE
    n = len(dnd.engine.prompt_ids("hi", 4, [ADD]))
    answer = dnd.complete("hi", tools=[ADD], max_new_tokens=4)
    assert answer.usage["prompt_tokens"] == n > dnd.complete("hi", max_new_tokens=4).usage["prompt_tokens"]
    with dnd.stream("hi", tools=[ADD], max_new_tokens=4) as stream:
        assert ("".join(stream), stream.result.usage) == (answer.text, answer.usage)
    batch = dnd.complete_batch(["hi", "hi"], tools=[ADD], max_new_tokens=4)
    assert [b.text for b in batch] == [answer.text] * 2


@pytest.mark.real
def test_the_small_base_renders_no_tools(real_home: Home) -> None:
    from dnd_sdk.models import SMALL_BASE, load_base

    with pytest.raises(ConfigError, match="does not render tools"):
        check_renders_tools(load_base(SMALL_BASE, real_home).tokenizer)
