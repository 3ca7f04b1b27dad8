"""What is handed to Ansible about a resource: for looking (scripts) and for acting (role arguments)."""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from reconciler import node
from reconciler.kinds import probe_path
from reconciler.kinds.registry import kinds
from reconciler.model import Mode, Resource

CONVERSATION_SECONDS = 10.0


def role_request(resource: Resource, attempt: str = "") -> dict[str, Any]:
    """One action as the playbooks understand it; ``resource`` is the role's argument."""
    model = kinds()[resource.id.kind]
    return {
        "id": str(resource.id),
        "kind": resource.id.kind,
        "attempt": attempt,
        "become": resource.policy.allow_become,
        "has_rollback": not model.NO_ROLLBACK,
        "confirm_within": resource.confirm_within,
        "proposed": [list(command) for command in resource.proposed],
        "depends_on": [str(rid) for rid in resource.depends_on],
        "resource": {
            **resource.args,
            **resource.fields,
            "name": resource.id.name,
            "secret": resource.secret,
        },
    }


def acts(resource: Resource) -> bool:
    """Whether a drift of it would be put right now: by its mode, and not while it is suspended."""
    policy = resource.policy
    suspended = policy.suspend is not None and policy.suspend.holds(datetime.now(UTC))
    return policy.mode is Mode.ENFORCE and not suspended


def looks(
    resources: Iterable[Resource], variables: Mapping[str, Any], *, fresh: bool, epoch: int | None = None
) -> tuple[dict[str, Any], list[list[Resource]]]:
    """The observing request of one node, and which resources each of its batches asks for.

    There is one batch, and so one round trip, per privilege that looking needs. With ``epoch`` the node is told
    of a new controller, which is all that a look ever writes.
    """
    by_privilege: dict[bool, list[Resource]] = defaultdict(list)
    for resource in resources:
        model = kinds()[resource.id.kind]
        by_privilege[resource.policy.allow_become and model.OBSERVE_PRIVILEGED].append(resource)
        if epoch is not None:  # each account that steps are taken with has to know
            by_privilege[resource.policy.allow_become] += []
    groups = [by_privilege[privileged] for privileged in sorted(by_privilege)]
    batches = [
        _batch(group, variables, privileged=privileged, fresh=fresh, epoch=epoch)
        for privileged, group in zip(sorted(by_privilege), groups, strict=True)
    ]
    return {"batches": batches}, groups


def _batch(
    resources: list[Resource],
    variables: Mapping[str, Any],
    *,
    privileged: bool,
    fresh: bool,
    epoch: int | None,
) -> dict[str, Any]:
    nonce = f"@@{secrets.token_hex(12)}@@"
    probes = [
        {
            "kind": r.id.kind,
            "args": kinds()[r.id.kind].probe_args(r),
            "timeout": kinds()[r.id.kind].PROBE_SECONDS,
        }
        for r in resources
    ]
    request: dict[str, Any] = {"nonce": nonce, "probes": probes, "environment": environment(variables)}
    if epoch is not None:
        request["fence"] = epoch
    sources = {kind: probe_path(kind) for kind in sorted({r.id.kind for r in resources})}
    every = [r.args["fresh_login_every"] for r in resources if "fresh_login_every" in r.args]
    return {
        "script": node.bundle(sources, request),
        "nonce": nonce,
        "interpreter": interpreter(variables),
        # Probes have their own deadlines on the node; this one is for a node that says nothing at all.
        "seconds": float(variables.get("reconciler_timeout", CONVERSATION_SECONDS)),
        "become": privileged,
        "fresh": fresh,
        "fresh_every": min(every, default=None),
    }


def interpreter(variables: Mapping[str, Any]) -> str:
    """The node's Python: the inventory's word, or ``python3`` from its PATH."""
    declared = str(variables.get("ansible_python_interpreter") or "python3")
    return "python3" if declared.startswith("auto") else declared


def environment(variables: Mapping[str, Any]) -> dict[str, str]:
    """``reconciler_environment`` of a node: set for every probe and step there."""
    return {str(key): str(value) for key, value in (variables.get("reconciler_environment") or {}).items()}
