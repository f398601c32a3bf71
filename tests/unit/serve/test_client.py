"""The client before servers that say exactly these bytes: every way to end an answer or to fail."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from certificates import certificate
from hypothesis import given, settings
from hypothesis import strategies as some

from tunesmith.serve import client as module
from tunesmith.serve.client import Answer, Client, LostError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: Text/Plain; charset=utf-8\r\n"
WHOLE = HEAD + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CLOSE = b"<close>"
Script = Sequence[bytes]


class Server:
    """Answers each request with the next script; `CLOSE` in it closes the connection."""

    def __init__(self, scripts: Sequence[Script], *, gap_s: float = 0.0) -> None:
        self._scripts, self._gap_s = list(scripts), gap_s
        self.connections = self.closed = 0
        self.requests: list[bytes] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                self.requests.append(head + await reader.readexactly(int(length or 0)))
                for piece in self._scripts.pop(0):
                    if piece == CLOSE:
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(self._gap_s)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.closed += 1
            writer.close()


@contextlib.asynccontextmanager
async def serving(
    *scripts: Script, gap_s: float = 0.0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Server]:
    found = Server(scripts, gap_s=gap_s)
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0, ssl=tls)
    scheme, port = "https" if tls else "http", server.sockets[0].getsockname()[1]
    found.url = f"{scheme}://localhost:{port}/v1"
    async with server:
        yield found


async def whole(answer: Answer) -> bytes:
    body = bytearray()
    with answer:
        while piece := await answer.read():
            body += piece
    return bytes(body)


def play(script: Script, method: str = "POST") -> tuple[Answer, bytes]:
    """One answer and its body."""

    async def run() -> tuple[Answer, bytes]:
        async with serving(script) as server, Client() as client:
            answer = await client.ask(method, f"{server.url}/x", body=b"{}")
            return answer, await whole(answer)

    return asyncio.run(run())


def test_what_is_asked_and_that_the_connection_is_kept() -> None:
    async def run() -> None:
        async with serving([WHOLE], [WHOLE], [WHOLE]) as server, Client() as client:
            for body in (b"{}", b"x" * 2**17):
                answer = await client.ask(
                    "POST", f"{server.url}/a?b=c%20d", headers={"Accept": "é"}, body=body
                )
                assert answer.status == 200 and answer.content_type == "text/plain"
                assert answer.is_whole and await whole(answer) == b"hello"
            await whole(await client.ask("GET", f"{server.url}/models"))
            assert server.connections == 1, "it is used again"
            first, _, get = server.requests
            assert first.startswith(b"POST /v1/a?b=c%20d HTTP/1.1\r\nHost: localhost:")
            assert "Accept: é\r\n".encode() in first and first.endswith(b"\r\n\r\n{}")
            assert b"Accept-Encoding: identity\r\n" in first and b"Content-Length: 2\r\n" in first
            assert b"Content-Length" not in get

    asyncio.run(run())


BODIES = [
    [WHOLE],
    [CHUNKED, b"2\r\nhe\r\n", b"3;x=y\r\nllo\r\n0\r\nContent-Type: other\r\n\r\n"],
    [HEAD + b"\r\n", b"hel", b"lo", CLOSE],
    [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n" + WHOLE],
    [b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nhello", CLOSE],
]


@pytest.mark.parametrize("script", BODIES)
def test_every_way_to_end_a_body(script: Script) -> None:
    answer, body = play(script)
    assert body == b"hello" and answer.is_whole and answer.content_type == "text/plain"


@settings(max_examples=30, deadline=None)
@given(which=some.sampled_from(BODIES[:3]), cuts=some.lists(some.integers(1, 150), max_size=6))
def test_bytes_arrive_in_any_pieces(which: Script, cuts: list[int]) -> None:
    text = b"".join(which).removesuffix(CLOSE)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    ended = [CLOSE] if which[-1] == CLOSE else []

    async def run() -> bytes:
        async with serving([*pieces, *ended], gap_s=0.001) as server, Client() as client:
            return await whole(await client.ask("POST", server.url))

    assert asyncio.run(run()) == b"hello"


def test_answers_without_a_body() -> None:
    assert play([HEAD + b"Content-Length: 5\r\n\r\n"], "HEAD")[1] == b""
    assert play([b"HTTP/1.1 204 No Content\r\n\r\n"])[1] == b""
    moved, body = play([b"HTTP/1.1 308 Moved\r\nLocation: /v2\r\nContent-Length: 0\r\n\r\n"])
    assert (moved.status, moved.headers["location"], body) == (308, "/v2", b"")


@pytest.mark.parametrize(
    "script",
    [
        [CLOSE],
        [b"SSH-2.0-OpenSSH_9.2\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello"],
        [b"HTTP/1.1 200 OK\r\nA: " + b"a" * 2**19],
        [b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", CLOSE],
    ],
)
def test_what_is_no_answer(script: Script) -> None:
    with pytest.raises(LostError):
        play(script)


@pytest.mark.parametrize(
    ("head", "pieces"),
    [
        (HEAD + b"Content-Length: 9\r\n\r\n", [b"hello", CLOSE]),
        (CHUNKED, [b"5\r\nhello\r\n", CLOSE]),
        (CHUNKED, [b"5\r\nhello\r\n", b"no length\r\n"]),
    ],
)
def test_an_answer_that_breaks_off_gives_what_came_before(head: bytes, pieces: Script) -> None:
    async def run() -> None:
        async with serving([head, *pieces], gap_s=0.02) as server, Client() as client:
            answer = await client.ask("POST", server.url)
            found = await answer.read()
            with pytest.raises(LostError):
                while piece := await answer.read():
                    found += piece
            assert found == b"hello" and not answer.is_whole

    asyncio.run(run())


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]

    async def run(url: str) -> None:
        async with Client() as client:
            await client.ask("GET", url)

    with pytest.raises(LostError, match=r"Connect|refused"):
        asyncio.run(run(f"http://127.0.0.1:{port}/v1"))
    with pytest.raises(LostError):
        asyncio.run(run("http://no-such-host.invalid/v1"))
    for url in ("http://host:99999/v1", "http://a..b/v1"):
        with pytest.raises(LostError):
            asyncio.run(run(url))


def test_a_connection_is_not_used_again_where_that_is_not_safe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked_to_close = HEAD + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello"
    too_much = WHOLE + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"

    async def run(first: Script, *, wait_s: float = 0.0) -> int:
        async with serving(first, [WHOLE]) as server, Client() as client:
            for _ in range(2):
                assert await whole(await client.ask("POST", server.url)) == b"hello"
                await asyncio.sleep(wait_s)
            return server.connections

    assert asyncio.run(run([WHOLE])) == 1
    assert asyncio.run(run([asked_to_close])) == 2
    assert asyncio.run(run([too_much])) == 2
    assert asyncio.run(run([WHOLE, too_much], wait_s=0.05)) == 2, "said without being asked"
    assert asyncio.run(run([WHOLE, CLOSE], wait_s=0.05)) == 2
    monkeypatch.setattr(module, "_MOST_IDLE_S", 0.01)
    assert asyncio.run(run([WHOLE], wait_s=0.05)) == 2, "its server may be about to close it"


def test_a_slow_reader_holds_the_sender_up() -> None:
    piece, count, sent = b"x" * 2**16, 400, 0

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % (len(piece) * count))
        for _ in range(count):
            writer.write(piece)
            await writer.drain()
            sent += 1

    async def run() -> None:
        async with await asyncio.start_server(pour, "127.0.0.1", 0) as server, Client() as client:
            port = server.sockets[0].getsockname()[1]
            with await client.ask("GET", f"http://127.0.0.1:{port}/") as answer:
                await asyncio.sleep(0.3)
                assert sent < count / 2, "the rest waits at its sender"
                assert len(await whole(answer)) == len(piece) * count

    asyncio.run(run())


def test_who_leaves_closes_the_connection() -> None:
    async def gone(act: Callable[[Client, Server], Awaitable[None]]) -> None:
        begun = [CHUNKED + b"1\r\nx\r\n", *[b"1\r\ny\r\n"] * 100]
        async with serving(begun, gap_s=0.05) as server, Client() as client:
            await act(client, server)
            async with asyncio.timeout(5):
                while not server.closed:
                    await asyncio.sleep(0.01)
            assert not client._idle

    async def leave(client: Client, server: Server) -> None:
        with await client.ask("POST", server.url):
            pass

    async def cancel(client: Client, server: Server) -> None:
        answer = await client.ask("POST", server.url)
        with contextlib.suppress(TimeoutError), answer:
            async with asyncio.timeout(0.1):
                while await answer.read():
                    pass

    asyncio.run(gone(leave))
    asyncio.run(gone(cancel))


def test_a_wait_for_the_head_can_be_cancelled() -> None:
    async def run() -> None:
        async with serving([b"", WHOLE], gap_s=0.3) as server, Client() as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await client.ask("POST", server.url)
            async with asyncio.timeout(5):
                while not server.closed:
                    await asyncio.sleep(0.01)

    asyncio.run(run())


def test_no_header_can_hold_another() -> None:
    async def run(headers: dict[str, str]) -> None:
        async with serving([WHOLE]) as server, Client() as client:
            with pytest.raises(ValueError, match="line break"):
                await client.ask("POST", server.url, headers=headers)

    for text in ("a\r\nX-Forged: b", "a\nb", "a\rb"):
        asyncio.run(run({"Authorization": text}))


def test_tls_needs_a_name_that_is_vouched_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["certificate"], files["key"])

    async def run() -> bytes:
        async with serving([WHOLE], tls=context) as server, Client() as client:
            return await whole(await client.ask("POST", server.url))

    with pytest.raises(LostError, match="certificate"):
        asyncio.run(run())
    trusted = ssl.create_default_context(cafile=files["certificate"])
    monkeypatch.setattr(module, "_trusted", lambda: trusted)
    assert asyncio.run(run()) == b"hello"
