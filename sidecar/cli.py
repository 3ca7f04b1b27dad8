"""The `sidecar` command."""

import os
import sys
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from sidecar import server
from sidecar.app import create_app
from sidecar.backends_file import FileError
from sidecar.keys import KeyringError
from sidecar.logs import configure
from sidecar.management import create_management
from sidecar.runtime import Runtime
from sidecar.settings import Settings, SettingsError, load
from sidecar.store import Store, StoreError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    help="A proxy for language-model providers: pools, rate windows, cooldowns, honest streams.",
)
keys_app = typer.Typer(help="Provider keys at rest.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
_USAGE = 2


def main() -> None:
    """Entry point: errors a user can mend are one line, not a traceback."""
    try:
        app()
    except (SettingsError, StoreError, KeyringError, FileError, OSError) as error:
        Console(stderr=True).print(f"[bold red]sidecar:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


def settings() -> Settings:
    """Settings from the environment and the database."""
    first = load(os.environ)
    if not first.db_path.exists():
        return first
    store = Store(first.db_path)
    try:
        from sidecar.admin_store import read_config  # noqa: PLC0415 - only a start with a database needs it

        return load(os.environ, store.run_now(read_config))
    finally:
        store.close()


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    degraded: Annotated[bool, typer.Option(help="Start although stored keys cannot be decrypted.")] = False,  # noqa: FBT002 - typer's way
) -> None:
    """Start the proxy (the default when no command is given)."""
    if context.invoked_subcommand is not None:
        return
    chosen = settings()
    configure(chosen.log_level, chosen.log_format)
    runtime = Runtime(chosen, degraded=degraded)
    if not chosen.loopback_only and not chosen.allow_open and not runtime.access.clients:
        runtime.store.close()
        raise SettingsError(
            f"SIDECAR_HOST={chosen.host} is reachable from other machines and there is no client key yet: "
            "start on 127.0.0.1 and create one, or set SIDECAR_ALLOW_OPEN=true if anyone may use it"
        )
    main_socket = server.bind(chosen.host, chosen.port, "SIDECAR_PORT")
    metrics_socket = server.bind(chosen.metrics_host, chosen.metrics_port, "SIDECAR_METRICS_PORT")
    console = Console(stderr=True)

    def ready() -> None:
        address = f"{chosen.host}:{main_socket.getsockname()[1]}"
        console.print(
            f"sidecar listens on http://{address}/v1\n"
            f"dashboard: http://{address}/dashboard   metrics: "
            f"http://{chosen.metrics_host}:{metrics_socket.getsockname()[1]}/metrics",
            highlight=False,
            soft_wrap=True,
        )
        where = "SIDECAR_ADMIN_TOKEN" if chosen.admin_token else str(chosen.token_file)
        console.print(f"admin token: in {where}", highlight=False, soft_wrap=True)

    application = create_app(runtime, create_management(runtime))
    uvloop.run(server.serve(runtime, application, main_socket, metrics_socket, ready))
