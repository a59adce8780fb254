"""Quantised weights: the arguments by which transformers loads them, and a check that a row's bits do not depend on
other rows. The quantisation methods and the packages that they need are transformers' own.

Shapes: B rows, 1 token, D features.
"""

from __future__ import annotations

from typing import Any

import torch

from aisp_dist.config import ConfigError, Generator
from aisp_dist.config.run import LOCAL_QUANTIZATION
from aisp_dist.engine.sizes import refuse_twice

_ROWS = 32
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def options(settings: Generator, config: Any, device: torch.device) -> dict[str, Any]:
    """Arguments of from_pretrained for a checkpoint that is quantised or shall be; {} for a plain one. config: the
    checkpoint's. Raises ConfigError for one that cannot be loaded so, and ImportError for a missing package."""
    from transformers import BitsAndBytesConfig, TorchAoConfig
    from transformers.quantizers import AutoHfQuantizer

    found = getattr(config, "quantization_config", None)
    found = found or getattr(config.get_text_config(decoder=True), "quantization_config", None)
    refuse_twice(settings, found)
    if found and not AutoHfQuantizer.supports_quant_method(found):  # transformers would load it as plain numbers
        raise ConfigError(
            f"generator.model: {settings.model!r} is quantised by {found['quant_method']!r}, which transformers does "
            "not know; name a checkpoint with another quantisation"
        )
    if settings.quantization not in (None, *LOCAL_QUANTIZATION):
        raise ConfigError(
            f"generator.quantization: {settings.quantization!r} is vLLM's, and this loads the model without vLLM; give "
            f"{' or '.join(LOCAL_QUANTIZATION)}, or leave it null"
        )
    if not found and not settings.quantization:
        return {}
    placed: dict[str, Any] = {"device_map": {"": device}}  # some methods cannot move weights later
    if settings.quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        placed["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    elif settings.quantization == "nf4":
        dtype = config.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
        placed["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return placed


@torch.inference_mode()
def check(settings: Generator, model: Any) -> None:
    """Raise ConfigError for a model that was not loaded as the settings ask, for one that cannot run, and for one whose
    linear layers give a row other outputs in another batch: because they scale activations by the whole batch, or treat
    a column differently if any row has outliers in it."""
    if settings.quantization and all(type(p) is torch.nn.Parameter for p in model.parameters()):
        raise ConfigError(
            f"generator.quantization: {settings.quantization!r} finds no layer that it can quantise in "
            f"{settings.model!r}; set it to null"
        )
    refused = f"generator.model: {settings.model!r}"
    if settings.dtype not in ("auto", stored := str(model.dtype).removeprefix("torch.")):
        raise ConfigError(
            f"generator.dtype: {settings.dtype!r}, but {settings.model!r} is quantised and its other weights are in "
            f"{stored}; set it to auto"
        )
    generator = torch.Generator().manual_seed(0)
    try:
        model(
            input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device)
        )  # some unpack weights in their first pass
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"{refused} fails its first pass; try generator.dtype: auto ({error})") from error
    for name, module in model.named_modules():
        if hasattr(module, "in_features"):
            weight = getattr(module, "weight", None)
            dtype = weight.dtype if weight is not None and weight.dtype in _FLOATS else model.dtype
            x_B1D = torch.randn((_ROWS, 1, module.in_features), generator=generator).to(model.device, dtype)
            outliers_B1D = torch.cat([x_B1D[:1], 30 * x_B1D[1:]])
            if not torch.equal(module(x_B1D)[0], module(outliers_B1D)[0]):
                raise ConfigError(
                    f"{refused} quantises the inputs of {name} by a scale of the whole batch, so that an answer would "
                    "depend on those decoded beside it; use weights-only or per-token quantisation (bitsandbytes in 8 "
                    "bits: llm_int8_threshold 0)"
                )
