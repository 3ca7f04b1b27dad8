"""The kinds of resources: one package here and one role of the same name in roles/ for each.

Importing this package imports no kind and nothing heavy: Ansible's workers come through here once
per step. The models are gathered by :mod:`reconciler.kinds.registry`.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent


def probe_path(kind: str) -> Path:
    """The node-side file of a kind: ``observe`` and ``changes``, standard library only."""
    return HERE / kind / "probe.py"


def names() -> list[str]:
    """Every kind there is: the packages beside this file that ship a probe."""
    return sorted(path.parent.name for path in HERE.glob("*/probe.py"))
