"""Answer questions about a folder of documents with LlamaIndex, by the base and with an adapter made for the job.

The adapter is made from questions nobody has answered, each with the passage found for it: what the LLM will be asked.
Run `python examples/llamaindex_rag.py`, or add `--questions 3 --prompts 12`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from llama_index.core import PromptTemplate, SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.llms import LLM
from llama_index.core.node_parser import SentenceSplitter

from dnd_sdk import DnD
from dnd_sdk.integrations.llamaindex import DnDEmbedding, DnDLLM

HERE = Path(__file__).parent / "handbook"
QA = PromptTemplate(
    "Answer the question from the text in a few words. Answer with the words alone.\n\n"
    "Text: {context_str}\nQuestion: {query_str}"
)


def passages(dnd: DnD) -> VectorStoreIndex:
    """The documents, cut into passages and embedded by the encoder that also routes."""
    documents = SimpleDirectoryReader(HERE / "documents").load_data()
    cut = SentenceSplitter(chunk_size=80, chunk_overlap=0, include_metadata=False)
    return VectorStoreIndex.from_documents(documents, embed_model=DnDEmbedding(dnd), transformations=[cut])


def as_asked(index: VectorStoreIndex, questions: Sequence[str]) -> list[str]:
    """The questions as the query engine will put them to the LLM."""
    retriever = index.as_retriever(similarity_top_k=1)
    found = [retriever.retrieve(q)[0].get_content() for q in questions]
    return [QA.format(context_str=text, query_str=q) for text, q in zip(found, questions, strict=True)]


def answer(index: VectorStoreIndex, llm: LLM, question: str) -> str:
    """One question through LlamaIndex's query engine."""
    engine = index.as_query_engine(llm=llm, similarity_top_k=1, text_qa_template=QA)
    return " ".join(str(engine.query(question)).split())


def main(argv: Sequence[str] | None = None) -> int:
    """Adapt, then print the reference and both answers."""
    parser = argparse.ArgumentParser(description="Retrieval-augmented answers, base against adapted.")
    parser.add_argument("--prompts", type=int, default=24, help="unanswered questions to adapt to")
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--home", help="folder for weights and adapters (default: DND_HOME or the user data folder)")
    args = parser.parse_args(argv)
    unanswered = (HERE / "prompts.txt").read_text(encoding="utf-8").splitlines()[: args.prompts]
    with (HERE / "questions.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][: args.questions]

    with DnD.load(home=args.home) as dnd:
        index = passages(dnd)
        result = dnd.adapt(as_asked(index, unanswered))
        print(f"{result.decision}: {result.adapter.name if result.adapter else 'the base'}")
        base = DnDLLM(dnd, adapter=None, max_new_tokens=24)
        adapted = DnDLLM(dnd, adapter=result.adapter, max_new_tokens=24)
        for row in rows:
            print(f"\n{row['prompt']}\n  reference: {row['response']!r}")
            print(f"  base:      {answer(index, base, row['prompt'])!r}")
            print(f"  adapted:   {answer(index, adapted, row['prompt'])!r}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
