"""What every command shares: its options, its settings, and how results and mistakes are shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from reconciler import render, settings
from reconciler import report as reports
from reconciler.cli import completion
from reconciler.model import ConfigurationError, ExitCode, Problem
from reconciler.store import Store

app = typer.Typer(
    name="reconcile",
    no_args_is_help=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


class Output(StrEnum):
    """How results are printed."""

    TEXT = "text"
    JSON = "json"


Desired = Annotated[
    Path | None,
    typer.Option("--desired", help="Directory of the desired state.", show_default="desired_state"),
]
InventoryPath = Annotated[
    Path | None, typer.Option("--inventory", "-i", help="Ansible inventory.", show_default="inventory")
]
Database = Annotated[Path | None, typer.Option("--db", help="SQLite file with events and conditions.")]
OutputFormat = Annotated[Output, typer.Option("--output", "-o", help="text for people, json for programs.")]
Limit = Annotated[
    str | None,
    typer.Option(
        "--limit", "-l", help="Only nodes that match this host pattern.", autocompletion=completion.node
    ),
]
OneNode = Annotated[
    str | None, typer.Option("--node", help="Only this node.", autocompletion=completion.node)
]
OneKind = Annotated[
    str | None, typer.Option("--kind", "-k", help="Only this kind.", autocompletion=completion.kind)
]
Since = Annotated[str | None, typer.Option("--since", help="Not older than this: 2h, 3d, or an ISO date.")]
Once = Annotated[bool, typer.Option("--once", help="One pass, then exit with its result.")]
Check = Annotated[
    bool, typer.Option("--check", help="Change nothing; say what drifted and what would be done.")
]
Retry = Annotated[
    bool, typer.Option("--retry", help="Try at once what failed and would wait for its next attempt.")
]
AllowMassChange = Annotated[
    bool, typer.Option("--allow-mass-change", help="Lift limits.max_changed_nodes for this pass.")
]
Pull = Annotated[
    bool,
    typer.Option("--pull", help="Fetch the desired state's repository first, and work from what it holds."),
]
Kinds = Annotated[
    str | None,
    typer.Option(
        "--kind", "-k", help="Only these kinds, separated by commas.", autocompletion=completion.kind
    ),
]


def settings_for(output: Output, **given: Any) -> settings.Settings:
    """Settings with what was given on the command line; a mistake in them ends the command."""
    try:
        return settings.load(**given)
    except ConfigurationError as error:
        fail(error, output)


def given(context: typer.Context, **own: Any) -> tuple[settings.Settings, Output]:
    """Settings of a subcommand; options may stand before or after its name."""
    before = context.obj or {}
    output = own.pop("output")
    if output is Output.TEXT and before.get("output"):
        output = before["output"]
    merged = {key: value if value is not None else before.get(key) for key, value in own.items()}
    return settings_for(output, **merged), output


def fail(error: ConfigurationError, output: Output) -> NoReturn:
    """Say what is wrong and end with exit code 1."""
    if output is Output.JSON:
        print_json(reports.problems_as_json(error))
    render.problems(error, render.console(stderr=True))
    raise typer.Exit(ExitCode.CONFIGURATION)


def print_json(document: Any) -> None:
    """The one document on standard output."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=2, default=str) + "\n")


def show(document: Any, output: Output, table: Callable[[Any, Console], None]) -> None:
    """The same document for programs, or as a person reads it."""
    if output is Output.JSON:
        print_json(document)
    else:
        table(document, render.console())


def open_store(found: settings.Settings, output: Output) -> Store:
    """The store of passes that were made; without one there is nothing to say."""
    if not found.db.exists():
        hint = "run a pass first, or name the database with --db"
        fail(ConfigurationError([Problem(f"no database at {found.db}", hint=hint)]), output)
    try:
        return Store(found.db)
    except ConfigurationError as error:
        fail(error, output)


def say(document: dict[str, Any], output: Output) -> None:
    """A document as JSON, or its ``said`` for people."""
    if output is Output.JSON:
        print_json(document)
    else:
        render.console().print(document["said"], markup=False, soft_wrap=True)
