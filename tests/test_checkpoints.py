"""What users name as a model and is none: each is called what it is, with what to do, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from aisp_dist.config import ConfigError
from aisp_dist.engine import checkpoints

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 6000000\n"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model") / "whole")


@pytest.fixture
def path(tmp_path, whole) -> Path:
    return shutil.copytree(whole, tmp_path / "m")


def sharded(path: Path) -> None:
    """The weights in two files and an index."""
    weights = load_file(path / "model.safetensors")
    names = {f"model-0000{i}-of-00002.safetensors": sorted(weights)[i - 1 :: 2] for i in (1, 2)}
    for file, some in names.items():
        save_file({name: weights[name] for name in some}, path / file)
    index = {"weight_map": {name: file for file, some in names.items() for name in some}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").unlink()


def adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"layer.lora_A.weight": torch.zeros(4, 8)}, path / "adapter_model.safetensors")


def refusal(path: Path | str, role: checkpoints.Role = "generator") -> str:
    with pytest.raises(ConfigError) as refused:
        checkpoints.locate("the.key", str(path), role)
    said = str(refused.value)
    assert said.startswith(f"the.key: {str(path)!r} ") and "\n" not in said
    return said


def test_whole_checkpoints_pass(path):
    assert checkpoints.locate("k", str(path), "generator") == str(path)
    (path / "notes.txt").write_text("mine")
    sharded(path)
    assert checkpoints.locate("k", str(path), "reward") == str(path)


@pytest.mark.parametrize("role", ["generator", "reward"])
@pytest.mark.parametrize("config", [False, True])
def test_an_adapter_is_no_model(path, role, config):
    adapter(path)
    (path / "model.safetensors").unlink()
    if not config:
        (path / "config.json").unlink()
    said = refusal(path, role)
    assert "is a PEFT adapter (LORA) of 'owner/base', not a model; " in said and "merge_and_unload" in said
    assert ("; name it as generator.adapter and that model as generator.model" in said) is (role == "generator")


def test_an_adapter_beside_a_model_is_ambiguous(path):
    adapter(path)
    assert "holds a whole model and beside it a PEFT adapter (LORA) of 'owner/base'; move" in refusal(path)


@pytest.mark.parametrize("config", [False, True])
def test_gguf_is_called_gguf(path, config):
    (path / "model.safetensors").rename(path / "model-q4.gguf")
    if not config:
        (path / "config.json").unlink()
    assert "holds GGUF weights; name the file, model-q4.gguf in it" in refusal(path)
    assert "is no GGUF file of version 2 or 3 that can be read" in refusal(path / "model-q4.gguf")
    assert "is a GGUF file, which rewards are not read from; name a" in refusal(path / "model-q4.gguf", "reward")
    assert "is a file; name a directory" in refusal(path / "tokenizer.json")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_called_that(path, name):
    (path / name).write_text(POINTER)
    assert f"holds a Git LFS pointer in place of {name}; download it with `git lfs pull`" in refusal(path)


@pytest.mark.parametrize("left", [0.5, 0.99])
def test_a_download_that_broke_off_is_called_that(path, left):
    file = path / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: int(size * left)])
    assert (
        f"holds model.safetensors, cut off after {int(size * left):,} of {size:,} bytes; download it again"
        in refusal(path)
    )
    for data, words in (
        (b"", "no safetensors file"),
        (b"x" * 99, "no safetensors file"),
        (b"\x09" + b"\0" * 9, "cut off after 10 bytes"),
    ):
        file.write_bytes(data)
        assert words in refusal(path)
    file.write_bytes((20).to_bytes(8, "little") + b"{" * 20)
    assert "whose header is damaged; download it again" in refusal(path)


def test_a_missing_file_of_several_is_named(path):
    sharded(path)
    (path / "model-00002-of-00002.safetensors").unlink()
    assert "lacks 1 of 2 files of weights, model-00002-of-00002.safetensors first; download it again" in refusal(path)


def test_a_model_without_its_tokenizer_is_called_that(path):
    for file in (*path.glob("*token*"), *path.glob("special*")):
        file.unlink()
    assert "holds no tokenizer; save there" in refusal(path)


def test_directories_without_a_checkpoint(path, tmp_path):
    (path / "config.json").write_text("[]")
    assert "config.json that is no JSON object" in refusal(path)
    (path / "model.safetensors").unlink()
    (path / "config.json").write_text("{}")
    assert "has no weights (*.safetensors)" in refusal(path)
    (path / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights can run code and are refused" in refusal(path)
    assert "holds no config.json; did you mean its m/?" in refusal(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no config.json; name a directory" in refusal(tmp_path / "empty")
