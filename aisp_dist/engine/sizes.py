"""What the files of a checkpoint say about its size in memory, its quantisation and its experts. No torch and no
network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from aisp_dist.config import ConfigError, Generator, ModelReward, Run
from aisp_dist.engine import gguf
from aisp_dist.engine.checkpoints import cached

_FLOATS = ("F64", "F32", "F16", "BF16")
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_WEIGHT_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}  # nf4: an fp32 scale for every 64 weights


def read_config(place: Path) -> dict[str, Any]:
    """config.json of a directory, where the values of a multimodal model's text part replace those of the whole; or
    what a GGUF file says by the same keys. Raises OSError, ValueError, EOFError."""
    if place.is_file():
        return gguf.read(place).config()
    config: dict[str, Any] = json.loads((place / "config.json").read_text(encoding="utf-8"))
    text: dict[str, Any] = config.get("text_config") or {}
    return config | text


def has_experts(config: dict[str, Any]) -> bool:
    """Whether the model is a mixture of experts, in which the rows of a batch that chose the same expert share a
    product, so that a row's bits depend on the others."""
    return any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"))


def dtype_of(config: dict[str, Any], dtype: str) -> str:
    """A configured dtype, with `auto` resolved as transformers does: the config's, else the stored one."""
    return str(config.get("dtype") or config.get("torch_dtype") or "the stored dtype") if dtype == "auto" else dtype


def tensors(directory: Path) -> Iterator[tuple[str, str, list[int], int]]:
    """Name, stored dtype, shape and bytes of every tensor that transformers would load, read from the headers alone.

    Raises ValueError for a file that is no safetensors file, OSError for a missing one.
    """
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        files = {whole}
    elif index.is_file():
        files = {directory / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    else:
        files = set(directory.glob("*.safetensors"))
    for file in sorted(files):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > min(file.stat().st_size, 100_000_000):  # the format's own limit
                raise ValueError(f"{str(file)!r} is not a safetensors file; download it again (git lfs pull?)")
            header = json.loads(stream.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                yield name, entry["dtype"], entry["shape"], stop - start


def weight_bytes(place: Path, dtype: str = "auto", quantization: str | None = None) -> int:
    """Bytes of a checkpoint's weights after loading. Exact for a plain checkpoint and a GGUF file; a close estimate for
    `quantization` while loading; for a quantised checkpoint the size of its files, or its dense size if transformers
    unpacks it (compressed-tensors). Raises as `tensors` does."""
    config = read_config(place)
    item = _ITEM_BYTES.get(dtype_of(config, dtype))
    if place.is_file():
        return sum(math.prod(shape) * _ITEM_BYTES[dtype_of(config, dtype)] for _, shape, *_ in gguf.read(place).tensors)
    quantised = config.get("quantization_config") or {}
    groups = quantised.get("config_groups") or {}  # of compressed-tensors
    bits = next((group["weights"]["num_bits"] for group in groups.values() if group.get("weights")), 8)
    total = 0  # quantising while loading leaves embeddings, the head and experts as they are
    for name, stored, shape, size in tensors(place):
        count = math.prod(shape)
        if groups and item and stored not in _FLOATS and name.endswith(("weight", "weight_packed")):
            total += (count * 32 // bits if name.endswith("packed") else count) * item
        elif quantised or stored not in _FLOATS or not item:
            total += size
        elif quantization and len(shape) == 2 and shape[0] != config.get("vocab_size") and ".experts." not in name:
            total += math.ceil(count * _WEIGHT_BYTES[quantization])
        else:
            total += count * item
    return total


def of_models(run: Run) -> dict[str, int]:
    """Bytes of each model's weights by role (generator, or a reward's name), as far as its files are on this machine.
    run: located."""
    models: dict[str, Generator | ModelReward] = {} if run.generator.endpoint else {"generator": run.generator}
    models |= {name: reward for name, reward in run.rewards.items() if isinstance(reward, ModelReward)}
    found = {}
    for role, model in models.items():
        if directory := cached(model.model, model.revision):
            with suppress(OSError, ValueError, KeyError):  # loading it will say what is wrong with its files
                found[role] = weight_bytes(directory, model.dtype, getattr(model, "quantization", None))
    return found


def token_bytes(config: dict[str, Any], dtype: str = "auto") -> int:
    """Bytes of the keys and values of one token in all layers. Raises KeyError for a config that does not name its
    dtype, heads or layers in the usual way."""
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    layers, kv_heads = config["num_hidden_layers"], config.get("num_key_value_heads") or heads
    return int(2 * layers * kv_heads * size * _ITEM_BYTES[dtype_of(config, dtype)])


def refuse_twice(settings: Generator, quantised: dict[str, Any] | None) -> None:
    """Raise ConfigError if a checkpoint with this quantization_config is to be quantised again, or to be adapted."""
    if quantised and settings.adapter:
        raise ConfigError(
            f"generator.adapter: {settings.adapter!r}, but {settings.model!r} is quantised "
            f"({quantised.get('quant_method')}), and merging would round the adapter; name the plain checkpoint"
        )
    if quantised and settings.quantization:
        raise ConfigError(
            f"generator.quantization: {settings.quantization!r}, but {settings.model!r} is quantised already "
            f"({quantised.get('quant_method')}); leave it at null, or name the plain checkpoint"
        )


def check(settings: Generator, place: str) -> None:
    """Raise ConfigError if a quantised checkpoint or a GGUF file is to be quantised, or a quantised checkpoint to be
    adapted, as far as its config can be read without the network. place: what `checkpoints.locate` answered."""
    if settings.quantization and Path(place).is_file():
        raise ConfigError(
            f"generator.quantization: {settings.quantization!r}, but {settings.model!r} is a GGUF file, whose weights "
            "are dequantised while they load; leave it at null, or name a checkpoint with safetensors"
        )
    directory = cached(place, settings.revision) if settings.quantization or settings.adapter else None
    if directory:
        refuse_twice(settings, read_config(directory).get("quantization_config"))
