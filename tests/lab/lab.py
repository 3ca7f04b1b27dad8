"""A lab: several nodes booted together, an Ansible inventory of them, and their complete removal."""

import fcntl
import json
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import yaml

from tests.lab import cgroups
from tests.lab.host import LabError, allow_inotify, check_host, port_is_free, remove_tree
from tests.lab.node import AGENT, Keys, Node
from tests.lab.rootfs import ensure_base

CONTROLLER = "controller"
FLEET = (CONTROLLER, "codex-node-1", "glm-node-2", "glm-node-3", "glm-node-4", "oci-paid-3")
DEFAULT_DIRECTORY = Path("/var/lib/reconciler-lab")
STATE = "lab.json"
# What a lab that was killed before it had started anything may have left.
STILLBORN = {"lock", f".{STATE}", "keys"}
PORTS = range(20_000, 32_000)  # below the range the kernel takes ports for outgoing connections from
AT_ONCE = 4  # measured on 2 cores, 20 nodes: 4.6 s with 2 at once, 4.3 s with 4, 5.2 s with 8
PROPAGATE = Path("/run/systemd/nspawn/propagate")

HostVars = dict[str, str | int]


def _together(work: Callable[[Node], None], nodes: Iterable[Node]) -> None:
    """Do it for all nodes, then raise the first error: one bad node does not leave others half-way.

    Ctrl-C lets those under way come to an end (a boot takes a second) and begins no more: nobody boots
    a node behind the back of the removal that follows.
    """
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        futures = [pool.submit(work, node) for node in nodes]
        wait(futures)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    for future in futures:
        future.result()


class Lab:
    """Boots nodes on entering, removes every trace of them on leaving.

    `directory` is made and removed by the lab; `groups` are the inventory's, host names by group name.
    A lab whose program was killed is removed by `Lab.sweep(directory)`, and by the next lab there.
    """

    def __init__(
        self,
        names: Sequence[str],
        directory: Path = DEFAULT_DIRECTORY,
        *,
        groups: Mapping[str, Sequence[str]] | None = None,
        first_port: int | None = None,
    ) -> None:
        self.directory = directory.absolute()
        self.names = list(names)
        self.groups = {group: list(members) for group, members in (groups or {}).items()}
        self.nodes: dict[str, Node] = {}
        self.keys = Keys(self.directory / "keys")
        self.inventory = self.directory / "inventory.yml"
        self._first_port = first_port
        self._id = uuid.uuid4().hex[:8]
        self._base = Path()
        self._kept = False
        self._parents: list[Path] = []
        self._lock: IO[str] | None = None

    # -- life ----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.down()

    def up(self, *, keep: bool = False) -> None:
        """Boot all nodes; on any error or interruption none is left. `keep`: outlive this program."""
        check_host()
        self._base = ensure_base()
        self.sweep(self.directory, kept=False)
        self._kept = keep
        self.directory.mkdir(parents=True, mode=0o755)
        self._claim()
        self._parents = cgroups.parents(self._id)
        try:
            self.keys.make(self.keys.private, "lab")
            self._boot(self.names)
        except BaseException:
            self.down()
            raise
        if keep:
            self._release()

    def add(self, names: Sequence[str]) -> list[Node]:
        """Boot more nodes in a running lab."""
        if names:
            self._boot(names)
        return [self.nodes[name] for name in names]

    def reset(self, nodes: Iterable[Node]) -> None:
        """Reset nodes in parallel; see Node.reset."""
        _together(Node.reset, nodes)

    def down(self) -> None:
        """Kill the nodes and remove everything the lab made; may be called again, and after a crash."""
        if self._parents:
            everything = cgroups.Group(self._parents)
            everything.kill()
            everything.remove()
        for node in self.nodes.values():
            remove_tree(PROPAGATE / node.machine)
        self.nodes = {}
        self._release()
        # The file that tells of the lab goes last: a removal that was interrupted can be taken up again.
        for part in ("nodes", "keys"):
            remove_tree(self.directory / part)
        for name in ("inventory.yml", "lock", f".{STATE}", STATE):
            (self.directory / name).unlink(missing_ok=True)
        if self.directory.exists() and not any(self.directory.iterdir()):
            self.directory.rmdir()

    @classmethod
    def attach(cls, directory: Path = DEFAULT_DIRECTORY) -> Self:
        """The lab that another program keeps up in that directory."""
        try:
            state = json.loads((directory / STATE).read_text())
        except FileNotFoundError:
            raise LabError(f"no lab is up in {directory}") from None
        lab = cls(list(state["nodes"]), directory, groups=state["groups"])
        lab._id, lab._kept, lab._base = state["lab"], state["kept"], Path(state["base"])
        lab._parents = [Path(path) for path in state["control_groups"]]
        lab.nodes = {name: lab._node(name, port) for name, port in state["nodes"].items()}
        return lab

    @classmethod
    def sweep(cls, directory: Path, *, kept: bool = True) -> bool:
        """Remove what a lab left in that directory; false when there was nothing.

        LabError while the program of that lab lives, and, unless `kept`, for one that is to be kept.
        """
        if not directory.exists():
            return False
        born = (directory / STATE).exists()
        if not born and {path.name for path in directory.iterdir()} - STILLBORN:
            raise LabError(f"{directory} is neither empty nor a lab's; choose another directory")
        lab = cls.attach(directory) if born else cls([], directory)
        if lab._kept and not kept:
            raise LabError(f"a lab is already up in {directory}; take it down first")
        lab._claim()
        lab.down()
        return born

    def _claim(self) -> None:
        """Hold the lock that tells a living owner from a crashed one; the kernel drops it with the owner."""
        handle = (self.directory / "lock").open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise LabError(f"a lab in {self.directory} is in use by a living program") from None
        self._lock = handle

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # -- nodes ---------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Node:
        try:
            return self.nodes[name]
        except KeyError:
            raise LabError(f"no node {name!r} in this lab; it has {', '.join(self.nodes)}") from None

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def _node(self, name: str, port: int) -> Node:
        group = cgroups.Group([parent / name for parent in self._parents])
        return Node(name, port, self.directory / "nodes" / name, self._base, group)

    def _boot(self, names: Sequence[str]) -> None:
        taken = [name for name in names if name in self.nodes]
        if taken or len(set(names)) != len(names):
            raise LabError(f"names must differ: {', '.join(taken or names)}")
        ports = self._free_ports(len(names))
        new = [self._node(name, port) for name, port in zip(names, ports, strict=True)]
        self.nodes |= {node.name: node for node in new}
        allow_inotify(len(self.nodes))
        self._save()  # before anything starts: what crashes later is found
        for node in new:
            self.keys.make(self.keys.host(node.name), node.name)
        self._write_known_hosts()
        _together(Node.start, new)
        self.write_inventory()

    def _free_ports(self, count: int) -> list[int]:
        """From `first_port`, which must be free, or from a place that two labs seldom share."""
        used = {node.port for node in self}
        if self._first_port is not None:
            start = self._first_port + len(used)
            if busy := [port for port in range(start, start + count) if not port_is_free(port)]:
                raise LabError(f"ports taken by other programs: {', '.join(map(str, busy))}")
            return list(range(start, start + count))
        offset = zlib.crc32(str(self.directory).encode()) % len(PORTS)
        candidates = [*PORTS[offset:], *PORTS[:offset]]
        free = (port for port in candidates if port not in used and port_is_free(port))
        return [port for _, port in zip(range(count), free, strict=False)]

    # -- files ---------------------------------------------------------------------------------

    def _save(self) -> None:
        state = {
            "lab": self._id,
            "kept": self._kept,
            "base": str(self._base),
            "control_groups": [str(path) for path in self._parents],
            "nodes": {node.name: node.port for node in self},
            "groups": self.groups,
        }
        beside = self.directory / f".{STATE}"
        beside.write_text(json.dumps(state, indent=2) + "\n")
        beside.rename(self.directory / STATE)

    def _write_known_hosts(self) -> None:
        """Each key for its port on the whole loopback range: aliases are the same node."""
        lines = []
        for node in self:
            kind, key, _ = self.keys.host(node.name).with_name(f"{node.name}.pub").read_text().split()
            lines.append(f"[127.*]:{node.port} {kind} {key}\n")
        self.keys.known_hosts.write_text("".join(lines))

    def host_vars(self, node: Node) -> HostVars:
        """What an inventory says of this node alone; the rest are variables of all."""
        return {"ansible_host": node.address, "ansible_port": node.port}

    def aliases(self, node: Node, count: int) -> dict[str, HostVars]:
        """`count` inventory hosts that are all this node, each at its own address of the loopback range."""
        node.hear_everywhere()
        found: dict[str, HostVars] = {}
        for number in range(1, count + 1):
            high, low = divmod(number, 250)
            name = f"{node.name}-{number:04d}"
            found[name] = {"ansible_host": f"127.77.{high}.{low + 1}", "ansible_port": node.port}
        return found

    def write_inventory(
        self,
        hosts: Mapping[str, HostVars] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        path: Path | None = None,
    ) -> Path:
        """An Ansible inventory (YAML) of these hosts, or of all nodes in the lab's own groups."""
        if hosts is None:
            hosts = {node.name: self.host_vars(node) for node in self}
        members = self.groups if groups is None else groups
        options = " ".join(self.keys.ssh_options())
        content = {
            "all": {
                "vars": {
                    "ansible_user": AGENT,
                    "ansible_ssh_private_key_file": str(self.keys.private),
                    "ansible_ssh_common_args": options,
                    "ansible_python_interpreter": "/usr/bin/python3",
                },
                "hosts": {name: dict(settings) for name, settings in hosts.items()},
                "children": {
                    group: {"hosts": {name: {} for name in names if name in hosts}}
                    for group, names in members.items()
                },
            },
        }
        target = path or self.inventory
        target.write_text(yaml.safe_dump(content, sort_keys=False))
        return target
