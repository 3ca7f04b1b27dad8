"""`sidecar selftest`: the operator's own configuration against the catalogue of faults.

Every backend is replaced by a fake provider on loopback; pools, limits, mappings and
settings stay the operator's, but for time limits, which are shortened so that stalls show.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson

from sidecar import fake, server
from sidecar.app import create_app
from sidecar.fake import FakeProvider, Script, Seen
from sidecar.faults import CATALOGUE, Expect, Fault
from sidecar.management import create_management
from sidecar.model import Api, Backend
from sidecar.runtime import Runtime
from sidecar.settings import Settings

_SHORT_SECONDS = 0.8
_AT_ONCE = 6
_PATIENCE_SECONDS = 30.0
_OK = 200


@dataclass(frozen=True)
class Score:
    """One fault's result."""

    fault: str
    streaming: bool
    good: bool
    detail: str


def candidates(backends: Sequence[Backend]) -> list[Backend]:
    """The enabled OpenAI backends; the catalogue speaks that dialect."""
    return [backend for backend in backends if backend.enabled and backend.api is Api.OPENAI]


async def run(settings: Settings, backends: Sequence[Backend]) -> list[Score]:
    """Play the whole catalogue. Raises ValueError when there is nothing to test."""
    tested = candidates(backends)
    if not tested:
        raise ValueError(
            "no enabled backend with api openai-completions: add one first (see docs/sidecar.md)"
        )
    names = [name for backend in tested for name in backend.model_mappings]
    model = names[0] if names else "any-model"
    few = asyncio.Semaphore(_AT_ONCE)

    async def one(fault: Fault, *, streaming: bool) -> Score:
        async with few:
            return await _one(settings, tested, model, fault, streaming=streaming)

    cases = (one(fault, streaming=streaming) for fault in CATALOGUE for streaming in fault.modes)
    return await asyncio.gather(*cases)


async def _one(
    settings: Settings, tested: list[Backend], model: str, fault: Fault, *, streaming: bool
) -> Score:
    async with _arena(settings, tested) as (url, providers):
        order: list[str] = []

        def choose_for(name: str) -> object:
            def choose(seen: Seen) -> Script:
                if seen.method == "GET":
                    return fake.default_script(seen)
                order.append(name)
                return fault.script(streaming) if len(order) == 1 else fake.default_script(seen)

            return choose

        for name, provider in providers.items():
            provider.choose = choose_for(name)  # type: ignore[assignment]
        body = {"model": model, "messages": [{"role": "user", "content": "selftest"}], "stream": streaming}
        alone = sum(backend.serves(model) for backend in tested) == 1
        try:
            async with httpx.AsyncClient(timeout=_PATIENCE_SECONDS) as client:
                status, text, broke = await _ask(client, url, body)
        except httpx.HTTPError as error:
            return Score(fault.name, streaming, good=False, detail=f"no explicit answer: {error!r}")
        return _judge(
            fault, streaming=streaming, status=status, text=text, broke=broke, order=order, alone=alone
        )


async def _ask(client: httpx.AsyncClient, url: str, body: dict[str, object]) -> tuple[int, str, bool]:
    parts: list[bytes] = []
    async with client.stream("POST", url + "/v1/chat/completions", json=body) as answer:
        try:
            async for part in answer.aiter_bytes():
                parts.append(part)  # noqa: PERF401 - what came before a break counts
        except httpx.RemoteProtocolError:
            return answer.status_code, b"".join(parts).decode(errors="replace"), True
    return answer.status_code, b"".join(parts).decode(errors="replace"), False


def _judge(
    fault: Fault, *, streaming: bool, status: int, text: str, broke: bool, order: list[str], alone: bool
) -> Score:
    whole = status == _OK and not broke and ("data: [DONE]" in text if streaming else _is_answer(text))
    said = f"status {status}, {len(order)} attempt(s): {' > '.join(order)}"
    if fault.expect is Expect.EXPLICIT:
        good = broke and '"error"' in text and "[DONE]" not in text
    elif fault.expect is Expect.RETURNED:
        good = not whole and len(order) == 1
    elif fault.expect is Expect.WHOLE:
        good = whole and len(order) == 1
    else:
        good = (not whole and status > _OK) if alone else whole
    good = good and len(order) == len(set(order))
    return Score(fault.name, streaming, good=good, detail=said)


def _is_answer(text: str) -> bool:
    try:
        return "choices" in orjson.loads(text)
    except ValueError:
        return False


@contextlib.asynccontextmanager
async def _arena(
    settings: Settings, tested: list[Backend]
) -> AsyncIterator[tuple[str, dict[str, FakeProvider]]]:
    """A sidecar of its own on free ports, in a folder that is thrown away."""
    providers = {backend.id: FakeProvider() for backend in tested}
    with tempfile.TemporaryDirectory(prefix="sidecar-selftest-") as folder:
        for provider in providers.values():
            await provider.start()
        runtime = Runtime(_shortened(settings, Path(folder)))
        runtime.stored = [
            backend.model_copy(
                update={
                    "api_base_url": providers[backend.id].url,
                    "api_key": "sk-selftest",
                    "timeout_seconds": _SHORT_SECONDS,
                }
            )
            for backend in tested
        ]
        runtime.refresh()
        main, metrics = server.bind("127.0.0.1", 0, ""), server.bind("127.0.0.1", 0, "")
        stop = asyncio.Event()
        ready = asyncio.Event()
        app = create_app(runtime, create_management(runtime))
        serving = asyncio.create_task(server.serve(runtime, app, main, metrics, ready.set, stop))
        try:
            await ready.wait()
            yield f"http://127.0.0.1:{main.getsockname()[1]}", providers
        finally:
            stop.set()
            for provider in providers.values():
                await provider.stop()
            await serving


def _shortened(settings: Settings, folder: Path) -> Settings:
    return settings.model_copy(
        update={
            "host": "127.0.0.1",
            "db_path": folder / "selftest.db",
            "backup_dir": folder / "backups",
            "backends_file": None,
            "v1_upstream": "",
            "encryption_key": "",
            "encryption_key_file": None,
            "old_encryption_keys": "",
            "admin_token": "selftest",
            "drain_seconds": 1.0,
            "access_log": False,
            "request_timeout_seconds": _SHORT_SECONDS * 20,
            "first_token_timeout_seconds": _SHORT_SECONDS,
            "idle_timeout_seconds": _SHORT_SECONDS,
        }
    )
