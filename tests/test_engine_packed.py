"""Packed linear layers: the plain ones' products, the same bits in any company, and no change where they cannot be."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from aisp_dist.config import Generator
from aisp_dist.engine import packed
from aisp_dist.engine.model import adapt, load
from tests import tiny


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    shared = nn.Linear(48, 48)
    return nn.Sequential(nn.Linear(40, 48), shared, nn.Sequential(shared, nn.Linear(48, 321, bias=False))).to(dtype)


def test_packed_layers_compute_the_plain_ones_products() -> None:
    plain = layers()
    same = copy.deepcopy(plain)
    assert packed.pack(same)
    assert not any(type(module) is nn.Linear for module in same.modules())
    assert same[1] is same[2][0]  # a shared layer stays one
    x = torch.randn(3, 7, 40)
    with torch.inference_mode():
        torch.testing.assert_close(same(x), plain(x), rtol=1e-4, atol=1e-5)


def test_a_row_has_the_same_bits_in_any_company() -> None:
    module = layers()
    assert packed.pack(module)
    x = torch.randn(200, 40)
    with torch.inference_mode():
        whole, order = module(x), torch.randperm(200)
        assert torch.equal(module(x[order]), whole[order])
        for rows in (1, 2, 31, 32, 33, 129):
            assert torch.equal(module(x[:rows]), whole[:rows])


@pytest.mark.parametrize("fault", ["refused", "wrong", "by company"])
def test_layers_stay_plain_where_one_cannot_be_packed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed.PackedLinear.forward

    def wrong(self: packed.PackedLinear, x: torch.Tensor) -> torch.Tensor:
        if self.out_features == 321 and fault == "refused":
            raise RuntimeError("no kernel")
        y = right(self, x)
        if self.out_features == 321:
            y = y * 1.01 if fault == "wrong" else y + 1e-6 * len(x)
        return y

    monkeypatch.setattr(packed.PackedLinear, "forward", wrong)
    module = layers()
    assert not packed.pack(module)
    assert sum(type(child) is nn.Linear for child in module.modules()) == 3


def test_other_weights_are_left_alone() -> None:
    module = layers(torch.float64)
    assert not packed.pack(module)
    assert type(module[0]) is nn.Linear


def test_an_adapted_model_is_packed_but_for_its_embeddings() -> None:
    lm = adapt(tiny.causal("llama"), tiny.tokenizer())
    kinds = {type(module) for module in (*lm.decoder.modules(), *lm.head.modules())}
    assert packed.PackedLinear in kinds and nn.Linear not in kinds


def test_a_dtype_that_the_cpu_emulates_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Generator(model=str(tiny.save("llama", tmp_path)), dtype="bfloat16")
    for missing in (True, False):
        caplog.clear()
        packed.emulated.cache_clear()
        monkeypatch.setattr(packed.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=not missing: has)
        load(settings, "cpu")
        assert ("set generator.dtype: float32" in caplog.text) is missing
    packed.emulated.cache_clear()
    assert not packed.emulated(torch.float32)
