"""LlamaIndex's own engines and agents on `DnDLLM` and `DnDEmbedding`; the main path also on the embedded base."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from llama_index.core import Document, PromptTemplate, SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.agent.workflow import ReActAgent
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.tools import FunctionTool
from llamaindex_parts import ScriptedDnD, ask, roomy
from paced import put_adapter
from pydantic import BaseModel
from tiny_world import World

from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.integrations.llamaindex import DnDEmbedding, DnDLLM
from dnd_sdk.models import SMALL_BASE
from dnd_sdk.session import DnD

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXTS = ["THE ORDER IS LATE", "333 - 4 * 22", "the cat sat on it"]


@pytest.fixture
def dnd(world: World) -> DnD:
    return roomy(world.session())


@pytest.fixture
def llm(dnd: DnD) -> DnDLLM:
    put_adapter(dnd, "mine", seed=1)
    return DnDLLM(dnd, adapter="mine", max_new_tokens=8)


def index(dnd: DnD) -> VectorStoreIndex:
    return VectorStoreIndex.from_documents([Document(text=t) for t in TEXTS], embed_model=DnDEmbedding(dnd))


class Colour(BaseModel):
    """A colour."""

    name: str
    red: int


def test_query_engine_retrieves_and_answers_with_the_adapter(dnd: DnD, llm: DnDLLM) -> None:
    engine = index(dnd).as_query_engine(llm=llm, similarity_top_k=1)
    got = engine.query(TEXTS[2])
    assert [n.node.get_content() for n in got.source_nodes] == [TEXTS[2]]
    assert str(got) == str(asyncio.run(engine.aquery(TEXTS[2]))) != ""
    base = index(dnd).as_query_engine(llm=DnDLLM(dnd, adapter=None, max_new_tokens=8), similarity_top_k=1)
    assert str(base.query(TEXTS[2])) != str(got)
    streamed = index(dnd).as_query_engine(llm=llm, similarity_top_k=1, streaming=True).query(TEXTS[2])
    assert "".join(streamed.response_gen) == str(got)


def test_chat_engines_remember(dnd: DnD, llm: DnDLLM) -> None:
    engine = SimpleChatEngine.from_defaults(llm=llm)
    first = engine.chat("hello")
    assert str(first) == ask(llm, "complete", "hello").text
    second = asyncio.run(engine.achat("and now?"))
    assert [m.content for m in engine.chat_history] == ["hello", str(first), "and now?", str(second)]
    assert str(second) == llm.chat(engine.chat_history[:3]).message.content
    context = index(dnd).as_chat_engine(chat_mode="context", llm=llm, similarity_top_k=1)
    said = "".join(context.stream_chat(TEXTS[0]).response_gen)
    assert context.chat_history[-1].content == said.strip() != ""  # the engine strips what it remembers


@pytest.mark.parametrize("streaming", [False, True])
def test_react_agent_uses_a_tool(streaming: bool) -> None:
    thought = 'Thought: I must add.\nAction: add\nAction Input: {"a": 2, "b": 3}'
    scripted = ScriptedDnD(thought, "Thought: I can answer.\nAnswer: It is 5.")
    used: list[tuple[int, int]] = []

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        used.append((a, b))
        return a + b

    agent = ReActAgent(tools=[FunctionTool.from_defaults(add)], llm=DnDLLM(scripted), streaming=streaming)

    async def run() -> str:
        return str(await agent.run("What is 2 + 3?"))

    assert asyncio.run(run()) == "It is 5."
    assert used == [(2, 3)]
    assert "Observation: 5" in scripted.chats[1][0][-1]["content"]


def test_structured_output_is_parsed() -> None:
    said = json.dumps({"name": "teal", "red": 0})
    llm = DnDLLM(ScriptedDnD(said, said, said, said))
    wanted, ask_for = Colour(name="teal", red=0), PromptTemplate("A colour like {what}.")
    assert llm.structured_predict(Colour, ask_for, what="the sea") == wanted
    assert asyncio.run(llm.astructured_predict(Colour, ask_for, what="the sea")) == wanted
    assert llm.as_structured_llm(Colour).complete("A colour.").raw == wanted
    *_, last = llm.stream_structured_predict(Colour, ask_for, what="the sea")
    assert last.model_dump() == wanted.model_dump()


def test_options_of_structured_predict_reach_the_engine() -> None:
    scripted = ScriptedDnD('{"name": "x", "red": 1}')
    options = {"max_tokens": 5, "adapter": "mine"}
    DnDLLM(scripted).structured_predict(Colour, PromptTemplate("One."), llm_kwargs=options)
    chat, adapter, how = scripted.chats[0]
    assert (adapter, how["max_new_tokens"], chat[0]["role"]) == ("mine", 5, "user")
    with pytest.raises(ConfigError, match="no option 'max_length'"):
        DnDLLM(scripted).structured_predict(Colour, PromptTemplate("One."), llm_kwargs={"max_length": 5})


def test_embeddings_are_the_encoders_vectors(dnd: DnD) -> None:
    embed = DnDEmbedding(dnd, embed_batch_size=2)
    expected = dnd.encoder.encode(TEXTS, with_states=False).pooled
    assert isinstance(embed, BaseEmbedding) and embed.model_name == dnd.encoder.name
    torch.testing.assert_close(torch.tensor(embed.get_text_embedding_batch(TEXTS)), expected)
    torch.testing.assert_close(torch.tensor(asyncio.run(embed.aget_text_embedding_batch(TEXTS))), expected)
    for one in (embed.get_query_embedding, embed.get_text_embedding):
        torch.testing.assert_close(torch.tensor(one(TEXTS[1])), expected[1])
    for aone in (embed.aget_query_embedding, embed.aget_text_embedding):
        torch.testing.assert_close(torch.tensor(asyncio.run(aone(TEXTS[1]))), expected[1])
    with pytest.raises(InputError, match="blank"):
        embed.get_text_embedding(" ")


def test_embedding_settings_survive_serialisation_and_load_alone(world: World, dnd: DnD) -> None:
    embed = DnDEmbedding(dnd)
    alone = DnDEmbedding.from_dict(json.loads(json.dumps(embed.to_dict())))
    assert alone.to_dict() == embed.to_dict() and alone.class_name() == "DnDEmbedding"
    assert alone.get_text_embedding("hello") == embed.get_text_embedding("hello")
    with pytest.raises(ConfigError, match="fix: use model_name"):
        DnDEmbedding(model_nam="x")


@pytest.mark.real
def test_rag_and_adapted_answers_on_the_embedded_base(warm_home: Home) -> None:
    """The embedded base behind LlamaIndex: lazily loaded, adapted, routed and retrieved for."""
    job = EXAMPLES / "support_tickets"
    prompts = [json.loads(line)["prompt"] for line in (job / "prompts.jsonl").open(encoding="utf-8")]
    questions = [json.loads(line)["prompt"] for line in (job / "questions.jsonl").open(encoding="utf-8")][:3]
    llm = DnDLLM(base=SMALL_BASE, home=str(warm_home.root), device="cpu", max_new_tokens=16)
    adapter = llm.dnd.adapt(prompts).adapter
    assert adapter is not None
    for question in questions:
        routed = ask(llm, "acomplete", question)
        assert routed.raw["dnd"] == {"adapter": adapter.name, "decision": "reuse"}
        assert routed.text == ask(llm, "stream_chat", question, adapter=adapter.name).text
        # which queue it names is the evaluation's business; that it names one instead of chatting is the adapter's
        base = ask(llm, "chat", question, adapter=None)
        assert len(routed.text.split()) <= 3 < len(base.text.split()), (routed.text, base.text)
    documents = SimpleDirectoryReader(EXAMPLES / "handbook" / "documents").load_data()
    store = VectorStoreIndex.from_documents(documents, embed_model=DnDEmbedding(llm.dnd))
    got = store.as_query_engine(llm=llm, similarity_top_k=1).query("How many days may I send a purchase back?")
    assert "returns" in got.source_nodes[0].metadata["file_name"] and str(got).strip()
