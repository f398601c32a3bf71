"""A certificate for servers in tests."""

from __future__ import annotations

import subprocess
from pathlib import Path


def certificate(folder: Path) -> dict[str, str]:
    """What `serve.tls` takes: a certificate that nobody vouches for, and its key."""
    files = {"certificate": str(folder / "c.pem"), "key": str(folder / "k.pem")}
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
            "subjectAltName=IP:127.0.0.1,DNS:localhost",
            "-out", files["certificate"], "-keyout", files["key"],
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return files
