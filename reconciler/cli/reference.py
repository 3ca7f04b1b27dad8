"""``python -m reconciler.cli.reference``: docs/reference.md, every command with its arguments and options."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import typer

from reconciler.cli import app

HEAD = """\
# Every command

Written from the program itself by `make reference`; what the commands are for is in [Commands](commands.md).
"""


def text() -> str:
    """The page."""
    root: Any = typer.main.get_command(app)
    parts = [HEAD, *_lines("reconcile", root)]
    for name in sorted(root.commands):
        parts += _lines(f"reconcile {name}", root.commands[name])
    return "\n".join(parts)


def _lines(name: str, command: Any) -> Iterator[str]:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option"]
    words = "".join(
        f" [{_metavar(param)}]" if not param.required else f" {_metavar(param)}" for param in arguments
    )
    yield f"## {name}{words}\n"
    yield (
        re.sub(r"\s*\n\s*", lambda found: "\n\n" if found[0].count("\n") > 1 else " ", command.help.strip())
        + "\n"
    )
    for param in (*arguments, *options):
        said = " ".join((param.help or "").split())
        label = _metavar(param) if param in arguments else ", ".join(param.opts)
        yield f"- `{label}`: {said}"
    yield ""


def _metavar(param: Any) -> str:
    return str(param.metavar or param.name).upper()


if __name__ == "__main__":
    sys.stdout.write(text())
