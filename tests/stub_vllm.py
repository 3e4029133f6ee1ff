"""A stand-in for a vLLM server, in a thread: its HTTP interface as far as it is used, with words for tokens.

What it says names who says it: `base` or the id of the adapter whose folder was loaded under the model's name, read
from that folder, so that a test sees whose weights would have answered.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dnd_sdk.adapters import Adapter
from dnd_sdk.adapters.adapter import manifest_text, read_manifest
from dnd_sdk.lora import LoraLayout

Body = dict[str, Any]


def written(root: Path, adapter: Adapter, layout: LoraLayout) -> Path:
    """A folder with that adapter's manifest and what the stub wants to see beside it."""
    folder = root / adapter.name
    shutil.rmtree(folder, ignore_errors=True)  # as the store, never writing into a file that is there
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": layout.r}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    known = replace(adapter, created="2026-01-01T00:00:00+00:00", layout_digest="0" * 64)
    (folder / "dnd.json").write_text(manifest_text(known, layout))
    return folder


class StubVllm:
    """One server; `stop` and `start` are a restart, at the same port, and what was loaded is forgotten."""

    def __init__(self, *, root: str = "stub-base", context: int = 4096, tools: bool = True) -> None:
        self.root, self.context, self.tools = root, context, tools
        self.key: str | None = None
        self.name = "stub-base"
        self.runtime_loading = True
        self.max_rank = 64
        self.loaded: dict[str, str] = {}
        """Adapters' paths by name."""
        self.asked: list[tuple[str, Body]] = []
        """Path and body of every POST."""
        self.answered: list[tuple[str, str]] = []
        """Model's name and id of the weights it stands for, of each completion."""
        self.hung_up = 0
        """Completions whose client left."""
        self.delay_s = 0.0
        """Before each word."""
        self.gate: threading.Event | None = None
        """Waited for before the second word; None: nothing."""
        self.words: list[str] | None = None
        """What is said; None: who speaks, and the words of the last message."""
        self.refuse: tuple[int, Any] | None = None
        """Status and body that completions get instead of an answer."""
        self.tokens: Callable[[str], list[int]] | None = None
        """How a text is split; None: it does not tell."""
        self.ill = False
        """Whether it says so."""
        self.error_at: int | None = None
        """The word in whose place an error is told."""
        self.sees: dict[str, str] = {}
        """Prefixes of paths as they are given -> where they are here."""
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def paths(self, path: str) -> list[Body]:
        """The bodies of the POSTs to a path."""
        return [body for asked, body in self.asked if asked == path]

    @property
    def loads(self) -> list[str]:
        """The names that were to be loaded."""
        return [body["lora_name"] for body in self.paths("/v1/load_lora_adapter")]

    def start(self) -> None:
        stub = self

        class Handler(_Handler):
            vllm = stub

        self._server = _Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """End at once, in the middle of whatever is being answered."""
        if self._server is not None:
            self._server.shutdown()
            self._server.hang_up()
            self._server.server_close()
        self._server = None
        self.loaded.clear()

    def restart(self) -> None:
        self.stop()
        self.start()

    def here(self, path: str) -> Path:
        """Where a folder that is named to the server lies."""
        for theirs, ours in self.sees.items():
            if path.startswith(theirs):
                return Path(ours + path.removeprefix(theirs))
        return Path(path)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *args: Any) -> None:
        self.connections: set[Any] = set()
        super().__init__(*args)

    def get_request(self) -> Any:
        made = super().get_request()
        self.connections.add(made[0])
        return made

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    vllm: StubVllm

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        stub = self.vllm
        if self.path == "/health":
            return self._send(500 if self.vllm.ill else 200, None)
        if not self._let_in():
            return None
        if self.path == "/version":
            return self._send(200, {"version": "0.stub"})
        if self.path == "/v1/models":
            data = [{"id": stub.name, "root": stub.root, "parent": None, "max_model_len": stub.context}]
            data += [{"id": n, "root": p, "parent": stub.name} for n, p in stub.loaded.items()]
            return self._send(200, {"object": "list", "data": data})
        return self._send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.vllm.asked.append((self.path, body))
        if not self._let_in():
            return
        routes = {
            "/v1/load_lora_adapter": self._load,
            "/v1/unload_lora_adapter": self._unload,
            "/tokenize": self._tokenize,
            "/v1/chat/completions": self._complete,
        }
        route = routes.get(self.path)
        if route is None or ("lora" in self.path and not self.vllm.runtime_loading):
            return self._send(404, {"detail": "Not Found"})
        route(body)

    def _let_in(self) -> bool:
        if self.vllm.key in (None, (self.headers.get("Authorization") or "").removeprefix("Bearer ")):
            return True
        self._send(401, {"error": "Unauthorized"})
        return False

    def _load(self, body: Body) -> None:
        name, folder = body["lora_name"], self.vllm.here(body["lora_path"])
        config = folder / "adapter_config.json"
        if not config.is_file() or not (folder / "adapter_model.safetensors").is_file():
            return self._refuse(404, f"The lora adapter '{name}' cannot be found at '{body['lora_path']}'.")
        rank = json.loads(config.read_text())["r"]
        if rank > self.vllm.max_rank:
            return self._refuse(500, f"LoRA rank {rank} is greater than max_lora_rank {self.vllm.max_rank}.")
        with self.vllm._lock:
            if name in self.vllm.loaded:
                return self._refuse(400, f"The lora adapter '{name}' has already been loaded. If you want to ...")
            self.vllm.loaded[name] = body["lora_path"]
        self._send(200, f"Success: LoRA adapter '{name}' added successfully.")

    def _unload(self, body: Body) -> None:
        with self.vllm._lock:
            if self.vllm.loaded.pop(body["lora_name"], None) is None:
                return self._refuse(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        self._send(200, "Success")

    def _tokenize(self, body: Body) -> None:
        if "prompt" in body:
            if self.vllm.tokens is None:
                return self._send(404, {"detail": "Not Found"})
            return self._send(200, {"count": 0, "tokens": self.vllm.tokens(body["prompt"])})
        self._send(200, {"count": self._n_prompt(body), "max_model_len": self.vllm.context})

    def _n_prompt(self, body: Body) -> int:
        tools = len(body.get("tools") or ()) * 10 if self.vllm.tools else 0
        return sum(len((m.get("content") or "").split()) for m in body["messages"]) + 3 + tools

    def _complete(self, body: Body) -> None:
        stub = self.vllm
        if stub.refuse is not None:
            return self._send(*stub.refuse)
        speaker = self._speaker(body["model"])
        if speaker is None:
            return self._refuse(404, f"The model `{body['model']}` does not exist.")
        n_prompt = self._n_prompt(body)
        if n_prompt >= stub.context:
            return self._refuse(
                400, f"This model's maximum context length is {stub.context} tokens. However, your prompt contains more"
            )
        stub.answered.append((body["model"], speaker))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._say(body, speaker, n_prompt)
        except OSError:
            stub.hung_up += 1
            self.close_connection = True

    def _say(self, body: Body, speaker: str, n_prompt: int) -> None:
        stub = self.vllm
        said = f"{speaker[:20]}: {body['messages'][-1].get('content')}"
        words = stub.words or re.findall(r"\s*\S+|\s+$", said)
        limit = min(body.get("max_tokens") or stub.context, stub.context - n_prompt)
        self._event(self._chunk(body, {"role": "assistant", "content": ""}, n_prompt, 0))
        text, reason = "", "length"
        for i in range(limit):
            if i == 1 and stub.gate is not None:
                stub.gate.wait(30)
            time.sleep(stub.delay_s)
            if i == stub.error_at:
                return self._event({"error": {"message": "EngineCore encountered an issue", "code": 500}})
            if i >= len(words):
                reason = "stop"
                self._event(self._chunk(body, {"content": ""}, n_prompt, i + 1, reason))
                break
            whole, before = text + words[i], len(text)
            cut = min((at for s in body.get("stop") or () if (at := whole.find(s)) >= 0), default=None)
            text = whole if cut is None else whole[:cut]
            ended = "stop" if cut is not None else "length" if i + 1 == limit else None
            self._event(self._chunk(body, {"content": text[before:]}, n_prompt, i + 1, ended, words[i]))
            if ended:
                break
        self._event(None)

    def _chunk(
        self, body: Body, delta: Body, n_prompt: int, n: int, reason: str | None = None, word: str | None = None
    ) -> Body:
        choice: Body = {"index": 0, "delta": delta, "finish_reason": reason}
        if body.get("logprobs") and word is not None:
            top = [{"token": f"t{i}", "logprob": -float(i)} for i in range(body["top_logprobs"])]
            choice["logprobs"] = {"content": [{"token": word, "logprob": -0.5, "top_logprobs": top}]}
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}
        return {"id": "c", "model": body["model"], "choices": [choice], "usage": usage}

    def _speaker(self, model: str) -> str | None:
        """Whose weights answer: read anew each time, as vLLM may."""
        if model == self.vllm.name:
            return "base"
        path = self.vllm.loaded.get(model)
        return None if path is None else read_manifest(self.vllm.here(path)).id

    def _event(self, data: Body | None) -> None:
        raw = f"data: {'[DONE]' if data is None else json.dumps(data, ensure_ascii=False)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))
        if data is None:
            self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": "Error", "param": None, "code": status}})

    def _send(self, status: int, body: Any) -> None:
        is_text = isinstance(body, str)
        raw = b"" if body is None else body.encode() if is_text else json.dumps(body).encode()
        self.send_response(status)
        if not is_text:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@contextmanager
def stub_vllm(**settings: Any) -> Iterator[StubVllm]:
    """A running stub."""
    stub = StubVllm(**settings)
    try:
        yield stub
    finally:
        stub.stop()
