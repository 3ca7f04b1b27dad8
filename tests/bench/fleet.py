"""A fleet to measure on: a few lab nodes, as many inventory hosts as wanted, one desired state that holds."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.lab import Lab

ROOT = Path(__file__).parents[2]
# Aliases of one node share its systemd, its disk cache and its sshd: a few nodes keep that from being the limit.
NODES = 5
UNIT = """\
[Unit]
Description=Agent's {name}

[Service]
ExecStart=/bin/sleep infinity
Environment=NAME={name}
Restart=on-failure

[Install]
WantedBy=default.target
"""
TABLES = {
    "tasks": "id project task_id spec_file node status priority depends_on created_at started_at completed_at",
    "nodes": "id name ssh_host slots priority status",
    "guardian_events": "id timestamp check_type issue_key severity status fix_attempts details node",
}


class BenchFleet:
    """A project directory, its nodes, and inventories of 5 to hundreds of hosts over them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lab = Lab([f"node-{number}" for number in range(1, NODES + 1)], directory / "lab")
        self.desired = directory / "desired_state"
        self.runtime = directory / "r"  # short: control sockets live below it
        self.sockets = self.runtime / "reconciler-ssh"

    def up(self) -> None:
        """Boot the nodes and bring them into the desired state."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.runtime.mkdir(mode=0o700, exist_ok=True)
        (self.desired / "files").mkdir(parents=True, exist_ok=True)
        self.lab.up()
        self._declare()
        argv = self.reconcile(self.lab.inventory, "--once")
        done = subprocess.run(
            argv, env=self.environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode != 0:
            raise SystemExit(
                f"the fleet could not be brought into its desired state:\n{done.stdout}{done.stderr}"
            )

    def inventory(self, count: int) -> Path:
        """An inventory of ``count`` hosts, spread over the nodes."""
        per_node = -(-count // NODES)
        hosts = {name: made for node in self.lab for name, made in self.lab.aliases(node, per_node).items()}
        by_turns = sorted(hosts, key=lambda name: name.rsplit("-", 1)[::-1])[:count]
        path = self.directory / f"hosts-{count}.yml"
        return self.lab.write_inventory({name: hosts[name] for name in by_turns}, {}, path)

    def environment(self) -> dict[str, str]:
        """The environment that every contender gets."""
        return {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.sockets),
            "RECONCILER_DESIRED": str(self.desired),
            "NO_COLOR": "1",
        }

    def reconcile(self, inventory: Path, *arguments: str) -> list[str]:
        """The command line of one pass."""
        paths = ["--desired", str(self.desired), "--inventory", str(inventory)]
        return [
            sys.executable,
            "-m",
            "reconciler",
            *arguments,
            *paths,
            "--db",
            str(self.directory / "state.db"),
        ]

    def masters(self) -> list[int]:
        """Process ids of the fleet's open control masters."""
        argv = ["ps", "-e", "-o", "pid=,args="]
        rows = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=True).stdout
        return [int(row.split()[0]) for row in rows.splitlines() if f"ssh: {self.sockets}/" in row]

    def close_sockets(self) -> None:
        """Make the next run a cold one."""
        for pid in self.masters():
            os.kill(pid, 9)
        for socket in self.sockets.glob("*"):
            socket.unlink()

    def _file(self, name: str, text: str) -> str:
        (self.desired / "files" / name).write_text(text)
        return f"files/{name}"

    def _declare(self) -> None:
        """Sixteen resources per node, in the shape of the repository's own desired state."""
        everywhere: dict[str, Any] = {"nodes": "all"}
        tables = {
            name: {
                "columns": {
                    column: "INTEGER PRIMARY KEY" if column == "id" else "TEXT" for column in text.split()
                }
            }
            for name, text in TABLES.items()
        }
        wrappers = ["task-wrapper", "task-watcher", "notify", "sync-spec", "agent-env", "heartbeat"]
        services = ["task-watcher", "heartbeat"]
        state = {
            "ssh": [everywhere],
            "schema": [{**everywhere, "name": "dispatch", "database": "~/dispatch.db", "tables": tables}],
            "tools": [
                {**everywhere, "name": name, "version": ">=2", "install": {"file": self._tool(name)}}
                for name in ("claude", "claude-glm", "mm", "openclaw")
            ]
            + [{**everywhere, "name": "python3", "version": ">=3.6"}],
            "wrappers": [
                {
                    **everywhere,
                    "name": name,
                    "src": self._file(f"{name}.sh", f"#!/bin/bash\n# {name}\n" + "echo working\n" * 60),
                    "dest": f"~/{name}.sh",
                    "permissions": "0755",
                    "validate": "bash -n %s",
                }
                for name in wrappers
            ],
            "services": [
                {
                    **everywhere,
                    "name": name,
                    "scope": "user",
                    "unit": self._file(f"{name}.service", UNIT.format(name=name)),
                    "enabled": True,
                    "settle": 0,
                    "restart_on": [f"~/{name}.sh"],
                }
                for name in services
            ]
            + [{**everywhere, "name": "ssh", "state": "running"}],
        }
        (self.desired / "state.yml").write_text(yaml.safe_dump(state, sort_keys=False))

    def _tool(self, name: str) -> str:
        return self._file(name, f"#!/bin/sh\necho '{name} 2.1.4'\n")
