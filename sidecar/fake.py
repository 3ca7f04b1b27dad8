"""A fake provider on raw sockets, for `sidecar selftest` and the tests.

Web frameworks cannot send a reset, stall between two bytes, or leave out the last chunk;
this can. What it does is chosen by a `Script` per request, and everything that arrives is
written down.
"""

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

NATIVE = "native-model"
_HEAD_LIMIT = 2**20


@dataclass(frozen=True)
class Seen:
    """One request as it arrived. `at` is wall time in seconds."""

    at: float
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The decoded body."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Script:
    """What to answer. Parts of `body` are written one by one with `gap` seconds between.

    `end`: `clean` finishes the message, `reset` cuts with a RST, `close` just closes (so a
    chunked body lacks its last chunk), `stall` writes nothing more. `wait` delays the headers.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: tuple[bytes, ...] = ()
    content_type: str = "application/json"
    chunked: bool = False
    wait: float = 0.0
    first_gap: float = 0.0
    gap: float = 0.0
    end: str = "clean"
    reset_before_headers: bool = False


Chooser = Callable[[Seen], Script]


def chat(text: str = "hello", usage: bool = True, model: str = NATIVE) -> Script:  # noqa: FBT001, FBT002 - reads well where it is used
    """A whole chat completion."""
    answer: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
    }
    if usage:
        answer["usage"] = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return Script(body=(json.dumps(answer).encode(),))


def chunk(delta: Mapping[str, Any], finish: str | None = None, **extra: Any) -> bytes:
    """One event of a chat stream."""
    event = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": NATIVE,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        **extra,
    }
    return b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"


def usage_chunk() -> bytes:
    """The extra event with usage and no choices."""
    return chunk({}, choices=[], usage={"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15})


DONE = b"data: [DONE]\n\n"


def chat_stream(
    words: tuple[str, ...] = ("Hel", "lo"), *, usage: bool = True, finish: str | None = "stop", done: bool = True,
    **script: Any,
) -> Script:  # fmt: skip
    """A chat stream, whole unless told otherwise."""
    parts = [chunk({"role": "assistant", "content": ""}), *(chunk({"content": word}) for word in words)]
    if finish:
        parts.append(chunk({}, finish))
    if usage:
        parts.append(usage_chunk())
    if done:
        parts.append(DONE)
    return Script(body=tuple(parts), content_type="text/event-stream", chunked=True, **script)


def message_event(kind: str, **fields: Any) -> bytes:
    """One event of an Anthropic stream."""
    return f"event: {kind}\n".encode() + b"data: " + json.dumps({"type": kind, **fields}).encode() + b"\n\n"


def message(text: str = "hello") -> Script:
    """A whole Anthropic message."""
    answer = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": NATIVE,
        "content": [{"type": "text", "text": text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 10, "output_tokens": 5},
    }
    return Script(body=(json.dumps(answer).encode(),))


def message_stream(words: tuple[str, ...] = ("Hel", "lo"), *, whole: bool = True, **script: Any) -> Script:
    """An Anthropic stream; without its last two events when not `whole`."""
    start: dict[str, Any] = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": NATIVE, "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 10, "output_tokens": 1},
    }  # fmt: skip
    parts = [
        message_event("message_start", message=start),
        message_event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        message_event("ping"),
        *(
            message_event("content_block_delta", index=0, delta={"type": "text_delta", "text": w})
            for w in words
        ),
        message_event("content_block_stop", index=0),
    ]
    if whole:
        stop = {"stop_reason": "end_turn", "stop_sequence": None}
        parts += [
            message_event("message_delta", delta=stop, usage={"output_tokens": 5}),
            message_event("message_stop"),
        ]
    return Script(body=tuple(parts), content_type="text/event-stream", chunked=True, **script)


def error(status: int, text: str = "no", **headers: str) -> Script:
    """An error in OpenAI's shape; underscores in header names become dashes."""
    body = json.dumps({"error": {"message": text, "type": "x", "code": None}}).encode()
    return Script(status=status, body=(body,), headers={k.replace("_", "-"): v for k, v in headers.items()})


def default_script(seen: Seen) -> Script:
    """What a well-behaved provider would answer."""
    if seen.method == "GET":
        return Script(body=(b'{"object":"list","data":[]}',))
    asked = seen.json()
    streams = bool(asked.get("stream"))
    if seen.path.endswith("/messages/count_tokens"):
        return Script(body=(b'{"input_tokens":12}',))
    if seen.path.partition("?")[0].endswith("/messages"):
        return message_stream() if streams else message()
    if seen.path.endswith("/embeddings"):
        answer = {
            "object": "list", "model": NATIVE, "data": [{"object": "embedding", "index": 0, "embedding": [0.1, 0.2]}],
            "usage": {"prompt_tokens": 4, "total_tokens": 4},
        }  # fmt: skip
        return Script(body=(json.dumps(answer).encode(),))
    wants = bool((asked.get("stream_options") or {}).get("include_usage"))
    return chat_stream(usage=wants) if streams else chat()


class FakeProvider:
    """A listening provider; `choose` may be exchanged at any time."""

    def __init__(self, choose: Chooser = default_script) -> None:
        self.choose = choose
        self.seen: list[Seen] = []
        self.open = 0
        self.cut = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    @property
    def url(self) -> str:
        """The `api_base_url` of a backend here."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def posts(self) -> list[Seen]:
        """Model calls alone, without probes."""
        return [seen for seen in self.seen if seen.method == "POST"]

    async def start(self) -> None:
        """Listen on a free port of loopback."""
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", 0, limit=_HEAD_LIMIT, backlog=4096
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close everything."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.close()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.open += 1
        try:
            while (seen := await _read(reader)) is not None:
                self.seen.append(seen)
                if not await self._answer(self.choose(seen), reader, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            self.cut += 1
        finally:
            self.open -= 1
            self._writers.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError, OSError):
                await writer.wait_closed()

    async def _answer(
        self, script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Play a script; True when the connection may be used again."""
        if script.wait:
            await _until_left(reader, script.wait)
        if script.reset_before_headers:
            _reset(writer)
            return False
        writer.write(_head(script))
        for number, part in enumerate(script.body):
            delay = script.first_gap if number == 0 else script.gap
            if delay:
                await _until_left(reader, delay)
            writer.write(b"%x\r\n%b\r\n" % (len(part), part) if script.chunked else part)
            await writer.drain()
        if script.end == "reset":
            await asyncio.sleep(0.02)
            _reset(writer)
            return False
        if script.end == "stall":
            await _until_left(reader, 3600)
        if script.end == "clean" and script.chunked:
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        return script.end == "clean"


async def _until_left(reader: asyncio.StreamReader, seconds: float) -> None:
    """Wait, but notice at once when the other side has gone."""
    try:
        async with asyncio.timeout(seconds):
            if not await reader.read(1):
                raise ConnectionResetError("the caller left")
    except TimeoutError:
        return


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _head(script: Script) -> bytes:
    lines = [f"HTTP/1.1 {script.status} Status", f"content-type: {script.content_type}"]
    if script.chunked:
        lines.append("transfer-encoding: chunked")
    elif not any(name.lower() == "content-length" for name in script.headers):
        lines.append(f"content-length: {sum(map(len, script.body))}")
    lines += [f"{name}: {value}" for name, value in script.headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


async def _read(reader: asyncio.StreamReader) -> Seen | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
    }
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Seen(time.time(), method, path, headers, body)
