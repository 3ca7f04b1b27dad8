"""What a program costs: wall time, processor time of its whole tree, memory; and what it costs the nodes."""

import contextlib
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab import Node
from tests.lab.cgroups import Group, parents

SAMPLES_PER_SECOND = 8


@dataclass(frozen=True)
class Cost:
    """One run. Seconds, and megabytes of memory that nobody else shares or a fair part of what is shared."""

    wall: float
    cpu: float
    node_cpu: float = 0.0
    memory: float = 0.0
    masters: float = 0.0


class Meter:
    """Runs programs in a control group of their own, so that nothing they start is missed."""

    def __init__(self, nodes: Iterable[Node], log: Path) -> None:
        self.nodes, self.log = list(nodes), log
        self.group = Group(parents(f"bench-{os.getpid()}")[:1])
        self.group.create()

    def close(self) -> None:
        """End what still runs in the group, SSH masters among it, and remove the group."""
        self.group.kill()
        self.group.remove()

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        codes: tuple[int, ...] = (0,),
        deadline: float = 1800.0,
        memory: bool = False,
    ) -> Cost:
        """Run it to its end. ``memory`` watches memory, which itself costs time: measure that in a run of its own."""
        before, nodes = _usage(self.group), sum(_usage(node.group) for node in self.nodes)
        watcher = _Watcher(self.group) if memory else None
        begin = time.monotonic()
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                [*self.group.enter(), *argv], stdout=log, stderr=log, env=env, cwd=cwd, start_new_session=True
            )
            try:
                code = child.wait(timeout=deadline)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                raise
        wall = time.monotonic() - begin
        peak, masters = watcher.stop() if watcher else (0.0, 0.0)
        if code not in codes:
            raise SystemExit(f"{argv[0]} ended with {code}: see {self.log}\n{self.log.read_text()[-2000:]}")
        spent = sum(_usage(node.group) for node in self.nodes) - nodes
        return Cost(wall, _usage(self.group) - before, spent, peak, masters)


def _usage(group: Group) -> float:
    """Processor seconds of a group since it was made, of ended processes too."""
    words = (group.unified / "cpu.stat").read_text().split()
    return int(words[words.index("usage_usec") + 1]) / 1e6


class _Watcher:
    """Samples the memory of all processes of a group: what is shared by n of them counts 1/n for each."""

    def __init__(self, group: Group) -> None:
        self.group, self.peak, self.masters = group, 0.0, 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> tuple[float, float]:
        """The peaks, in megabytes: of the program, and of the SSH masters that outlive it."""
        self._done.set()
        self._thread.join()
        return self.peak, self.masters

    def _watch(self) -> None:
        while not self._done.wait(1 / SAMPLES_PER_SECOND):
            own = masters = 0.0
            for pid in self.group.pids():
                size, master = _memory(pid)
                own, masters = (own, masters + size) if master else (own + size, masters)
            self.peak, self.masters = max(self.peak, own), max(self.masters, masters)


def _memory(pid: int) -> tuple[float, bool]:
    """Megabytes of one process, and whether it is an SSH master; a process that just ended has none."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        master = Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ssh: ")
    except OSError:
        return 0.0, False
    sizes = [int(line.split()[1]) for line in lines if line.startswith("Pss:")]
    return sum(sizes) / 1024, master


def allow_many_files() -> None:
    """Hundreds of pipes at a time."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
