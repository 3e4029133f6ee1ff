"""The openai client with a running `dnd serve`: an answer, a stream, and a task's prompts that choose the adapter."""

import os

from openai import OpenAI

URL = os.environ.get("DND_URL", "http://127.0.0.1:8000/v1")
client = OpenAI(base_url=URL, api_key=os.environ.get("DND_API_KEY", "none"))

print("models:", [model.id for model in client.models.list()])

question = [{"role": "user", "content": "Which queue: billing, login or shipping? I cannot sign in since the update."}]
answer = client.chat.completions.create(model="dnd:auto", messages=question, temperature=0)
print("answer:", answer.choices[0].message.content)

print("stream: ", end="")
for chunk in client.chat.completions.create(model="dnd:auto", messages=question, stream=True):
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
print()

# the prompts of the task at hand, without answers: an adapter that fits is reused, else one is made of them
task = [f"Which queue: billing, login or shipping? Order {number} has not come." for number in range(8)]
adapted = client.chat.completions.create(model="dnd:auto", messages=question, extra_body={"dnd": {"prompts": task}})
print("adapted:", adapted.choices[0].message.content)
print("by:", adapted.model_extra["dnd"])
