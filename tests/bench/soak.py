"""Passes in a row in one process, with real Ansible over the demo's fleet: memory, open files and directories stay flat.

Every tenth pass finds drift and repairs it. Exit status 1 where something grows.
"""

import argparse
import gc
import os
import resource
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from reconciler import assemble, demo, settings
from reconciler.model import ExitCode

WARM_UP = 0.2  # of the passes: caches fill, the database reaches its working size
MB = 1 << 20


@dataclass(frozen=True)
class Sample:
    """What the process holds after a pass."""

    memory: float
    files: int
    temporary: int
    around: int

    @classmethod
    def take(cls, fleet: Path) -> "Sample":
        """Resident memory in MB, open files, our temporary directories, and files beside the database."""
        gc.collect()
        fds = Path("/proc/self/fd" if Path("/proc/self/fd").exists() else "/dev/fd")
        temporary = sum(1 for entry in Path(tempfile.gettempdir()).glob("reconciler-*"))
        around = sum(1 for entry in fleet.iterdir())
        return cls(resident(), len(list(fds.iterdir())), temporary, around)


def resident() -> float:
    """Resident memory in MB; where the system only tells its peak, that."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / MB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MB if sys.platform == "darwin" else peak / 1024


def soak(fleet: Path, passes: int) -> list[Sample]:
    """Make a drifted fleet and look after it; a sample after each pass."""
    demo._make(fleet)
    demo._drift(fleet)
    # So much drift in so short a time would be somebody's doing.
    (fleet / "desired_state" / "limits.yml").write_text("limits: {max_corrections: 1000}\n")
    os.chdir(fleet)
    found = settings.load()
    samples = []
    for number in range(passes):
        if number and number % 10 == 0:
            (fleet / "nodes/node-1/task-wrapper.sh").write_text(f"# drift {number}\n")
        report = assemble.one_pass(found, assemble.Scope(), lambda *_: None, lambda *_: None)
        assemble.tell(found)
        if report.exit_code is not ExitCode.AS_DESIRED:
            sys.exit(
                f"pass {number} ended with {int(report.exit_code)}: {report.outcomes} {report.plan.skips}"
            )
        samples.append(Sample.take(fleet))
        if number % max(1, passes // 20) == 0 or number == passes - 1:
            last = samples[-1]
            print(f"pass {number:4}: {last.memory:6.1f} MB, {last.files} open files", flush=True)
    return samples


def growth(samples: list[Sample]) -> list[str]:
    """What grew after the warm-up; memory by the medians of the first and the last third, in MB."""
    steady = samples[int(len(samples) * WARM_UP) :]
    third = max(1, len(steady) // 3)
    first, last = (
        sorted(sample.memory for sample in part)[third // 2] for part in (steady[:third], steady[-third:])
    )
    found = []
    # The allocator breathes: a leak of one page a pass would show as 2 MB in 500.
    if last - first > 1.5:
        found.append(f"memory: {first:.1f} to {last:.1f} MB")
    for name in ("files", "temporary", "around"):
        before, after = getattr(steady[0], name), getattr(steady[-1], name)
        if after > before:
            found.append(f"{name}: {before} to {after}")
    print(f"memory {first:.1f} → {last:.1f} MB over {len(steady)} passes, {steady[-1].files} open files")
    return found


def main() -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench soak", description=__doc__)
    parser.add_argument("--passes", type=int, default=500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        tempfile.tempdir = str(Path(directory, "tmp"))  # others may be at work beside us
        Path(tempfile.tempdir).mkdir()
        found = growth(soak(Path(directory, "fleet").resolve(), options.passes))
        os.chdir("/")
    for line in found:
        print(f"GROWS: {line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
