"""Which engine decodes an output: decided once, from what is configured, recorded and there."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import pytest

from aisp_dist import vllm
from aisp_dist.config import ConfigError, Run, load
from aisp_dist.output import manifest
from aisp_dist.vllm import choice
from aisp_dist.vllm.choice import Choice, Found, choose
from jobs import engines

GPUS, CPUS = Found(8, "0.32.0"), Found(0, "0.32.0")
REWARD = {"words": {"kind": "function", "function": "r.py:words"}}


def run(method: dict[str, Any] | None = None, **generator: Any) -> Run:
    method = method or {"kind": "best_of_n"}
    values = {"output": "out", "generator": {"model": "demo"} | generator, "rewards": REWARD, "method": method}
    return load.check(values)


def never() -> Found:
    raise AssertionError("nobody needs to look")


@pytest.mark.parametrize(
    ("found", "engine", "why"),
    [
        (GPUS, "vllm", "8 GPUs, vLLM 0.32.0"),
        (CPUS, "local", "no GPUs"),
        (Found(1, None), "local", "1 GPU, vLLM is not installed there"),
        (Found(1, "0.31.2"), "local", "1 GPU, vLLM 0.31.2"),
        (Found(1, "0.34.0"), "local", "1 GPU, vLLM 0.34.0"),
        (Found(1, "0.33.1rc1"), "vllm", "1 GPU, vLLM 0.33.1rc1"),
    ],
)
def test_auto_is_vllm_where_gpus_and_a_known_vllm_are(found: Found, engine: str, why: str) -> None:
    chosen = choose(run(), None, lambda: found)
    assert (chosen.engine, chosen.why) == (engine, why)
    assert (chosen.version is not None) == (engine == "vllm") == (chosen.component is not None)


def test_a_cluster_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command with many outputs (compare, tune) resolves the engine of each; an error is not kept."""
    asked: list[str] = []

    def ask(run: Run) -> Found:
        asked.append(os.environ["RAY_ADDRESS"])
        if len(asked) == 1:
            raise ConfigError("machines have different versions of vLLM")
        return GPUS

    monkeypatch.setattr(engines, "_found", {})
    monkeypatch.setattr(engines, "_ask", ask)
    monkeypatch.setenv("RAY_ADDRESS", "one:6379")
    with pytest.raises(ConfigError):
        engines.look(run())
    assert engines.look(run()) == engines.look(run()) == GPUS
    monkeypatch.setenv("RAY_ADDRESS", "other:6379")
    assert engines.look(run()) == GPUS
    assert asked == ["one:6379", "one:6379", "other:6379"]


def test_an_output_keeps_its_engine() -> None:
    assert choose(run(), "local", never).engine == "local"
    assert choose(run(), "vllm", lambda: CPUS).engine == "vllm"
    assert choose(run(engine="vllm"), "local", lambda: CPUS).engine == "vllm"  # which the fingerprint then refuses


_OURS = [
    {"batch_rows": 8},
    {"quantization": "nf4"},
    {"fp32_head": True},
    {"model": "m.gguf"},
    {"model": "package:m.gguf"},
]


@pytest.mark.parametrize("setting", _OURS)
def test_a_setting_of_the_local_engine_chooses_it(setting: dict[str, Any]) -> None:
    chosen = choose(run(**setting), None, never)
    assert chosen.engine == "local" and next(iter(setting)) in chosen.why
    with pytest.raises(ConfigError, match="no effect with engine vllm"):
        choose(run(**setting), "vllm", never)
    with pytest.raises(ConfigError, match=rf"generator: {next(iter(setting))}: .* has no effect with engine: vllm"):
        run(engine="vllm", **setting)


@pytest.mark.parametrize("setting", [{"tensor_parallel": 2}, {"quantization": "fp8"}, {"vllm": {"max_num_seqs": 8}}])
def test_a_setting_of_vllm_chooses_it(setting: dict[str, Any]) -> None:
    assert choose(run(**setting), None, lambda: CPUS).engine == "vllm"
    with pytest.raises(ConfigError, match="no effect with the local engine"):
        choose(run(**setting), "local", never)


def test_an_adapter_is_for_both() -> None:
    assert choose(run(adapter="a"), None, lambda: GPUS).engine == "vllm"
    assert choose(run(adapter="a"), None, lambda: CPUS).engine == run(adapter="a", engine="local").generator.engine
    for name in ("enable_lora", "max_lora_rank"):
        with pytest.raises(ConfigError, match=f"vllm.{name}: generator.adapter says it; leave it out"):
            run(engine="vllm", vllm={name: 1})


@pytest.mark.parametrize("name", ["max_num_seqs", "max_model_len"])
@pytest.mark.parametrize("value", ["many", 0, 1.5, True])
def test_sizes_that_we_read_too_are_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"vllm.{name}: {value!r}; give a whole number of at least 1"):
        run(engine="vllm", vllm={name: value})


@pytest.mark.parametrize("kind", ["args", "re_control"])
def test_a_method_that_changes_every_step_is_local(kind: str) -> None:
    guided = run({"kind": kind} | ({"value": "v"} if kind == "re_control" else {}))
    assert choose(guided, None, never).engine == "local"
    forced = guided.model_copy(update={"generator": guided.generator.model_copy(update={"engine": "vllm"})})
    with pytest.raises(ConfigError, match=f"{kind} changes every step inside the local engine"):
        choose(forced, None, never)


@pytest.mark.parametrize(("version", "message"), [(None, "not installed where"), ("0.40.0", "0.40.0 is there")])
def test_vllm_that_is_missing_or_unknown_is_refused(version: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(run(engine="vllm"), None, lambda: Found(1, version))


def test_what_is_promised_is_said() -> None:
    assert "bit for bit" in Choice("local", "no GPUs").line()
    line = Choice("vllm", "1 GPU", "0.32.0").line()
    assert line.startswith("engine: vllm 0.32.0 (1 GPU)") and "computed again may differ" in line


def test_the_range_of_versions_is_that_of_the_extra() -> None:
    import tomllib
    from pathlib import Path

    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    low, below = (".".join(map(str, version)) for version in (choice.LOWEST, choice.BELOW))
    assert extras["vllm"] == [f"vllm>={low},<{below}"]


def test_hidden_gpus_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "glob", lambda pattern: ["/dev/nvidia0", "/dev/nvidia1"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert choice.here() == Found(2, vllm.installed())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choice.here().gpus == 0


def test_rows_depend_on_the_engine_and_on_what_changes_its_bits() -> None:
    def settings(**generator: Any) -> str:
        return json.dumps(run(**generator).row_settings(), sort_keys=True)

    assert settings() == settings(engine="local") != settings(engine="vllm")
    assert "vllm" not in settings() and "pipeline_parallel" not in settings()
    ours = settings(engine="vllm")
    assert "batch_rows" not in ours
    assert settings(engine="vllm", vllm={"max_num_seqs": 8, "gpu_memory_utilization": 0.4}) == ours
    for setting in ({"quantization": "fp8"}, {"tensor_parallel": 2}, {"vllm": {"kv_cache_dtype": "fp8"}}):
        assert settings(engine="vllm", **setting) != ours


def test_another_engine_or_version_resumes_nothing() -> None:
    old = {"fingerprint": "a", "rows_per_file": 1, "components": {"engine": 2}}
    new = Choice("vllm", "", "0.32.0").component
    for was, now in ((2, new), (new, 2), (new, replace(Choice("vllm", "", "0.33.0")).component)):
        with pytest.raises(ConfigError, match="computes other rows; set generator.engine back"):
            manifest.check_resume(
                old | {"components": {"engine": was}}, old | {"fingerprint": "b", "components": {"engine": now}}
            )
