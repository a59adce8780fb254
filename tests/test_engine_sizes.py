"""What the files of a checkpoint say about its size and its quantisation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from aisp_dist.config import ConfigError, Generator
from aisp_dist.engine import model, sizes


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In several files, as large ones are, with an exporter's copy of all of them beside."""
    directory = tmp_path_factory.mktemp("llama")
    tiny.causal("llama").save_pretrained(directory, max_shard_size="40kB")
    (directory / "consolidated.safetensors").write_bytes(b"never read")
    return directory


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "item"), [("auto", 4), ("float32", 4), ("bfloat16", 2)])
def test_the_bytes_of_loaded_weights(dtype: str, item: int, tied: bool, tmp_path: Path) -> None:
    model = tiny.causal("qwen3")
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(tmp_path)
    assert sizes.weight_bytes(tmp_path, dtype) == item * sum(p.numel() for p in model.parameters())


def test_only_the_files_of_the_index_count(llama: Path) -> None:
    assert len(list(llama.glob("model-*.safetensors"))) > 1
    assert sizes.weight_bytes(llama) == 4 * tiny.causal("llama").num_parameters()


def test_a_pointer_in_the_place_of_weights_is_named(tmp_path: Path) -> None:
    tiny.causal("llama").config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"model.safetensors' is not a safetensors file; download it again"):
        sizes.weight_bytes(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_of_a_token_are_those_that_the_engine_keeps(family: str, dtype: str, tmp_path: Path) -> None:
    made = tiny.causal(family).to(getattr(torch, dtype))
    made.config.save_pretrained(tmp_path)
    config = sizes.read_config(tmp_path)
    if family == "gpt2":
        with pytest.raises(KeyError):
            sizes.token_bytes(config, dtype)
        return
    assert sizes.token_bytes(config, dtype) == model.adapt(made, tiny.tokenizer()).token_bytes


def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigError, match=r"generator.quantization: 'nf4', but .* is quantised already \(gptq\)"):
        sizes.check(Generator(model="m", quantization="nf4"), str(tmp_path))
    sizes.check(Generator(model="m"), str(tmp_path))
