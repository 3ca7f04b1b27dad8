"""What the sidecar costs: CPU per request, added latency and memory, beside a direct call and a peer.

    python tests/bench/sidecar.py [--quick] [--peer portkey|litellm|none]

Everything runs on loopback in one go: a provider that answers after 20 ms (1.2 KB, or a stream
of 60 chunks), the sidecar, and the peer gateway in an environment of its own (npm for Portkey,
pip for LiteLLM), each as its own process. CPU is what the gateway's process tree used, from
/proc; latency is the median seen by the load's raw sockets, so that no client library is measured.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("SIDECAR_BENCH_CACHE") or ROOT / ".cache" / "bench")
TICKS = os.sysconf("SC_CLK_TCK")
CHUNKS = 60
DELAY_SECONDS = 0.02
CONNECTIONS = (16, 64, 256)
TEXT = "x" * 900


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
        self.step(0)

    def step(self, number: int) -> None:
        """Chunks leave one by one, as tokens do."""
        if self.transport.is_closing():
            return
        last = number == CHUNKS - 1
        event = {
            "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "native",
            "choices": [{"index": 0, "delta": {} if last else {"content": "word "}, "finish_reason": "stop" if last else None}],
        }  # fmt: skip
        data = b"data: " + json.dumps(event).encode() + b"\n\n" + (b"data: [DONE]\n\n" if last else b"")
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data) + (b"0\r\n\r\n" if last else b""))
        if not last:
            asyncio.get_running_loop().call_later(0.004, self.step, number + 1)


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
    """One measurement: milliseconds, except memory in MB."""

    cpu: float
    median: float
    rate: float
    memory: float


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += tree(int(child))
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process tree."""
    total = 0
    for one in tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / TICKS


def memory_mb(pid: int) -> float:
    """Resident memory of a process tree."""
    total = 0
    for one in tree(pid):
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1])
    return total * os.sysconf("SC_PAGE_SIZE") / 1e6


async def caller(target: Target, *, streaming: bool, until: float, times: list[float]) -> None:
    """One connection, one request after the other."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    body = json.dumps(
        {"model": "gpt", "stream": streaming, "messages": [{"role": "user", "content": "hello"}]}
    ).encode()
    extra = "".join(f"{name}: {value}\r\n" for name, value in target.headers.items())
    head = f"POST {target.path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n{extra}"
    request = head.encode() + b"content-length: %d\r\n\r\n%b" % (len(body), body)
    while time.perf_counter() < until:
        began = time.perf_counter()
        writer.write(request)
        answer = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in answer[:20]:
            rest = await reader.read(500)
            raise RuntimeError(f"{target.name} answered {answer[:60]!r} {rest!r}")
        lower = answer.lower()
        if b"transfer-encoding: chunked" in lower:
            await read_chunks(reader)
        else:
            length = int(lower.partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
        times.append(time.perf_counter() - began)
    writer.close()


async def read_chunks(reader: asyncio.StreamReader) -> None:
    """To the end of a chunked body."""
    while size := int((await reader.readuntil(b"\r\n"))[:-2], 16):
        await reader.readexactly(size + 2)
    await reader.readexactly(2)


async def measure(target: Target, *, streaming: bool, connections: int, seconds: float) -> Row:
    """Warm up, then load for some seconds."""
    for warm in (True, False):
        times: list[float] = []
        began, cpu = time.perf_counter(), cpu_seconds(target.pid) if target.pid else 0.0
        until = began + (0.5 if warm else seconds)
        await asyncio.gather(
            *(caller(target, streaming=streaming, until=until, times=times) for _ in range(connections))
        )
    used = (cpu_seconds(target.pid) - cpu) if target.pid else 0.0
    took = time.perf_counter() - began
    memory = memory_mb(target.pid) if target.pid else 0.0
    return Row(used / len(times) * 1000, statistics.median(times) * 1000, len(times) / took, memory)


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
    if not package.exists():
        home.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", "@portkey-ai/gateway"], cwd=home, check=True)
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


def table(rows: dict[tuple[str, bool, int], Row], names: list[str]) -> str:
    """The result, with ratios to the sidecar."""
    lines = [
        f"{'':10} {'mode':7} {'conns':>5} {'CPU ms':>8} {'x':>6} {'median ms':>10} {'added ms':>9} {'req/s':>8} {'MB':>6}"
    ]
    for streaming in (False, True):
        for connections in CONNECTIONS:
            direct, own = rows["direct", streaming, connections], rows["sidecar", streaming, connections]
            for name in names:
                row = rows.get((name, streaming, connections))
                if row is None:
                    continue
                mode = "stream" if streaming else "whole"
                cost = (
                    f"{row.cpu:8.3f} {row.cpu / own.cpu:6.1f}" if name != "direct" else f"{'-':>8} {'-':>6}"
                )
                added = f"{row.median - direct.median:9.2f}" if name != "direct" else f"{'-':>9}"
                memory = f"{row.memory:6.0f}" if name != "direct" else f"{'-':>6}"
                lines.append(
                    f"{name:10} {mode:7} {connections:5} {cost} {row.median:10.2f} {added} {row.rate:8.0f} {memory}"
                )
    return "\n".join(lines)


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one and a half seconds a measurement instead of six"
    )
    parser.add_argument("--peer", action="append", choices=[*PEERS, "none"], help="default: portkey")
    parser.add_argument("--provide", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.provide:
        asyncio.run(provide())
        return
    # Ended from outside, what was started here must end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seconds = 1.5 if options.quick else 6.0
    peers = [name for name in options.peer or ["portkey"] if name != "none"]
    rows: dict[tuple[str, bool, int], Row] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        process = stack.enter_context(
            running([sys.executable, __file__, "--provide"], stdout=subprocess.PIPE)
        )
        assert process.stdout is not None
        port = int(process.stdout.readline())
        for name in ["direct", "sidecar", *peers]:
            with contextlib.ExitStack() as inner:
                if name == "direct":
                    target = Target("direct", port, "/v1/chat/completions", {}, None)
                else:
                    make = {"sidecar": sidecar, **PEERS}[name]
                    target = inner.enter_context(make(port, folder))
                for streaming in (False, True):
                    for connections in CONNECTIONS:
                        work = measure(target, streaming=streaming, connections=connections, seconds=seconds)
                        try:
                            rows[name, streaming, connections] = asyncio.run(work)
                        except RuntimeError as error:
                            # A peer that cannot do it is said so, and costs nobody the rest of the table.
                            print(f"{name}, {'stream' if streaming else 'whole'}, {connections}: {error}")
                            if name not in peers:
                                raise
    print(table(rows, ["direct", "sidecar", *peers]))


if __name__ == "__main__":
    main()
