"""Whether this machine's engine can run a checkpoint at all, as the checkpoint itself says."""

from __future__ import annotations

from collections.abc import Mapping


def refusal(devices: Mapping[str, str | None], capability: int | None) -> str | None:
    """Why a device cannot run what a checkpoint's `devices` describe; None when it can.

    `capability` is the GPU's compute capability (90 for Hopper), None for a CPU. A GPU that is not
    in the table counts as the nearest older one that is.
    """
    if capability is None:
        return devices.get("cpu")
    known = sorted(int(name.removeprefix("sm_")) for name in devices if name.startswith("sm_"))
    older = [number for number in known if number <= capability]
    return devices[f"sm_{older[-1]}"] if older else None
