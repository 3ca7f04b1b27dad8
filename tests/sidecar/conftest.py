"""Fixtures: providers and sidecar processes that are ended after each test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sidecar.harness import Providers, SidecarProcess


@pytest.fixture
def providers() -> Iterator[Providers]:
    made = Providers()
    yield made
    made.close()


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Callable[..., SidecarProcess]]:
    """Start a sidecar: `sidecar(backends, SIDECAR_X="1")`."""
    started: list[SidecarProcess] = []

    def start(backends: list[dict[str, Any]] | None = None, **env: str) -> SidecarProcess:
        folder = tmp_path / f"sidecar{len(started)}"
        folder.mkdir()
        process = SidecarProcess(folder, backends, **env)
        started.append(process)
        return process.start()

    yield start
    for process in started:
        process.stop()
