"""The same facts with pyinfra's own: file digests and modes, versions, unit states, a database's columns.

python -m tests.bench.pyinfra_facts INVENTORY     # the lab's, YAML
"""

import sys
from pathlib import Path

import yaml
from pyinfra.api import Config, Inventory, State
from pyinfra.api.connect import connect_all
from pyinfra.api.facts import get_facts
from pyinfra.facts.files import File, Sha256File
from pyinfra.facts.server import Command
from pyinfra.facts.systemd import SystemdEnabled, SystemdStatus

FILES = ["task-wrapper", "task-watcher", "notify", "sync-spec", "agent-env", "heartbeat"]
TOOLS = [
    "~/.local/bin/claude",
    "~/.local/bin/claude-glm",
    "~/.local/bin/mm",
    "~/.local/bin/openclaw",
    "python3",
]
UNITS = ["task-watcher.service", "heartbeat.service"]
COLUMNS = (
    "import os, sqlite3; d = sqlite3.connect('file:%s?mode=ro' % os.path.expanduser('~/dispatch.db'), uri=True);"
    " [print(t, d.execute('pragma table_info(%s)' % t).fetchall(), d.execute('pragma index_list(%s)' % t).fetchall())"
    " for t in ('tasks', 'nodes', 'guardian_events')]"
)


def inventory(path: Path) -> Inventory:
    """The hosts of the lab's inventory, to be logged in to with the lab's key."""
    everything = yaml.safe_load(path.read_text())["all"]
    shared = everything["vars"]
    common = {
        "ssh_user": shared["ansible_user"],
        "ssh_key": shared["ansible_ssh_private_key_file"],
        "ssh_config_file": "/dev/null",
        "ssh_known_hosts_file": "/dev/null",
        # Its client knows no patterns in known_hosts; the addresses are this machine's own.
        "ssh_strict_host_key_checking": "off",
        "ssh_look_for_keys": False,
        "ssh_allow_agent": False,
    }
    hosts = [
        (name, {**common, "ssh_hostname": own["ansible_host"], "ssh_port": own["ansible_port"]})
        for name, own in everything["hosts"].items()
    ]
    return Inventory((hosts, {}))


def main() -> None:
    """Log in to all, and gather."""
    state = State(inventory(Path(sys.argv[1])), Config(PARALLEL=int(sys.argv[2])))
    connect_all(state)
    answers = 0
    files = [f"/home/agent/{name}.sh" for name in FILES]
    for path in [*files, *(f"/home/agent/.config/systemd/user/{unit}" for unit in UNITS)]:
        answers += len([found for found in get_facts(state, File, (path,)).values() if found])
        answers += len([found for found in get_facts(state, Sha256File, (path,)).values() if found])
    for tool in TOOLS:
        answers += len(
            [found for found in get_facts(state, Command, (f"{tool} --version",)).values() if found]
        )
    answers += len(
        [found for found in get_facts(state, Command, (f'python3 -c "{COLUMNS}"',)).values() if found]
    )
    for fact, options in (
        (SystemdStatus, {"user_mode": True, "services": UNITS}),
        (SystemdEnabled, {"user_mode": True, "services": UNITS}),
        (SystemdStatus, {"services": "ssh.service"}),
    ):
        answers += len([found for found in get_facts(state, fact, (), options).values() if found])
    wanted = len(list(state.inventory)) * (2 * (len(FILES) + len(UNITS)) + len(TOOLS) + 1 + 3)
    assert answers == wanted, f"{answers} facts instead of {wanted}"


if __name__ == "__main__":
    main()
