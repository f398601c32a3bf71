"""One training by TRL's SFTTrainer, in a process of its own; prints one line of JSON.

A plain script: it runs with TRL's packages and imports nothing of Tunesmith.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Train on the rows that Tunesmith trains on.

    base       folder of the model; with `random_dtype` of its configuration only
    rows       JSONL with `input_ids` and `labels`, or with `messages`
    lora       PEFT's LoraConfig, or null for all weights
    arguments  TRL's SFTConfig
    timed      [steps of warm-up, steps that are measured]; null measures all of the training
    """
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, logging
    from trl import SFTConfig, SFTTrainer

    logging.set_verbosity_error()
    rows = load_dataset("json", data_files=job["rows"], split="train")
    if "messages" in rows.column_names:
        rows = rows.select_columns(["messages"])
    trainer = SFTTrainer(
        model=_random_model(job) if job.get("random_dtype") else job["base"],
        args=SFTConfig(
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **job["arguments"],
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(job["base"]),
        peft_config=LoraConfig(**job["lora"], task_type="CAUSAL_LM") if job["lora"] else None,
    )
    meter = _meter(trainer.model, *(job.get("timed") or (0, 0)))
    trainer.add_callback(meter)
    trainer.train()
    meter.stop()
    if job.get("save"):
        trainer.save_model(job["arguments"]["output_dir"])
    print(json.dumps(meter.figures()))


def _random_model(job: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(job["base"])
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, job["random_dtype"]))


def _meter(model: Any, warmup_steps: int, steps: int) -> Any:
    """A callback that times steps, and counts the tokens that the model is given in them."""
    import torch
    from transformers import TrainerCallback

    on_gpu = torch.cuda.is_available()

    class Meter(TrainerCallback):
        started_s: float | None = None
        seconds: float | None = None
        tokens = supervised = 0

        def on_step_begin(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
            if self.started_s is None and state.global_step == warmup_steps:
                self._wait()
                self.started_s = time.perf_counter()

        def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
            if steps and state.global_step == warmup_steps + steps:
                self.stop()

        def count(self, _model: Any, _given: Any, batch: dict[str, Any]) -> None:
            if self.started_s is not None and self.seconds is None:
                # Sums stay on the device: to read them would stop it in every step.
                self.tokens += batch["attention_mask"].sum()
                self.supervised += (batch["labels"][:, 1:] != -100).sum()

        def stop(self) -> None:
            if self.started_s is not None and self.seconds is None:
                self._wait()
                self.seconds = time.perf_counter() - self.started_s

        def figures(self) -> dict[str, Any]:
            # Not ru_maxrss, which begins with what the process that started this one held.
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
            resident_gib = peak_kib / 2**20
            return {
                "seconds": self.seconds,
                "tokens": int(self.tokens),
                "supervised_tokens": int(self.supervised),
                "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30
                if on_gpu
                else resident_gib,
            }

        def _wait(self) -> None:
            if on_gpu:
                torch.cuda.synchronize()

    meter = Meter()
    model.register_forward_pre_hook(meter.count, with_kwargs=True)
    return meter


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
