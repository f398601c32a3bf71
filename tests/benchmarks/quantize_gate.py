"""Whether the gate tells sound checkpoints from damaged ones and from those calibrated on noise.

    python tests/benchmarks/quantize_gate.py --recipe configs/quickstart.yaml \
        --out docs/measured/quantize-gate-cpu.json

Each scheme is quantized soundly, with the scales of one layer multiplied, and with random tokens
to calibrate on, and each is verified in the engine. Then every layer of a sound checkpoint in turn
is damaged by several factors, and judged by its weights alone. Ends with exit code 3 when a
fault passes or a sound checkpoint does not.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors.torch import load_file, save_file

from tunesmith.config import GateError, load_recipe
from tunesmith.ledger import describe_environment
from tunesmith.pipeline import Stages
from tunesmith.pipeline.verdict import judge, verdict_of
from tunesmith.quantize import command
from tunesmith.quantize.profile import layer_errors

SCHEMES = ("w8a8-int8", "w4a16")
CASES = ("sound", "damaged", "noise")
FACTORS = (0.25, 0.5, 2.0, 4.0)
WEIGHTS = "model.safetensors"


def main() -> None:
    """Measure all cases and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--store", type=Path, default=Path(".tunesmith"), help="has the parent")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    stages = {case: _stages(options, case) for case in CASES}
    found: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": subprocess.check_output(
            ["git", "rev-parse", "--short", "HEAD"], text=True
        ).strip(),
        "environment": describe_environment(),
        "cases": {case: _verified(one, case) for case, one in stages.items()},
        "by_weights": {scheme: _every_layer(stages["sound"], scheme) for scheme in SCHEMES},
    }
    text = json.dumps(found, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    if wrong := _wrong(found):
        print("\n".join(wrong), file=sys.stderr)
        sys.exit(GateError.exit_code)


def _stages(options: argparse.Namespace, case: str) -> Stages:
    """The recipe with another seed of calibration rows per case: other checkpoints."""
    schemes = json.dumps(list(SCHEMES))
    rows = 128 + CASES.index(case)
    overrides = [
        f"store.folder={options.store}",
        f"quantize.scheme={schemes}",
        f"quantize.calibration_rows={rows}",
    ]
    return Stages(load_recipe(options.recipe, overrides), path=str(options.recipe))


def _verified(stages: Stages, case: str) -> dict[str, Any]:
    """Quantize with a fault, verify in the engine, and tell the verdicts with their figures."""
    with _fault(case):
        try:
            command.run(stages)
            exit_code = 0
        except GateError as error:
            exit_code = error.exit_code
    figures = {}
    for scheme in SCHEMES:
        metrics = stages.made(stages.fidelity(scheme)).manifest.metrics
        verdict = verdict_of(stages, scheme)
        names = ("loss_increase", "kl", "flipped", "flipped_answers", "chrf_change")
        figures[scheme] = {
            "verdict": verdict.state,
            "reasons": list(verdict.reasons),
            "rows": metrics["rows"],
            **{name: metrics["total"][name] for name in names},
            "calibration": metrics["calibration"],
            "kernels": metrics["engine"]["kernels"],
            "speed": metrics["speed"],
        }
    return {"exit_code": exit_code, "schemes": figures}


@contextmanager
def _fault(case: str) -> Iterator[None]:
    """Put into quantization what the gate shall find."""
    copy, calibrate, source = command.copy_companions, command.calibration_of, random.Random(0)

    def damaged(parent: Path, out: Path, template: Path | None) -> None:
        copy(parent, out, template)
        _scale(out, "model.layers.1.mlp.up_proj", 4.0)

    def noise(*arguments: Any) -> Any:
        found = calibrate(*arguments)
        vocabulary = 1 + max(max(ids) for ids in found.input_ids)
        for ids in found.input_ids:
            ids[:] = [source.randrange(vocabulary) for _ in ids]
        return found

    with (
        mock.patch.object(command, "copy_companions", damaged if case == "damaged" else copy),
        mock.patch.object(command, "calibration_of", noise if case == "noise" else calibrate),
    ):
        yield


def _scale(folder: Path, layer: str, factor: float) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{layer}.weight_scale"] *= factor
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def _every_layer(stages: Stages, scheme: str) -> dict[str, Any]:
    """By factor, in how many layers the weights alone give the damage and the layer away."""
    sound = stages.made(stages.quantized(scheme))
    parent = stages.store.get(sound.manifest.parents["parent"])
    layers = dict.fromkeys(sound.manifest.metrics["quantized"])
    limits = stages.recipe.quantize
    assert limits
    caught = dict.fromkeys(map(str, FACTORS), 0)
    with tempfile.TemporaryDirectory() as place:
        for layer in layers:
            for factor in FACTORS:
                folder = Path(place) / "damaged"
                shutil.copytree(sound.root, folder)
                _scale(folder, layer, factor)
                errors = layer_errors(parent.root, folder, layers)
                reasons = judge({"layers": errors}, None, limits).reasons
                caught[str(factor)] += bool(reasons) and reasons[0].startswith(f"{layer}:")
                shutil.rmtree(folder)
    errors = sound.manifest.metrics["layers"].values()
    return {
        "layers": len(layers),
        "caught_by_factor": caught,
        "largest_sound_error": max(entry["error"] for entry in errors),
        "largest_sound_row_error": max(entry["worst_row"] for entry in errors),
    }


def _wrong(found: dict[str, Any]) -> list[str]:
    wrong = []
    for case, entry in found["cases"].items():
        expected = "approved" if case == "sound" else "refused"
        for scheme, figures in entry["schemes"].items():
            if figures["verdict"] != expected:
                wrong.append(f"{case} {scheme} is {figures['verdict']}")
            named = any("model.layers." in reason for reason in figures["reasons"])
            if expected == "refused" and not named:
                wrong.append(f"{case} {scheme} names no layer")
    for scheme, entry in found["by_weights"].items():
        if entry["caught_by_factor"]["4.0"] < entry["layers"]:
            wrong.append(f"{scheme}: a scale four times too large passes by weights alone")
    return wrong


if __name__ == "__main__":
    main()
