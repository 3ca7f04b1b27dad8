"""What only shows when all resources are known: dependencies, and paths that more than one would write."""

from __future__ import annotations

import fnmatch
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

from reconciler.desired.places import Document, Path_, suggestion
from reconciler.kinds.base import Declaration
from reconciler.model import Mark, Problem, Resource, ResourceId


@dataclass(frozen=True)
class Entry:
    """One entry of a section: its raw data and where it stands."""

    model: type[Declaration]
    data: dict[str, Any]
    document: Document
    path: Path_

    def problem(self, path: Path_, message: str, hint: str = "") -> Problem:
        """A problem at ``path`` within the entry, or at the nearest thing that the file has."""
        return Problem(message, self.document.mark((*self.path, *path)), hint)

    def mark_of(self, path: str) -> Mark:
        """Where the entry names this path of a node; the entry itself where the path is made up from others."""
        for place, text in self.document.raw.items():
            if place[: len(self.path)] == self.path and posixpath.normpath(text) == path:
                return self.document.values[place]
        return self.document.mark(self.path)


class Between:
    """Checks over all resources of a desired state; ``entries`` says where each of them stands."""

    def __init__(self, resources: Mapping[ResourceId, Resource], entries: Mapping[ResourceId, Entry]) -> None:
        self.resources, self.entries = resources, entries
        self.problems: list[Problem] = []

    def linked(self) -> dict[ResourceId, Resource]:
        """The resources with their dependencies found."""
        found = {rid: replace(r, depends_on=tuple(self._targets(r))) for rid, r in self.resources.items()}
        try:
            TopologicalSorter({rid: r.depends_on for rid, r in found.items()}).prepare()
        except CycleError as error:
            cycle = error.args[1]
            words = " -> ".join(f"{rid.kind}/{rid.name}" for rid in cycle)
            message = f"dependency cycle: {words} (on {cycle[0].node})"
            entry = self.entries[cycle[0]]
            self.problems.append(entry.problem(("depends_on",), message, "remove one of these depends_on"))
        return found

    def _targets(self, resource: Resource) -> Iterator[ResourceId]:
        for index, text in enumerate(resource.policy.depends_on):
            message, hint, target = self._target(resource.id.node, text)
            if target is None:
                problem = self.entries[resource.id].problem(("depends_on", index), message, hint)
                self.problems.append(problem)
            else:
                yield target

    def _target(self, node: str, text: str) -> tuple[str, str, ResourceId | None]:
        full = text if text.count("/") > 1 else f"{node}/{text}"
        try:
            target = ResourceId.parse(full)
        except ValueError:
            return (
                f"{text!r} names no resource",
                "write KIND/NAME, as in tool/claude, or NODE/KIND/NAME",
                None,
            )
        if target in self.resources:
            return "", "", target
        there = [f"{rid.kind}/{rid.name}" for rid in self.resources if rid.node == target.node]
        message = f"depends_on: {target.kind}/{target.name} is not declared on {target.node}"
        return message, suggestion(f"{target.kind}/{target.name}", there), None

    def check_paths(self, protected: Sequence[str]) -> None:
        """What can be seen by the spelling alone; the node looks again, through links."""
        writers: dict[tuple[str, str], Resource] = {}
        for rid, resource in self.resources.items():
            for path in sorted(resource.paths_written):
                self._check_protected(resource, path, protected)
                first = writers.setdefault((rid.node, path), resource)
                if first is not resource and not self.entries[rid].model.SHARES_PATHS:
                    what = f"{rid.kind} {rid.name!r} writes {path} on {rid.node}"
                    message = f"{what}, as {first.id.kind} {first.id.name!r} does at {first.declared_at}"
                    mark = self.entries[rid].mark_of(path)
                    self.problems.append(Problem(message, mark, "keep one, or let their nodes differ"))

    def _check_protected(self, resource: Resource, path: str, protected: Sequence[str]) -> None:
        for pattern in protected:
            subject = path if "/" in pattern else posixpath.basename(path)
            wanted = posixpath.normpath(pattern) if "/" in pattern else pattern
            if fnmatch.fnmatch(subject, wanted) or path.startswith(wanted.rstrip("/") + "/"):
                message = f"{resource.id.kind} {resource.id.name!r} would write {path}, which is protected"
                mark = self.entries[resource.id].mark_of(path)
                self.problems.append(Problem(message, mark, f"protected by the entry {pattern!r}"))
