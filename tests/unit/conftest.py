"""Shared ground for unit tests: an account of its own, a fleet on disk, a store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from reconciler.store import Store
from tests.unit.support import Fleet

# The gate gives the same answer for the same tree; HYPOTHESIS_PROFILE=deep goes looking for what is new.
_common = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", _common, max_examples=35, derandomize=True)
settings.register_profile("deep", _common, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory of the test's own and no settings from outside; the working directory is empty."""
    home = tmp_path / "home"
    home.mkdir()
    for name in list(os.environ):
        if name.startswith(("RECONCILER_", "ANSIBLE_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return home


@pytest.fixture
def fleet(account: Path) -> Fleet:
    """An inventory of three nodes and an empty desired state in the working directory."""
    assert account.is_dir()
    return Fleet(Path.cwd())


@pytest.fixture
def store() -> Iterator[Store]:
    """A store in memory."""
    found = Store(None)
    yield found
    found.close()
