"""What ends an engine's start is told with its cause, and leaves no process behind."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
from engines import remaining, settings

from aisp_dist.config import ConfigError
from aisp_dist.vllm import failures
from aisp_dist.vllm.start import start


def log(told: Any, error: Exception) -> None:
    """As a process of vLLM whose start fails."""
    from vllm.logger import configure_logging

    configure_logging(told["logging_config"])
    try:
        raise error
    except Exception:
        logging.getLogger("vllm.v1").exception("EngineCore failed to start.")


def test_the_cause_that_another_process_logs_is_named() -> None:
    with pytest.raises(ConfigError) as refused, failures.refused("generator: 'm'", "lower it") as told:
        log(told, ValueError("1.5 GiB KV cache is needed,\nwhich is larger than 1 GiB."))
        log(told, RuntimeError("WorkerProc initialization failed"))
        raise RuntimeError("Engine core initialization failed. See root cause above.")
    assert (
        str(refused.value)
        == "generator: 'm': vLLM cannot start (1.5 GiB KV cache is needed, which is larger than 1 GiB); lower it"
    )


def test_an_engine_that_is_killed_while_it_starts_is_a_fault_of_the_machine() -> None:
    with pytest.raises(RuntimeError, match="Failed core"), failures.refused("generator: 'm'", "lower it"):
        raise RuntimeError("Engine core initialization failed. Failed core proc(s): {'EngineCore': -9}")


REFUSED = {
    "max_sequences": (3, "generator.vllm: .*'max_sequences'; give vLLM's own engine arguments"),
    "kv_cache_dtype": ("int2", "generator: '.*': vLLM cannot start .*int2.*generator.engine to local"),
    "max_model_len": (9999, "generator: '.*': vLLM cannot start .User-specified max_model_len .9999. is greater"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_vllm_refuses(llama: Path, on: Any, name: str) -> None:
    value, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        on(start(settings(llama, vllm={name: value}), 100))


def test_a_model_that_does_not_load_leaves_no_process(llama: Path, on: Any, tmp_path: Path) -> None:
    """Which only vLLM's own processes find."""
    broken = shutil.copytree(llama, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    before = set(psutil.Process().children(recursive=True))
    cause = r"broken': vLLM cannot start \(.*weights.*not initialized.*layers.2"
    with pytest.raises(ConfigError, match=cause):
        on(start(settings(broken), 100))
    assert not remaining(before)
