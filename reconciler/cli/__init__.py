"""The command ``reconcile``; each module adds its commands to the one application."""

from __future__ import annotations

import sys

import typer

from reconciler.cli import orders, passes, questions, reports
from reconciler.cli.base import app
from reconciler.model import ExitCode

__all__ = ["app", "main", "orders", "passes", "questions", "reports"]


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
