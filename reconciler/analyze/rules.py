"""The built-in rules: what can be said of an issue without asking anybody. Pure, at once, always an answer.

They know changes and reasons, never kinds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from reconciler.analyze.answer import PARAGRAPH, SENTENCE, clean
from reconciler.analyze.prompt import RECURRING
from reconciler.analyze.redact import without_secrets
from reconciler.model import Analysis, Change, Question

_SAME_TIME_MINUTES = 45.0
_SOON_SECONDS = 1_800.0
_DAY_MINUTES = 1_440.0


@dataclass(frozen=True)
class _Cause:
    """What a word in a reason tells."""

    name: str
    words: re.Pattern[str]
    severity: int
    sentence: str
    plan: str


def _cause(name: str, words: str, severity: int, sentence: str, plan: str) -> _Cause:
    return _Cause(name, re.compile(words, re.IGNORECASE), severity, sentence, plan)


# The first that matches counts: what would explain the others stands first.
_CAUSES = (
    _cause(
        "no space", r"no space left|disk (?:is )?full|disk quota|\bENOSPC\b|out of inodes", 4,
        "The disk is full, so nothing can be written.",
        "Free space on the machine; the repair is tried again by itself.",
    ),
    _cause(
        "read-only", r"read-only file ?system|\bEROFS\b|input/output error", 5,
        "The file system does not take writes: it is mounted read-only or its disk fails.",
        "Look at the machine's kernel log before anything else is written there.",
    ),
    _cause(
        "memory", r"out of memory|cannot allocate memory|\bOOM\b|oom-kill", 4,
        "The machine ran out of memory.",
        "Find what uses it, give the machine more, or limit the process.",
    ),
    _cause(
        "locked", r"database is locked|\block(?:ed)?\b|could not get lock|resource busy|text file busy", 3,
        "Another process holds a lock on what has to change.",
        "Find the process that holds the lock; a stale lock goes with it.",
    ),
    _cause(
        "privilege", r"needs? privilege|allow_become|must be root|are you root|sudo", 3,
        "The change needs a privilege that the declaration does not grant.",
        "Set allow_become for this resource, or change it to something that this account may do.",
    ),
    _cause(
        "permission", r"permission|not permitted|access denied|\bEACCES\b|\bEPERM\b|forbidden", 3,
        "The account on the machine is not permitted to do what has to be done.",
        "Compare owner and permissions of what is named in the reason with the account that is used.",
    ),
    _cause(
        "checksum", r"check ?sum|digest|sha-?256|hash mismatch|signature", 4,
        "What was fetched or found is not what its checksum says.",
        "Find out who changed it before the checksum in the declaration is touched.",
    ),
    _cause(
        "unreachable",
        r"unreachable|connection (?:refused|reset|closed)|no route|name or service not known|could not resolve|"
        r"broken pipe",
        3, "The machine or a server that it needs could not be reached.",
        "See whether the machine is up and whether it reaches the network.",
    ),
    _cause(
        "timed out", r"timed? ?out|did not end within|deadline|did not answer", 3,
        "It took longer than it may take: something hangs or is overloaded.",
        "Look at the load of the machine and at what the step waits for.",
    ),
    _cause(
        "not found", r"not found|no such file|\bENOENT\b|does not exist|\babsent\b|\bmissing\b|\b404\b", 3,
        "Something that is needed is not there.",
        "Provide what the reason names, or correct the name in the declaration.",
    ),
    _cause(
        "syntax", r"syntax error|invalid|validat|parse error|unexpected token", 3,
        "What is declared is not accepted by the program that checks it.",
        "Correct the declaration; the old state was kept.",
    ),
    _cause(
        "crashed", r"\bdied\b|crash|segmentation|exit(?:ed)? (?:code|status)|ended with|\bfailed\b|core dump", 3,
        "A program that is needed ends with an error.",
        "Read what it printed; the reason has the last lines.",
    ),
)  # fmt: skip


def judge(question: Question) -> Analysis:
    """Severity, cause, plan and from the third recurrence on prevention, from the facts alone."""
    cause = _find(question)
    prevention = _prevention(question) if question.recurrence >= RECURRING else ""
    return Analysis(
        severity=_severity(question, cause),
        root_cause=clean(_root_cause(question, cause), SENTENCE),
        plan=clean(_plan(question, cause), PARAGRAPH, lines=True),
        prevention=clean(prevention, PARAGRAPH, lines=True),
        backend="rules",
    )


def cause_of(question: Question) -> str:
    """The constant name of what the reason tells, or nothing: issues with different ones differ in their cause."""
    found = _find(question)
    return found.name if found else ""


def _find(question: Question) -> _Cause | None:
    notes = [change.note for change in question.changes if change.note]
    for text in (question.reason, *notes):
        for cause in _CAUSES:
            if cause.words.search(text[:PARAGRAPH]):
                return cause
    return None


def _severity(question: Question, cause: _Cause | None) -> int:
    found = cause.severity if cause else 2
    if any(not change.fixable for change in question.changes) or question.needs_plan:
        found = max(found, 3)  # nobody but a person can end it
    if any(change.observed in (None, "absent", "failed") for change in question.changes):
        found = max(found, 3)
    if question.recurrence >= RECURRING:
        found += 1
    return min(found, 5)


def _root_cause(question: Question, cause: _Cause | None) -> str:
    if cause is not None:
        said = clean(without_secrets(question.reason), 200)
        return cause.sentence[:-1] + (f" ({said})." if said else ".")
    fields = _fields(question.changes)
    if any(not change.fixable for change in question.changes):
        return f"The machine differs in {fields} in a way that no rule may change."
    if _is_corrective(question):
        return f"Something other than the reconciler changed {fields} after it was as declared."
    return f"The machine is not as declared in {fields}."


def _plan(question: Question, cause: _Cause | None) -> str:
    if cause is not None:
        return cause.plan
    if question.needs_plan:
        return "Declare how to fix it; the rules know no way that is safe for every machine."
    notes = dict.fromkeys(c.note for c in question.changes if not c.fixable and c.note)
    if notes:
        return clean(without_secrets("Only a person can: " + "; ".join(notes)), PARAGRAPH) + "."
    return "The repair that is shipped takes care of it."


def _fields(changes: Sequence[Change]) -> str:
    names = list(dict.fromkeys(clean(change.field, 60) for change in changes))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""  # noqa: PLR2004 - a sentence, not a list
    return (", ".join(names[:3]) or "its state") + more


def _is_corrective(question: Question) -> bool:
    return any(event.get("status") == "fixed" for event in question.history)


# --- recurrence -------------------------------------------------------------------------------------


def _prevention(question: Question) -> str:
    found = [f"It came back {question.recurrence - 1} times; {_fields(question.changes)} differed."]
    detected, fixed = _times(question, "detected"), _times(question, "fixed")
    hour = _same_time_of_day(detected)
    if hour:
        found.append(
            f"It happens at about {hour} UTC: look for a timer or a cron job of that time that writes it."
        )
    if _right_after_a_fix(detected, fixed):
        found.append(
            "It comes back within minutes after each fix: a running program or another tool owns this state; "
            "stop that one, or let the declaration say what it writes."
        )
    reason = _common_reason(question.history)
    if reason:
        found.append(f"Each time it was told: {reason}.")
    if len(found) == 1:
        found.append(
            "No pattern in time: look at what else was deployed or logged in on the machine before each time, "
            "or ignore the field if its value does not matter."
        )
    return " ".join(found)


def _times(question: Question, status: str) -> list[datetime]:
    found = []
    for event in question.history:
        if event.get("status") == status:
            moment = _moment(event.get("timestamp"))
            if moment is not None:
                found.append(moment)
    return sorted(found)


def _moment(value: Any) -> datetime | None:
    """A time without its zone: everything recorded is UTC."""
    try:
        found = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return found.replace(tzinfo=None)


def _same_time_of_day(moments: Sequence[datetime]) -> str:
    """HH:MM where three or more episodes of different days began within three quarters of an hour."""
    if not moments:
        return ""
    first = moments[0]
    # Days from the first one on, so that midnight does not make one day of two.
    if len({round((moment - first).total_seconds() / 86_400) for moment in moments}) < RECURRING:
        return ""
    minutes = [moment.hour * 60 + moment.minute for moment in moments]
    # Round midnight: distances on the circle of the day, from the first.
    apart = [(m - minutes[0] + _DAY_MINUTES / 2) % _DAY_MINUTES - _DAY_MINUTES / 2 for m in minutes]
    return f"{first:%H:%M}" if max(apart) - min(apart) <= _SAME_TIME_MINUTES else ""


def _right_after_a_fix(detected: Sequence[datetime], fixed: Sequence[datetime]) -> bool:
    gaps = []
    for moment in fixed:
        later = [d for d in detected if d > moment]
        if later:
            gaps.append((min(later) - moment).total_seconds())
    return len(gaps) >= RECURRING - 1 and max(gaps) <= _SOON_SECONDS


def _common_reason(history: Sequence[Mapping[str, Any]]) -> str:
    """The reason that most of the events that have one give."""
    reasons = [str(event["reason"]) for event in history if event.get("reason")]
    if len(reasons) < RECURRING - 1:
        return ""
    reason, count = Counter(reasons).most_common(1)[0]
    return clean(without_secrets(reason), 200).rstrip(".") if count * 2 > len(reasons) else ""
