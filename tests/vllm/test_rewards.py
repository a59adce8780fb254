"""A reward model that vLLM scores, against transformers in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from engines import SHAPE, remaining
from transformers import AutoConfig, AutoModelForSequenceClassification

from aisp_dist import rewards
from aisp_dist.config import ConfigError, ModelReward
from aisp_dist.records import Prompt

PROMPT = Prompt("p", 0, (("system", "Be brief."), ("user", "Why is the sky blue?")))
ANSWERS = ["Because of Rayleigh scattering.", "No.", "", "It is <turn> not. " * 4, "No."]


def judge(directory: Path, labels: int = 1) -> Path:
    causal = tiny.causal("llama", **SHAPE).config.to_dict() | {"num_labels": labels, "architectures": None}
    config = AutoConfig.for_model(**causal)
    config.pad_token_id = tiny.PAD_ID
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


def load(directory: Path, **more: Any) -> rewards.RewardFn:
    return rewards.load("m", ModelReward(model=str(directory), dtype="float32", max_tokens=120, **more), device="cpu")


def test_scores_are_those_of_transformers(tmp_path: Path) -> None:
    """Raw logits, under the same template, cut in the same way; the self-test passes there too."""
    judge(tmp_path)
    before = set(psutil.Process().children(recursive=True))
    theirs, ours = load(tmp_path, engine="vllm"), load(tmp_path)
    long = Prompt("q", 1, (("user", "Why is the sky so very blue? " * 9),))
    for prompt in (PROMPT, long):
        found, right = theirs(prompt, ANSWERS), ours(prompt, ANSWERS)
        assert [s.value for s in found] == pytest.approx([s.value for s in right], abs=1e-5)
        assert found[1] == found[4] and len({s.value for s in found}) == 4
    assert max(abs(s.value or 0.0) for s in right) > 1, "no sigmoid"
    theirs.close()  # type: ignore[attr-defined]
    assert not remaining(before)


def test_pickled_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def refuse(path: str, **arguments: Any) -> None:
        told.update(arguments)
        raise ValueError("enough")

    monkeypatch.setattr("vllm.LLM", refuse)
    with pytest.raises(ConfigError, match="enough"):
        load(judge(tmp_path), engine="vllm")
    assert told["load_format"] == "safetensors"


def test_a_checkpoint_that_vllm_would_score_wrongly(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification with 2 outputs.*set engine to transformers"):
        load(judge(tmp_path / "two", 2), engine="vllm")
    with pytest.raises(ConfigError, match="LlamaForCausalLM with"):
        load(tiny.save("llama", tmp_path / "base", **SHAPE), engine="vllm")
