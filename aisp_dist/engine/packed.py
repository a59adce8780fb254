"""Linear layers of a model on a CPU with weights in oneDNN's own layout, made once. PyTorch's linear layer may lay them
out anew in every call, and its bits depend on how many rows it is given; packed ones give a row the same bits among
any. (fp32 on AVX2, 64 rows of 576: the output layer takes .6 of the time, the others .9 to 1.1.)

The operators are those that torch.compile uses for frozen weights. They are no public interface, so layers stay plain
where the operators are missing, refuse a weight, or do not keep what is said here: each shape is tried.
"""

from __future__ import annotations

from functools import cache
from typing import TypeGuard

import torch
from torch import nn

_ROWS = 64  # that weights are laid out for, and with which a shape is tried
_CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # relative distance from the plain layer


class PackedLinear(nn.Module):
    """A linear layer for inference. weight [out, in]: laid out by oneDNN, opaque to all other operators."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, plain.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach(), _ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


@torch.inference_mode()
def pack(*roots: nn.Module) -> bool:
    """Replaces the plain linear layers of these modules on a CPU, or none if a shape of them cannot be packed. A layer
    that several hold stays one layer. Each goes as soon as it is packed: a model is in memory once."""
    holders: dict[nn.Linear, list[tuple[nn.Module, str]]] = {}
    for parent in dict.fromkeys(module for root in roots for module in root.modules()):
        for name, child in parent.named_children():
            if _is_plain(child):
                holders.setdefault(child, []).append((parent, name))
    shapes = {(layer.weight.shape, layer.weight.dtype, layer.bias is None): layer for layer in holders}
    if not all(map(_packs, shapes.values())):
        return False
    shapes.clear()
    found = bool(holders)
    while holders:
        layer, places = holders.popitem()
        packed = PackedLinear(layer)
        for parent, name in places:
            parent._modules[name] = packed
    return found


@cache
def emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU has no products of this dtype, so that they take several times as long as those of fp32."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    supported = getattr(torch.ops.mkldnn, known[dtype], None) if dtype in known else None
    return supported is not None and not supported()


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer whose weight is a plain tensor (a quantised one is of a class of its own)."""
    if type(module) is not nn.Linear or type(module.weight.data) is not torch.Tensor:
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype in _CLOSE


def _packs(plain: nn.Linear) -> bool:
    """Whether a layer can be packed, and then computes the plain one's product, each row with the same bits in any
    company."""
    draws = torch.Generator().manual_seed(0)
    x_RI = torch.randn(_ROWS, plain.in_features, generator=draws).to(plain.weight.dtype)
    order = torch.randperm(_ROWS, generator=draws)
    try:
        packed = PackedLinear(plain)
        y_RO, expected_RO = packed(x_RI), plain(x_RI).float()
        close = (y_RO.float() - expected_RO).norm() <= _CLOSE[plain.weight.dtype] * expected_RO.norm()
        companies = (order, order[: _ROWS // 2], order[:7], order[:1])
        return bool(close) and all(torch.equal(packed(x_RI[rows]), y_RO[rows]) for rows in companies)
    except (AttributeError, RuntimeError):  # no such operator, or not for this weight
        return False
