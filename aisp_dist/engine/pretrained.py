"""The generator's tokenizer and weights as transformers loads them: plain, quantised, or dequantised from a GGUF file.
Whatever cannot be loaded, or would be another model than its files say, is a ConfigError. Knows nothing of the engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer

from aisp_dist import quiet
from aisp_dist.config import ConfigError, Generator
from aisp_dist.engine import adapter, gguf, quantized, sizes
from aisp_dist.engine.checkpoints import locate

_FAULTS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


@contextmanager
def loading(checkpoint: str) -> Iterator[None]:
    """Around loads of one checkpoint: what other libraries print is silenced, and a GGUF file is parsed once for all of
    them. checkpoint: what `locate` answered."""
    with quiet.loading(), gguf.parsed_once() if Path(checkpoint).is_file() else nullcontext():
        yield


def tokenizer(settings: Generator) -> Any:
    """The generator's tokenizer, with generator.chat_template instead of its own if that is set. Raises ConfigError."""
    checkpoint = locate("generator.model", settings.model, "generator")
    with loading(checkpoint):
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(**_source(settings, checkpoint))
        except _FAULTS as error:
            raise refusal(settings, error) from error
    if Path(checkpoint).is_file():
        _drop_surplus(loaded, gguf.read(Path(checkpoint)).values["tokenizer.ggml.tokens"])
    if settings.chat_template is not None:
        try:
            loaded.chat_template = Path(settings.chat_template).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"generator.chat_template: {settings.chat_template!r} must be a readable text file with a Jinja "
                f"template; fix the path or leave it null ({error})"
            ) from error
    return loaded


def weights(settings: Generator, device: torch.device) -> Any:
    """The generator's model on a device, with its adapter merged. Raises ConfigError for a missing path, a checkpoint
    without safetensors or with missing weights, remote code that is not trusted, a quantisation that it cannot use, a
    GGUF file that transformers does not read as a whole, and as adapter.merge does."""
    checkpoint = locate("generator.model", settings.model, "generator")
    sizes.check(settings, checkpoint)
    source = _source(settings, checkpoint)
    dtype: str = settings.dtype
    with loading(checkpoint):
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(**source)
            if is_gguf := "gguf_file" in source:
                header = gguf.read(Path(checkpoint))
                dtype = sizes.dtype_of(header.config(), dtype)
                options = _dequantised() | {"config": config}  # parsing it again takes seconds
            else:
                options = quantized.options(settings, config, device)
            model, report = AutoModelForCausalLM.from_pretrained(
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # the error below names them
                output_loading_info=True,
                **options,
                **source,
            )
        except (ConfigError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except _FAULTS as error:
            raise refusal(settings, error) from error
    if wrong := sorted(report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]}):
        raise ConfigError(
            f"generator.model: {settings.model!r} lacks the weights {wrong[:4]} in the shape of its config, so they "
            "would be random; name a complete causal language model"
        )
    if is_gguf:
        _check_gguf(settings, header, model)
    elif options:
        quantized.check(settings, model)
        return model
    if settings.adapter:
        with quiet.loading():
            model = adapter.merge(settings, model)
    return model.to(device)


def _source(settings: Generator, checkpoint: str) -> dict[str, Any]:
    """Arguments of every from_pretrained. checkpoint: what `locate` answered."""
    common = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    if Path(checkpoint).is_file():  # the whole path: transformers prefers a file of that name in the current directory
        return common | {"pretrained_model_name_or_path": str(Path(checkpoint).parent), "gguf_file": checkpoint}
    return common | {"pretrained_model_name_or_path": checkpoint}


def _drop_surplus(tokenizer: Any, known: int) -> None:
    """Take away what transformers adds to a GGUF file's `known` tokens: a byte-level vocabulary without <|endoftext|>
    (Llama 3's) gets one, beyond the model's embedding."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in state["added_tokens"] if token["id"] < known]
    if len(kept) < len(state["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state | {"added_tokens": kept}))


def _dequantised() -> dict[str, Any]:
    """Arguments by which a GGUF file's weights become plain ones, as they always do before transformers 5.24."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _check_gguf(settings: Generator, header: gguf.Header, model: Any) -> None:
    """Raise ConfigError where transformers left out something of a GGUF file, which it does without a word."""
    there = sum(math.prod(shape) for _, shape, *_ in header.tensors)
    read = sum(parameter.numel() for parameter in model.parameters())
    arch = header.values.get("general.architecture")
    scaled = header.values.get(f"{arch}.rope.scaling.type", "none")
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if there == read and (scaled == "none" or rope.get("rope_type", "default") != "default"):
        return
    what = f"{there:,} weights" if there != read else f"a rotary embedding scaled by {scaled!r}"
    instead = f"{read:,} of them" if there != read else "an unscaled one"
    raise ConfigError(
        f"generator.model: {settings.model!r} has {what}, of which transformers reads {instead}, which is another "
        "model; name the model's directory or hub id with safetensors"
    )


def refusal(settings: Generator, error: Exception) -> ConfigError:
    fix = "name a local directory, or a hub id that this machine can reach"
    if isinstance(error, ImportError):
        fix = "install the package that it needs (for quantised weights: pip install 'aisp-dist[quantized]')"
    elif isinstance(error, RuntimeError) or settings.model.endswith(".gguf"):
        fix = "name one that transformers itself loads"
    elif "trust_remote_code" in str(error):
        fix = "it needs code of its own; set generator.trust_remote_code: true if you trust that code"
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return ConfigError(f"generator.model: {settings.model!r} cannot be loaded: {fix} ({reason[0]})")
