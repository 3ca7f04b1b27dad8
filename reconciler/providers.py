"""What the sidecar knows of the language-model providers: whether all of them rest, and how its clients fare.

Asked once per pass, and only where something is declared that has a use for it. A sidecar that is not there, does not
know us or says something strange makes nothing known: that is never taken for an outage.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from reconciler.desired.load import Desired
from reconciler.kinds.base import seconds
from reconciler.kinds.registry import kinds
from reconciler.model import Notice, ResourceId
from reconciler.settings import SidecarSettings

OUTAGE = "ProviderOutage"
MOST_BYTES = 4 << 20
_OK = 200
_IDLE = ("disabled", "error")


class NotKnownError(Exception):
    """The sidecar could not be asked, or its answer cannot be used; the message says why."""


@dataclass(frozen=True)
class Providers:
    """``outage``: whether every backend rests, None where nobody knows; ``clients`` by the name of their key."""

    outage: bool | None = None
    clients: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    detail: str = ""


def asked(settings: SidecarSettings, desired: Desired) -> Providers | None:
    """What the sidecar says now; None where none is configured, or nobody has a use for it."""
    if settings.url is None or not any(kinds()[rid.kind].ASKS_PROVIDERS for rid in desired.resources):
        return None
    try:
        return _Call(settings).providers()
    except NotKnownError as error:
        message = "%s does not say how the providers are: %s"
        logging.getLogger(__name__).warning(message, settings.url, error)
        return Providers(detail=str(error))


def overlaid(desired: Desired, providers: Providers | None) -> Desired:
    """The desired state, told what is known of the providers; so that a node's own comparison knows it, too."""
    if providers is None:
        return desired
    known = asdict(providers)
    found: dict[ResourceId, Any] = {
        rid: kinds()[rid.kind].with_providers(resource, known)
        if kinds()[rid.kind].ASKS_PROVIDERS
        else resource
        for rid, resource in desired.resources.items()
    }
    return replace(desired, resources=found)


def standing(settings: SidecarSettings, providers: Providers | None) -> dict[str, Notice | None]:
    """What is to be told of the fleet: the outage, its end, or nothing where nobody knows."""
    if settings.url is None:
        return {OUTAGE: None}
    if providers is None or providers.outage is None:
        return {}
    advice = "no agent is restarted for it, and it ends by itself; the sidecar says until when they rest"
    notice = Notice(OUTAGE, 4, f"every language-model provider rests: {providers.detail}", advice)
    return {OUTAGE: notice if providers.outage else None}


def judged(backends: Any, clients: Any) -> Providers:
    """What two answers of the admin API mean. Raises NotKnownError where they are not of its form."""
    try:
        states = {str(row["id"]): str(row["status"]) for row in backends["backends"]}
        found = {
            str(row["name"]): {
                "rate_429": row["recent"]["rate_429"],
                "seconds": row["recent"]["response_seconds"],
                "attempts": row["recent"]["attempts"],
            }
            for row in clients["clients"]
        }
    except (TypeError, KeyError) as error:
        raise NotKnownError(f"its answer lacks {error}") from None
    # What is switched off, or refused for its key, is no provider that could rest.
    taking_part = {name: state for name, state in states.items() if state not in _IDLE}
    resting = [name for name, state in taking_part.items() if state == "cooling"]
    outage = bool(taking_part) and len(resting) == len(taking_part)
    return Providers(outage, found, ", ".join(sorted(resting)))


class _Call:
    """Both questions, within one time limit."""

    def __init__(self, settings: SidecarSettings) -> None:
        self.base, self.token = str(settings.url), settings.token
        self.limit = seconds(settings.timeout)
        self.deadline = time.monotonic() + self.limit

    def providers(self) -> Providers:
        """The answer. Raises NotKnownError."""
        return judged(self._get("/backends"), self._get("/clients"))

    def _get(self, path: str) -> Any:
        import httpx  # costs a tenth of a second, and few fleets need it

        headers = {"authorization": f"Bearer {_secret(self.token)}"} if self.token else {}
        # What the environment says of proxies is for the outside.
        client = httpx.Client(timeout=self.limit, trust_env=False, follow_redirects=False)
        try:
            with client, client.stream("GET", f"{self.base}/api/admin{path}", headers=headers) as answer:
                body = self._body(answer)
                if answer.status_code != _OK:
                    raise NotKnownError(f"{path} answered {answer.status_code}")
        except httpx.HTTPError as error:
            raise NotKnownError(str(error) or type(error).__name__) from None
        try:
            return json.loads(body)
        except ValueError:
            raise NotKnownError(f"{path} answered something else than JSON") from None

    def _body(self, answer: Any) -> bytes:
        body = b""
        for chunk in answer.iter_bytes():
            body += chunk
            if len(body) > MOST_BYTES:
                raise NotKnownError("its answer does not end")
            if time.monotonic() > self.deadline:
                raise NotKnownError(f"it took longer than {self.limit:g} s")
        return body


def _secret(reference: str) -> str:
    name = reference.partition(":")[2]
    if reference.startswith("$env:"):
        found = os.environ.get(name, "").strip()
    else:
        try:
            found = Path(name).expanduser().read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise NotKnownError(f"cannot read the token in {name}: {error}") from None
    if not found or not found.isascii() or not found.isprintable():
        raise NotKnownError(f"{reference} holds no token")
    return found
