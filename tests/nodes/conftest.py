"""Real nodes for tests: everything below this directory is marked `nodes` and runs one test at a time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import Lab, LabError, Node
from tests.lab.host import problems
from tests.nodes.fleet import Fleet

HERE = Path(__file__).parent
RUNS = Path("/var/tmp/reconciler-lab-tests")  # not /tmp: overlays do not belong into memory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.nodes)


def refuse(reasons: list[str]) -> None:
    """Skip where nodes cannot run; but an automatic run that skipped them would be green for nothing."""
    if reasons and os.environ.get("CI"):
        pytest.fail("; ".join(reasons), pytrace=False)
    if reasons:
        pytest.skip("; ".join(reasons))


def sweep_crashed(runs: Path) -> None:
    """Remove what killed runs left; those of living programs say so and stay."""
    for directory in runs.iterdir() if runs.exists() else ():
        with contextlib.suppress(LabError):
            Lab.sweep(directory)


class Pool:
    """Hands out clean nodes, booting more as tests ask for more; a node is reset only when taken again."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.used: set[str] = set()

    def __call__(self, count: int = 1) -> list[Node]:
        """`count` clean nodes, node-1 and so on; the lab's inventory is now of these."""
        names = [f"node-{number}" for number in range(1, count + 1)]
        self.lab.add([name for name in names if name not in self.lab.nodes])
        nodes = [self.lab[name] for name in names]
        # Also what never came up, so that one bad boot fails one test.
        self.lab.reset([node for node in nodes if node.name in self.used or node.state != "running"])
        self.used |= set(names)
        self.lab.write_inventory({node.name: self.lab.host_vars(node) for node in nodes}, {"fleet": names})
        return nodes


@pytest.fixture(scope="session", autouse=True)
def host() -> None:
    refuse(problems())


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The session's lab; tests ask `nodes` for nodes of it."""
    sweep_crashed(RUNS)
    with Lab([], RUNS / f"run-{os.getpid()}") as running:
        yield running


@pytest.fixture(scope="session")
def pool(lab: Lab) -> Pool:
    return Pool(lab)


@pytest.fixture
def nodes(pool: Pool) -> Pool:
    """The pool that hands out clean nodes, whatever the test before did to them.

    Call it: `one, two = nodes(2)`.
    """
    return pool


@pytest.fixture
def inventory(lab: Lab) -> Path:
    """The Ansible inventory of the nodes this test has taken last."""
    return lab.inventory


@pytest.fixture
def fleet(tmp_path: Path, inventory: Path) -> Iterator[Fleet]:
    """A project over the nodes that the test takes."""
    made = Fleet(tmp_path, inventory)
    yield made
    made.close()
    made.check_ended()
