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
from tunesmith.engine.environment import has_gpu_engine
from tunesmith.pipeline import Stages
from tunesmith.serve.build import Builder
from tunesmith.serve.control import Control
from tunesmith.serve.fleet import Fleet
from tunesmith.serve.front.connection import Site
from tunesmith.serve.gateway import Gateway
from tunesmith.serve.govern.database import open_gateway
from tunesmith.serve.govern.governance import Governance
from tunesmith.serve.govern.journal import Journal
from tunesmith.serve.listen import bind, read_key, tls_context, url_of
from tunesmith.serve.rollout.decide import Plan
from tunesmith.serve.rollout.probes import read_probes
from tunesmith.serve.rollout.runner import Rollouts
from tunesmith.terminal import log, make_table


def run(stages: Stages) -> dict[str, Any]:
    """Serve the models of the recipe; returns what was served once it was told to stop."""
    section = stages.recipe.serve
    if section is None:
        raise UserError(f"{stages.path}: this needs a serve section")
    api_key = read_key(section)
    tls = tls_context(section)
    if any(not one.url for one in section.upstreams.values()) or not section.upstreams:
        has_gpu_engine()
    probes = read_probes(section.rollout.probes)
    builder = Builder(stages, section)
    fleet = builder.fleet()
    served = dict(fleet.table.upstreams)
    with bind(section) as listener:
        for name, host in fleet.engines.items():
            path = host.supervisor.server.log_path
            log(f"serve: loading {name} ({served[name].artifact_id}); the engine's log is {path}")
        started_s = time.monotonic()
        folder = stages.store.folder / "serve"
        database = open_gateway(stages.store.folder)
        with Journal(database, folder, rows_per_file=section.log.rows_per_file) as journal:
            governance = Governance(section, database, journal, fleet)
            gateway = Gateway(
                fleet,
                governance,
                api_key=api_key,
                asks_keys=section.keys,
                max_open_requests=section.max_open_requests,
            )
            plan = Plan.of(section.rollout, len(probes))
            rollouts = Rollouts(fleet, governance, database, plan, probes)
            gateway.rollout_of = rollouts.running
            control = Control(fleet, builder, database, rollouts)
            control.restore()
            asyncio.run(_serve(section, listener, tls, fleet, gateway, control))
    return {
        "id": ", ".join(one.artifact_id for one in served.values()),
        "variant": stages.variant(section.model)[0] if not section.upstreams else None,
        "model": ", ".join(fleet.table.routes),
        "url": url_of(section),
        "requests": gateway.requests,
        "engine_restarts": fleet.restarts,
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
    return make_table("Served", ("", result["variant"] or "upstreams"), rows)


async def _serve(
    section: Serve,
    listener: socket.socket,
    tls: ssl.SSLContext | None,
    fleet: Fleet,
    gateway: Gateway,
    control: Control,
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
        write_timeout_s=section.write_timeout_s,
        refused=gateway.governance.refused,
        ssl_context=tls,
    ).start()
    started_s = time.monotonic()
    running, steering = asyncio.create_task(fleet.run()), None
    try:
        await _first(running, fleet.became_ready.wait(), stop.wait())
        if fleet.became_ready.is_set():
            steering = asyncio.create_task(control.run())
            _announce(section, list(fleet.table.routes), time.monotonic() - started_s)
        await _first(running, stop.wait())
        if stop.is_set():
            if steering:
                steering.cancel()
            log("serve: stopping; open requests may finish (Ctrl-C again cuts them)")
            await _first(gateway.drain(section.drain_timeout_s), stop_now.wait())
        else:
            running.result()
    finally:
        await fleet.stop()
        running.cancel()
        await runner.cleanup()


async def _first(*waits: Any) -> None:
    """Return when one is done."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, wait in zip(tasks, waits, strict=True):
        if task is not wait:  # what was handed in as a task lives on
            task.cancel()


def _announce(section: Serve, models: list[str], load_s: float) -> None:
    url = url_of(section)
    body = json.dumps({"model": models[0], "messages": [{"role": "user", "content": "Hello"}]})
    key = f' -H "Authorization: Bearer ${section.api_key_env}"' if section.api_key_env else ""
    log(f"serve: ready after {load_s:.1f} s: {url} model {', '.join(models)}")
    log(f"page: {url.removesuffix('/v1')}/ui")
    log(
        f"try: curl {url}/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d {shlex.quote(body)}"
    )
