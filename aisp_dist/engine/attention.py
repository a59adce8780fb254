"""Attention over a shared prefix, behind transformers' AttentionInterface. One registered function receives queries,
keys and values from every layer of every model family and hands them to the pass that is running, so no family needs
code of its own. Owns masks, windows, softcaps, sinks and the merge of attention parts by log-sum-exp. Knows nothing of
rows, prompt ids, noise or tokens.

Three passes exist: over one whole sequence (`Dense`, below), over one new token of every row (kv.py), and over the rows
of a scoring batch (rewards/prefix.py).

Shapes: H query heads, K key-value heads, G = H / K query heads of each, L keys, T queries, C head size; in
`attend_part` X and Y are any two batch dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from aisp_dist import quiet
from aisp_dist.engine.packed import emulated

with quiet.loading():  # the first import of torchao
    from transformers import AttentionInterface

NAME = "aisp_shared_prefix"
# Ragged and unaligned shapes take other paths through the operators and give other bits. So queries to a prefix, tokens
# of a dense pass, rows, and the steps of a block all come in multiples of this.
TILE = 32
CHUNK = 512  # queries of a dense pass at a time, to bound its masks and scores

# Largest relative distance of hidden states between transformers' attention and ours. Rounding stays far below it, a
# wrong model far above.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}

KV = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """How one layer attends. scaling: factor of the scores; window: keys that a query sees, its own included, None for
    all earlier ones; softcap: of the scores; sinks: their logits [H]."""

    index: int
    scaling: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


Pass = Callable[[Layer, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_running: ContextVar[Pass | None] = ContextVar("aisp attention pass", default=None)


@contextmanager
def running(attend: Pass) -> Iterator[None]:
    """Inside this context, every adapted model attends by this pass."""
    token = _running.set(attend)
    try:
        yield
    finally:
        _running.reset(token)


def misfit(layers: Sequence[Layer], config: Any) -> str:
    """What is wrong with the layers that attended in one forward pass, "" if nothing: every layer must attend once, in
    order, with its configured window. A probe has too few tokens to see a wrong window in the numbers."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    windows = {"full_attention": None, "sliding_attention": getattr(config, "sliding_window", None)}
    if [layer.index for layer in layers] != list(range(len(kinds))):
        return f"{len(layers)} of its {len(kinds)} layers attend through the interface"
    for layer, kind in zip(layers, kinds, strict=True):
        if layer.window != windows.get(kind, kind):
            return f"layer {layer.index} ({kind}, {windows.get(kind)}) attends with window {layer.window}"
    return ""


def _interface(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    attend = _running.get()
    if attend is None:
        raise RuntimeError("this model was taken over by the engine and builds no masks of its own; load another copy")
    layer = Layer(module.layer_idx, scaling or query.shape[-1] ** -0.5, sliding_window, softcap, s_aux)
    return attend(layer, query, key, value).transpose(1, 2).to(query.dtype).contiguous(), None


AttentionInterface.register(NAME, _interface)


class Mask(NamedTuple):
    """Which keys the queries see. bias: [X or 1, 1, T, L], 0 where a key is seen and -inf where not, in the queries'
    dtype. blind: [X or 1, 1, T], True for a query that sees no key; None if every query sees one."""

    bias: torch.Tensor
    blind: torch.Tensor | None


def mask(seen: torch.Tensor, dtype: torch.dtype) -> Mask:
    """The mask in which key l is seen by query t where seen [..., T, L] is True."""
    bias = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -math.inf)
    return Mask(bias, ~seen.any(-1))


def fused(layer: Layer, q: torch.Tensor) -> bool:
    """Whether queries [..., T, C] attend by PyTorch's fused operator, which exists on CPUs and has no softcap. For the
    few queries of a suffix in bfloat16 two products are faster, where the CPU has them (310 us for 470)."""
    if q.device.type != "cpu" or layer.softcap is not None:
        return False
    return q.dtype != torch.bfloat16 or q.shape[-2] >= TILE or emulated(q.dtype)


def attend_part(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask | None) -> KV:
    """Softmax attention over a part of the keys: output [X, Y, T, C] in fp32 and log-sum-exp [X, Y, T]. A query that
    sees no key of this part gets 0 and -inf. q [X, Y, T, C]; k, v [X, Y, L, C]."""
    if fused(layer, q):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask.bias if mask else None, scale=layer.scaling
        )
        if mask is None or mask.blind is None:
            return out.float(), lse
        return out.float().masked_fill(mask.blind[..., None], 0.0), lse.masked_fill(mask.blind, -math.inf)
    scores = (q @ k.transpose(-1, -2)).float() * layer.scaling
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    if mask is not None:
        scores += mask.bias
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = (weights.to(v.dtype) @ v).float() / total.clamp(min=torch.finfo(torch.float32).tiny)
    return out, (top + total.log())[..., 0]


def seen(at: torch.Tensor, to: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether a query at position `at` sees the key at position `to`."""
    return (to <= at) if window is None else (to <= at) & (to > at - window)


def merge(first: KV, second: KV) -> KV:
    """Attention over the union of two disjoint parts of the keys. A part that a query does not see (log-sum-exp -inf)
    changes no bit of the other part's output."""
    (out1, lse1), (out2, lse2) = first, second
    share = torch.sigmoid(torch.nan_to_num(lse1 - lse2, nan=0.0, posinf=math.inf, neginf=-math.inf))
    return torch.lerp(out2, out1, share[..., None]), torch.logaddexp(lse1, lse2)


def sink(layer: Layer, part: KV) -> torch.Tensor:
    """The output once the layer's sinks (keys with value 0) have their share of the weights; dims 1, 2 are [K, G]."""
    out, lse = part
    if layer.sinks is None:
        return out
    sinks = layer.sinks.float().view(1, *out.shape[1:3], *[1] * (out.ndim - 4))
    return out * torch.sigmoid(lse - sinks)[..., None]


@dataclass
class Dense:
    """Causal attention of one whole sequence [1, H, T, C], of which the first `length` tokens are not padding. With
    `keep`, `kv` holds afterwards the keys and values [K, L, C] by layer that later tokens can still see."""

    length: int
    keep: bool = False
    kv: list[KV] = field(default_factory=list)

    def __call__(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads, kv_heads, length = q.shape[1], k.shape[1], q.shape[2]
        if self.keep:  # at least one key: the operators take no empty part
            first = 0 if layer.window is None else max(0, self.length - max(layer.window, 2) + 1)
            self.kv.append((k[0, :, first : self.length].clone(), v[0, :, first : self.length].clone()))
        q_KGTC = q.view(kv_heads, heads // kv_heads, length, -1)
        k_KGTC, v_KGTC = (x[0, :, None].expand(-1, heads // kv_heads, -1, -1) for x in (k, v))
        chunks = []
        for start in range(0, length, CHUNK):
            stop = min(start + CHUNK, length)
            low = 0 if layer.window is None else max(0, start - layer.window + 1)
            at, to = torch.arange(start, stop, device=q.device)[:, None], torch.arange(low, stop, device=q.device)
            keys, values = k_KGTC[:, :, low:stop], v_KGTC[:, :, low:stop]
            causal = mask(seen(at, to, layer.window)[None, None], q.dtype)._replace(blind=None)
            out, lse = attend_part(layer, q_KGTC[:, :, start:stop], keys, values, causal)
            chunks.append(sink(layer, (out[None], lse[None]))[0])
        return torch.cat(chunks, dim=2).reshape(1, heads, length, -1)


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prefilled prompt. kv: keys and values [K, L, C] by layer, of which a layer with a sliding window keeps what a
    suffix can still see. length: in tokens. z_D: z_0, the last hidden state at the prompt's last position."""

    kv: list[KV]
    length: int
    z_D: torch.Tensor
