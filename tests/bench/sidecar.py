"""What the sidecar costs: CPU per request, added latency and memory, beside a direct call and peers.

    python -m tests.bench sidecar [--quick] [--peer portkey|litellm|none]... [--clients]

Everything runs on loopback in one go: a provider that answers after 20 ms (1.2 KB, or a stream
of 60 chunks, one every 4 ms), the sidecar, and the peer gateways, each in an environment of its
own (npm for Portkey, pip for LiteLLM) and as its own process. All take turns in every round, so
that what else the machine does meets them alike.

Two kinds of load, from raw sockets, so that no client library is measured:

- flat out: every connection asks again as soon as it is answered. CPU is what the gateway's
  process tree used, from /proc, the best of the rounds. Latency says little here: all connections
  wait for the same provider, come back together and stand in line, at the load's own process too.
- offered: the same number of requests a second for everybody, at random moments. This is where
  latency is taken: its median, and how much more that is than the direct call's in the same rounds.

`--clients` measures the upstream clients the sidecar could use instead.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("SIDECAR_BENCH_CACHE") or ROOT / ".cache" / "bench")
TICKS = os.sysconf("SC_CLK_TCK")
CHUNKS = 60
CHUNK_SECONDS = 0.004
DELAY_SECONDS = 0.02
CONNECTIONS = (16, 64, 256)
# Requests a second: what a busy house of agents sends, and what one core of any peer might still bear.
OFFERED = {
    (False, 16): 80,
    (False, 64): 160,
    (False, 256): 320,
    (True, 16): 16,
    (True, 64): 32,
    (True, 256): 64,
}
WARM_SECONDS = 0.5
TEXT = "x" * 900
# Streams fail with newer ones: https://github.com/Portkey-AI/gateway/issues/1389
PORTKEY = {
    "private": True,
    "dependencies": {"@portkey-ai/gateway": "1.15.2"},
    "overrides": {"@hono/node-server": "1.14.1"},
}
CLIENTS = ("ours", "aiohttp", "httpx-aiohttp", "httpx")


def stream_event(number: int) -> bytes:
    """One chunk of the provider's stream, as HTTP frames it."""
    last = number == CHUNKS - 1
    event = {
        "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "native",
        "choices": [{"index": 0, "delta": {} if last else {"content": f"word{number} "}, "finish_reason": "stop" if last else None}],
    }  # fmt: skip
    data = b"data: " + json.dumps(event).encode() + b"\n\n" + (b"data: [DONE]\n\n" if last else b"")
    return b"%x\r\n%b\r\n" % (len(data), data) + (b"0\r\n\r\n" if last else b"")


class Provider(asyncio.Protocol):
    """Answers any POST after a delay: whole, or as a stream when the body asks for one."""

    body = json.dumps(
        {
            "id": "c", "object": "chat.completion", "created": 1, "model": "native",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        }
    ).encode()  # fmt: skip
    whole = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )
    events = tuple(stream_event(number) for number in range(CHUNKS))
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.data = b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        if not found:
            return
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line[15:])
        if len(body) < length:
            return
        self.data = b""
        streaming = b'"stream":true' in body.replace(b" ", b"")
        asyncio.get_running_loop().call_later(DELAY_SECONDS, lambda: self.answer(streaming=streaming))

    def answer(self, *, streaming: bool) -> None:
        if not streaming:
            self.transport.write(self.whole)
            return
        self.transport.write(self.head)
        self.step(0, asyncio.get_running_loop().time())

    def step(self, number: int, at: float) -> None:
        """Chunks leave one by one, as tokens do, and on time whatever became of the last one."""
        if self.transport.is_closing():
            return
        self.transport.write(self.events[number])
        if number + 1 < CHUNKS:
            at += CHUNK_SECONDS
            asyncio.get_running_loop().call_at(at, self.step, number + 1, at)


async def provide() -> None:
    """The provider's process: says its port and serves until it is ended."""
    server = await asyncio.get_running_loop().create_server(Provider, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@dataclass
class Target:
    """Something to send requests to."""

    name: str
    port: int
    path: str
    headers: dict[str, str]
    pid: int | None


@dataclass
class Row:
    """What was seen of one target under one load. Seconds and MB."""

    cpu: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    closed: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    memory: float = 0.0


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += tree(int(child))
    return found


def cpu_seconds(pid: int | None) -> float:
    """User and system time of a process tree."""
    total = 0
    if pid is None:
        return 0.0
    for one in tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / TICKS


def memory_mb(pid: int | None) -> float:
    """Resident memory of a process tree."""
    total = 0
    if pid is None:
        return 0.0
    for one in tree(pid):
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1])
    return total * os.sysconf("SC_PAGE_SIZE") / 1e6


class Line(asyncio.Protocol):
    """One connection of the load: a request, its whole answer, the next request."""

    def __init__(self, target: Target, *, streaming: bool) -> None:
        body = json.dumps(
            {"model": "gpt", "stream": streaming, "messages": [{"role": "user", "content": "hello"}]}
        ).encode()
        extra = "".join(f"{name}: {value}\r\n" for name, value in target.headers.items())
        head = f"POST {target.path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n{extra}"
        self.request = head.encode() + b"content-length: %d\r\n\r\n%b" % (len(body), body)
        self.name = target.name
        self.streaming = streaming
        self.data = bytearray()
        self.done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    async def ask(self) -> tuple[float, float]:
        """Seconds to the first byte of the body and to its last."""
        self.data.clear()
        self.need = self.first = 0.0
        self.done = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        self.transport.write(self.request)
        await self.done
        return self.first - began, time.perf_counter() - began

    def data_received(self, data: bytes) -> None:
        self.data += data
        if not self.need:
            self._head()
        if not self.first and len(self.data) > self.body:
            self.first = time.perf_counter()
        chunked = self.need == math.inf
        if self.done is None or self.done.done():
            return
        if (chunked and self.data.endswith(b"0\r\n\r\n")) or (
            not chunked and len(self.data) >= self.need > 0
        ):
            if self.streaming and self.data.count(b'"content"') < CHUNKS - 1:
                self.done.set_exception(RuntimeError(f"{self.name} cut a stream short"))
            else:
                self.done.set_result(None)

    def _head(self) -> None:
        end = self.data.find(b"\r\n\r\n")
        self.body = end + 4 if end >= 0 else sys.maxsize
        if end < 0:
            return
        head = bytes(self.data[:end]).lower()
        if b" 200 " not in head[:20] and self.done is not None and not self.done.done():
            self.done.set_exception(RuntimeError(f"{self.name} answered {bytes(self.data[:600])!r}"))
        length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
        self.need = math.inf if b"transfer-encoding: chunked" in head else self.body + int(length or 0)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_exception(RuntimeError(f"{self.name} closed the connection ({exc})"))


async def load(
    target: Target, *, streaming: bool, connections: int, seconds: float, offered: float = 0.0
) -> list[tuple[float, float]]:
    """Ask for some seconds, flat out or so many times a second; what `Line.ask` gave, of each."""
    loop = asyncio.get_running_loop()
    seen: list[tuple[float, float]] = []
    until = time.perf_counter() + seconds
    chance = random.Random(connections)

    async def one(line: Line) -> None:
        mean = connections / offered if offered else 0.0
        at = time.perf_counter() + (chance.expovariate(1 / mean) if offered else 0.0)
        while at < until and (now := time.perf_counter()) < until:
            if at > now:
                await asyncio.sleep(at - now)
            seen.append(await line.ask())
            at += chance.expovariate(1 / mean) if offered else 0.0
        line.transport.close()

    lines = [
        (await loop.create_connection(lambda: Line(target, streaming=streaming), "127.0.0.1", target.port))[1]
        for _ in range(connections)
    ]
    await asyncio.gather(*(one(line) for line in lines))
    return seen


async def measure(row: Row, target: Target, *, streaming: bool, connections: int, seconds: float) -> None:
    """One round of both loads, each after a warm-up."""
    await load(target, streaming=streaming, connections=connections, seconds=WARM_SECONDS)
    began, cpu = time.perf_counter(), cpu_seconds(target.pid)
    seen = await load(target, streaming=streaming, connections=connections, seconds=seconds)
    row.cpu.append((cpu_seconds(target.pid) - cpu) / len(seen))
    row.rate.append(len(seen) / (time.perf_counter() - began))
    row.closed += [whole for _, whole in seen]
    offered = OFFERED[streaming, connections]
    await asyncio.sleep(0.2)
    calm = await load(target, streaming=streaming, connections=connections, seconds=seconds, offered=offered)
    row.firsts += [first for first, _ in calm]
    row.times += [whole for _, whole in calm]
    row.memory = max(row.memory, memory_mb(target.pid))


def wait_port(port: int, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Until somebody listens."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"nobody listens on {port}")


def free_port() -> int:
    """A port nobody has now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process group of its own, ended afterwards."""
    process = subprocess.Popen(command, start_new_session=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def sidecar(provider: int, folder: Path) -> Iterator[Target]:
    """The sidecar as it is delivered, with its access log in a file."""
    port = free_port()
    entry = {
        "id": "a", "api_base_url": f"http://127.0.0.1:{provider}/v1", "api_key_env": "BENCH_KEY", "rpm_limit": 10_000_000,
        "model_mappings": {"gpt": {"native_id": "native", "cost": {"input": 1e-6, "output": 2e-6}}},
    }  # fmt: skip
    (folder / "backends.yml").write_text(json.dumps({"backends": [entry]}))
    env = {
        **os.environ, "SIDECAR_PORT": str(port), "SIDECAR_METRICS_PORT": "0", "SIDECAR_DB_PATH": str(folder / "a.db"),
        "SIDECAR_BACKENDS_FILE": str(folder / "backends.yml"), "BENCH_KEY": "sk-bench", "LOG_FORMAT": "json",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    with (
        (folder / "log").open("wb") as log,
        running([sys.executable, "-m", "sidecar"], env=env, stderr=log) as process,
    ):
        wait_port(port, process)
        yield Target("sidecar", port, "/v1/chat/completions", {}, process.pid)


@contextlib.contextmanager
def portkey(provider: int, folder: Path) -> Iterator[Target]:
    """Portkey's gateway from npm."""
    home = CACHE / "portkey"
    package = home / "node_modules" / "@portkey-ai" / "gateway"
    wanted = json.dumps(PORTKEY)
    if not package.exists() or (home / "package.json").read_text() != wanted:
        home.mkdir(parents=True, exist_ok=True)
        (home / "package-lock.json").unlink(missing_ok=True)
        (home / "package.json").write_text(wanted)
        subprocess.run(["npm", "install", "--silent"], cwd=home, check=True)
    port = free_port()
    started = package / "build" / "start-server.js"
    with (
        (folder / "portkey.log").open("wb") as log,
        running(["node", str(started), f"--port={port}", "--headless"], stdout=log, stderr=log) as process,
    ):
        wait_port(port, process)
        headers = {
            "authorization": "Bearer sk-bench", "x-portkey-provider": "openai",
            "x-portkey-custom-host": f"http://127.0.0.1:{provider}/v1",
        }  # fmt: skip
        yield Target("portkey", port, "/v1/chat/completions", headers, process.pid)


@contextlib.contextmanager
def litellm(provider: int, folder: Path) -> Iterator[Target]:
    """LiteLLM's proxy from pip, in a virtualenv of its own."""
    home = CACHE / "litellm"
    if not (home / "bin" / "litellm").exists():
        venv.create(home, with_pip=True)
        subprocess.run([home / "bin" / "pip", "install", "-q", "litellm[proxy]"], check=True)
    parameters = {
        "model": "openai/native",
        "api_base": f"http://127.0.0.1:{provider}/v1",
        "api_key": "sk-bench",
    }
    config = folder / "litellm.yml"
    config.write_text(json.dumps({"model_list": [{"model_name": "gpt", "litellm_params": parameters}]}))
    port = free_port()
    command = [
        str(home / "bin" / "litellm"),
        "--config",
        str(config),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    env = {
        **os.environ,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        # Without a master key, as nothing but this benchmark reaches it.
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    with (
        (folder / "litellm.log").open("wb") as log,
        running(command, stdout=log, stderr=log, env=env) as process,
    ):
        wait_port(port, process)
        yield Target(
            "litellm", port, "/v1/chat/completions", {"authorization": "Bearer sk-bench"}, process.pid
        )


PEERS = {"portkey": portkey, "litellm": litellm}


def middle(seconds: list[float]) -> float:
    """The median in milliseconds."""
    return statistics.median(seconds) * 1000 if seconds else math.nan


Rows = dict[tuple[str, bool, int], Row]


def table(rows: Rows, names: list[str]) -> str:
    """The result, with ratios to the sidecar."""
    lines = [
        f"{'':10} {'':6} {'':5} {'flat out:':>25} | {'offered:':>8} {'answer ms':>18} {'first byte ms':>18} |",
        (
            f"{'':10} {'mode':6} {'conns':>5} {'CPU ms':>8} {'x':>6} {'req/s':>9} |"
            f" {'req/s':>8} {'median':>9} {'added':>8} {'median':>9} {'added':>8} | {'MB':>5}"
        ),
    ]
    for streaming in (False, True):
        for connections in CONNECTIONS:
            direct, own = rows["direct", streaming, connections], rows["sidecar", streaming, connections]
            for name in names:
                row = rows[name, streaming, connections]
                start = f"{name:10} {'stream' if streaming else 'whole':6} {connections:5}"
                if not row.times:
                    lines.append(f"{start} cannot do it, see above")
                    continue
                cpu, x = min(row.cpu) * 1000, min(row.cpu) / min(own.cpu)
                cost = f"{'-':>8} {'-':>6}" if name == "direct" else f"{cpu:8.3f} {x:6.1f}"
                late, first = middle(row.times), middle(row.firsts)
                lines.append(
                    f"{start} {cost} {max(row.rate):9.0f} | {OFFERED[streaming, connections]:8}"
                    f" {late:9.2f} {late - middle(direct.times):8.2f} {first:9.2f} {first - middle(direct.firsts):8.2f}"
                    f" | {row.memory:5.0f}"
                )
    return "\n".join(lines)


def targets(rows: Rows) -> str:
    """The goals, each kept or missed."""
    own = {(streaming, n): rows["sidecar", streaming, n] for streaming in (False, True) for n in CONNECTIONS}
    added = middle(own[False, 16].times) - middle(rows["direct", False, 16].times)
    goals = [
        ("CPU per whole answer, worst of all connection counts, ms", max(min(own[False, n].cpu) * 1000 for n in CONNECTIONS), 0.35),
        ("CPU per 60-chunk stream, worst of all connection counts, ms", max(min(own[True, n].cpu) * 1000 for n in CONNECTIONS), 2.0),
        ("added median latency at 16 connections, ms", added, 1.5),
        ("memory at 256 connections, MB", max(own[streaming, 256].memory for streaming in (False, True)), 120.0),
    ]  # fmt: skip
    return "\n".join(
        f"{'kept' if seen <= most else 'MISSED':6} {what}: {seen:.3g} (at most {most:g})"
        for what, seen, most in goals
    )


# -- upstream clients -----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def client(name: str, url: str) -> AsyncIterator[Callable[[bytes], Awaitable[int]]]:
    """A function that posts a body and reads the answer as it comes, giving its size."""
    headers = {"content-type": "application/json", "authorization": "Bearer sk-bench"}
    if name == "ours":
        sys.path.insert(0, str(ROOT))
        from sidecar.upstream import AiohttpUpstream  # noqa: PLC0415

        upstream = AiohttpUpstream()

        async def ours(body: bytes) -> int:
            size = 0

            def take(data: bytes) -> bool:
                nonlocal size
                size += len(data)
                return False

            reply = await upstream.send(url, headers, body, lambda: None)
            await reply.pump(take)
            reply.close()
            return size

        yield ours
        await upstream.close()
    elif name == "aiohttp":
        import aiohttp  # noqa: PLC0415

        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
        ) as session:

            async def plain(body: bytes) -> int:
                async with session.post(url, data=body, headers=headers) as answer:
                    return sum([len(part) async for part in answer.content.iter_any()])

            yield plain
    else:
        import httpx  # noqa: PLC0415

        options: Mapping[str, object] = {"limits": httpx.Limits(max_connections=None), "timeout": None}
        if name == "httpx-aiohttp":
            sys.path.insert(0, str(CACHE / "clients"))
            from httpx_aiohttp import HttpxAiohttpClient  # type: ignore[import-not-found] # noqa: PLC0415

            maker = HttpxAiohttpClient
        else:
            maker = httpx.AsyncClient
        async with maker(**options) as session:

            async def wrapped(body: bytes) -> int:
                async with session.stream("POST", url, content=body, headers=headers) as answer:
                    return sum([len(part) async for part in answer.aiter_raw()])

            yield wrapped


async def exercise(name: str, port: int, *, streaming: bool, seconds: float) -> float:
    """CPU seconds per request of this process with one client, 16 requests at a time."""
    body = json.dumps({"model": "gpt", "stream": streaming, "messages": []}).encode()
    async with client(name, f"http://127.0.0.1:{port}/v1/chat/completions") as ask:
        count = 0

        async def one(until: float) -> None:
            nonlocal count
            while time.perf_counter() < until:
                assert await ask(body) > 1000
                count += 1

        used = 0.0
        for length in (WARM_SECONDS, seconds):
            count, used = 0, time.process_time()
            until = time.perf_counter() + length
            await asyncio.gather(*(one(until) for _ in range(16)))
        return (time.process_time() - used) / count


def compare_clients(port: int, rounds: int, seconds: float) -> str:
    """A table of the upstream clients, each in a process of its own, best of the rounds."""
    extra = CACHE / "clients"
    if not extra.exists():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                "--target",
                str(extra),
                "httpx-aiohttp",
            ],
            check=True,
        )
    lines = [f"{'client':14} {'whole ms':>9} {'stream ms':>10}"]
    best: dict[tuple[str, bool], float] = {}
    for _ in range(rounds):
        for name in CLIENTS:
            for streaming in (False, True):
                command = [
                    sys.executable,
                    __file__,
                    "--client",
                    name,
                    "--port",
                    str(port),
                    "--seconds",
                    str(seconds),
                ]
                done = subprocess.run(
                    [*command, *(["--streaming"] if streaming else [])], check=True, stdout=subprocess.PIPE
                )
                best[name, streaming] = min(best.get((name, streaming), math.inf), float(done.stdout))
    lines += [
        f"{name:14} {best[name, False] * 1000:9.3f} {best[name, True] * 1000:10.3f}" for name in CLIENTS
    ]
    return "\n".join(lines)


# -- the whole ------------------------------------------------------------------------------


def compare(provider: int, peers: list[str], rounds: int, seconds: float) -> None:
    """The sidecar, the direct call and the peers, in turns."""
    rows: Rows = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        parts = [Target("direct", provider, "/v1/chat/completions", {}, None)]
        parts.append(stack.enter_context(sidecar(provider, folder)))
        for name in peers:
            try:
                parts.append(stack.enter_context(PEERS[name](provider, folder)))
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                print(f"{name} cannot be had here: {error}")
        for streaming in (False, True):
            for connections in CONNECTIONS:
                failed: set[str] = set()
                for _ in range(rounds):
                    for part in parts:
                        if part.name in failed:
                            continue
                        row = rows.setdefault((part.name, streaming, connections), Row())
                        try:
                            uvloop.run(
                                measure(
                                    row, part, streaming=streaming, connections=connections, seconds=seconds
                                )
                            )
                        except (RuntimeError, OSError) as error:
                            # A peer that cannot do it is said so, and costs nobody the rest of the table.
                            print(
                                f"{part.name}, {'stream' if streaming else 'whole'}, {connections}: {error}"
                            )
                            if part.name not in peers:
                                raise
                            failed.add(part.name)
                            rows[part.name, streaming, connections] = Row()
    print(table(rows, [part.name for part in parts]))
    print()
    print(targets(rows))


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short round instead of three")
    parser.add_argument("--peer", action="append", choices=[*PEERS, "none"], help="default: portkey")
    parser.add_argument("--clients", action="store_true", help="compare upstream clients instead")
    parser.add_argument("--provide", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--streaming", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.provide:
        uvloop.run(provide())
        return
    if options.client:
        used = exercise(options.client, options.port, streaming=options.streaming, seconds=options.seconds)
        print(uvloop.run(used))
        return
    # Ended from outside, what was started here must end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rounds, seconds = (1, 1.5) if options.quick else (3, 3.0)
    peers = [name for name in options.peer or ["portkey"] if name != "none"]
    with running([sys.executable, __file__, "--provide"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        if options.clients:
            print(compare_clients(port, rounds, seconds))
        else:
            compare(port, peers, rounds, seconds)


if __name__ == "__main__":
    main()
