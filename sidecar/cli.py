"""The `sidecar` command."""

import asyncio
import os
import sys
from typing import Annotated

import typer
import uvloop
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sidecar import server
from sidecar.admin_store import read_config
from sidecar.app import create_app
from sidecar.backends_file import FileError
from sidecar.health import Probe, probe
from sidecar.keys import Keyring, KeyringError, add_primary, keep_primary
from sidecar.keys import load as load_ring
from sidecar.logs import configure
from sidecar.management import create_management
from sidecar.runtime import Runtime
from sidecar.selftest import run as run_selftest
from sidecar.settings import Settings, SettingsError, load
from sidecar.store import Store, StoreError, count_stale, encrypted_count, rotate_some, verify_all
from sidecar.upstream import AiohttpUpstream

app = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    help="A proxy for language-model providers: pools, rate windows, cooldowns, honest streams.",
)
keys_app = typer.Typer(help="Provider keys at rest.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")


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
        return load(os.environ, store.run_now(read_config))
    finally:
        store.close()


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    degraded: Annotated[bool, typer.Option(help="Start although stored keys cannot be decrypted.")] = False,
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


@keys_app.command("rotate")
def rotate(
    prune: Annotated[
        bool, typer.Option(help="Afterwards drop the old keys; old backups then stay shut.")
    ] = False,
) -> None:
    """Encrypt all provider keys anew, while the sidecar runs; run it again if it was interrupted.

    With a key file a fresh key is put in front. With SIDECAR_ENCRYPTION_KEY, set the new key there
    and the old one in SIDECAR_OLD_ENCRYPTION_KEYS first.
    """
    chosen = settings()
    opened = Store(chosen.db_path)
    try:
        console = Console()
        ring = _load_ring(chosen, opened)
        left = opened.run_now(lambda db: count_stale(db, ring))
        if left:
            console.print(f"going on with an interrupted rotation: {left} left")
        elif not chosen.encryption_key:
            add_primary(chosen.key_file)
            ring = _load_ring(chosen, opened)
        while opened.run_now(lambda db: rotate_some(db, ring)):
            pass
        total = opened.run_now(encrypted_count)
        opened.run_now(lambda db: verify_all(db, ring))
        if prune and not chosen.encryption_key:
            keep_primary(chosen.key_file)
        console.print(
            f"{total} key(s) are encrypted with key {ring.primary_id.hex()} and were opened to verify it"
        )
    finally:
        opened.close()


def _load_ring(chosen: Settings, opened: Store) -> Keyring:
    used = opened.run_now(encrypted_count) > 0
    return load_ring(
        chosen.encryption_key, chosen.old_encryption_keys, chosen.key_file, anything_encrypted=used
    )


@app.command()
def check(
    offline: Annotated[bool, typer.Option(help="Do not talk to the providers.")] = False,
) -> None:
    """Settings and backends: what is configured, and whether each provider can be reached, or why not."""
    chosen = settings()
    configure("critical", chosen.log_format)
    runtime = Runtime(chosen)
    console = Console()
    try:
        if runtime.file.error:
            raise FileError(runtime.file.error)
        seen = {} if offline else asyncio.run(_probe_all(runtime))
        table = Table("backend", "pool", "address", "models", "state", title=None)
        good = True
        for name, lane in sorted(runtime.fleet.lanes.items()):
            backend, probe = lane.backend, seen.get(name)
            problem = backend.key_error or (
                "" if probe is None or (probe.reachable and probe.key_ok is not False) else probe.detail
            )
            good = good and (not problem or not backend.enabled)
            state = (
                f"[red]{escape(problem)}[/]"
                if problem
                else ("not asked" if probe is None else escape(probe.detail))
            )
            table.add_row(
                name,
                backend.pool.value,
                backend.api_base_url,
                ", ".join(backend.model_mappings) or "any",
                state,
            )
        console.print(f"database {chosen.db_path}; listens on {chosen.host}:{chosen.port}", highlight=False)
        console.print(table if runtime.fleet.lanes else "no backend is configured yet")
    finally:
        runtime.store.close()
    if not good:
        raise typer.Exit(1)


async def _probe_all(runtime: Runtime) -> dict[str, Probe]:
    upstream = AiohttpUpstream(lambda: runtime.settings.private_networks)
    try:
        lanes = list(runtime.fleet.lanes.values())
        wait = runtime.hot.health_check_timeout_seconds
        allowed = runtime.settings.private_networks
        found = await asyncio.gather(*(probe(lane.backend, upstream, wait, allowed) for lane in lanes))
        return {lane.backend.id: seen for lane, seen in zip(lanes, found, strict=True)}
    finally:
        await upstream.close()


@app.command()
def selftest() -> None:
    """Play a catalogue of provider faults against your own configuration, on this machine only."""
    chosen = settings()
    configure("critical", chosen.log_format)
    runtime = Runtime(chosen)
    backends = [lane.backend for lane in runtime.fleet.lanes.values()]
    runtime.store.close()
    try:
        scores = asyncio.run(run_selftest(chosen, backends))
    except ValueError as error:
        raise SettingsError(str(error)) from None
    table = Table("fault", "mode", "result", "what happened")
    for score in scores:
        result = "[green]ok[/]" if score.good else "[bold red]FAILED[/]"
        table.add_row(score.fault, "stream" if score.streaming else "whole", result, score.detail)
    console = Console()
    console.print(table)
    good = sum(score.good for score in scores)
    console.print(f"{good} of {len(scores)} passed")
    if good < len(scores):
        raise typer.Exit(1)
