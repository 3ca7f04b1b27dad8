"""Server-sent events on their way to the caller: whole events only, and never a silent end.

`Relay` is pure: bytes in, bytes out. It holds back everything until the first token, so
that a backend failing before it can still be exchanged.
"""

import re
from dataclasses import dataclass

import msgspec

from sidecar.model import Dialect, Usage
from sidecar.payload import (
    BYTES_PER_TOKEN,
    Fields,
    encode,
    error_text,
    fields_of,
    is_error,
    text_of,
    usage_of,
    value,
)

MAX_EVENT_BYTES = 8 * 2**20
_EVENT_END = re.compile(rb"\r\n(?:\r\n|\n|\r)|\n(?:\r\n|\n|\r)|\r\r")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_DONE = b"[DONE]"
_RESPONSES_END = {"response.completed", "response.incomplete", "response.failed"}
_RESPONSES_PRELUDE = {"response.created", "response.in_progress", "response.queued"}
_MESSAGES_PRELUDE = {"message_start", "ping"}
_STRING = re.compile(rb'\s*:\s*"((?:[^"\\]|\\.)*)"')
_PROBE = "probe"
_PATIENCE = 8
_Path = tuple[str | int, ...]


class BrokenStream(ValueError):  # noqa: N818 - classified as a backend failure
    """The stream is an error, unreadable, or ended early."""


@dataclass(slots=True)
class Progress:
    """What has been seen of a stream."""

    token_seen: bool = False
    ended: bool = False
    usage: Usage | None = None
    text_bytes: int = 0
    sequence: int = 0


class _Mould:
    """An event apart from its one piece of text: the next that fits needs no parsing.

    A provider's events differ in the text alone. Whatever is a JSON string's inside between the
    same bytes means the same but for that text, so it is enough to read that string.
    """

    __slots__ = ("_head", "_least", "_out_head", "_out_tail", "_same", "_tail")

    def __init__(self, cast: tuple[bytes, bytes], out: tuple[bytes, bytes]) -> None:
        self._head, self._tail = cast
        self._out_head, self._out_tail = out
        self._same = cast == out
        self._least = len(self._head) + len(self._tail)

    def fill(self, event: bytes) -> tuple[bytes, int] | None:
        """What goes to the caller and the size of its text; None when the event does not fit."""
        head, tail = self._head, self._tail
        if not event.startswith(head) or not event.endswith(tail) or len(event) < self._least:
            return None
        inside = event[len(head) : -len(tail)]
        text = text_of(inside)
        if text is None:
            return None
        size = len(text) if text.isascii() else len(text.encode())
        return (event if self._same else self._out_head + inside + self._out_tail), size


def _around(event: bytes, path: _Path) -> tuple[bytes, bytes] | None:
    """The bytes before and after the string at a path. Another text is put there to see that nothing else changes."""
    name = encode(path[-1])
    at = event.find(name)
    found = _STRING.match(event, at + len(name)) if at >= 0 and b"\r" not in event else None
    if found is None:
        return None
    head, tail = event[: found.start(1)], event[found.end(1) :]
    before, after = value(_parse(event)[0]), value(_parse(head + _PROBE.encode() + tail)[0])
    try:
        holder = before
        for step in path[:-1]:
            holder = holder[step]
        holder[path[-1]] = _PROBE
    except (TypeError, KeyError, IndexError):
        return None
    return (head, tail) if before == after else None


class Relay:
    """Rewrites one stream; `feed` gives what may go to the caller now."""

    def __init__(self, dialect: Dialect, canonical: str, *, hide_usage: bool) -> None:
        self.seen = Progress()
        self._dialect = dialect
        self._model = msgspec.Raw(encode(canonical))
        self._model_bytes = bytes(self._model)
        self._hide_usage = hide_usage
        self._rest = b""
        self._held: list[bytes] = []
        self._finished: dict[int, bool] = {}
        self._mould: _Mould | None = None
        self._said: _Path | None = None
        self._patience = _PATIENCE

    def feed(self, chunk: bytes) -> bytes:
        """Take bytes from the backend. Raises BrokenStream for an error event or rubbish."""
        if self._mould is not None and not self._rest:
            filled = self._fill(self._mould, chunk)
            if filled is not None:
                return filled
        data = self._rest + chunk if self._rest else chunk
        events, self._rest = _split(data)
        if len(self._rest) > MAX_EVENT_BYTES:
            raise BrokenStream("an event of the stream is too long")
        out = [done for event in events if (done := self._event(event))]
        if self.seen.token_seen:
            if self._held:
                out = self._held + out
                self._held = []
            return b"".join(out)
        self._held += out
        return b""

    def end(self) -> bytes:
        """The backend closed the stream. Raises BrokenStream unless the answer is whole."""
        if self._rest.strip():
            # A last event without its blank line counts when it is readable as a whole.
            tail = self._event(self._rest + b"\n\n")
            self._rest = b""
        else:
            tail = b""
        if not self.seen.ended and self._whole():
            tail += self._terminator()
        elif not self._whole():
            raise BrokenStream("the stream ended without a finish reason")
        held, self._held = b"".join(self._held), []
        return held + tail

    def estimate(self, prompt: int) -> Usage:
        """What the stream reported, or a marked guess from sizes."""
        seen = self.seen.usage
        if seen is not None and (seen.completion or not self.seen.text_bytes):
            return seen
        return Usage(
            prompt=seen.prompt if seen else prompt,
            completion=-(-self.seen.text_bytes // BYTES_PER_TOKEN),
            cache_read=seen.cache_read if seen else 0,
            cache_write=seen.cache_write if seen else 0,
            estimated=True,
        )

    # -- one event ------------------------------------------------------------------

    def _fill(self, mould: _Mould, event: bytes) -> bytes | None:
        filled = mould.fill(event)
        if filled is None:
            return None
        self._patience = _PATIENCE
        self.seen.text_bytes += filled[1]
        return filled[0]

    def _event(self, event: bytes) -> bytes:
        if self._mould is not None:
            filled = self._fill(self._mould, event)
            if filled is not None:
                return filled
        self._said = None
        out = self._read(event)
        if out and self._patience:
            self._learn(event, out)
        return out

    def _learn(self, event: bytes, out: bytes) -> None:
        """Expect more like this one. It costs as much as reading three, so not for ever where no two are alike."""
        if self._said is None:
            return
        self._patience -= 1
        cast, shown = _around(event, self._said), _around(out, self._said)
        self._mould = _Mould(cast, shown) if cast is not None and shown is not None else None

    def _read(self, event: bytes) -> bytes:
        if event.startswith(b"data: ") and event.endswith(b"\n\n") and event.find(b"\n") == len(event) - 2:
            data, prefix = event[6:-2], b""
        else:
            parsed, prefix = _parse(event)
            if parsed is None:
                return event if self.seen.token_seen else b""
            data = parsed
        if data.strip() == _DONE:
            if not self._whole():
                raise BrokenStream("the stream ended without a finish reason")
            self.seen.ended = self.seen.token_seen = True
            return event
        try:
            fields = fields_of(data)
        except ValueError as error:
            raise BrokenStream(f"an event of the stream is not a JSON object: {error}") from None
        if is_error(fields):
            raise BrokenStream(f"an error event inside a 200: {error_text(fields)}")
        changed = self._look(fields)
        if changed is None:
            return b""
        if not changed:
            return event
        return prefix + b"data: " + encode(fields) + b"\n\n"

    def _look(self, fields: Fields) -> bool | None:
        """Learn from an event and rewrite its fields: True changed, None keep from the caller."""
        if self._dialect is Dialect.MESSAGES:
            return self._messages(fields)
        if self._dialect is Dialect.RESPONSES:
            return self._responses(fields)
        return self._choices(fields)

    def _rename(self, fields: Fields) -> bool:
        raw = fields.get("model")
        if raw is None or bytes(raw) == self._model_bytes:
            return False
        fields["model"] = self._model
        return True

    def _choices(self, fields: Fields) -> bool | None:
        changed = self._rename(fields)
        raw_usage = fields.get("usage")
        choices = fields.get("choices")
        raw_choices = b"[]" if choices is None else bytes(choices)
        empty = raw_choices.strip() == b"[]" or raw_choices == b"null"
        if raw_usage is not None:
            # Some providers repeat a growing usage in every chunk: the last one counts.
            self.seen.usage = usage_of(value(raw_usage)) or self.seen.usage
            if self._hide_usage:
                if empty and bytes(raw_usage) != b"null":
                    return None
                del fields["usage"]
                changed = True
        if not empty:
            self._deltas(raw_choices)
            if raw_usage is not None and bytes(raw_usage) != b"null":
                self._said = None
        return changed

    def _deltas(self, raw_choices: bytes) -> None:
        found = value(raw_choices)
        if not isinstance(found, list):
            raise BrokenStream("'choices' of an event is not a list")
        for choice in found:
            if not isinstance(choice, dict):
                raise BrokenStream("a choice of an event is not an object")
            index = choice.get("index") or 0
            self._finished[index] = self._finished.get(index, False) or bool(choice.get("finish_reason"))
            delta = choice.get("delta")
            if isinstance(delta, dict):
                parts = {name: part for name, part in delta.items() if name != "role" and part}
                path: _Path = ("choices", 0, "delta")
            else:
                text = choice.get("text")
                parts, path = ({"text": text} if text else {}), ("choices", 0)
            sent = sum(map(_size, parts.values()))
            self.seen.text_bytes += sent
            if sent or choice.get("finish_reason"):
                self.seen.token_seen = True
            if len(found) == 1 and not choice.get("finish_reason"):
                self._note(path, parts)

    def _note(self, path: _Path, parts: dict[str, object]) -> None:
        """Remember where the event's text stands, if it says nothing but one."""
        if len(parts) == 1:
            name, part = next(iter(parts.items()))
            if isinstance(part, str):
                self._said = (*path, name)

    def _messages(self, fields: Fields) -> bool:
        kind = value(fields.get("type"))
        changed = False
        if kind == "message_start":
            message = _object(fields.get("message"))
            changed = self._rename(message)
            if changed:
                fields["message"] = msgspec.Raw(encode(message))
            self._merge(usage_of(value(message.get("usage"))))
        elif kind == "content_block_delta":
            delta = value(fields.get("delta"))
            if isinstance(delta, dict):
                parts = {name: part for name, part in delta.items() if name != "type" and part}
                self.seen.text_bytes += sum(map(_size, parts.values()))
                self._note(("delta",), parts)
        elif kind == "message_delta":
            self._merge(usage_of(value(fields.get("usage"))))
            delta = value(fields.get("delta"))
            self._finished[0] = self._finished.get(0, False) or bool(
                isinstance(delta, dict) and delta.get("stop_reason")
            )
        elif kind == "message_stop":
            if not self._whole():
                raise BrokenStream("the stream ended without a stop reason")
            self.seen.ended = True
        if kind not in _MESSAGES_PRELUDE:
            self.seen.token_seen = True
        return changed

    def _merge(self, new: Usage | None) -> None:
        """Anthropic reports the prompt at the start and the completion at the end."""
        old = self.seen.usage
        if new is None or old is None:
            self.seen.usage = new or old
        else:
            self.seen.usage = Usage(
                max(old.prompt, new.prompt),
                max(old.completion, new.completion),
                max(old.cache_read, new.cache_read),
                max(old.cache_write, new.cache_write),
            )

    def _responses(self, fields: Fields) -> bool:
        kind = value(fields.get("type"))
        number = value(fields.get("sequence_number"))
        self.seen.sequence = number + 1 if isinstance(number, int) else self.seen.sequence + 1
        changed = False
        if "response" in fields:
            response = _object(fields["response"])
            if kind == "response.failed" and not self.seen.token_seen:
                raise BrokenStream(f"an error event inside a 200: {error_text(response)}")
            changed = self._rename(response)
            if changed:
                fields["response"] = msgspec.Raw(encode(response))
            self.seen.usage = usage_of(value(response.get("usage"))) or self.seen.usage
        if kind in _RESPONSES_END:
            self._finished[0] = self.seen.ended = True
        if kind not in _RESPONSES_PRELUDE:
            self.seen.token_seen = True
            self.seen.text_bytes += _size(value(fields.get("delta")))
        return changed

    def _whole(self) -> bool:
        return bool(self._finished) and all(self._finished.values())

    def _terminator(self) -> bytes:
        self.seen.ended = self.seen.token_seen = True
        if self._dialect is Dialect.MESSAGES:
            return b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
        return b"data: [DONE]\n\n"


def _object(raw: msgspec.Raw | None) -> Fields:
    try:
        return fields_of(bytes(raw)) if raw is not None else {}
    except ValueError as error:
        raise BrokenStream(f"an event of the stream is malformed: {error}") from None


def _size(part: object) -> int:
    if not part:
        return 0
    return len(part.encode()) if isinstance(part, str) else len(encode(part))


def _split(data: bytes) -> tuple[list[bytes], bytes]:
    """Whole events (with their blank line) and what is left."""
    if b"\r" not in data:
        parts = data.split(b"\n\n")
        rest = parts.pop()
        return [part + b"\n\n" for part in parts if part], rest
    events, at = [], 0
    for match in _EVENT_END.finditer(data):
        # A lone carriage return at the very end may be the first half of a line end.
        if match.end() == len(data) and data.endswith(b"\r"):
            break
        events.append(data[at : match.end()])
        at = match.end()
    return events, data[at:]


def _parse(event: bytes) -> tuple[bytes | None, bytes]:
    """An event's data (None for a comment or an event without any) and its other lines."""
    data, other = [], []
    for line in _LINE_END.split(event):
        if line.startswith(b"data:"):
            data.append(line[6:] if line[5:6] == b" " else line[5:])
        elif line:
            other.append(line + b"\n")
    return (b"\n".join(data) if data else None), b"".join(other)
