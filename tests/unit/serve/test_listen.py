"""What can be wrong with the address and the key is told before any work."""

from __future__ import annotations

import socket

import pytest

from tunesmith.config import UserError
from tunesmith.config.schema.serve import Serve
from tunesmith.serve.listen import bind, read_key, url_of


def test_a_taken_port_is_named_with_the_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"127.0.0.1:{port} is taken .* serve.port={port + 1}"):
            bind(Serve(port=port))
    with bind(Serve(port=port)) as listener:
        assert listener.getsockname() == ("127.0.0.1", port)


def test_a_host_that_is_not_here_is_named() -> None:
    with pytest.raises(UserError, match="203.0.113.9"):
        bind(Serve(host="203.0.113.9"))
    with pytest.raises(UserError, match="serve.host: no such host.invalid"):
        bind(Serve(host="no such host.invalid"))


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", "example.org"])
def test_other_machines_need_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="serve.api_key_env"):
        read_key(Serve(host=host))
    monkeypatch.setenv("SERVE_KEY", " secret\n")
    assert read_key(Serve(host=host, api_key_env="SERVE_KEY")) == "secret"


def test_loopback_needs_none_but_a_named_key_must_be_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [read_key(Serve(host=host)) for host in ("127.0.0.1", "::1", "localhost")] == [None] * 3
    monkeypatch.setenv("SERVE_KEY", "  ")
    with pytest.raises(UserError, match="SERVE_KEY is not set"):
        read_key(Serve(api_key_env="SERVE_KEY"))


def test_url_brackets_an_ipv6_host() -> None:
    assert url_of(Serve(host="::1", port=9)) == "http://[::1]:9/v1"
