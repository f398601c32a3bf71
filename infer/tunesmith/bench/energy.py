"""Energy that the GPUs took, by their own counters (NVML). Nothing where there is no GPU."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from typing import Any


class EnergyMeter:
    """Total energy of the GPUs that an engine holds, since their driver started."""

    def __init__(self, nvml: Any | None = None, handles: Sequence[Any] = ()) -> None:
        self._nvml = nvml
        self._handles = handles

    def joules(self) -> float | None:
        """The counters' sum; None where no GPU keeps one."""
        if self._nvml is None or not self._handles:
            return None
        try:
            counters = map(self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._handles)
            return float(sum(counters)) / 1000
        except self._nvml.NVMLError:
            return None  # GPUs before Volta have no counter


@contextlib.contextmanager
def open_energy(devices: int = 1) -> Iterator[EnergyMeter]:
    """A meter of the first `devices` GPUs that this process may use, if there are any."""
    nvml: Any = None
    with contextlib.suppress(ImportError):
        nvml = importlib.import_module("pynvml")
    try:
        if nvml:
            nvml.nvmlInit()
    except nvml.NVMLError:
        nvml = None  # no driver
    if nvml is None:
        yield EnergyMeter()
        return
    try:
        yield EnergyMeter(nvml, _handles(nvml, devices))
    finally:
        nvml.nvmlShutdown()


def _handles(nvml: Any, devices: int) -> list[Any]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        names = [str(index) for index in range(nvml.nvmlDeviceGetCount())]
    else:
        names = [name.strip() for name in visible.split(",") if name.strip()]
    return [
        nvml.nvmlDeviceGetHandleByIndex(int(name))
        if name.isdigit()
        else nvml.nvmlDeviceGetHandleByUUID(name)
        for name in names[:devices]
    ]
