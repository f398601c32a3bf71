"""One training by TRL's SFTTrainer, run in TRL's own environment; prints one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Train on the rows that Tunesmith trains on, and save the adapter."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, logging
    from trl import SFTConfig, SFTTrainer

    logging.set_verbosity_error()
    rows = load_dataset("json", data_files=job["rows"], split="train").select_columns(["messages"])
    arguments = SFTConfig(
        output_dir=job["out"],
        max_length=job["max_length"],
        assistant_only_loss=True,
        learning_rate=job["learning_rate"],
        num_train_epochs=1,
        per_device_train_batch_size=job["batch_size"],
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        optim="adamw_torch_fused",
        seed=job["seed"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **job["settings"],
    )
    trainer = SFTTrainer(
        model=job["base"],
        args=arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(job["base"]),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    learnt = sum(label != -100 for row in trainer.train_dataset["labels"] for label in row)
    started_s = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started_s
    trainer.save_model(job["out"])
    print(json.dumps({"seconds": seconds, "supervised_tokens": learnt}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
