"""`dnd ps` and `dnd stop`: the server that runs for a home."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dnd_sdk.cli.output import Output

STOP_S = 45.0
"""A little more than a server takes by itself to end what it answers."""


def ps(out: Output) -> None:
    """Show the server that runs for this home, what it holds and what it is busy with."""
    from dnd_sdk.client import ServerClient, find_server, read_presence

    home = out.find_home()
    found = find_server(home)
    if found is None:
        told = read_presence(home)
        if told is not None:
            out.note(f"note: process {told.pid} was the server at {told.url} and does not answer")
        out.emit({"server": None}, f"no server runs for {home.root}")
        return
    status = ServerClient(found, home).status()
    told_of = {name: status.get(name) for name in ("version", "device", "resident", "running", "waiting", "uptime_s")}
    shown = {"url": found.url, "pid": found.pid, "base": found.base, **told_of}
    out.emit({"server": shown}, lambda: found.url if out.quiet else _lines(shown))


def stop(
    out: Output,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.0, help="Seconds to wait for what it answers to end.")
    ] = STOP_S,
) -> None:
    """Stop the server that runs for this home, and wait until it has ended."""
    from dnd_sdk.client import find_server, stop_server

    home = out.find_home()
    found = find_server(home)
    if found is None:
        out.emit({"stopped": None}, "" if out.quiet else f"no server runs for {home.root}")
        return
    with out.step(f"stopping the server at {found.url}"):
        seconds = stop_server(found, timeout_s=timeout)
    ended = {"url": found.url, "pid": found.pid, "seconds": round(seconds, 3)}
    out.emit({"stopped": ended}, "" if out.quiet else f"stopped after {seconds:.1f} s")


def _lines(shown: dict[str, Any]) -> str:
    resident = shown["resident"] or []
    rows = {
        "url": shown["url"],
        "pid": shown["pid"],
        "base": shown["base"],
        "device": shown["device"],
        "up": _duration(shown["uptime_s"]),
        "resident": f"{len(resident)}: {', '.join(map(str, resident))}" if resident else "no adapter",
        "requests": f"{shown['running']} running, {shown['waiting']} waiting",
    }
    return "\n".join(f"{name + ':':<10}{value}" for name, value in rows.items())


def _duration(seconds: float | None) -> str:
    minutes, rest = divmod(round(seconds or 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
