"""vLLM engines that the tests here share: a start takes half a minute. Without vLLM every test here is skipped, which
.ci/run counts as a failure in the environment that has it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from engines import SHAPE, SPOILT, adapted, settings
from safetensors.torch import load_file, save_file

from aisp_dist import vllm
from aisp_dist.config import Generator

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if vllm.installed() is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


class Loop:
    """An event loop in a thread, on which engines live for the whole session."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def __call__(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self.loop).result()


@pytest.fixture(scope="session")
def on() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.loop.call_soon_threadsafe(loop.loop.stop)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What reads the token SPOILT has no finite logits."""
    directory = tiny.save("llama", tmp_path_factory.mktemp("llama"), **SHAPE)
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][SPOILT] = float("nan")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A LoRA adapter of that model, and the model with it merged."""
    directory = tmp_path_factory.mktemp("adapter") / "lora"
    return directory, adapted(tiny.causal("llama", **SHAPE), directory)


def serve(on: Loop, configured: Generator) -> Iterator[Any]:
    from aisp_dist.vllm.start import start

    made = on(start(configured, 100))
    yield made

    async def close() -> None:
        made.close()

    on(close())


@pytest.fixture(scope="session")
def service(llama: Path, adapter: tuple[Path, Any], on: Loop) -> Iterator[Any]:
    """A tiny llama in fp32, 24 rows, 12 new tokens, in two processes that each hold half of every layer. The adapter is
    beside it, and decodes only where a test says so."""
    for made in serve(on, settings(llama, tensor_parallel=2, adapter=str(adapter[0]))):
        made.served = replace(made.served, adapter=None)
        yield made
