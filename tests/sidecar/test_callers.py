"""Callers who leave, crowds, and rate windows as the provider counts them."""

import asyncio
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from sidecar import fake
from sidecar.fake import FakeProvider, Script, Seen
from tests.sidecar.harness import CHAT, SidecarProcess, backend, eventually

STREAM = {**CHAT, "stream": True}


def flight(process: SidecarProcess) -> int:
    return int(process.admin("GET", "/backends").json()["backends"][0]["in_flight"])


WINDOWS = {
    "before headers": Script(wait=3600),
    "before the first token": replace(fake.chat_stream(), body=(b": ping\n\n",), end="stall"),
    "streaming": replace(fake.chat_stream(finish=None, done=False, usage=False), end="stall"),
}


@pytest.mark.parametrize("window", WINDOWS)
def test_a_leaving_caller_cancels_the_upstream_call(
    window: str, sidecar: Callable[..., SidecarProcess]
) -> None:
    async def run() -> None:
        provider = FakeProvider(
            lambda seen: WINDOWS[window] if seen.method == "POST" else fake.default_script(seen)
        )
        await provider.start()
        process = await asyncio.to_thread(sidecar, [backend("a", provider.url)])
        async with httpx.AsyncClient(timeout=60) as client:
            task = asyncio.create_task(_read_all(client, process.url))
            await eventually(lambda: provider.posts, "the request at the provider")
            if window == "streaming":
                await asyncio.sleep(0.2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await eventually(lambda: provider.cut == 1, "the provider sees the end of the connection")
        assert await asyncio.to_thread(flight, process) == 0
        rows = (await asyncio.to_thread(process.admin, "GET", "/stats/hourly")).json()["rows"]
        assert (rows[0]["request_count"], rows[0]["error_count"], rows[0]["estimated_count"]) == (1, 0, 1)
        assert rows[0]["prompt_tokens"] > 0, "what was used is counted though the caller left"
        assert (rows[0]["completion_tokens"] > 0) == (window == "streaming")
        await provider.stop()

    asyncio.run(run())


async def _read_all(client: httpx.AsyncClient, url: str) -> bytes:
    async with client.stream("POST", url + "/v1/chat/completions", json=STREAM) as answer:
        return b"".join([part async for part in answer.aiter_raw()])


def test_a_leaving_caller_leaves_the_queue_and_nothing_is_sent(
    sidecar: Callable[..., SidecarProcess],
) -> None:
    async def run() -> None:
        provider = FakeProvider()
        await provider.start()
        process = await asyncio.to_thread(
            sidecar, [backend("a", provider.url, rpm_limit=1)], SIDECAR_QUEUE_TIMEOUT="600", SIDECAR_REQUEST_TIMEOUT_SECONDS="600"
        )  # fmt: skip
        async with httpx.AsyncClient(timeout=60) as client:
            assert (await client.post(process.url + "/v1/chat/completions", json=CHAT)).status_code == 200
            task = asyncio.create_task(client.post(process.url + "/v1/chat/completions", json=CHAT))

            def depth() -> float:
                return process.metric("sidecar_queue_depth")

            await eventually(lambda: depth() == 1, "the request in line")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await eventually(lambda: depth() == 0, "the line is empty again")
        assert len(provider.posts) == 1
        await provider.stop()

    asyncio.run(run())


def test_the_provider_never_counts_more_than_the_limit(sidecar: Callable[..., SidecarProcess]) -> None:
    async def run() -> None:
        provider = FakeProvider()
        await provider.start()
        process = await asyncio.to_thread(
            sidecar, [backend("a", provider.url, rpm_limit=7)], SIDECAR_QUEUE_TIMEOUT="1"
        )
        async with httpx.AsyncClient(timeout=60) as client:
            answers = await asyncio.gather(
                *(client.post(process.url + "/v1/chat/completions", json=CHAT) for _ in range(40))
            )
        good = [answer for answer in answers if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code == 503]
        assert (len(good), len(refused), len(provider.posts)) == (7, 33, 7)
        assert all(50 <= int(answer.headers["retry-after"]) <= 61 for answer in refused)
        await provider.stop()

    asyncio.run(run())


def test_a_thousand_streams_with_callers_leaving_at_random_leak_nothing(
    sidecar: Callable[..., SidecarProcess],
) -> None:
    async def run() -> None:
        chance = random.Random(20)
        words = tuple("word " for _ in range(12))

        def choose(seen: Seen) -> Script:
            if seen.method != "POST":
                return fake.default_script(seen)
            return fake.chat_stream(words, gap=0.05)

        provider = FakeProvider(choose)
        await provider.start()
        process = await asyncio.to_thread(
            sidecar, [backend("a", provider.url, tpm_limit=500_000_000)], SIDECAR_HEALTH_CHECK_INTERVAL_SECONDS="86400",
            SIDECAR_ACCESS_LOG="false", SIDECAR_CONNECT_TIMEOUT_SECONDS="60",
        )  # fmt: skip
        leaves = [chance.random() < 0.5 for _ in range(1000)]
        delays = [chance.uniform(0, 3) for _ in range(1000)]
        whole = await asyncio.gather(
            *(_visit(process.url, delays[i] if leaves[i] else None) for i in range(1000))
        )
        assert all(done for done, leaving in zip(whole, leaves, strict=True) if not leaving)
        await eventually(lambda: flight(process) == 0, "no attempt is left running")
        total = process.admin("GET", "/stats/total").json()
        assert total["total_requests"] == len(provider.posts), "the books equal the provider's log"
        assert total["total_errors"] == 0
        shown = process.admin("GET", "/backends/a").json()
        assert shown["starts_last_minute"] <= len(provider.posts)
        process.stop()
        await eventually(lambda: provider.open == 0, "no connection is left")
        await provider.stop()

    asyncio.run(run())


async def _visit(url: str, leave_after: float | None) -> bool:
    """A caller on a raw socket: a thousand client objects would cost more than what is tested."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        body = b'{"model":"gpt","stream":true,"messages":[]}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        writer.write(head % len(body) + body)
        async with asyncio.timeout(leave_after):
            text = await reader.read()
        return text.count(b"word ") == 12 and b"[DONE]" in text and text.endswith(b"0\r\n\r\n")
    except TimeoutError:
        return False
    finally:
        writer.close()


def test_a_caller_who_reads_slowly_gets_every_byte_in_order(sidecar: Callable[..., SidecarProcess]) -> None:
    words = tuple(f"{number:06d}" + "x" * 2000 for number in range(4000))

    async def run() -> None:
        provider = FakeProvider(
            lambda seen: fake.chat_stream(words) if seen.method == "POST" else fake.default_script(seen)
        )
        await provider.start()
        process = await asyncio.to_thread(sidecar, [backend("a", provider.url)])
        host, port = process.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=2**14)
        body = b'{"model":"gpt","stream":true,"messages":[]}'
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n")
        writer.write(b"content-length: %d\r\n\r\n%b" % (len(body), body))
        await asyncio.sleep(1.0)
        memory = await asyncio.to_thread(resident_mb, process)
        text = await reader.read(2**25)
        while part := await reader.read(2**20):
            text += part
        writer.close()
        events = [json.loads(line[6:]) for line in text.split(b"\n") if line.startswith(b"data: {")]
        said = [event["choices"][0]["delta"].get("content") for event in events if event["choices"]]
        assert [word for word in said if word] == list(words)
        assert b"[DONE]" in text
        assert text.endswith(b"0\r\n\r\n")
        assert memory < 250, "what the caller does not take stays at the provider"
        await provider.stop()

    asyncio.run(run())


def resident_mb(process: SidecarProcess) -> float:
    assert process.process is not None
    pages = Path(f"/proc/{process.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_every_request_leaves_a_line_in_the_log(sidecar: Callable[..., SidecarProcess]) -> None:
    async def run() -> None:
        provider = FakeProvider()
        await provider.start()
        process = await asyncio.to_thread(sidecar, [backend("a", provider.url)])
        before = time.time()
        async with httpx.AsyncClient(timeout=60) as client:
            answers = [await client.post(process.url + "/v1/chat/completions", json=CHAT) for _ in range(5)]
        await asyncio.to_thread(process.stop)
        lines = [
            json.loads(line) for line in process.log.read_text().splitlines() if '"event":"request"' in line
        ]
        assert [line["request_id"] for line in lines] == [
            answer.headers["x-request-id"] for answer in answers
        ]
        assert len({line["request_id"] for line in lines}) == 5
        assert all(line["trail"] == ["answered by a", "a: ok"] and line["status"] == 200 for line in lines)
        stamps = [datetime.fromisoformat(line["timestamp"]).timestamp() for line in lines]
        assert stamps == sorted(stamps)
        assert before - 1 < stamps[0] < stamps[-1] < time.time() + 1, (
            "the time it happened, not the time it was written"
        )
        await provider.stop()

    asyncio.run(run())
