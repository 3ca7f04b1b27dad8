"""What tests of heartbeats share: agents on nodes with stand-ins for their task sources, and people who listen."""

import json
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from tests.lab import Node
from tests.nodes.fleet import COMMAND, Fleet

ROOT = Path(__file__).parents[2]
HOME = "/home/agent"
# The gateway that the agents' turns need: starting it makes their source answer again.
GATEWAY = """\
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'echo started >> %h/gateway; echo ok > %h/.stand_ins/openclaw.mode'
"""


def declared() -> list[dict[str, Any]]:
    """The fourteen agents as this repository declares them."""
    found: list[dict[str, Any]] = yaml.safe_load((ROOT / "desired_state" / "agents.yml").read_text())[
        "heartbeats"
    ]
    return found


def agents(nodes: Iterable[Node], **every: Any) -> list[dict[str, Any]]:
    """The same on these nodes, in seconds instead of minutes."""
    names = [node.name for node in nodes]
    quick = {
        "every": "3s", "late_after": "15s", "timezone": "Asia/Shanghai", "language": "zh", "service": "gateway.service",
        "turn": None, "turn_grace": "1s", "sources": {"workboard": {"release": ["openclaw", "workboard", "release", "{id}"]}},
    }  # fmt: skip
    return [
        {**entry, **quick, "nodes": names[number % len(names)], **every}
        for number, entry in enumerate(declared())
    ]


def prepare(nodes: Iterable[Node]) -> None:
    """Stand-ins for both commands, an empty board, and the gateway."""
    for node in nodes:
        for name in ("openclaw", "multica"):
            text = (ROOT / "tests" / "stand_ins" / name).read_text()
            node.write(f"/usr/local/bin/{name}", text, mode="0755")
        node.run("mkdir -p ~/.stand_ins ~/.config/systemd/user", user="agent")
        node.write(f"{HOME}/.config/systemd/user/gateway.service", GATEWAY, owner="agent")
        board(node)


def board(node: Node, *cards: Mapping[str, Any]) -> None:
    """What WorkBoard holds on a node, put there in one step."""
    node.write(f"{HOME}/.stand_ins/cards.new", json.dumps({"cards": cards}), owner="agent")
    node.run("mv ~/.stand_ins/cards.new ~/.stand_ins/cards.json", user="agent")


def card(agent: str, name: str, *, working: float | None = None, after: Iterable[str] = ()) -> dict[str, Any]:
    """A card of an agent; ``working`` says that it is in progress, and for how many seconds nothing has moved."""
    now = int(time.time() * 1000)
    links = [{"id": "l", "type": "blocked_by", "targetCardId": other, "createdAt": 1} for other in after]
    found: dict[str, Any] = {
        "id": name, "title": f"Card {name}", "status": "todo", "priority": "normal", "labels": [], "agentId": agent,
        "position": 1000, "createdAt": now - 3_600_000, "updatedAt": now - 3_600_000, "events": [],
        "metadata": {"links": links} if links else {},
    }  # fmt: skip
    if working is not None:
        at = now - int(working * 1000)
        claim = {"ownerId": agent, "token": "[redacted]", "claimedAt": at, "lastHeartbeatAt": at}
        found |= {"status": "running", "startedAt": at, "updatedAt": at, "metadata": {"claim": claim}}
    return found


def state(node: Node, agent: str) -> dict[str, Any]:
    """What an agent's last beat saw; nothing where it has never beaten."""
    done = node.run(f"cat ~/.local/state/heartbeat/{agent}.json", user="agent", check=False)
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


def ledger(node: Node, agent: str) -> dict[str, Any]:
    """What was done about an agent and its tasks."""
    done = node.run(f"cat ~/.local/state/heartbeat/{agent}.ledger.json", user="agent", check=False)
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


def timer(node: Node, agent: str, *words: str) -> None:
    """Something done to an agent's timer."""
    command = f"XDG_RUNTIME_DIR=/run/user/$(id -u) systemctl --user {' '.join(words)} heartbeat-{agent}.timer"
    node.run(command, user="agent")


def story(fleet: Fleet, name: str) -> list[str]:
    """The statuses of an agent's events, oldest first."""
    return [row["status"] for row in fleet.events() if row["issue_key"].endswith(f"/heartbeat/{name}")]


def alerts(fleet: Fleet, *words: str) -> list[dict[str, Any]]:
    """Alerts as the command line tells them."""
    argv = [*COMMAND, "alerts", "--db", str(fleet.db), "--output", "json", "-n", "1000", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True, cwd=fleet.directory)
    found: list[dict[str, Any]] = json.loads(done.stdout)["alerts"]
    return found


class Listener:
    """People who are told, each on a route of their own: what arrived, by the route's name."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.heard: dict[str, list[str]] = {}

    def settings(self, **audiences: list[str]) -> str:
        """The routes, for reconciler.toml."""
        return "".join(
            f'[[notify]]\nname = "{name}"\nurl = "json://127.0.0.1:{self.port}/{name}"\n'
            + (f"to = {json.dumps(to)}\n" if to else "")
            for name, to in audiences.items()
        )


@contextmanager
def listening() -> Iterator[Listener]:
    """An HTTP server that takes notifications."""
    listener = Listener(0)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said = json.loads(self.rfile.read(int(self.headers["content-length"])))
            listener.heard.setdefault(self.path.strip("/"), []).append(f"{said['title']}\n{said['message']}")
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_words: Any) -> None:
            """Nothing on standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield listener
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
