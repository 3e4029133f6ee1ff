"""`dnd config show|path|schema|init`: what is set, and where it stands."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dnd_sdk.cli.options import ModelOptions, SamplingFlags
from dnd_sdk.cli.output import Output, table
from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, StorageError


def show(out: Output, models: ModelOptions, sampling: SamplingFlags) -> None:
    """Show every setting in force and where it comes from."""
    from dnd_sdk.settings import load_settings, origins

    flags = {"home": out.home, **vars(models), **vars(sampling)}
    values = load_settings(**flags).model_dump(mode="json")
    values["home"] = str(Home.find(values["home"]).root)
    rows = {name: {"value": values[name], "from": where} for name, where in origins(**flags).items()}

    def text() -> str:
        shown = [(name, _shown(row["value"]), row["from"]) for name, row in rows.items()]
        drawn: str = table(("setting", "value", "from"), shown)
        return drawn

    out.emit({"settings": rows}, text)


def path(out: Output) -> None:
    """Show which settings files are looked at, the strongest first; -q: only those that exist."""
    from dnd_sdk.settings import settings_files

    files = [{"path": str(f.absolute()), "exists": f.is_file()} for f in settings_files()]
    if out.quiet:
        lines = [str(f["path"]) for f in files if f["exists"]]
    else:
        lines = [f"{f['path']}  {'read' if f['exists'] else 'not there'}" for f in files]
    out.emit({"files": files}, "\n".join(lines))


def schema(out: Output) -> None:
    """Print the JSON schema of a settings file."""
    from dnd_sdk.settings import Settings

    described = Settings.model_json_schema()
    out.emit({"schema": described}, lambda: json.dumps(described, indent=2, ensure_ascii=False))


def init(
    out: Output,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is there.")] = False,
) -> None:
    """Write ./dnd.toml with every setting, commented out."""
    from dnd_sdk.settings import PROJECT_FILE, template

    target = PROJECT_FILE.absolute()
    try:
        with target.open("w" if force else "x", encoding="utf-8") as f:
            f.write(template())
    except FileExistsError as e:
        raise ConfigError(f"{target} exists", fix="replace it with: dnd config init --force") from e
    except OSError as e:
        raise StorageError(f"cannot write {target}: {e.strerror or e}", fix="choose a folder you may write in") from e
    out.emit({"path": str(target)}, str(target) if out.quiet else f"wrote {target}")


def _shown(value: object) -> str:
    if value is None or value == []:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
