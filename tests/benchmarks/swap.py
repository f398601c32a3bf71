"""An adapter and then a whole model replaced on a real engine that is being asked all the time, and
a server stopped while it streams.

python tests/benchmarks/swap.py --out docs/measured/swap-cpu.json

The models are small and know nothing: what is looked at is whose tokens come back, and whether all
of them do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from benchmark import describe, finish
from mocked import free_port

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from tiny import make_model, make_stages  # noqa: E402

from tunesmith.config.load import dump_recipe  # noqa: E402
from tunesmith.pipeline import Stages  # noqa: E402

TOKENS = 12
STREAMS, STREAM_TOKENS, MOST_UNREADY_MS = 20, 400, 100
PROMPTS = [f"{at} plus {at} is" for at in range(10)]
ENGINE = {"max_num_seqs": 16, "kv_cache_gib": 0.1}


@dataclass(frozen=True)
class Answer:
    """What came back for one request; `fault` says why it is none."""

    prompt: str
    models: tuple[str, ...] = ()
    text: str = ""
    fault: str | None = None


def main() -> None:
    """Swap, count, and end with 3 when an answer was lost, cut, mixed or wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--swaps", nargs="*", default=["adapter", "model", "stop"])
    parser.add_argument("--requests", type=int, default=1000, help="of each swap")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        base = make_model(scratch / "base", "llama")
        adapters = [_adapter(base, scratch / f"v{at}", at) for at in range(1, 5)]
        found = {}
        if "adapter" in options.swaps:
            found["adapter"] = _swap_adapter(scratch, base, adapters, options)
        if "model" in options.swaps:
            found["model"] = _swap_model(scratch, base, options)
        stopped = _stop(scratch, base) if "stop" in options.swaps else None
    faults = [
        f"{name}: {what}: {one[what]}"
        for name, one in found.items()
        for what in ("faults", "mixed", "wrong")
        if one[what]
    ]
    if "adapter" in found and found["adapter"]["retired_status"] != 404:
        faults.append("a retired adapter answered")
    faults += [f"{name}: one version" for name, one in found.items() if len(one["answers"]) != 2]
    if stopped:
        faults += stopped["faults"]
        found["stop"] = stopped
    finish(options.out, describe(parser, found), faults)


def _swap_adapter(
    scratch: Path, base: Path, adapters: list[Path], options: argparse.Namespace
) -> dict[str, Any]:
    """v1 → v2 under load; then v2's folder, and those of two more, are deleted and asked for."""
    first, second, *more = adapters
    path, port, store = _adapter_recipe(scratch / "one", base, first)
    with _serving(path, port):
        before = asyncio.run(_answers(port))
        answers, swap_s = asyncio.run(_load(port, store, str(second), options))
        after = asyncio.run(_answers(port))
        retired = after[0].models[0]
        for adapter in more:
            _swap(store, str(adapter))
        for adapter in adapters:
            shutil.rmtree(adapter)
        status = asyncio.run(_status(port, retired))
        lives = asyncio.run(_answers(port))
    path, port, _ = _adapter_recipe(scratch / "two", base, scratch / "copy-of-v2")
    with _serving(path, port):
        fresh = asyncio.run(_answers(port))
    right = {one.models[0]: one for one in (*before, *after)}
    return _summary(answers, [*before, *after], swap_s) | {
        "retired_status": status,
        "lives_after": all(one.fault is None for one in lives),
        "wrong": [
            f"{one.prompt}: {one.text!r} by a fresh server, {other.text!r} after the swap"
            for one, other in zip(fresh, after, strict=True)
            if one.text != other.text
        ],
        "versions": sorted(right),
    }


def _swap_model(scratch: Path, base: Path, options: argparse.Namespace) -> dict[str, Any]:
    """bf16 → INT8, on an engine beside the first."""
    port = free_port()
    stages = make_stages(
        scratch / "model", base, quantize={"scheme": "w8a8-int8", "calibration_rows": 8},
        serve={"port": port, "model": "base"}, engine=ENGINE,
    )  # fmt: skip
    path = _write(stages, scratch / "model")
    command = [sys.executable, "-m", "tunesmith.cli", "quantize", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    store = stages.store.folder
    with _serving(path, port):
        before = asyncio.run(_answers(port))
        answers, swap_s = asyncio.run(_load(port, store, "w8a8-int8", options))
        after = asyncio.run(_answers(port))
    return _summary(answers, [*before, *after], swap_s) | {"wrong": []}


def _stop(scratch: Path, base: Path) -> dict[str, Any]:
    """SIGTERM with streams open: how soon load balancers are told, and whether the streams end."""
    port = free_port()
    stages = make_stages(
        scratch / "stop", base, serve={"port": port, "model": "base"},
        engine=ENGINE | {"max_num_seqs": STREAMS, "kv_cache_gib": 0.5},
    )  # fmt: skip
    with _serving(_write(stages, scratch / "stop"), port) as process:
        return asyncio.run(_stop_while_streaming(process, port))


async def _stop_while_streaming(process: subprocess.Popen[bytes], port: int) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session:
        streams = [
            asyncio.create_task(_ask(session, port, f"{at} is", stream=True, tokens=STREAM_TOKENS))
            for at in range(STREAMS)
        ]
        await asyncio.sleep(0.5)
        is_open = sum(not stream.done() for stream in streams)
        process.send_signal(signal.SIGTERM)
        stopped_s = time.monotonic()
        ready = f"http://127.0.0.1:{port}/readyz"
        while await _status_of(session, ready) != 503:
            await asyncio.sleep(0.002)
        unready_ms = 1000 * (time.monotonic() - stopped_s)
        answers = await asyncio.gather(*streams)
    faults = [f"stop: a stream: {one.fault}" for one in answers if one.fault]
    if unready_ms > MOST_UNREADY_MS:
        faults.append(f"stop: not ready told after {unready_ms:.0f} ms")
    if is_open < STREAMS:
        faults.append(f"stop: only {is_open} streams were open")
    return {
        "streams": is_open,
        "complete": sum(one.fault is None for one in answers),
        "unready_ms": round(unready_ms, 1),
        "faults": faults,
    }


async def _status_of(session: aiohttp.ClientSession, url: str) -> int:
    async with session.get(url) as response:
        return response.status


def _summary(answers: list[Answer], reference: list[Answer], swap_s: float) -> dict[str, Any]:
    """Counts; `mixed` are answers that are not, whole, what one version says."""
    known = {(one.models[0], one.prompt): one.text for one in reference}
    good = [one for one in answers if one.fault is None]
    mixed = [
        f"{one.prompt}: {one.models}: {one.text!r}"
        for one in good
        if len(one.models) != 1 or known.get((one.models[0], one.prompt)) != one.text
    ]
    return {
        "requests": len(answers),
        "answers": dict(Counter(one.models[0] for one in good)),
        "faults": dict(Counter(one.fault for one in answers if one.fault)),
        "mixed": mixed,
        "swap_s": round(swap_s, 2),
    }


async def _load(
    port: int, store: Path, target: str, options: argparse.Namespace
) -> tuple[list[Answer], float]:
    """So many requests at least, and as many more as come while the swap is on."""
    answers: list[Answer] = []
    is_moved = asyncio.Event()
    numbers = iter(range(10**9))

    async def client(session: aiohttp.ClientSession) -> None:
        while len(answers) < options.requests or not is_moved.is_set():
            number = next(numbers)
            prompt = PROMPTS[number % len(PROMPTS)]
            answers.append(await _ask(session, port, prompt, stream=number % 2 == 0))

    async with aiohttp.ClientSession() as session:
        clients = [asyncio.create_task(client(session)) for _ in range(options.clients)]
        while len(answers) < options.requests // 3:
            await asyncio.sleep(0.05)
        began_s = time.monotonic()
        await asyncio.to_thread(_swap, store, target)
        swap_s = time.monotonic() - began_s
        is_moved.set()
        await asyncio.gather(*clients)
    return answers, swap_s


async def _answers(port: int) -> list[Answer]:
    """Of every prompt, one after another."""
    async with aiohttp.ClientSession() as session:
        return [await _ask(session, port, prompt, stream=False) for prompt in PROMPTS]


async def _ask(
    session: aiohttp.ClientSession, port: int, prompt: str, *, stream: bool, tokens: int = TOKENS
) -> Answer:
    body = {"model": "test", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    body |= {"ignore_eos": True, "stream": stream}
    url = f"http://127.0.0.1:{port}/v1/completions"
    try:
        async with session.post(url, json=body) as response:
            text = await response.text()
            if response.status != 200:
                return Answer(prompt, fault=f"{response.status} {text[:200]}")
    except aiohttp.ClientError as error:
        return Answer(prompt, fault=type(error).__name__)
    if not stream:
        found = json.loads(text)
        if found["usage"]["completion_tokens"] != tokens:
            return Answer(prompt, fault="cut")
        return Answer(prompt, (found["model"],), found["choices"][0]["text"])
    *events, last = [line[6:] for line in text.split("\n\n") if line]
    pieces = [json.loads(event) for event in events]
    if told := next((one["error"] for one in pieces if "error" in one), None):
        return Answer(prompt, fault=f"in the stream: {told}")
    reasons = [one["choices"][0]["finish_reason"] for one in pieces]
    if last != "[DONE]" or reasons[-1] != "length":
        return Answer(prompt, fault="cut")
    models = tuple(dict.fromkeys(one["model"] for one in pieces))
    return Answer(prompt, models, "".join(one["choices"][0]["text"] for one in pieces))


async def _status(port: int, model: str) -> int:
    body = {"model": model, "prompt": "x", "max_tokens": 1}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as response,
    ):
        return response.status


def _adapter_recipe(folder: Path, base: Path, adapter: Path) -> tuple[Path, int, Path]:
    port = free_port()
    stages = make_stages(
        folder, base, model={"dtype": "float32"}, train={"method": "lora", "lora": {"r": 4}},
        serve={"port": port, "model": "adapter"}, engine=ENGINE,
    )  # fmt: skip
    with stages.store.write(stages.trained, stages.recipe) as work:
        shutil.copytree(adapter, work.out, dirs_exist_ok=True)
    return _write(stages, folder), port, stages.store.folder


def _adapter(base: Path, folder: Path, seed: int) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    if seed == 2:
        shutil.copytree(folder, folder.parent / "copy-of-v2")
    return folder


def _write(stages: Stages, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(stages.recipe))
    return path


def _swap(store: Path, target: str) -> None:
    command = [sys.executable, "-m", "tunesmith.cli", "rollout", "swap", "test", "--to", target]
    subprocess.run([*command, "--store", str(store)], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def _serving(recipe: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`tunesmith serve` with a real engine."""
    log = (recipe.parent / "serve.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith.cli", "serve", str(recipe), "--json"],
        stdout=log, stderr=log, env=os.environ,
    )  # fmt: skip
    try:
        asyncio.run(_until_ready(port, process))
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        log.close()


async def _until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 400
    async with aiohttp.ClientSession() as session:
        while True:
            assert process.poll() is None and time.monotonic() < deadline_s
            try:
                async with session.get(f"http://127.0.0.1:{port}/readyz") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)


if __name__ == "__main__":
    main()
