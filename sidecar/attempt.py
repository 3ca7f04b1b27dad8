"""One attempt at one backend: phases with their timeouts, and what its end does to the lane."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from sidecar import errors
from sidecar.access import Client
from sidecar.addresses import base_of
from sidecar.lane import Grant
from sidecar.model import Api, Dialect, Endpoint, Usage
from sidecar.payload import Answer, BrokenAnswer, Payload, answer
from sidecar.records import Key, hour_of
from sidecar.routing import Decision, Way, Why
from sidecar.stream import BrokenStream, Relay
from sidecar.upstream import Reply, UpstreamError
from sidecar.verdict import Verdict, hints, of_status, quota_resets_in, retry_after
from sidecar.watchdog import Watchdog
from sidecar.wire import Caller, Send, caller_headers, provider_headers, send_body

if TYPE_CHECKING:
    from sidecar.proxy import Proxy

_ERROR_BODY_BYTES = 2**20
_LEAST_SECONDS = 0.001
_TOO_MANY = 429
_GENERATING = {Dialect.CHAT, Dialect.COMPLETIONS, Dialect.RESPONSES, Dialect.MESSAGES, Dialect.EMBEDDINGS}
CALLER_GONE = 499
NOTHING = Usage()
_WRITING = "writing to the caller"


class Journal(Protocol):
    """Hears what must outlive the process or wake an admin."""

    def cooled(self, backend_id: str, reason: str, level: int, until: float, now: float) -> None:
        """A cooldown began or grew."""
        ...

    def quarantined(self, backend_id: str, detail: str, now: float) -> None:
        """A provider refused a key."""
        ...

    def ejected(self, backend_id: str, until: float, now: float) -> None:
        """A breaker opened."""
        ...

    def spent(self, client: Client, dollars: float, now: float) -> None:
        """A client's request has cost this much."""
        ...


@dataclass(slots=True)
class Call:
    """A caller's request on its way through attempts."""

    endpoint: Endpoint
    payload: Payload
    client: Client
    request_id: str
    headers: dict[bytes, bytes]
    query_string: str
    began: float
    deadline: float
    send: Send
    caller: Caller
    debug: bool
    attempts: int = 0
    tried: frozenset[str] = frozenset()
    trail: list[str] = field(default_factory=list)
    last_reasons: tuple[tuple[str, Why], ...] = ()
    committed: bool = False
    upstream_seconds: float = 0.0

    def note(self, decision: Decision, grant: Grant | None) -> None:
        """Write the decision into the trail: who was passed over and why."""
        self.last_reasons = decision.reasons
        if decision.way is not Way.POOL:
            self.trail.append(f"way: {decision.way.value}")
        chosen = grant.lane.backend.id if grant is not None else ""
        for name, why in decision.reasons:
            if name != chosen and why is not Why.OK and why is not Why.TRIED:
                self.trail.append(f"{name}: {why.value}")

    def own_headers(self) -> list[tuple[bytes, bytes]]:
        """Headers every answer carries."""
        out = [(b"x-request-id", self.request_id.encode())]
        if self.debug:
            out.append((b"x-sidecar-trail", "; ".join(self.trail).encode("latin-1", "replace")[:4000]))
        return out


@dataclass(slots=True)
class Ended:
    """How an attempt ended. `answered`: the caller has an answer, good or explicitly bad."""

    verdict: Verdict
    status: int
    detail: str = ""
    answered: bool = False
    headers: Mapping[str, str] | None = None
    usage: Usage = NOTHING
    backend_id: str = ""
    pool: str = ""
    seconds: float = 0.0
    ttft: float | None = None
    cost: float = 0.0


class Broken(Exception):  # noqa: N818 - caught in this file
    """The attempt failed in a way that counts against the backend."""


class CallerSlow(Exception):  # noqa: N818 - caught in this file
    """The caller takes nothing for too long."""


class Attempt:
    """Runs once. The caller's cancellation passes through after the books are settled."""

    def __init__(self, call: Call, grant: Grant, proxy: "Proxy") -> None:
        self.call = call
        self.grant = grant
        self.proxy = proxy
        self.backend = grant.lane.backend
        self.sent = False
        self.ttft: float | None = None
        self.relay: Relay | None = None
        self._out = b""
        self._phase = "connect"
        self._loop = proxy.loop
        self._timer = Watchdog(self._loop, 0.0)
        self._end = 0.0

    async def run(self) -> Ended:
        """The attempt. Raises only CancelledError, with everything settled."""
        try:
            ended = await self._exchange()
        except asyncio.CancelledError:
            gone = Ended(Verdict.OK, CALLER_GONE, "the caller left", usage=self._partial(), answered=True)
            self._settle(gone, gone=True)
            raise
        except CallerSlow:
            # Nobody reads any more. Not the backend's fault: what was used is booked, no more.
            ended = Ended(
                Verdict.OK, CALLER_GONE, "the caller stopped reading", usage=self._partial(), answered=True
            )
            self._settle(ended, gone=True)
            return ended
        except Broken as broken:
            ended = Ended(Verdict.FAILED, 502, str(broken), usage=self._partial())
            if self.call.committed:
                self._settle(ended)
                return await self._cut(ended)
        self._settle(ended)
        return ended

    # -- the exchange -----------------------------------------------------------------

    async def _exchange(self) -> Ended:
        hot = self.proxy.fleet.hot
        now, loop = self.proxy.clock.now(), self._loop
        self._end = loop.time() + max(_LEAST_SECONDS, self.call.deadline - now)
        body, asks = self.call.payload.for_backend(self.backend, self.call.endpoint.dialect)
        reply: Reply | None = None
        try:
            self._timer.set(min(self._end, loop.time() + hot.connect_timeout_seconds))
            with self._timer:
                reply = await self.proxy.upstream.send(
                    self._url(), provider_headers(self.call.headers, self.backend), body, self._left
                )
                return await self._receive(reply, hide_usage=asks)
        except TimeoutError:
            if self._phase == _WRITING:
                raise CallerSlow from None
            raise Broken(f"timed out: {self._phase}") from None
        except UpstreamError as error:
            raise Broken(f"{self._phase}: {error}" if self._phase == "connect" else str(error)) from None
        except (BrokenStream, BrokenAnswer) as error:
            raise Broken(str(error)) from None
        finally:
            if reply is not None:
                reply.close()

    def _url(self) -> str:
        base = base_of(self.backend.api_base_url, anthropic=self.backend.api is Api.ANTHROPIC)
        query = self.call.query_string
        return f"{base}{self.call.endpoint.suffix}?{query}" if query else base + self.call.endpoint.suffix

    def _left(self) -> None:
        """The request leaves now: it counts from here, and the wait for headers begins."""
        self.sent = True
        self.grant.lane.sent(self.grant, self.proxy.clock.now())
        self._until("response headers", self.backend.timeout_seconds)

    def _until(self, phase: str, seconds: float) -> None:
        self._phase = phase
        at = self._loop.time() + seconds
        self._timer.set(min(self._end, at))

    async def _receive(self, reply: Reply, *, hide_usage: bool) -> Ended:
        now = self.proxy.clock.now()
        learned = hints(reply.headers, now)
        if learned is not None:
            self.grant.lane.hints = learned
        if reply.status != 200:  # noqa: PLR2004 - anything else is read whole and classified
            return await self._refused(reply)
        kind = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
        if self.call.payload.stream:
            if kind != "text/event-stream":
                raise Broken(await self._unexpected(reply, kind))
            return await self._stream(reply, hide_usage=hide_usage)
        if kind not in ("application/json", ""):
            raise Broken(f"wrong content type {kind!r} under status 200")
        self._phase = "the whole answer"
        body = await reply.read(self.proxy.fleet.hot.max_answer_bytes)
        return await self._whole(reply, answer(body, self.call.payload.model))

    async def _unexpected(self, reply: Reply, kind: str) -> str:
        """A stream was asked for and something else came: the reason may stand in it."""
        body = await reply.read(_ERROR_BODY_BYTES)
        if kind == "application/json":
            answer(body, self.call.payload.model)
        return f"wrong content type {kind!r} where a stream was asked for"

    async def _whole(self, reply: Reply, whole: Answer) -> Ended:
        usage = whole.usage
        if usage is None:
            guess = len(whole.body) // 4 if self.call.endpoint.dialect in _GENERATING else 0
            usage = Usage(self.call.payload.prompt_estimate, guess, estimated=True)
        ended = Ended(Verdict.OK, reply.status, answered=True, headers=reply.headers, usage=usage)
        await self._give(reply, whole.body, b"application/json")
        return ended

    async def _give(self, reply: Reply, body: bytes, content_type: bytes) -> None:
        self._end = float("inf")
        self._until(_WRITING, self.proxy.fleet.hot.caller_write_timeout_seconds)
        self.call.committed = True
        self.call.trail.append(f"answered by {self.backend.id}")
        headers = [*caller_headers(reply.headers), *self.call.own_headers()]
        await send_body(self.call.send, reply.status, body, headers, content_type)

    async def _refused(self, reply: Reply) -> Ended:
        body = await reply.read(_ERROR_BODY_BYTES)
        verdict = of_status(reply.status, body)
        if verdict is Verdict.OK:
            raise Broken(f"status {reply.status} is no answer to this request")
        secrets = [self.backend.api_key]
        shown = errors.redact(body, secrets)
        detail = f"{reply.status} {' '.join(shown[:200].decode(errors='replace').split())}"
        ended = Ended(verdict, reply.status, detail, headers=reply.headers)
        if verdict is Verdict.RETURN:
            ended.answered = True
            kind = reply.headers.get("content-type", "application/json").encode("latin-1", "replace")
            await self._give(reply, shown, kind)
        return ended

    # -- streams ------------------------------------------------------------------------

    async def _stream(self, reply: Reply, *, hide_usage: bool) -> Ended:
        hot = self.proxy.fleet.hot
        relay = self.relay = Relay(self.call.endpoint.dialect, self.call.payload.model, hide_usage=hide_usage)
        self._until("first token", hot.first_token_timeout_seconds)
        while not relay.seen.ended:
            over = await reply.pump(self._take)
            if over and not relay.seen.ended:
                self._out += relay.end()
            if relay.seen.token_seen:
                if not self.call.committed:
                    await self._open_stream(reply)
                self._until(_WRITING, hot.caller_write_timeout_seconds)
                out, self._out = self._out, b""
                await self.call.send(
                    {"type": "http.response.body", "body": out, "more_body": not relay.seen.ended}
                )
                self._until("next chunk", hot.idle_timeout_seconds)
        # Reading on to the end lets the connection be used again; the answer is whole already.
        await _drain(reply)
        return Ended(
            Verdict.OK,
            reply.status,
            answered=True,
            headers=reply.headers,
            usage=relay.estimate(self.call.payload.prompt_estimate),
        )

    def _take(self, data: bytes) -> bool:
        """Bytes of a stream, straight from the connection; True calls the task.

        Most chunks go on from here: waking the task for each would cost as much again. It is
        needed for the first token, for the end, and while the caller does not keep up.
        """
        relay, caller = self.relay, self.call.caller
        if relay is None:
            return True
        out = relay.feed(data)
        if not relay.seen.token_seen:
            return False
        if relay.seen.ended or not self.call.committed or caller.slow():
            self._out += out
            return True
        if out:
            caller.chunk(out)
        self._until("next chunk", self.proxy.fleet.hot.idle_timeout_seconds)
        return False

    async def _open_stream(self, reply: Reply) -> None:
        self._end = self._loop.time() + self.proxy.fleet.hot.stream_total_seconds
        self.ttft = self.proxy.clock.now() - self.call.began
        self.call.committed = True
        self.call.trail.append(f"answered by {self.backend.id}")
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            *caller_headers(reply.headers),
            *self.call.own_headers(),
        ]
        await self.call.send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _cut(self, ended: Ended) -> Ended:
        """Say so in the stream's dialect and end without a terminator: an explicit failure."""
        sequence = self.relay.seen.sequence if self.relay else 0
        message = errors.redact_text(f"the answer broke off: {ended.detail}", [self.backend.api_key])
        if self.relay is not None:
            last = errors.event(self.call.endpoint.dialect, message, "upstream_error", sequence)
            await self.call.send({"type": "http.response.body", "body": last, "more_body": True})
        ended.answered = True
        return ended

    # -- the end --------------------------------------------------------------------------

    def _partial(self) -> Usage:
        """What an attempt without a whole answer used: nothing, unless it had begun to speak."""
        if not self.sent or self.relay is None:
            return Usage()
        return self.relay.estimate(self.call.payload.prompt_estimate)

    def _settle(self, ended: Ended, *, gone: bool = False) -> None:
        """Book the attempt and let its end act on the lane."""
        now = self.proxy.clock.now()
        lane, grant = self.grant.lane, self.grant
        if not self.sent:
            lane.give_back(grant, now)
            self.proxy.fleet.wake()
        else:
            if gone and self.relay is None and self.call.endpoint.dialect in _GENERATING:
                # The provider has the prompt and is working on it: count at least that.
                ended.usage = Usage(self.call.payload.prompt_estimate, 0, estimated=True)
            lane.settle(grant, ended.usage.total, now)
            if grant.probe or grant.reservation is not None:
                self.proxy.fleet.wake()
        if not gone:
            ended.detail = errors.redact_text(ended.detail, [self.backend.api_key])
            self._judge(ended, now)
        self._book(ended, now)

    def _judge(self, ended: Ended, now: float) -> None:
        lane, grant, journal = self.grant.lane, self.grant, self.proxy.journal
        lane.count.last_status = ended.status
        if grant.generation != lane.generation:
            return
        headers = ended.headers or {}
        verdict = ended.verdict
        if verdict is Verdict.OK:
            lane.cooldown = lane.cooldown.success(grant.at, now)
            lane.breaker.success(grant.at, now)
        if verdict in (Verdict.OK, Verdict.RETURN):
            return
        lane.count.last_error = ended.detail
        if verdict is Verdict.RATE_LIMITED and grant.emergency is None:
            before = lane.cooldown
            lane.cooldown = before.hit(grant.at, now, lane.policy, retry_after(headers, now))
            if lane.cooldown.until != before.until:
                journal.cooled(lane.backend.id, "429", lane.cooldown.level, lane.cooldown.until, now)
        elif verdict is Verdict.QUOTA:
            lane.cooldown = lane.cooldown.exhausted(now, lane.policy, quota_resets_in(headers, now))
            journal.cooled(lane.backend.id, "quota", lane.cooldown.level, lane.cooldown.until, now)
        elif verdict is Verdict.KEY and not lane.quarantine:
            lane.quarantine = ended.detail
            journal.quarantined(lane.backend.id, ended.detail, now)
        elif verdict is Verdict.FAILED and lane.breaker.failure(grant.at, now):
            journal.ejected(lane.backend.id, lane.breaker.until, now)

    def _book(self, ended: Ended, now: float) -> None:
        call, lane = self.call, self.grant.lane
        ended.backend_id, ended.pool = self.backend.id, self.backend.pool.value
        ended.seconds, ended.ttft = now - self.grant.at, self.ttft
        call.upstream_seconds += ended.seconds
        failed = ended.verdict is not Verdict.OK
        if not self.sent and not failed:
            return
        lane.count.attempts += 1
        lane.count.errors += failed
        mapping = self.backend.mapping(call.payload.model)
        ended.cost = ended.usage.cost(mapping.cost if mapping else None)
        self.proxy.ledger.add(
            Key(hour_of(now), self.backend.id, call.payload.model, call.client.id, ended.pool),
            ended.usage,
            cost=ended.cost,
            latency_ms=ended.seconds * 1000,
            ttft_ms=None if self.ttft is None else self.ttft * 1000,
            error=failed,
        )
        self.proxy.ledger.recent.add(
            call.client.id, now, ended.seconds, limited=ended.status == _TOO_MANY, answered=not failed
        )
        if call.client.key_hash:
            self.proxy.access.of(call.client.id, now).dollars += ended.cost
            self.proxy.journal.spent(call.client, ended.cost, now)
        self.proxy.meter.attempt(ended, call.payload.model)


async def _drain(reply: Reply) -> None:
    try:
        async with asyncio.timeout(1.0):
            await reply.pump(lambda _data: False)
    except (UpstreamError, TimeoutError):
        return
