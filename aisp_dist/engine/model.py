"""The base model: found, loaded, adapted to the engine's attention and probed. Owns what the engine knows of a model
(LM). Knows nothing of prompts, noise or scheduling.

No family has code of its own here. A family works if its layers attend through transformers' AttentionInterface with
`layer_idx` and keyword `sliding_window`; `adapt` runs the model both ways and refuses it otherwise.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from aisp_dist.checkpoints import locate
from aisp_dist.config import ConfigError, Generator
from aisp_dist.engine import attention
from aisp_dist.engine.blocks import Blocks

_PROBE_TOKENS = 24
# Relative distance of hidden states between the two ways: rounding stays far below, a wrong model far above.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


class Unsupported(ValueError):
    """The engine would decode this model wrongly."""


class _DecoderOutput(SimpleNamespace):
    """A decoder's output with everything but the hidden states None."""

    def __getitem__(self, index: int) -> Any:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


class _Identity(nn.Module):
    """Stands where the decoder was, so that the model's own forward maps given hidden states to logits."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=inputs_embeds)


@dataclass(frozen=True)
class LM:
    """A causal language model in two parts, decoder and head. eos_ids end a response. context_length is the longest
    sequence in tokens, None if unbounded."""

    decoder: nn.Module
    head: nn.Module
    tokenizer: Any
    hidden_size: int
    vocab_size: int
    num_layers: int
    context_length: int | None
    eos_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype

    def states(self, attend: attention.Pass, tokens_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        """Last hidden states z [B, T, D], after the final norm."""
        with attention.running(attend):
            out = self.decoder(input_ids=tokens_BT, position_ids=positions_BT, past_key_values=None, use_cache=False)
        z: torch.Tensor = out.last_hidden_state
        return z

    def logits(self, z_ND: torch.Tensor) -> torch.Tensor:
        """fp32 [N, V]: the family's full map from hidden states to logits, softcaps and scales included."""
        out = self.head(inputs_embeds=z_ND.to(self.dtype)[:, None], use_cache=False)
        logits: torch.Tensor = out.logits[:, 0].float()
        return logits

    def dense(self, tokens: tuple[int, ...], keep: bool = False) -> tuple[torch.Tensor, attention.Dense]:
        """z [T, D] of one whole sequence, computed alone, and the pass that holds its keys and values if kept."""
        attend = attention.Dense(len(tokens), keep)
        padding = -len(tokens) % attention.TILE  # causal: what follows a sequence cannot change it
        ids = torch.tensor([(*tokens, *[tokens[-1]] * padding)], device=self.device)
        positions = torch.arange(ids.shape[1], device=self.device).clamp(max=len(tokens) - 1)
        return self.states(attend, ids, positions[None])[0, : len(tokens)], attend


def _source(settings: Generator) -> dict[str, Any]:
    return {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}


def _refusal(settings: Generator, error: Exception) -> ConfigError:
    fix = "name a local directory, or a hub id that this machine can reach"
    if "trust_remote_code" in str(error):
        fix = "it brings code of its own; set generator.trust_remote_code: true if you trust it"
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return ConfigError(f"generator.model: {settings.model!r} cannot be loaded: {fix} ({reason[0]})")


def tokenizer(settings: Generator) -> Any:
    """The generator's tokenizer, with generator.chat_template for its own if that is set. Raises ConfigError."""
    from transformers import AutoTokenizer

    checkpoint = locate("generator.model", settings.model, "generator")
    try:
        loaded = AutoTokenizer.from_pretrained(checkpoint, **_source(settings))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _refusal(settings, error) from error
    if settings.chat_template is not None:
        try:
            loaded.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"generator.chat_template: {settings.chat_template!r} must be a readable text file with a Jinja "
                f"template; fix the path or leave it null ({error})"
            ) from error
    return loaded


def load(settings: Generator, device: torch.device | str | None = None) -> LM:
    """The generator's model on a device (default: the first GPU, else the CPU), ready to decode. Raises ConfigError for
    a missing path, a checkpoint without safetensors or with missing weights, remote code that is not trusted, and a
    family that the engine would decode wrongly."""
    from transformers import AutoModelForCausalLM

    checkpoint = locate("generator.model", settings.model, "generator")
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, use_safetensors=True, output_loading_info=True, **_source(settings)
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _refusal(settings, error) from error
    if report["missing_keys"]:
        raise ConfigError(
            f"generator.model: {settings.model!r} lacks the weights {sorted(report['missing_keys'])[:4]}, which would "
            "be random; name a complete causal language model"
        )
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        return adapt(model.to(chosen), tokenizer(settings))
    except Unsupported as error:
        raise ConfigError(f"generator.model: {settings.model!r}: {error}") from error


def adapt(model: Any, tokenizer: Any) -> LM:
    """Takes over a causal language model (its attention is switched for good) and probes it. Raises Unsupported."""
    model.eval().requires_grad_(False)
    config = model.config.get_text_config(decoder=True)
    decoder = model.get_decoder()
    ends: set[int] = set()
    for value in (model.generation_config.eos_token_id, getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        ends.update(() if value is None else [value] if isinstance(value, int) else value)
    lm = LM(
        decoder=decoder,
        head=_head(model, decoder),
        tokenizer=tokenizer,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        context_length=getattr(config, "max_position_embeddings", None),
        eos_ids=frozenset(ends),
        device=model.device,
        dtype=model.get_output_embeddings().weight.dtype,
    )
    _probe(model, lm, config)
    return lm


def _head(model: Any, decoder: nn.Module) -> nn.Module:
    """The model with the decoder replaced by the identity; weights and everything else are shared."""
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    if not path:
        raise Unsupported("its decoder and head cannot be told apart (get_decoder); use another model")
    head: nn.Module = copy.copy(model)
    node: Any = head
    *parents, last = path.split(".")
    for name in parents:
        node._modules = {**node._modules, name: copy.copy(node._modules[name])}
        node = node._modules[name]
    node._modules = {**node._modules, last: _Identity()}
    return head


@torch.inference_mode()
def _probe(model: Any, lm: LM, config: Any) -> None:
    """Decodes a few tokens both ways, transformers' and ours, and raises Unsupported unless the hidden states and
    logits agree, every layer called our function once, and every layer's window is the configured one (the probe's
    tokens are too few to reach most windows)."""
    length = min(_PROBE_TOKENS, lm.context_length or _PROBE_TOKENS)
    tokens = tuple((7919 * i + 13) % lm.vocab_size for i in range(length))
    advice = "the engine would decode it wrongly; use a family that attends through transformers' AttentionInterface"
    try:
        ids = torch.tensor([tokens], device=lm.device)
        expected_TD = lm.decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
        expected_TV = model(input_ids=ids, use_cache=False).logits[0].float()
        model.set_attn_implementation(attention.NAME)
        calls: list[attention.Layer] = []
        z_TD = _both_ways(lm, tokens, calls)
        logits_TV = lm.logits(expected_TD)
    except Exception as error:
        raise Unsupported(f"it fails the engine's probe ({type(error).__name__}: {error}); {advice}") from error
    if [call.index for call in calls] != list(range(lm.num_layers)):
        raise Unsupported(f"{len(calls)} of its {lm.num_layers} layers attend through the interface; {advice}")
    for call in calls:
        kinds = getattr(config, "layer_types", None)
        kind = kinds[call.index] if kinds else "sliding_attention"
        window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
        if kind not in ("full_attention", "sliding_attention") or call.window != window:
            raise Unsupported(f"layer {call.index} ({kind}, {window}) attends with window {call.window}; {advice}")
    for name, ours, theirs in (("hidden states", z_TD, expected_TD), ("logits", logits_TV, expected_TV)):
        distance = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        if not distance <= _TOLERANCE.get(lm.dtype, 0.0):
            raise Unsupported(f"its {name} differ by {distance:.2g} (relative) from transformers' own; {advice}")


def _both_ways(lm: LM, tokens: tuple[int, ...], calls: list[attention.Layer]) -> torch.Tensor:
    """z [T, D], the first half of the tokens prefilled, the others one by one as a suffix of it."""
    first = len(tokens) // 2
    z_TD, dense = lm.dense(tokens[:first], keep=True)
    kv = Blocks(attention.TILE, len(tokens))
    kv.seat(0, kv.keep(dense, z_TD[-1]))
    states = [z_TD]
    for at, token in enumerate(tokens[first:]):
        kv.reserve([at + 1])
        at_B = torch.full((attention.TILE,), at, device=lm.device)
        step = kv.attend(at_B)

        def attend(
            layer: attention.Layer, *qkv: torch.Tensor, step: attention.Pass = step, at: int = at
        ) -> torch.Tensor:
            if at == 0:
                calls.append(layer)
            return step(layer, *qkv)

        states.append(lm.states(attend, torch.full_like(at_B, token)[:, None], at_B[:, None] + first)[0])
    return torch.cat(states)
