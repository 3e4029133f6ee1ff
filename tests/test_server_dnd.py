"""`/dnd/*`, embeddings and vLLM's calls: what the library does, over HTTP."""

from __future__ import annotations

import base64
import json
import struct
import threading
from typing import Any

import pytest
from helpers import random_flat
from server_parts import CHAT, Served, chat_body, error_of, quiet, serving
from tiny_world import World, prompts_of

from dnd_sdk.routing import read_decisions


@pytest.fixture
def served(world: World) -> Any:
    with serving(world.session()) as now:
        yield now


def test_adapting_by_json_reuses_and_says_why(served: Served) -> None:
    made = served.post("/dnd/adapt", {"prompts": prompts_of("upper"), "name": "upper"})
    assert (made["decision"], made["adapter"]) == ("generate", {"name": "upper", "source": "generated"})
    assert made["n_prompts"] == 20 and made["timings_s"]["total"] > 0 and "path" not in json.dumps(made)
    again = served.post("/dnd/adapt", {"prompts": prompts_of("upper")})
    assert (again["decision"], again["score"]) == ("reuse", 1.0)
    near = served.post("/dnd/route", {"prompts": prompts_of("upper")[:9]})
    wanted = served.dnd.route(prompts_of("upper")[:9])
    assert near == {
        "decision": wanted.decision,
        "score": wanted.score,
        "adapter": wanted.adapter and wanted.adapter.name,
        "neighbours": [{"name": n, "score": s} for n, s in wanted.neighbours],
        "reason": wanted.reason,
        "probability": wanted.probability,
        "in_distribution": wanted.in_distribution,
    }
    assert served.post("/dnd/route", {"prompts": prompts_of("upper")[0], "role": "a role"})["decision"] == "base"


def test_adapting_to_a_file_is_as_the_file_says(served: Served) -> None:
    rows = "\n".join(json.dumps({"q": p}) for p in prompts_of("digits"))
    form = {"file": ("rows.jsonl", rows.encode())}
    made = served.http.post("/dnd/adapt", files=form, data={"field": "q", "name": "digits"}).json()
    assert made["adapter"]["name"] == "digits" and made["n_prompts"] == 20
    assert served.dnd.adapt(prompts_of("digits")).adapter == served.dnd.store.get("digits")
    wrong = served.http.post("/dnd/adapt", files=form, data={"field": "nothing"})
    assert wrong.status_code == 400 and "nothing" in error_of(wrong)["message"]


def test_adapting_tells_its_steps(served: Served) -> None:
    asked: dict[str, Any] = {"headers": {"accept": "text/event-stream"}}
    with served.http.stream("POST", "/dnd/adapt", json={"prompts": prompts_of("upper")}, **asked) as answer:
        lines = [line for line in answer.iter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines[::2]]
    data = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert names == ["step"] * 7 + ["result"] and data[0] == {"step": "route"} and data[6] == {"step": "swap"}
    assert data[-1]["decision"] == "generate"
    bad = {"prompts": prompts_of("upper"), "mode": "generate", "name": data[-1]["adapter"]["name"]}
    with served.http.stream("POST", "/dnd/adapt", json={**bad, "role": "another"}, **asked) as answer:
        last = [line for line in answer.iter_lines() if line][-2:]
    assert last[0] == "event: error" and json.loads(last[1].removeprefix("data: "))["error"]["message"]


def test_observing_adapts_once_a_task_has_shown_enough(world: World) -> None:
    from dnd_sdk.observing import StreamSettings

    with serving(world.session(stream=StreamSettings(min_prompts=4))) as served:
        seen = [served.post("/dnd/observe", {"prompt": p}) for p in prompts_of("upper")[:8]]
    made = [s["adapted"] for s in seen if s["adapted"]]
    assert len(made) == 1 and made[0]["decision"] == "generate"
    assert seen[-1]["adapter"] == made[0]["adapter"]["name"] and seen[0]["adapter"] is None


def test_adapters_are_listed_with_their_use(served: Served) -> None:
    for task in ("upper", "digits"):
        served.dnd.adapt(prompts_of(task), name=task, role="a role" if task == "digits" else None)
    for _ in range(3):
        served.chat("hi", "upper", max_tokens=1)
    upper, digits = sorted(served.http.get("/dnd/adapters").json()["data"], key=lambda a: -a["hits"])
    assert served.http.get("/dnd/adapters/upper").json() == upper
    stored = served.dnd.store.get("upper")
    assert (upper["name"], upper["id"], upper["created"]) == ("upper", stored.id, stored.created)
    assert (upper["hits"], upper["resident"], upper["pinned"]) == (3, True, False) and upper["last_used"]
    assert upper["bytes"] == sum(f.stat().st_size for f in stored.path.iterdir())
    assert (digits["hits"], digits["last_used"], digits["role"]) == (0, None, "a role")


def test_removing_frees_the_slot_and_running_answers_end_well(served: Served) -> None:
    adapter = served.dnd.adapt(prompts_of("upper"), name="upper").adapter
    assert adapter is not None
    wanted = served.dnd.complete("hi", "upper", max_new_tokens=30).text
    held = threading.Event()
    running = served.dnd.submit("hi", "upper", emit=lambda _: held.wait(20) and None, max_new_tokens=30)
    assert served.http.delete("/dnd/adapters/upper").json() == {"name": "upper", "deleted": True}
    held.set()
    assert running.completion(30).text == wanted
    assert served.problem("POST", CHAT, json=chat_body("hi", "upper"))[0] == 404
    assert served.http.get("/dnd/adapters").json() == {"data": []}
    made = served.dnd.adapt(prompts_of("digits"), name="digits").adapter
    assert made is not None and served.http.delete("/dnd/adapters/digits").status_code == 200
    assert made.id not in served.dnd.engine.resident()


def test_a_damaged_one_can_be_removed(served: Served) -> None:
    adapter = served.dnd.adapt(prompts_of("upper"), name="upper").adapter
    assert adapter is not None
    (adapter.path / "dnd.json").write_text("{")
    assert served.problem("GET", "/dnd/adapters/upper")[0] == 422
    assert served.http.delete("/dnd/adapters/upper").status_code == 200 and not adapter.path.exists()


def test_a_pinned_adapter_stays_while_others_come_and_go(served: Served) -> None:
    for i in range(6):  # of four slots
        served.dnd.store.put(
            random_flat(served.dnd.layout, seed=i), served.dnd.layout, name=f"a{i}", source="imported",
            base_name="base", base_fingerprint=served.dnd.base.fingerprint,
        )  # fmt: skip
    assert served.http.put("/dnd/adapters/a0/pin").json()["pinned"] is True
    for i in range(1, 6):
        served.chat("hi", f"a{i}", max_tokens=1)
    assert served.http.get("/dnd/adapters/a0").json()["resident"]
    assert not served.http.get("/dnd/adapters/a1").json()["resident"]
    assert served.http.delete("/dnd/adapters/a0/pin").json()["pinned"] is False
    for i in range(1, 6):
        served.chat("hi", f"a{i}", max_tokens=1)
    assert not served.http.get("/dnd/adapters/a0").json()["resident"]
    for i in range(3):
        assert served.http.put(f"/dnd/adapters/a{i}/pin").status_code == 200
    status, error = served.problem("PUT", "/dnd/adapters/a3/pin")
    assert (status, error["code"]) == (503, "slots_full")


def test_an_adapter_comes_in_by_its_two_files(served: Served, tmp_path: Any) -> None:
    adapter = served.dnd.adapt(prompts_of("upper"), name="upper").adapter
    assert adapter is not None
    wanted = served.dnd.complete("hi", "upper", max_new_tokens=9).text
    files = {
        "config": ("adapter_config.json", (adapter.path / "adapter_config.json").read_bytes()),
        "weights": ("adapter_model.safetensors", (adapter.path / "adapter_model.safetensors").read_bytes()),
        "prompts": ("p.csv", "\n".join(["prompt", *prompts_of("upper")]).encode()),
    }
    served.http.delete("/dnd/adapters/upper")
    made = served.http.post("/dnd/adapters", files=files, data={"name": "mine"})
    assert made.status_code == 201, made.text
    assert (made.json()["name"], made.json()["source"], made.json()["notes"]) == ("mine", "imported", [])
    assert served.chat("hi", "mine", max_tokens=9)["choices"][0]["message"]["content"] == wanted
    assert served.post("/dnd/route", {"prompts": prompts_of("upper")[0]})["neighbours"][0]["name"] == "mine"
    assert len(served.dnd.store.exemplars(served.dnd.store.get("mine"))) == len(prompts_of("upper"))  # type: ignore[arg-type]
    cut = {**files, "weights": ("w", files["weights"][1][:-100])}
    bad = served.http.post("/dnd/adapters", files=cut, data={"name": "other"})
    assert bad.status_code == 422 and [a.name for a in served.dnd.store.ls()] == ["mine"]
    taken = served.http.post("/dnd/adapters", files=files, data={"name": "../up"})
    assert taken.status_code == 400


def test_vllms_calls_load_and_unload(served: Served) -> None:
    adapter = served.dnd.adapt(prompts_of("upper"), name="upper").adapter
    assert adapter is not None
    both = {"lora_name": "upper", "lora_path": "upper"}
    freed = served.http.post("/v1/unload_lora_adapter", json=both)
    assert freed.text == "Success: LoRA adapter 'upper' removed successfully."
    assert served.dnd.engine.resident() == []
    loaded = served.http.post("/v1/load_lora_adapter", json=both)
    assert loaded.text == "Success: LoRA adapter 'upper' added successfully."
    assert served.dnd.engine.resident() == [adapter.id]


def test_embeddings_are_the_encoders(served: Served) -> None:
    texts = ["one text", "another one"]
    wanted = served.dnd.encoder.embed(texts)
    got = served.post("/v1/embeddings", {"model": "encoder", "input": texts})
    assert [d["embedding"] for d in got["data"]] == wanted.tolist()
    n = served.dnd.encoder.encode(texts, with_states=False).n_tokens
    assert got["usage"] == {"prompt_tokens": n, "total_tokens": n} and n > 4
    packed = served.post("/v1/embeddings", {"model": "encoder", "input": texts[0], "encoding_format": "base64"})
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == wanted[0].tolist()


def test_state_counts_and_decisions(served: Served) -> None:
    served.dnd.adapt(prompts_of("upper"), name="upper")
    served.chat(prompts_of("upper")[0], "auto", max_tokens=3)
    status = served.http.get("/dnd/status").json()
    assert (status["base"], status["encoder"], status["resident"]) == ("base", "encoder", ["upper"])
    assert (status["n_slots"], status["running"], status["waiting"]) == (4, 0, 0)
    log = served.http.get("/dnd/log?limit=1").json()["data"]
    newest = read_decisions(served.dnd.home.logs)[0][-1]
    assert len(log) == 1 and log[0]["time"] == newest.time and log[0]["kind"] == "auto"
    assert prompts_of("upper")[0] not in json.dumps(log)
    assert [d["kind"] for d in served.http.get("/dnd/log").json()["data"]] == ["auto", "adapt"]
    text = served.http.get("/metrics").text
    decision = served.dnd.route(prompts_of("upper")[0]).decision
    assert f'dnd_answers_total{{decision="{decision}"}} 1.0' in text
    assert 'dnd_tokens_total{kind="completion"} 3.0' in text and "dnd_resident_adapters 1.0" in text
    assert f'dnd_http_requests_total{{route="{CHAT}",status="200"}} 1.0' in text
    health = served.http.get("/health").json()
    assert health["instance"] == served.now.instance and served.http.get("/ready").json() == {"status": "ready"}


def test_the_log_of_requests_holds_no_text_unless_asked(world: World, caplog: pytest.LogCaptureFixture) -> None:
    for asked in (False, True):
        caplog.clear()
        with caplog.at_level("INFO", "dnd_sdk.access"), serving(world.session(), log_prompts=asked) as now:
            text = now.chat("a secret question", max_tokens=4)["choices"][0]["message"]["content"]
            assert quiet(now.dnd)
        [line] = [json.loads(r.message) for r in caplog.records if r.name == "dnd_sdk.access"]
        assert (line["path"], line["status"], line["completion_tokens"]) == (CHAT, 200, 4)
        assert ("a secret question" in json.dumps(line)) == asked == ("answers" in line)
        if asked:
            assert line["answers"] == [text]
