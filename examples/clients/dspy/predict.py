"""DSPy with a running `dnd serve`: a signature, filled in."""

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # before the import, which else asks the network

import dspy

lm = dspy.LM(
    "openai/dnd:auto",
    api_base=os.environ.get("DND_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("DND_API_KEY", "none"),
    cache=False,
)
dspy.configure(lm=lm)
print("answer:", dspy.Predict("question -> answer")(question="What is the capital of France?").answer)
