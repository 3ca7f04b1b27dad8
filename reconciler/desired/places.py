"""YAML with its places: every value knows file, line and column, so that every error can name them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from reconciler.model import Mark, Problem

Path_ = tuple[str | int, ...]
MAX_NODES = 200_000
MAX_DEPTH = 60
_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


@dataclass
class Document:
    """One file's data, and per path the mark of the value and of its key."""

    file: str
    text: str
    data: Any = None
    values: dict[Path_, Mark] = field(default_factory=dict)
    keys: dict[Path_, Mark] = field(default_factory=dict)
    raw: dict[Path_, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def mark(self, path: Path_, *, key: bool = False) -> Mark:
        """The mark of the deepest part of ``path`` that the file has; its key where ``key`` is asked for."""
        for length in range(len(path), -1, -1):
            part = path[:length]
            if key and length == len(path) and part in self.keys:
                return self.keys[part]
            if part in self.values:
                return self.values[part]
        return Mark(self.file)

    def line(self, number: int) -> str:
        """A line of the file, counted from 1."""
        lines = self.text.split("\n")
        return lines[number - 1].rstrip("\r") if 0 < number <= len(lines) else ""


def read(path: Path, name: str) -> Document:
    """Read one file; whatever is wrong with it is in ``problems``, never an exception."""
    document = Document(name, "")
    try:
        document.text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        document.problems.append(
            Problem("this is not UTF-8 text", Mark(name, line), "save the file as UTF-8")
        )
        return document
    except OSError as error:
        document.problems.append(Problem(f"cannot be read: {error.strerror}", Mark(name)))
        return document
    try:
        root = yaml.compose(document.text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        document.problems.append(_syntax_problem(name, error))
        return document
    except (yaml.YAMLError, RecursionError) as error:
        document.problems.append(Problem(_first_line(str(error)) or "is nested too deeply", Mark(name)))
        return document
    if root is not None:
        _Builder(document).build(root)
    return document


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


def _syntax_problem(name: str, error: yaml.MarkedYAMLError) -> Problem:
    place = error.problem_mark or error.context_mark
    mark = Mark(name, place.line + 1, place.column + 1) if place else Mark(name)
    message = " ".join(part for part in (error.context, error.problem) if part) or "is no YAML"
    hint = ""
    if "\\t" in message or "'\\t'" in message:
        hint = "YAML is indented with spaces, never with tabs"
    elif "mapping values are not allowed" in message:
        hint = "put a value that contains a colon in quotes"
    elif "%" in message or "@" in message or "`" in message:
        hint = "put a value that begins with this character in quotes"
    return Problem(f"this is not YAML: {message}", mark, hint)


class _Builder:
    """Turns PyYAML's node graph into data, keeping places and refusing what hides mistakes."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.scalars = yaml.constructor.SafeConstructor()
        self.count = 0

    def build(self, root: yaml.Node) -> None:
        try:
            self.document.data = self._value(root, (), ())
        except _TooMuchError as error:
            self.document.problems.append(Problem(str(error), Mark(self.document.file)))

    def _value(self, node: yaml.Node, path: Path_, above: tuple[int, ...]) -> Any:
        self.count += 1
        if self.count > MAX_NODES:
            raise _TooMuchError("has too many values (aliases multiply them)")
        if id(node) in above:
            self._problem("an alias refers to what contains it", node)
            return None
        if len(above) > MAX_DEPTH:
            raise _TooMuchError("is nested too deeply")
        self.document.values[path] = self._mark(node)
        above = (*above, id(node))
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _PLAIN_TAGS:
            return self._strange_tag(node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, above)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*path, index), above) for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _scalar(self, node: yaml.Node, path: Path_) -> Any:
        self.document.raw[path] = node.value
        if not node.tag.startswith("tag:yaml.org,2002:"):
            return self._strange_tag(node)
        try:
            return _whole_characters(self.scalars.construct_object(node))
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            self._problem(f"cannot be read as a value: {_first_line(str(error))}", node, "put it in quotes")
            return None

    def _strange_tag(self, node: yaml.Node) -> None:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        self._problem(f"unknown tag {tag}", node, "references are written {$env: NAME}, without tags")

    def _mapping(self, node: yaml.MappingNode, path: Path_, above: tuple[int, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        first: dict[str, yaml.Node] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged.append(value_node)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem("a key has to be plain text", key_node)
                continue
            if key_node.tag not in (
                "tag:yaml.org,2002:str",
                "tag:yaml.org,2002:int",
                "tag:yaml.org,2002:float",
            ):
                hint = f'write it in quotes: "{key_node.value}"'
                self._problem(f"the key {key_node.value} is not text in YAML 1.1", key_node, hint)
                continue
            key = key_node.value
            if not _is_text(key):
                self._problem(f"the key {key!r} holds half a character", key_node)
                continue
            if key in first:
                line = first[key].start_mark.line + 1
                self._problem(f"the key {key!r} stands here a second time (first in line {line})", key_node)
                continue
            first[key] = key_node
            self.document.keys[(*path, key)] = self._mark(key_node)
            found[key] = self._value(value_node, (*path, key), above)
        for value_node in merged:
            self._merge(value_node, path, above, found)
        return found

    def _merge(self, node: yaml.Node, path: Path_, above: tuple[int, ...], found: dict[str, Any]) -> None:
        """``<<``: keys of another mapping (or list of mappings) that are not given here."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                self._problem("<< takes a mapping or a list of mappings", source)
                continue
            for key_node, value_node in source.value:
                key = getattr(key_node, "value", None)
                if key_node.tag == "tag:yaml.org,2002:merge":
                    if id(source) in above:
                        self._problem("an alias refers to what contains it", source)
                    else:
                        self._merge(value_node, path, (*above, id(source)), found)
                elif isinstance(key, str) and _is_text(key) and key not in found:
                    self.document.keys[(*path, key)] = self._mark(key_node)
                    found[key] = self._value(value_node, (*path, key), above)

    def _mark(self, node: yaml.Node) -> Mark:
        start, end = node.start_mark, node.end_mark
        length = end.column - start.column if end.line == start.line else 1
        return Mark(self.document.file, start.line + 1, start.column + 1, max(1, length))

    def _problem(self, message: str, node: yaml.Node, hint: str = "") -> None:
        self.document.problems.append(Problem(message, self._mark(node), hint))


def _whole_characters(value: Any) -> Any:
    """JSON writes one character as two escapes, which YAML reads as two. Raises ValueError for half of one."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16")


def _is_text(key: str) -> bool:
    """Whether every character is whole: YAML's escapes can name halves, which cannot be written anywhere."""
    return not any("\ud800" <= character <= "\udfff" for character in key)


class _TooMuchError(Exception):
    """The file is larger than any desired state."""


def suggestion(word: str, known: Iterator[str] | list[str] | tuple[str, ...]) -> str:
    """``did you mean …``, or what there is, when nothing is near."""
    choices = sorted(known)
    near = get_close_matches(word, choices, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    shown = ", ".join(choices[:12]) + (", …" if len(choices) > 12 else "")  # noqa: PLR2004
    return f"known here: {shown}" if choices else ""


def pattern_hint(pattern: str, known: list[str]) -> str:
    """A suggestion for the first part of a host pattern that names neither a group nor a node."""
    words = [word.lstrip("!&") for word in pattern.replace(":", ",").split(",")]
    strange = [word for word in words if word not in known]
    return suggestion(strange[0], known) if strange else "these groups and nodes exist, but none is left"
