"""Read the desired state: files -> entries -> resources per node, with every mistake named at its place."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import ValidationError

from reconciler.desired import explain, references
from reconciler.desired.between import Between, Entry
from reconciler.desired.models import ALWAYS_PROTECTED, Header
from reconciler.desired.places import Document, pattern_hint, read, suggestion
from reconciler.inventory import Inventory
from reconciler.kinds.base import (
    Context,
    Declaration,
    FieldError,
    MaintenanceWindow,
    PolicyFields,
    Resolved,
    seconds,
)
from reconciler.kinds.registry import sections
from reconciler.model import (
    ConfigurationError,
    Limits,
    Mark,
    Mode,
    Policy,
    Problem,
    Resource,
    ResourceId,
    Suspension,
)

CONFIRM_SECONDS = 60.0


@dataclass(frozen=True)
class Desired:
    """A valid desired state: every resource on every node, in the order in which it is put right."""

    resources: Mapping[ResourceId, Resource]
    protected: tuple[str, ...]
    limits: Limits = field(default_factory=Limits)
    backup_retention_days: int = 7
    documents: Mapping[str, Document] = field(default_factory=dict, repr=False)

    def of(self, nodes: Iterable[str], kinds: Iterable[str] | None = None) -> Desired:
        """Only what is declared for these nodes and (unless None) these kinds."""
        wanted, some = set(nodes), set(kinds) if kinds is not None else None
        kept = {
            rid: resource
            for rid, resource in self.resources.items()
            if rid.node in wanted and (some is None or rid.kind in some)
        }
        return replace(self, resources=kept)

    def without(self, rested: AbstractSet[ResourceId]) -> Desired:
        """Less what was looked at lately; but what belongs together is looked at together.

        A service is planned with the file that it reads, and nothing is repaired before what it depends on was seen.
        """
        kept = {rid for rid in self.resources if rid not in rested}
        linked = self._links()
        waiting = list(kept)
        while waiting:
            more = linked.get(waiting.pop(), set()) - kept
            kept |= more
            waiting += more
        return replace(self, resources={rid: r for rid, r in self.resources.items() if rid in kept})

    def _links(self) -> dict[ResourceId, set[ResourceId]]:
        """What each resource belongs together with: by ``depends_on``, and by files that one writes and one reads."""
        files: dict[tuple[str, str], set[ResourceId]] = {}
        linked: dict[ResourceId, set[ResourceId]] = {}
        for rid, resource in self.resources.items():
            for path in resource.paths_written | resource.paths_read:
                files.setdefault((rid.node, path), set()).add(rid)
            for other in resource.depends_on:
                linked.setdefault(rid, set()).add(other)
                linked.setdefault(other, set()).add(rid)
        for group in files.values():
            for rid in group:
                linked.setdefault(rid, set()).update(group)
        return linked


def load(directory: Path, inventory: Inventory) -> Desired:
    """Read every ``*.yml`` in ``directory``. Raises ConfigurationError with all problems found."""
    return _Loader(directory, inventory).load()


class _Loader:
    def __init__(self, directory: Path, inventory: Inventory) -> None:
        self.directory, self.inventory = directory, inventory
        self.problems: list[Problem] = []
        self.documents: dict[str, Document] = {}
        self.entries: dict[ResourceId, Entry] = {}
        self.header = Header()
        self._bodies: dict[str, bytes] = {}

    def load(self) -> Desired:
        self._read_files()
        entries = list(self._entries())
        self.header = self._read_header()
        resources: dict[ResourceId, Resource] = {}
        for entry in entries:
            for resource in self._expand(entry):
                self._add(resources, resource, entry)
        self._stop_on_problems()
        between = Between(resources, self.entries)
        resources = between.linked()
        between.check_paths(self._protected())
        self.problems += between.problems
        self._stop_on_problems()
        days = self.header.backup_retention_days or 7
        return Desired(self._ordered(resources), self._protected(), self._limits(), days, self.documents)

    def _stop_on_problems(self) -> None:
        if self.problems:
            # Said twice about one place, the first is the one with a hint.
            unique: dict[tuple[str, str], Problem] = {}
            for problem in self.problems:
                unique.setdefault((str(problem.mark), problem.message), problem)
            by_place = sorted(unique.values(), key=_place)
            raise DesiredError(by_place, self.documents)

    # --- files and entries ---

    def _read_files(self) -> None:
        if not self.directory.is_dir():
            hint = "name it with --desired, or make one with: reconcile init"
            raise ConfigurationError([Problem(f"no desired state at {self.directory}", hint=hint)])
        found = sorted(
            p
            for p in self.directory.iterdir()
            if p.suffix in (".yml", ".yaml") and not p.name.startswith(".")
        )
        if not found:
            hint = "write one, or let `reconcile init` make an example"
            raise ConfigurationError([Problem(f"no *.yml file in {self.directory}", hint=hint)])
        for path in found:
            document = read(path, str(path))
            self.documents[str(path)] = document
            self.problems += document.problems

    def _entries(self) -> Iterator[Entry]:
        for document in self.documents.values():
            if document.data is None:
                continue
            if not isinstance(document.data, dict):
                known = "a desired-state file is a mapping of sections such as tools: and wrappers:"
                self.problems.append(Problem(known, document.mark(())))
                continue
            for section, data in document.data.items():
                if section in Header.model_fields:
                    continue
                model = sections().get(section)
                if model is None:
                    hint = suggestion(section, [*sections(), *Header.model_fields])
                    self.problems.append(
                        Problem(f"unknown section {section!r}", document.mark((section,), key=True), hint)
                    )
                else:
                    yield from self._section(document, section, model, data)

    def _section(
        self, document: Document, section: str, model: type[Declaration], data: Any
    ) -> Iterator[Entry]:
        if data is None:
            return
        if not isinstance(data, list):
            hint = f"begin each {model.KIND} with a dash: - name: …"
            self.problems.append(Problem(f"{section} is a list", document.mark((section,)), hint))
            return
        for index, item in enumerate(data):
            if isinstance(item, dict):
                yield Entry(model, item, document, (section, index))
            else:
                message = f"each entry of {section} is a mapping, this is {explain.kind_of(item)}"
                self.problems.append(Problem(message, document.mark((section, index))))

    def _read_header(self) -> Header:
        merged: dict[str, tuple[Any, Document]] = {}
        for document in self.documents.values():
            for key in Header.model_fields:
                if not isinstance(document.data, dict) or key not in document.data:
                    continue
                if key in merged:
                    first = merged[key][1].mark((key,), key=True)
                    message = f"{key} stands in two files; the first is {first}"
                    self.problems.append(
                        Problem(message, document.mark((key,), key=True), "keep one of them")
                    )
                else:
                    merged[key] = (document.data[key], document)
        values: dict[str, Any] = {}
        for key, (data, document) in merged.items():
            try:
                values[key] = getattr(Header.model_validate({key: data}), key)
            except ValidationError as error:
                self.problems += explain.problems(error, Header, document, ())
        return Header(**values)

    # --- one entry on its nodes ---

    def _expand(self, entry: Entry) -> Iterator[Resource]:
        nodes = self._nodes(entry)
        if not references.used(entry.data):
            declaration = self._validated(entry, entry.data)
            for node in nodes if declaration else ():
                yield from self._resolved(entry, declaration, node, secret=False)
            return
        for node in nodes:
            resolver = references.Resolver(node, self.inventory.variables[node], self.directory)
            # A name is shown everywhere: it never refers to anything.
            data = {k: v if k == "name" else resolver.resolve(v, (k,)) for k, v in entry.data.items()}
            for path, message, hint in resolver.problems:
                self.problems.append(entry.problem(path, message, hint))
            if not resolver.problems:
                declaration = self._validated(entry, data, f" (on {node})", secret=resolver.secret)
                yield from self._resolved(entry, declaration, node, secret=resolver.secret)

    def _nodes(self, entry: Entry) -> tuple[str, ...]:
        pattern = entry.data.get("nodes")
        if not isinstance(pattern, str) or not pattern:
            if "nodes" not in entry.data:
                self.problems.append(
                    entry.problem((), "nodes is missing", "an Ansible host pattern such as: nodes: workers")
                )
            else:
                self._validated(entry, entry.data)
            return ()
        try:
            return self.inventory.match(pattern)
        except LookupError:
            known = [*self.inventory.groups, *self.inventory.nodes]
            message = f"the pattern {pattern!r} matches no node of {self.inventory.path}"
            self.problems.append(entry.problem(("nodes",), message, pattern_hint(pattern, known)))
            return ()

    def _validated(
        self, entry: Entry, data: dict[str, Any], where: str = "", *, secret: bool = False
    ) -> Declaration | None:
        try:
            return entry.model.model_validate(data)
        except ValidationError as error:
            found = explain.problems(error, entry.model, entry.document, entry.path, where)
            self.problems += map(explain.without_value, found) if secret else found
            return None

    def _resolved(
        self, entry: Entry, declaration: Declaration | None, node: str, *, secret: bool
    ) -> Iterator[Resource]:
        if declaration is None:
            return
        classes: dict[str, Any] = dict(self.header.classes or ())
        context = Context(node, self.inventory.variables[node], self._body, _render, classes)
        try:
            resolved = declaration.resolve(context)
            fields = self._without_ignored(declaration, resolved)
        except FieldError as error:
            problem = entry.problem(error.path, str(error), error.hint)
            hidden = secret or declaration.secret
            self.problems.append(explain.without_value(problem) if hidden else problem)
            return
        rid = ResourceId(node, declaration.KIND, declaration.name)
        yield Resource(
            id=rid,
            check_type=declaration.CHECK_TYPE,
            fields=fields,
            args=resolved.args,
            policy=self._policy(declaration, node),
            paths_written=resolved.paths_written,
            paths_read=resolved.paths_read,
            secret=secret or declaration.secret,
            declared_at=entry.document.mark(entry.path),
            digest=_digest(resolved, declaration),
            confirm_within=_confirm_within(declaration),
        )

    def _body(self, path: str) -> bytes:
        if path not in self._bodies:
            self._bodies[path] = references.read_file(self.directory, path)
        return self._bodies[path]

    @staticmethod
    def _without_ignored(declaration: Declaration, resolved: Resolved) -> dict[str, Any]:
        comparable = importlib.import_module(f"reconciler.kinds.{declaration.KIND}.probe").COMPARED
        for index, name in enumerate(declaration.ignore):
            if name not in comparable:
                hint = suggestion(name, comparable)
                raise FieldError(
                    ("ignore", index), f"{declaration.KIND} has no field {name!r} to ignore", hint
                )
        return {key: value for key, value in resolved.fields.items() if key not in declaration.ignore}

    def _policy(self, declaration: Declaration, node: str) -> Policy:
        """Defaults of the file, then of the kind, then of the node's variables, then the resource's own words."""
        defaults = self.header.defaults
        layers: list[PolicyFields | None] = [
            defaults,
            getattr(defaults, f"{declaration.KIND}_", None) if defaults else None,
        ]
        own = self.inventory.variables[node].get("reconciler_defaults")
        if own is not None:
            try:
                layers.append(PolicyFields.model_validate(own))
            except ValidationError as error:
                place = f"reconciler_defaults of {node}: {error.errors()[0]['msg']}"
                self.problems.append(Problem(place, Mark(str(self.inventory.path))))
        layers.append(declaration)
        found: dict[str, Any] = {}
        for layer in layers:
            for name in PolicyFields.model_fields if layer else ():
                value = getattr(layer, name)
                if isinstance(value, MaintenanceWindow):
                    found[name] = value.window()
                elif value is not None and (name != "mode" or isinstance(value, Mode)):
                    found[name] = seconds(value) if name.endswith("interval") else value
        suspend = declaration.suspend
        return Policy(
            **found,
            depends_on=tuple(declaration.depends_on),
            suspend=Suspension(suspend.reason, suspend.owner, suspend.expiry()) if suspend else None,
            ignore=frozenset(declaration.ignore),
            allow_become=declaration.allow_become,
        )

    def _add(self, resources: dict[ResourceId, Resource], resource: Resource, entry: Entry) -> None:
        first = resources.get(resource.id)
        if first is None:
            resources[resource.id] = resource
            self.entries[resource.id] = entry
            return
        rid = resource.id
        message = f"{rid.kind} {rid.name!r} is declared twice for {rid.node}; first at {first.declared_at}"
        self.problems.append(Problem(message, resource.declared_at, "keep one, or let their nodes differ"))

    def _limits(self) -> Limits:
        given = self.header.limits
        found: dict[str, Any] = dict(given) if given else {}
        for name in ("corrections_window", "quarantine", "unknown_alert_after"):
            if name in found:
                found[name] = seconds(found[name])
        return Limits(**found)

    def _protected(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*ALWAYS_PROTECTED, *(self.header.protected or ())]))

    def _ordered(self, resources: Mapping[ResourceId, Resource]) -> dict[ResourceId, Resource]:
        order = {model.KIND: model.ORDER for model in sections().values()}
        position = {node: index for index, node in enumerate(self.inventory.nodes)}
        return dict(sorted(resources.items(), key=lambda item: (position[item[0].node], order[item[0].kind])))


class DesiredError(ConfigurationError):
    """Problems in desired-state files, with the files at hand so that the lines can be shown."""

    def __init__(self, problems: list[Problem], documents: Mapping[str, Document]) -> None:
        super().__init__(problems)
        self.documents = documents

    def source_line(self, mark: Mark) -> str:
        """The line a mark points to."""
        document = self.documents.get(mark.file)
        return document.line(mark.line) if document else ""


def _place(problem: Problem) -> tuple[str, int, int]:
    mark = problem.mark or Mark("")
    return mark.file, mark.line, mark.column


def _confirm_within(declaration: Declaration) -> float:
    if declaration.confirm_within is not None:
        return 0.0 if declaration.NO_ROLLBACK else seconds(declaration.confirm_within)
    return CONFIRM_SECONDS if declaration.can_lock_out() else 0.0


def _digest(resolved: Resolved, declaration: Declaration) -> str:
    """What tells one declaration from the next: what is wanted, how it is done, and whether with privilege."""
    privilege = ["become"] if declaration.allow_become else []
    text = json.dumps([resolved.fields, resolved.args, *privilege], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )


def _render(text: str, variables: Mapping[str, Any]) -> str:
    try:
        return _environment().from_string(text).render(variables)
    except TemplateError as error:
        number = getattr(error, "lineno", None)  # only syntax errors have one
        line = f"line {number}: " if number else ""
        raise ValueError(f"{line}{error.message or type(error).__name__}") from None
    except (TypeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
