"""`aisp doctor`: all is well on models that are, and each check fails on what it is there for."""

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

from aisp_dist import rewards
from aisp_dist.analysis.doctor import Check, decoding, exact, scoring
from aisp_dist.config import FunctionReward, Generator, ModelReward, Run
from aisp_dist.engine import blocks, decode, model
from aisp_dist.engine.step import STEP, Batch
from aisp_dist.records import Prompt, Score
from aisp_dist.rewards.prefix import Classifier, Extend
from jobs import cli

ENGINE = ["schedule", "repetition", "threads", "exact states", "exact tokens"]
REWARD = ["main repetition", "main pairs", "main input", "main whole requests", "main single responses"]
FUNCTIONS = """
import itertools
count = itertools.count()
def steady(completions, **_): return [float(len(str(c))) for c in completions]
def fickle(completions, **_): return [float(next(count)) for _ in completions]
def broken(completions, **_): raise RuntimeError("out of order")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    tiny.save("llama", folder / "base")
    tiny_chat.classifier(folder / "reward", tiny_chat.tokenizer())
    (folder / "functions.py").write_text(FUNCTIONS)
    lines = ("why?", "a somewhat longer question about the weather?", "how much is one and one?")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    run = {
        "output": str(folder / "out"),
        "prompts": {"source": str(folder / "prompts.jsonl")},
        "generator": {"model": str(folder / "base"), "max_new_tokens": 8, "batch_rows": 20},
        "rewards": {"main": {"kind": "model", "model": str(folder / "reward")}},
        "method": {"kind": "aisp", "num_samples": 5, "sigma2": 0.3},
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
def test_all_is_well(diagnose, dtype, fp32_head):
    head = ("--generator.fp32_head", fp32_head)
    code, found = diagnose("--generator.dtype", dtype, *head, "--rewards.main.dtype", dtype)
    assert code == 0 and list(found) == ["end tokens", "memory", *ENGINE, *REWARD], found
    assert {check["verdict"] for name, check in found.items() if name != "main pairs"} == {"ok"}
    assert all(bool(check["advice"]) == (check["verdict"] != "ok") for check in found.values())


def test_lines_for_people(tmp_path, capsys):
    flags = ["--steps", "2", "--generator.batch_rows", "32", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as left:
        cli.run("doctor", [str(Path(__file__).parent.parent / "configs" / "quickstart.yaml"), *flags])
    out, err = capsys.readouterr()
    *lines, last = out.splitlines()
    assert left.value.code == 0 and last.startswith("all 17 checks passed"), out
    assert len(lines) == 17 and all(line[:7] in ("ok     ", "note   ") for line in lines)
    assert "the engine is gone" in err and not (tmp_path / "out").exists()


def test_logits_that_are_not_finite(diagnose, monkeypatch):
    monkeypatch.setattr(Batch, "control", lambda self, z_BD: z_BD * torch.nan)
    code, found = diagnose()
    assert code == 1 and list(found) == ["end tokens", "memory", "decoding", *REWARD]
    assert found["decoding"]["verdict"] == "FAILED" and "sigma2" in found["decoding"]["figure"]


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


def test_an_end_token_that_only_the_template_says():
    tokenizer = tiny.tokenizer()
    lm = model.adapt(tiny.causal("llama"), tokenizer)
    assert decoding.ends(lm) == Check("end tokens", "ok", "a response ends at '</s>'")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content }}<turn>{% endfor %}"
    found = decoding.ends(model.adapt(tiny.causal("llama"), tokenizer))
    assert found.verdict == "note" and found.figure.startswith("a response ends at '</s>' or '<turn>'; '<turn>' is")
    assert "generation_config.json" in found.advice


AISP = {"kind": "aisp", "num_samples": 3, "sigma2": 0.3}


def asked(one: decode.Engine, method: dict[str, Any] = AISP) -> list[Any]:
    keys = {"generator": {"model": "x"}, "rewards": {"m": {"kind": "model", "model": "x"}}, "output": "x"}
    run = Run.model_validate({**keys, "method": method})
    some = [(Prompt(str(n), n, ""), tuple(range(4, 4 + n))) for n in (1, 12, 40)]
    return decoding.rounds(run, some, one.max_new_tokens, len(one.rows))


def alone(one: decode.Engine, rounds: list[Any]) -> decoding.Decoded:
    return {key: made for r in rounds for key, made in decoding.decode(one, [r], decoding.digests).items()}


def exactness(one: decode.Engine, rounds: list[Any], reference: Any) -> list[Check]:
    (round,) = (replace(r, stop=2, sampling=replace(r.sampling, decode=None)) for r in rounds if r.iteration == 1)
    made = decoding.decode(one, [round], lambda z_BD: z_BD.to("cpu", torch.float32, copy=True))
    rows = [exact.Row(round, trajectory, torch.stack(z)) for trajectory, z in made.values()]
    return list(exact.exactness(reference, rows))


def failures(one: decode.Engine, method: dict[str, Any] = AISP) -> list[str]:
    rounds = asked(one, method)
    checks = [*decoding.schedule(one, rounds, alone(one, rounds)), *exactness(one, rounds, tiny.causal("llama"))]
    assert [check.name for check in checks] == ENGINE
    return [check.name for check in checks if check.verdict == "FAILED"]


@pytest.mark.parametrize(
    "method",
    [
        AISP | {"noise": {"ar1": 0.7}, "decode": {"top_p": 0.9}, "after_eos": "marginal"},
        {"kind": "best_of_n", "sampling": {"top_p": 0.9}},
    ],
)
def test_other_kinds_of_sampling(method):
    assert failures(engine(), method) == []


def test_a_wrong_merge_of_prefix_and_suffix(monkeypatch):
    one, right = engine(), blocks.merge
    monkeypatch.setattr(blocks, "merge", lambda prefix, suffix: right((prefix[0], prefix[1] + 0.1), suffix))
    assert failures(one)[0] == "exact states"


def test_a_choice_that_is_not_the_argmax(monkeypatch):
    def second(self: Batch, logits_BV: torch.Tensor, drawn: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return logits_BV.topk(2).indices[:, 1], torch.ones(len(logits_BV), dtype=torch.bool)

    monkeypatch.setattr(Batch, "select", second)
    assert failures(engine()) == ["exact tokens"]


def test_a_control_that_depends_on_the_slot(monkeypatch):
    right = Batch.control

    def control(self: Batch, z_BD: torch.Tensor) -> torch.Tensor:
        return right(self, z_BD) + torch.arange(len(z_BD))[:, None] * torch.linspace(-1, 1, z_BD.shape[1])

    monkeypatch.setattr(Batch, "control", control)
    found = failures(engine())
    assert "schedule" in found and "repetition" not in found and "exact tokens" in found


def test_a_last_bit_that_depends_on_company_is_seen_though_no_token_changes(monkeypatch):
    right = Batch.states

    def states(self: Batch, attend: Any, first: bool) -> torch.Tensor:
        mixed = len(self.rows_BF[:, STEP].unique()) > 2  # as late starters are, and an empty slot
        return right(self, attend, first) * (1 + 2e-7 * mixed)

    monkeypatch.setattr(Batch, "states", states)
    assert failures(engine()) == ["schedule"]


def test_states_that_are_never_the_same_twice(monkeypatch):
    right, count = Batch.states, itertools.count()
    monkeypatch.setattr(Batch, "states", lambda self, *args: right(self, *args) * (1 + 1e-7 * next(count)))
    assert {"schedule", "repetition"} <= set(failures(engine()))


def test_bits_that_depend_on_threads(monkeypatch):
    right = Batch.states
    wrong = lambda self, *args: right(self, *args) * (1 + 1e-6 * (torch.get_num_threads() - 1))  # noqa: E731
    monkeypatch.setattr(Batch, "states", wrong)
    assert failures(engine()) == ["threads"]


@pytest.mark.parametrize(("kind", "verdict"), [({}, "ok"), ({"controlled": False}, "FAILED")])
def test_a_graph_that_does_not_do_what_its_step_does(kind, verdict):
    """A replay by hand, there being no GPU; one is of steps without control."""
    one = engine()
    rounds = asked(one)
    one.replay = lambda **real: one.batch.step(one.kv.attend, first=False, **{**real, **kind})
    checks = {check.name: check.verdict for check in decoding.schedule(one, rounds, alone(one, rounds))}
    assert checks == {"schedule": "ok", "repetition": "ok", "CUDA graphs": verdict}


@pytest.mark.parametrize(("family", "verdict"), [("mixtral", "note"), ("llama", "FAILED")])
def test_other_bits_of_a_mixture_of_experts_are_noted(family, verdict):
    one = engine(family)
    expected = alone(one, asked(one)[:2])
    other = {key: (trajectory, states[::-1]) for key, (trajectory, states) in expected.items()}
    found = decoding.same("schedule", expected, {"late": other}, one.lm, "")
    assert found.verdict == verdict and "differ late, first prompt '1', iteration 2, sample 0, step 1" in found.figure


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3_multimodal", "gpt_oss", "cohere", "opt"])
def test_exactness_of_other_families(family):
    one = engine(family)
    for seed, verdict in ((0, "ok"), (1, "FAILED")):
        checks = exactness(one, asked(one), tiny.causal(family, seed=seed))
        assert [check.verdict for check in checks] == [verdict, verdict]


def test_more_rows_than_fit():
    lm = engine().lm
    assert decoding.fits(Generator(model="x"), lm, 100).verdict == "ok"
    found = decoding.fits(Generator(model="x", batch_rows=1 << 24), lm, 100)
    assert found.verdict == "FAILED" and "suffixes" in found.figure and "generator.batch_rows" in found.advice


# Rewards


@pytest.fixture
def scored(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """Verdicts on a reward, with a fault made once it is loaded and its own probe is done."""

    def run(settings: Any, where: Any = None, name: str = "", wrong: Any = None) -> dict[str, str]:
        def load(asked: Any) -> Any:
            score = rewards.load("main", asked, project, "cpu")
            if where:
                monkeypatch.setattr(where, name, wrong)
            return score

        requests = [(Prompt("a", 0, "a question " * 3), ["yes", "a longer answer", "no"])]
        checks = list(scoring.check("main", settings, torch.device("cpu"), load, requests))
        return {check.name.removeprefix("main "): check.verdict for check in checks}

    return run


@pytest.fixture
def reward(project: Path, scored: Any) -> Callable[..., set[str]]:
    """The failed checks of the reward model."""

    def run(*fault: Any, folder: str = "reward") -> set[str]:
        found = scored(ModelReward(model=str(project / folder)), *fault)
        return {name for name, verdict in found.items() if verdict == "FAILED"}

    return run


def test_padding_that_moves_the_score(reward):
    def eos(self: Classifier, rows: Any) -> int:
        self.model.config.pad_token_id = 1  # which ends every message
        return 1

    assert "whole requests" in reward(Classifier, "_set_pad", eos)


def test_a_prefix_that_is_wrong(reward):
    right = Extend._prefix

    def wrong(self: Extend, *args: Any) -> Any:
        out, lse = right(self, *args)
        return out * 1.01, lse

    assert reward(Extend, "_prefix", wrong) == {"whole requests"}


def test_scores_that_are_never_the_same_twice(reward):
    right, count = Classifier.logits, itertools.count()
    wrong = lambda self, *args: [x + 1e-7 * next(count) for x in right(self, *args)]  # noqa: E731
    assert reward(Classifier, "logits", wrong) == {"repetition"}


def test_scores_that_are_no_numbers(reward):
    assert reward(Classifier, "logits", lambda self, rows, *_: [float("nan")] * len(rows)) == {"scores"}


def test_a_template_that_writes_bos_twice(project, reward):
    tiny_chat.classifier(project / "twice", tiny_chat.tokenizer("{{ bos_token }}" + tiny_chat.TEMPLATE))
    assert reward(folder="twice") == {"self-test", "input"}


@pytest.mark.parametrize(("sign", "verdict"), [(1.0, "ok"), (-1.0, "note")])
def test_pairs(project, scored, monkeypatch, sign, verdict):
    good = {answer for _, answer, _ in scoring.PAIRS}
    judge = lambda prompt, responses: [Score(sign * (r in good)) for r in responses]  # noqa: E731
    monkeypatch.setattr(rewards, "load", lambda *_: judge)
    assert scored(ModelReward(model=str(project / "reward")))["pairs"] == verdict


@pytest.mark.parametrize(
    ("function", "found"),
    [("steady", {"repetition": "ok"}), ("fickle", {"repetition": "note"}), ("broken", {"scores": "FAILED"})],
)
def test_functions(scored, function, found):
    assert scored(FunctionReward(kind="function", function=f"functions.py:{function}")) == found
