"""Request and answer bodies: only the fields we must know are decoded, the rest stays bytes.

`msgspec.Raw` keeps every other top-level value as the very bytes that came, so unknown
fields, big numbers and spacing pass through untouched at a fraction of a full decode.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from sidecar.model import Backend, Dialect, ModelMapping, Usage

Fields = dict[str, msgspec.Raw]
_decode_fields = msgspec.json.Decoder(Fields).decode
_decode_any = msgspec.json.Decoder().decode
_decode_text = msgspec.json.Decoder(str).decode
encode = msgspec.json.Encoder().encode
_TRUE = msgspec.Raw(b"true")
_INCLUDE_USAGE = msgspec.Raw(b'{"include_usage":true}')
BYTES_PER_TOKEN = 4


class BadRequest(ValueError):  # noqa: N818 - becomes the caller's 400
    """A body we cannot route; `param` is the field at fault, if one is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def fields_of(body: bytes) -> Fields:
    """Top-level fields of a JSON object as raw bytes. Raises ValueError for anything else."""
    try:
        return _decode_fields(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def value(raw: msgspec.Raw | bytes | None) -> Any:
    """The decoded value of a raw field; None when it is absent or unreadable."""
    if raw is None:
        return None
    try:
        return _decode_any(bytes(raw))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def text_of(inside: bytes) -> str | None:
    """The text whose JSON string has these bytes between its quotes; None when no string has."""
    try:
        return _decode_text(b'"%b"' % inside)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


@dataclass(frozen=True, slots=True)
class Payload:
    """A caller's request, as far as the proxy understands it."""

    body: bytes
    fields: Fields
    model: str
    stream: bool
    wants_usage: bool
    completion_limit: int | None

    @property
    def prompt_estimate(self) -> int:
        """Prompt tokens guessed from the size of the body."""
        return len(self.body) // BYTES_PER_TOKEN + 1

    def for_backend(self, backend: Backend, dialect: Dialect) -> tuple[bytes, bool]:
        """The body for one attempt, and whether we asked for usage on the caller's behalf."""
        mapping = backend.mapping(self.model)
        changes: Fields = {}
        if mapping is not None and mapping.native_id != self.model:
            changes["model"] = msgspec.Raw(encode(mapping.native_id))
        if mapping is not None and dialect is Dialect.CHAT:
            changes.update(self._reasoning(mapping))
        asks = (
            self.stream
            and backend.include_usage
            and not self.wants_usage
            and dialect in (Dialect.CHAT, Dialect.COMPLETIONS)
            and "stream_options" not in self.fields
        )
        if asks:
            changes["stream_options"] = _INCLUDE_USAGE
        if not changes:
            return self.body, False
        return encode({**self.fields, **changes}), asks

    def _reasoning(self, mapping: ModelMapping) -> Fields:
        if not mapping.reasoning or mapping.reasoning_effort is None or "reasoning_effort" in self.fields:
            return {}
        return {"reasoning_effort": msgspec.Raw(encode(mapping.reasoning_effort))}


def parse(body: bytes, *, streams: bool) -> Payload:
    """Read a request body. Raises BadRequest with the reason and the field."""
    try:
        fields = fields_of(body)
    except ValueError as error:
        raise BadRequest(f"the body is not a JSON object: {error}") from None
    model = value(fields.get("model"))
    if not isinstance(model, str) or not model:
        raise BadRequest("'model' must be a non-empty string naming a configured model", "model")
    stream = value(fields.get("stream"))
    if stream not in (None, True, False):
        raise BadRequest("'stream' must be true or false", "stream")
    options = value(fields.get("stream_options"))
    limit = value(
        fields.get("max_completion_tokens") or fields.get("max_tokens") or fields.get("max_output_tokens")
    )
    return Payload(
        body=body,
        fields=fields,
        model=model,
        stream=bool(stream) and streams,
        wants_usage=isinstance(options, dict) and bool(options.get("include_usage")),
        completion_limit=limit if isinstance(limit, int) and limit > 0 else None,
    )


def _count(found: dict[str, Any], *names: str) -> int:
    for name in names:
        number = found.get(name)
        if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
            return number
    return 0


def usage_of(found: Any) -> Usage | None:
    """Tokens from a `usage` object of any dialect; None when there is none."""
    if not isinstance(found, dict):
        return None
    details = found.get("prompt_tokens_details") or found.get("input_tokens_details") or {}
    cached = _count(details, "cached_tokens") if isinstance(details, dict) else 0
    if "cache_read_input_tokens" in found or "cache_creation_input_tokens" in found:
        # Anthropic counts cached tokens beside input_tokens, OpenAI within prompt_tokens.
        read = _count(found, "cache_read_input_tokens")
        written = _count(found, "cache_creation_input_tokens")
        return Usage(
            _count(found, "input_tokens") + read + written, _count(found, "output_tokens"), read, written
        )
    prompt = _count(found, "prompt_tokens", "input_tokens")
    completion = _count(found, "completion_tokens", "output_tokens")
    if not prompt and not completion:
        return None
    return Usage(prompt, completion, min(cached, prompt), 0)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole (not streamed) answer, ready for the caller."""

    body: bytes
    usage: Usage | None


class BrokenAnswer(ValueError):  # noqa: N818 - classified as a backend failure
    """A 200 that is no answer: unreadable, of the wrong type, or an error in disguise."""


def answer(body: bytes, canonical: str) -> Answer:
    """Check a 200's body and give the caller his model name back. Raises BrokenAnswer."""
    try:
        fields = fields_of(body)
    except ValueError as error:
        raise BrokenAnswer(f"the answer is not a JSON object: {error}") from None
    if is_error(fields):
        raise BrokenAnswer(f"an error inside a 200: {error_text(fields)}")
    usage = usage_of(value(fields.get("usage")))
    raw = fields.get("model")
    if raw is not None and value(raw) != canonical:
        fields["model"] = msgspec.Raw(encode(canonical))
        return Answer(encode(fields), usage)
    return Answer(body, usage)


def is_error(fields: Fields) -> bool:
    """Whether an object is an error in the shape of either dialect."""
    raw = fields.get("error")
    return (raw is not None and bytes(raw) != b"null") or value(fields.get("type")) == "error"


def error_text(fields: Fields) -> str:
    """What an error object says, shortened; never more than a line."""
    found = value(fields.get("error"))
    if isinstance(found, dict):
        found = found.get("message") or found.get("type") or found.get("code")
    return " ".join(str(found or "unnamed error").split())[:300]
