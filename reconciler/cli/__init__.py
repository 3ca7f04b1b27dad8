"""The command ``reconcile``; each module adds its commands to the one application."""

from __future__ import annotations

import sys

import typer

from reconciler.cli import orders, passes, questions, reports
from reconciler.cli.base import app
from reconciler.model import ExitCode

__all__ = ["app", "main", "orders", "passes", "questions", "reports"]


INTERRUPTED = 130  # what typer makes of Ctrl-C


def main() -> None:
    """Entry point; typer turns its own usage errors into exit code 2, which here means drift."""
    try:
        code = app(standalone_mode=False) or 0
    except typer.Abort:
        code = INTERRUPTED
    except Exception as error:
        if hasattr(error, "show"):
            error.show()
            sys.exit(int(ExitCode.CONFIGURATION))
        raise
    if code == INTERRUPTED:
        typer.echo("interrupted: what was begun is carried on by the next pass", err=True)
    sys.exit(code)
