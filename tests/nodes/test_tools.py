"""Every install method with a real package, its upgrade, and its undo."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import Node
from tests.nodes import packages
from tests.nodes.conftest import Pool
from tests.nodes.fleet import Fleet

METHODS = ("npm", "pip", "pipx", "apt", "archive", "http", "file")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server on loopback; the nodes share this machine's network."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def install(  # noqa: PLR0917 - a package in six respects
    method: str, version: str, tmp_path: Path, node: Node, fleet: Fleet, web: str
) -> dict[str, Any]:
    """A declaration of the tool in that version, with its package where the method looks for it."""
    entry: dict[str, Any] = {"name": "glmtool", "nodes": "all"}
    where = "/srv/packages"
    if method == "file":
        fleet.file("glmtool", packages.SCRIPT.format(name="glmtool", version=version))
        return {**entry, "install": {"file": "files/glmtool"}}
    maker = {"npm": packages.npm, "pip": packages.wheel, "pipx": packages.wheel, "apt": packages.deb}
    path = maker.get(method, packages.archive)(tmp_path, "glmtool", version)
    if method == "http":
        return {**entry, "install": {"url": f"{web}/{path.name}", "sha256": packages.sha256(path)}}
    node.write(f"{where}/{path.name}", path.read_bytes())
    if method == "archive":
        source = {"url": f"file://{where}/{path.name}", "sha256": packages.sha256(path)}
        return {**entry, "install": {**source, "member": f"glmtool-{version}/bin/glmtool"}}
    return {**entry, "install": {method: f"{where}/{path.name}"}, "allow_become": method == "apt"}


def version_of(node: Node) -> str:
    ran = node.run(
        "PATH=~/.local/bin:$PATH; command -v glmtool >/dev/null && glmtool --version || echo absent",
        user="agent",
    )
    return ran.stdout.strip()


@pytest.mark.parametrize("method", METHODS)
def test_a_tool_is_installed_upgraded_and_undone(
    method: str, nodes: Pool, fleet: Fleet, tmp_path: Path, web: str
) -> None:
    (node,) = nodes(1)
    first = install(method, "1.4", tmp_path, node, fleet, web)
    fleet.declare({"tools": [{**first, "version": ">=1.0"}]})
    answer = fleet.once()
    assert answer.code == 0, answer.out + answer.err
    assert version_of(node) == "glmtool 1.4"
    assert fleet.once().report["drifts"] == []

    second = install(method, "2.1", tmp_path, node, fleet, web)
    fleet.declare({"tools": [{**second, "version": ">=2.0"}]})
    assert fleet.once().outcomes == {"node-1/tool/glmtool": "fixed"}
    assert version_of(node) == "glmtool 2.1"

    # The package brings another version than the one that is asked for: not as desired, so undone.
    third = install(method, "2.5", tmp_path, node, fleet, web)
    fleet.declare({"tools": [{**third, "version": ">=3.0"}]})
    # apt can only go back to a version that it can still fetch, and no repository has this one.
    possible = method != "apt"
    answer = fleet.once()
    assert answer.code == 3
    assert answer.outcomes == {"node-1/tool/glmtool": "rolled_back" if possible else "failed"}, answer.out
    if possible:
        assert version_of(node) == "glmtool 2.1"
    else:
        assert "undo failed" in answer.report["outcomes"][0]["detail"]
        assert answer.report["outcomes"][0]["severity"] == 5


@pytest.mark.parametrize("method", METHODS)
def test_a_new_tool_that_will_not_do_is_removed_without_a_trace(
    method: str, nodes: Pool, fleet: Fleet, tmp_path: Path, web: str
) -> None:
    (node,) = nodes(1)
    entry = install(method, "1.4", tmp_path, node, fleet, web)
    fleet.declare({"tools": [{**entry, "version": ">=2.0"}]})
    paths = ("/home/agent", "/opt", "/usr/bin", "/usr/local")
    before = set(node.tree(*paths))
    answer = fleet.once()
    assert answer.outcomes == {"node-1/tool/glmtool": "rolled_back"}, answer.out
    assert version_of(node) == "absent"
    left = {
        p
        for p in set(node.tree(*paths)) - before
        if not p.startswith(("/home/agent/.local/state", "/home/agent/.npm", "/home/agent/.cache"))
    }
    assert left <= {"/home/agent/.local", "/home/agent/.local/share"}, left


def test_a_tool_without_an_install_method_is_reported_and_fails_the_pass(nodes: Pool, fleet: Fleet) -> None:
    nodes(1)
    fleet.declare({"tools": [{"name": "claude", "nodes": "all"}]})
    answer = fleet.once()
    assert answer.code == 3
    assert answer.report["outcomes"] == []
    assert "no install method" in answer.report["skipped"][0]["reason"]
