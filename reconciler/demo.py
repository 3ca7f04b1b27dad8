"""``python -m reconciler.demo [DIRECTORY]``: a small fleet of make-believe nodes below one directory.

Each node is a home directory on this machine, reached by Ansible's local connection: no root, no sshd, no
containers. Everything else is real: Ansible, the roles, SQLite, the events.
"""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import yaml

NODES = ("controller", "node-1", "node-2", "node-3")

DESIRED = """\
schema:
  - name: dispatch
    nodes: controller
    database: ~/dispatch.db
    tables:
      tasks:
        columns: {id: INTEGER PRIMARY KEY, project: TEXT, status: TEXT NOT NULL DEFAULT 'pending', started_at: TEXT}
        indexes: {tasks_by_status: {columns: [status]}}
wrappers:
  - name: task-wrapper
    nodes: workers
    src: files/task-wrapper.sh
    dest: ~/task-wrapper.sh
    mode: "0755"
    validate: sh -n %s
tools:
  - {name: mm, nodes: workers, version: ">=2.0", install: {file: files/mm}, bin_dir: ~/.local/bin}
"""
WRAPPER = '#!/bin/sh\n# Runs one task.\nset -u\nexec "$@"\n'
OLD_WRAPPER = "#!/bin/sh\n# Runs one task (last month's way).\n$*\n"


def main() -> int:
    """Drift a fleet, show it, repair it, show that a second pass is quiet; 0 when all went as it should."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "demo").resolve()
    if directory.exists() and not (directory / ".reconciler-demo").exists():
        sys.stderr.write(f"error: {directory} exists and is not a demo; name another directory\n")
        return 1
    shutil.rmtree(directory, ignore_errors=True)
    _make(directory)
    _drift(directory)
    steps = (
        ("What drifted? (changes nothing)", ["--once", "--check"], 2),
        ("Put it right.", ["--once"], 0),
        ("A second pass finds nothing to do.", ["--once"], 0),
        ("What happened, for the record.", ["events"], 0),
    )
    for title, arguments, expected in steps:
        sys.stdout.write(f"\n── {title}\n$ reconcile {' '.join(arguments)}\n\n")
        sys.stdout.flush()
        code = subprocess.run(
            [sys.executable, "-m", "reconciler", *arguments], cwd=directory, check=False
        ).returncode
        if code != expected:
            sys.stderr.write(f"error: that ended with {code}, expected was {expected}\n")
            return 1
    sys.stdout.write(
        f"\nThe fleet stays in {directory}: change something below nodes/ or in desired_state/ and run\n"
    )
    sys.stdout.write(f"  cd {directory} && {Path(sys.executable).parent / 'reconcile'} --once\n")
    return 0


def _make(directory: Path) -> None:
    """Desired state, inventory and settings."""
    files = directory / "desired_state" / "files"
    files.mkdir(parents=True)
    (directory / ".reconciler-demo").touch()
    (directory / "desired_state" / "fleet.yml").write_text(DESIRED, encoding="utf-8")
    (files / "task-wrapper.sh").write_text(WRAPPER, encoding="utf-8")
    (files / "mm").write_text("#!/bin/sh\necho mm 2.1\n", encoding="utf-8")
    hosts = {}
    for name in NODES:
        home = directory / "nodes" / name
        home.mkdir(parents=True)
        environment = {"HOME": str(home), "XDG_STATE_HOME": str(home / ".local/state")}
        hosts[name] = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "reconciler_environment": environment,
        }
    workers: dict[str, dict[str, str]] = {name: {} for name in NODES if name != "controller"}
    inventory = {"all": {"hosts": hosts, "children": {"workers": {"hosts": workers}}}}
    (directory / "inventory.yml").write_text(yaml.safe_dump(inventory, sort_keys=False), encoding="utf-8")
    (directory / "reconciler.toml").write_text(
        'inventory = "inventory.yml"\ndb = "reconciler.db"\n', encoding="utf-8"
    )


def _drift(directory: Path) -> None:
    """The week's usual: a missing column, last month's wrapper, an old tool, nothing at all."""
    nodes = directory / "nodes"
    with closing(sqlite3.connect(nodes / "controller" / "dispatch.db")) as database:
        database.execute("CREATE TABLE tasks (id INTEGER PRIMARY KEY, project TEXT)")
        database.execute("INSERT INTO tasks (project) VALUES ('kept')")
        database.commit()
    (nodes / "node-1" / "task-wrapper.sh").write_text(OLD_WRAPPER, encoding="utf-8")
    tool = nodes / "node-2" / ".local" / "bin" / "mm"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\necho mm 1.4\n", encoding="utf-8")
    tool.chmod(0o755)


if __name__ == "__main__":
    sys.exit(main())
