"""The resolver that vLLM loads, against stand-ins of the two modules of vLLM that it needs."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from adapter_folders import TINY, store_one
from helpers import random_flat

import dnd_sdk
from dnd_sdk.adapters import AdapterStore, served_name
from dnd_sdk.config import Home
from dnd_sdk.integrations import vllm as plugin
from dnd_sdk.models import EMBEDDED


@dataclass
class Request:
    """As vLLM's."""

    lora_name: str
    lora_int_id: int
    lora_path: str


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What is registered with a stand-in of vLLM."""
    found: dict[str, object] = {}
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request", "vllm.lora.resolver")}
    modules["vllm.lora.request"].LoRARequest = Request  # type: ignore[attr-defined]
    modules["vllm.lora.resolver"].LoRAResolver = object  # type: ignore[attr-defined]
    modules["vllm.lora.resolver"].LoRAResolverRegistry = SimpleNamespace(  # type: ignore[attr-defined]
        register_resolver=found.__setitem__
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def ask(registry: dict[str, object], name: str, base: str = "some/base") -> Request | None:
    return asyncio.run(registry["dnd"].resolve_lora(base, name))  # type: ignore[attr-defined]


def test_names_and_content_names_are_resolved(registry: dict[str, object], home: Home, store: AdapterStore) -> None:
    made = store_one(store, random_flat(TINY, seed=1), name="task")
    plugin.register()
    plugin.register()
    by_name, by_content = ask(registry, "task"), ask(registry, served_name(made.id))
    assert by_name is not None and by_content is not None
    assert (by_name.lora_name, by_content.lora_name) == ("task", served_name(made.id))
    assert by_name.lora_path == by_content.lora_path == str(home.served / served_name(made.id))
    assert by_name.lora_int_id == by_content.lora_int_id == int(made.id[:16], 16) % 2**63
    assert ask(registry, "other") is None and ask(registry, "../task") is None and ask(registry, "") is None


def test_replaced_weights_have_another_path_and_number(registry: dict[str, object], store: AdapterStore) -> None:
    plugin.register()
    store_one(store, random_flat(TINY, seed=1), name="task")
    before = ask(registry, "task")
    store.rm("task")
    store_one(store, random_flat(TINY, seed=2), name="task")
    after = ask(registry, "task")
    assert before is not None and after is not None
    assert before.lora_path != after.lora_path and before.lora_int_id != after.lora_int_id


def test_numbers_are_positive_and_of_63_bits(store: AdapterStore) -> None:
    made = store_one(store, random_flat(TINY, seed=1))
    for id_, number in (("f" * 64, 2**63 - 1), ("8" + "0" * 63, 1), ("0" * 64, 1), ("0" * 15 + "7" * 49, 7)):
        changed = type(made)(**{**vars(made), "id": id_})
        assert plugin.int_id_of(changed) == number


def test_what_is_damaged_is_logged_and_not_served(
    registry: dict[str, object], store: AdapterStore, caplog: pytest.LogCaptureFixture
) -> None:
    plugin.register()
    made = store_one(store, random_flat(TINY, seed=1), name="task")
    (made.path / "dnd.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert ask(registry, "task") is None
    assert "'task' is not served" in caplog.text


def test_an_adapter_of_another_base_is_not_given_to_an_embedded_one(
    registry: dict[str, object], store: AdapterStore, caplog: pytest.LogCaptureFixture
) -> None:
    plugin.register()
    store_one(store, random_flat(TINY, seed=1), name="task")
    for base in ("smollm2-135m", "/models/qwen2.5-coder-0.5b"):
        assert ask(registry, "task", base) is None
    assert "made for another base" in caplog.text
    fingerprint = EMBEDDED["smollm2-135m"].fingerprint
    store_one(store, random_flat(TINY, seed=2), name="small", base_fingerprint=fingerprint)
    assert ask(registry, "small", "/models/smollm2-135m") is not None


def test_a_vllm_without_resolvers_is_left_alone(
    registry: dict[str, object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.lora.resolver", None)
    plugin.register()
    assert registry == {} and "no resolvers" in caplog.text


def test_vllm_finds_it_and_nothing_heavy_is_loaded_for_it() -> None:
    project = tomllib.loads((Path(dnd_sdk.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"dnd": "dnd_sdk.integrations.vllm:register"}
    code = (
        "import sys, json; import dnd_sdk.integrations.vllm; "
        "print(json.dumps([m for m in ('vllm', 'torch', 'transformers', 'peft', 'faiss') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
