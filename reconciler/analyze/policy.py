"""What may be done with what an analyzer proposes. Pure, and deny by default."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import ValidationError

from reconciler.analyze import words
from reconciler.analyze.answer import clean
from reconciler.analyze.vectors import refusal
from reconciler.kinds.base import Context, Declaration, FieldError
from reconciler.model import Analysis, Resource

SUGGEST, ALLOWLISTED, FULL = "suggest", "allowlisted", "full"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class Proposal:
    """What may run: an install method in the words of the desired state, and argument vectors, run as they are.

    ``refused`` says what may not, each with why. Nothing of it may be run with privilege escalation.
    """

    install: Mapping[str, Any] | None = None
    commands: tuple[tuple[str, ...], ...] = ()
    refused: tuple[str, ...] = ()


def decide(
    policy: str,
    resource: Resource,
    analysis: Analysis,
    install_model: type[Declaration] | None,
    protected: Sequence[str] = (),
) -> Proposal:
    """What this policy lets happen. An unknown policy is ``suggest``: nothing.

    ``install_model`` is the model of the resource's kind (its ``PROPOSABLE`` names the field that may be filled);
    ``protected`` are the paths that the desired state protects.
    """
    refused: list[str] = []
    install, commands = None, analysis.commands
    if analysis.install is not None:
        reason = _install_refusal(policy, resource, analysis.install, install_model)
        install = None if reason else dict(analysis.install)
        refused += [f"install {_shown(analysis.install)}: {reason}"] if reason else []
    if commands:
        reasons = [_command_refusal(policy, command, protected) for command in commands]
        if any(reasons):
            # Half a plan can be worse than none.
            otherwise = "another command of the same plan is refused"
            refused += [
                f"{_shown(command)}: {reason or otherwise}"
                for command, reason in zip(commands, reasons, strict=True)
            ]
            commands = ()
    return Proposal(install, commands, tuple(refused))


def _shown(proposed: Mapping[str, Any] | Sequence[str]) -> str:
    if isinstance(proposed, Mapping):
        return clean(", ".join(f"{key}={value}" for key, value in proposed.items()), 200)
    return clean(shlex.join(proposed), 200)


def _command_refusal(policy: str, command: Sequence[str], protected: Sequence[str]) -> str:
    if policy != FULL:
        return f"the policy {policy} runs no commands"
    return refusal(command, protected)


def _install_refusal(
    policy: str, resource: Resource, proposed: Mapping[str, Any], model: type[Declaration] | None
) -> str:
    if policy not in (ALLOWLISTED, FULL):
        return f"the policy {policy} installs nothing"
    if model is None or not model.PROPOSABLE:
        return "nothing can be proposed for this kind"
    if resource.args.get(model.PROPOSABLE):
        return f"{model.PROPOSABLE} is declared; what git says is not replaced"
    if resource.policy.allow_become:
        return "it would run with privilege (allow_become): declare it yourself"
    return _wrong_value(proposed) or _wrong_declaration(resource, proposed, model)


def _wrong_value(proposed: Mapping[str, Any]) -> str:
    """Why a value is not one that may be proposed: the shipped model takes local paths and addresses from people."""
    if not proposed:
        return "it is empty"
    if "url" in proposed and not _DIGEST.fullmatch(str(proposed.get("sha256", ""))):
        return "an address needs its sha256"
    has_url = "url" in proposed
    reasons = (_wrong_part(key, value, has_url=has_url) for key, value in proposed.items())
    return next(filter(None, reasons), "")


def _wrong_part(key: str, value: Any, *, has_url: bool) -> str:
    if not isinstance(value, str):
        return f"{key} is no text"
    if key == "url":
        return "" if words.is_url(value, secure=True) else f"{value!r} is no plain https address"
    if has_url:
        return "" if words.is_member(value) else f"{value!r} is no path inside an archive"
    return "" if words.is_package(value) else f"{value!r} is no plain name of a package"


def _wrong_declaration(resource: Resource, proposed: Mapping[str, Any], model: type[Declaration]) -> str:
    """Why the kind's own model does not take it."""

    def unreadable(*_given: Any) -> NoReturn:
        raise OSError(0, "an analyzer has no files")

    try:
        declared = model.model_validate(
            {"name": resource.id.name, "nodes": resource.id.node, model.PROPOSABLE: dict(proposed)}
        )
        declared.resolve(Context(resource.id.node, {}, unreadable, unreadable))
    except ValidationError as error:
        first = error.errors()[0]
        return clean(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", 200)
    except FieldError as error:
        return clean(f"{'.'.join(map(str, error.path))}: {error}", 200)
    return ""
