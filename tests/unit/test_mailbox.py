"""Answers that workers leave: whole, in any order, or not at all."""

from __future__ import annotations

import json
import selectors
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reconciler import mailbox
from reconciler.mailbox import Mailbox


def taken(box: Mailbox, count: int) -> list[dict[str, object]]:
    """So many letters, waiting as a run does."""
    found: list[dict[str, object]] = []
    with selectors.DefaultSelector() as selector:
        selector.register(box, selectors.EVENT_READ)
        while len(found) < count:
            assert selector.select(10), f"only {len(found)} of {count} came"
            found += box.arrived()
    return found


def test_many_workers_deliver_at_once(tmp_path: Path) -> None:
    """Long letters, too, which come in pieces."""
    box = Mailbox(tmp_path)
    texts = {f"node-{number}": "x" * (number * 20_000) for number in range(40)}
    with ThreadPoolExecutor(20) as pool:
        delivered = pool.map(lambda name: mailbox.deliver(tmp_path, name, {"text": texts[name]}), texts)
        found = taken(box, len(texts))
        assert all(delivered)
    assert {letter["node"]: letter["data"] for letter in found} == {
        name: {"text": text} for name, text in texts.items()
    }
    assert {letter["status"] for letter in found} == {"ok"}
    assert box.arrived() == []
    box.close()


def test_letter_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    """Its writer was killed: the node stays silent, and the others are heard."""
    box = Mailbox(tmp_path)
    with socket.socket(socket.AF_UNIX) as killed:
        killed.connect(str(tmp_path / mailbox.NAME))
        killed.sendall(json.dumps({"node": "a"}).encode()[:5])
    with ThreadPoolExecutor() as pool:
        pool.submit(mailbox.deliver, tmp_path, "b", {})
        assert [letter["node"] for letter in taken(box, 1)] == ["b"]
    box.close()


def test_where_nobody_listens_the_worker_is_told(tmp_path: Path) -> None:
    """Its result carries the answer then."""
    assert not mailbox.deliver(tmp_path, "a", {})
    box = Mailbox(tmp_path)
    box.close()
    assert not mailbox.deliver(tmp_path, "a", {})


def test_path_too_long_for_a_socket_is_no_error(tmp_path: Path) -> None:
    """Temporary directories of some systems are: nothing arrives then."""
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    box = Mailbox(deep)
    assert not mailbox.deliver(deep, "a", {})
    assert box.arrived() == []
    box.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_nothing_stays_open(tmp_path: Path) -> None:
    """A daemon makes one for every run."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(5):
        place = tmp_path / str(number)
        place.mkdir()
        box = Mailbox(place)
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(place / mailbox.NAME))
            box.arrived()
            box.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
