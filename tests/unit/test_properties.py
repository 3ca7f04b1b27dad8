"""Rules that hold for any fleet: what a diff says, what a plan does, which versions will do."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from reconciler.diff import diff
from reconciler.kinds.tool import probe
from reconciler.model import (
    SECRET,
    Drift,
    Limits,
    Mode,
    Observation,
    Policy,
    Resource,
    ResourceId,
    Suspension,
)
from reconciler.node import lib as node_lib
from reconciler.plan import Situation, plan
from reconciler.rollout import next_wave
from tests.unit.support import FILE, drift, known, wrapper

NOW = datetime(2026, 1, 1, tzinfo=UTC)

# --- diff -------------------------------------------------------------------------------------------

contents = st.text(max_size=20)
fields = st.fixed_dictionaries(
    {
        "type": st.just("file"),
        "content": contents.map(lambda text: hashlib.sha256(text.encode()).hexdigest()),
    },
    optional={"mode": st.sampled_from(["0644", "0755"]), "owner": st.sampled_from(["a", "b"])},
)
facts = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["file", "file", "file", "symlink", "directory", "absent"]),
        "content": contents,
        "mode": st.sampled_from(["0644", "0755"]),
        "owner": st.sampled_from(["a", "b"]),
        "group": st.just("a"),
        "target": st.just("/x"),
        "text": contents,
    }
)


def one(resource: Resource, seen: Any) -> Drift | None:
    """The drift of one resource."""
    return diff({resource.id: resource}, {resource.id: Observation(resource.id, seen)}).get(resource.id)


@given(fields)
def test_facts_that_are_as_declared_give_no_drift(declared: dict[str, Any]) -> None:
    """Whatever else the node says."""
    assert one(wrapper(fields=declared), {**FILE, "group": "other", "text": "?", **declared}) is None


@given(fields, facts)
def test_only_declared_fields_are_compared(declared: dict[str, Any], seen: dict[str, Any]) -> None:
    """No change names another field, and each differs."""
    found = one(wrapper(fields=declared), seen)
    for change in found.changes if found else ():
        assert change.field in declared
        assert change.desired != change.observed


@given(fields, facts)
def test_drift_is_found_exactly_where_something_differs(
    declared: dict[str, Any], seen: dict[str, Any]
) -> None:
    """Nothing is missed and nothing invented."""
    differs = any(seen.get(key) != value for key, value in declared.items())
    assert (one(wrapper(fields=declared), seen) is not None) == differs


@given(fields, facts, contents)
def test_secrets_are_redacted(declared: dict[str, Any], seen: dict[str, Any], body: str) -> None:
    """Neither side's value, digest or text is in the drift of a resource that refers to a secret."""
    resource = wrapper(fields=declared, secret=True)
    resource = replace(resource, args={**resource.args, "body": base64.b64encode(body.encode()).decode()})
    found = one(resource, seen)
    for change in found.changes if found else ():
        assert (change.desired, change.observed, change.diff) == (SECRET, SECRET, "")


@given(fields, facts)
def test_unknown_and_ignored_have_no_drift(declared: dict[str, Any], seen: dict[str, Any]) -> None:
    """There is nothing to compare with, or nobody wants to know."""
    resource = wrapper(fields=declared)
    assert diff({resource.id: resource}, {resource.id: Observation(resource.id, None, "silent")}) == {}
    assert diff({resource.id: resource}, {}) == {}
    assert one(wrapper(fields=declared, policy=Policy(mode=Mode.IGNORE)), seen) is None


# --- plan -------------------------------------------------------------------------------------------

policies = st.builds(
    Policy,
    mode=st.sampled_from([Mode.ENFORCE, Mode.ENFORCE, Mode.ENFORCE, Mode.WARN]),
    suspend=st.sampled_from([None, None, None, Suspension("x"), Suspension("x", until=NOW - timedelta(1))]),
)


@st.composite
def fleets(draw: st.DrawFn) -> dict[ResourceId, tuple[Resource, str]]:
    """Resources with dependencies that make no cycle; each drifted, in sync or unknown."""
    count = draw(st.integers(1, 8))
    made: list[Resource] = []
    for number in range(count):
        node = draw(st.sampled_from(["a", "b"]))
        earlier = [resource.id for resource in made]
        depends = draw(st.lists(st.sampled_from(earlier), max_size=2, unique=True)) if earlier else []
        made.append(wrapper(f"{node}/wrapper/w{number}", policy=draw(policies), depends_on=tuple(depends)))
    states = st.sampled_from(["drift", "drift", "sync", "unknown"])
    return {resource.id: (resource, draw(states)) for resource in draw(st.permutations(made))}


def planned(
    fleet: dict[ResourceId, tuple[Resource, str]], attempted: frozenset[ResourceId] = frozenset()
) -> Any:
    """The plan and the drifts."""
    resources = {rid: resource for rid, (resource, _state) in fleet.items()}
    observations = {
        rid: Observation(rid, None, "?") if state == "unknown" else known(resource)
        for rid, (resource, state) in fleet.items()
    }
    drifts = {rid: drift(resource) for rid, (resource, state) in fleet.items() if state == "drift"}
    return plan(resources, observations, drifts, Situation(NOW, NOW, tried=attempted)), drifts


@given(fleets())
def test_every_drift_is_either_acted_on_or_skipped_with_a_reason(
    fleet: dict[ResourceId, tuple[Resource, str]],
) -> None:
    """Exactly one of the two, and nothing else is in the plan."""
    found, drifts = planned(fleet)
    acted, skipped = [action.id for action in found.actions], [skip.id for skip in found.skips]
    assert sorted([*acted, *skipped]) == sorted(drifts)
    assert all(skip.reason for skip in found.skips)


@given(fleets())
def test_plan_never_acts_on_what_is_unknown_suspended_or_only_watched(
    fleet: dict[ResourceId, tuple[Resource, str]],
) -> None:
    """A suspension that is over does not count."""
    for action in planned(fleet)[0].actions:
        resource, state = fleet[action.id]
        assert state == "drift"
        assert resource.policy.mode is Mode.ENFORCE
        assert resource.policy.suspend is None or resource.policy.suspend.until is not None
        assert action.changes


@given(fleets())
def test_nothing_is_ready_before_its_dependencies(fleet: dict[ResourceId, tuple[Resource, str]]) -> None:
    """Carried out round by round, no action runs while a dependency is not as desired."""
    found, drifts = planned(fleet)
    wrong, done, expected = set(drifts), set(), {action.id for action in found.actions}
    rounds = 0
    while pending := next_wave(found, [], {}, Limits()):
        for action in pending:
            assert not wrong & set(fleet[action.id][0].depends_on)
        done |= {action.id for action in pending}
        wrong -= done
        fleet |= {rid: (fleet[rid][0], "sync") for rid in done}
        found = planned(fleet, frozenset(done))[0]
        rounds += 1
    assert done == expected
    assert rounds <= len(fleet)


@given(fleets(), st.randoms())
def test_plan_is_deterministic(fleet: dict[ResourceId, tuple[Resource, str]], random: Any) -> None:
    """The same input gives the same plan, and the order of the input decides nothing but the order."""
    first = planned(fleet)[0]
    assert planned(fleet)[0] == first
    items = list(fleet.items())
    random.shuffle(items)
    other = planned(dict(items))[0]
    assert {action.id: action for action in other.actions} == {action.id: action for action in first.actions}
    assert {skip.id for skip in other.skips} == {skip.id for skip in first.skips}


@given(fleets(), st.data())
def test_what_had_its_attempt_gets_no_second_one(
    fleet: dict[ResourceId, tuple[Resource, str]], data: st.DataObject
) -> None:
    """And its dependants wait."""
    attempted = frozenset(data.draw(st.sets(st.sampled_from(sorted(fleet)))))
    found, _drifts = planned(fleet, attempted)
    acted = {action.id for action in found.actions}
    assert not acted & attempted
    skipped = {skip.id for skip in found.skips}
    assert all(not skipped & set(fleet[rid][0].depends_on) for rid in acted)


# --- versions ---------------------------------------------------------------------------------------

numbers = st.lists(st.integers(0, 12), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))
versions = st.builds(
    lambda base, suffix: base + suffix,
    numbers,
    st.sampled_from(["", "", "", "a1", "b2", "rc1", "rc2", ".dev3"]),
)
operators = st.sampled_from([">=", "<=", ">", "<", "==", "!=", "~="])


@st.composite
def ranges(draw: st.DrawFn) -> str:
    """One to three bounds, some with a wildcard."""
    bounds = []
    for _ in range(draw(st.integers(1, 3))):
        operator = draw(operators)
        version = draw(versions)
        assume(operator != "~=" or "." in version.split(".dev")[0])
        if operator in ("==", "!=") and draw(st.booleans()):
            version = draw(numbers) + ".*"
        bounds.append(operator + version)
    return ",".join(bounds)


@given(versions, ranges())
def test_ranges_mean_what_they_mean_to_packaging(version: str, wanted: str) -> None:
    """On the controller and on nodes, which have no packaging library."""
    assume(not (">" in wanted.replace(">=", "") and Version(version).is_postrelease))
    assert probe.satisfies(version, wanted) == SpecifierSet(wanted).contains(version, prereleases=True)


@given(versions, versions)
def test_versions_sort_as_in_packaging(first: str, second: str) -> None:
    """Numbers as numbers, a pre-release before its release."""
    ours, theirs = (
        (probe.parse_version(first), probe.parse_version(second)),
        (Version(first), Version(second)),
    )
    assert (ours[0] < ours[1], ours[0] == ours[1]) == (theirs[0] < theirs[1], theirs[0] == theirs[1])


@given(st.text(max_size=12))
def test_any_text_is_a_range_or_is_refused(text: str) -> None:
    """With one kind of error."""
    try:
        probe.parse_range(text)
    except ValueError:
        return
    assert isinstance(probe.satisfies("1.0", text), bool)


@given(st.text(max_size=12))
def test_text_that_is_no_version_satisfies_nothing(text: str) -> None:
    """A node may print anything."""
    assert isinstance(probe.satisfies(text, ">=0"), bool)


# --- what nodes do without the standard library's heavier modules ---------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(json_values)
def test_answers_of_nodes_are_json(value: Any) -> None:
    """What a node writes is read back as it was."""
    assert json.loads(node_lib.dumps(value)) == value


@given(st.sampled_from([float("nan"), float("inf"), {1: 2}, b"x", {1, 2}, object()]))
def test_what_has_no_place_in_an_answer_is_refused(value: Any) -> None:
    """Also inside something else."""
    with pytest.raises((TypeError, ValueError)):
        node_lib.dumps([value])


words = st.one_of(
    st.from_regex(r"v?[0-9]{1,3}(\.[0-9]{1,3}){0,4}(-?(rc|a|beta|dev)[0-9]*)?[,;)]?", fullmatch=True),
    st.sampled_from(
        [
            "mm",
            "version",
            "v",
            ".",
            "1.",
            ".1",
            "a1.2",
            "1.2.x",
            "v2",
            "(2.1)",
            "=1.0",
            "\u0661.\u0662",
            "x-1.2",
        ]
    ),
    st.text(max_size=5),
)


@given(st.lists(words, max_size=6).map(" ".join))
def test_simple_versions_are_found_where_the_expression_finds_them(text: str) -> None:
    """The short way and the long one agree on any text."""
    match = re.search(probe._VERSION, text)
    assert probe.find_version(text) == (match.group(1) if match else None)
