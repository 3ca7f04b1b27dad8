"""What analyzers say of new issues, and what of it may happen: questions out, judgements and overlays in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from reconciler.analyze import Analyzer, Proposal, decide
from reconciler.desired.load import Desired
from reconciler.kinds.base import Context as ResolveContext
from reconciler.kinds.registry import kinds
from reconciler.model import Analysis, Change, Question, Resource, ResourceId
from reconciler.record import Issues
from reconciler.settings import AnalysisSettings
from reconciler.store import Store
from reconciler.telling import Judgement

HISTORY = 10


class Judge:
    """Asks about new issues. ``analyzer`` lives as long as the process: it knows who is not worth asking."""

    def __init__(
        self, analyzer: Analyzer, settings: AnalysisSettings, store: Store, desired: Desired
    ) -> None:
        self.analyzer, self.settings, self.store, self.desired = analyzer, settings, store, desired

    def judge(self, issues: Issues) -> dict[ResourceId, Judgement]:
        """A judgement for every issue: its changes, and the reason why nothing was done if nothing was."""
        questions = [self._question(rid, changes, reason) for rid, (changes, reason) in issues.items()]
        answers = self.analyzer.analyze(questions, float("inf"))
        found = {}
        for rid, analysis in answers.items():
            resource, model = self.desired.resources[rid], kinds()[rid.kind]
            proposal = decide(self.settings.policy, resource, analysis, model, self.desired.protected)
            found[rid] = Judgement(
                analysis.severity, _details(analysis, proposal), _advice(analysis, proposal)
            )
        return found

    def _question(self, rid: ResourceId, changes: tuple[Change, ...], reason: str) -> Question:
        resource = self.desired.resources[rid]
        known = self.store.events(issue_key=str(rid), limit=HISTORY)
        history = tuple(
            {
                "timestamp": row["timestamp"],
                "status": row["status"],
                "reason": row["details"].get("reason", ""),
            }
            for row in known
        )
        return Question(
            id=rid,
            check_type=resource.check_type,
            desired={} if resource.secret else _without_bodies({**resource.args, **resource.fields}),
            changes=tuple(replace(change, diff="") for change in changes),
            reason="" if resource.secret else reason,
            recurrence=self.store.episodes(rid),
            history=() if resource.secret else history,
            needs_plan=not any(change.fixable for change in changes),
        )


def _details(analysis: Analysis, proposal: Proposal) -> dict[str, Any]:
    """A judgement for the record."""
    found = {key: value for key, value in asdict(analysis).items() if value}
    if proposal.install or proposal.commands:
        found["may_run"] = {"install": proposal.install, "commands": proposal.commands}
    return {**found, **({"refused": proposal.refused} if proposal.refused else {})}


def _advice(analysis: Analysis, proposal: Proposal) -> str:
    """A judgement for a person: what was proposed and what becomes of it."""
    said = f"{analysis.root_cause} {analysis.plan}".strip()
    proposed = [" ".join(f"{key} {value}" for key, value in (analysis.install or {}).items())]
    proposed += [" ".join(command) for command in analysis.commands]
    what = "; ".join(filter(None, proposed))
    fate = "runs in the next pass" if proposal.install or proposal.commands else "not run"
    proposed_by = f"Proposed by {analysis.backend} ({fate}): {what}." if what else ""
    return " ".join(filter(None, [said, proposed_by, analysis.prevention]))


def overlaid(desired: Desired, proposals: Mapping[ResourceId, Mapping[str, Any]]) -> Desired:
    """The desired state with what was proposed and may run, where git says nothing and its declaration is the same."""
    found = dict(desired.resources)
    for rid, row in proposals.items():
        resource = found.get(rid)
        if resource is None or resource.digest != row["digest"]:
            continue
        if row["install"]:
            found[rid] = _installable(resource, row["install"])
        elif row["commands"]:
            commands = tuple(tuple(command) for command in row["commands"])
            policy = replace(resource.policy, allow_become=False)
            found[rid] = replace(resource, proposed=commands, policy=policy)
    return replace(desired, resources=found)


def _installable(resource: Resource, install: Mapping[str, Any]) -> Resource:
    """The resource as if its declaration had named the method; the kind's own model says what that means."""
    model = kinds()[resource.id.kind]
    given = {"name": resource.id.name, "nodes": resource.id.node, model.PROPOSABLE: dict(install)}
    resolved = model.model_validate(given).resolve(
        ResolveContext(resource.id.node, {}, _no_file, _no_template)
    )
    return replace(resource, args={**resource.args, model.PROPOSABLE: resolved.args[model.PROPOSABLE]})


def _no_file(_path: str) -> bytes:
    raise OSError(0, "an analyzer has no files")


def _no_template(_text: str, _variables: Mapping[str, Any]) -> str:
    raise ValueError("an analyzer has no templates")


def _without_bodies(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_bodies(item) for key, item in value.items() if key != "body"}
    return value
