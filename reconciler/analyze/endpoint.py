"""An OpenAI-compatible endpoint. The only importer of httpx, imported when an endpoint is configured."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from reconciler.analyze.answer import FORMAT, MOST_BYTES, Unavailable, clean, parse
from reconciler.analyze.prompt import Prompt
from reconciler.model import Analysis

_SCHEMA = dict(name="analysis", schema=FORMAT, strict=False)  # noqa: C408 - as a literal, one key is a kind's name
# Some endpoints refuse what they do not know: then the next weaker form is asked for, and remembered.
_FORMS: tuple[dict[str, Any], ...] = (
    {"temperature": 0, "response_format": {"type": "json_schema", "json_schema": _SCHEMA}},
    {"temperature": 0, "response_format": {"type": "json_object"}},
    {},
)


class Endpoint:
    """Asks ``POST {base}/chat/completions``."""

    def __init__(self, base: str, model: str, api_key: str | None) -> None:
        """``api_key`` is a reference, read anew for each call: keys are rotated."""
        self.base, self.model, self.api_key = base, model, api_key
        self.name = f"endpoint {base}"
        self._form = 0

    def ask(self, prompt: Prompt, limit: float) -> Analysis:
        """The judgement. Raises Unavailable, after ``limit`` seconds at the latest."""
        call = _Call(self.base, _headers(self.api_key), time.monotonic() + limit, limit)
        for number in range(self._form, len(_FORMS)):
            status, body = call.post(self._request(prompt, _FORMS[number]))
            if status == httpx.codes.BAD_REQUEST and number + 1 < len(_FORMS):
                continue
            if status != httpx.codes.OK:
                raise Unavailable(f"it answered {status}: {clean(body.decode(errors='replace'), 200)}")
            self._form = number
            return parse(_content(body), self.name, prose=False)
        raise Unavailable(
            "it refuses every form of the question"
        )  # pragma: no cover - the last form is judged above

    def _request(self, prompt: Prompt, form: dict[str, Any]) -> dict[str, Any]:
        messages = [
            {"role": "system", "content": prompt.instructions},
            {"role": "user", "content": prompt.data},
        ]
        return {"model": self.model, "messages": messages, "stream": False, **form}


class _Call:
    """One call with one deadline over connecting, every byte of the answer, and asking again in another form."""

    def __init__(self, base: str, headers: dict[str, str], deadline: float, limit: float) -> None:
        self.base, self.headers, self.deadline, self.limit = base, headers, deadline, limit
        self._socket: socket.socket | None = None
        self._cut = False

    def post(self, content: dict[str, Any]) -> tuple[int, bytes]:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise self._too_slow()
        # The client's timeouts count from the last byte; an endpoint that drips would never run into one.
        watch = threading.Timer(left, self._hang_up)
        watch.daemon = True
        watch.start()
        try:
            # What the environment says of proxies is for the outside; an endpoint on this machine is reached directly.
            with httpx.Client(timeout=left, trust_env=not _is_local(self.base)) as client:
                return self._read(client, content)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            if self._cut or isinstance(error, httpx.TimeoutException):
                raise self._too_slow() from None
            reason = clean(str(error), 200) or type(error).__name__
            raise Unavailable(f"it cannot be asked: {reason}") from None
        finally:
            watch.cancel()

    def _read(self, client: httpx.Client, content: dict[str, Any]) -> tuple[int, bytes]:
        body = bytearray()
        url, extensions = f"{self.base}/chat/completions", {"trace": self._trace}
        with client.stream(
            "POST", url, json=content, headers=self.headers, extensions=extensions
        ) as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                # Compressed, a small answer can unpack to more than there is memory.
                raise Unavailable("it compresses its answer though it was asked not to")
            for chunk in response.iter_raw(65_536):
                body += chunk
                if len(body) > MOST_BYTES:
                    raise Unavailable(f"the answer is longer than {MOST_BYTES} bytes")
                if time.monotonic() > self.deadline:
                    raise self._too_slow()
            return response.status_code, bytes(body)

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        """Remembers the socket, to be able to hang up from outside."""
        if event.startswith("connection.") and event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")
            if self._cut:
                self._hang_up()

    def _hang_up(self) -> None:
        self._cut = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _too_slow(self) -> Unavailable:
        return Unavailable(f"it did not answer within {self.limit:g} s")


def _headers(reference: str | None) -> dict[str, str]:
    plain = {"accept-encoding": "identity"}
    if reference is None:
        return plain
    key = _key(reference)
    if not key.isascii() or not key.isprintable():
        raise Unavailable(f"{reference} has characters that no key has")
    return {**plain, "authorization": f"Bearer {key}"}


def _key(reference: str) -> str:
    scheme, _, name = reference.partition(":")
    if scheme == "$env":
        key = os.environ.get(name, "")
        if not key:
            raise Unavailable(f"the environment has no {name}")
        return key
    try:
        key = Path(name).expanduser().read_text("utf-8").strip()
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise Unavailable(f"cannot read the key in {name}: {reason}") from None
    if not key:
        raise Unavailable(f"the file {name} is empty")
    return key


def _is_local(base: str) -> bool:
    host = urlsplit(base).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _content(body: bytes) -> str:
    """The text of the first choice, where it is whole."""
    try:
        choices = json.loads(body)["choices"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Unavailable("what it answered is no chat completion") from None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Unavailable("it answered without a choice")
    reason = choices[0].get("finish_reason")
    if reason not in ("stop", None):
        raise Unavailable(f"the answer is not whole: it ended with {clean(str(reason), 40)}")
    message = choices[0].get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str):
        raise Unavailable("it answered without a text")
    return content
