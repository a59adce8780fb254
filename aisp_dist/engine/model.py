"""Takes over a language model: switches its attention to the engine's, and checks that the engine decodes it correctly.
Knows nothing of prompts, noise or scheduling.

No family has code of its own here. A family works if its layers attend through transformers' AttentionInterface with
`layer_idx` and keyword `sliding_window`. `adapt` runs the model both ways and refuses one that differs.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from aisp_dist.config import ConfigError, Generator
from aisp_dist.data.encode import surplus
from aisp_dist.engine import attention, pretrained
from aisp_dist.engine.checkpoints import locate
from aisp_dist.engine.endings import end_ids, warn_of_turn_end
from aisp_dist.engine.kv import KVCache, suffixes
from aisp_dist.engine.lm import LM, Heads
from aisp_dist.engine.packed import emulated, pack

_PROBE_TOKENS = 24
_log = logging.getLogger("aisp")


class Unsupported(ValueError):
    """The engine would decode this model wrongly."""


@dataclass
class _DecoderOutput(ModelOutput):  # type: ignore[misc]
    """A decoder's output of which everything but the hidden states is None."""

    last_hidden_state: torch.Tensor

    def __getattr__(self, name: str) -> None:
        return None


class _Identity(nn.Module):
    """Replaces the decoder, so that the model's own forward pass maps given hidden states to logits."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=inputs_embeds)


def load(settings: Generator, device: torch.device | str | None = None) -> LM:
    """The generator's model on a device (default: the first GPU, else the CPU), ready to decode. Raises ConfigError as
    pretrained.weights does, and for a family that the engine would decode wrongly."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with pretrained.loading(locate("generator.model", settings.model, "generator")):
        model, tokenizer = pretrained.weights(settings, chosen), pretrained.tokenizer(settings)
    try:
        lm = adapt(model, tokenizer, settings.fp32_head)
    except Unsupported as error:
        raise ConfigError(f"generator.model: {settings.model!r}: {error}") from error
    warn_of_turn_end(settings, lm.tokenizer, lm.turn_end)
    if chosen.type == "cpu" and emulated(lm.dtype):
        _log.warning(
            "generator.dtype: %r computes in %s, which this CPU has no products of, so decoding takes several times as "
            "long; set generator.dtype: float32",
            settings.model,
            str(lm.dtype).removeprefix("torch."),
        )
    return lm


def adapt(model: Any, tokenizer: Any, fp32_head: bool = False) -> LM:
    """Takes over a causal language model, whose attention stays switched to the engine's, and checks it. fp32_head: a
    copy of the output layer in fp32 computes the logits. Raises Unsupported for one that the engine decodes wrongly."""
    if wrong := surplus(tokenizer, len(model.get_input_embeddings().weight)):
        raise Unsupported(wrong)
    model.eval().requires_grad_(False)
    config = model.config.get_text_config(decoder=True)
    decoder = model.get_decoder()
    ends, turn_end = end_ids(config, model.generation_config, tokenizer)
    head, output = _with(model, decoder, _Identity()), model.get_output_embeddings()
    if fp32_head:
        head = _with(head, output, copy.deepcopy(output).float())
    lm = LM(
        decoder=decoder,
        head=head,
        tokenizer=tokenizer,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        context_length=context_length(config),
        eos_ids=ends,
        device=model.device,
        dtype=output.weight.dtype,
        head_dtype=torch.float32 if fp32_head else output.weight.dtype,
        turn_end=turn_end,
    )
    return _probe(model, lm, config)


def context_length(config: Any) -> int | None:
    """Number of positions that the model can use. Raises Unsupported if a row's rotary angles depend on the longest row
    of its batch; if they do so only from some length on, the context ends there."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {one.get("rope_type"): one for one in [rope, *rope.values()] if isinstance(one, dict)}
    if "dynamic" in kinds:
        raise Unsupported("its rotary embedding is scaled by the longest row of a batch; use a checkpoint without that")
    length: int | None = getattr(config, "max_position_embeddings", None)
    if "longrope" in kinds:
        length = kinds["longrope"].get("original_max_position_embeddings") or length
    return length


def _with(model: Any, old: nn.Module, new: nn.Module) -> nn.Module:
    """The model with one of its modules replaced; all else, weights included, is shared with the original."""
    path = next((name for name, module in model.named_modules() if module is old), "")
    if not path:
        raise Unsupported("its decoder and head cannot be told apart (get_decoder); use another model")
    whole: nn.Module = copy.copy(model)
    node: Any = whole
    *parents, last = path.split(".")
    for name in parents:
        node._modules = {**node._modules, name: copy.copy(node._modules[name])}
        node = node._modules[name]
    node._modules = {**node._modules, last: new}
    return whole


@torch.inference_mode()
def _probe(model: Any, lm: LM, config: Any) -> LM:
    """The model with the shapes of its attention. Decodes a few tokens by transformers' attention and by the engine's;
    raises Unsupported unless hidden states and logits agree and every layer attends as its config says (misfit)."""
    length = min(_PROBE_TOKENS, lm.context_length or _PROBE_TOKENS)
    tokens = tuple((7919 * i + 13) % lm.vocab_size for i in range(length))
    advice = "the engine would decode it wrongly; use a family that attends through transformers' AttentionInterface"
    try:
        ids = torch.tensor([tokens], device=lm.device)
        expected_TD = lm.decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
        expected_TV = model(input_ids=ids, use_cache=False).logits[0].float()
        model.set_attn_implementation(attention.NAME)
        pack(lm.decoder, lm.head)
        lm = replace(lm, attention=_heads(lm, tokens, config, advice))
        z_TD = _in_parts(lm, tokens)
        logits_TV = lm.logits(expected_TD)
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(f"it fails the engine's probe ({type(error).__name__}: {error}); {advice}") from error
    for name, ours, theirs in (("hidden states", z_TD, expected_TD), ("logits", logits_TV, expected_TV)):
        distance = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        if not distance <= attention.TOLERANCE.get(lm.dtype, 0.0):
            raise Unsupported(f"its {name} differ by {distance:.2g} (relative) from transformers' own; {advice}")
    return lm


def _heads(lm: LM, tokens: tuple[int, ...], config: Any, advice: str) -> tuple[Heads, ...]:
    """The heads of every layer, in the order in which the layers attend."""
    found: list[tuple[attention.Layer, Heads]] = []
    dense = attention.Dense(len(tokens))

    def attend(layer: attention.Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found.append((layer, Heads(k.shape[1], q.shape[1] // k.shape[1], k.shape[3], v.shape[3])))
        return dense(layer, q, k, v)

    ids = torch.tensor([tokens], device=lm.device)
    lm.states(attend, ids, torch.arange(len(tokens), device=lm.device)[None])
    if wrong := attention.misfit([layer for layer, _ in found], config):
        raise Unsupported(f"{wrong}; {advice}")
    return tuple(heads for _, heads in found)


def _in_parts(lm: LM, tokens: tuple[int, ...]) -> torch.Tensor:
    """z [T, D] by the engine: the first half of the tokens prefilled, the others one by one as a suffix."""
    first = len(tokens) // 2
    z_TD, dense = lm.dense(tokens[:first], keep=True)
    kv = KVCache(attention.TILE, len(tokens), len(tokens) + suffixes(1, len(tokens)))
    kv.seat(0, kv.keep(dense, z_TD[-1]))
    states = [z_TD]
    for at, token in enumerate(tokens[first:]):
        ids_B1, positions_B1 = (torch.full((attention.TILE, 1), x, device=lm.device) for x in (token, first + at))
        kv.reach(0, at)
        states.append(lm.states(kv.attend([at] + [-1] * (attention.TILE - 1)), ids_B1, positions_B1)[0])
    return torch.cat(states)
