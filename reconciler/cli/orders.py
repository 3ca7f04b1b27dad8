"""Commands that tell the reconciler something: leave alone, go on, send a test message, begin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reconciler import backups, demand, notify, render, scaffold, suspensions
from reconciler.alert_table import NO_ROUTE, tried_document, tried_table
from reconciler.cli import completion
from reconciler.cli.base import (
    Database,
    Desired,
    InventoryPath,
    Output,
    OutputFormat,
    app,
    fail,
    given,
    open_store,
    say,
    show,
)
from reconciler.model import ConfigurationError, ExitCode


@app.command()
def suspend(  # noqa: PLR0917 - a command's options
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            help="NODE, NODE/KIND or NODE/KIND/NAME; * stands for any.", autocompletion=completion.target
        ),
    ],
    reason: Annotated[str, typer.Option("--reason", "-r", help="Why; shown wherever it is left alone.")],
    until: Annotated[
        str | None, typer.Option("--until", help="When it ends: 2h, 3d, or an ISO date; never without.")
    ] = None,
    owner: Annotated[str | None, typer.Option("--owner", help="Who; the account where not given.")] = None,
    desired: Desired = None,
    inventory: InventoryPath = None,
    db: Database = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Leave resources alone: drift is seen and told, nothing is put right."""
    found, output = given(context, desired=desired, inventory=inventory, db=db, output=output)
    try:
        document = suspensions.suspend(found, target, reason, until=until, owner=owner)
    except ConfigurationError as error:
        fail(error, output)
    say(document, output)


@app.command()
def resume(  # noqa: PLR0917 - a command's options
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            help="NODE, NODE/KIND or NODE/KIND/NAME; * stands for any.", autocompletion=completion.target
        ),
    ],
    reason: Annotated[str, typer.Option("--reason", "-r", help="Why; for the record.")] = "",
    desired: Desired = None,
    inventory: InventoryPath = None,
    db: Database = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """End a suspension or a quarantine, and let what failed be tried in the next pass."""
    found, output = given(context, desired=desired, inventory=inventory, db=db, output=output)
    try:
        document = suspensions.resume(found, target, reason)
    except ConfigurationError as error:
        fail(error, output)
    say(document, output)


@app.command()
def now(  # noqa: PLR0917 - a command's options
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            help="NODE, NODE/KIND or NODE/KIND/NAME; * stands for any. Without: everything.",
            autocompletion=completion.target,
        ),
    ] = "",
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Until the pass is over, and end with its exit code.")
    ] = False,
    timeout: Annotated[
        str,
        typer.Option("--timeout", help="The longest to wait for the pass to begin, or with --wait to end."),
    ] = "5m",
    db: Database = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Let the running service make a pass at once, and try again what is waiting for its next attempt."""
    found, output = given(context, db=db, output=output)
    try:
        document = demand.now(found, target, wait=wait, timeout=timeout)
    except ConfigurationError as error:
        fail(error, output)
    say(document, output)
    raise typer.Exit(document["exit_code"] or ExitCode.AS_DESIRED)


@app.command("notify-test")
def notify_test(context: typer.Context, output: OutputFormat = Output.TEXT) -> None:
    """Send a test message on every route and say which worked; exit code 3 when one did not."""
    found, output = given(context, output=output)
    if not found.notify:
        fail(ConfigurationError([NO_ROUTE]), output)
    errors = notify.try_routes(found.notify, 30.0)
    show(tried_document(found.notify, errors), output, tried_table)
    raise typer.Exit(ExitCode.NOT_FIXED if any(errors.values()) else ExitCode.AS_DESIRED)


@app.command()
def backup(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="Where backups are kept; made where it is missing.")],
    keep_days: Annotated[
        int, typer.Option("--keep-days", min=1, help="Older ones are removed, once a new one was made.")
    ] = 30,
    db: Database = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Back up the reconciler's own database: whole, opened and checked; passes may go on meanwhile."""
    found, output = given(context, db=db, output=output)
    open_store(found, output).close()
    try:
        document = backups.backup(found.db, directory, keep_days)
    except ConfigurationError as error:
        fail(error, output)
    say(document, output)


@app.command()
def init(
    directory: Annotated[
        Path, typer.Argument(help="Where to write; must not hold any of these files yet.")
    ] = Path(),
) -> None:
    """Write a working desired state, inventory and settings for a new repository."""
    out = render.console()
    try:
        written = scaffold.write(directory)
    except ConfigurationError as error:
        fail(error, Output.TEXT)
    for path in written:
        out.print(f"wrote {path}", markup=False)
    out.print("Next: list your machines in inventory/hosts.yml, then: reconcile --once --check", markup=False)
