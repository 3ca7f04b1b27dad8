"""A real sidecar process and fake providers beside it."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import httpx

from sidecar.fake import FakeProvider

ROOT = Path(__file__).resolve().parents[2]
ADMIN = "admin-token-of-the-tests"
KEY = "sk-provider-" + "a1b2c3d4" * 4
PATIENCE = 60.0
MAPPING = {"gpt": {"native_id": "native-model", "cost": {"input": 1e-6, "output": 2e-6}}}
CHAT = {"model": "gpt", "messages": [{"role": "user", "content": "hi"}]}


def backend(name: str, url: str, **fields: Any) -> dict[str, Any]:
    """A backend as the file declares it."""
    return {
        "id": name,
        "api_base_url": url,
        "api_key_env": "TEST_PROVIDER_KEY",
        "rpm_limit": 100_000,
        "model_mappings": MAPPING,
        **fields,
    }


def wait_for(check: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Poll until `check` gives something true; generous, because the machine may be busy."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = check()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"still waiting after {seconds} s: {what}")


async def eventually(check: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """The same on an event loop."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = check()
        if found:
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"still waiting after {seconds} s: {what}")


class SidecarProcess:
    """`python -m sidecar` in a folder of its own."""

    def __init__(self, folder: Path, backends: list[dict[str, Any]] | None = None, **env: str) -> None:
        self.folder = folder
        self.log = folder / "log.txt"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SIDECAR_")},
            "SIDECAR_PORT": "0",
            "SIDECAR_METRICS_PORT": "0",
            "SIDECAR_ADMIN_TOKEN": ADMIN,
            "SIDECAR_DB_PATH": str(folder / "data" / "sidecar.db"),
            "SIDECAR_BACKUP_DIR": str(folder / "backups"),
            "LOG_FORMAT": "json",
            "TEST_PROVIDER_KEY": KEY,
            "PYTHONPATH": str(ROOT),
            **env,
        }
        if backends is not None:
            self.file = folder / "backends.yml"
            self.declare(backends)
            self.env["SIDECAR_BACKENDS_FILE"] = str(self.file)
        self.process: subprocess.Popen[bytes] | None = None
        self.url = self.metrics_url = ""

    def declare(self, backends: list[dict[str, Any]]) -> None:
        self.file.write_text(json.dumps({"backends": backends}))

    def start(self, *arguments: str) -> "SidecarProcess":
        before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error::ResourceWarning", "-m", "sidecar", *arguments],
                env=self.env,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

        def announced() -> Any:
            text = self.log.read_text(errors="replace")[before:]
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"the sidecar ended with {self.process.returncode}:\n{text}")
            return re.search(
                r"listens on (http://\S+)/v1[\s\S]*metrics: (http://\S+)/metrics[\s\S]*admin token", text
            )

        found = wait_for(announced, "the sidecar's start")
        self.url, self.metrics_url = found.group(1), found.group(2)
        return self

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(PATIENCE)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise

    def admin(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {ADMIN}"}
        return httpx.request(
            method, f"{self.url}/api/admin{path}", json=body, headers=headers, timeout=PATIENCE, **options
        )

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.metrics_url}/metrics", timeout=PATIENCE).text
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(name + r"[{ ]", line)
        )


class Providers:
    """Fake providers on an event loop of their own thread, for synchronous tests."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._made: list[FakeProvider] = []

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    def new(self, choose: Callable[..., Any] | None = None) -> FakeProvider:
        provider = FakeProvider(choose) if choose else FakeProvider()
        self.call(provider.start())
        self._made.append(provider)
        return provider

    def close(self) -> None:
        for provider in self._made:
            self.call(provider.stop())

        async def rest() -> None:
            others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.call(rest())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()


def sse(text: str) -> list[Mapping[str, Any] | str]:
    """The data of the events of a stream."""
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [entry if entry == "[DONE]" else json.loads(entry) for entry in data]
