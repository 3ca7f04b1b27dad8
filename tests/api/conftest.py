"""A fleet, and a real server in front of its store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from reconciler.api.server import Server
from reconciler.api.state import DaemonState
from reconciler.settings import Settings
from tests.api.showcase import Showcase

NODES = ("controller", *(f"node-{number}" for number in range(1, 8)))


@dataclass
class Site:
    """A running server; ``state`` is what its daemon would say, and may be replaced."""

    settings: Settings
    state: DaemonState = field(default_factory=DaemonState)

    def __post_init__(self) -> None:
        self.server = Server(self.settings, lambda: self.state)
        self.server.start()
        self.url = self.server.url
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def get(self, path: str, code: int = 200, **given: Any) -> Any:
        """The JSON of an answer with this code."""
        answer = self.http.get(path, **given)
        assert answer.status_code == code, answer.text
        return answer.json()

    def close(self) -> None:
        """End it."""
        self.http.close()
        self.server.stop(20)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Showcase]:
    """Eight nodes, everything as desired, nothing looked at yet."""
    made = Showcase(tmp_path / "fleet", NODES)
    yield made
    made.close()


@pytest.fixture
def site(fleet: Showcase) -> Iterator[Callable[..., Site]]:
    """Call it for a server on a free port; keywords go into its table ``[http]``."""
    running: list[Site] = []

    def start(state: DaemonState | None = None, **http: Any) -> Site:
        settings = Settings(db=fleet.db, http={"port": 0, **http})  # type: ignore[arg-type]
        running.append(Site(settings, state or DaemonState()))
        return running[-1]

    yield start
    for one in running:
        one.close()
