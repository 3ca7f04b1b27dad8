"""``reconcile report``: the day's summary, shown or sent."""

from __future__ import annotations

import sys
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

import typer

from reconciler import notify, render, settings, summary
from reconciler.alert_table import tried_document, tried_table
from reconciler.cli.base import (
    Database,
    Output,
    OutputFormat,
    Since,
    app,
    fail,
    given,
    open_store,
    print_json,
)
from reconciler.model import ConfigurationError, ExitCode, Problem

SEND_SECONDS = 60.0
_NO_ROUTE = Problem(
    "no route takes reports",
    hint=f"say reports = true in a [[notify]] table of {settings.FILE}; see docs/alerts.md",
)


class Format(StrEnum):
    """The forms of a report."""

    TEXT = "text"
    HTML = "html"
    CHAT = "chat"


_FORMS = {Format.TEXT: summary.as_text, Format.HTML: summary.as_html, Format.CHAT: summary.as_chat}


@app.command("report")
def report(  # noqa: PLR0917 - a command's options
    context: typer.Context,
    since: Since = None,
    form: Annotated[
        Format, typer.Option("--format", help="text, html (a whole mail), or chat (short Markdown).")
    ] = Format.TEXT,
    send: Annotated[bool, typer.Option("--send", help="Send it on the routes that take reports.")] = False,
    db: Database = None,
    output: OutputFormat = Output.TEXT,
) -> None:
    """What the last day brought: passes, repairs, what is wrong now and why, alerts, what keeps coming back.

    With --send, exit code 3 when a route did not take it.
    """
    found, output = given(context, db=db, output=output)
    store = open_store(found, output)
    try:
        moment = datetime.fromisoformat(render.moment_since(since or "24h"))
        document = summary.summary_document(store, moment)
    except ConfigurationError as error:
        fail(error, output)
    finally:
        store.close()
    if send:
        _send(found, document, form, output)
    elif output is Output.JSON:
        print_json(document)
    else:
        sys.stdout.write(_FORMS[form](document))


def _send(found: settings.Settings, document: dict[str, Any], form: Format, output: Output) -> None:
    routes = [route for route in found.notify if route.reports]
    if not routes:
        fail(ConfigurationError([_NO_ROUTE]), output)
    message = {
        "title": f"Fleet: {summary.headline(document)}",
        "body": _FORMS[form](document),
        "format": form.value,
    }
    errors = notify.send_now(routes, message, SEND_SECONDS)
    tried = tried_document(routes, errors)
    if output is Output.JSON:
        print_json(tried)
    else:
        tried_table(tried, render.console())
    raise typer.Exit(ExitCode.NOT_FIXED if any(errors.values()) else ExitCode.AS_DESIRED)
