"""What training costs on this GPU: LoRA, FP8 and QLoRA on random weights, and TRL beside it.

    scripts/gpu                                    on a machine with a GPU
    scripts/gpu --shape tiny --length 64 --steps 1 --out /tmp/figures    anywhere

Each run is a `tunesmith bench train` of its own. The most telling come first; what does not fit
into `--budget-s` is left out, and the report says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NEEDED = (
    "accelerate", "jinja2", "numpy", "peft", "pydantic", "rich", "safetensors",
    "sqlalchemy", "tokenizers", "torch", "transformers", "typer", "yaml",
)  # fmt: skip
"""Modules without which nothing can be measured."""

JUDGED = ("llama-8b", 4096, "H200")
"""Shape, length and GPU that the goals are for; elsewhere figures are shown and not judged."""


@dataclass(frozen=True)
class Run:
    """One `tunesmith bench train`."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    """Modules that it takes besides."""


COMPILED = {"train.torch_compile": True}
SMALL = {"train.gradient_checkpointing": True}
RUNS = (
    Run("LoRA, compiled", COMPILED, ("--profile",)),
    Run("LoRA"),
    Run("LoRA on FP8, compiled", COMPILED | {"train.base_precision": "fp8"}, ("--profile",)),
    Run("LoRA, checkpointed", SMALL),
    Run("QLoRA, checkpointed", SMALL | {"train.method": "qlora"}, (), ("bitsandbytes",)),
    Run("LoRA beside TRL", COMPILED, ("--peer", "trl", "--rounds", "2"), ("trl", "datasets")),
)


@dataclass(frozen=True)
class Goal:
    """What a figure should be."""

    name: str
    at_least: float | None = None
    at_most: float | None = None

    def says(self, value: float | None, judged: bool) -> str:
        """met, missed, not measured or not judged."""
        if value is None:
            return "not measured"
        if not judged:
            return "not judged"
        low, high = self.at_least, self.at_most
        return "met" if (low is None or value >= low) and (high is None or value <= high) else (
            "missed"
        )  # fmt: skip


GOALS = (
    Goal("LoRA, tokens/s", at_least=13_000),
    Goal("LoRA, MFU", at_least=0.436),
    Goal("LoRA, tokens/s (stretch)", at_least=16_000),
    Goal("LoRA on FP8, tokens/s (stretch)", at_least=20_000),
    Goal("QLoRA, speed over LoRA's", at_least=0.8),
    Goal("QLoRA, memory over LoRA's", at_most=0.5),
    Goal("speed over TRL's", at_least=1.0),
    Goal("memory over TRL's", at_most=1.0),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what there is time for; returns 3 when a goal is missed, 1 when nothing ran."""
    options = _options(arguments)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"{sys.executable} lacks {', '.join(missing)}", file=sys.stderr)
        return 2
    machine = _machine()
    print(json.dumps(machine), file=sys.stderr)
    deadline_s = time.monotonic() + options.budget_s
    with tempfile.TemporaryDirectory() as scratch:
        results = [_measure(run, options, Path(scratch), deadline_s) for run in RUNS]
    judged = (options.shape, options.length) == JUDGED[:2] and any(
        JUDGED[2] in name for name in machine["gpus"]
    )
    values = goal_values({result["name"]: result.get("figures") for result in results})
    goals = [
        {
            **asdict(goal),
            "value": values[goal.name],
            "verdict": goal.says(values[goal.name], judged),
        }
        for goal in GOALS
    ]
    report = {
        "command": shlex.join(["scripts/gpu", *(arguments or sys.argv[1:])]),
        "commit": _commit(),
        "machine": machine,
        "shape": options.shape,
        "length": options.length,
        "sequences_per_pass": options.batch,
        "goals": goals,
        "attention": attention_tflops(options.length, options.shape),
        "runs": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1)
    (options.out / "train-gpu.json").write_text(text + "\n", encoding="utf-8")
    page = markdown(report)
    (options.out / "train-gpu.md").write_text(page, encoding="utf-8")
    print(page)
    if not any("figures" in result for result in results):
        return 1
    return 3 if any(goal["verdict"] == "missed" for goal in goals) else 0


def goal_values(figures: dict[str, dict[str, Any] | None]) -> dict[str, float | None]:
    """The figure that each goal is about, from the figures of each run; None without its runs."""

    def rate(name: str) -> float | None:
        found = figures.get(name)
        return found["tokens_per_s"]["median"] if found else None

    plain = [found for name in ("LoRA", "LoRA, compiled") if (found := figures.get(name))]
    best = max(plain, key=lambda found: found["tokens_per_s"]["median"], default=None)
    lora, qlora = figures.get("LoRA, checkpointed"), figures.get("QLoRA, checkpointed")
    pair = (qlora, lora) if lora and qlora else None
    beside = figures.get("LoRA beside TRL")
    tokens_per_s = best["tokens_per_s"]["median"] if best else None
    return {
        "LoRA, tokens/s": tokens_per_s,
        "LoRA, MFU": best["mfu"] if best else None,
        "LoRA, tokens/s (stretch)": tokens_per_s,
        "LoRA on FP8, tokens/s (stretch)": rate("LoRA on FP8, compiled"),
        "QLoRA, speed over LoRA's": _ratio(*(x["tokens_per_s"]["median"] for x in pair))
        if pair
        else None,
        "QLoRA, memory over LoRA's": _ratio(*(x["peak_memory_gib"] for x in pair))
        if pair
        else None,
        "speed over TRL's": beside["peer"]["speed_ratio"]["median"] if beside else None,
        "memory over TRL's": beside["peer"]["memory_ratio"] if beside else None,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    gpus = ", ".join(report["machine"]["gpus"]) or f"no GPU: {report['machine']['cpu']}"
    lines = [
        f"# Training {report['shape']} on {gpus}",
        "",
        f"Random weights, rows of {report['length']:,} tokens, all of them learnt, "
        f"{report['sequences_per_pass']} per pass; median of the rounds. torch "
        f"{report['machine']['torch']}, commit {report['commit']}. `{report['command']}`",
        "",
        "| goal | wanted | measured | |",
        "|---|---|---|---|",
    ]
    for goal in report["goals"]:
        low, high = goal["at_least"], goal["at_most"]
        wanted = f"≥ {low:,}" if low is not None else f"≤ {high:,}"
        lines.append(
            f"| {goal['name']} | {wanted} | {_number(goal['value'])} | {goal['verdict']} |"
        )
    lines += [
        "",
        "| run | tokens/s | useful TFLOP/s | MFU | of the matmul ceiling | peak GiB | warm-up s |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in report["runs"]:
        found = result.get("figures")
        if found is None:
            lines.append(f"| {result['name']} | {result['left_out']} | | | | | |")
            continue
        cells = (
            f"{found['tokens_per_s']['median']:,.0f}",
            _number(found["useful_tflops_per_s"]),
            _percent(found["mfu"]),
            _percent(found["share_of_ceiling"]),
            f"{found['peak_memory_gib']:.2f}",
            f"{found['warmup_s']:.1f}",
        )
        lines.append(f"| {result['name']} | {' | '.join(cells)} |")
        if peer := found["peer"]:
            lines.append(
                f"| {peer['name']} | {peer['tokens_per_s']['median']:,.0f} | | | | "
                f"{peer['peak_memory_gib']:.2f} | |"
            )
    lines += ["", "Attention alone, forward and backward, causal, useful TFLOP/s by kernel: "]
    lines[-1] += ", ".join(f"{name} {_number(rate)}" for name, rate in report["attention"].items())
    return "\n".join(lines) + "\n"


def attention_tflops(length: int, shape: str) -> dict[str, float | None]:
    """Useful TFLOP/s of each kernel that torch could take for this shape's attention, forward and
    backward; None for one that does not run here."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from tunesmith.train.shapes import shape_config
    from tunesmith.train.useful import synchronize

    config = shape_config(shape, length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width = config.hidden_size // config.num_attention_heads
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    query, key, value = (
        torch.randn(2, count, length, width, device=device, dtype=torch.bfloat16).requires_grad_()
        for count in (heads, groups, groups)
    )
    found: dict[str, float | None] = {}
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        times_s = []
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                for _ in range(8):
                    synchronize(device)
                    started_s = time.perf_counter()
                    output = F.scaled_dot_product_attention(
                        query, key, value, is_causal=True, enable_gqa=True
                    )
                    output.backward(torch.ones_like(output))
                    synchronize(device)
                    times_s.append(time.perf_counter() - started_s)
        except RuntimeError:
            found[name.lower()] = None
            continue
        found[name.lower()] = 2 * 6 * heads * width * length**2 / sorted(times_s)[3] / 1e12
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default=JUDGED[0], help="as of tunesmith bench train --shape")
    parser.add_argument("--length", type=int, default=JUDGED[1], help="tokens of a row")
    parser.add_argument("--batch", type=int, default=2, help="rows in a forward pass")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps in a round")
    parser.add_argument("--warmup-steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=560.0, help="seconds for all runs")
    parser.add_argument("--only", help="run only what has this in its name")
    parser.add_argument("--out", type=Path, default=Path("docs/measured"))
    return parser.parse_args(arguments)


def _measure(
    run: Run, options: argparse.Namespace, folder: Path, deadline_s: float
) -> dict[str, Any]:
    """The figures of one run, or why there are none."""
    result: dict[str, Any] = {"name": run.name, "settings": run.settings}
    left_s = deadline_s - time.monotonic()
    absent = [name for name in run.needs if importlib.util.find_spec(name) is None]
    if options.only and options.only.lower() not in run.name.lower():
        return result | {"left_out": "not asked for"}
    if absent:
        return result | {"left_out": f"{', '.join(absent)} is not installed"}
    if left_s < 30:
        return result | {"left_out": "no time was left"}
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(_recipe(options, folder)), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "tunesmith.cli", "bench", "train", str(recipe)),
        *(f"{key}={json.dumps(value)}" for key, value in run.settings.items()),
        *("--shape", options.shape, "--length", str(options.length), "--json"),
        *("--steps", str(options.steps), "--warmup-steps", str(options.warmup_steps)),
        *("--rounds", str(options.rounds), *run.options),
    ]
    print(f"{run.name}: {left_s:.0f} s left", file=sys.stderr)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=max(1.0, left_s)
        )
    except subprocess.TimeoutExpired:
        return result | {"left_out": "the time ran out"}
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return result | {"left_out": said[-1].removeprefix("error: "), "stderr": said[-20:]}
    figures = json.loads(done.stdout)
    profile = Path(figures["path"]) / "profile.txt"
    if profile.exists():
        result["profile"] = profile.read_text(encoding="utf-8").splitlines()
    return result | {"figures": figures}


def _recipe(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return {
        "name": "train-gpu",
        "model": {"base": "random", "dtype": "bfloat16"},
        "data": {"train": "random", "max_length": options.length},
        "store": {"folder": str(folder / "store")},
        "train": {
            "method": "lora",
            "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
            "per_device_train_batch_size": options.batch,
        },
    }


def _machine() -> dict[str, Any]:
    import torch

    from tunesmith.ledger import describe_environment

    found = describe_environment()
    return {key: found[key] for key in ("cpu", "cpu_count", "memory_gib", "versions")} | {
        "gpus": list(found["gpus"]),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "sees_gpu": torch.cuda.is_available(),
        "missing": [
            name for run in RUNS for name in run.needs if importlib.util.find_spec(name) is None
        ],
    }


def _commit() -> str:
    if not shutil.which("git"):
        return "unknown"
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def _ratio(ours: float, other: float) -> float:
    return ours / other


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


if __name__ == "__main__":
    sys.exit(main())
