"""What comes from the network and is no good request: refused in the one shape, and logged."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from certificates import certificate
from gateways import Served, asynchronous, before, listening
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.config import UserError
from tunesmith.config.schema.serve import Serve
from tunesmith.serve.errors import ApiError
from tunesmith.serve.front.intake import check_body, check_path
from tunesmith.serve.front.openapi import document
from tunesmith.serve.govern.usage import read_ask
from tunesmith.serve.listen import tls_context, url_of

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


class Upstream:
    """Answers everything, and keeps what it was asked."""

    def __init__(self) -> None:
        self.url, self.is_ready = "", True
        self.asked: list[str] = []

    @property
    def server(self) -> Upstream:
        return self

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        await request.read()
        return web.json_response({"id": "c-1", "choices": [], "usage": {"prompt_tokens": 1}})


async def raw(port: int, sent: bytes, *, then: bytes = b"", pause_s: float = 0.0) -> bytes:
    """Everything that comes back until the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    await asyncio.sleep(pause_s)
    writer.write(then)
    try:
        return await asyncio.wait_for(reader.read(), 15)
    finally:
        writer.close()


def parsed(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"aiohttp" not in head and b"Python" not in head
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


def statuses(served: Served) -> list[int]:
    return [line["status"] for line in served.lines() if line["ending"] == "refused"]


@asynchronous
async def test_slow_senders_are_cut_off_in_the_head_and_in_the_body() -> None:
    upstream = Upstream()
    async with (
        before(upstream, upstream.answer, read_timeout_s=0.3) as (served, _),
        listening(served.gateway, head_timeout_s=0.3) as port,
    ):
        for sent in (b"", b"POST /v1/comp", HEAD, HEAD + b"Content-Length: 10\r\n\r\n{"):
            started_s = time.monotonic()
            status, _ = parsed(await raw(port, sent))
            assert status == 408 and 0.2 < time.monotonic() - started_s < 10, sent
        # One byte now and then does not buy more time.
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        started_s = time.monotonic()
        for byte in HEAD:
            writer.write(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                answer = await asyncio.wait_for(reader.read(20), 0.05)
                assert answer.startswith(b"HTTP/1.1 408")
                break
        assert time.monotonic() - started_s < 10
        writer.close()
        assert statuses(served) == [408] * 5 and upstream.asked == []


@asynchronous
async def test_a_kept_connection_is_timed_anew_for_each_request() -> None:
    upstream = Upstream()
    whole = HEAD + b"Content-Length: 2\r\n\r\n{}"
    async with (
        before(upstream, upstream.answer) as (served, _),
        listening(served.gateway, head_timeout_s=0.4) as port,
    ):
        answer = await raw(port, whole, then=b"POST /v1/x", pause_s=0.2)
        assert answer.count(b"HTTP/1.1 200") == 1 and answer.count(b"HTTP/1.1 408") == 1
        assert statuses(served) == [408]
        answer = await raw(port, whole, then=whole + b"POST /v1/x", pause_s=0.2)
        assert answer.count(b"HTTP/1.1 200") == 2


class Flood(Upstream):
    """Streams without end, and notes when it is told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.left = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            while True:
                await response.write(b"data: " + b"x" * 60_000 + b"\n\n")
                await asyncio.sleep(0.002)
        finally:
            self.left.set()


@asynchronous
async def test_a_client_that_reads_nothing_is_cut_off_and_one_that_reads_is_not() -> None:
    upstream = Flood()
    async with (
        before(upstream, upstream.answer) as (served, _),
        listening(served.gateway, write_timeout_s=0.5) as port,
    ):
        clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for _, writer in clients:
            writer.write(HEAD + b"Content-Length: 2\r\n\r\n{}")
        (idle, _), (steady, _) = clients
        started_s, read = time.monotonic(), 0
        while not upstream.left.is_set() or time.monotonic() - started_s < 2:
            read += len(await steady.read(2**20))
        assert read > 10 * 2**20 and time.monotonic() - started_s < 20
        with contextlib.suppress(ConnectionError):
            while await idle.read(2**20):
                pass
        [line] = served.lines()
        assert line["ending"] == "disconnected"


@asynchronous
async def test_what_is_not_http_is_refused_in_the_same_shape() -> None:
    upstream = Upstream()
    async with (
        before(upstream, upstream.answer) as (served, _),
        listening(served.gateway) as port,
    ):
        for sent in (
            b"\x16\x03\x01 hello\r\n\r\n",
            b"GET /v1/models HTTP/9\r\n\r\n",
            HEAD + b"X-A: b\r\n c: d\r\nContent-Length: x\r\n\r\n",
            HEAD + b"X-A: " + b"a" * 20_000 + b"\r\n\r\n",
            HEAD + b"X-A: \x00\r\n\r\n",
            HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        ):
            status, error = parsed(await raw(port, sent))
            assert status == 400 and error["type"] == "invalid_request_error", sent
        assert statuses(served) == [400] * 6 and upstream.asked == []


@asynchronous
async def test_a_header_cannot_be_smuggled_through_an_id() -> None:
    upstream = Upstream()
    async with (
        before(upstream, upstream.answer) as (served, _),
        listening(served.gateway) as port,
    ):
        for value in (b"a\tb: c", b"a%0d%0aSet-Cookie: x=1", b"a" * 65, "é".encode()):
            sent = HEAD + b"Connection: close\r\nX-Request-Id: " + value
            answer = await raw(port, sent + b"\r\nContent-Length: 2\r\n\r\n{}")
            assert answer.startswith(b"HTTP/1.1 200") and b"Set-Cookie" not in answer
            assert value not in answer


@asynchronous
async def test_bodies_that_are_no_json_object_do_not_reach_the_engine() -> None:
    upstream = Upstream()
    bad = [
        b"", b"{", b"[1]", b"null", b'{"a": "\xff"}', b'"x"', b"[" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}", b'{"model": "\\ud800"}', b'{"model": "\xed\xa0\x80"}',
        "{}".encode("utf-16"),
    ]  # fmt: skip
    async with before(upstream, upstream.answer, max_body_mib=1) as (served, client):
        for body in bad:
            async with client.post("/v1/chat/completions", data=body) as response:
                assert response.status == 400, body[:20]
                assert (await response.json())["error"]["code"] == "invalid_json"
        async with client.post("/v1/chat/completions", data=b"x" * 2**21) as response:
            assert response.status == 413
        packed = {"Content-Encoding": "gzip"}
        async with client.post("/v1/completions", data=b"no gzip", headers=packed) as response:
            assert response.status == 400
        assert upstream.asked == []
        assert statuses(served) == [400] * len(bad) + [413, 400]


@asynchronous
async def test_paths_that_leave_the_api_do_not_reach_the_engine() -> None:
    upstream = Upstream()
    async with before(upstream, upstream.answer) as (served, _), listening(served.gateway) as port:
        paths = (
            "..%2Fsleep", "%2e%2e/metrics", "a/..%2f..%2fmetrics", "load_lora_adapter", "a//b",
            "unload_lora_adapter", "models", "a%00b", "a%0d%0ab", "\xff",
        )  # fmt: skip
        for path in paths:
            sent = HEAD.replace(b"completions", path.encode("latin-1"))
            answer = await raw(port, sent + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}")
            assert parsed(answer)[0] in (400, 404, 405), path
        assert upstream.asked == [] and len(statuses(served)) == len(paths)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_an_object_or_refused(body: bytes) -> None:
    ask = read_ask("completions", body)
    try:
        check_body("completions", ask)
    except ApiError as error:
        assert error.status == 400
    else:
        assert isinstance(json.loads(body), dict)


@given(st.text(alphabet="./ab%:\n\0é", max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_path_stays_below_its_root(path: str) -> None:
    try:
        check_path(path)
    except ApiError:
        return
    assert aiohttp.client.URL(f"http://engine/v1/{path}").path == f"/v1/{path}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
FIELDS = ("model", "messages", "prompt", "input", "stream", "stream_options", "max_tokens", "n")


def test_any_json_gets_an_answer_or_a_refusal() -> None:
    """A few hundred bodies; `tests/benchmarks/gateway_fuzz.py` sends thousands."""
    upstream = Upstream()
    bodies = []

    @given(
        st.dictionaries(st.sampled_from(FIELDS), JSON), st.sampled_from(list(document()["paths"]))
    )
    @settings(max_examples=250, deadline=None, database=None)
    def collect(body: dict[str, Any], path: str) -> None:
        bodies.append((path.replace("{model}", "x"), json.dumps(body).encode()))

    collect()

    @asynchronous
    async def send() -> None:
        async with before(upstream, upstream.answer) as (served, client):
            for path, body in bodies:
                async with client.post(path, data=body) as response:
                    assert response.status < 500, (path, body)
                    assert response.status == 200 or "error" in await response.json()
            assert served.journal.dropped == 0
            # GET-only paths are refused by the router, which is logged too.
            assert len(served.lines()) == len(bodies)

    send()


def test_a_certificate_that_is_none_is_told(tmp_path: Path) -> None:
    files = certificate(tmp_path)
    for key, words in ((tmp_path / "no.pem", "No such file"), (tmp_path / "c.pem", "not a")):
        with pytest.raises(UserError, match=words):
            tls_context(Serve(tls=files | {"key": str(key)}))
    locked = str(tmp_path / "locked.pem")
    subprocess.run(
        ["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", files["key"], "-out", locked],
        check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(UserError, match="passphrase"):
        tls_context(Serve(tls=files | {"key": locked}))


@asynchronous
async def test_https_alone_where_there_is_a_certificate() -> None:
    upstream = Upstream()
    with TemporaryDirectory() as folder:
        section = Serve(tls=certificate(Path(folder)), host="127.0.0.1")
        assert url_of(section).startswith("https://")
        trusted = ssl.create_default_context(cafile=str(section.tls.certificate))
        async with (
            before(upstream, upstream.answer) as (served, client),
            listening(served.gateway, tls=tls_context(section)) as port,
        ):
            async with client.get(f"https://127.0.0.1:{port}/healthz", ssl=trusted) as response:
                assert response.status == 200
            with pytest.raises(aiohttp.ClientError):
                await client.get(f"http://127.0.0.1:{port}/healthz")
