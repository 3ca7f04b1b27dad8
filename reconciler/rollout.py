"""How far a change spreads at once: a canary, then batches; a guard over the whole pass. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from reconciler.attempts import ERROR_BUDGET
from reconciler.kinds.registry import kinds
from reconciler.model import Action, Limits, Outcome, Plan, Repairs, Resource, ResourceId, Status, share

Declared = tuple[str, str]
"""Kind and name: one declaration, on however many nodes."""


@dataclass(frozen=True)
class Hold:
    """A pass that would have changed too much: only ``canary`` may be changed (empty: it already was).

    ``digests`` are the declarations that were to be carried out; another declaration gets another canary.
    """

    canary: str
    nodes: int
    limit: int
    fleet: int
    digests: frozenset[str] = field(default_factory=frozenset)

    @property
    def reason(self) -> str:
        """Why what is held is not done, and the way out."""
        return (
            f"held: this would change {self.nodes} of {self.fleet} nodes, more than the {self.limit} allowed at once"
            " (limits.max_changed_nodes); look at the canary, then: reconcile --once --allow-mass-change"
        )


def mass_change(
    planned: Plan, resources: Mapping[ResourceId, Resource], limits: Limits, fleet: int, before: Hold | None
) -> Hold | None:
    """The hold that a plan over ``fleet`` nodes runs into, or None; ``before`` is the hold of the last pass."""
    actions = [action for action in planned.actions if kinds()[action.id.kind].CHANGES_NODE]
    nodes = list(dict.fromkeys(action.id.node for action in actions))
    limit = share(limits.max_changed_nodes, fleet)
    digests = frozenset(resources[action.id].digest for action in actions)
    if before is not None and nodes and digests <= before.digests:
        # What was held stays held until somebody looked, also when the canary brought the count below the limit.
        return Hold("", before.nodes, limit, fleet, before.digests)
    if len(nodes) <= limit:
        return None
    return Hold(nodes[0], len(nodes), limit, fleet, digests | (before.digests if before else frozenset()))


def next_wave(
    planned: Plan, outcomes: Sequence[Outcome], history: Mapping[ResourceId, Repairs], limits: Limits
) -> tuple[Action, ...]:
    """What is done next: of everything that waits for nothing, the canaries first, then batch after batch."""
    pending = {action.id for action in planned.actions}
    free = [action for action in planned.actions if not action.after & pending]
    ended: dict[Declared, int] = {}
    for outcome in outcomes:
        ended[_declared(outcome.id)] = ended.get(_declared(outcome.id), 0) + 1
    groups: dict[Declared, list[Action]] = {}
    for action in free:
        groups.setdefault(_declared(action.id), []).append(action)
    chosen: set[ResourceId] = set()
    for declared, group in groups.items():
        if not kinds()[declared[0]].CHANGES_NODE:
            chosen |= {action.id for action in group}
            continue
        done = ended.get(declared, 0)
        whole = done + sum(_declared(action.id) == declared for action in planned.actions)
        # A node where it keeps failing is a bad canary: it would stop the others for its own trouble.
        best = sorted(group, key=lambda action: history.get(action.id, Repairs()).attempts)
        chosen |= {action.id for action in best[: _batch(limits.batch_size, whole) if done else 1]}
    safe = tuple(action for action in free if action.id in chosen and not action.is_risky)
    return safe or _with_consequences([action for action in free if action.id in chosen], planned)


def _with_consequences(risky: Sequence[Action], planned: Plan) -> tuple[Action, ...]:
    """What could lock us out, and what makes it count: a login daemon reads its file when it is restarted.

    Together, so that a new login shows what the change leads to before anything of it is confirmed.
    """
    ids, pending = {action.id for action in risky}, {action.id for action in planned.actions}
    return tuple(
        action
        for action in planned.actions
        if action.id in ids or (action.writers & ids and action.after & pending <= ids)
    )


def stopped(rid: ResourceId, outcomes: Sequence[Outcome]) -> str:
    """Why a declaration is not carried out on more nodes in this pass, or nothing."""
    mine = [outcome for outcome in outcomes if _declared(outcome.id) == _declared(rid)]
    if not mine:
        return ""
    if mine[0].status is not Status.FIXED:
        return f"it failed on {mine[0].id.node}, which was the first to get it: {mine[0].detail}"
    in_a_row = list(takewhile(lambda outcome: outcome.status is not Status.FIXED, reversed(mine)))
    if len(in_a_row) >= ERROR_BUDGET:
        return (
            f"it failed {len(in_a_row)} times in a row, last on {in_a_row[0].id.node}: {in_a_row[0].detail}"
        )
    return ""


def _batch(text: str, of: int) -> int:
    """How many nodes of ``of`` are changed at once: a share is rounded up, so that three nodes take two batches."""
    return max(1, -(-int(text[:-1]) * of // 100) if text.endswith("%") else int(text))


def _declared(rid: ResourceId) -> Declared:
    return rid.kind, rid.name
