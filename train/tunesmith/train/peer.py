"""TRL beside Tunesmith: the same rows and settings, in TRL's own process and package folder."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.config.errors import ModelError, UserError
from tunesmith.config.schema.train import Train
from tunesmith.terminal import log
from tunesmith.train.examples import Example

TRL_VERSION = "1.16.0"
_SCRIPT = Path(__file__).with_name("peer_trl.py")


def find_trl(folder: Path) -> dict[str, str]:
    """The environment variables under which this interpreter finds TRL.

    Unless it is installed, TRL alone goes into `folder`, over the versions of torch, transformers
    and PEFT that Tunesmith uses too: so the comparison is of the two programs. Raises UserError
    when it cannot be installed.
    """
    if importlib.util.find_spec("trl"):
        return dict(os.environ)
    target = folder / f"trl-{TRL_VERSION}"
    if not (target / "trl").is_dir():
        log(f"installing trl {TRL_VERSION} into {target}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*pip, "--target", str(target), f"trl=={TRL_VERSION}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise UserError(
                f"--peer trl: cannot install trl {TRL_VERSION} ({done.stderr.strip()[-300:]}); "
                "install it beside Tunesmith yourself"
            )
    paths = [str(target), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_trl(job: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Train by TRL; see `peer_trl.py` for what a job has. Raises ModelError when TRL fails."""
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), json.dumps(job)],
        capture_output=True, text=True, check=False, env=dict(environment),
    )  # fmt: skip
    if done.returncode:
        raise ModelError(f"TRL failed: {done.stderr.strip()[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def trl_arguments(train: Train, max_length: int, seed: int) -> dict[str, Any]:
    """A recipe's settings as TRL's SFTConfig."""
    same = (
        "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
        "warmup_steps", "lr_scheduler_type", "optim", "weight_decay", "adam_beta1", "adam_beta2",
        "max_grad_norm", "gradient_checkpointing",
    )  # fmt: skip
    return {
        **train.model_dump(include=set(same)),
        "max_length": max_length,
        "seed": seed,
        "train_sampling_strategy": "group_by_length",
    }


def trl_lora(train: Train) -> dict[str, Any] | None:
    """A recipe's adapter as PEFT's LoraConfig. Raises UserError for what TRL is not set up for."""
    if train.method == "full":
        return None
    if train.method != "lora" or train.base_precision != "same":
        raise UserError("--peer trl: compares method lora or full, with base_precision: same")
    lora = train.lora
    if lora.use_dora or lora.changes_base or lora.loraplus_lr_ratio != 1.0:
        raise UserError("--peer trl: compares plain LoRA, without DoRA, PiSSA or LoRA+")
    targets = lora.target_modules
    return {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": targets if isinstance(targets, str) else list(targets),
    }


def write_rows(rows: Sequence[Example], path: Path) -> None:
    """Rows as TRL takes them ready made: token ids, and labels where something is learnt."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            ids = row.input_ids.tolist()
            labels = [
                token if learnt else -100 for token, learnt in zip(ids, row.learnt, strict=True)
            ]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
