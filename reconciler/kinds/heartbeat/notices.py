"""What people hear of an agent, whom it is for, and what is measured of it; pure functions of observed facts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from reconciler.model import CommonCause, Notice, ResourceId, Sample

NEEDED = ("label", "late_after", "suspected_after", "recover_after")
"""Of the agent's configuration, what the probe needs."""
LONGEST_GRACE = 1800
"""Seconds that a running turn may be waited for at most."""
LONG_FILE = 5 * 1024
"""Bytes of HEARTBEAT.md and AGENTS.md, which every turn of the agent reads."""
NO_BEAT_ANYWHERE = "NoBeatAnywhere"
SHOWN = 5

_WARNED: Mapping[str, tuple[int, str]] = {
    "Cycle": (3, "take one of the dependencies away: which one is for those who planned it to say"),
    "DependencyCancelled": (3, "say what becomes of what waits for it: it is neither started nor dropped by itself"),
    "DependencyUnknown": (2, "is its name right, and is its source one of this agent's?"),
    "DependencyWait": (3, "see to what it waits for, or let it wait no longer"),
    "TaskTooLong": (3, "split it, or give its agent more time: task_limit"),
    "SourceDown": (3, "run its command on the node as the agent's account; the others are used meanwhile"),
    "TurnFailed": (3, "the turn's output is in ~/.local/state/heartbeat/AGENT.turn.log"),
    "TurnMissing": (3, "install the command of the turn, or declare the directory where it is: path"),
    "Configuration": (4, "the declaration passes and the program refuses it: look at what it says"),
}  # fmt: skip
_ROUNDS: Mapping[str, tuple[int, str]] = {
    "RoundsWarn": (2, "it is paused at the limit; is it getting anywhere?"),
    "RoundsLimit": (3, "it is paused: finish it, split it, or raise rounds"),
}
REASONS = (*_WARNED, *_ROUNDS, "TaskReleased", "TaskBlocked", "FileTooLong")


def of(config: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[Notice, ...]:
    """Everything that somebody has to hear of this agent, one notice per reason."""
    tell = tuple(config["tell"])
    found = [*_warned(facts, tell), *_taken_away(facts.get("released") or (), tell), *_too_long(facts, tell)]
    return tuple(found)


def _warned(facts: Mapping[str, Any], tell: tuple[str, ...]) -> Iterator[Notice]:
    """What the program warns of; rounds with what was done and what remains."""
    said: dict[str, list[Mapping[str, Any]]] = {}
    for warning in facts.get("warnings") or ():
        said.setdefault(str(warning.get("code")), []).append(warning)
    for code, (severity, advice) in {**_WARNED, **_ROUNDS}.items():
        if code not in said:
            continue
        details = [str(warning.get("detail", "")) for warning in said[code]]
        if code in _ROUNDS:
            details = [_spent(warning, facts) for warning in said[code]]
            details.append(_remains(facts))
        yield Notice(code, severity, "; ".join(_few(details)), advice, tell)


def _spent(warning: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """What was done on a task that uses up its rounds."""
    known = {task["id"]: task for task in facts.get("in_progress") or ()}
    spent = [
        f", in progress for {_minutes(known[name]['age'])}, last progress {_minutes(known[name]['stalled'])} ago"
        for name in warning.get("tasks") or ()
        if name in known
    ]
    return str(warning.get("detail", "")) + "".join(spent)


def _remains(facts: Mapping[str, Any]) -> str:
    titles, total = facts.get("titles") or [], facts.get("open") or 0
    return f"remaining: {total} open" + (f" ({', '.join(titles[:SHOWN])})" if titles else "")


def _taken_away(released: Iterable[Mapping[str, Any]], tell: tuple[str, ...]) -> Iterator[Notice]:
    """The first time a task stood still for too long nobody is told; then the coo; from the third time on its owner."""
    again = [task for task in released if task["timeouts"] == 2 and not task.get("blocked")]  # noqa: PLR2004 - the table
    last = [task for task in released if task["timeouts"] > 2 or task.get("blocked")]  # noqa: PLR2004 - the table
    if again:
        detail = "stood still for the second time, and was taken away again: " + _named(again)
        yield Notice("TaskReleased", 3, detail, "why does it not get on?", _all("coo", *tell))
    if last:
        detail = f"stood still time and again, and is blocked now: {_named(last)}"
        advice = "it is for its owner: decide what becomes of it, then unblock it"
        yield Notice("TaskBlocked", 4, detail, advice, _all("owner", "coo", *tell))


def _named(tasks: Sequence[Mapping[str, Any]]) -> str:
    names = [f"{task['id']}" + (f" ({task['title']})" if task.get("title") else "") for task in tasks]
    return ", ".join(_few(names))


def _too_long(facts: Mapping[str, Any], tell: tuple[str, ...]) -> Iterator[Notice]:
    found = [f"{name} has {size} bytes" for name, size in sorted(facts["sizes"].items()) if size > LONG_FILE]
    if found:
        advice = f"keep it under {LONG_FILE} bytes: every turn reads it"
        yield Notice("FileTooLong", 2, "; ".join(found), advice, tell)


def _few(texts: Sequence[str]) -> list[str]:
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return [*texts[:SHOWN], *more]


def _all(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min"


def common_cause(seen: Mapping[ResourceId, Mapping[str, Any]]) -> CommonCause | None:
    """That no timer has fired for any agent, where two or more have been installed for long enough to tell."""
    fresh = [
        rid
        for rid, facts in seen.items()
        if facts.get("scheduled_age") is not None and facts["scheduled_age"] <= facts["late_after"]
    ]
    old = [rid for rid, facts in seen.items() if (facts.get("installed") or 0.0) > facts["late_after"]]
    if fresh or len(old) < 2:  # noqa: PLR2004 - one agent is no fleet
        return None
    nodes = len({rid.node for rid in old})
    detail = (
        f"no beat of its own has come from any of {len(old)} agents on {nodes} nodes, and the nodes answer"
    )
    advice = "look at what they have in common: the program, its timers, their manager (systemctl --user list-timers)"
    return CommonCause(Notice(NO_BEAT_ANYWHERE, 4, detail, advice), frozenset({"beat"}))


def samples(_name: str, _node: str, observed: Mapping[str, Any]) -> Iterator[Sample]:
    """What was measured; what was not gives no sample."""
    who = {"agent_name": str(observed["agent"]), "agent_label": str(observed["label"])}
    text = "Whether the agent's last heartbeat is fresh and healthy."
    yield Sample("agent_heartbeat_status", who, float(bool(observed["healthy"])), text)
    if observed.get("age") is not None:
        text = (
            "How long the task that stands still longest has made no progress; 0 where none is in progress."
        )
        yield Sample("agent_task_stagnation_seconds", who, float(observed["stagnation"]), text)
        for source, count in sorted((observed.get("pending") or {}).items()):
            if count is not None:
                text = "Tasks of the agent that are not done, by source."
                yield Sample("agent_workboard_pending", {**who, "type": source}, float(count), text)
    client = (observed.get("provider") or {}).get("client") or {}
    if client.get("rate_429") is not None:
        text = "Share of the agent's recent calls that a provider answered with 429, from the sidecar."
        yield Sample("agent_429_error_rate", who, float(client["rate_429"]), text)
    if client.get("seconds") is not None:
        text = "Mean time of the agent's recent calls, from the sidecar."
        yield Sample("agent_response_time_seconds", who, float(client["seconds"]), text)
