"""The same engine under the same load, measured by `vllm bench serve`, GuideLLM and ours, in turns.

python tests/benchmarks/bench_peer.py --model FOLDER --out docs/measured/bench-peer-cpu.json

`FOLDER` is a chat model. Closed loop: requests of random tokens, equal lengths, with as many in
flight. Throughput over the whole run (the peer trims no ramps), median TTFT and median TPOT must
be within 5 % of those of `vllm bench serve`, by the medians of the rounds. Prompts of ours are
token ids; the peers send text, which can be some tokens longer or shorter. GuideLLM comes into an
environment of its own and is only shown: its time per token is over all tokens, the first one's
too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from statistics import median
from typing import Any

from benchmark import describe, finish

from tunesmith.bench.client import open_session
from tunesmith.bench.generator import Generator
from tunesmith.bench.measure import Instruments, Meter, Phase, Target, open_meter
from tunesmith.bench.results import phase_figures
from tunesmith.bench.traffic import synthetic_prompts
from tunesmith.config.schema.bench import Bench
from tunesmith.config.schema.engine import Engine
from tunesmith.engine import EngineServer, EngineSpec

BOUND = 0.05
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
    found = {"bound": BOUND, "differences": differences, "rounds": rounds}
    finish(options.out, describe(parser, found), missed)


async def _ours(url: str, generator: Generator, seed: int) -> dict[str, float]:
    lengths = [{"input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS}]
    bench = Bench.model_validate(
        {
            "requests": REQUESTS,
            "rounds": 1,
            "concurrency": CONCURRENCY,
            "prompts": "synthetic",
            "lengths": lengths,
        }
    )
    async with open_session() as session:
        target, tools = Target("ours", url, "bench"), Instruments(session, generator)
        meter: Meter = await open_meter(target, bench, seed, tools, synthetic_prompts(bench, seed))
        await meter.warm_up()
        phase: Phase = await meter.full_queue()
    figures = phase_figures(phase, bench, seed)
    (one,) = phase.rounds
    return {
        "output_tokens_per_s": sum(sample.output_tokens for sample in one.samples) / one.wall_s,
        "median_ttft_ms": figures["ttft_ms"]["p50"]["value"],
        "median_tpot_ms": figures["tpot_ms"]["p50"]["value"],
    }


def _vllm(url: str, model: Path, folder: Path, seed: int) -> dict[str, float]:
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
        "num-prompts": REQUESTS,
        "max-concurrency": CONCURRENCY,
        "num-warmups": CONCURRENCY,
        "seed": 1000 + seed,
        "temperature": 0,
        "result-dir": folder,
        "result-filename": result.name,
    }
    flags = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-c", PEER, *flags, "--ignore-eos", "--save-result",
               "--disable-tqdm"]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    assert not found.get("failed"), found
    return {
        "output_tokens_per_s": found["output_throughput"],
        "median_ttft_ms": found["median_ttft_ms"],
        "median_tpot_ms": found["median_tpot_ms"],
    }


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
