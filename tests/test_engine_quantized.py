"""Quantised models, loaded as saved or quantised while loading: a row's bits do not depend on others; else refused.

Backends are packages of their own (the extra `quantized`): a case whose package is not installed is skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import slow_path
import test_engine_schedule as schedule
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from aisp_dist.config import ConfigError, Generator
from aisp_dist.engine import model, sizes

Saver = Callable[[Path, Path], Path]
one_thread = schedule.one_thread


def save_bnb(plain: Path, directory: Path, **settings: Any) -> Path:
    pytest.importorskip("bitsandbytes")
    return quantise(plain, directory, BitsAndBytesConfig(**settings))


def save_torchao(plain: Path, directory: Path) -> Path:
    return quantise(plain, directory, TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()))


def quantise(plain: Path, directory: Path, config: Any = None) -> Path:
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


def by_hand(plain: Path, directory: Path, dtype: torch.dtype, scale: str, config: dict[str, Any]) -> Path:
    """Every projection in 8 bits with a scale for each row, as exporters write them."""
    quantise(plain, directory)
    whole, tensors = dtype == torch.int8, load_file(directory / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        size = tensors[name].abs().amax(1, keepdim=True) / (127 if whole else torch.finfo(dtype).max)
        numbers = tensors[name] / size
        tensors[name] = (numbers.round() if whole else numbers).to(dtype)
        tensors[name.replace("weight", scale)] = size
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return declare(directory, config)


def declare(directory: Path, config: dict[str, Any]) -> Path:
    whole = json.loads((directory / "config.json").read_text(encoding="utf-8")) | {"quantization_config": config}
    (directory / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    return directory


def save_fp8(plain: Path, directory: Path) -> Path:
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [1, 64]}
    return by_hand(plain, directory, torch.float8_e4m3fn, "weight_scale_inv", config)


def save_compressed(plain: Path, directory: Path, activations: str) -> Path:
    pytest.importorskip("compressed_tensors")
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    inputs = eight | {"strategy": activations, "dynamic": True}
    group = {"targets": ["Linear"], "weights": eight | {"strategy": "channel"}, "input_activations": inputs}
    config = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"}
    config |= {"ignore": ["lm_head"], "config_groups": {"all": group}}
    return by_hand(plain, directory, torch.int8, "weight_scale", config)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
SAVED: dict[str, Saver] = {
    "int8": save_torchao,
    "nf4": partial(save_bnb, **NF4),
    "fp8": save_fp8,
    "compressed": partial(save_compressed, activations="token"),
}
SHARED: dict[str, Saver] = {
    "llm_int8": partial(save_bnb, load_in_8bit=True),
    "compressed": partial(save_compressed, activations="tensor"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("plain"), hidden_size=64, intermediate_size=64)


def decode(lm: model.LM, together: bool = True) -> schedule.Bits:
    """Answers and states of the schedule's rounds, all at once or each in an engine of its own."""
    rollouts, states = {}, {}
    for rounds in [schedule.rounds()] if together else [[round] for round in schedule.rounds()]:
        one = slow_path.Watched(lm, 27, schedule.STEPS)
        found = schedule.together(one, rounds)
        rollouts.update(found[0])
        states.update(found[1])
    return rollouts, states


@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_model_gives_the_same_bits_alone_and_in_company(kind: str, plain: Path, tmp_path: Path) -> None:
    lm = model.load(Generator(model=str(SAVED[kind](plain, tmp_path)), dtype="float32"))
    rollouts, _ = alone = decode(lm, together=False)
    schedule.assert_same(decode(lm), alone)
    assert rollouts != decode(model.load(Generator(model=str(plain))))[0]  # it is another model


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantising_while_loading_gives_the_saved_model(kind: Any, plain: Path, tmp_path: Path) -> None:
    path = SAVED[kind](plain, tmp_path)
    schedule.assert_same(
        decode(model.load(Generator(model=str(plain), quantization=kind))),
        decode(model.load(Generator(model=str(path)))),
    )
    estimate, stored = sizes.weight_bytes(plain, quantization=kind), sizes.weight_bytes(path)
    assert estimate == pytest.approx(stored, rel=0.03) and stored < sizes.weight_bytes(plain)


def test_a_model_without_layers_to_quantise_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(ConfigError, match=r"generator.quantization: 'int8' finds no layer"):
        model.load(Generator(model=str(tiny.save("gpt2", tmp_path)), quantization="int8"))


@pytest.mark.parametrize("kind", SHARED)
def test_inputs_scaled_over_the_batch_are_refused(kind: str, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generator.model: .*layers.0.*q_proj by a scale of the whole batch"):
        model.load(Generator(model=str(SHARED[kind](plain, tmp_path))))


def test_a_dtype_is_given_or_refused(plain: Path, tmp_path: Path) -> None:
    path = str(save_fp8(plain, tmp_path))
    try:
        given = model.load(Generator(model=path, dtype="bfloat16")).dtype
    except ConfigError as error:  # transformers before 5.24
        assert re.search(r"generator.dtype: 'bfloat16', but .* in float32; leave it at auto", str(error))
    else:
        assert given == torch.bfloat16


def test_what_compressed_tensors_unpacks_counts_unpacked(plain: Path, tmp_path: Path) -> None:
    stored = sizes.weight_bytes(SAVED["compressed"](plain, tmp_path))
    assert stored == pytest.approx(sizes.weight_bytes(plain), rel=0.03)  # and the scales


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "hqq"}, r"install the package that it needs.*HQQ"),
        ({"quant_method": "mine"}, r"quantised by 'mine', which transformers does not know"),
        ({"bits": 4}, r"no `quant_method`"),
        ({"quant_method": "bitnet"}, r"lacks the weights .*proj.weight_scale"),
    ],
)
def test_what_cannot_be_loaded_is_refused(config: dict[str, Any], said: str, plain: Path, tmp_path: Path) -> None:
    path = declare(quantise(plain, tmp_path), config)
    with pytest.raises(ConfigError, match=f"generator.model: .*{said}"):
        model.load(Generator(model=str(path)))
