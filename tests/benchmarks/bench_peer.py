"""The same engine under the same load, measured by `vllm bench serve`, GuideLLM and ours, in turns.

python tests/benchmarks/bench_peer.py --model FOLDER --out docs/measured/bench-peer-cpu.json

`FOLDER` is a chat model. Closed loop: texts of random tokens, equal lengths, with as many in
flight; each tool has texts of its own, as the engine remembers what it has read. Throughput over
the whole run (the peer trims no ramps), median TTFT and median TPOT must be within 5 % of those of
`vllm bench serve`, round against round; which of the two is first takes turns. GuideLLM comes into
an environment of its own, makes its own texts and is only shown, in rounds of its own: its time per
token is over all tokens, the first one's too.

Open loop, away from saturation and near it: `vllm bench serve` at a rate and with a limit in
flight, then ours at the moments that it has made. Its TTFT begins when a place is free, ours when
the request was meant to be sent. Its own record of that wait, added to its TTFT, says how much of
the difference this explains.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import venv
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from benchmark import describe, finish
from transformers import AutoTokenizer

from tunesmith.bench.client import open_session
from tunesmith.bench.generator import Generator
from tunesmith.bench.measure import Instruments, Meter, Target, open_meter
from tunesmith.bench.results import phase_figures
from tunesmith.bench.traffic import Prompt
from tunesmith.config.schema.bench import Bench
from tunesmith.config.schema.engine import Engine
from tunesmith.engine import EngineServer, EngineSpec
from tunesmith.statistics.independent import difference_in_turns

Rounds = Sequence[Mapping[str, Mapping[str, float]]]

BOUND = 0.05
OPEN_LOADS = (0.7, 0.9)  # of the closed loop's requests per second
OPEN_REQUESTS = 768
SHOWN_ROUNDS = 5  # of what has no bound: GuideLLM and the open loop
GUIDELLM = "guidellm==0.8.1"
INPUT_TOKENS, OUTPUT_TOKENS, CONCURRENCY, REQUESTS = 64, 64, 16, 384
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
    parser.add_argument("--rounds", type=int, default=16, help="of the closed loop")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = Engine(max_num_seqs=CONCURRENCY, max_model_len=256, kv_cache_gib=0.25)
    spec = EngineSpec(options.model, settings, "float32", "bench")
    with (
        tempfile.TemporaryDirectory() as folder,
        Generator() as generator,
        EngineServer(spec, log_path=Path(folder) / "engine.log") as server,
    ):
        tools = {
            "ours": lambda seed: asyncio.run(_ours(server.url, generator, options.model, seed)),
            "vllm": lambda seed: _vllm(server.url, options.model, Path(folder), seed),
            "guidellm": lambda seed: _guidellm(server.url, options.model, Path(folder), seed),
        }
        rounds = [
            {name: tools[name](seed) for name in _turn(seed)} for seed in range(options.rounds)
        ]
        shown = [
            {name: tools[name](options.rounds + seed) for name in ("ours", "guidellm")}
            for seed in range(SHOWN_ROUNDS)
        ]
        rate = median(one["ours"]["output_tokens_per_s"] for one in rounds) / OUTPUT_TOKENS
        opened = {
            f"{load:.0%} of saturation": _open_loop(
                server.url,
                generator,
                options.model,
                Path(folder),
                load * rate,
                range(100 * place, 100 * place + SHOWN_ROUNDS),
            )
            for place, load in enumerate(OPEN_LOADS, 1)
        }
    differences = {
        "vllm": _differences(rounds, "vllm"),
        "guidellm": _differences(shown, "guidellm"),
    }
    missed = [
        f"{figure}: {found['value']:+.1%} from that of vllm bench serve"
        for figure, found in differences["vllm"].items()
        if abs(found["value"]) > BOUND
    ]
    found = {
        "bound": BOUND, "differences": differences, "rounds": rounds, "shown_rounds": shown,
        "open_loop": opened,
    }  # fmt: skip
    finish(options.out, describe(parser, found), missed)


def _turn(seed: int) -> tuple[str, str]:
    return ("vllm", "ours") if seed % 2 else ("ours", "vllm")


def _differences(rounds: Rounds, peer: str) -> dict[str, dict[str, float]]:
    """How far our figures are from the peer's, with what 95 % of such comparisons would say."""
    return {
        figure: difference_in_turns(
            [one["ours"][figure] for one in rounds], [one[peer][figure] for one in rounds]
        )._asdict()
        for figure in rounds[0]["ours"]
    }


def _texts(model: Path, count: int, seed: str) -> list[str]:
    """Different texts of exactly `INPUT_TOKENS` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    source, found = random.Random(seed), dict[str, None]()
    while len(found) < count:
        drawn = tokenizer.decode(source.choices(range(len(tokenizer)), k=2 * INPUT_TOKENS))
        text = tokenizer.decode(tokenizer(drawn)["input_ids"][:INPUT_TOKENS])
        if len(tokenizer(text)["input_ids"]) == INPUT_TOKENS:
            found[text] = None
    return list(found)


async def _ours(url: str, generator: Generator, model: Path, seed: int) -> dict[str, float]:
    bench = _bench(REQUESTS)
    async with _metered(url, bench, generator, model, seed) as meter:
        phase = await meter.full_queue()
    figures = phase_figures(phase, bench, seed)
    (one,) = phase.rounds
    return {
        "output_tokens_per_s": sum(sample.output_tokens for sample in one.samples) / one.wall_s,
        "median_ttft_ms": figures["ttft_ms"]["p50"]["value"],
        "median_tpot_ms": figures["tpot_ms"]["p50"]["value"],
    }


def _bench(requests: int, **load: Any) -> Bench:
    """`reuse` leaves the texts as they are: none is there twice."""
    fixed = {"rounds": 1, "concurrency": CONCURRENCY, "max_tokens": OUTPUT_TOKENS, "reuse": True}
    return Bench.model_validate({"requests": requests, **fixed, **load})


@contextlib.asynccontextmanager
async def _metered(
    url: str, bench: Bench, generator: Generator, model: Path, seed: int
) -> AsyncIterator[Meter]:
    texts = _texts(model, CONCURRENCY + bench.requests, f"ours/{seed}/{bench.requests}")
    warm, measured = texts[:CONCURRENCY], texts[CONCURRENCY:]
    async with open_session() as session:
        target, tools = Target("ours", url, "bench"), Instruments(session, generator)
        for some in (warm, measured):
            prompts = [Prompt("completions", {"prompt": text}) for text in some]
            meter = await open_meter(target, bench, seed, tools, prompts)
            if some is warm:
                await meter.warm_up()
        yield meter


def _vllm(url: str, model: Path, folder: Path, seed: int) -> dict[str, float]:
    found = _bench_serve(url, model, folder, seed, REQUESTS)
    return {
        "output_tokens_per_s": found["output_throughput"],
        "median_ttft_ms": found["median_ttft_ms"],
        "median_tpot_ms": found["median_tpot_ms"],
    }


def _bench_serve(
    url: str, model: Path, folder: Path, seed: int, requests: int, **load: Any
) -> dict[str, Any]:
    """What `vllm bench serve` keeps of one run."""
    result = folder / f"peer-{seed}-{requests}.json"
    texts = folder / f"texts-{seed}-{requests}.jsonl"
    rows = [{"prompt": text} for text in _texts(model, requests, f"vllm/{seed}/{requests}")]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = {
        "backend": "openai",
        "base-url": url.removesuffix("/v1"),
        "endpoint": "/v1/completions",
        "model": "bench",
        "tokenizer": model,
        "dataset-name": "custom",
        "dataset-path": texts,
        "custom-output-len": OUTPUT_TOKENS,
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
               "--save-detailed", "--skip-chat-template", "--disable-tqdm"]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    assert not found.get("failed"), found
    return found


def _open_loop(
    url: str, generator: Generator, model: Path, folder: Path, rate: float, seeds: Sequence[int]
) -> dict[str, Any]:
    """TTFT as the peer tells it, with the wait for a place in its client, and as ours tells it."""
    runs = []
    for seed in seeds:
        peer = _bench_serve(url, model, folder, seed, OPEN_REQUESTS, **{"request-rate": rate})
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
        figures = asyncio.run(_arrivals(url, bench, generator, model, seed))
        runs.append(
            {
                name: {
                    "vllm_ms": 1e3 * float(np.percentile(told_s, percent)),
                    "vllm_with_its_wait_ms": 1e3 * float(np.percentile(told_s + waited_s, percent)),
                    "ours_ms": figures["ttft_ms"][name]["value"],
                }
                for name, percent in (("p50", 50), ("p99", 99))
            }
        )
    medians = {
        name: {who: median(run[name][who] for run in runs) for who in runs[0][name]}
        for name in runs[0]
    }
    return {"request_rate": rate, "ttft": medians, "rounds": runs}


async def _arrivals(
    url: str, bench: Bench, generator: Generator, model: Path, seed: int
) -> dict[str, Any]:
    async with _metered(url, bench, generator, model, seed) as meter:
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
