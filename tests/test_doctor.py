"""`aisp doctor`: all checks pass on sound models, and each check fails on the fault that it is there for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_chat
import torch
import yaml

from aisp_dist.analysis.doctor import Check, examine
from aisp_dist.analysis.doctor import engine as checks
from aisp_dist.config import ModelReward, Run
from aisp_dist.engine import decode, kv, model
from aisp_dist.engine.step import STEP, Batch
from aisp_dist.records import Prompt
from jobs import cli

ENGINE = ["schedule", "exact states", "exact tokens"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    tiny.save("llama", folder / "base")
    tiny_chat.classifier(folder / "reward", tiny_chat.tokenizer())
    lines = ("why?", "a somewhat longer question about the weather?", "how much is one and one?")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    run = {
        "output": str(folder / "out"),
        "prompts": {"source": str(folder / "prompts.jsonl")},
        "generator": {"model": str(folder / "base"), "max_new_tokens": 8, "batch_rows": 40},
        "rewards": {"main": {"kind": "model", "model": str(folder / "reward")}},
        "method": {"kind": "aisp", "num_samples": 5, "num_iterations": 8, "sigma2": 0.3, "lambda": {"ess": 0.1}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture
def diagnose(project: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """`aisp doctor run.yaml --json ...`: the exit code, and findings by name."""

    def run(*flags: str) -> tuple[int, dict[str, Any]]:
        with pytest.raises(SystemExit) as left:
            cli.run("doctor", [str(project / "run.yaml"), "--json", *flags])
        found = json.loads(capsys.readouterr().out)
        assert found["ok"] == (left.value.code == 0) and not (project / "out").exists()
        return left.value.code, {check["name"]: check for check in found["checks"]}

    return run


@pytest.mark.parametrize(("dtype", "fp32_head"), [("float32", "false"), ("bfloat16", "false"), ("bfloat16", "true")])
def test_sound_models(diagnose, dtype, fp32_head):
    head = ("--generator.fp32_head", fp32_head)
    code, found = diagnose("--generator.dtype", dtype, *head, "--rewards.main.dtype", dtype)
    assert code == 0 and list(found) == ["end tokens", *ENGINE, "main self-test"], found
    assert {(check["verdict"], check["advice"]) for check in found.values()} == {("ok", "")}


def test_lines_for_people(tmp_path, capsys):
    flags = ["--steps", "2", "--generator.batch_rows", "32", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as left:
        cli.run("doctor", [str(Path(__file__).parent.parent / "configs" / "quickstart.yaml"), *flags])
    out, err = capsys.readouterr()
    *lines, last = out.splitlines()
    assert left.value.code == 0 and last == f"all {len(lines)} checks passed", out
    assert len(lines) >= 4 and all(line.startswith("ok     ") for line in lines)
    assert "the engine is gone" in err and not (tmp_path / "out").exists()


def test_logits_that_are_not_finite(diagnose, monkeypatch):
    monkeypatch.setattr(Batch, "control", lambda self, z_BD: z_BD * torch.nan)
    code, found = diagnose()
    assert code == 1 and list(found) == ["end tokens", "decoding", "main self-test"]
    assert found["decoding"]["verdict"] == "FAILED" and "sigma2" in found["decoding"]["figure"]


def test_more_rows_than_fit(project, capsys):
    with pytest.raises(SystemExit) as left:
        cli.run("doctor", [str(project / "run.yaml"), "--generator.batch_rows", str(1 << 26)])
    said = capsys.readouterr()
    assert left.value.code == 2 and "suffixes" in said.err and "set generator.batch_rows to" in said.err


def test_bad_usage(project, capsys):
    for flags in (["--steps", "0"], ["--generator.model", "/no/such"], ["--method.colour", "red"]):
        with pytest.raises(SystemExit) as left:
            cli.run("doctor", [str(project / "run.yaml"), *flags])
        said = capsys.readouterr()
        assert left.value.code == 2 and said.err.startswith("aisp: ") and not said.out


# The engine. Its own probe refuses most faults at the load, so these come after it.


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def engine(family: str = "llama") -> decode.Engine:
    return decode.Engine(model.adapt(tiny.causal(family), tiny.tokenizer()), 20, 6, idle_tokens=0)


def test_an_end_token_that_only_the_template_names():
    tokenizer = tiny.tokenizer()
    lm = model.adapt(tiny.causal("llama"), tokenizer)
    assert checks.ends(lm.tokenizer, lm.eos_ids, lm.turn_end) == Check("end tokens", "ok", "a response ends at '</s>'")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content }}<turn>{% endfor %}"
    lm = model.adapt(tiny.causal("llama"), tokenizer)
    found = checks.ends(lm.tokenizer, lm.eos_ids, lm.turn_end)
    assert found.verdict == "note"
    assert found.figure == "a response ends at '</s>' or '<turn>'; only the chat template names '<turn>'"
    assert "generation_config.json" in found.advice


AISP = {"kind": "aisp", "num_samples": 3, "num_iterations": 8, "sigma2": 0.3, "lambda": {"ess": 0.1}}


def asked(one: decode.Engine, method: dict[str, Any] = AISP) -> list[Any]:
    keys = {"generator": {"model": "x"}, "rewards": {"m": {"kind": "model", "model": "x"}}, "output": "x"}
    run = Run.model_validate({**keys, "method": method})
    some = [(Prompt(str(n), n, ""), tuple(range(4, 4 + n))) for n in (1, 12, 40)]
    return checks.rounds(run, some, one.max_new_tokens, len(one.rows))


def exactness(one: decode.Engine, rounds: list[Any], reference: Any) -> list[Check]:
    (round,) = (replace(r, stop=2, sampling=replace(r.sampling, decode=None)) for r in rounds if r.iteration == 1)
    return list(checks.exactness(reference, [round], checks.decode(one, [round])))


def failures(one: decode.Engine, method: dict[str, Any] = AISP) -> list[str]:
    rounds = asked(one, method)
    found = [checks.schedule(one, rounds, mixture=False), *exactness(one, rounds, tiny.causal("llama"))]
    assert [check.name for check in found] == ENGINE
    return [check.name for check in found if check.verdict == "FAILED"]


@pytest.mark.parametrize(
    "method",
    [
        AISP | {"noise": {"ar1": 0.7}, "after_eos": "marginal"},
        AISP | {"sigma2": {"flip_rate": 0.1}},
        {"kind": "population"},
        {"kind": "best_of_n", "sampling": {"top_p": 0.9}},
    ],
)
def test_other_kinds_of_sampling(method):
    assert failures(engine(), method) == []


def test_a_wrong_merge_of_prefix_and_suffix(monkeypatch):
    one, right = engine(), kv.merge
    monkeypatch.setattr(kv, "merge", lambda prefix, suffix: right((prefix[0], prefix[1] + 0.1), suffix))
    assert failures(one)[0] == "exact states"


def test_a_choice_that_is_not_the_argmax(monkeypatch):
    def second(self: Batch, logits_BV: torch.Tensor, *_: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return logits_BV.topk(2).indices[:, 1], torch.ones(len(logits_BV), dtype=torch.bool)

    monkeypatch.setattr(Batch, "select", second)
    assert failures(engine()) == ["exact tokens"]


def test_a_control_that_depends_on_the_slot(monkeypatch):
    right = Batch.control

    def control(self: Batch, z_BD: torch.Tensor) -> torch.Tensor:
        return right(self, z_BD) + torch.arange(len(z_BD))[:, None] * torch.linspace(-1, 1, z_BD.shape[1])

    monkeypatch.setattr(Batch, "control", control)
    found = failures(engine())
    assert "schedule" in found and "exact tokens" in found


def test_a_last_bit_that_depends_on_company_is_seen_though_no_token_changes(monkeypatch):
    right = Batch.states

    def states(self: Batch, attend: Any) -> torch.Tensor:
        mixed = len(self.rows_BF[:, STEP].unique()) > 2  # there are late starters beside an empty slot
        return right(self, attend) * (1 + 2e-7 * mixed)

    monkeypatch.setattr(Batch, "states", states)
    assert failures(engine()) == ["schedule"]


def test_states_that_are_never_the_same_twice(monkeypatch):
    right, count = Batch.states, itertools.count()
    monkeypatch.setattr(Batch, "states", lambda self, *args: right(self, *args) * (1 + 1e-7 * next(count)))
    assert "schedule" in failures(engine())


@pytest.mark.parametrize(("mixture", "verdict"), [(True, "note"), (False, "FAILED")])
def test_other_bits_of_a_mixture_of_experts_are_noted(monkeypatch, mixture, verdict):
    right, count = Batch.states, itertools.count()
    one = engine("mixtral")
    monkeypatch.setattr(Batch, "states", lambda self, *args: right(self, *args) * (1 + 1e-7 * next(count)))
    found = checks.schedule(one, asked(one), mixture)
    assert found.verdict == verdict and "other bits together than alone, first prompt '1', iteration 2" in found.figure


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3_multimodal", "gpt_oss", "cohere", "opt"])
def test_exactness_of_other_families(family):
    one = engine(family)
    for seed, verdict in ((0, "ok"), (1, "FAILED")):
        found = exactness(one, asked(one), tiny.causal(family, seed=seed))
        assert [check.verdict for check in found] == [verdict, verdict]


# Rewards


@pytest.mark.parametrize(("self_test", "verdict"), [(True, "FAILED"), (False, "note")])
def test_a_reward_model_with_a_defect(project, self_test, verdict):
    tiny_chat.classifier(project / "twice", tiny_chat.tokenizer("{{ bos_token }}" + tiny_chat.TEMPLATE))
    settings = ModelReward(model=str(project / "twice"), self_test=self_test)
    found = examine.reward("main", settings, project, torch.device("cpu"))
    assert found.verdict == verdict and "begin with 2 BOS" in found.figure
    assert settings.self_test == self_test
