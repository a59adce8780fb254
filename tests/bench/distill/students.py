"""Students trained with TRL: on answers (SFT), then on pairs (DPO). Both read the tables that are on disk: `data/` of a
run, and its export by `aisp export --to dpo`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from aisp_dist.config import Generator
from aisp_dist.engine import pretrained


def sft(
    teacher: str, rows: Dataset, out: Path, *, lr: float, epochs: float, seed: int, rank: int | None = None
) -> Path:
    """Train on rows of prompt and completion, both messages. rank: of a LoRA adapter, which alone is trained and saved;
    None: all weights."""
    config = SFTConfig(**_common(out, lr, epochs, seed), completion_only_loss=True)
    model, tokenizer = _load(teacher)
    rows, lora = rows.select_columns(["prompt", "completion"]), None
    if rank is not None:
        set_seed(seed)  # TRL draws an adapter's first weights before it sets the seed
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    given = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": lora}
    return _run(SFTTrainer(model=model, args=config, **given), out)


def dpo(student: str, rows: Dataset, out: Path, *, lr: float, epochs: float, beta: float, seed: int) -> Path:
    """Train on rows of prompt, chosen and rejected, all messages. The reference model is the student at the start."""
    config = DPOConfig(**_common(out, lr, epochs, seed), beta=beta)
    model, tokenizer = _load(student)
    rows = rows.select_columns(["prompt", "chosen", "rejected"])
    return _run(DPOTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer), out)


def _load(name: str) -> tuple[Any, Any]:
    settings = Generator(model=name, dtype="bfloat16" if torch.cuda.is_available() else "float32")
    return pretrained.weights(settings, torch.device("cpu")), pretrained.tokenizer(settings)


def _run(trainer: Any, out: Path) -> Path:
    trainer.train()
    trainer.save_model(str(out))  # safetensors, and the tokenizer beside it
    return out


def _common(out: Path, lr: float, epochs: float, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "learning_rate": lr,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "max_length": 512,
        "seed": seed,
        "save_strategy": "no",
        "logging_steps": 1000,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": torch.cuda.is_available(),
        "gradient_checkpointing": False,
    }
