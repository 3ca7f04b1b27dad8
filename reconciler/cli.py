"""The command ``reconcile``."""

from __future__ import annotations

import json
import logging
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from reconciler import __version__, assemble, notify, render, scaffold, settings, suspensions
from reconciler import report as reports
from reconciler.alert_table import NO_ROUTE, alerts_document, alerts_table, tried_document, tried_table
from reconciler.alerts import Alerts
from reconciler.attempts import LOOP_BUDGET, loop_pause
from reconciler.desired.schema import text as schema_text
from reconciler.kinds.base import seconds
from reconciler.lease import BusyError
from reconciler.model import ConfigurationError, ExitCode, LeaseLostError, Problem, Report, RunError
from reconciler.status import explain_lines, status_document, status_table
from reconciler.store import Store, StoreError

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
Limit = Annotated[str | None, typer.Option("--limit", "-l", help="Only nodes that match this host pattern.")]
OneNode = Annotated[str | None, typer.Option("--node", help="Only this node.")]
OneKind = Annotated[str | None, typer.Option("--kind", "-k", help="Only this kind.")]
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
Kinds = Annotated[str | None, typer.Option("--kind", "-k", help="Only these kinds, separated by commas.")]


@app.callback(invoke_without_command=True)
def root(  # noqa: PLR0917 - a command's options
    context: typer.Context,
    once: Once = False,
    check: Check = False,
    retry: Retry = False,
    allow_mass_change: AllowMassChange = False,
    limit: Limit = None,
    kind: Kinds = None,
    desired: Desired = None,
    inventory: InventoryPath = None,
    db: Database = None,
    output: OutputFormat = Output.TEXT,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Bring a fleet of machines into the state that is declared in git, and say honestly what could not be.

    Without a command: one pass after another, until SIGTERM. With --once: one pass.

    Exit codes: 0 as desired now; 1 usage or configuration error, nothing touched; 2 drift found and left
    alone (--check, mode warn, suspended); 3 something could not be fixed; 4 some state is unknown.
    """
    if version:
        sys.stdout.write(f"{__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is not None:
        _refuse_options_of_a_pass(context, output)
        context.obj = {"desired": desired, "inventory": inventory, "db": db, "output": output}
        return
    found = _settings(output, desired=desired, inventory=inventory, db=db)
    scope = assemble.Scope(limit, _kinds(kind), check, retry, allow_mass_change)
    if (retry or allow_mass_change) and not (once or check):
        _fail(ConfigurationError("--retry and --allow-mass-change are for one pass: add --once"), output)
    if once or check:
        # Unwinding ends Ansible and removes the request files; the default action would do neither.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        raise typer.Exit(_one_pass(found, scope, output))
    raise typer.Exit(_continuous(found, scope, output))


def _refuse_options_of_a_pass(context: typer.Context, output: Output) -> None:
    """A command of its own takes none of them."""
    for name in ("once", "check", "limit", "kind", "retry", "allow_mass_change"):
        if context.params[name]:
            option = f"--{name.replace('_', '-')}"
            message = f"{option} goes with a pass, not with the command {context.invoked_subcommand}"
            _fail(ConfigurationError(message), output)


def _kinds(text: str | None) -> tuple[str, ...] | None:
    return tuple(word.strip() for word in text.split(",") if word.strip()) if text else None


def _settings(output: Output, **given: Any) -> settings.Settings:
    try:
        return settings.load(**given)
    except ConfigurationError as error:
        _fail(error, output)


def _given(context: typer.Context, **own: Any) -> tuple[settings.Settings, Output]:
    """Settings of a subcommand; options may stand before or after its name."""
    before = context.obj or {}
    output = own.pop("output")
    if output is Output.TEXT and before.get("output"):
        output = before["output"]
    merged = {key: value if value is not None else before.get(key) for key, value in own.items()}
    return _settings(output, **merged), output


def _fail(error: ConfigurationError, output: Output) -> NoReturn:
    """Say what is wrong and end with exit code 1."""
    if output is Output.JSON:
        _print_json(reports.problems_as_json(error))
    render.problems(error, render.console(stderr=True))
    raise typer.Exit(ExitCode.CONFIGURATION)


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=2, default=str) + "\n")


def _show(document: Any, output: Output, table: Callable[[Any, Console], None]) -> None:
    """The same document for programs, or as a person reads it."""
    if output is Output.JSON:
        _print_json(document)
    else:
        table(document, render.console())


class CouldNotRun(typer.Exit):
    """The pass did not happen; ``in_order`` where that is nobody's fault, as another one is under way."""

    def __init__(self, in_order: bool, code: int) -> None:  # noqa: FBT001 - an exception's arguments
        super().__init__(code)
        self.in_order = in_order


def _one_pass(found: settings.Settings, scope: assemble.Scope, output: Output) -> int:
    """One pass from settings to exit code; the report goes to standard output."""
    try:
        with render.Watch(quiet=output is Output.JSON) as watch:
            result = assemble.one_pass(found, scope, watch.on_run, watch.on_node)
    except ConfigurationError as error:
        _fail(error, output)
    except (BusyError, RunError, StoreError) as error:
        raise CouldNotRun(isinstance(error, BusyError), _not_run(error, output)) from error
    except LeaseLostError as error:
        if output is Output.JSON:
            _print_json(
                {
                    **reports.problems_as_json(ConfigurationError(str(error))),
                    "exit_code": int(ExitCode.NOT_FIXED),
                }
            )
        render.console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        return int(ExitCode.NOT_FIXED)
    _print_report(result, output)
    if not scope.check:
        assemble.tell(found)
    return int(result.exit_code)


def _not_run(error: Exception, output: Output) -> int:
    """The pass did not happen: another one holds the store, the store fails, or Ansible does not run here."""
    message = str(error)
    hints: dict[type[Exception], str] = {
        BusyError: "it will do this pass's work",
        StoreError: "is its disk full? what was done stands on the nodes; the next pass looks anew",
        RunError: "does `ansible --version` work here?",
    }
    hint = next(text for kind, text in hints.items() if isinstance(error, kind))
    if output is Output.JSON:
        _print_json(reports.problems_as_json(ConfigurationError([Problem(message, hint=hint)])))
    render.console(stderr=True).print(f"error: {message} ({hint})", markup=False, soft_wrap=True)
    return int(ExitCode.CONFIGURATION)


def _print_report(result: Report, output: Output) -> None:
    if output is Output.JSON:
        _print_json(reports.as_json(result))
    else:
        render.report(result, render.console())


def _continuous(found: settings.Settings, scope: assemble.Scope, output: Output) -> int:
    """A pass per interval until SIGTERM or SIGINT; a pass under way is finished first."""
    stop = threading.Event()

    def on_signal(_number: int, _frame: object) -> None:
        if stop.is_set():  # asked twice: do not even finish the pass
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    pause = seconds(found.interval)
    scope = replace(scope, next_in=pause)
    code, failures = int(ExitCode.AS_DESIRED), 0
    while not stop.is_set():
        began = time.monotonic()
        code, could_run = _guarded_pass(found, scope, output)
        failures = 0 if could_run else failures + 1
        if failures >= LOOP_BUDGET:
            said = f"error: {failures} passes in a row could not run; ending, for a supervisor to start anew"
            render.console(stderr=True).print(said, markup=False, soft_wrap=True)
            return int(ExitCode.NOT_FIXED)
        wanted = loop_pause(pause, failures) * random.uniform(0.9, 1.1)  # noqa: S311 - spreads load, guards nothing
        stop.wait(max(0.0, wanted - (time.monotonic() - began)))
    return code


def _guarded_pass(found: settings.Settings, scope: assemble.Scope, output: Output) -> tuple[int, bool]:
    """The exit code of a pass of many, and whether it could run at all; nothing that it raises ends the others."""
    try:
        return _one_pass(found, scope, output), True
    except CouldNotRun as error:
        return error.exit_code, error.in_order
    except typer.Exit as error:  # the desired state is invalid now; the next edit may mend it
        return error.exit_code, True
    except Exception:
        logging.getLogger(__name__).exception("the pass ended with an error of its own")
        return int(ExitCode.NOT_FIXED), False


@app.command()
def validate(
    context: typer.Context,
    desired: Desired = None,
    inventory: InventoryPath = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Check the desired state alone: every mistake with file, line, column and the way out."""
    found, output = _given(context, desired=desired, inventory=inventory, output=output)
    try:
        everything, _wanted, nodes = assemble.desired_state(found, assemble.Scope())
    except ConfigurationError as error:
        _fail(error, output)
    if output is Output.JSON:
        _print_json({"exit_code": 0, "problems": [], "resources": [str(rid) for rid in everything.resources]})
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
    found, output = _given(context, db=db, output=output)
    store = _open(found, output)
    document = status_document(store, limit)
    store.close()
    _show(document, output, status_table)


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
    found, output = _given(context, db=db, output=output)
    store = _open(found, output)
    try:
        rows = render.events_between(
            store, node=node, kind=kind, status=state, since=since, search=search, limit=count
        )
    except ConfigurationError as error:
        _fail(error, output)
    finally:
        store.close()
    _show(rows, output, render.events)


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
    found, output = _given(context, db=db, output=output)
    store = _open(found, output)
    try:
        document = alerts_document(
            Alerts(store, found.alert_dir),
            search=search, resolved=everything, node=node, kind=kind, level=level, since=since, limit=count,
        )  # fmt: skip
    except ConfigurationError as error:
        _fail(error, output)
    finally:
        store.close()
    _show(document, output, alerts_table)


@app.command("notify-test")
def notify_test(context: typer.Context, output: OutputFormat = Output.TEXT) -> None:
    """Send a test message on every route and say which worked; exit code 3 when one did not."""
    found, output = _given(context, output=output)
    if not found.notify:
        _fail(ConfigurationError([NO_ROUTE]), output)
    errors = notify.try_routes(found.notify, 30.0)
    _show(tried_document(found.notify, errors), output, tried_table)
    raise typer.Exit(ExitCode.NOT_FIXED if any(errors.values()) else ExitCode.AS_DESIRED)


@app.command()
def explain(  # noqa: PLR0917 - a command's options
    context: typer.Context,
    resource: Annotated[str, typer.Argument(help="NODE/KIND/NAME")],
    desired: Desired = None,
    inventory: InventoryPath = None,
    db: Database = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """Why a resource is in the state it is in: what is declared, what was seen, what was tried."""
    found, output = _given(context, desired=desired, inventory=inventory, db=db, output=output)
    store = _open(found, output)
    try:
        everything, _wanted, _inventory = assemble.desired_state(found, assemble.Scope())
        document = explain_lines(resource, everything, store)
    except ConfigurationError as error:
        _fail(error, output)
    finally:
        store.close()
    _show(document, output, render.explanation)


@app.command()
def suspend(  # noqa: PLR0917 - a command's options
    context: typer.Context,
    target: Annotated[str, typer.Argument(help="NODE, NODE/KIND or NODE/KIND/NAME; * stands for any.")],
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
    found, output = _given(context, desired=desired, inventory=inventory, db=db, output=output)
    try:
        document = suspensions.suspend(found, target, reason, until=until, owner=owner)
    except ConfigurationError as error:
        _fail(error, output)
    _say(document, output)


@app.command()
def resume(  # noqa: PLR0917 - a command's options
    context: typer.Context,
    target: Annotated[str, typer.Argument(help="NODE, NODE/KIND or NODE/KIND/NAME; * stands for any.")],
    reason: Annotated[str, typer.Option("--reason", "-r", help="Why; for the record.")] = "",
    desired: Desired = None,
    inventory: InventoryPath = None,
    db: Database = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """End a suspension or a quarantine, and let what failed be tried in the next pass."""
    found, output = _given(context, desired=desired, inventory=inventory, db=db, output=output)
    try:
        document = suspensions.resume(found, target, reason)
    except ConfigurationError as error:
        _fail(error, output)
    _say(document, output)


def _say(document: dict[str, Any], output: Output) -> None:
    """A document as JSON, or its ``said`` for people."""
    if output is Output.JSON:
        _print_json(document)
    else:
        render.console().print(document["said"], markup=False, soft_wrap=True)


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
        _fail(error, Output.TEXT)
    for path in written:
        out.print(f"wrote {path}", markup=False)
    out.print("Next: list your machines in inventory/hosts.yml, then: reconcile --once --check", markup=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of desired-state files, for editors."""
    sys.stdout.write(schema_text())


def _open(found: settings.Settings, output: Output) -> Store:
    if not found.db.exists():
        hint = "run a pass first, or name the database with --db"
        _fail(ConfigurationError([Problem(f"no database at {found.db}", hint=hint)]), output)
    try:
        return Store(found.db)
    except ConfigurationError as error:
        _fail(error, output)


def main() -> None:
    """Entry point; typer turns its own usage errors into exit code 2, which here means drift."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "show"):
            error.show()
            sys.exit(int(ExitCode.CONFIGURATION))
        raise
