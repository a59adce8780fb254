"""Loading a model: what works, and what is refused before it decodes wrongly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from aisp_dist import demo, rewards
from aisp_dist.config import ConfigError, Generator, ModelReward
from aisp_dist.engine import kv, model, pretrained
from aisp_dist.engine.decode import Engine
from aisp_dist.records import BASE_ITERATION, Round, Sampling


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


def test_a_checkpoint_is_loaded_in_its_parts(llama: Path) -> None:
    lm = model.load(Generator(model=str(llama)))
    assert (lm.hidden_size, lm.vocab_size, lm.num_layers, lm.context_length) == (32, 260, 2, 256)
    assert (lm.eos_ids, lm.device.type, lm.dtype) == ({tiny.EOS_ID}, "cpu", torch.float32)
    round = Round(0, "p", (20, 21), BASE_ITERATION, 0, 1, Sampling())
    expected = Engine(model.adapt(tiny.causal("llama"), tiny.tokenizer()), 4, 8).run([round])
    assert Engine(lm, 4, 8).run([round]) == expected


def test_dtype_and_template_can_be_chosen(llama: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}!", encoding="utf-8")
    settings = Generator(model=str(llama), dtype="bfloat16", chat_template=str(template))
    assert model.load(settings).dtype == torch.bfloat16
    message = [{"role": "user", "content": "Hi"}]
    assert pretrained.tokenizer(settings).apply_chat_template(message, tokenize=False) == "Hi!"
    with pytest.raises(ConfigError, match=r"generator.chat_template: .*nowhere"):
        pretrained.tokenizer(Generator(model=str(llama), chat_template="nowhere.jinja"))


@pytest.mark.parametrize("family", ["falcon", "bloom"])
def test_a_family_that_bypasses_the_attention_interface_is_refused(family: str, tmp_path: Path) -> None:
    path = tiny.save(family, tmp_path)
    with pytest.raises(ConfigError, match=rf"generator.model: .*{path.name}.*0 of its 2 layers attend"):
        model.load(Generator(model=str(path)))


def test_a_wrong_attention_is_caught_by_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states show it even where every argmax agrees."""
    merge = kv.merge
    monkeypatch.setattr(kv, "merge", lambda first, second: merge((first[0] * 0.9, first[1]), second))
    with pytest.raises(model.Unsupported, match="hidden states differ"):
        model.adapt(tiny.causal("llama"), tiny.tokenizer())


def test_a_window_that_layers_do_not_report_is_refused() -> None:
    """The check at load uses fewer tokens than the window, so its numbers cannot show it."""
    made = tiny.causal("gemma3", sliding_window=100)
    made.model.layers[2].self_attn.sliding_window = None
    with pytest.raises(model.Unsupported, match="layer 2"):
        model.adapt(made, tiny.tokenizer())


def test_an_adapted_model_refuses_to_run_without_masks(llama: Path) -> None:
    made = tiny.causal("llama")
    model.adapt(made, tiny.tokenizer())
    with pytest.raises(RuntimeError, match="load another copy"):
        made(torch.tensor([[5, 6, 7]]))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    path = tiny.save("llama", tmp_path)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"generator.model: .*safetensors"):
        model.load(Generator(model=str(path)))


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    path = tiny.save("llama", tmp_path)
    weights = load_file(path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"generator.model: .*lm_head.weight"):
        model.load(Generator(model=str(path)))


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = tiny.save("llama", tmp_path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8")) | {"intermediate_size": 40}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"generator.model: .*mlp.down_proj.weight.* in the shape of its config"):
        model.load(Generator(model=str(path)))


def test_a_path_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    for name in (str(tmp_path), str(tmp_path / "missing"), "./missing"):
        with pytest.raises(ConfigError, match=r"generator.model: .*checkpoint"):
            model.load(Generator(model=name))


def test_remote_code_is_refused_unless_trusted(tmp_path: Path) -> None:
    path = tiny.save("llama", tmp_path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "own.py").write_text("raise SystemExit('remote code ran')", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"generator.model: .*trust_remote_code: true"):
        model.load(Generator(model=str(path)))


def test_rotary_angles_that_depend_on_other_rows() -> None:
    """`dynamic` scales by the longest row of a batch; `longrope` does so beyond its original length."""
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(model.Unsupported, match="scaled by the longest row"):
        model.adapt(tiny.causal("llama", rope_parameters=dynamic), tiny.tokenizer())
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    long = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    lm = model.adapt(
        tiny.causal("phi3", head_dim=8, original_max_position_embeddings=64, rope_parameters=long), tiny.tokenizer()
    )
    assert lm.context_length == 64


def test_a_damaged_checkpoint_is_refused(tmp_path):
    shutil.copytree(demo.path("base"), tmp_path / "model")
    file = next((tmp_path / "model").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"generator\.model: .* cut off after 1,000 bytes; download it again"):
        model.load(Generator(model=str(tmp_path / "model")))
    shutil.copytree(demo.path("reward"), tmp_path / "reward")
    file = next((tmp_path / "reward").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"rewards\.main\.model: .* cut off after 1,000 bytes; download it again"):
        rewards.load("main", ModelReward(model=str(tmp_path / "reward")), tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_with_both_numbers(tmp_path: Path) -> None:
    """A base model or a reward model. Only the prompts that use such a token would fail."""
    for kind in ("base", "reward"):
        shutil.copytree(demo.path(kind), tmp_path / kind)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind)
        rows = json.loads((tmp_path / kind / "config.json").read_text())["vocab_size"]
        tokenizer.add_tokens([f"<extra {i}>" for i in range(rows - len(tokenizer) + 1)])
        tokenizer.save_pretrained(tmp_path / kind)
        said = f"model: .*its tokenizer has {rows + 1} tokens and its embedding {rows} rows"
        with pytest.raises(ConfigError, match=said):
            if kind == "base":
                model.load(Generator(model=str(tmp_path / kind)))
            else:
                rewards.load("main", ModelReward(model=str(tmp_path / kind)))
