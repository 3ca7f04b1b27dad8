"""Who is asked, how often, how long: and that every question has an answer whatever happens."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reconciler.analyze import Analyzer
from reconciler.analyze.answer import Unavailable
from reconciler.analyze.prompt import Prompt, prompt
from reconciler.model import Analysis, Change, ResourceId
from reconciler.settings import AnalysisSettings
from tests.unit.analyzers import ANSWER, Loopback, completion, hangs, late, question, says


class Judge:
    """A backend that does what it is told, and counts."""

    def __init__(self, name: str = "judge", **answer: Any) -> None:
        self.name, self.answer = name, answer
        self.asked: list[Prompt] = []
        self.fails: Exception | None = None
        self.takes = 0.0
        self.over = threading.Event()

    def ask(self, prompt: Prompt, limit: float) -> Analysis:
        self.asked.append(prompt)
        self.over.wait(self.takes)
        if self.fails is not None:
            raise self.fails
        assert limit > 0
        return Analysis(backend=self.name, **{"severity": 4, "root_cause": "Told so.", **self.answer})


class Clock:
    """Time that stands still until it is set."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def analyzer(clock: Clock, *judges: Judge, **given: Any) -> Analyzer:
    """With these backends in the place of the configured ones."""
    found = Analyzer(AnalysisSettings(commands=(("x",),) * len(judges), **given), clock)
    found.backends = list(judges)
    return found


@pytest.fixture
def servers() -> Iterator[list[Loopback]]:
    made: list[Loopback] = []
    yield made
    for server in made:
        server.close()


def rid(text: str) -> ResourceId:
    return ResourceId.parse(text)


def test_without_settings_only_the_rules_answer_and_nothing_is_contacted() -> None:
    asked = Analyzer(AnalysisSettings())
    assert asked.backends == []
    assert asked.analyze([question()], 0)[rid("node-1/tool/jq")].backend == "rules"
    assert asked.analyze([], 10) == {}


def test_one_cause_on_many_nodes_is_one_question(clock: Clock) -> None:
    """Told how many nodes have it; the answer is everybody's."""
    judge = Judge()
    questions = [question(f"node-{number}/tool/jq") for number in range(20)]
    found = analyzer(clock, judge).analyze(questions, 10)
    assert len(judge.asked) == 1
    assert json.loads(judge.asked[0].data)["nodes"] == 20
    assert set(found) == {q.id for q in questions}
    assert {answer.root_cause for answer in found.values()} == {"Told so."}


def test_different_causes_are_different_questions(clock: Clock) -> None:
    """Another thing, another field, another reason, a recurrence."""
    judge = Judge()
    changes = (Change("content", "a", "b"),)
    questions = [
        question("n1/tool/a"), question("n1/tool/b"), question("n1/service/a"), question("n2/tool/a", changes=changes),
        question("n3/tool/a", reason="no space left on device"), question("n4/tool/a", recurrence=3),
        question("n5/tool/a", reason="No space left on device: /var"),
    ]  # fmt: skip
    assert len(analyzer(clock, judge).analyze(questions, 10)) == 7
    assert len(judge.asked) == 6


def test_the_next_backend_is_asked_and_the_rules_come_last(clock: Clock) -> None:
    first, second = Judge("first"), Judge("second")
    asked = analyzer(clock, first, second)
    first.fails = Unavailable("busy\nnow")
    found = asked.analyze([question()], 10)[question().id]
    assert (found.backend, asked.notes[question().id]) == ("second", ("first: busy now",))
    second.fails = ValueError("a bug")
    found = asked.analyze([question()], 10)[question().id]
    assert found.backend == "rules"
    assert asked.notes[question().id] == ("first: busy now", "second: ValueError: a bug")


def test_a_backend_that_fails_three_times_rests_for_a_growing_time(clock: Clock) -> None:
    """One minute, two, four, up to an hour; one call after each rest, and everything is forgotten with an answer."""
    judge = Judge()
    judge.fails = Unavailable("dead")
    asked = analyzer(clock, judge)

    def calls() -> int:
        before = len(judge.asked)
        asked.analyze([question()], 10)
        return len(judge.asked) - before

    assert [calls() for _ in range(5)] == [1, 1, 1, 0, 0]
    assert "left alone after 3 failures" in asked.notes[question().id][0]
    for rest in (60, 120, 240, 480, 960, 1920, 3600, 3600):
        clock.now += rest - 1
        assert calls() == 0, rest
        clock.now += 1
        assert calls() == 1, rest
    judge.fails = None
    clock.now += 3600
    assert calls() == 1
    judge.fails = Unavailable("dead again")
    assert [calls() for _ in range(4)] == [1, 1, 1, 0]


def test_two_calls_at_once_and_no_more(servers: list[Loopback]) -> None:
    servers.append(Loopback(late(0.2, completion(ANSWER))))
    asked = Analyzer(AnalysisSettings(endpoint=servers[0].url))
    found = asked.analyze([question(f"n/tool/t{number}") for number in range(6)], 20)
    assert {answer.severity for answer in found.values()} == {4}
    assert servers[0].busiest == 2


def test_the_total_deadline_holds_over_everything(servers: list[Loopback]) -> None:
    """What has not been asked by then is answered by the rules."""
    servers.append(Loopback(hangs))
    asked = Analyzer(AnalysisSettings(endpoint=servers[0].url, timeout="0.5s"))
    questions = [question(f"n/tool/t{number}") for number in range(30)]
    before = time.monotonic()
    found = asked.analyze(questions, 1.2)
    assert time.monotonic() - before < 5
    assert len(found) == 30
    assert {answer.backend for answer in found.values()} == {"rules"}
    assert all(asked.notes[q.id] for q in questions)


def test_the_setting_limits_the_time_too(clock: Clock) -> None:
    """A call that nothing can interrupt is left behind."""
    judge = Judge()
    judge.takes = 30
    before = time.monotonic()
    asked = analyzer(clock, judge, total="0.3s")
    assert asked.analyze([question()], 600)[question().id].backend == "rules"
    assert time.monotonic() - before < 10
    assert asked.notes[question().id] == ("there was no time left",)
    judge.over.set()


def test_no_time_at_all_asks_nobody(clock: Clock) -> None:
    judge = Judge()
    assert analyzer(clock, judge).analyze([question()], -1)[question().id].backend == "rules"
    assert judge.asked == []


def test_prevention_is_given_from_the_third_time_on(clock: Clock) -> None:
    """By the rules where the backend has none, and not before."""
    asked = analyzer(clock, Judge(prevention="Do not."))
    assert asked.analyze([question(recurrence=2)], 10)[question().id].prevention == ""
    assert asked.analyze([question(recurrence=3)], 10)[question().id].prevention == "Do not."
    silent = analyzer(clock, Judge())
    assert "came back 2 times" in silent.analyze([question(recurrence=3)], 10)[question().id].prevention


def test_proposals_that_nobody_asked_for_are_dropped(clock: Clock) -> None:
    """Where a role fixes it, an analyzer has no say in how."""
    judge = Judge(install={"npm": "jq"}, commands=(("ls",),))
    asked = analyzer(clock, judge)
    found = asked.analyze([question(needs_plan=False)], 10)[question().id]
    assert (found.install, found.commands) == (None, ())
    found = asked.analyze([question()], 10)[question().id]
    assert (found.install, found.commands) == ({"npm": "jq"}, (("ls",),))


class Nasty:
    """Something that cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no")


def test_it_never_raises(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is in a question: values that break, that nest for ever, that are no text."""
    deep: Any = {}
    for _ in range(2_000):
        deep = {"a": deep}
    strange = [
        question("n/tool/a", desired={"x": Nasty()}),
        question("n/tool/b", desired=deep),
        question("n/tool/c", desired={1: {2, 3}, "b": b"\xff", "d": float("nan"), "s": "\ud800"}),
        question("n/tool/d", reason=None),
        question("n/tool/e", history=({"timestamp": 5, "status": None}, {}), recurrence=3),
        question("n/tool/f", recurrence="many"),
        question("n/tool/g", changes=(Change(["list"], 1, 2),)),
    ]
    found = analyzer(clock, Judge()).analyze(strange, 10)
    assert set(found) == {q.id for q in strange}
    assert all(isinstance(answer, Analysis) for answer in found.values())
    assert caplog.records


def test_the_prompt_is_short_the_same_each_time_and_names_no_node() -> None:
    given = question("db-7.internal/tool/jq", desired={"b": 1, "a": [2]})
    text = prompt(given, 3).text
    assert text == prompt(question("db-7.internal/tool/jq", desired={"a": [2], "b": 1}), 3).text
    assert "db-7" not in text
    assert len(text) < 5_000
    assert json.loads(prompt(given).data)["proposable"]["npm"].startswith("npm package")
    assert "proposable" not in json.loads(prompt(question(needs_plan=False)).data)
    assert "proposable" not in json.loads(prompt(question("n/service/a")).data)


def test_the_prompt_has_no_file_contents_and_no_endless_history() -> None:
    changes = (Change("content", "a", "b", diff="--- secret body"),)
    history = tuple({"status": "fixed", "reason": "long " * 400} for _ in range(400))
    found = prompt(question(changes=changes, history=history))
    assert "secret body" not in found.text
    assert len(found.text) < 45_000
    json.loads(found.data)
    wide = tuple(Change(f"field {number}", "some words " * 150, "other words " * 150) for number in range(60))
    assert json.loads(prompt(question(changes=wide)).data)["changes"] == "(too long)"


def test_a_good_endpoint_wins_over_commands(servers: list[Loopback], tmp_path: Path) -> None:
    servers.append(Loopback(says(completion(ANSWER))))
    settings = AnalysisSettings(endpoint=servers[0].url, commands=((str(tmp_path / "never"),),))
    asked = Analyzer(settings)
    assert [backend.name.split(" ")[0] for backend in asked.backends] == ["endpoint", "command"]
    assert asked.analyze([question()], 20)[question().id].backend.startswith("endpoint")
