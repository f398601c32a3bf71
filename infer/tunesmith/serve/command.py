"""`tunesmith serve`: the OpenAI API until Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import socket
import ssl
import time
from typing import Any

from aiohttp import web

from tunesmith.config import UserError
from tunesmith.config.schema.serve import Serve
from tunesmith.engine import EngineServer, engine_spec
from tunesmith.engine.environment import has_gpu_engine
from tunesmith.pipeline import Stages
from tunesmith.pipeline.verdict import require_approval
from tunesmith.serve.front.connection import Site
from tunesmith.serve.gateway import Gateway
from tunesmith.serve.govern.database import open_gateway
from tunesmith.serve.govern.governance import Governance
from tunesmith.serve.govern.journal import Journal
from tunesmith.serve.govern.measure import Measure
from tunesmith.serve.govern.price import find_price
from tunesmith.serve.listen import bind, read_key, tls_context, url_of
from tunesmith.serve.supervisor import Supervisor
from tunesmith.terminal import log, make_table


def run(stages: Stages) -> dict[str, Any]:
    """Serve one model of the recipe; returns what was served once it was told to stop."""
    section = stages.recipe.serve
    if section is None:
        raise UserError(f"{stages.path}: this needs a serve section")
    api_key = read_key(section)
    tls = tls_context(section)
    has_gpu_engine()
    variant, draft = stages.variant(section.model)
    require_approval(stages, variant)
    spec = engine_spec(stages, section.model)
    with bind(section) as listener:
        log_path = stages.store.folder / "serve" / f"engine-{section.port}.log"
        server = EngineServer(spec, log_path=log_path)
        log(f"serve: loading {variant} ({draft.id}); the engine's log is {log_path}")
        started_s = time.monotonic()
        supervisor = Supervisor(server)
        folder = stages.store.folder / "serve"
        database = open_gateway(stages.store.folder)
        with Journal(database, folder, rows_per_file=section.log.rows_per_file) as journal:
            governance = Governance(
                section,
                database,
                journal,
                Measure.load(
                    spec.model, spec.chat_template, trust_remote_code=spec.trust_remote_code
                ),
                artifact_id=draft.id,
                price=find_price(stages, variant),
            )
            gateway = Gateway(
                supervisor,
                governance,
                model_name=spec.served_name,
                artifact_id=draft.id,
                api_key=api_key,
                asks_keys=section.keys,
                max_open_requests=section.max_open_requests,
            )
            asyncio.run(_serve(section, listener, tls, supervisor, gateway))
    return {
        "id": draft.id,
        "variant": variant,
        "model": spec.served_name,
        "url": url_of(section),
        "requests": gateway.requests,
        "engine_restarts": supervisor.restarts,
        "log_dropped": journal.dropped,
        "seconds": round(time.monotonic() - started_s, 3),
    }


def show(result: dict[str, Any]) -> Any:
    """What was served."""
    rows = [
        ("model", result["model"]),
        ("artifact", result["id"]),
        ("requests", f"{result['requests']:,}"),
        ("engine restarts", result["engine_restarts"]),
        ("lines of the request log lost", result["log_dropped"]),
        ("seconds", f"{result['seconds']:,.1f}"),
    ]
    return make_table("Served", ("", result["variant"]), rows)


async def _serve(
    section: Serve,
    listener: socket.socket,
    tls: ssl.SSLContext | None,
    supervisor: Supervisor,
    gateway: Gateway,
) -> None:
    """Answer until the first SIGINT or SIGTERM, then drain; a second one cuts the drain short.

    Raises the error of an engine that never became ready.
    """
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stop_now if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    runner = web.AppRunner(
        gateway.app(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0
    )
    await runner.setup()
    await Site(
        runner,
        listener,
        head_timeout_s=section.read_timeout_s,
        refused=gateway.governance.refused,
        ssl_context=tls,
    ).start()
    engine = supervisor.start()
    try:
        await _first(engine, supervisor.became_ready.wait(), stop.wait())
        if supervisor.is_ready:
            _announce(section, supervisor.server.spec.served_name, supervisor.server.load_s)
        await _first(engine, stop.wait())
        if stop.is_set():
            log("serve: stopping; open requests may finish (Ctrl-C again cuts them)")
            await _first(gateway.drain(section.drain_timeout_s), stop_now.wait())
        else:
            engine.result()
    finally:
        await supervisor.stop()
        await runner.cleanup()


async def _first(*waits: Any) -> None:
    """Return when one is done."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, wait in zip(tasks, waits, strict=True):
        if task is not wait:  # what was handed in as a task lives on
            task.cancel()


def _announce(section: Serve, model: str, load_s: float) -> None:
    url = url_of(section)
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    key = f' -H "Authorization: Bearer ${section.api_key_env}"' if section.api_key_env else ""
    log(f"serve: ready after {load_s:.1f} s: {url} model {model}")
    log(
        f"try: curl {url}/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d {shlex.quote(body)}"
    )
