"""Take one step (backup, apply, rollback) with one resource on the node, in one round trip.

The role that calls it brings the node-side code: ``roles/KIND/files/steps.py``. Check mode is
honoured on the node: nothing is written and what would change is reported.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase

from reconciler import node
from reconciler.kinds import probe_path
from reconciler.model import SECRET
from reconciler.plugins import transport


class ActionModule(ActionBase):  # type: ignore[misc]
    """``reconciler_step: {step: backup|apply|rollback, resource: {...}, attempt: ID, timeout: SECONDS}``."""

    _supports_check_mode = True
    _requires_connection = True
    _VALID_ARGS = frozenset({"step", "resource", "attempt", "timeout"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Answer ``{changed, attempt, ...}`` of the step; fails with the node's own reason."""
        super().run(tmp, task_vars)
        task_vars = task_vars or {}
        args = self._task.args
        if args.get("step") not in ("backup", "apply", "rollback"):
            raise AnsibleActionFail(f"step must be backup, apply or rollback, not {args.get('step')!r}")
        resource = dict(args["resource"])
        secret = bool(resource.get("secret"))
        kind = self._task._role.get_name() if self._task._role else str(resource.get("kind"))  # noqa: SLF001
        attempt = (
            args.get("attempt") or f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(3)}"
        )
        request = {
            "nonce": f"@@{secrets.token_hex(12)}@@",
            "step": args["step"],
            "kind": kind,
            "resource": resource,
            "attempt": attempt,
            "check": bool(self._task.check_mode),
            "diff": bool(self._task.diff) and not secret,
            # Variables reach an action as they were written; what they refer to has to be looked up.
            "protected": self._templar.template(task_vars.get("reconciler_protected") or []),
            "proposed": self._templar.template(task_vars.get("reconciler_proposed") or []),
            "confirm_within": float(self._templar.template(task_vars.get("reconciler_confirm_within") or 0)),
            **_controller(self._templar.template(task_vars.get("reconciler_controller") or {})),
            "environment": _texts(self._templar.template(task_vars.get("reconciler_environment") or {})),
        }
        answer = self._converse(request, self._steps_file(), float(args.get("timeout") or 60), task_vars)
        if "failed" in answer:
            raise AnsibleActionFail(f"{kind} {resource['name']}: {answer['failed']}")
        result = {"attempt": attempt, "name": resource["name"], **answer["result"]}
        if secret:
            return _without_values(result)
        return {**result, "diff": _diff(f"{kind} {resource['name']}", result)}

    def _steps_file(self) -> Path:
        role = self._task._role  # noqa: SLF001
        if role is None:
            raise AnsibleActionFail("reconciler_step is for roles: the role brings files/steps.py")
        return Path(role._role_path) / "files" / "steps.py"  # noqa: SLF001

    def _converse(
        self, request: dict[str, Any], steps: Path, timeout: float, task_vars: dict[str, Any]
    ) -> dict[str, Any]:
        script = node.bundle({"probe": probe_path(request["kind"]), "steps": steps}, request)
        interpreter = str(self._templar.template(task_vars.get("ansible_python_interpreter") or "python3"))
        try:
            answer, _connection = transport.converse(
                self,
                script,
                request["nonce"],
                interpreter="python3" if interpreter.startswith("auto") else interpreter,
                seconds=timeout,
                become=bool(self._task.become),
            )
        except transport.SilentError as error:
            raise AnsibleConnectionFailure(str(error)) from error
        except node.BadAnswerError as error:
            raise AnsibleActionFail(str(error)) from error
        return answer


def _diff(title: str, result: dict[str, Any]) -> list[dict[str, str]]:
    """What changes, field by field, for Ansible's --diff; then whole texts, where the node sent them."""
    texts: list[dict[str, str]] = result.pop("difference", [])
    changes = result.get("changes", []) if result["changed"] else []
    if not changes:
        return texts
    before = "".join(f"{change['field']}: {change['observed']}\n" for change in changes)
    after = "".join(f"{change['field']}: {change['desired']}\n" for change in changes)
    return [{"before_header": title, "after_header": title, "before": before, "after": after}, *texts]


def _without_values(result: dict[str, Any]) -> dict[str, Any]:
    """A secret's digest says too much of a short secret: only which fields changed is told."""
    changes = [{**change, "desired": SECRET, "observed": SECRET} for change in result.get("changes", ())]
    return {**{key: value for key, value in result.items() if key != "difference"}, "changes": changes}


def _controller(known: Any) -> dict[str, Any]:
    """Who asks: the epoch of its lease, and which backups it wants kept."""
    return {key: known[key] for key in ("epoch", "keep_days", "keep") if key in known}


def _texts(mapping: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in mapping.items()}
