"""A vLLM server as a child process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

STARTS_S = 900
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
"""Of any vLLM on this machine."""


class Server:
    """Started and killed as a test likes, always at the same port."""

    def __init__(self, python: str, model: Path, home: Path, log: Path, *, max_len: int = 1024) -> None:
        self._python, self._model, self._home, self._log, self._max_len = python, model, home, log, max_len
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, plugin: bool) -> float:
        """Start it and wait until it is well; the seconds it took. `plugin`: whether it finds adapters by itself."""
        began = time.monotonic()
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_PLUGINS": "dnd" if plugin else "",
            "DND_HOME": str(self._home),
        }
        words = [self._python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self._model)]
        words += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        words += ["--max-model-len", str(self._max_len), "--enable-lora", "--max-loras", "4", "--max-cpu-loras", "16"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["nice", "-n", "10", *words], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        while not self._is_well():
            if self._process.poll() is not None or time.monotonic() - began > STARTS_S:
                raise SystemExit(f"vLLM did not start, see {self._log}")
            time.sleep(1)
        return time.monotonic() - began

    def kill(self) -> None:
        """End all of its processes at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None

    def _is_well(self) -> bool:
        try:
            return bool(urlopen(f"{self.url}/health", timeout=2).status == 200)
        except (URLError, OSError):
            return False
