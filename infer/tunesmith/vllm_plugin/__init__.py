"""What vLLM calls in each of its processes (`vllm.general_plugins` in `pyproject.toml`).

It imports nothing of Tunesmith: engines start no later for it.
"""

from __future__ import annotations

import ctypes
import platform

_ARCH_PRCTL = 158  # the system call of x86-64
_ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 0x1023, 18  # <asm/prctl.h>


def allow_amx() -> bool:
    """Ask the kernel for AMX tiles, and return whether this process may use them.

    vLLM's attention on CPUs uses them in bfloat16 and does not ask (vLLM 0.32): it lives on oneDNN
    having asked, which happens with the first product that is large enough. An engine whose first
    prompt was short died there of an illegal instruction.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    call = ctypes.CDLL(None).syscall
    is_refused: int = call(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    return not is_refused
