"""Commands that only ask: what is declared, what was seen, what happened."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from reconciler import assemble, render
from reconciler.alert_table import alerts_document, alerts_table
from reconciler.alerts import Alerts
from reconciler.cli import completion
from reconciler.cli.base import (
    Database,
    Desired,
    InventoryPath,
    Limit,
    OneKind,
    OneNode,
    Output,
    OutputFormat,
    Since,
    app,
    fail,
    given,
    open_store,
    print_json,
    show,
)
from reconciler.desired.schema import text as schema_text
from reconciler.model import ConfigurationError
from reconciler.status import explain_lines, status_document, status_table


@app.command()
def validate(
    context: typer.Context,
    desired: Desired = None,
    inventory: InventoryPath = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Check the desired state alone: every mistake with file, line, column and the way out."""
    found, output = given(context, desired=desired, inventory=inventory, output=output)
    try:
        everything, _wanted, nodes = assemble.desired_state(assemble.located(found), assemble.Scope())
    except ConfigurationError as error:
        fail(error, output)
    if output is Output.JSON:
        print_json({"exit_code": 0, "problems": [], "resources": [str(rid) for rid in everything.resources]})
        return
    used = len({rid.node for rid in everything.resources})
    render.console().print(
        f"{found.desired} is valid: {len(everything.resources)} resources on {used} of {len(nodes.nodes)} nodes."
    )


@app.command()
def status(
    context: typer.Context, db: Database = None, output: OutputFormat = Output.TEXT, limit: Limit = None
) -> None:
    """Nodes and resources as the last passes saw them."""
    found, output = given(context, db=db, output=output)
    store = open_store(found, output)
    document = status_document(store, limit)
    store.close()
    show(document, output, status_table)


@app.command()
def events(  # noqa: PLR0917 - filters
    context: typer.Context,
    search: Annotated[str | None, typer.Argument(help="Words to search for in the details.")] = None,
    node: OneNode = None,
    kind: OneKind = None,
    state: Annotated[
        str | None, typer.Option("--status", help="detected, fixing, fixed, failed or rolled_back.")
    ] = None,
    since: Since = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="At most so many, the newest.")] = 50,
    db: Database = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """What happened: events, newest last."""
    found, output = given(context, db=db, output=output)
    store = open_store(found, output)
    try:
        rows = render.events_between(
            store, node=node, kind=kind, status=state, since=since, search=search, limit=count
        )
    except ConfigurationError as error:
        fail(error, output)
    finally:
        store.close()
    show(rows, output, render.events)


@app.command()
def alerts(  # noqa: PLR0917 - filters
    context: typer.Context,
    search: Annotated[str | None, typer.Argument(help="Words that all have to stand in it.")] = None,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Resolved ones as well.")] = False,
    node: OneNode = None,
    kind: OneKind = None,
    level: Annotated[str | None, typer.Option("--level", help="Only these levels: P0,P1.")] = None,
    since: Since = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="At most so many.")] = 50,
    db: Database = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """What a person has to look after: open alerts, and notifications that could not be delivered."""
    found, output = given(context, db=db, output=output)
    store = open_store(found, output)
    try:
        document = alerts_document(
            Alerts(store, found.alert_dir),
            search=search, resolved=everything, node=node, kind=kind, level=level, since=since, limit=count,
        )  # fmt: skip
    except ConfigurationError as error:
        fail(error, output)
    finally:
        store.close()
    show(document, output, alerts_table)


@app.command()
def explain(  # noqa: PLR0917 - a command's options
    context: typer.Context,
    resource: Annotated[str, typer.Argument(help="NODE/KIND/NAME", autocompletion=completion.resource)],
    desired: Desired = None,
    inventory: InventoryPath = None,
    db: Database = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Why a resource is in the state it is in: what is declared, what was seen, what was tried."""
    found, output = given(context, desired=desired, inventory=inventory, db=db, output=output)
    store = open_store(found, output)
    try:
        everything, _wanted, _inventory = assemble.desired_state(assemble.located(found), assemble.Scope())
        document = explain_lines(resource, everything, store)
    except ConfigurationError as error:
        fail(error, output)
    finally:
        store.close()
    show(document, output, render.explanation)


@app.command()
def schema() -> None:
    """Print the JSON Schema of desired-state files, for editors."""
    sys.stdout.write(schema_text())
