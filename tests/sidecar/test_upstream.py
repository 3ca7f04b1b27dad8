"""The provider's connection: whatever its bytes are, an answer is whole or an error, and never mixed with another."""

import asyncio
import gzip
import ipaddress
import ssl
import zlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.upstream import AiohttpUpstream, Reply, UpstreamError

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"
WHOLE = HEAD + b"content-length: 5\r\n\r\nhello"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
Work = Callable[[AiohttpUpstream, str], Awaitable[None]]


class Provider:
    """Answers the n-th request with the n-th list of writes; `open` keeps the connection after it."""

    def __init__(self, *answers: list[bytes], keep_open: bool = True) -> None:
        self.answers = list(answers)
        self.keep_open = keep_open
        self.connections = 0
        self.heads: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while self.answers:
                self.heads.append(await reader.readuntil(b"\r\n\r\n"))
                await reader.readexactly(4)
                for part in self.answers.pop(0):
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.001)
                if not self.keep_open:
                    break
            if self.keep_open:
                await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


def play(provider: Provider, work: Work) -> None:
    async def run() -> None:
        server = await asyncio.start_server(provider.serve, "127.0.0.1", 0)
        upstream = AiohttpUpstream()
        try:
            async with asyncio.timeout(60):
                await work(upstream, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/x?y=z")
        finally:
            await upstream.close()
            server.close()
            await asyncio.sleep(0.01)

    asyncio.run(run())


async def ask(upstream: AiohttpUpstream, url: str, **headers: str) -> Reply:
    return await upstream.send(url, headers, b"body", lambda: None)


async def body_of(upstream: AiohttpUpstream, url: str, *, pumped: bool) -> bytes:
    reply = await ask(upstream, url)
    try:
        if not pumped:
            return await reply.read(10_000)
        parts: list[bytes] = []

        def take(data: bytes) -> bool:
            parts.append(data)
            return len(parts) % 2 == 0

        over = False
        while not over:
            over = await reply.pump(take)
        return b"".join(parts)
    finally:
        reply.close()


ANSWERS = {
    "with a length": [WHOLE],
    "in chunks": [CHUNKED],
    "to the end of the connection": [HEAD + b"\r\n", b"hel", b"lo"],
    "after interim answers": [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" + WHOLE,
    ],
    "with a trailer": [CHUNKED[:-2] + b"x-trailer: 1\r\n\r\n"],
    "packed with gzip": [HEAD + b"content-encoding: gzip\r\n\r\n" + gzip.compress(b"hello")],
    "packed with deflate": [HEAD + b"content-encoding: deflate\r\n\r\n" + zlib.compress(b"hello")],
}


@pytest.mark.parametrize("pumped", [False, True])
@pytest.mark.parametrize("step", [1, 7, 100_000])
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_arrives_whole_however_it_is_framed_and_split(
    name: str, step: int, *, pumped: bool
) -> None:
    data = b"".join(ANSWERS[name])
    provider = Provider([data[i : i + step] for i in range(0, len(data), step)], keep_open=False)

    async def work(upstream: AiohttpUpstream, url: str) -> None:
        assert await body_of(upstream, url, pumped=pumped) == b"hello"

    play(provider, work)
    assert provider.heads[0].startswith(b"POST /v1/x?y=z HTTP/1.1\r\nHost: 127.0.0.1:")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=12), st.integers(1, 400))
def test_chunks_that_came_together_keep_their_order_and_bytes(chunks: list[bytes], step: int) -> None:
    data = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    data += b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"

    async def work(upstream: AiohttpUpstream, url: str) -> None:
        assert await body_of(upstream, url, pumped=True) == b"".join(chunks)

    play(Provider([data[i : i + step] for i in range(0, len(data), step)]), work)


BROKEN = {
    "no answer": [],
    "cut in the headers": [HEAD],
    "cut in its length": [WHOLE[:-1]],
    "cut between chunks": [CHUNKED[:-5]],
    "cut in its packing": [HEAD + b"content-encoding: gzip\r\n\r\n" + gzip.compress(b"hello" * 50)[:-4]],
    "not packed as it says": [HEAD + b"content-encoding: gzip\r\n\r\nhello"],
    "packed as nobody asked": [HEAD + b"content-encoding: br\r\ncontent-length: 5\r\n\r\nhello"],
    "not HTTP": [b"SSH-2.0-OpenSSH\r\n\r\n"],
    "two lengths": [HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello"],
    "length and chunks": [
        HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    ],
    "endless headers": [HEAD + b"x: " + b"y" * 200_000],
    "another protocol": [b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nhello"],
    "too long": [HEAD + b"\r\n", b"x" * 20_000],
}


@pytest.mark.parametrize("pumped", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_is_an_error(name: str, *, pumped: bool) -> None:
    if name == "too long" and pumped:
        pytest.skip("a stream has no length")

    async def work(upstream: AiohttpUpstream, url: str) -> None:
        with pytest.raises(UpstreamError):
            await body_of(upstream, url, pumped=pumped)
        assert upstream.open_connections() == 0

    play(Provider(BROKEN[name], keep_open=False), work)


def test_what_came_before_the_break_is_handed_over() -> None:
    async def work(upstream: AiohttpUpstream, url: str) -> None:
        reply, got = await ask(upstream, url), []
        with pytest.raises(UpstreamError):
            await reply.pump(lambda data: bool(got.append(data)))
        reply.close()
        assert b"".join(got) == b"he"

    play(Provider([CHUNKED[: CHUNKED.index(b"3\r\nllo")] + b"zz\r\n"]), work)


def test_a_connection_is_used_again_only_after_a_whole_answer() -> None:
    provider = Provider([WHOLE], [CHUNKED], [WHOLE], [WHOLE])

    async def work(upstream: AiohttpUpstream, url: str) -> None:
        for pumped in (False, True):
            assert await body_of(upstream, url, pumped=pumped) == b"hello"
        assert provider.connections == 1
        (await ask(upstream, url)).close()
        await asyncio.sleep(0.05)
        assert await body_of(upstream, url, pumped=False) == b"hello"

    play(provider, work)
    assert provider.connections in (1, 2), "the third answer may have been whole before it was given up"


def test_what_nobody_asked_for_is_no_answer_to_the_next_request() -> None:
    provider = Provider([WHOLE, b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"], [WHOLE])

    async def work(upstream: AiohttpUpstream, url: str) -> None:
        assert await body_of(upstream, url, pumped=False) == b"hello"
        await asyncio.sleep(0.05)
        assert await body_of(upstream, url, pumped=False) == b"hello"

    play(provider, work)
    assert provider.connections == 2


def test_leaving_in_the_middle_closes_the_connection() -> None:
    async def work(upstream: AiohttpUpstream, url: str) -> None:
        reply = await ask(upstream, url)
        task = asyncio.create_task(reply.read(1000))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        reply.close()
        assert upstream.open_connections() == 0

    play(Provider([WHOLE[:-1]]), work)


def test_the_reason_a_taker_gives_reaches_the_task() -> None:
    async def work(upstream: AiohttpUpstream, url: str) -> None:
        def refuse(_data: bytes) -> bool:
            raise LookupError("not this")

        reply = await ask(upstream, url)
        with pytest.raises(LookupError, match="not this"):
            await reply.pump(refuse)
        reply.close()

    play(Provider([HEAD + b"\r\n", b"he", b"llo"]), work)


def test_a_provider_waits_while_nobody_takes() -> None:
    size = 30 * 2**20

    async def work(upstream: AiohttpUpstream, url: str) -> None:
        reply = await ask(upstream, url)
        await asyncio.sleep(0.3)
        assert sum(map(len, reply.pump.__self__._parts)) < 2**20, "what is unread is bounded"  # type: ignore[attr-defined]
        got = 0

        def take(data: bytes) -> bool:
            nonlocal got
            got += len(data)
            return False

        assert await reply.pump(take)
        reply.close()
        assert got == size

    play(Provider([HEAD + b"content-length: %d\r\n\r\n" % size, b"x" * size]), work)


@pytest.mark.parametrize("value", ["a\r\nx-evil: 1", "a\nb", "a\rb", "a\0b"])
def test_a_header_cannot_become_two(value: str) -> None:
    provider = Provider([WHOLE])

    async def work(upstream: AiohttpUpstream, url: str) -> None:
        with pytest.raises(UpstreamError, match="header") as raised:
            await ask(upstream, url, authorization=value)
        assert not raised.value.sent

    play(provider, work)
    assert provider.connections == 0


def test_headers_are_read_in_any_case_and_repeated_ones_joined() -> None:
    async def work(upstream: AiohttpUpstream, url: str) -> None:
        reply = await ask(upstream, url)
        assert reply.headers["x-ratelimit-remaining-requests"] == "7"
        assert reply.headers["via"] == "a, b"
        reply.close()

    lines = b"X-RateLimit-Remaining-Requests: 7\r\nVia: a\r\nvia: b\r\ncontent-length: 0\r\n\r\n"
    play(Provider([b"HTTP/1.1 200 OK\r\n" + lines]), work)


def certificate(folder: Path) -> Path:
    """A certificate for this machine that signs itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "provider")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - timedelta(1), now + timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    file = folder / "provider.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return file


@pytest.mark.parametrize("trusted", [False, True])
def test_over_tls_only_a_trusted_provider_is_talked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, trusted: bool
) -> None:
    file = certificate(tmp_path)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
    provider = Provider([WHOLE], [CHUNKED])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file)

    async def run() -> None:
        server = await asyncio.start_server(provider.serve, "127.0.0.1", 0, ssl=context)
        upstream = AiohttpUpstream()
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/x"
        if trusted:
            assert [await body_of(upstream, url, pumped=pumped) for pumped in (False, True)] == [b"hello"] * 2
        else:
            with pytest.raises(UpstreamError, match="certificate"):
                await ask(upstream, url)
        assert upstream.open_connections() == 0
        await upstream.close()
        server.close()
        await asyncio.sleep(0.05)

    uvloop.run(run())
    assert provider.connections == (1 if trusted else 0)
