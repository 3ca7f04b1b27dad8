"""Asks each backend in turn, within a time that never grows, and always has an answer."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from reconciler.analyze import rules
from reconciler.analyze.answer import Unavailable, clean
from reconciler.analyze.command import Command
from reconciler.analyze.prompt import RECURRING, Prompt, prompt
from reconciler.kinds.base import seconds
from reconciler.model import Analysis, Question, ResourceId
from reconciler.settings import AnalysisSettings

log = logging.getLogger(__name__)

AT_ONCE = 2
FAILURES, FIRST_REST, LONGEST_REST = 3, 60.0, 3_600.0


class Backend(Protocol):
    """Somebody to ask. ``ask`` raises Unavailable where there is no usable answer within ``limit`` seconds."""

    @property
    def name(self) -> str:
        """Who it is, in notes and analyses."""

    def ask(self, prompt: Prompt, limit: float) -> Analysis:
        """The judgement."""


@dataclass
class _Health:
    """How a backend has been doing: after three failures in a row it is left alone, longer each time."""

    failures: int = 0
    resting_until: float = 0.0

    def succeeded(self) -> None:
        self.failures, self.resting_until = 0, 0.0

    def failed(self, now: float) -> None:
        self.failures += 1
        if self.failures >= FAILURES:
            rest = FIRST_REST * 2.0 ** min(self.failures - FAILURES, 16)
            self.resting_until = now + min(rest, LONGEST_REST)


@dataclass
class _Group:
    """Questions of one cause, on however many nodes."""

    questions: list[Question]
    notes: list[str] = field(default_factory=list)
    answer: Analysis | None = None

    @property
    def spokesman(self) -> Question:
        """The one that is asked: it has the longest history."""
        return max(self.questions, key=lambda question: question.recurrence)


class Analyzer:
    """Judges issues. Keep one for the life of the process: it remembers which backends are not worth a call.

    ``notes`` says of the last :meth:`analyze` which backends had no answer to a question, and why.
    """

    def __init__(self, settings: AnalysisSettings, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` counts seconds; only how long a backend is left alone is measured with it."""
        self.clock = clock
        self.timeout, self.total = seconds(settings.timeout), seconds(settings.total)
        self.backends: list[Backend] = _backends(settings)
        self.notes: dict[ResourceId, tuple[str, ...]] = {}
        self._health = [_Health() for _ in self.backends]
        self._lock = threading.Lock()

    def analyze(self, questions: Sequence[Question], deadline_seconds: float) -> dict[ResourceId, Analysis]:
        """An answer to every question, after ``deadline_seconds`` (or the setting ``total``) at the latest.

        Never raises: where no backend has an answer, the rules have one.
        """
        self.notes = {}
        groups = _grouped(questions)
        if self.backends and groups:
            self._ask_all(groups, min(deadline_seconds, self.total))
        found: dict[ResourceId, Analysis] = {}
        for group in groups:
            with self._lock:  # a call that comes too late may be writing
                answer, notes = group.answer, tuple(group.notes)
            for question in group.questions:
                found[question.id] = _share(answer, question)
                self.notes[question.id] = notes
        return found

    def _ask_all(self, groups: Sequence[_Group], limit: float) -> None:
        end = time.monotonic() + limit
        waiting = deque(groups)
        # Daemons: a call that nothing can interrupt must neither hold up the pass nor the end of the process.
        threads = [
            threading.Thread(target=self._work, args=(waiting, end), name=f"analysis-{number}", daemon=True)
            for number in range(min(AT_ONCE, len(groups)))
        ]
        try:
            for thread in threads:
                thread.start()
        except RuntimeError as error:  # no more threads
            log.warning("analysis: %s", error)
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - time.monotonic()))
        with self._lock:
            waiting.clear()
            for group in groups:
                if group.answer is None and not group.notes:
                    group.notes.append("there was no time left")

    def _work(self, waiting: deque[_Group], end: float) -> None:
        while True:
            try:
                group = waiting.popleft()
            except IndexError:
                return
            self._ask(group, end)

    def _ask(self, group: _Group, end: float) -> None:
        try:
            question = prompt(group.spokesman, len({q.id.node for q in group.questions}))
        except Exception:
            log.exception("analysis: %s cannot be asked about", group.questions[0].id)
            self._note(group, "the question cannot be put into words")
            return
        for backend, health in zip(self.backends, self._health, strict=True):
            left = min(self.timeout, end - time.monotonic())
            if left <= 0:
                self._note(group, f"{backend.name}: there was no time left")
            elif self._is_resting(health):
                self._note(
                    group, f"{backend.name}: it is left alone after {health.failures} failures in a row"
                )
            else:
                answer = self._call(backend, health, question, left, group)
                if answer is not None:
                    with self._lock:
                        group.answer = answer
                    return

    def _is_resting(self, health: _Health) -> bool:
        with self._lock:
            return self.clock() < health.resting_until

    def _call(
        self, backend: Backend, health: _Health, question: Prompt, left: float, group: _Group
    ) -> Analysis | None:
        try:
            answer = backend.ask(question, left)
        except Unavailable as reason:
            text = str(reason)
        except Exception as error:
            log.exception("analysis: %s", backend.name)
            text = f"{type(error).__name__}: {error}"
        else:
            with self._lock:
                health.succeeded()
            return answer
        with self._lock:
            health.failed(self.clock())
        self._note(group, f"{backend.name}: {clean(text, 300)}")
        return None

    def _note(self, group: _Group, text: str) -> None:
        with self._lock:
            group.notes.append(text)


def _backends(settings: AnalysisSettings) -> list[Backend]:
    found: list[Backend] = []
    if settings.endpoint is not None:
        # The HTTP client costs a tenth of a second: only those who use it pay.
        from reconciler.analyze.endpoint import Endpoint

        found.append(Endpoint(settings.endpoint, settings.model, settings.api_key))
    found += [Command(argv, settings.environment) for argv in settings.commands]
    return found


def _grouped(questions: Sequence[Question]) -> list[_Group]:
    found: dict[Any, _Group] = {}
    for question in questions:
        try:
            key = _key(question)
            hash(key)
        except Exception:
            log.exception("analysis: %s cannot be grouped", question.id)
            key = question.id
        if key in found:
            found[key].questions.append(question)
        else:
            found[key] = _Group([question])
    return list(found.values())


def _key(question: Question) -> Any:
    """What makes two issues one: the same difference of the same thing, told for the same reason."""
    fields = tuple(sorted((change.field, change.fixable) for change in question.changes))
    recurring = question.recurrence >= RECURRING
    rid = question.id
    return rid.kind, rid.name, fields, rules.cause_of(question), recurring, question.needs_plan


def _completed(answer: Analysis, question: Question) -> Analysis:
    """One node's share of an answer: with prevention where it is due, without proposals nobody asked for."""
    prevention = ""
    if question.recurrence >= RECURRING:
        prevention = answer.prevention or rules.judge(question).prevention
    if question.needs_plan:
        return replace(answer, prevention=prevention)
    return replace(answer, prevention=prevention, install=None, commands=())


def _share(answer: Analysis | None, question: Question) -> Analysis:
    """What is said of this question: the backend's answer, or the rules', or that there is none."""
    try:
        return _completed(answer, question) if answer else rules.judge(question)
    except Exception:
        log.exception("analysis: the rules fail at %s", question.id)
        return Analysis(severity=3, root_cause="The rules have no answer; the log says why.")
