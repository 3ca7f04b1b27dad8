"""Give each host what ``desired_state/`` declares for it: plain ``ansible-playbook`` converges the same state."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ansible import constants, context
from ansible.errors import AnsibleError
from ansible.inventory.host import Host
from ansible.plugins.vars import BaseVarsPlugin
from ansible.template import trust_as_template

DOCUMENTATION = """
name: reconciler_desired
short_description: The desired state as variables of each host
description:
  - Reads C(desired_state/) (or the directory named by E(RECONCILER_DESIRED)) and sets C(reconciler_resources),
    C(reconciler_kinds), C(reconciler_protected) and C(reconciler_attempt).
options: {}
"""


@cache
def _desired(directory: str, inventory: str, loader: Any) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Resources per node, and what all nodes share; loaded once per process."""
    # Imported here: Ansible loads every vars plugin, also where this one is switched off.
    from reconciler.desired.load import load
    from reconciler.inventory import Inventory
    from reconciler.kinds.registry import kinds
    from reconciler.model import ConfigurationError
    from reconciler.plan import dependencies_first
    from reconciler.requests import acts, role_request

    try:
        with _strict_patterns():
            desired = load(Path(directory), Inventory(Path(inventory), loader))
    except ConfigurationError as error:
        raise AnsibleError(f"the desired state is invalid:\n{error}") from error
    found: dict[str, list[Any]] = {}
    for rid in dependencies_first(desired.resources):
        resource = desired.resources[rid]
        if acts(resource):
            found.setdefault(resource.id.node, []).append(role_request(resource))
    shared: dict[str, Any] = {"reconciler_kinds": list(kinds())}
    shared["reconciler_protected"] = list(desired.protected)
    shared["reconciler_controller"] = {"keep_days": desired.backup_retention_days}
    shared["reconciler_attempt"] = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + f"-{os.getpid():x}"
    return found, shared


@contextlib.contextmanager
def _strict_patterns() -> Iterator[None]:
    """A host pattern of the desired state that matches nothing is an error; the play's own are the user's affair."""
    before = constants.HOST_PATTERN_MISMATCH
    constants.HOST_PATTERN_MISMATCH = "error"
    try:
        yield
    finally:
        constants.HOST_PATTERN_MISMATCH = before


class VarsModule(BaseVarsPlugin):  # type: ignore[misc]
    """Variables for hosts; groups get none."""

    REQUIRES_ENABLED = True

    def get_vars(self, loader: Any, path: str, entities: Any, cache: bool = True) -> dict[str, Any]:  # noqa: ARG002, FBT001, FBT002
        """``reconciler_resources`` and its companions for one host."""
        super().get_vars(loader, path, entities)
        # Asked for hosts one at a time, for groups and for nobody at all; `localhost` may be in no inventory.
        asked = entities if isinstance(entities, list) else [entities]
        hosts = [entity for entity in asked if isinstance(entity, Host) and not entity.implicit]
        if os.environ.get("RECONCILER_VARS") == "off" or not hosts:
            return {}
        directory = os.environ.get("RECONCILER_DESIRED") or "desired_state"
        inventories: Sequence[str] = context.CLIARGS.get("inventory") or ()
        if len(inventories) != 1:
            raise AnsibleError(
                "the desired state refers to one inventory; where there are several files, name their directory"
            )
        try:
            found, shared = _desired(directory, inventories[0], loader)
        except AnsibleError as error:
            # `ansible all -m ping` has nothing to do with the desired state: only who asks for it hears of this.
            broken = trust_as_template("{{ undef(hint=reconciler_problems) }}")
            return {"reconciler_resources": broken, "reconciler_problems": str(error.message)}
        return {"reconciler_resources": found.get(hosts[0].name, []), **shared}
