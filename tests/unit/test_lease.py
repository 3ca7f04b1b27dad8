"""One applier: who holds the lease, who may take it, and what the one it was taken from can still do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reconciler import lease
from reconciler.lease import BusyError, Lease
from reconciler.model import LeaseLostError
from reconciler.store import Store
from tests.unit.support import ROOT, step

HOLDER = """
import sys
from pathlib import Path
from reconciler.lease import Lease
with Lease(Path(sys.argv[1]), "run-7", float(sys.argv[2])) as held:
    print(held.epoch, flush=True)
    sys.stdin.readline()
    print("awake", flush=True)
    from reconciler.store import Store
    store = Store(Path(sys.argv[1]))
    with store.transaction(held.epoch):
        print("wrote", flush=True)
"""


@contextmanager
def holder(path: Path, seconds: float = 30) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), str(seconds)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def epoch_of(process: subprocess.Popen[str]) -> int:
    """Wait until it has the lease."""
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_only_one_holds_it_also_across_processes(tmp_path: Path) -> None:
    """The second is told who; when the first is killed, nothing has to be waited for or cleared."""
    path = tmp_path / "r.db"
    with holder(path) as other:
        first = epoch_of(other)
        with pytest.raises(BusyError, match=rf"run-7, process {other.pid}"), Lease(path, "run-8"):
            pytest.fail("two at once")
        other.kill()
        other.wait()
        with Lease(path, "run-9") as mine:
            assert mine.epoch > first
            assert not mine.fence_due
    assert [entry.name for entry in tmp_path.glob("r.db*")] == ["r.db"]


def test_stopped_holder_loses_it_and_can_write_nothing_when_it_wakes(tmp_path: Path) -> None:
    """After the time in which it should have renewed it; nodes have to be told."""
    path = tmp_path / "r.db"
    with holder(path, 0.4) as other:
        first = epoch_of(other)
        os.kill(other.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 20
        while True:
            try:
                with Lease(path, "run-8", 0.4) as mine:
                    assert mine.epoch > first
                    assert mine.fence_due
                    os.kill(other.pid, signal.SIGCONT)
                    out, err = other.communicate("go on\n", timeout=20)
                    assert "wrote" not in out
                    assert "LeaseLostError" in err
                break
            except BusyError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
    # What a stopped holder left due stays due until a look has told the nodes.
    with Lease(path, "run-9") as mine:
        assert mine.fence_due
        mine.fenced()
    with Lease(path, "run-10") as mine:
        assert not mine.fence_due


def test_holder_that_lives_keeps_it_however_long_it_takes(tmp_path: Path) -> None:
    """It renews it beside its work."""
    path = tmp_path / "r.db"
    with holder(path, 0.4) as other:
        epoch_of(other)
        for _ in range(8):
            time.sleep(0.15)
            with pytest.raises(BusyError), Lease(path, "run-8", 0.4):
                pytest.fail("taken from the living")


def test_it_ends_with_the_pass_however_that_ends(tmp_path: Path) -> None:
    """An exception lets go as well."""
    path = tmp_path / "r.db"
    with pytest.raises(ZeroDivisionError), Lease(path, "run-1"):
        raise ZeroDivisionError
    with Lease(path, "run-2"):
        pass


def test_epochs_grow_also_over_a_lost_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And when the clock is set back."""
    path = tmp_path / "r.db"
    with Lease(path, "run-1") as first:
        pass
    path.unlink()
    with Lease(path, "run-2") as second:
        assert second.epoch >= first.epoch
    monkeypatch.setattr(lease.time, "time", lambda: 1000.0)
    with Lease(path, "run-3") as third:
        assert third.epoch == second.epoch + 1


def test_clock_that_jumps_takes_the_lease_from_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Age is measured by a clock that nobody can set."""
    path = tmp_path / "r.db"
    with holder(path) as other:
        epoch_of(other)
        real = time.time()
        for jump in (3600.0, -3600.0):
            monkeypatch.setattr(lease.time, "time", lambda jump=jump: real + jump)
            with pytest.raises(BusyError), Lease(path, "run-8"):
                pytest.fail("taken from the living")


def test_nothing_of_a_transaction_is_written_without_the_lease(tmp_path: Path) -> None:
    """Neither before nor after the point where it was lost."""
    path = tmp_path / "r.db"
    store = Store(path)
    with Lease(path, "run-1") as held:
        with store.transaction(held.epoch):
            store.set_hold("x", {"a": 1})
        store.db.execute("UPDATE lease SET epoch = epoch + 1")
        with pytest.raises(LeaseLostError), store.transaction(held.epoch):
            store.set_hold("x", {"a": 2})
    assert store.hold("x") == {"a": 1}
    store.close()


def test_node_refuses_a_lower_epoch(account: Path) -> None:
    """Having seen a higher one in a step; by hand there is none, and that is let through."""
    resource = {"dest": "~/w.sh", "body": "", "content": "x", "validate": []}
    assert "failed" not in step("backup", "wrapper", resource, epoch=7)
    assert "failed" not in step("backup", "wrapper", resource, epoch=7)
    said = step("backup", "wrapper", resource, epoch=6)
    assert "a newer controller (epoch 7) is in charge" in said["failed"]
    assert "failed" not in step("backup", "wrapper", resource, epoch=8)
    assert "epoch 8" in step("backup", "wrapper", resource, epoch=7)["failed"]
    assert "failed" not in step("backup", "wrapper", resource)
    assert (account / ".local/state/reconciler/epoch").read_text() == "8"
