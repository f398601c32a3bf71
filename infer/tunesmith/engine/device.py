"""Whether the device of this machine's engine can run a checkpoint at all."""

from __future__ import annotations

import json
from pathlib import Path

from tunesmith.config.errors import ModelError
from tunesmith.config.schemes import has_amx, refusal, schemes_in
from tunesmith.ledger import gpu_capability


def check_device(model: Path, *, gpu: bool) -> None:
    """Raises ModelError for a quantized model that vLLM would only fail on, or hang, after it has
    been loaded: with the reason, the devices that run it, and the nearest scheme that runs here."""
    path = model / "config.json"
    # vLLM says best what it makes of a folder without one.
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    capability = gpu_capability() if gpu else None
    for scheme in schemes_in(config.get("quantization_config") or {}):
        if reason := refusal(scheme.devices(), capability, has_amx=has_amx()):
            raise ModelError(f"{model}: {scheme.name}: {reason}")
