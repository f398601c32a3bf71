"""The folder that is served: what comes along with the weights, and the proof that it opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tunesmith.config import TunesmithError, require
from tunesmith.quantize.modules import Selection

_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
    "*.py",
)
"""Files of a model folder that are neither weights nor their description."""


def copy_companions(parent: Path, out: Path, chat_template: Path | None) -> None:
    """Bring tokenizer, template and generation defaults over, byte for byte."""
    for pattern in _COMPANIONS:
        for path in parent.glob(pattern):
            shutil.copyfile(path, out / path.name)
    if chat_template:
        shutil.copyfile(chat_template, out / "chat_template.jinja")


def weight_bytes(folder: Path) -> int:
    """Size of all weight files."""
    found = [path for end in ("*.safetensors", "*.bin") for path in folder.glob(end)]
    return sum(path.stat().st_size for path in found)


def verify(folder: Path, selection: Selection) -> None:
    """Open what was written: the config names the format, every quantized layer has its scales,
    and every scale is a positive number. Raises TunesmithError otherwise."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    method = config.get("quantization_config", {}).get("quant_method")
    if method != "compressed-tensors":
        raise TunesmithError(f"{folder}/config.json: quant_method is {method!r}; it was not saved")
    safetensors = require("safetensors", "quantize")
    scales = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a file handle, not a dict
                if not name.endswith(".weight_scale"):
                    continue
                scales += 1
                scale = file.get_tensor(name).float()
                if not bool((scale.isfinite() & (scale > 0)).all()):
                    raise TunesmithError(f"{path}: {name} is not finite and positive everywhere")
    if scales != len(selection.quantized):
        raise TunesmithError(
            f"{folder}: {scales} layers have scales, {len(selection.quantized)} were quantized"
        )
