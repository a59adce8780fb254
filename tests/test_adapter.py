"""A LoRA adapter beside the base model: merged, it is the model that peft runs; its content is part of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny
import tiny_gguf
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from aisp_dist import relabel
from aisp_dist.analysis.evaluate import evaluated
from aisp_dist.analysis.outputs import Output
from aisp_dist.bench import script
from aisp_dist.config import ConfigError, Generator
from aisp_dist.engine import checkpoints, intact, pretrained, sizes
from aisp_dist.vllm import lora
from jobs import cli, prepare, settings

IDS = torch.arange(10, 60)[None]
LAYERS = ["q_proj", "v_proj", "down_proj"]


def adapter(path: Path, seed: int = 1, base: Any = None, **config: Any) -> Path:
    """A random adapter of the tiny Llama."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lora = LoraConfig(**{"r": 4, "target_modules": LAYERS, "init_lora_weights": False} | config)
        get_peft_model(base or tiny.causal("llama", **tiny_gguf.SIZES), lora).save_pretrained(path)
    return path


def edit(path: Path, **config: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("base") / "base", **tiny_gguf.SIZES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(tmp_path_factory.mktemp("adapter") / "trained")


@pytest.fixture
def mine(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "mine")


def merged(model: Path, lora: Path | None, **more: Any) -> Any:
    given = Generator(model=str(model), adapter=lora and str(lora), **more)
    return pretrained.weights(given, torch.device("cpu")).eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def refusal(model: Path, lora: Path | str) -> str:
    with pytest.raises(ConfigError) as refused:
        merged(model, Path(lora))
    said = str(refused.value)
    assert said.startswith(f"generator.adapter: {str(lora)!r}") and "\n" not in said
    return said


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}])
def test_merged_it_is_the_model_that_peft_runs_beside_the_base(config, base, tmp_path):
    lora = adapter(tmp_path / "lora", **config)
    own = PeftModel.from_pretrained(merged(base, None), lora).eval()
    wanted, plain = logits(own), logits(merged(base, None))
    assert (wanted - plain).abs().max() > 0.1
    before = torch.get_rng_state()
    both = [merged(base, lora), merged(tiny_gguf.save(tmp_path / "m.gguf"), lora)]
    assert torch.equal(torch.get_rng_state(), before)
    for model in both:
        assert (logits(model) - wanted).abs().max() < 1e-5
        assert not [name for name, _ in model.named_modules() if "lora" in name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_that_adds_nothing_leaves_the_bits_of_the_base(dtype, base, tmp_path):
    zero = adapter(tmp_path / "zero", init_lora_weights=True)  # lora_B = 0
    assert torch.equal(logits(merged(base, zero, dtype=dtype)), logits(merged(base, None, dtype=dtype)))


def test_one_that_does_not_fit_is_refused(base, mine, tmp_path):
    wide = tiny.save("llama", tmp_path / "wide", hidden_size=64)
    said = refusal(wide, mine)
    assert f"does not fit generator.model {str(wide)!r}: name the model that it was trained on" in said
    assert "size mismatch" in said
    assert "Target modules" in refusal(tiny.save("gpt2", tmp_path / "gpt2"), mine)
    shallow = tiny.save("llama", tmp_path / "shallow", num_hidden_layers=1, **tiny_gguf.SIZES)
    assert "['model.layers.1.mlp.down_proj.lora_A.weight'," in (said := refusal(shallow, mine))
    assert "(6 in all) have no module there" in said
    edit(mine, target_modules=[*LAYERS, "o_proj"])
    assert "o_proj.lora_A.default.weight" in (said := refusal(base, mine)) and "are not in its file" in said


def test_one_that_has_no_merged_form_is_refused(base, mine, tmp_path):
    tied = tiny.causal("llama", **tiny_gguf.SIZES)
    tied.config.tie_word_embeddings, tied.lm_head.weight = True, tied.model.embed_tokens.weight
    tied.save_pretrained(tmp_path / "tied")
    tiny.tokenizer().save_pretrained(tmp_path / "tied")
    for layer in ("lm_head", "embed_tokens"):
        file = adapter(tmp_path / layer, target_modules=[layer]) / "adapter_model.safetensors"
        save_file({name: weight for name, weight in load_file(file).items() if ".lora_" in name}, file)
        assert "uses twice (tie_word_embeddings); untie" in refusal(tmp_path / "tied", tmp_path / layer)
    weights = load_file(mine / "adapter_model.safetensors")
    save_file({name: weight * torch.nan for name, weight in weights.items()}, mine / "adapter_model.safetensors")
    assert "cannot be merged" in refusal(base, mine)
    assert "(aLoRA does not support" in refusal(base, adapter(tmp_path / "a", alora_invocation_tokens=[5]))


def test_the_name_of_the_base_in_it_does_not_matter(base, mine):
    wanted = logits(merged(base, mine))
    edit(mine, base_model_name_or_path="owner/renamed")
    assert torch.equal(logits(merged(base, mine)), wanted)


def located(path: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        checkpoints.locate_adapter(Generator(model="demo", adapter=str(path)))
    return str(refused.value).removeprefix(f"generator.adapter: {str(path)!r} ")


def test_what_is_no_adapter_is_called_what_it_is(base, mine, tmp_path, monkeypatch):
    weights, config = (mine / name for name in reversed(intact.ADAPTER))
    assert located(tmp_path / "none").startswith("is not a directory; name a directory with a LoRA adapter")
    assert located(base).startswith("holds no adapter_config.json; name a directory with")
    assert located(tmp_path) == "holds no adapter_config.json; did you mean its mine/?"
    sound = config.read_text()
    for key, given in (("modules_to_save", ["lm_head"]), ("bias", "all"), ("trainable_token_indices", [3])):
        edit(mine, **{key: given})
        assert located(mine).startswith(f"changes more than LoRA does ({key}: {given}); merge it")
        config.write_text(sound)
    edit(mine, peft_type="IA3")
    assert located(mine).startswith("is an adapter of peft_type IA3, and only LORA is merged here; merge it")
    config.write_text("[]")
    assert located(mine) == "holds an adapter_config.json that is no JSON object; download it again"
    config.write_text(sound)
    whole = load_file(weights)
    save_file(whole | {"base_model.model.model.embed_tokens.weight": torch.zeros(270, 32)}, weights)
    assert "(it holds base_model.model.model.embed_tokens.weight); merge it" in located(mine)
    save_file(whole, weights)
    with monkeypatch.context() as without:
        without.setattr(intact, "find_spec", lambda name: None)
        assert located(mine) == "is an adapter, which needs the package peft; pip install 'aisp-dist[adapter]'"
    weights.write_bytes((data := weights.read_bytes())[:-9])
    assert f"cut off after {len(data) - 9:,} of {len(data):,} bytes; download it again" in located(mine)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 6000000\n")
    assert "holds a Git LFS pointer in place of adapter_model.safetensors; download it with" in located(mine)
    weights.unlink()
    assert located(mine).startswith("has no adapter_model.safetensors; name a directory with")
    (mine / "adapter_model.bin").write_bytes(b"")
    assert "pickled weights can run code and are refused" in located(mine)


@pytest.mark.parametrize("place", ["model", "setting"])
def test_a_quantised_model_takes_none(place, base, trained, tmp_path):
    if place == "setting":
        with pytest.raises(ValueError, match="adapter: .* is merged into plain weights, and quantization: int8"):
            Generator(model="demo", adapter=str(trained), quantization="int8")
        return
    path = shutil.copytree(base, tmp_path / "quantised")
    config = json.loads((path / "config.json").read_text())
    quantised = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    assert "is quantised (bitsandbytes), and merging would round the adapter" in refusal(path, trained)


@pytest.fixture
def project(tmp_path, trained, monkeypatch) -> Path:
    folder = finished.project(tmp_path / "project", count=2)
    shutil.rmtree(folder / "model")
    tiny.save("llama", folder / "model", **tiny_gguf.SIZES)
    shutil.copytree(trained, folder / "mine")
    monkeypatch.chdir(folder)
    return folder


def values(lora: str | None = "mine", **changes: Any) -> dict[str, Any]:
    return {
        "output": "out",
        "prompts": {"source": "prompts.jsonl"},
        "generator": {"model": "model", "adapter": lora, "max_new_tokens": 6, "batch_rows": 8},
        "rewards": {"main": {"kind": "function", "function": "rewards.py:vowels"}},
        "method": {"kind": "best_of_n", "num_samples": 2, "num_iterations": 1, "sampling": {"gaussian": 0.3}},
    } | changes


def prepared(lora: str | None = "mine", **changes: Any) -> prepare.Prepared:
    return prepare.prepare(settings.check(values(lora, **changes)), Path.cwd())


def test_its_content_is_part_of_the_run_and_its_place_is_not(project):
    here = prepared()
    assert here.located.generator.adapter == str(project / "mine")  # for processes in other directories
    shutil.copytree("mine", "copy")
    (project / "copy" / "optimizer.pt").write_bytes(b"of the training")
    for same in ("./mine", str(project / "mine"), "copy"):
        assert prepared(same).components == here.components, same
    assert here.components["digests"]["generator.adapter"] and "adapter" not in here.components["generator"]
    assert sizes.of_models(here.located) == sizes.of_models(prepared(None).located)
    adapter(project / "other", seed=2)
    assert len({prepared(lora).fingerprint for lora in ("mine", "other", None)}) == 3
    assert [prepared(lora).model for lora in ("mine", "copy", None)] == ["model + mine", "model + copy", "model"]
    prepare.manifest.write_run(here.output, here.record())
    with pytest.raises(ConfigError, match=r"another run, which differs in generator\.adapter;"):
        prepared("other")
    assert prepared("copy").model == "model + mine"


def test_rows_are_those_of_the_merged_model_and_can_be_checked_again(project):
    merged(project / "model", project / "mine").save_pretrained("whole")
    tiny.tokenizer().save_pretrained("whole")
    rows = list(relabel(values()))
    whole = list(relabel(values(None, generator=values()["generator"] | {"model": "whole", "adapter": None})))
    for row, other in zip(rows, whole, strict=True):
        assert {k: v for k, v in row.items() if k not in ("model", "run_id")} == {
            k: v for k, v in other.items() if k not in ("model", "run_id")
        }
    assert {row["model"] for row in rows} == {"model + mine"} and not any(row["reason"] for row in rows)
    assert [row["completion"] for row in rows] != [row["completion"] for row in relabel(values(None))]
    output = prepared()
    prepare.manifest.write_run(output.output, output.record())
    found = Output(output.output, output.record())
    assert evaluated.generator(found).adapter == str(project / "mine")
    shutil.rmtree("mine")
    adapter(project / "mine", seed=2)
    with pytest.raises(ConfigError, match=r"other files than are there now: generator\.adapter \(now"):
        evaluated.generator(found)


def test_a_value_network_belongs_to_one_adapter(project):
    (project / "v").mkdir()
    about = {"published": False, "model": "model", "digests": prepared().components["digests"]}
    (project / "v" / "value.json").write_text(json.dumps(about))
    method = {"kind": "re_control", "value": "v"}
    prepared(method=method)
    with pytest.raises(ConfigError, match="was trained for the base model 'model', whose weights are not those of"):
        prepared(None, method=method)


@pytest.mark.parametrize("verb", ["validate", "align"])
def test_commands_refuse_it_before_they_write(verb, project, capsys):
    for broken, said in (("mine/adapter_model.safetensors", "has no adapter_model"), ("mine", "is not a directory")):
        (project / broken).unlink() if (project / broken).is_file() else shutil.rmtree(project / broken)
        Path("run.json").write_text(json.dumps(values()))
        with pytest.raises(SystemExit) as left:
            cli.run(verb, ["run.json"])
        told = capsys.readouterr().err
        assert left.value.code == 2 and f"generator.adapter: 'mine' {said}" in told and "Traceback" not in told
    assert not (project / "out").exists()


def test_a_vllm_beside_it_is_measured_with_it(project):
    located = prepared().located.generator
    assert script._directory(located, str(project / "written")) == str(project / "written")
    assert torch.equal(logits(merged(project / "written", None)), logits(merged(project / "model", project / "mine")))


def served(path: Path) -> str | None:
    return checkpoints.locate_adapter(Generator(model="demo", adapter=str(path), engine="vllm"))


def test_what_vllm_does_not_compute_beside_a_model_is_refused_before_it_starts(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(intact, "find_spec", lambda name: None)  # peft, which merges, is not needed there
    assert served(mine) == str(mine)
    edit(mine, use_dora=True)
    with pytest.raises(ConfigError, match=r"is DoRA .*vLLM does not compute .*; set generator.engine to local"):
        served(mine)
    head = adapter(tmp_path / "head", target_modules=["q_proj", "lm_head"])
    file = head / "adapter_model.safetensors"  # where peft writes the base's own head too
    save_file({name: weight for name, weight in load_file(file).items() if ".lora_" in name}, file)
    with pytest.raises(ConfigError, match="changes the head or the embedding, which vLLM does not compute"):
        served(head)


def test_what_vllm_would_leave_out_of_an_adapter_is_named(base, trained, tmp_path):
    assert lora.misfit(str(trained), base) is None
    shallow = tiny.save("llama", tmp_path / "shallow", num_hidden_layers=1, **tiny_gguf.SIZES)
    assert lora.misfit(str(trained), shallow) == "model.layers.1.mlp.down_proj"
    wide = tiny.save("llama", tmp_path / "wide", hidden_size=64)
    assert lora.misfit(str(trained), wide) == "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(("rank", "others", "room"), [(4, {}, 8), (1, {}, 1), (4, {"q_proj": 9}, 16)])
def test_vllm_has_room_for_the_largest_rank(rank, others, room, tmp_path):
    place = adapter(tmp_path / "lora", r=rank, rank_pattern=others)
    modules = sorted(LAYERS)  # not the head, whose logits vLLM would else compute for its own batch only
    wanted = {"enable_lora": True, "max_loras": 1, "max_lora_rank": room, "lora_target_modules": modules}
    assert lora.arguments(str(place)) == wanted
