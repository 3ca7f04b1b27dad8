"""A control group for each node: the only list of a node's processes that is complete and never reused.

Everything the lab kills, freezes or looks for goes through the node's own group, so that no process
the lab did not start can be hit, not even after a crash and a wrap-around of the PIDs.
"""

import os
import time
from pathlib import Path

from tests.lab.host import LabError

# Run by sh: enter every group named before "--", then become the command after it.
ENTER = 'while [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs" || exit 1; shift; done; shift; exec "$@"'


def _mounted() -> dict[str, Path]:
    """Where the hierarchies systemd needs are mounted: "" is version 2, "name=systemd" that of version 1."""
    found: dict[str, Path] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ")
        kind, _, options = after.split(" ")[:3]
        point = Path(before.split(" ")[4])
        if kind == "cgroup2":
            found.setdefault("", point)
        elif kind == "cgroup" and "name=systemd" in options.split(","):
            found.setdefault("name=systemd", point)
    return found


def _own() -> dict[str, str]:
    """The group this process is in, per hierarchy."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return {names: path for _, names, path in (line.split(":", 2) for line in lines)}


def parents(lab: str) -> list[Path]:
    """The lab's group in each hierarchy, version 2 first.

    Below the caller's own group, so that whatever limits the caller was given hold for the nodes too.
    """
    own, mounted = _own(), _mounted()
    if "" not in mounted:
        raise LabError("the lab needs cgroup v2: mount -t cgroup2 none /sys/fs/cgroup/unified")
    return [mounted[name] / own.get(name, "/").lstrip("/") / f"lab-{lab}" for name in sorted(mounted)]


class Group:
    """One node's group in every hierarchy; the first is that of version 2, which can freeze and kill."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.unified = paths[0]

    def create(self) -> None:
        """Make the group where it is missing; LabError where this machine does not let us."""
        try:
            for path in self.paths:
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LabError(f"cannot make the control group {error.filename}: {error.strerror}") from error

    def enter(self, child: str = "") -> list[str]:
        """The start of a command line that runs the rest of it inside the group (or a child of it)."""
        for path in self.paths:
            (path / child).mkdir(exist_ok=True)
        return ["sh", "-c", ENTER, "sh", *(str(path / child) for path in self.paths), "--"]

    def pids(self) -> list[int]:
        """The machine's PIDs of all processes in the group and below."""
        found: list[int] = []
        for path, _, _ in os.walk(self.unified):  # unlike glob, it bears groups that vanish meanwhile
            try:
                found += [int(pid) for pid in (Path(path) / "cgroup.procs").read_text().split()]
            except OSError:
                continue
        return found

    def init(self) -> int | None:
        """The machine's PID of the node's PID 1; None until it has become systemd.

        Before that it still sees the machine's files, and a command sent after it would run on those.
        """
        for pid in self.pids():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            fields = dict(line.split(":", 1) for line in status.splitlines())
            inside = fields["NSpid"].split()
            if len(inside) > 1 and inside[-1] == "1" and fields["Name"].strip() in {"systemd", "init"}:
                return pid
        return None

    def _event(self, name: str) -> bool:
        try:
            words = (self.unified / "cgroup.events").read_text().split()
        except FileNotFoundError:
            return False
        return dict(zip(words[::2], words[1::2], strict=True)).get(name) == "1"

    @property
    def populated(self) -> bool:
        """Whether any process lives in the group or below."""
        return self._event("populated")

    @property
    def frozen(self) -> bool:
        """Whether all processes of the group and below have come to a halt."""
        return self._event("frozen")

    def freeze(self, *, wanted: bool) -> None:
        """Freeze or thaw, and return when it has happened."""
        (self.unified / "cgroup.freeze").write_text("1" if wanted else "0")
        self._wait("frozen", wanted=wanted)

    def kill(self) -> None:
        """Kill every process of the group, frozen or not, and return when none is left."""
        try:
            (self.unified / "cgroup.kill").write_text("1")
        except FileNotFoundError:
            if self.unified.exists():
                raise LabError("the lab needs a kernel with cgroup.kill (5.14 or later)") from None
            return
        self._wait("populated", wanted=False)
        (self.unified / "cgroup.freeze").write_text("0")  # or the next start would begin frozen

    def wait_empty(self, deadline: float) -> bool:
        """Wait for the last process to end by itself; false when some still live after `deadline` seconds."""
        try:
            self._wait("populated", wanted=False, deadline=deadline)
        except LabError:
            return False
        return True

    def _wait(self, name: str, *, wanted: bool, deadline: float = 10.0) -> None:
        until = time.monotonic() + deadline
        while self._event(name) != wanted:
            if time.monotonic() > until:
                raise LabError(f"{self.unified} is not {name}={wanted} after {deadline:g} s")
            time.sleep(0.01)

    def remove(self) -> None:
        """Remove the emptied group; a group with processes stays and raises."""
        for path in self.paths:
            remove_group(path)


def remove_group(path: Path) -> None:
    if not path.exists():
        return
    for child in path.iterdir():
        if child.is_dir():
            remove_group(child)
    # The kernel reports a group empty a moment before it lets it go.
    until = time.monotonic() + 5
    while True:
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if time.monotonic() > until:
                raise LabError(f"cannot remove {path}: {error.strerror}") from error
            time.sleep(0.02)
        else:
            return
