"""A sequence classifier over rows of tokens, with what the rows of a request begin with computed once. Owns padding,
micro-batches, the pass over a shared prefix and ragged rows, and the probe that says which models can. Knows nothing
of texts, prompts or rewards.

No family has code of its own here: the model's own forward embeds, runs its layers and reads the score at each row's
last token; only its attention is ours. That takes layers that attend through transformers' AttentionInterface with
`layer_idx` and keyword `sliding_window`. All others (encoders, Falcon, Bloom, code that comes with a checkpoint) keep
their own attention, over whole rows.

Shapes: B rows, H query heads, K key-value heads, G = H / K, L keys of the prefix, T own tokens, Q = G T, C head size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Protocol

import torch

from aisp_dist.engine import attention
from aisp_dist.engine.attention import KV, Layer

_log = logging.getLogger(__name__)
Ids = tuple[int, ...]
_ALIGNED = 8  # own tokens come in multiples of this, which kernels prefer
_CHUNK = 4096  # queries of a key-value head at a time, to bound masks and scores
_KEPT_TOKENS = 1 << 13  # of prefixes, for the next iterations of their prompts


@dataclass(frozen=True, eq=False)
class Extend:
    """Causal attention of rows' own tokens [B, H, T, C], padded on the right, to each other and to the prefix that all
    rows share: `length` tokens, of which `kv` holds [K, L, C] by layer (a sliding layer keeps what is still seen).
    Without a prefix, rows are whole sequences."""

    length: int = 0
    kv: list[KV] = field(default_factory=list)

    def __call__(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, kv_heads, width, _ = k.shape
        q_BKGTC = q.reshape(rows, kv_heads, -1, width, q.shape[-1])
        step = max(_CHUNK // (rows * q_BKGTC.shape[2]) // _ALIGNED, 1) * _ALIGNED
        chunks = [self._chunk(layer, at, q_BKGTC[:, :, :, at : at + step], k, v) for at in range(0, width, step)]
        return torch.cat(chunks, dim=3).flatten(1, 2)

    def _chunk(self, layer: Layer, first: int, q_BKGTC: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Output [B, K, G, T, C] for queries whose own positions begin at `first`."""
        group, width = q_BKGTC.shape[2:4]
        low, stop = 0 if layer.window is None else max(0, first - layer.window + 1), first + width
        at_T = torch.arange(first, stop, device=k.device)
        causal = attention.seen(at_T[:, None], torch.arange(low, stop, device=k.device), layer.window)
        mask = attention.mask(causal.repeat(group, 1)[None, None], q_BKGTC.dtype)._replace(blind=None)
        q_BKQC = q_BKGTC.flatten(2, 3)
        part = attention.attend_part(layer, q_BKQC, k[:, :, low:stop], v[:, :, low:stop], mask)
        if self.length:
            part = attention.merge(self._prefix(layer, at_T, q_BKQC), part)
        out, lse = (x.reshape(*q_BKGTC.shape[:4], *x.shape[3:]) for x in part)
        return attention.sink(layer, (out, lse))

    def _prefix(self, layer: Layer, at_T: torch.Tensor, q_BKQC: torch.Tensor) -> KV:
        """Output [B, K, Q, C] and log-sum-exp [B, K, Q] over the prefix: the queries of all rows in one product."""
        rows, kv_heads, queries, size = q_BKQC.shape
        k, v = (x[None] for x in self.kv[layer.index])
        mask = None
        if layer.window is not None:
            to = torch.arange(-k.shape[2], 0, device=k.device)  # positions counted from the end of the prefix
            seen = attention.seen(at_T[:, None], to, layer.window).repeat(rows * queries // len(at_T), 1)
            mask = attention.mask(seen[None, None], q_BKQC.dtype)
        q_KNC = q_BKQC.transpose(0, 1).reshape(1, kv_heads, rows * queries, size)
        out, lse = attention.attend_part(layer, q_KNC, k, v, mask)
        out_KBQC, lse_KBQ = out.reshape(kv_heads, rows, queries, -1), lse.reshape(kv_heads, rows, queries)
        return out_KBQC.transpose(0, 1), lse_KBQ.transpose(0, 1)


@dataclass(frozen=True, eq=False)
class _Growth(Extend):
    """Of one row without padding, and keeps its keys and values by layer."""

    grown: dict[int, KV] = field(default_factory=dict)

    def __call__(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.grown[layer.index] = k[0].clone(), v[0].clone()
        return super().__call__(layer, q, k, v)


@dataclass(eq=False)
class Chain:
    """A text that grows: its tokens so far and the pass over them."""

    tokens: Ids = ()
    shared: Extend = field(default_factory=Extend)


@dataclass(frozen=True, eq=False)
class _Recorded(Extend):
    layers: list[Layer] = field(default_factory=list)

    def __call__(self, layer: Layer, *qkv: torch.Tensor) -> torch.Tensor:
        self.layers.append(layer)
        return super().__call__(layer, *qkv)


class Scores(Protocol):
    """A sequence classifier. pad_token_id: what it pads the rows of the last call with, None for nothing."""

    @property
    def pad_token_id(self) -> int | None: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def logits(self, rows: Sequence[Ids], batch_rows: int, chain: Chain | None = None) -> list[float]: ...
    def close(self) -> None: ...


class Classifier:
    """Takes over a model, whose attention is switched for good if `shares`: then what a request's rows begin with is
    computed once, alone at its own length, so that a score's bits follow from the request and never from what was kept
    of others. Not for two threads at a time."""

    def __init__(self, model: Any) -> None:
        self.model = model
        model.config.get_text_config().use_cache = False
        self._prefixes: dict[Ids, Extend] = {}  # the most recently used last
        self.tokens = 0  # that have passed through it, padding too
        self.windows = False
        own = model.config._attn_implementation
        try:
            reason = self._probe()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        self.shares = not reason
        if model.config._attn_implementation != own and reason:
            model.set_attn_implementation(own)
        if reason:
            _log.warning("%s scores every response with its whole prompt: %s", type(model).__name__, reason)

    def close(self) -> None:
        """Forget what is kept of requests; there is no process to end."""
        self._prefixes.clear()

    @property
    def pad_token_id(self) -> int | None:
        found: int | None = self.model.config.pad_token_id
        return found

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.model.dtype
        return found

    @torch.inference_mode()
    def logits(self, rows: Sequence[Ids], batch_rows: int, chain: Chain | None = None) -> list[float]:
        """fp32 logits of distinct rows, `batch_rows` at a time in their order. chain: what they begin with is kept
        there, and only what has come to it since is computed."""
        pad = self._set_pad(rows)
        shared = (self._grown(rows, chain) if chain else self._shared(rows)) if self.shares else None
        step = batch_rows if pad is not None else 1
        batches = [rows[start : start + step] for start in range(0, len(rows), step)]
        return [x for b in batches for x in self._forward(b, pad, shared).logits.float().squeeze(-1).tolist()]

    def _set_pad(self, rows: Sequence[Ids]) -> int | None:
        """Makes a token that occurs in none of the rows the padding: transformers reads the score at the last token
        that is not the pad id, so one that is also EOS would move it into the text."""
        used = {token for row in rows for token in row}
        pad = next((i for i in range(self.model.get_input_embeddings().num_embeddings) if i not in used), None)
        self.model.config.pad_token_id = self.model.config.get_text_config().pad_token_id = pad
        return pad

    def _shared(self, rows: Sequence[Ids]) -> Extend:
        """The pass over what all rows begin with, short of one token of each row's own."""
        tokens = _begin(rows) if len(rows) > 1 else ()
        shared = self._prefixes.pop(tokens, None) or self._prefill(tokens)
        self._prefixes[tokens] = shared
        while sum(map(len, self._prefixes)) > _KEPT_TOKENS:
            del self._prefixes[next(iter(self._prefixes))]
        return shared

    def _grown(self, rows: Sequence[Ids], chain: Chain) -> Extend:
        """As `_shared`, from what the chain has: cut where the rows differ from it, and extended by what is new."""
        tokens, kept = _begin(rows), chain.shared
        same = alike(chain.tokens, tokens)
        if same < len(chain.tokens) and self.windows:  # a sliding layer has let go of what would be seen again
            same = 0
        if not same:
            chain.tokens, chain.shared = tokens, self._prefill(tokens)
            return chain.shared
        if cut := len(chain.tokens) - same:
            kept = Extend(same, [(k[:, :-cut], v[:, :-cut]) for k, v in kept.kv])
        if new := tokens[same:]:
            growth = _Growth(same, kept.kv)
            self._run(growth, [new], same, len(new))
            both = [(kv, growth.grown[i]) for i, kv in enumerate(kept.kv)]
            kept = Extend(len(tokens), [(torch.cat([a, b], 1), torch.cat([c, d], 1)) for (a, c), (b, d) in both])
        chain.tokens, chain.shared = tokens, kept
        return kept

    def _prefill(self, tokens: Ids) -> Extend:
        if not tokens:
            return Extend()
        dense = attention.Dense(len(tokens), keep=True)
        padding = -len(tokens) % attention.TILE  # causal: what follows a sequence cannot change it
        self._run(dense, [(*tokens, *[tokens[-1]] * padding)], 0, len(tokens))
        return Extend(len(tokens), dense.kv)

    def _forward(self, rows: Sequence[Ids], pad: int | None, shared: Extend | None, **more: bool) -> Any:
        """The model's output for rows, padded on the right, from the end of their prefix on."""
        own = [row[shared.length :] if shared else row for row in rows]
        longest = max(map(len, own))
        width = longest + (-longest % _ALIGNED if shared and pad is not None else 0)
        ids = [(*row, *[pad or 0] * (width - len(row))) for row in own]
        if shared:
            return self._run(shared, ids, shared.length, longest, **more)
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in own]
        ids_BT, mask_BT = (torch.tensor(x, device=self.model.device) for x in (ids, mask))
        return self.model(input_ids=ids_BT, attention_mask=mask_BT, **more)

    def _run(self, attend: attention.Pass, ids: Sequence[Ids], start: int, length: int, **more: bool) -> Any:
        """The model's output for tokens at positions from `start` on; the first `length` are not all padding."""
        ids_BT = torch.tensor(ids, device=self.model.device)
        self.tokens += ids_BT.numel()
        positions_T = start + torch.arange(ids_BT.shape[1], device=ids_BT.device).clamp(max=length - 1)
        with attention.running(attend):
            return self.model(  # the mask is for no one, but without one some models warn of padding
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                position_ids=positions_T.expand_as(ids_BT),
                **more,
            )

    @torch.inference_mode()
    def _probe(self) -> str | None:
        """What is wrong if the model cannot share a prefix: by its parts, by how its layers attend, or by hidden states
        and scores of two ragged rows, computed both ways."""
        if not type(self.model).__module__.startswith("transformers."):
            return "its code is not transformers' own"  # and may read scores where no probe finds out
        for module in self.model.modules():
            if hasattr(module, "layer_idx") and not getattr(module, "is_causal", True):
                return "its tokens attend to later ones"
            if any(kind in str(getattr(module, "rope_type", "")) for kind in ("dynamic", "longrope")):
                return "its rotary frequencies depend on the length of the input"
        vocab = self.model.get_input_embeddings().num_embeddings
        tokens = tuple((7919 * i + 13) % vocab for i in range(24))
        rows, length = (tokens[:12], tokens[:9] + tokens[12:]), 9
        pad = self._set_pad(rows)
        theirs = self._forward(rows, pad, None, output_hidden_states=True)
        self.model.set_attn_implementation(attention.NAME)
        recorded = _Recorded(length, self._prefill(tokens[:length]).kv)
        ours = self._forward(rows, pad, recorded, output_hidden_states=True)
        self.windows = any(layer.window is not None for layer in recorded.layers)
        if wrong := attention.misfit(recorded.layers, self.model.config.get_text_config()):
            return wrong
        both = ((ours.hidden_states[-1].float(), 0), (theirs.hidden_states[-1].float(), length))
        own = [(i, len(row) - length) for i, row in enumerate(rows)]
        z_ND, expected_ND = (torch.cat([z_BTD[i, at : at + size] for i, size in own]) for z_BTD, at in both)
        states = float((z_ND - expected_ND).norm() / expected_ND.norm())
        scores = float((ours.logits - theirs.logits).abs().max() / (1 + theirs.logits.abs().max()))
        tolerance = attention.TOLERANCE.get(self.model.dtype, 0.0)
        if not (states <= tolerance and scores <= tolerance):  # NaN neither
            return f"with its prefix computed apart, hidden states differ by {states:.2g} and scores by {scores:.2g}"
        return None


def _begin(rows: Sequence[Ids]) -> Ids:
    """What all rows begin with, short of one token of each row's own."""
    return rows[0][: min(alike(min(rows), max(rows)), min(map(len, rows)) - 1)] if rows else ()


def alike(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of tokens that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
