"""LlamaIndex's `OpenAILike` with a running `dnd serve`: a chat, a stream and a completion.

In the same process as the base, `dnd_sdk.integrations.llamaindex.DnDLLM` needs no server.
"""

import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    model="dnd:auto",
    api_base=os.environ.get("DND_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("DND_API_KEY", "none"),
    is_chat_model=True,
    context_window=4096,
)

print("chat:", llm.chat([ChatMessage(role="user", content="My card was charged twice.")]).message.content)

print("stream: ", end="")
for part in llm.stream_chat([ChatMessage(role="user", content="My card was charged twice.")]):
    print(part.delta, end="", flush=True)
print()

print("completion:", llm.complete("My card was charged twice.").text)
