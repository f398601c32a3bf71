"""A tiny model that has learnt its rows: one that knows nothing has nothing to lose."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tunesmith.chat import ChatTemplate


def teach(folder: Path, rows: list[dict[str, Any]]) -> None:
    """A few passes over the rows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    template = ChatTemplate.load(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):
        for row in rows:
            ids = torch.tensor([template.supervise(row["messages"]).input_ids])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
