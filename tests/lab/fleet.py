"""`make lab`: the repository's own desired state on lab nodes of the fleet's names.

    python -m tests.lab.fleet [DIRECTORY]

Boots the nodes, gives them what differs at this site (a stand-in package of claude, since the lab has no
network), drifts some of them, and runs a real pass. The nodes stay up for playing.
"""

import subprocess
import sys
from pathlib import Path

import yaml

from tests.lab import Lab, LabError
from tests.lab.lab import CONTROLLER, DEFAULT_DIRECTORY, FLEET
from tests.nodes import packages

REPOSITORY = Path(__file__).parents[2]
GROUPS = {"controllers": [CONTROLLER], "workers": [name for name in FLEET if name != CONTROLLER]}


def prepare(lab: Lab) -> Path:
    """Site values and packages of the lab; returns the inventory directory."""
    inventory = lab.directory / "inventory"
    (inventory / "group_vars").mkdir(parents=True, exist_ok=True)
    lab.write_inventory({node.name: lab.host_vars(node) for node in lab}, GROUPS, inventory / "hosts.yml")
    package = packages.npm(lab.directory, "claude", "2.0.9")
    site = yaml.safe_load((REPOSITORY / "inventory/group_vars/all.yml").read_text())
    site["site_claude_package"] = f"/srv/packages/{package.name}"
    (inventory / "group_vars/all.yml").write_text(yaml.safe_dump(site))
    for node in lab:
        node.write(f"/srv/packages/{package.name}", package.read_bytes())
    lab["controller"].run("mkdir -p ~/dispatch", user="agent")
    return inventory


def drift(lab: Lab) -> None:
    """The week's usual: an old wrapper, a stopped watcher, a database without a column."""
    lab["glm-node-2"].write("/home/agent/task-wrapper.sh", "#!/bin/bash\n# last month's\n", owner="agent")
    lab["oci-paid-3"].run("systemctl --user stop task-watcher", user="agent", check=False)
    script = "import sqlite3; d = sqlite3.connect('/home/agent/dispatch/dispatch.db');"
    script += " d.execute('create table tasks (id INTEGER PRIMARY KEY)')"
    lab["controller"].run(f'python3 -c "{script}"', user="agent", check=False)


def reconcile(lab: Lab, inventory: Path, *arguments: str) -> int:
    """The real command over the repository's desired state."""
    paths = ["--db", str(lab.directory / "state.db")]
    if "status" not in arguments:
        paths += ["--desired", "desired_state", "--inventory", str(inventory)]
    argv = [sys.executable, "-m", "reconciler", *arguments, *paths]
    print(f"\n$ reconcile {' '.join(arguments)}", flush=True)
    return subprocess.run(argv, cwd=REPOSITORY, check=False, timeout=900).returncode


def main() -> int:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_DIRECTORY
    try:
        Lab.sweep(directory)
        lab = Lab(list(FLEET), directory, groups=GROUPS)
        lab.up(keep=True)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    inventory = prepare(lab)
    drift(lab)
    codes = [reconcile(lab, inventory, arguments) for arguments in ("--check", "--once", "--once")]
    reconcile(lab, inventory, "status")
    print(f"\nThe nodes stay up. Log in:  python -m tests.lab ssh glm-node-2 --directory {directory}")
    print(f"Remove them:               python -m tests.lab down --directory {directory}")
    return 0 if codes == [2, 0, 0] else 1


if __name__ == "__main__":
    sys.exit(main())
