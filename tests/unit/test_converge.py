"""How the converger judges what it saw; roles and nodes stand in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from reconciler import runner
from reconciler.converge import Converger, _Ran
from reconciler.desired.load import Desired
from reconciler.model import Action, Change, Limits, Resource, Status
from reconciler.record import Context, Recorder
from reconciler.store import Store
from tests.unit.support import rid, wrapper
from tests.unit.test_loop import FakeObserver

KEY = "node-1/wrapper/w"


class Undoing(Converger):
    """Its role leaves what is there as it is; its undo puts ``old`` back."""

    def _run(self, tasks: str, wanted: Sequence[tuple[Resource, str]]) -> _Ran:
        if tasks == "rollback":
            cast("FakeObserver", self.observer).contents[rid(KEY)] = "old"
        return _Ran({resource.id: resource for resource, _ in wanted})


def journal(store: Store) -> Recorder:
    """A real one, without a lease."""
    return Recorder(store, Desired({}, (), Limits()), Context("run-1", ""))


@pytest.mark.parametrize("resumed", [True, False])
def test_undo_of_a_resumed_attempt_is_judged_by_what_was_before_it(store: Store, *, resumed: bool) -> None:
    """A pass that died had half changed it: that is what is found now, and not what the undo has to bring back."""
    resource = wrapper()
    observer = FakeObserver({resource.id: "bad"})
    made = Undoing(
        runner.Settings(Path()),
        cast("Any", observer),
        Desired({}, (), Limits()),
        journal(store),
        lambda *_: None,
    )
    before = (Change("content", "new", "old"),) if resumed else ()
    action = Action(resource.id, (), resumed=resumed, before=before)
    found = {resource.id: resource}
    (outcome,), _after = made.repair([action], found, observer.observe([resource]))
    assert outcome.status is (Status.ROLLED_BACK if resumed else Status.FAILED), outcome.detail
    assert outcome.severity == (3 if resumed else 5)
