"""litellm with a running `dnd serve`: an answer, a stream and an embedding."""

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # before the import, which else asks the network

import litellm

SERVER = {
    "api_base": os.environ.get("DND_URL", "http://127.0.0.1:8000/v1"),
    "api_key": os.environ.get("DND_API_KEY", "none"),
}
question = [{"role": "user", "content": "My card was charged twice."}]

answer = litellm.completion(model="openai/dnd:auto", messages=question, **SERVER)
print("answer:", answer.choices[0].message.content)

print("stream: ", end="")
for chunk in litellm.completion(model="openai/dnd:auto", messages=question, stream=True, **SERVER):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

made = litellm.embedding(model="openai/all-minilm-l6-v2", input=["My card was charged twice."], **SERVER)
print("embedding:", len(made.data[0]["embedding"]), "numbers")
