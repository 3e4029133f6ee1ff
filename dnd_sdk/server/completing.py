"""`/v1/chat/completions`, `/v1/completions` and `/v1/embeddings`."""

from __future__ import annotations

import base64
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from dnd_sdk.models import Encoder
from dnd_sdk.server.answering import Answers
from dnd_sdk.server.documented import MAYBE_TEXT, TEXT, WHOLE, answers, listed, shaped
from dnd_sdk.server.models import check_encoder
from dnd_sdk.server.problems import invalid
from dnd_sdk.server.reading import Asked, read_chat, read_completion, texts_of
from dnd_sdk.server.service import Service, TheService
from dnd_sdk.server.streaming import Chunks
from dnd_sdk.server.wire import ChatRequest, CompletionRequest, EmbeddingRequest
from dnd_sdk.server.writing import chat_choice, new_id, text_choice, usage_of

router = APIRouter(prefix="/v1", tags=["openai"])

_ANSWER = answers(
    {
        "id": TEXT,
        "object": TEXT,
        "created": WHOLE,
        "model": TEXT,
        "choices": listed({"index": WHOLE, "finish_reason": TEXT}),
        "usage": shaped({"prompt_tokens": WHOLE, "completion_tokens": WHOLE, "total_tokens": WHOLE}),
        "dnd": shaped({"adapter": MAYBE_TEXT, "decision": TEXT, "ms": WHOLE}),
    },
    streams=True,
)
_VECTORS = answers({"object": TEXT, "model": TEXT, "data": listed({"object": TEXT, "index": WHOLE})})


@router.post("/chat/completions", responses=_ANSWER)
async def chat(body: ChatRequest, request: Request, service: TheService) -> Response:
    """Answer a chat."""
    return await _answer(read_chat(body, service.settings), request, service, is_chat=True)


@router.post("/completions", responses=_ANSWER)
async def complete(body: CompletionRequest, request: Request, service: TheService) -> Response:
    """Answer one text or several, each as a user's message."""
    return await _answer(read_completion(body, service.settings), request, service, is_chat=False)


@router.post("/embeddings", responses=_VECTORS)
async def embed(body: EmbeddingRequest, service: TheService) -> Response:
    """Vectors of texts, by the encoder that the router uses."""
    encoder = service.dnd.encoder
    check_encoder(service, body.model)
    texts = texts_of(body.input, "input")
    if body.dimensions not in (None, encoder.width):
        raise invalid(f"dimensions must be {encoder.width}, the encoder's, or left out", "dimensions")
    # made in the thread, too: a million numbers as text would hold up everybody's stream
    return await service.run(lambda: JSONResponse(_embedded(encoder, texts, body)))


def _embedded(encoder: Encoder, texts: list[str], body: EmbeddingRequest) -> dict[str, Any]:
    encoded = encoder.encode(texts, with_states=False)
    vectors = encoded.pooled.numpy().astype("<f4")
    packed = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(vector.tobytes()).decode() if packed else vector.tolist(),
        }
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": encoded.n_tokens, "total_tokens": encoded.n_tokens}
    return {"object": "list", "model": body.model, "data": data, "usage": usage}


async def _answer(asked: Asked, request: Request, service: Service, *, is_chat: bool) -> Response:
    answers = Answers(service, asked, request)
    await answers.start()
    if asked.stream:
        events = Chunks(answers, asked, is_chat).events()
        return StreamingResponse(events, media_type="text/event-stream", headers=_headers(answers))
    whole = await answers.whole()
    make = chat_choice if is_chat else text_choice
    content = {
        "id": new_id("chatcmpl" if is_chat else "cmpl"),
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": asked.model,
        "choices": [make(i, answer, asked) for i, answer in enumerate(whole)],
        "usage": usage_of(whole, asked.n),
        "dnd": answers.route,
    }
    return JSONResponse(content, headers=_headers(answers))


def _headers(answers: Answers) -> dict[str, str]:
    route = answers.route
    return {
        "x-dnd-adapter": route["adapter"] or "",
        "x-dnd-decision": route["decision"],
        "cache-control": "no-store",
    }
