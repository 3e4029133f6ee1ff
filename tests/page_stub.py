"""A stand-in for the server with the contract's shapes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from dnd_sdk.server.pages import router

OPEN = ("/", "/health", "/ready")


def adapter(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "id": "sha256-" + name, "source": "generated", "created": "2026-11-28T09:00:00+00:00", "encoder": "e",
        "n_prompts": 40, "role": None, "origin": None, "bytes": 4_400_000, "resident": True, "pinned": False, "hits": 3,
        "last_used": "2026-11-28T09:10:00+00:00", **more,
    }  # fmt: skip


def stub(key: str | None = None) -> FastAPI:
    app = FastAPI()
    app.include_router(router)
    state: dict[str, Any] = {"adapters": {n: adapter(n) for n in ("upper", "lower")}, "log": [], "requests": 0}
    app.state.dnd = state
    state["adapters"]["lower"].update(
        role="You schedule meetings for a busy team and answer with the day alone.",
        resident=False,
        source="imported",
        origin="peft",
    )

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Any:
        path = request.url.path
        if (
            key
            and path not in OPEN
            and not path.startswith("/page/")
            and request.headers.get("authorization") != f"Bearer {key}"
        ):
            return JSONResponse(
                {
                    "error": {
                        "message": "no valid API key",
                        "type": "invalid_request_error",
                        "param": None,
                        "code": "invalid_api_key",
                    }
                },
                401,
            )
        state["requests"] += 1
        return await call_next(request)

    @app.get("/dnd/status")
    def status() -> Any:
        return {
            "version": "0.1.0",
            "base": "qwen2.5-coder-0.5b",
            "generator": "qwen2.5-coder-0.5b",
            "encoder": "all-minilm-l6-v2",
            "device": "cpu",
            "dtype": "float32",
            "context_tokens": 32768,
            "n_slots": 64,
            "resident": [a["name"] for a in state["adapters"].values() if a["resident"]],
            "running": 0,
            "waiting": 0,
            "uptime_s": 754.2,
            "settings": {"max_tokens": 1024, "host": "127.0.0.1", "limits": {"queue": 64}},
        }

    @app.get("/metrics")
    def metrics() -> Any:
        return PlainTextResponse(
            f'# HELP dnd_requests_total Requests answered.\n# TYPE dnd_requests_total counter\ndnd_requests_total{{code="200"}} {state["requests"]}\n# HELP dnd_completion_tokens_total Tokens generated.\n# TYPE dnd_completion_tokens_total counter\ndnd_completion_tokens_total 812\n# HELP dnd_ttft_seconds Time to first token.\n# TYPE dnd_ttft_seconds histogram\ndnd_ttft_seconds_bucket{{le="+Inf"}} 4\ndnd_ttft_seconds_sum 0.6\ndnd_ttft_seconds_count 4\n'
        )

    @app.get("/dnd/adapters")
    def adapters() -> Any:
        return {"data": list(state["adapters"].values())}

    @app.delete("/dnd/adapters/{name}")
    def delete(name: str) -> Any:
        del state["adapters"][name]
        return {"name": name, "deleted": True}

    @app.api_route("/dnd/adapters/{name}/pin", methods=["PUT", "DELETE"])
    def pin(name: str, request: Request) -> Any:
        state["adapters"][name]["pinned"] = request.method == "PUT"
        return state["adapters"][name]

    @app.post("/dnd/adapters", status_code=201)
    async def load(request: Request) -> Any:
        form = await request.form()
        name = str(form.get("name") or "imported")
        state["adapters"][name] = adapter(name, source="imported")
        return state["adapters"][name]

    def decide(text: str) -> dict[str, Any]:
        return {
            "decision": "reuse",
            "score": 0.91,
            "adapter": "upper",
            "neighbours": [{"name": "upper", "score": 0.91}, {"name": "lower", "score": 0.33}],
            "reason": f"the nearest adapter is near enough for {text[:20]!r}",
            "probability": 0.97,
            "in_distribution": None,
        }

    def note(kind: str) -> None:
        d = decide("x")
        state["log"].insert(
            0,
            {
                **d,
                "kind": kind,
                "prompts": str(time.time()),
                "n_prompts": 1,
                "neighbours": [["upper", 0.91]],
                "support": None,
                "thresholds": {"reuse": 0.7, "reuse_single": 0.6, "support": 0.1},
                "rule": "single",
                "mode": "auto",
                "by": "scores",
                "cluster": None,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            },
        )

    @app.get("/dnd/log")
    def log(limit: int = 100) -> Any:
        return {"data": state["log"][:limit]}

    @app.post("/dnd/route")
    async def route(request: Request) -> Any:
        body = await request.json()
        note("auto")
        return decide(str(body["prompts"]))

    @app.post("/dnd/adapt")
    async def adapt(request: Request) -> Any:
        if request.headers["content-type"].startswith("multipart"):
            body = dict(await request.form())
        else:
            body = await request.json()
        note("adapt")

        async def events() -> AsyncIterator[str]:
            for step in ("encode", "route", "generate", "validate", "store", "swap"):
                yield f"event: step\ndata: {json.dumps({'step': step})}\n\n"
                await asyncio.sleep(0.05)
            if body.get("name") == "bad":
                error = {"message": "no prompts\n  fix: give some", "type": "x", "param": None, "code": None}
                yield f"event: error\ndata: {json.dumps({'error': error})}\n\n"
                return
            name = str(body.get("name") or "made")
            state["adapters"][name] = adapter(name, created="2026-11-28T10:00:00+00:00")
            result = {
                **decide("x"),
                "decision": "generate",
                "adapter": {"name": name, "source": "generated"},
                "n_prompts": 3,
                "notes": ["2 blank prompts were dropped"],
                "timings_s": {
                    "encode": 0.2,
                    "route": 0.001,
                    "generate": 0.5,
                    "validate": 1.2,
                    "store": 0.03,
                    "swap": 0.004,
                    "total": 2,
                },
            }
            yield f"event: result\ndata: {json.dumps(result)}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()
        text = f"{body['model']} says: {body['messages'][-1]['content']}"

        async def chunks() -> AsyncIterator[str]:
            for word in text.split(" "):
                yield f"data: {json.dumps({'choices': [{'delta': {'content': word + ' '}, 'finish_reason': None}]})}\n\n"
                await asyncio.sleep(0.02)
            yield f"data: {json.dumps({'choices': [{'delta': {}, 'finish_reason': 'stop'}]})}\n\n"
            yield f"data: {json.dumps({'choices': [], 'usage': {'prompt_tokens': 12, 'completion_tokens': len(text.split())}, 'dnd': {'adapter': None, 'decision': 'base'}})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    return app
