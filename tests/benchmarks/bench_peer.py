"""The same engine under the same load, measured by `vllm bench serve`, GuideLLM and ours, in turns.

python tests/benchmarks/bench_peer.py --model FOLDER --out docs/measured/bench-peer-cpu.json

`FOLDER` is a chat model. Closed loop: requests of random tokens, equal lengths, with as many in
flight. Throughput over the whole run (the peer trims no ramps), median TTFT and median TPOT must
be within 5 % of those of `vllm bench serve`, by the medians of the rounds. Prompts of ours are
token ids; the peers send text, which can be some tokens longer or shorter. GuideLLM comes into an
environment of its own and is only shown: its time per token is over all tokens, the first one's
too.

Open loop, near saturation and beyond: `vllm bench serve` at a rate and with a limit in flight, then
ours at the moments that it has made. Its TTFT begins when a place is free, ours when the request
was meant to be sent. Its own record of that wait, added to its TTFT, says how much of the
difference this explains.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from benchmark import describe, finish

from tunesmith.bench.client import open_session
from tunesmith.bench.generator import Generator
from tunesmith.bench.measure import Instruments, Meter, Target, open_meter
from tunesmith.bench.results import phase_figures
from tunesmith.bench.traffic import synthetic_prompts
from tunesmith.config.schema.bench import Bench
from tunesmith.config.schema.engine import Engine
from tunesmith.engine import EngineServer, EngineSpec

BOUND = 0.05
OPEN_LOADS = (0.9, 1.1)  # of the closed loop's requests per second
OPEN_REQUESTS = 768
GUIDELLM = "guidellm==0.8.1"
INPUT_TOKENS, OUTPUT_TOKENS, CONCURRENCY, REQUESTS = 64, 64, 16, 192
# The console script fails in the CPU wheel; its module does not.
PEER = (
    "from vllm.utils.argparse_utils import FlexibleArgumentParser;"
    "from vllm.benchmarks.serve import add_cli_args, main;"
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)


def main() -> None:
    """Measure, write, and end with 3 when a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = Engine(max_num_seqs=CONCURRENCY, max_model_len=256, kv_cache_gib=0.25)
    spec = EngineSpec(options.model, settings, "float32", "bench")
    with (
        tempfile.TemporaryDirectory() as folder,
        Generator() as generator,
        EngineServer(spec, log_path=Path(folder) / "engine.log") as server,
    ):
        rounds = [
            {
                "ours": asyncio.run(_ours(server.url, generator, seed)),
                "vllm": _vllm(server.url, options.model, Path(folder), seed),
                "guidellm": _guidellm(server.url, options.model, Path(folder), seed),
            }
            for seed in range(options.rounds)
        ]
        rate = median(one["ours"]["output_tokens_per_s"] for one in rounds) / OUTPUT_TOKENS
        opened = {
            f"{load:.0%} of saturation": _open_loop(
                server.url, generator, options.model, Path(folder), load * rate, options.rounds
            )
            for load in OPEN_LOADS
        }
    differences = {
        peer: {
            figure: median(one["ours"][figure] for one in rounds)
            / median(one[peer][figure] for one in rounds)
            - 1
            for figure in rounds[0]["ours"]
        }
        for peer in ("vllm", "guidellm")
    }
    missed = [
        f"{figure}: {difference:+.1%} from that of vllm bench serve"
        for figure, difference in differences["vllm"].items()
        if abs(difference) > BOUND
    ]
    found = {"bound": BOUND, "differences": differences, "rounds": rounds, "open_loop": opened}
    finish(options.out, describe(parser, found), missed)


async def _ours(url: str, generator: Generator, seed: int) -> dict[str, float]:
    bench = _bench(REQUESTS)
    async with _metered(url, bench, generator, seed) as meter:
        phase = await meter.full_queue()
    figures = phase_figures(phase, bench, seed)
    (one,) = phase.rounds
    return {
        "output_tokens_per_s": sum(sample.output_tokens for sample in one.samples) / one.wall_s,
        "median_ttft_ms": figures["ttft_ms"]["p50"]["value"],
        "median_tpot_ms": figures["tpot_ms"]["p50"]["value"],
    }


def _bench(requests: int, **load: Any) -> Bench:
    lengths = [{"input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS}]
    fixed = {"rounds": 1, "concurrency": CONCURRENCY, "prompts": "synthetic", "lengths": lengths}
    return Bench.model_validate({"requests": requests, **fixed, **load})


@contextlib.asynccontextmanager
async def _metered(url: str, bench: Bench, generator: Generator, seed: int) -> AsyncIterator[Meter]:
    async with open_session() as session:
        target, tools = Target("ours", url, "bench"), Instruments(session, generator)
        meter = await open_meter(target, bench, seed, tools, synthetic_prompts(bench, seed))
        await meter.warm_up()
        yield meter


def _vllm(url: str, model: Path, folder: Path, seed: int) -> dict[str, float]:
    found = _bench_serve(url, model, folder, 1000 + seed, REQUESTS)
    return {
        "output_tokens_per_s": found["output_throughput"],
        "median_ttft_ms": found["median_ttft_ms"],
        "median_tpot_ms": found["median_tpot_ms"],
    }


def _bench_serve(
    url: str, model: Path, folder: Path, seed: int, requests: int, **load: Any
) -> dict[str, Any]:
    """What `vllm bench serve` keeps of one run."""
    result = folder / f"peer-{seed}.json"
    arguments = {
        "backend": "openai",
        "base-url": url.removesuffix("/v1"),
        "endpoint": "/v1/completions",
        "model": "bench",
        "tokenizer": model,
        "dataset-name": "random",
        "random-input-len": INPUT_TOKENS,
        "random-output-len": OUTPUT_TOKENS,
        "num-prompts": requests,
        "max-concurrency": CONCURRENCY,
        "num-warmups": CONCURRENCY,
        "seed": seed,
        "temperature": 0,
        "result-dir": folder,
        "result-filename": result.name,
        **load,
    }
    flags = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-c", PEER, *flags, "--ignore-eos", "--save-result",
               "--save-detailed", "--disable-tqdm"]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    assert not found.get("failed"), found
    return found


def _open_loop(
    url: str, generator: Generator, model: Path, folder: Path, rate: float, rounds: int
) -> dict[str, Any]:
    """TTFT as the peer tells it, with the wait for a place in its client, and as ours tells it."""
    runs = []
    for seed in range(rounds):
        peer = _bench_serve(
            url, model, folder, 3000 + seed, OPEN_REQUESTS, **{"request-rate": rate}
        )
        told_s, waited_s = np.array(peer["ttfts"]), np.array(peer["queue_times"])
        meant_s = np.sort(np.array(peer["start_times"]) - waited_s)
        trace = folder / f"moments-{seed}.jsonl"
        trace.write_text("".join(f'{{"at_s": {moment}}}\n' for moment in meant_s))
        bench = _bench(
            OPEN_REQUESTS,
            arrivals="trace",
            trace=trace,
            request_rate=(OPEN_REQUESTS - 1) / (meant_s[-1] - meant_s[0]),
        )
        figures = asyncio.run(_arrivals(url, bench, generator, seed))
        runs.append(
            {
                percent: {
                    "vllm_ms": float(np.percentile(told_s, int(percent[1:]))) * 1e3,
                    "vllm_with_its_wait_ms": float(
                        np.percentile(told_s + waited_s, int(percent[1:]))
                    )
                    * 1e3,
                    "ours_ms": figures["ttft_ms"][percent]["value"],
                }
                for percent in ("p50", "p99")
            }
        )
    medians = {
        percent: {who: median(run[percent][who] for run in runs) for who in runs[0][percent]}
        for percent in runs[0]
    }
    return {"request_rate": rate, "ttft": medians, "rounds": runs}


async def _arrivals(url: str, bench: Bench, generator: Generator, seed: int) -> dict[str, Any]:
    async with _metered(url, bench, generator, seed) as meter:
        phase = await meter.arrivals()
    return phase_figures(phase, bench, seed)


def _guidellm(url: str, model: Path, folder: Path, seed: int) -> dict[str, float]:
    result = folder / f"guidellm-{seed}.json"
    arguments = {
        "backend": f"kind=openai_http,target={url.removesuffix('/v1')},model=bench,"
        "request_format=/v1/completions",
        "profile": f"kind=concurrent,streams={CONCURRENCY}",
        "constraint": f"kind=max_requests,count={REQUESTS}",
        "data": f"kind=synthetic_text,prompt_tokens={INPUT_TOKENS},output_tokens={OUTPUT_TOKENS}",
        "tokenizer": f"kind=huggingface_auto,model={model}",
        "seed": f"kind=static,value={2000 + seed}",
        "output": f"kind=json,path={result}",
    }
    flags = [text for name, value in arguments.items() for text in (f"--{name}", value)]
    command = [str(_environment(folder) / "bin" / "guidellm"), "run", *flags, "--disable-console"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    (found,) = json.loads(result.read_text(encoding="utf-8"))["benchmarks"]
    metrics = found["metrics"]
    assert metrics["request_totals"]["successful"] == REQUESTS, metrics["request_totals"]
    scheduled = found["scheduler_metrics"]
    seconds = scheduled["request_end_time"] - scheduled["request_start_time"]
    return {
        "output_tokens_per_s": REQUESTS * OUTPUT_TOKENS / seconds,
        "median_ttft_ms": metrics["time_to_first_token_ms"]["successful"]["median"],
        "median_tpot_ms": metrics["inter_token_latency_ms"]["successful"]["median"],
    }


def _environment(folder: Path) -> Path:
    """A virtual environment with GuideLLM over the packages that are here."""
    made = folder / "guidellm"
    if not made.exists():
        venv.create(made, with_pip=True)
        (ours,) = {path for path in map(Path, sys.path) if path.name == "site-packages"}
        (theirs,) = made.glob("lib/python*/site-packages")
        (theirs / "ours.pth").write_text(f"{ours}\n", encoding="utf-8")
        pip = [str(made / "bin" / "python"), "-m", "pip", "install", "--quiet", GUIDELLM]
        subprocess.run(pip, check=True, stdout=sys.stderr)
    return made


if __name__ == "__main__":
    main()
