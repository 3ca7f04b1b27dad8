"""``reconcile`` itself: one pass, or one after another."""

from __future__ import annotations

import logging
import random
import signal
import sys
import threading
import time
from dataclasses import replace
from typing import Annotated

import typer

from reconciler import __version__, assemble, render, settings
from reconciler import report as reports
from reconciler.attempts import LOOP_BUDGET, loop_pause
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
    Retry,
    app,
    fail,
    print_json,
    settings_for,
)
from reconciler.kinds.base import seconds
from reconciler.lease import BusyError
from reconciler.model import ConfigurationError, ExitCode, LeaseLostError, Problem, Report, RunError
from reconciler.store import StoreError


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
    found = settings_for(output, desired=desired, inventory=inventory, db=db)
    scope = assemble.Scope(limit, _kinds(kind), check, retry, allow_mass_change)
    if (retry or allow_mass_change) and not (once or check):
        fail(ConfigurationError("--retry and --allow-mass-change are for one pass: add --once"), output)
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
            fail(ConfigurationError(message), output)


def _kinds(text: str | None) -> tuple[str, ...] | None:
    return tuple(word.strip() for word in text.split(",") if word.strip()) if text else None


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
        fail(error, output)
    except (BusyError, RunError, StoreError) as error:
        raise CouldNotRun(isinstance(error, BusyError), _not_run(error, output)) from error
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
        print_json(reports.problems_as_json(ConfigurationError([Problem(message, hint=hint)])))
    render.console(stderr=True).print(f"error: {message} ({hint})", markup=False, soft_wrap=True)
    return int(ExitCode.CONFIGURATION)


def _print_report(result: Report, output: Output) -> None:
    if output is Output.JSON:
        print_json(reports.as_json(result))
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
