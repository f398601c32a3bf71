"""What oneDNN keeps for an engine, with the real operators of vLLM."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

GROWTH = """
import ctypes, sys
from tunesmith.engine.offline import prepare_process
from tunesmith.engine.primitives import keep_few_primitives

keep_few_primitives() if sys.argv[1] == "few" else prepare_process()
import torch
import vllm.platforms
vllm.platforms.current_platform.import_kernels()
from vllm import _custom_ops as ops

def resident_kb():
    ctypes.CDLL(None).malloc_trim(0)  # what is free is no growth
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmRSS" in line)

products = [ops.create_onednn_mm(torch.ones(size, 256), 32) for size in (256, 512)]
for tokens in range(1, 1201):
    for product in products:
        made = ops.onednn_mm(product, torch.ones(tokens % 400 + 1, product.k), None)
    if tokens == 20:
        before_kb = resident_kb()
assert made.shape == (1, 256) and made.eq(512).all()
print(resident_kb() - before_kb)
"""


def growth_mb(kept: str) -> float:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ONEDNN_")}
    command = [sys.executable, "-c", GROWTH, kept]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=240
    )
    return int(done.stdout.splitlines()[-1]) / 1000


@pytest.mark.timeout(300)
def test_ever_other_numbers_of_tokens_take_no_further_memory() -> None:
    many, few = growth_mb("many"), growth_mb("few")
    assert few < 10
    assert many > 2 * few
