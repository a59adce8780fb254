"""A GGUF file as the generator's model: the same model and tokenizer as the checkpoint it was made of, by its path or
as a file of a package that is never imported; and what cannot be read as a whole is refused, with what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_gguf
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from aisp_dist.config import ConfigError, Generator
from aisp_dist.engine import checkpoints, gguf, model, pretrained, sizes
from aisp_dist.engine.decode import Engine
from aisp_dist.records import Round, Sampling
from jobs import prepare, settings

ROUNDS = [Round(0, "p", (20, 21, 22), 0, 0, 4, Sampling())]
CHAT = [{"role": "user", "content": "Hi é <s> 12"}]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tiny_gguf.save(tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf")


def generator(path: Path | str, **more) -> Generator:
    return Generator(model=str(path), **more)


def refusal(path: Path | str, **more) -> str:
    with pytest.raises(ConfigError) as refused:
        sizes.check(generator(path, **more), checkpoints.locate("generator.model", str(path), "generator"))
    return str(refused.value)


def test_it_answers_as_the_checkpoint_that_it_was_made_of(file, tmp_path):
    plain = model.load(generator(tiny.save("llama", tmp_path, **tiny_gguf.SIZES)))
    lm = model.load(generator(file))
    assert Engine(lm, 4, 12).run(ROUNDS) == Engine(plain, 4, 12).run(ROUNDS)
    assert (lm.eos_ids, lm.context_length, lm.dtype) == (plain.eos_ids, plain.context_length, plain.dtype)
    for chat in (lambda t: t.apply_chat_template(CHAT, add_generation_prompt=True), lambda t: t.encode("Hi é <s>")):
        assert chat(lm.tokenizer) == chat(plain.tokenizer)
    assert lm.tokenizer.get_vocab() == plain.tokenizer.get_vocab()


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_1", "Q8_0"])
def test_it_is_parsed_once_and_is_what_transformers_loads(kind, tmp_path, monkeypatch):
    path = tiny_gguf.save(tmp_path / "m.gguf", kind)
    parsed, parse = [], GGUFReader.__init__
    monkeypatch.setattr(GGUFReader, "__init__", lambda self, *args: parsed.append(args) or parse(self, *args))
    lm = model.load(generator(path))
    assert len(parsed) == 1
    theirs = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "m.gguf"}
    plain = AutoModelForCausalLM.from_pretrained(**theirs, dtype=lm.dtype).get_decoder().state_dict()
    own = pretrained.weights(generator(path), torch.device("cpu")).get_decoder().state_dict()  # not packed yet
    assert own.keys() == plain.keys() and all(torch.equal(own[name], plain[name]) for name in plain)
    known = AutoTokenizer.from_pretrained(**theirs).get_vocab()  # with one that transformers adds and the model lacks
    assert lm.tokenizer.get_vocab() == {token: at for token, at in known.items() if at < lm.vocab_size}
    assert len(parsed) > 1, "transformers itself parses as ever afterwards"


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")]
)
def test_placement_counts_the_bytes_that_are_loaded(kind, dtype, tmp_path):
    path = tiny_gguf.save(tmp_path / "m.gguf", kind)
    assert 0 <= path.stat().st_size - gguf.read(path).size() < 32, "but for the padding"
    for asked, loaded in (("auto", dtype), ("float32", "float32")):
        own = pretrained.weights(generator(path, dtype=asked), torch.device("cpu"))
        assert {p.dtype for p in own.parameters()} == {getattr(torch, loaded)}
        assert sizes.weight_bytes(path, asked) == sum(p.nbytes for p in own.parameters())


def test_quantised_weights_stay_near_the_plain_ones(file, tmp_path):
    plain, near = (
        pretrained.weights(generator(path, dtype="float32"), torch.device("cpu")).state_dict()
        for path in (file, tiny_gguf.save(tmp_path / "m.gguf", "Q4_1"))
    )
    for name, weight in plain.items():
        assert (weight - near[name]).abs().max() <= weight.abs().max() / 8, name


def test_by_path_and_by_package_it_is_the_same_run(file, tmp_path, monkeypatch):
    package = tmp_path / "some_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('never imported')")
    (package / "m.gguf").write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def zero(completions, **columns):\n    return [0.0] * len(completions)\n")
    (tmp_path / "m.gguf").write_bytes(b"GGUF, but not the one that is named")

    def prepared(name: str) -> prepare.Prepared:
        reward = {"kind": "function", "function": "mine.py:zero"}
        values = {"output": "out", "generator": {"model": name}, "rewards": {"main": reward}}
        method = {"kind": "best_of_n", "num_samples": 2, "num_iterations": 1}
        return prepare.prepare(settings.check(values | {"method": method}), tmp_path)

    inside, outside = prepared("some_model:m.gguf"), prepared(str(file))
    assert inside.components == outside.components
    assert (inside.model, outside.model) == ("m.gguf", "tiny-f32.gguf")
    assert inside.located.generator.model == str(package / "m.gguf")
    assert sizes.of_models(inside.located)["generator"] == sizes.weight_bytes(file)
    assert inside.record()["config"]["generator"]["model"] == "some_model:m.gguf"
    pretrained.weights(inside.located.generator, torch.device("cpu"))  # not the file of that name in this directory
    assert pretrained.tokenizer(inside.located.generator).encode("a") == tiny.tokenizer().encode("a")
    assert "has no such file; it has m.gguf" in refusal("some_model:n.gguf")
    assert "names a file of the package 'no_model', which is not installed here" in refusal("no_model:m.gguf")
    with pytest.raises(ConfigError, match="a GGUF file, which rewards are not read from"):
        checkpoints.locate("rewards.main.model", str(file), "reward")


def test_what_is_no_whole_model_is_called_what_it_is(file, tmp_path, monkeypatch):
    path, data = tmp_path / "m.gguf", file.read_bytes()
    for wrong, said in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
        (b"x" * 99, "is no GGUF file of version 2 or 3"),
        (data[:99], "cut off after 99 bytes, within its header"),
        (data[:-9], f"cut off after {len(data) - 9:,} of {len(data):,} bytes; download it again"),
    ):
        path.write_bytes(wrong)
        assert said in refusal(path)
    for values, said in (
        ({"split.count": 3}, "is one of 3 parts of a GGUF file; merge them"),
        ({"general.type": "adapter"}, "is a GGUF file of type adapter, not a language model"),
        ({"tokenizer.ggml.tokens": None}, "is a GGUF file without a tokenizer"),
    ):
        assert said in refusal(tiny_gguf.save(path, **values))
    assert "generator.quantization: 'int8', but" in refusal(file, quantization="int8")
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    assert "is a GGUF file, which needs the package gguf; pip install 'aisp-dist[gguf]'" in refusal(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"more": {"rope_freqs.weight": np.ones(8, np.float32)}}, "of which transformers reads 41,376 of them"),
        (
            {"llama.rope.scaling.type": "yarn"},
            "has a rotary embedding scaled by 'yarn', of which transformers",
        ),
        ({"general.architecture": "unheard"}, "architecture unheard is not supported"),
    ],
)
def test_what_transformers_would_leave_out_is_refused(change, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        pretrained.weights(generator(tiny_gguf.save(tmp_path / "m.gguf", **change)), torch.device("cpu"))
