"""Values that stand elsewhere: ``{$var: NAME}``, ``{$env: NAME}``, ``{$file: PATH}``.

A desired value is never a template: ``{{ }}`` in it stays what it is. Where a value differs per site or
node, or is a secret, it is referred to.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reconciler.desired.places import Path_, suggestion
from reconciler.inventory import BrokenVariable, holds_vaulted

KEYS = {
    "$var": "a variable of the node, from the inventory",
    "$secret": "the same, where the variable is a secret",
    "$env": "a secret from the controller's environment",
    "$file": "a secret from a file on the controller, less one newline at its end",
}


def read_file(directory: Path, name: str) -> bytes:
    """The bytes of a file named relative to the desired state. Raises OSError, also for an impossible name."""
    try:
        return (directory / Path(name).expanduser()).read_bytes()
    except (ValueError, RuntimeError) as error:  # NUL in the name; ~NOBODY
        raise OSError(errno.EINVAL, str(error)) from None


def used(value: Any) -> bool:
    """Whether a reference stands anywhere inside."""
    if isinstance(value, Mapping):
        return _is_reference(value) or any(used(item) for item in value.values())
    return isinstance(value, list) and any(used(item) for item in value)


def _is_reference(value: Mapping[str, Any]) -> bool:
    return len(value) == 1 and next(iter(value)).startswith("$")


class Resolver:
    """Resolves the references of one entry for one node; what cannot be resolved is in ``problems``."""

    def __init__(self, node: str, variables: Mapping[str, Any], directory: Path) -> None:
        self.node, self.variables, self.directory = node, variables, directory
        self.secret = False
        self.problems: list[tuple[Path_, str, str]] = []

    def resolve(self, value: Any, path: Path_ = ()) -> Any:
        """The same structure with every reference replaced by its value."""
        if isinstance(value, Mapping):
            if _is_reference(value):
                key, name = next(iter(value.items()))
                return self._value(key, name, path)
            return {key: self.resolve(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.resolve(item, (*path, index)) for index, item in enumerate(value)]
        return value

    def _value(self, key: str, name: Any, path: Path_) -> Any:
        if key not in KEYS:
            return self._problem(path, f"unknown reference {key!r}", suggestion(key, list(KEYS)))
        if not isinstance(name, str):
            return self._problem(path, f"{key} takes a name", "")
        if key == "$var":
            return self._variable(name, path)
        self.secret = True
        if key == "$secret":
            return self._variable(name, path)
        return self._environment(name, path) if key == "$env" else self._file(name, path)

    def _variable(self, name: str, path: Path_) -> Any:
        value: Any = self.variables
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                known = [key for key in self.variables if not key.startswith("ansible_")]
                message = f"the node {self.node} has no variable {name!r}"
                return self._problem(path, message, suggestion(name, known))
            value = value[part]
        self.secret |= holds_vaulted(value)
        if isinstance(value, BrokenVariable):
            return self._problem(path, str(value), "")
        return value

    def _environment(self, name: str, path: Path_) -> Any:
        if name not in os.environ:
            hint = "set it where the reconciler runs, or refer to a file: {$file: PATH}"
            return self._problem(path, f"the environment has no {name}", hint)
        return os.environ[name]

    def _file(self, name: str, path: Path_) -> Any:
        try:
            return read_file(self.directory, name).decode("utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
            return self._problem(path, f"cannot read {name!r}: {reason}", "")

    def _problem(self, path: Path_, message: str, hint: str) -> None:
        self.problems.append((path, message, hint))
