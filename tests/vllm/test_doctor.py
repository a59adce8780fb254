"""`aisp doctor` on a run that vLLM decodes: a sound engine passes, and each check fails on its fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from engines import SHAPE, settings

from aisp_dist.analysis.doctor import Check, examine, served
from aisp_dist.config import Run

NAMES = ["end tokens", "company", "stop strings", "exact tokens", "likelihoods"]
Examine = Callable[..., dict[str, Check]]


@pytest.fixture
def look(llama: Path, service: Any, on: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """The checks of the generator, by name, with the engine that all tests share."""
    lines = ("why?", "a somewhat longer question about the weather?", "how much is one and one?")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))

    class Runner:
        def __enter__(self) -> Runner:
            return self

        def __exit__(self, *_: object) -> None: ...
        def run(self, call: Coroutine[Any, Any, Any]) -> Any:
            return on(call)

    async def start(wanted: Any, prompt_tokens: int) -> Any:
        return service

    monkeypatch.setattr(examine, "asyncio", SimpleNamespace(Runner=Runner))
    monkeypatch.setattr(examine, "start", start)
    monkeypatch.setattr(service, "close", lambda: None)
    sound = tiny.save("llama", tmp_path / "model", **SHAPE)
    run: dict[str, Any] = {
        "output": str(tmp_path / "out"),
        "prompts": {"source": str(tmp_path / "prompts.jsonl"), "max_tokens": 80},
        "generator": settings(llama).model_copy(update={"model": str(sound)}).model_dump(),
        "rewards": {"words": {"kind": "function", "function": "a.py:b"}},
        "method": {"kind": "aisp", "num_samples": 4, "num_iterations": 8, "sigma2": 0.3, "lambda": {"ess": 0.1}},
    }

    def examined(**generator: Any) -> dict[str, Check]:
        checked = Run.model_validate(run | {"generator": run["generator"] | generator})
        return {check.name: check for check in examine.examine(checked, tmp_path, 12, lambda line: None)}

    return examined


def test_a_sound_engine(look: Examine) -> None:
    found = look()
    assert list(found) == NAMES and {check.verdict for check in found.values()} == {"ok"}, found


def test_faults(look: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last tokens that are another each time, and likelihoods that are off by three times what is allowed."""
    decode, told, count = served.decode, served.likelihoods, [0]

    async def other(service: Any, asked: Any) -> Any:
        count[0] += 1
        answers = await decode(service, asked)
        return {key: replace(made, token_ids=(*made.token_ids[:-1], 99 + count[0])) for key, made in answers.items()}

    async def off(*args: Any) -> Any:
        return {key: value + 3e-4 for key, value in (await told(*args)).items()}

    monkeypatch.setattr(served, "decode", other)
    monkeypatch.setattr(served, "likelihoods", off)
    found = look()
    wrong = {name: check.verdict for name, check in found.items() if check.verdict != "ok"}
    assert wrong == {"company": "note", "stop strings": "FAILED", "exact tokens": "FAILED", "likelihoods": "FAILED"}
    assert "other tokens together than alone" in found["company"].figure


def test_a_quantised_model_is_not_compared(look: Examine) -> None:
    found = look(quantization="fp8")
    assert list(found) == NAMES[:4] and found["exact tokens"].figure == "not compared: transformers has no fp8"
