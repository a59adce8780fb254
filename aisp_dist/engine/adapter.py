"""A LoRA adapter, as peft saves it, merged into a base model. Its files are checked in intact.py, without torch."""

from __future__ import annotations

from typing import Any

import torch

from aisp_dist.config import ConfigError, Generator
from aisp_dist.engine.checkpoints import locate_adapter


def merge(settings: Generator, model: Any) -> Any:
    """The model with the adapter's update added to its weights, computed in fp32 where the model is. Raises ConfigError
    for an adapter whose weights are not all used, or that has no merged form in this model."""
    from peft import LoraConfig, PeftModelForCausalLM
    from peft.tuners.tuners_utils import BaseTunerLayer

    place = locate_adapter(settings.model_copy(update={"engine": "local"}))  # which merges, so peft is needed
    base = f"generator.adapter: {settings.adapter!r} does not fit generator.model {settings.model!r}"
    fix = "name the model that it was trained on, or another adapter"
    inputs, outputs = (part and part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    mapping = getattr(model, "_checkpoint_conversion_mapping", {})  # as PeftModel.from_pretrained, which hides `found`
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # peft draws first weights, and for some adapters changes the base by them
            adapted = PeftModelForCausalLM(model, LoraConfig.from_pretrained(place))
        found = adapted.load_adapter(place, "default", torch_device=str(model.device), key_mapping=mapping)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        told = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ConfigError(f"{base}: {fix} ({' '.join(told)[:300]})") from error
    for keys, what in ((found.unexpected_keys, "have no module there"), (found.missing_keys, "are not in its file")):
        if keys:
            names = sorted(key.removeprefix("base_model.model.") for key in keys)
            raise ConfigError(f"{base}: its weights {names[:2]} ({len(names)} in all) {what}; {fix}")
    layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    if inputs is outputs and any(layer.get_base_layer().weight is inputs for layer in layers):
        raise ConfigError(
            f"generator.adapter: {settings.adapter!r} changes one use of the embedding, which {settings.model!r} uses "
            "twice (tie_word_embeddings); untie and merge it, and name the merged directory as generator.model"
        )
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"generator.adapter: {settings.adapter!r} cannot be merged into {settings.model!r}; give an adapter of "
            f"finite weights that peft merges (merge_and_unload) ({error})"
        ) from error
