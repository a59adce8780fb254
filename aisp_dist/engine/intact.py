"""Whether a directory holds a whole transformers checkpoint, from its small files and the headers of the others. Names
what else it holds: an adapter, GGUF, pickles, files that were never or only half downloaded. No torch."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHECKPOINT = "name a directory with a transformers checkpoint (config.json, *.safetensors), or a checkpoint on the hub"

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # what is read of an adapter
NO_ADAPTER = "name a directory with a LoRA adapter as peft saves it (adapter_config.json, adapter_model.safetensors)"
_WHOLE = ("modules_to_save", "bias", "trainable_token_indices", "layer_replication")  # changes of whole weights
_ENDS = ("lm_head", "embed_out", "embed_tokens", "embed_in", "wte")
_TOKENIZER = ("token", "vocab", "spiece", "sentencepiece", "merges", "tekken")  # in names of a tokenizer's files


def fault(path: Path, adaptable: bool = False) -> str | None:
    """Why a directory cannot be loaded, and what to do, or None. Reads small files and the headers of large ones.
    adaptable: whether an adapter can be named beside the model."""
    files = {file.name: file for file in path.iterdir() if file.is_file()}
    if pointer := _pointer(files):
        return pointer
    weights = [
        file for name, file in files.items() if name.endswith(".safetensors") and not name.startswith("adapter_")
    ]
    if "adapter_config.json" in files:
        about = _json(files["adapter_config.json"]) or {}
        adapter = f"a PEFT adapter ({about.get('peft_type')}) of {about.get('base_model_name_or_path')!r}"
        if weights:
            return (
                f"holds a whole model and beside it {adapter}; move adapter_config.json and adapter_model.safetensors "
                "away to load the model without the adapter, or merge them (merge_and_unload)"
            )
        beside = "name it as generator.adapter and that model as generator.model, or " if adaptable else ""
        return (
            f"is {adapter}, not a model; {beside}merge it (peft: AutoPeftModelForCausalLM.from_pretrained(...)."
            "merge_and_unload().save_pretrained(DIR), and the tokenizer's save_pretrained) and name that directory"
        )
    if any(name.endswith(".gguf") for name in files) and not weights:
        return f"holds GGUF weights; name the file, {next(n for n in sorted(files) if n.endswith('.gguf'))} in it"
    if "config.json" not in files:
        below = sorted(config.parent.name for config in path.glob("*/config.json"))
        return f"holds no config.json; {f'did you mean its {below[-1]}/?' if below else CHECKPOINT}"
    if _json(files["config.json"]) is None:
        return "holds a config.json that is no JSON object; download it again"
    if not weights:
        if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in files):
            return "has no *.safetensors; pickled weights can run code and are refused: convert it with save_pretrained"
        return f"has no weights (*.safetensors); download it again, or {CHECKPOINT}"
    if not any(word in name for name in files for word in _TOKENIZER):
        return "holds no tokenizer; save there the one that the model was trained with (tokenizer.save_pretrained(DIR))"
    if "model.safetensors" not in files and (index := files.get("model.safetensors.index.json")):
        parts = set(((_json(index) or {}).get("weight_map") or {}).values())
        if missing := sorted(parts - files.keys()):
            return f"lacks {len(missing)} of {len(parts)} files of weights, {missing[0]} first; download it again"
    return next((torn for file in sorted(weights) if (torn := _torn(file))), None)


def adapter_fault(path: Path, merges: bool = True) -> str | None:
    """Why a directory is no LoRA adapter that can be used, and what to do, or None. merges: by the local engine; else
    vLLM computes it beside the model."""
    merged = "merge it (peft: merge_and_unload) and name the merged directory as generator.model"
    files = {file.name: file for file in path.iterdir() if file.is_file()}
    if pointer := _pointer({name: file for name, file in files.items() if name in ADAPTER}):
        return pointer
    if "adapter_config.json" not in files:
        below = sorted(config.parent.name for config in path.glob("*/adapter_config.json"))
        return f"holds no adapter_config.json; {f'did you mean its {below[-1]}/?' if below else NO_ADAPTER}"
    if (about := _json(files["adapter_config.json"])) is None:
        return "holds an adapter_config.json that is no JSON object; download it again"
    if (kind := about.get("peft_type")) != "LORA":
        return f"is an adapter of peft_type {kind}, and only LORA is merged here; {merged}"
    if ADAPTER[1] not in files:
        if any(name.startswith("adapter_model.") for name in files):
            return (
                "has no adapter_model.safetensors; pickled weights can run code and are refused: convert it with "
                "peft's save_pretrained"
            )
        return f"has no adapter_model.safetensors; {NO_ADAPTER}"
    if torn := _torn(files[ADAPTER[1]]):
        return torn
    whole = [name for name in _names(files[ADAPTER[1]]) if ".lora_" not in name]
    told = [f"{key}: {about[key]}" for key in _WHOLE if about.get(key) not in (None, [], {}, False, "none")]
    if whole or told:
        return f"changes more than LoRA does ({', '.join(told) or f'it holds {min(whole)}'}); {merged}"
    if not merges:
        heads = [name for name in _names(files[ADAPTER[1]]) if any(part in name for part in _ENDS)]
        special = {"is DoRA (use_dora)": about.get("use_dora"), "changes the head or the embedding": heads}
        if told := [what for what, there in special.items() if there]:
            return f"{told[0]}, which vLLM does not compute beside a model; set generator.engine to local, or {merged}"
    elif find_spec("peft") is None:
        return "is an adapter, which needs the package peft; pip install 'aisp-dist[adapter]'"
    return None


def _pointer(files: dict[str, Path]) -> str | None:
    for file in files.values():
        if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            return f"holds a Git LFS pointer in place of {file.name}; download it with `git lfs pull`"
    return None


def _names(file: Path) -> list[str]:
    """The tensors of a whole safetensors file."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return [name for name in header if name != "__metadata__"]


def _torn(file: Path) -> str | None:
    """Why a safetensors file cannot be read: its header gives its length
    (https://huggingface.co/docs/safetensors/en/index)."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= 100_000_000:  # the format's own limit
            return f"holds {file.name}, which is no safetensors file; download it again"
        if size < 8 + length:
            return f"holds {file.name}, cut off after {size:,} bytes; download it again"
        try:
            header = json.loads(stream.read(length))
            end = 8 + length + max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
        except (ValueError, AttributeError, KeyError, TypeError):
            return f"holds {file.name}, whose header is damaged; download it again"
    return None if size >= end else f"holds {file.name}, cut off after {size:,} of {end:,} bytes; download it again"


def _json(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
