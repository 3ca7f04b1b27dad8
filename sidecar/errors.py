"""Errors in the caller's own dialect, and secrets kept out of them."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from sidecar.model import Api, Dialect
from sidecar.payload import encode

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_OPENAI_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    429: "rate_limit_error",
}
_SERVER_ERROR = 500
# What looks like a key even when it is none of ours: providers quote the caller's key.
_KEY_LIKE = re.compile(rb"\b(?:sk|pk|gsk|xai|key|sess)-[A-Za-z0-9_\-]{12,}|(?i:bearer)\s+[A-Za-z0-9._\-]{8,}")
_MASK = b"[redacted]"


@dataclass(eq=False)
class Refusal(Exception):  # noqa: N818 - an answer, not a fault
    """An answer the sidecar itself gives. `retry_after` in seconds from now."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def wait(self) -> int | None:
        """Whole seconds for `Retry-After`, at least one: half a second would come too early."""
        return None if self.retry_after is None else max(1, math.ceil(self.retry_after))


def body(refusal: Refusal, api: Api | None, request_id: str) -> bytes:
    """The error body in the dialect of the endpoint."""
    if api is Api.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(refusal.status, "api_error")
        error: dict[str, object] = {"type": kind, "message": refusal.message, "code": refusal.code}
        return encode({"type": "error", "error": error, "request_id": request_id})
    fallback = "server_error" if refusal.status >= _SERVER_ERROR else "invalid_request_error"
    return encode(
        {
            "error": {
                "message": refusal.message,
                "type": _OPENAI_TYPES.get(refusal.status, fallback),
                "param": refusal.param,
                "code": refusal.code,
            }
        }
    )


def event(dialect: Dialect, message: str, code: str, sequence: int = 0) -> bytes:
    """A failure inside a stream that has begun, in the stream's own dialect."""
    if dialect is Dialect.MESSAGES:
        shown = {"type": "error", "error": {"type": "api_error", "message": message, "code": code}}
        return b"event: error\ndata: " + encode(shown) + b"\n\n"
    if dialect is Dialect.RESPONSES:
        failed = {
            "type": "error",
            "code": code,
            "message": message,
            "param": None,
            "sequence_number": sequence,
        }
        return b"event: error\ndata: " + encode(failed) + b"\n\n"
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    return b"data: " + encode({"error": error}) + b"\n\n"


def redact(text: bytes, secrets: Iterable[str] = ()) -> bytes:
    """The text without our keys and without anything that looks like one."""
    for secret in secrets:
        if secret:
            text = text.replace(secret.encode(), _MASK)
    return _KEY_LIKE.sub(_MASK, text)


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """The same for text."""
    return redact(text.encode(errors="replace"), secrets).decode(errors="replace")
