"""LangGPT roles: exact round trip, lenient reading, bounded input; and that a role is part of its task."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runner import dnd, dnd_json
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_world import World, prompts_of

from dnd_sdk.adapters import AdapterStore
from dnd_sdk.chat.messages import with_role
from dnd_sdk.errors import ConfigError, InputError
from dnd_sdk.prompts.reading import prompt_set_hash
from dnd_sdk.prompts.roles import BRIEF_BYTES, MAX_ROLE_BYTES, Role, as_role, read_role

ENGLISH = """# Role: Travel Agent

## Profile
- Author: Someone
- Version: 0.2
- Language: English
- Description: Plans trips by train.

### Skill-1
1. Knows every timetable.

### Skill-2
Reads maps.

## Rules
1. Never break character.
```
# no heading, an example
```

## Wild Cards
Kept.

## Workflow
1. Ask where to.

## Initialization
As a <Role>, you must follow the <Rules>.
"""

CHINESE = """# 角色：诗人

## 简介
* 作者：李白
- 语言：中文
- 描述：写五言绝句。

##约束
不写散文。

## Constrains:
不重复。

## 工作流程
先问题目。
"""


def test_the_parts_of_a_role() -> None:
    role = Role.parse(ENGLISH)
    assert role.name == "Travel Agent"
    assert role.profile == {
        "author": "Someone", "version": "0.2", "language": "English", "description": "Plans trips by train."
    }  # fmt: skip
    assert [s.kind for s in role.sections] == [
        "role", "profile", "skills", "skills", "rules", None, "workflow", "initialization"
    ]  # fmt: skip
    assert role.sections[5].title == "Wild Cards" and role.sections[5].body == "Kept."
    assert role.section("skills") == "1. Knows every timetable.\n\nReads maps."
    assert role.section("rules").endswith("# no heading, an example\n```") and role.section("goals") is None
    assert [s.level for s in role.sections] == [1, 2, 3, 3, 2, 2, 2, 2]


def test_old_and_chinese_headings() -> None:
    role = Role.parse(CHINESE)
    assert role.name == "诗人"
    assert role.profile == {"author": "李白", "language": "中文", "description": "写五言绝句。"}
    assert [s.kind for s in role.sections] == ["role", "profile", "constraints", "constraints", "workflow"]
    assert role.section("constraints") == "不写散文。\n\n不重复。"
    assert role.brief == "诗人. 写五言绝句。"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("#ROLE : Cook #\n", "Cook"),
        ("# **Role**: Cook", "Cook"),
        ("# role\nCook\n", "Cook"),
        ("# Role\n## Profile\n", None),
        ("# Cook\n## Rules\n", "Cook"),
        ("You are a cook.", None),
        ("intro\n# Role: Cook", "Cook"),
    ],
)
def test_names(text: str, name: str | None) -> None:
    assert Role.parse(text).name == name


HEADS = [
    "# Role: X\n",
    "## Profile\n",
    "- Author: me\n",
    "```\n",
    "##规则：\n",
    "#\n",
    "######## y\n",
    "\r\n",
    "a",
    "# b\r",
]
texts = st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(HEADS), st.text(max_size=5))).map("".join))


@settings(max_examples=300, deadline=None)
@given(texts.filter(lambda t: t.strip() and "\0" not in t))
def test_any_text_survives_to_the_letter(text: str) -> None:
    role = Role.parse(text)
    assert str(role) == text and Role.parse(str(role)) == role
    assert len(role.brief.encode()) <= BRIEF_BYTES and "\n" not in role.brief
    assert role.condition("hello").endswith("\nhello")
    assert isinstance(role.profile, dict) and all(s.text for s in role.sections)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"# Role: \xff", "is not UTF-8: byte 0xff at offset 8"),
        ("# Role".encode("utf-16"), "is not UTF-8"),
        (b"# Role\0", "NUL byte"),
        (b"x" * 10 * 2**20, f"has {10 * 2**20} bytes, a role has at most {MAX_ROLE_BYTES}"),
        (b"x" * (MAX_ROLE_BYTES + 1), "a role has at most"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "role.md"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_role(path)
    assert str(path) in caught.value.message and caught.value.fix


def test_good_files(tmp_path: Path) -> None:
    path = tmp_path / "role.md"
    path.write_bytes(b"\xef\xbb\xbf" + CHINESE.replace("\n", "\r\n").encode())
    assert str(read_role(path)) == CHINESE.replace("\n", "\r\n")
    path.write_text("x" * MAX_ROLE_BYTES)
    assert len(str(read_role(path))) == MAX_ROLE_BYTES
    with pytest.raises(InputError, match="no role file"):
        read_role(tmp_path)


@pytest.mark.parametrize("role", ["", " ", "\ud800", "a\0", 3, b"x"])
def test_bad_roles_in_memory(role: object) -> None:
    with pytest.raises(InputError):
        as_role(role)  # type: ignore[arg-type]


def test_a_role_makes_another_prompt_set() -> None:
    hashes = {prompt_set_hash(["a"], role) for role in (None, "", "a", "b")}
    assert len(hashes) == 4 and prompt_set_hash(["a", "b"], "r") == prompt_set_hash(["b", "a"], "r")


def test_messages_under_a_role() -> None:
    role, user = Role.parse("# Role: Cook"), {"role": "user", "content": "hi"}
    own = {"role": "system", "content": "mine"}
    assert with_role("hi", None, None) == "hi"
    assert with_role("hi", role, "other") == [{"role": "system", "content": "# Role: Cook"}, user]
    assert with_role([user], None, "other") == [{"role": "system", "content": "other"}, user]
    assert with_role([own, user], None, "other") == [own, user]
    with pytest.raises(InputError, match="system message already"):
        with_role([own, user], role, None)


# ---- in a session


def test_the_same_prompts_under_another_role_are_another_task(world: World) -> None:
    dnd = world.session(reuse=0.9)
    prompts = prompts_of("upper")
    made = {role: dnd.adapt(prompts, role=role) for role in (None, ENGLISH, CHINESE)}
    assert [r.decision for r in made.values()] == ["generate"] * 3
    assert len({r.adapter.id for r in made.values()}) == 3  # the generator saw the role
    for role, result in made.items():
        assert result.adapter.role == role == dnd.store.get(result.adapter.name).role
        again = dnd.adapt(prompts, role=None if role is None else Role.parse(role))
        assert (again.decision, again.adapter) == ("reuse", result.adapter)
        assert dnd.route(prompts, role=role).adapter == result.adapter
        assert dnd.route(prompts[3], role=role).adapter == result.adapter
    assert dnd.adapt(prompts, role=ENGLISH + "one rule more", mode="reuse").decision == "base"


def test_roles_alike_in_their_brief_are_kept_apart(world: World) -> None:
    dnd = world.session()
    first, second = (dnd.adapt(prompts_of("upper"), role=ENGLISH + rule).adapter for rule in ("", "Be kind."))
    assert first.id == second.id and first.name != second.name
    assert {a.role for a in dnd.store.ls()} == {ENGLISH, ENGLISH + "Be kind."}
    dnd.adapt(prompts_of("digits"), name="mine", role=ENGLISH)
    with pytest.raises(ConfigError, match="named 'mine' with another role exists"):
        dnd.adapt(prompts_of("digits"), name="mine", role=ENGLISH + "Be kind.")


def test_an_adapter_brings_its_role_unless_another_is_given(world: World) -> None:
    dnd = world.session()
    adapter = dnd.adapt(prompts_of("upper"), name="agent", role=ENGLISH).adapter
    system, user = {"role": "system", "content": ENGLISH}, {"role": "user", "content": "hello"}
    options = {"max_new_tokens": 6}
    n = dnd.base.tokenizer.apply_chat_template([system, user], add_generation_prompt=True, tokenize=False)
    found = dnd.complete("hello", "agent", **options)
    assert found.usage["prompt_tokens"] == len(dnd.base.tokenizer(n)["input_ids"])
    assert found == dnd.complete([system, user], adapter, **options)
    assert dnd.stream("hello", adapter, **options).result == found
    other = dnd.complete("hello", "agent", role="Be brief.", **options)
    assert other == dnd.complete([{"role": "system", "content": "Be brief."}, user], "agent", **options)
    assert other.usage != found.usage
    mixed = dnd.complete_batch(["hello", "hello"], ["agent", None], **options)
    assert mixed[0].usage == found.usage and mixed[1].usage["prompt_tokens"] < found.usage["prompt_tokens"]


def test_exported_and_imported_again_the_role_stays(world: World, tmp_path: Path) -> None:
    dnd = world.session()
    dnd.adapt(prompts_of("upper"), name="agent", role=ENGLISH)
    out = dnd.store.export("agent", tmp_path / "agent")
    dnd.store.rm("agent")
    assert dnd.import_adapter(out, name="back").role == ENGLISH
    assert "Travel Agent. Plans trips by train" in (out / "README.md").read_text()


# ---- on the command line


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    role, prompts = tmp_path / "role.md", tmp_path / "p.txt"
    role.write_text(ENGLISH)
    prompts.write_text("\n".join(prompts_of("upper")))
    return role, prompts


def test_role_on_the_command_line(world: World, files: tuple[Path, Path]) -> None:
    role, prompts = files
    made = dnd_json("adapt", prompts, "--role", role, "--name", "agent", *world.options)
    assert made["decision"] == "generate" and AdapterStore(world.home).get("agent").role == ENGLISH
    shown = dnd_json("adapters", "show", "agent", "--home", world.home.root)["adapter"]
    assert shown["role"] == "Travel Agent. Plans trips by train"
    short = ("--max-new-tokens", 4, *world.options)
    own = dnd_json("run", "hello", "-a", "agent", *short)
    assert own == dnd_json("run", "hello", "-a", "agent", "--role", role, *short)
    base = dnd_json("run", "hello", "-a", "base", "--role", role, *short)
    both = dnd_json("run", "hello", "-a", "agent", "--compare", "base", *short)
    assert both["base"]["text"] == base["text"] and base["usage"] == own["usage"]
    bare = dnd_json("run", "hello", "-a", "base", *short)
    assert bare["usage"]["prompt_tokens"] < base["usage"]["prompt_tokens"]
    talk = dnd_json("chat", "-a", "agent", *short, stdin="hello\n")
    assert talk["messages"][1]["content"] == own["text"] and len(talk["messages"]) == 2
    ask = ("route", prompts_of("upper")[0])
    assert dnd_json(*ask, *world.options)["neighbours"] == []
    assert [n["name"] for n in dnd_json(*ask, "--role", role, *world.options)["neighbours"]] == ["agent"]


@pytest.mark.parametrize("command", [("adapt", "-"), ("run", "hi"), ("chat",), ("route", "hi")])
def test_a_bad_role_file_is_one_line_before_anything_is_loaded(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "role.md").write_bytes(b"\xff")
    result = dnd(*command, "--role", tmp_path / "role.md", "--base", "./nowhere", stdin="hello\n")
    assert result.exit_code == 1 and "is not UTF-8" in result.stderr and "fix:" in result.stderr
