"""`dnd logs`: what was decided for which prompts, and what the present thresholds would decide."""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dnd_sdk.cli.output import Output, table
from dnd_sdk.errors import ConfigError

if TYPE_CHECKING:
    from dnd_sdk.routing import Decision, Thresholds
    from dnd_sdk.settings import Settings

SHOWN = 20
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def logs(
    out: Output,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help=f"The last N only; {SHOWN} without --replay.")
    ] = None,
    since: Annotated[str | None, typer.Option("--since", help="30m, 2h, 7d, or a time as in 2026-01-31T12:00.")] = None,
    replay: Annotated[bool, typer.Option("--replay", help="Show what the present thresholds would change.")] = False,
    base: Annotated[str | None, typer.Option("--base", help="With --replay: the base whose thresholds count.")] = None,
    generator: Annotated[
        str | None, typer.Option("--generator", help="With --replay: the generator whose thresholds count.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="With --replay and no generator: the encoder that routes.")
    ] = None,
) -> None:
    """Show the decisions that were made: adapt, auto-routing and observe."""
    from dnd_sdk.routing import read_decisions

    decisions, n_bad = read_decisions(out.find_home().logs, since=None if since is None else moment(since))
    if n_bad:
        out.note(f"note: {n_bad} lines of the log could not be read")
    if replay:
        from dnd_sdk.settings import load_settings

        settings = load_settings(home=out.home, base=base, generator=generator, encoder=encoder)
        _replay(out, decisions if limit is None else decisions[-limit:], settings)
        return
    shown = decisions[-(limit or SHOWN) :]
    body = {"decisions": [asdict(d) for d in shown], "n_logged": len(decisions), "n_unreadable": n_bad}
    out.emit(body, lambda: _table(shown, [d.reason for d in shown], "reason") if shown else "no decisions yet")


def moment(text: str) -> datetime:
    """`2h` (ago) or an ISO time, local unless it says otherwise. Raises `ConfigError`."""
    try:
        if ago := re.fullmatch(r"(\d{1,6})([smhdw])", text):
            return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError) as e:
        raise ConfigError(f"--since {text!r} is not a time", fix="use 30m, 2h, 7d or 2026-01-31T12:00") from e


def _replay(out: Output, decisions: list[Decision], settings: Settings) -> None:
    from dnd_sdk.generator import generator_folder
    from dnd_sdk.models import DEFAULT_ENCODER
    from dnd_sdk.routing import measured, replay_decisions

    folder = generator_folder(settings.base, settings.generator)
    thresholds, _ = measured(folder, settings.encoder or DEFAULT_ENCODER)
    changes, n_scored = replay_decisions(decisions, thresholds)
    changed = [{"now": c.now, **asdict(c.logged)} for c in changes]

    def text() -> str:
        head = f"{len(changes)} of {n_scored} decisions by score would change, {len(decisions)} in the log"
        return f"{_table([c.logged for c in changes], [c.now for c in changes], 'now')}\n{head}" if changes else head

    body = {"changed": changed, "n_scored": n_scored, "n_logged": len(decisions)}
    out.emit({**body, "thresholds": _threshold_values(thresholds)}, text)


def _threshold_values(thresholds: Thresholds) -> dict[str, float]:
    return {name: getattr(thresholds, name) for name in ("reuse", "reuse_single", "support")}


def _table(decisions: list[Decision], last: list[str], title: str) -> str:
    rows: list[tuple[Any, ...]] = [
        (
            datetime.fromisoformat(d.time).astimezone().isoformat(" ", "seconds")[:19],
            d.kind,
            d.n_prompts,
            d.decision,
            d.adapter,
            None if d.score is None else f"{d.score:.2f}",
            d.by,
            d.prompts[:8],
            shown,
        )
        for d, shown in zip(decisions, last, strict=True)
    ]
    drawn: str = table(("time", "kind", "prompts", "decision", "adapter", "score", "by", "hash", title), rows)
    return drawn
