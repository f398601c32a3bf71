"""The port and the key: everything about the address that can be wrong, found before any work."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import ssl

from tunesmith.config import UserError
from tunesmith.config.schema.serve import Serve


def read_key(section: Serve) -> str | None:
    """The key that clients must send. Raises UserError where one is due and there is none."""
    name = section.api_key_env
    if name is None:
        if not section.keys and not _is_loopback(section.host):
            raise UserError(
                f"serve.host: {section.host} can be reached from other machines, so clients must "
                "show a key: set serve.keys: true and make some with tunesmith keys create, or put "
                "one into an environment variable and name that in serve.api_key_env, or serve on "
                "127.0.0.1"
            )
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"serve.api_key_env: the environment variable {name} is not set")
    return key


def bind(section: Serve) -> socket.socket:
    """The listening socket. Raises UserError when the address cannot be had."""
    where = f"{section.host}:{section.port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            section.host, section.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
    except socket.gaierror as error:
        raise UserError(f"serve.host: {section.host}: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"serve.port: {where} is taken by another process; stop that one, or choose "
                f"another port, such as serve.port={section.port % 65535 + 1}"
            ) from error
        raise UserError(f"serve: cannot listen on {where}: {error.strerror}") from error
    return listener


def tls_context(section: Serve) -> ssl.SSLContext | None:
    """TLS 1.2 or newer with the recipe's certificate; None for plain HTTP. Raises UserError."""
    if section.tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(section.tls.certificate, section.tls.key, password=_no_passphrase)
    except (OSError, ValueError) as error:
        raise UserError(
            f"serve.tls: {section.tls.certificate} and {section.tls.key} are not a certificate in "
            f"PEM form and its private key: {error}"
        ) from error
    return context


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase, which nobody could type when the server starts")


def url_of(section: Serve) -> str:
    """Base URL for clients."""
    host = f"[{section.host}]" if ":" in section.host else section.host
    return f"{'https' if section.tls else 'http'}://{host}:{section.port}/v1"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
