"""Backends declared in a YAML file: read again when it changes, refused as a whole when wrong."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sidecar.addresses import AddressRefused, check_url
from sidecar.model import Api, Backend, Source
from sidecar.settings import Settings


class FileError(ValueError):
    """What is wrong with the file, with the place in it."""


class BackendsFile:
    """The file's backends. A wrong edit keeps the last good ones and sets `error`."""

    def __init__(self, path: Path | None, env: Mapping[str, str], allowed: tuple[str, ...]) -> None:
        self.path = path
        self.backends: list[Backend] = []
        self.error = ""
        self._env = env
        self._allowed = allowed
        self._seen: Any = None

    def load(self) -> bool:
        """Read when changed (key files included); True when something is different now."""
        if self.path is None:
            return False
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        self._seen = stamp
        before = (self.backends, self.error)
        try:
            self.backends = read(self.path, self._env, self._allowed)
            self.error = ""
        except (FileError, OSError) as error:
            self.error = str(error)
        return before != (self.backends, self.error)

    def _stamp(self) -> Any:
        """A key file can change while the list stays: its content counts too."""
        if self.path is None:
            return None
        try:
            text = self.path.read_bytes()
        except OSError as error:
            return str(error)
        keys = []
        for line in text.decode(errors="replace").splitlines():
            name, _, value = line.strip(" -{},").partition("api_key_file:")
            if value and not name.strip():
                try:
                    keys.append(Path(value.strip(" \"'{},")).expanduser().read_bytes())
                except OSError as error:
                    keys.append(str(error).encode())
        return text, tuple(keys)


def read(path: Path, env: Mapping[str, str], allowed: tuple[str, ...] = ()) -> list[Backend]:
    """All backends of a file. Raises FileError naming the file, the backend and the field."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise FileError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    listed = document.get("backends") if isinstance(document, dict) else document
    if not isinstance(listed, list):
        raise FileError(f"{path}: expected a list under 'backends:'")
    found: dict[str, Backend] = {}
    for number, entry in enumerate(listed, start=1):
        backend = _backend(path, number, entry, env, allowed)
        if backend.id in found:
            raise FileError(f"{path}: backend {number}: the id {backend.id!r} is used twice")
        found[backend.id] = backend
    return list(found.values())


def _backend(
    path: Path, number: int, entry: Any, env: Mapping[str, str], allowed: tuple[str, ...]
) -> Backend:
    if not isinstance(entry, dict):
        raise FileError(f"{path}: backend {number}: expected fields like 'id:' and 'api_base_url:'")
    fields = dict(entry)
    place = f"{path}: backend {number} ({fields.get('id', 'without id')})"
    if "api_key" in fields:
        raise FileError(f"{place}: 'api_key' does not belong in a file; use api_key_env or api_key_file")
    fields["api_key"] = _key(place, fields.pop("api_key_env", None), fields.pop("api_key_file", None), env)
    fields.setdefault("name", fields.get("id", ""))
    fields["source"] = Source.DESIRED
    try:
        backend = Backend.model_validate(fields)
        check_url(backend.api_base_url, allowed)
    except ValidationError as error:
        problem = error.errors()[0]
        raise FileError(f"{place}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except AddressRefused as refused:
        raise FileError(f"{place}: api_base_url {refused}") from None
    return backend


def _key(place: str, variable: Any, file: Any, env: Mapping[str, str]) -> str:
    if variable and file:
        raise FileError(f"{place}: give api_key_env or api_key_file, not both")
    if variable:
        if not env.get(str(variable)):
            raise FileError(f"{place}: api_key_env: the environment has no {variable}")
        return env[str(variable)].strip()
    if file:
        try:
            return Path(os.path.expanduser(str(file))).read_text(encoding="utf-8").strip()  # noqa: PTH111 - keeps the text for errors
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{place}: api_key_file: {error}") from None
    return ""


def from_v1(settings: Settings) -> list[Backend]:
    """The one backend of an installation of V1; it exists as long as its variables are set."""
    if not settings.v1_upstream:
        return []
    url = settings.v1_upstream
    try:
        check_url(url, settings.private_networks)
    except AddressRefused as refused:
        raise FileError(f"SIDECAR_UPSTREAM {refused}") from None
    anthropic = "anthropic" in url.lower()
    return [
        Backend(
            id="v1",
            name="V1 upstream",
            api_base_url=url,
            api_key=settings.v1_api_key,
            api=Api.ANTHROPIC if anthropic else Api.OPENAI,
            rpm_limit=settings.rate_rpm,
            timeout_seconds=settings.request_timeout_seconds,
            source=Source.ENV,
        )
    ]
