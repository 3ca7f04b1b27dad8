"""``reconcile`` itself: one pass, or one after another."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import typer

from reconciler import __version__, assemble, render, settings
from reconciler import report as reports
from reconciler.cli.base import (
    AllowMassChange,
    Check,
    Database,
    Desired,
    InventoryPath,
    Kinds,
    Limit,
    Once,
    Output,
    OutputFormat,
    Pull,
    Retry,
    app,
    fail,
    print_json,
    settings_for,
)
from reconciler.lease import BusyError
from reconciler.model import ConfigurationError, Event, ExitCode, LeaseLostError, Problem, Report, RunError
from reconciler.revisions import Follower, InForce
from reconciler.store import StoreError


@app.callback(invoke_without_command=True)
def root(  # noqa: PLR0917 - a command's options
    context: typer.Context,
    once: Once = False,
    check: Check = False,
    retry: Retry = False,
    allow_mass_change: AllowMassChange = False,
    pull: Pull = False,
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
    found = settings_for(output, desired=desired, inventory=inventory, db=db)
    scope = assemble.Scope(limit, _kinds(kind), check, retry, allow_mass_change)
    if (retry or allow_mass_change) and not (once or check):
        fail(ConfigurationError("--retry and --allow-mass-change are for one pass: add --once"), output)
    if once or check:
        # Unwinding ends Ansible and removes the request files; the default action would do neither.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        raise typer.Exit(_one_pass(found, scope, output, pull=pull))
    raise typer.Exit(
        _continuous({"desired": desired, "inventory": inventory, "db": db}, scope, output, pull=pull)
    )


def _refuse_options_of_a_pass(context: typer.Context, output: Output) -> None:
    """A command of its own takes none of them."""
    for name in ("once", "check", "limit", "kind", "retry", "allow_mass_change", "pull"):
        if context.params[name]:
            option = f"--{name.replace('_', '-')}"
            message = f"{option} goes with a pass, not with the command {context.invoked_subcommand}"
            fail(ConfigurationError(message), output)


def _kinds(text: str | None) -> tuple[str, ...] | None:
    return tuple(word.strip() for word in text.split(",") if word.strip()) if text else None


def _one_pass(found: settings.Settings, scope: assemble.Scope, output: Output, *, pull: bool) -> int:
    """One pass from settings to exit code; the report goes to standard output."""
    try:
        force = _pulled(found, pull=pull)
        if force:
            found, scope = force.settings, replace(scope, revision=force.revision)
        with render.Watch(quiet=output is Output.JSON) as watch:
            result = assemble.one_pass(found, scope, watch.on_run, watch.on_node, _listener(found))
    except ConfigurationError as error:
        fail(error, output)
    except (BusyError, RunError, StoreError) as error:
        return _not_run(error, output)
    except LeaseLostError as error:
        if output is Output.JSON:
            print_json(
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
    # What the newest revision wants was not done, whatever became of the last good one.
    return int(ExitCode.NOT_FIXED if force and force.rejected else result.exit_code)


def _pulled(found: settings.Settings, *, pull: bool) -> InForce | None:
    """The revision to work from, after asking its repository; None where the files are taken as they are."""
    if not (pull or found.git.url):
        return None
    follower = Follower.of(found)
    follower.fetch()
    force = follower.in_force()
    err = render.console(stderr=True)
    if force.unreachable:
        said = (
            f"warning: the repository cannot be asked ({force.unreachable}); going on with {force.revision}"
        )
        err.print(said, markup=False, soft_wrap=True)
    if force.rejected:
        err.print(
            f"error: revision {force.rejected} is not carried out, {force.revision} stays in force:",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        for problem in force.problems:
            err.print(f"  {problem}", markup=False, soft_wrap=True)
    return force


def _listener(found: settings.Settings) -> Callable[[Event], None]:
    """Who hears of events while a single pass runs: logs, where they are asked for."""
    if found.log_format in ("auto", "none"):
        return lambda _event: None
    from reconciler.logs import Log, configure

    configure(found.log_level, found.log_format)
    return Log().event


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
        print_json(reports.problems_as_json(ConfigurationError([Problem(message, hint=hint)])))
    render.console(stderr=True).print(f"error: {message} ({hint})", markup=False, soft_wrap=True)
    return int(ExitCode.CONFIGURATION)


def _print_report(result: Report, output: Output) -> None:
    if output is Output.JSON:
        print_json(reports.as_json(result))
    else:
        render.report(result, render.console())


def _continuous(given: dict[str, Any], scope: assemble.Scope, output: Output, *, pull: bool) -> int:
    """A pass whenever something is due, until SIGTERM or SIGINT."""
    # Imported here: a single pass needs neither, and every tenth of a second before Ansible starts counts.
    from reconciler.daemon import Daemon
    from reconciler.logs import Log, configure

    def hear(report: Report) -> None:
        if output is Output.JSON:
            print_json(reports.as_json(report))
            sys.stdout.flush()

    try:
        found = settings.load(**given)
        if found.log_format != "none":
            configure(found.log_level, "console" if found.log_format == "auto" else found.log_format)
        return Daemon(lambda: settings.load(**given), scope, hear, Log(), pull=pull).run()
    except (ConfigurationError, BusyError) as error:
        fail(error if isinstance(error, ConfigurationError) else ConfigurationError(str(error)), output)
