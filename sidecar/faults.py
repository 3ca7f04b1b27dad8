"""The catalogue of faults a provider can commit, as scripts for the fake one.

Shared by `sidecar selftest` and the tests, so that what operators can check is what we check.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from email.utils import formatdate
from enum import StrEnum
from time import time

from sidecar import fake
from sidecar.fake import Script

_LONG_SECONDS = 3600.0


class Expect(StrEnum):
    """What the caller must get when another backend is healthy."""

    NEXT = "answered by the next backend"
    RETURNED = "returned as it is"
    WHOLE = "answered whole by the first backend"
    EXPLICIT = "explicit error in the stream"


@dataclass(frozen=True)
class Fault:
    """One fault. `script(streaming)` is what the faulty backend plays."""

    name: str
    expect: Expect
    script: Callable[[bool], Script]
    modes: tuple[bool, ...] = (False, True)


def _status(status: int, text: str = "no", **headers: str) -> Callable[[bool], Script]:
    return lambda _streaming: fake.error(status, text, **headers)


def _whole(streaming: bool) -> Script:  # noqa: FBT001 - the catalogue's own shape
    return fake.chat_stream() if streaming else fake.chat()


def _later(**changes: object) -> Callable[[bool], Script]:
    return lambda streaming: replace(_whole(streaming), **changes)  # type: ignore[arg-type]


def _cut(end: str) -> Script:
    """Two words, then the end without a finish."""
    return replace(fake.chat_stream(finish=None, done=False, usage=False), end=end, gap=0.01)


def _half(streaming: bool, end: str) -> Script:  # noqa: FBT001
    """Headers promise more than comes."""
    if streaming:
        return Script(content_type="text/event-stream", chunked=True, end=end)
    body = fake.chat().body[0]
    return Script(headers={"content-length": str(len(body))}, body=(body[:20],), end=end)


def _error_event(streaming: bool) -> Script:  # noqa: FBT001
    body = json.dumps({"error": {"message": "overloaded", "type": "server_error"}}).encode()
    if not streaming:
        return Script(body=(body,))
    return Script(body=(b"data: " + body + b"\n\n",), content_type="text/event-stream", chunked=True)


def _compressed(streaming: bool) -> Script:  # noqa: FBT001
    whole = _whole(streaming)
    packed = gzip.compress(b"".join(whole.body))
    return replace(whole, body=(packed[:30], packed[30:]), headers={"content-encoding": "gzip"})


def _split() -> Script:
    """Every byte in a write of its own: events and characters fall apart."""
    whole = b"".join(fake.chat_stream(("héllo ", "wörld 你好")).body)
    parts = tuple(whole[i : i + 7] for i in range(0, len(whole), 7))
    return Script(body=parts, content_type="text/event-stream", chunked=True)


def _usage_beside_choices() -> Script:
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    parts = (fake.chunk({"content": "Hello"}), fake.chunk({}, "stop", usage=usage), fake.DONE)
    return Script(body=parts, content_type="text/event-stream", chunked=True)


def _dated() -> Script:
    return fake.error(429, "no", retry_after=formatdate(time() + 45, usegmt=True))


def _unfinished() -> Script:
    return fake.chat_stream(finish=None, gap=0.02)


def _mid_error() -> Script:
    body = b'data: {"error":{"message":"exploded","type":"server_error"}}\n\n'
    return Script(
        body=(fake.chunk({"content": "Hel"}), body), content_type="text/event-stream", chunked=True, gap=0.01
    )


CATALOGUE: tuple[Fault, ...] = (
    Fault("429 without Retry-After", Expect.NEXT, _status(429)),
    Fault("429 with Retry-After in seconds", Expect.NEXT, _status(429, retry_after="45")),
    Fault("429 with Retry-After as a date", Expect.NEXT, lambda _s: _dated()),
    Fault("429 with insufficient quota", Expect.NEXT, _status(429, "insufficient_quota")),
    *(Fault(f"status {code}", Expect.NEXT, _status(code)) for code in (401, 402, 403, 500, 502, 503, 504, 529)),
    *(Fault(f"status {code}", Expect.RETURNED, _status(code)) for code in (400, 404, 413, 422)),
    Fault("a redirect", Expect.NEXT, _status(302, location="http://127.0.0.1:9/")),
    Fault("slow headers", Expect.NEXT, _later(wait=_LONG_SECONDS)),
    Fault("slow first token", Expect.NEXT, _later(first_gap=_LONG_SECONDS)),
    Fault("reset before headers", Expect.NEXT, _later(reset_before_headers=True)),
    Fault("reset after headers", Expect.NEXT, lambda s: _half(s, "reset")),
    Fault("closed after headers", Expect.NEXT, lambda s: _half(s, "close")),
    Fault("an error inside a 200", Expect.NEXT, _error_event),
    Fault("malformed JSON", Expect.NEXT, lambda s: replace(_whole(s), body=(b'data: {"a\n\n' if s else b'{"a',))),
    Fault("an HTML page under 200", Expect.NEXT, lambda _s: Script(body=(b"<html>",), content_type="text/html")),
    Fault("compressed though not asked", Expect.WHOLE, _compressed),
    Fault("split characters and events", Expect.WHOLE, lambda _s: _split(), (True,)),
    Fault("usage beside choices", Expect.WHOLE, lambda _s: _usage_beside_choices(), (True,)),
    Fault("no usage at all", Expect.WHOLE, lambda s: fake.chat_stream(usage=False) if s else fake.chat(usage=False)),
    Fault("no [DONE] after the finish reason", Expect.WHOLE, lambda _s: fake.chat_stream(done=False), (True,)),
    Fault("reset in mid-stream", Expect.EXPLICIT, lambda _s: _cut("reset"), (True,)),
    Fault("stall in mid-stream", Expect.EXPLICIT, lambda _s: _cut("stall"), (True,)),
    Fault("end without a finish reason", Expect.EXPLICIT, lambda _s: _cut("clean"), (True,)),
    Fault("[DONE] without a finish reason", Expect.EXPLICIT, lambda _s: _unfinished(), (True,)),
    Fault("last chunk left out", Expect.EXPLICIT, lambda _s: _cut("close"), (True,)),
    Fault("an error event in mid-stream", Expect.EXPLICIT, lambda _s: _mid_error(), (True,)),
)  # fmt: skip
