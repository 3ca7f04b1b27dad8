"""Places in files: marks, carets on long lines, suggestions."""

from __future__ import annotations

from pathlib import Path

import pytest

from reconciler.desired.places import read, suggestion
from reconciler.model import Mark, Problem
from tests.unit.support import Fleet, reconcile, shown_problems


def make(tmp_path: Path, text: str) -> Path:
    """A file with that text."""
    path = tmp_path / "a.yml"
    path.write_text(text)
    return path


def test_every_value_and_key_has_its_place(tmp_path: Path) -> None:
    """Lines and columns count from 1; the length is what a caret underlines."""
    found = read(make(tmp_path, "a:\n  - b: cd\n    'e f': [1, 22]\n"), "a.yml")
    assert found.data == {"a": [{"b": "cd", "e f": [1, 22]}]}
    assert found.mark(("a", 0, "b")) == Mark("a.yml", 2, 8, 2)
    assert found.mark(("a", 0, "b"), key=True) == Mark("a.yml", 2, 5, 1)
    assert found.mark(("a", 0, "e f", 1)) == Mark("a.yml", 3, 16, 2)
    assert found.mark(("a", 0, "e f"), key=True) == Mark("a.yml", 3, 5, 5)
    assert (found.line(2), found.line(99)) == ("  - b: cd", "")


def test_place_of_what_is_not_there_is_that_of_the_nearest(tmp_path: Path) -> None:
    """A key that is missing is shown at the mapping that lacks it."""
    found = read(make(tmp_path, "a:\n  - {b: c}\n"), "a.yml")
    assert found.mark(("a", 0, "x", "y")) == Mark("a.yml", 2, 5, 6)
    assert read(make(tmp_path, ""), "a.yml").mark(("a",)) == Mark("a.yml")


def test_merged_values_stand_where_they_are_written(tmp_path: Path) -> None:
    """Not where they are merged in."""
    found = read(make(tmp_path, "a: &x {b: c}\nd:\n  <<: *x\n"), "a.yml")
    assert found.data == {"a": {"b": "c"}, "d": {"b": "c"}}
    assert found.mark(("d", "b")).line == 1


def test_file_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    """Never an exception."""
    assert read(tmp_path / "none.yml", "none.yml").problems == [
        Problem("cannot be read: No such file or directory", Mark("none.yml"))
    ]
    (tmp_path / "d.yml").mkdir()
    assert "Is a directory" in read(tmp_path / "d.yml", "d.yml").problems[0].message


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("wraper", ["wrapper", "tool"], "did you mean 'wrapper'?"),
        ("xyz", ["wrapper", "tool"], "known here: tool, wrapper"),
        ("xyz", [], ""),
        (
            "xyz",
            [f"k{n:02}" for n in range(20)],
            "known here: k00, k01, k02, k03, k04, k05, k06, k07, k08, k09, k10, k11, …",
        ),
    ],
)
def test_suggestions(word: str, known: list[str], hint: str) -> None:
    """The nearest, or what there is."""
    assert suggestion(word, known) == hint


@pytest.mark.parametrize("before", [0, 30, 300, 3000])
def test_caret_stays_under_the_place_on_long_lines(fleet: Fleet, before: int) -> None:
    """The line is shown around what is meant."""
    padding = "x" * before
    fleet.write(f"tools: [{{name: t, nodes: all, command: x{padding}, verson: '1', path: [{padding}y]}}]\n")
    said = reconcile("validate")
    (found,) = shown_problems(said.err)
    assert found.marked == "verson"
    assert max(map(len, said.err.splitlines())) <= 140


def test_place_after_wide_characters_counts_characters(fleet: Fleet) -> None:
    """As editors do."""
    fleet.write("tools: [{name: t, nodes: all, command: \u4e2d\u6587\u00e9, verson: '1'}]\n")
    (found,) = shown_problems(reconcile("validate").err)
    assert (found.place, found.marked) == ("a.yml:1:45", "verson")
