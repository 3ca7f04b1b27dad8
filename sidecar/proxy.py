"""One caller's request from its first byte to the last: the only owner of retries.

Until a byte has gone to the caller, changing the backend is free; after it, a failure is
made explicit by an error event and a connection that ends without its terminator.
"""

import asyncio
from dataclasses import dataclass
from typing import Protocol

from sidecar import attempt as attempts
from sidecar.access import Access
from sidecar.attempt import Attempt, Call, Ended
from sidecar.clock import Clock
from sidecar.errors import Refusal
from sidecar.fleet import Fleet, NoBackend, NoRoom
from sidecar.lane import Query
from sidecar.logs import AccessLog
from sidecar.model import Endpoint
from sidecar.payload import BadRequest, parse
from sidecar.records import Ledger
from sidecar.upstream import Upstream
from sidecar.wire import Caller, Send, caller_headers


class Meter(Protocol):
    """What the data plane tells the metrics."""

    def attempt(self, ended: Ended, model: str) -> None:
        """An attempt has ended."""
        ...

    def request(self, call: Call, status: int, seconds: float) -> None:
        """A caller's request has ended."""
        ...


@dataclass
class Proxy:
    """The data plane's parts."""

    fleet: Fleet
    upstream: Upstream
    ledger: Ledger
    access: Access
    clock: Clock
    meter: Meter
    journal: attempts.Journal
    lines: AccessLog
    loop: asyncio.AbstractEventLoop

    async def handle(
        self,
        endpoint: Endpoint,
        headers: dict[bytes, bytes],
        query_string: bytes,
        request_id: str,
        call_send: Send,
        caller: Caller,
        body: bytes,
    ) -> None:
        """Answer one request whose body is here. Raises Refusal for what we answer ourselves."""
        now = self.clock.now()
        client = self.access.identify(headers)
        try:
            payload = parse(body, streams=endpoint.streams)
        except BadRequest as bad:
            raise Refusal(400, "invalid_request", str(bad), bad.param) from None
        self.access.admit(client, payload.model, now)
        call = Call(
            endpoint=endpoint,
            payload=payload,
            client=client,
            request_id=request_id,
            headers=headers,
            query_string=query_string.decode("latin-1"),
            began=now,
            deadline=now + self.fleet.hot.request_timeout_seconds,
            send=call_send,
            caller=caller,
            debug=headers.get(b"x-sidecar-debug", b"") not in (b"", b"0"),
        )
        status = 499
        held = self._hold(call)
        try:
            status = await self._run(call)
        except Refusal as refusal:
            status = refusal.status
            raise
        finally:
            if held:
                self.access.of(client.id, self.clock.now()).held -= held
            self._log(call, status)

    async def _run(self, call: Call) -> int:
        hot = self.fleet.hot
        ended: Ended | None = None
        while call.attempts < hot.max_pool_retries:
            budget = call.deadline - self.clock.now()
            if budget <= 0:
                break
            query = self._query(call)
            try:
                grant, decision = await self.fleet.admit(query, budget)
            except NoBackend as nothing:
                raise self._nothing_left(call, nothing, ended) from None
            except NoRoom as full:
                raise Refusal(503, full.code, full.message, None, full.retry_after, _passed(ended)) from None
            call.attempts += 1
            call.note(decision, grant)
            ended = await Attempt(call, grant, self).run()
            call.trail.append(f"{grant.lane.backend.id}: {ended.verdict.value}")
            if ended.answered:
                return ended.status
            call.tried = call.tried | {grant.lane.backend.id}
        raise self._exhausted(call, ended)

    def _query(self, call: Call) -> Query:
        hot = self.fleet.hot
        estimate = call.payload.prompt_estimate + (
            call.payload.completion_limit or hot.completion_estimate_tokens
        )
        return Query(call.payload.model, call.endpoint.api.value, estimate, call.tried)

    def _nothing_left(self, call: Call, nothing: NoBackend, ended: Ended | None) -> Refusal:
        if not nothing.decision.known:
            names = (
                ", ".join(sorted(self.models())) or "none is configured yet; add a backend in the dashboard"
            )
            return Refusal(
                404,
                "model_not_found",
                f"the model {call.payload.model!r} is not configured; known: {names}",
                "model",
            )
        call.note(nothing.decision, None)
        return self._exhausted(call, ended)

    def _exhausted(self, call: Call, ended: Ended | None) -> Refusal:
        wait = self.fleet.estimate(Query(call.payload.model, call.endpoint.api.value))
        if ended is None:
            reasons = "; ".join(f"{name}: {why}" for name, why in call.last_reasons)
            return Refusal(503, "no_backend", f"no backend can take this request ({reasons})", None, wait)
        message = f"no backend could answer after {call.attempts} attempt(s); the last said: {ended.detail}"
        return Refusal(503, ended.verdict.value, message, None, wait, _passed(ended))

    def models(self) -> set[str]:
        """Canonical names of enabled backends."""
        return {
            name
            for lane in self.fleet.lanes.values()
            if lane.backend.enabled
            for name in lane.backend.model_mappings
        }

    def _hold(self, call: Call) -> float:
        """Reserve what the request may cost, so that many at once cannot overrun a budget."""
        if call.client.budget is None:
            return 0.0
        tokens_out = call.payload.completion_limit or self.fleet.hot.completion_estimate_tokens
        prices = [
            mapping.cost
            for lane in self.fleet.lanes.values()
            if (mapping := lane.backend.mapping(call.payload.model)) is not None
        ]
        most = max(
            (price.input * call.payload.prompt_estimate + price.output * tokens_out for price in prices),
            default=0.0,
        )
        self.access.of(call.client.id, self.clock.now()).held += most
        return most

    def _log(self, call: Call, status: int) -> None:
        seconds = self.clock.now() - call.began
        self.meter.request(call, status, seconds)
        if self.fleet.hot.access_log:
            self.lines.note(
                at=call.began + seconds,
                request_id=call.request_id,
                path=call.endpoint.path,
                model=call.payload.model,
                client=call.client.id,
                status=status,
                ms=round(seconds * 1000, 1),
                trail=call.trail,
            )


def _passed(ended: Ended | None) -> tuple[tuple[bytes, bytes], ...]:
    """Rate headers of the last answer, which the caller is to see even under our 503."""
    if ended is None or ended.headers is None:
        return ()
    return tuple(
        (name, text)
        for name, text in caller_headers(ended.headers)
        if b"ratelimit" in name or name == b"x-should-retry"
    )
