"""Layer by layer against llm-compressor on the whole model: time, weights, peak memory, and kills.

    python tests/benchmarks/quantize_stream.py --out docs/measured/quantize-stream-cpu.json

Random weights and random texts: neither time nor memory depends on what they say. Exit code 3 when
a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from provenance import commit, machine
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tunesmith.config.schema.quantize import Quantize
from tunesmith.quantize import compress as compressing
from tunesmith.quantize.calibration import Calibration
from tunesmith.quantize.compress import compress
from tunesmith.quantize.plan import Work
from tunesmith.quantize.schemes import Method
from tunesmith.quantize.skeleton import Skeleton
from tunesmith.train.tokenizer import learn_tokenizer

MOST_TIME = 1.1
MOST_GROWTH = 0.15
"""Of what the model grows by, the most that peak memory may grow by."""

TINY = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2}
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
"""The shape of builtin/tiny-llama, and one with eight times its weights."""

DEPTHS = (6, 24)
ROWS, TOKENS = 128, 160


def main() -> None:
    """Measure what is asked for, write it beside what is there, and judge it."""
    options = _options()
    if options.peak:
        print(_peak_bytes(*options.peak))
        return
    report = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for name in options.only or MEASURES:
            found = MEASURES[name](Path(scratch), options.rounds)
            found |= {"commit": commit(), "command": shlex.join(["python", *sys.argv])}
            report |= {"machine": machine(), name: found}
            print(name, json.dumps(found, indent=1), flush=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(report[name]["within"] for name in MEASURES if name in report) else 3)


def measure_time(scratch: Path, rounds: int) -> dict[str, Any]:
    """In turns, in one process: loading, quantizing and saving, from the same folder."""
    parent = make_model(scratch / "tiny", TINY)
    schemes: dict[str, dict[str, Any]] = {}
    for scheme in ("w4a16", "w8a8-int8", "fp8-dynamic"):
        seconds: dict[str, list[float]] = {"layers": [], "whole": []}
        for at in range(rounds + 1):
            for way in ("layers", "whole"):
                taken_s = quantize(parent, scratch / f"{scheme}-{way}", scheme, way)
                if at:  # the first one also imports
                    seconds[way].append(round(taken_s, 3))
        ratio = statistics.median(seconds["layers"]) / statistics.median(seconds["whole"])
        schemes[scheme] = {
            "layers_s": seconds["layers"],
            "llm_compressor_s": seconds["whole"],
            "time_ratio": round(ratio, 3),
            "weights_identical": same(scratch / f"{scheme}-layers", scratch / f"{scheme}-whole"),
        }
    within = all(
        one["time_ratio"] <= MOST_TIME and one["weights_identical"] for one in schemes.values()
    )
    return {"rows": ROWS, "tokens": ROWS * TOKENS, "schemes": schemes, "within": within}


def measure_memory(scratch: Path, _: int) -> dict[str, Any]:
    """Peak resident memory above that of the imports, each in a process of its own."""
    found: dict[str, Any] = {}
    for depth in DEPTHS:
        parent = make_model(scratch / f"depth-{depth}", LARGE | {"num_hidden_layers": depth})
        weights_mib = (parent / "model.safetensors").stat().st_size / 2**20
        peaks = {}
        for way in ("layers", "whole"):
            command = [sys.executable, __file__, "--out", "-", "--peak", str(parent), way]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[f"{way}_peak_mib"] = round(int(done.stdout.split()[-1]) / 2**20, 1)
        work = Work.of(Skeleton.of(parent, "bfloat16", False), _method("w4a16"), (TOKENS,) * ROWS)
        planned_mib = round(sum(work.parts_bytes().values()) / 2**20, 1)
        sizes = {"weights_mib": round(weights_mib, 1), "planned_mib": planned_mib}
        found[f"{depth} layers"] = sizes | peaks
    shallow, deep = found.values()
    grown = {key: deep[key] - shallow[key] for key in deep}
    share = grown["layers_peak_mib"] / grown["weights_mib"]
    return {
        "scheme": "w4a16",
        **found,
        "growth_mib": {key: round(value, 1) for key, value in grown.items()},
        "share_of_the_models_growth": round(share, 3),
        "within": share <= MOST_GROWTH,
    }


def measure_kills(scratch: Path, rounds: int) -> dict[str, Any]:
    """`tunesmith quantize`, killed at random moments until it gets through."""
    parent = make_model(scratch / "killed", LARGE | {"num_hidden_layers": 12})
    expected = _through(_recipe(scratch / "uninterrupted", parent), None)[0]
    dice, found = random.Random(17), []
    for number in range(rounds):
        folder, kills = _through(_recipe(scratch / f"round-{number}", parent), dice)
        found.append({"kills_after_layers": kills, "identical": same(folder, expected)})
    within = all(one["identical"] and one["kills_after_layers"] for one in found)
    return {"scheme": "w4a16", "layers": 12, "rounds": found, "within": within}


MEASURES = {"time": measure_time, "memory": measure_memory, "kills": measure_kills}


def quantize(parent: Path, out: Path, scheme: str, way: str) -> float:
    """Seconds for one checkpoint, ours or with llm-compressor's `oneshot`."""
    scratch = out.with_name(f"{out.name}-scratch")
    for folder in (out, scratch):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    why_whole = compressing.why_whole
    if way == "whole":
        compressing.why_whole = lambda *_: "compared with"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 4096, (ROWS, TOKENS), generator=generator).tolist()
    method = _method(scheme)
    started_s = time.monotonic()
    try:
        compress(
            parent, out, method, Calibration(ids, ROWS, 0, 0) if method.calibrated else None,
            dtype="bfloat16", trust_remote_code=False, scratch=scratch,
        )  # fmt: skip
    finally:
        compressing.why_whole = why_whole
    return time.monotonic() - started_s


def _method(scheme: str) -> Method:
    return Method.of(Quantize.model_validate({"scheme": scheme}), scheme)


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same tensors, bit by bit."""
    with (
        safe_open(one / "model.safetensors", "pt") as left,
        safe_open(other / "model.safetensors", "pt") as right,
    ):
        names = set(left.keys())
        return names == set(right.keys()) and all(
            torch.equal(left.get_tensor(name), right.get_tensor(name)) for name in names
        )


def make_model(folder: Path, shape: dict[str, Any]) -> Path:
    """Random weights, with a tokenizer."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["llama"](
        **shape, num_attention_heads=4, num_key_value_heads=2, vocab_size=4096,
        max_position_embeddings=2048, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    learn_tokenizer([_text(random.Random(at)) for at in range(200)], 1000, 2048).save_pretrained(
        folder
    )
    return folder


def _text(dice: random.Random) -> str:
    return " ".join("".join(dice.choices("abcdefgh", k=5)) for _ in range(TOKENS))


def _recipe(folder: Path, parent: Path) -> Path:
    folder.mkdir()
    rows = [json.dumps({"text": _text(random.Random(at))}) + "\n" for at in range(2 * ROWS)]
    (folder / "rows.jsonl").write_text("".join(rows))
    recipe = {
        "name": "killed",
        "store": {"folder": str(folder / "store")},
        "model": {"base": str(parent)},
        "data": {"train": str(folder / "rows.jsonl"), "format": "text", "max_length": TOKENS},
        "quantize": {"scheme": "w4a16", "calibration_rows": ROWS, "verify_rows": 0},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    subprocess.run([sys.executable, "-m", "tunesmith.cli", "data", str(path)], check=True)
    return path


def _through(recipe: Path, dice: random.Random | None) -> tuple[Path, list[int]]:
    """Run the same command until it ends by itself; returns the checkpoint and the number of
    finished layers at each kill."""
    command = [sys.executable, "-m", "tunesmith.cli", "quantize", str(recipe), "--json"]
    kills: list[int] = []
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        before = _finished(recipe)
        while dice and len(kills) < 3 and process.poll() is None and _finished(recipe) == before:
            time.sleep(0.01)
        if dice and len(kills) < 3:
            time.sleep(dice.uniform(0, 1.5))
            process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        if process.returncode == 0:
            return Path(json.loads(output)["checkpoints"]["w4a16"]["folder"]), kills
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}")
        kills.append(_finished(recipe))


def _finished(recipe: Path) -> int:
    return len(list(recipe.parent.glob("store/work/*/scratch/layers/layer-*.safetensors")))


def _peak_bytes(parent: str, way: str) -> int:
    """The highest that resident memory rises above where the imports left it."""
    with tempfile.TemporaryDirectory() as scratch:
        small = make_model(Path(scratch) / "small", TINY)
        quantize(small, Path(scratch) / "warm", "w4a16", way)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        quantize(Path(parent), Path(scratch) / "out", "w4a16", way)
        return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="other figures in it are kept")
    parser.add_argument("--only", nargs="*", choices=list(MEASURES), help="some of the figures")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where scratch files go")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
