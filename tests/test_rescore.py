"""Rescoring a finished output: laws on real tables, all commands in this process."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import finished
import pyarrow.parquet as pq
import pytest
import yaml

from aisp_dist.align import align
from aisp_dist.analysis import rescore
from aisp_dist.config import FunctionReward, Run
from aisp_dist.output import schema, writer
from aisp_dist.records import Done, Prompt, Rollout, Round, Score, Trajectory
from aisp_dist.rewards.combine import combine
from jobs import cli
from jobs.rescore import _Scorer

FIRST = {"main": {"kind": "function", "function": "rewards.py:vowels"}}
HELD = {"kind": "function", "function": "rewards.py:words", "use": "report"}
NEVER = (
    "def vowels(*_, **__):\n    raise RuntimeError('asked')\ndef words(*_, **__):\n    raise RuntimeError('asked')\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = finished.project(tmp_path_factory.mktemp("rescore"))
    finished.output(folder, "all")
    finished.output(folder, "few", save={"candidates": {"top_bottom": 2}})
    finished.output(folder, "none", save={"candidates": "none"})
    finished.output(folder, "standard", combine="standardized", rewards={"words": HELD | {"use": "select"}})
    return folder


def run(folder: Path, parent: str, out: str, **config) -> Path:
    file = folder / f"{out}.yaml"
    file.write_text(yaml.safe_dump(config))
    assert command("rescore", str(folder / parent), "--config", str(file), "--out", str(folder / out)) == 0
    assert command("verify", str(folder / out)) == 0
    return folder / out


def command(verb, *args) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.run(verb, list(args))
    return ended.value.code


def rows(output: Path, table: str = "data") -> list[dict]:
    return pq.read_table(output / table).to_pylist() if list((output / table).glob("*.parquet")) else []


def without(rows: list[dict], *names: str) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in ("run_id", *names)} for row in rows]


@pytest.mark.parametrize("parent", ["all", "standard"])
def test_the_parents_own_configuration_reproduces_the_parent_and_asks_no_reward(folder, parent, monkeypatch):
    whole = yaml.safe_load((folder / parent / "config.yaml").read_text())
    monkeypatch.setattr("jobs.rescore.rewards.load", lambda *_, **__: pytest.fail("a reward was loaded"))
    out = run(folder, parent, f"{parent}-same", **whole)
    for table in ("data", "candidates"):
        assert without(rows(out, table)) == without(rows(folder / parent, table))
    said, before = (json.loads((folder / name / "run.json").read_text()) for name in (out.name, parent))
    assert said["fingerprint"] != before["fingerprint"] == said["components"]["parent"]


def test_among_few_candidates_the_parents_rewards_select_the_same(folder, capsys):
    out = run(folder, "few", "few-same", rewards=FIRST | {"words": HELD})
    assert without(rows(out), "curve") == without(rows(folder / "few"), "curve")
    assert "among the 24 kept of 72 candidates" in capsys.readouterr().out
    assert "among the 24 kept of 72" in " ".join((out / "README.md").read_text().split())


def test_the_scale_of_all_weights_selects_nothing_else(folder):
    rewards = {"main": FIRST["main"], "words": HELD | {"use": "select"}}
    one = run(folder, "all", "one", rewards=rewards)
    four = run(folder, "all", "four", rewards={name: reward | {"weight": 4.0} for name, reward in rewards.items()})
    scaled = ("reward", "base_reward", "reward_difference", "curve")
    assert without(rows(one), *scaled) == without(rows(four), *scaled)
    assert [4 * row["reward"] for row in rows(one)] == [row["reward"] for row in rows(four)]


def test_another_reward_selects_its_best_and_known_scores_are_not_asked_again(folder, monkeypatch):
    asked, score = [], _Scorer.score
    monkeypatch.setattr(_Scorer, "score", lambda self, *a: asked.append((a[0], len(a[2]))) or score(self, *a))
    out = run(
        folder, "all", "swapped", rewards={"words": HELD | {"use": "select"}, "main": FIRST["main"] | {"use": "report"}}
    )
    old = {row["id"]: row for row in rows(folder / "all")}
    kept = {row["id"]: row["candidates"] for row in rows(out, "candidates")}
    assert [row["id"] for row in rows(out)] == list(old)
    changed = 0
    for row in rows(out):
        mine, before = kept[row["id"]], old[row["id"]]
        counts = [float(len(c["text"].split())) for c in mine]
        assert [c["reward"] for c in mine] == counts and row["reward"] == max(counts) == row["curve"][-1]
        best = mine[counts.index(max(counts))]  # the earliest of equals
        assert (row["best_iteration"], row["best_sample"]) == (best["iteration"], best["sample"])
        assert row["completion"][0]["content"] == best["text"] and row["num_tokens"] == len(best["token_ids"])
        curve = [max(c["reward"] for c in mine if c["iteration"] <= k) for k in range(3)]
        assert row["curve"] == curve and row["samples_spent"] == 12
        stays = row["completion"] == before["completion"]
        changed += not stays
        assert row["nll"] == (before["nll"] if stays else None) and row["base_nll"] == before["base_nll"]
        assert {s["name"]: s["value"] for s in row["rewards"]}["words"] == row["reward"]
        scores = {s["name"]: s["value"] for s in row["base_rewards"]}
        assert scores == {s["name"]: s["value"] for s in before["base_rewards"]}
    assert changed, "the fixture tells nothing"
    assert {name for name, _ in asked} == {"words"}, "main is known of every candidate and of the base answer"
    assert sum(count for _, count in asked) == 6 * 11, "words is known of what was selected, and of the base answer"
    traces = [step for row in rows(out, "candidates") for step in row["trace"]]
    before = [step for row in rows(folder / "all", "candidates") for step in row["trace"]]
    same = ("weights", "lengths", "ess", "kl")
    assert [[a[n] for n in same] for a in traces] == [[a[n] for n in same] for a in before]
    assert [step["best_reward"] for step in traces] == [
        max(c["reward"] for c in row["candidates"] if c["iteration"] == k)
        for row in rows(out, "candidates")
        for k in range(3)
    ]


@pytest.fixture(scope="module")
def scored_by_vllm(folder):
    """An output whose record says that vLLM 0.33.0 scored it, which is not installed here."""
    finished.output(folder, "served", rewards={"main": {"kind": "model", "model": "demo"}})
    file = folder / "served" / "run.json"
    record = json.loads(file.read_text())
    record["config"]["rewards"]["main"]["engine"] = "vllm"
    record["components"]["rewards"]["main"]["engine"] = "vllm 0.33.0"
    file.write_text(json.dumps(record))
    return "served"


@pytest.mark.parametrize("name", ["inherited", "auto", "vllm"])
def test_scores_of_vllm_hold_where_another_version_or_none_is_there(folder, scored_by_vllm, name, monkeypatch):
    monkeypatch.setattr("aisp_dist.vllm.installed", lambda: {"auto": "0.32.0"}.get(name))
    monkeypatch.setattr("jobs.rescore.rewards.load", lambda *_, **__: pytest.fail("a reward was loaded"))
    config = {"combine": "standardized"}
    if name != "inherited":
        config["rewards"] = {"main": {"kind": "model", "model": "demo", "engine": name}}
    out = run(folder, scored_by_vllm, f"served-{name}", **config)
    record = json.loads((out / "run.json").read_text())
    assert record["config"]["rewards"]["main"]["engine"] == "vllm"
    assert record["components"]["rewards"]["main"]["engine"] == "vllm 0.33.0"
    assert "not promised: the bits of rewards.main" in record["same_rows"]


def test_what_vllm_is_to_score_needs_it_and_what_another_engine_scored_is_asked_again(
    folder, scored_by_vllm, capsys, monkeypatch
):
    monkeypatch.setattr("aisp_dist.vllm.installed", lambda: None)
    (folder / "long.yaml").write_text("rewards: {main: {kind: model, model: demo, max_tokens: 99}}")
    args = ("--config", str(folder / "long.yaml"), "--out", str(folder / "long"))
    assert command("rescore", str(folder / scored_by_vllm), *args) == 2
    assert "rewards.main.engine: vllm is not installed" in capsys.readouterr().err
    asked, score = [], _Scorer.score
    monkeypatch.setattr(_Scorer, "score", lambda self, *a: asked.append(len(a[2])) or score(self, *a))
    ours = {"main": {"kind": "model", "model": "demo", "engine": "transformers"}}
    out = run(folder, scored_by_vllm, "ours", rewards=ours)
    assert asked == [13] * 6, "every candidate and the base answer"
    assert "engine" not in json.loads((out / "run.json").read_text())["components"]["rewards"]["main"]


def test_a_changed_function_is_asked_again(folder):
    (folder / "other").mkdir()
    (folder / "other" / "rewards.py").write_text(finished.REWARDS.replace("/ 9", "/ 3"))
    (folder / "other" / "c.yaml").write_text(yaml.safe_dump({"rewards": FIRST}))
    args = (
        "rescore",
        str(folder / "all"),
        "--config",
        str(folder / "other" / "c.yaml"),
        "--out",
        str(folder / "third"),
    )
    assert command(*args) == 0
    said = [sum(letter in "aeiou" for letter in text) - len(text) / 3 for text in
            (row["base_completion"] for row in rows(folder / "third"))]  # fmt: skip
    assert [row["base_reward"] for row in rows(folder / "third")] == said


@pytest.mark.parametrize("beside", ["nothing", "a file of the same name"])
def test_a_configuration_elsewhere_without_rewards_means_the_files_of_the_run(folder, tmp_path, beside):
    if beside != "nothing":
        (tmp_path / "rewards.py").write_text(NEVER)
    (tmp_path / "c.yaml").write_text("combine: standardized")
    out = tmp_path / "out"
    assert command("rescore", str(folder / "all"), "--config", str(tmp_path / "c.yaml"), "--out", str(out)) == 0
    assert json.loads((out / "run.json").read_text())["base_dir"] == str(folder)
    scores = [[c["rewards"] for row in rows(o, "candidates") for c in row["candidates"]] for o in (out, folder / "all")]
    assert len(scores[0]) == 72 and scores[0] == scores[1]


def test_a_kill_between_parts_and_the_same_command_give_the_same_bytes(folder, monkeypatch):
    rewards = {"words": HELD | {"use": "select"}}
    run(folder, "all", "straight", rewards=rewards)
    commit, left = writer.Store._commit, [1]

    def dying(self, part):
        if not left.pop() if left else True:
            raise SystemExit(9)
        commit(self, part)
        left.append(0)

    monkeypatch.setattr(writer.Store, "_commit", dying)
    file = folder / "killed.yaml"
    file.write_text(yaml.safe_dump({"rewards": rewards}))
    assert command("rescore", str(folder / "all"), "--config", str(file), "--out", str(folder / "killed")) == 9
    assert len(list((folder / "killed/data").glob("*.parquet"))) == 1
    monkeypatch.undo()
    out = run(folder, "all", "killed", rewards=rewards)
    for file in sorted((folder / "straight").glob("*/part-*")):
        assert file.read_bytes() == (out / file.relative_to(folder / "straight")).read_bytes()


def test_failed_rows_are_carried_over_and_a_reward_that_raises_fails_its_row_alone(folder):
    lines = (folder / "prompts.jsonl").read_text()
    try:
        (folder / "prompts.jsonl").write_text(lines + '{"name": "p9"}\n')
        finished.output(folder, "broken")
        (folder / "picky.py").write_text(
            "def picky(completions, note, **_):\n    return [1 / (note[0]['n'] - 2)] * len(completions)\n"
        )
        out = run(folder, "broken", "picked", rewards={"p": {"kind": "function", "function": "picky.py:picky"}})
    finally:
        (folder / "prompts.jsonl").write_text(lines)
    before, now = rows(folder / "broken", "failed"), rows(out, "failed")
    assert without(now)[1:] == without(before) and now[0]["id"] == "p2" and "ZeroDivisionError" in now[0]["reason"]
    assert len(rows(out)) + len(now) == 7


def test_what_cannot_be_rescored_is_refused_and_nothing_is_written(folder, capsys):
    def refused(parent, said, config, out="refused"):
        file = folder / "refused.yaml"
        file.write_text(yaml.safe_dump(config))
        assert command("rescore", str(folder / parent), "--config", str(file), "--out", str(folder / out)) == 2
        message = capsys.readouterr().err
        assert said in message, message
        assert not (folder / "refused").exists()

    refused("none", "save.candidates: all keeps them", {"rewards": FIRST})
    refused("all", "has neither rewards nor combine", {"seed": 0})
    refused(
        "all",
        "in method.sigma2, seed; rescoring",
        {"rewards": FIRST, "seed": 3, "method": {**finished.AISP, "sigma2": 1}},
    )
    refused("all", "none has use: select", {"rewards": {"words": HELD}})
    refused("all", "is the output that is read", {"rewards": FIRST}, out="all")
    refused("all", "no file", {"rewards": {"x": {"kind": "function", "function": "absent.py:f"}}})
    run(folder, "all", "taken", rewards=FIRST)
    refused("all", "rewards.main.weight", {"rewards": {"main": FIRST["main"] | {"weight": 2.0}}}, out="taken")


def test_a_rescored_output_can_be_evaluated_and_rescored_back(folder, capsys):
    out = run(
        folder, "all", "there", rewards={"words": HELD | {"use": "select"}, "main": FIRST["main"] | {"use": "report"}}
    )
    assert command("evaluate", str(out)) == 0
    capsys.readouterr()
    assert command("status", str(out)) == 0
    told = capsys.readouterr().out
    assert f"not running; `aisp verify {out}` says whether every input has its row" in told, told
    found = json.loads((out / "evaluation.json").read_text())
    assert found["flips"] and "reward words" in found["measures"]
    back = run(folder, "there", "back", rewards=FIRST | {"words": HELD})
    assert without(rows(back), "nll") == without(rows(folder / "all"), "nll")


THOUGHTS = ["<think>no end", "<think>short</think>ab", "<think>on and on</think>abc", "<think></think>a"]


def thinking(**rewards) -> Run:
    """A run whose rewards have `use` by name."""
    given = {name: {"kind": "function", "function": f"r.py:{name}", "use": use} for name, use in rewards.items()}
    method = {"kind": "best_of_n", "num_samples": 4, "num_iterations": 1}
    generator = {"model": "m", "thinking": "strip"}
    return Run.model_validate({"output": "o", "generator": generator, "rewards": given, "method": method})


def lengths(name, texts) -> list[Score]:
    """Of reward `null` there is nothing to see; all others are longer for longer texts."""
    assert not any("think" in text for text in texts), "thinking was scored"
    return [Score(None if name == "null" else float(len(name) * len(text))) for text in texts]


def searched(run: Run, base: str) -> tuple[Done, dict, dict]:
    class Backend:
        async def rollout(self, round: Round) -> Rollout:
            texts = [base] if round.iteration < 0 else THOUGHTS
            return Rollout(tuple(Trajectory(i, (i, 7), text, "stop") for i, text in enumerate(texts)))

        async def score(self, name, prompt, texts):
            return lengths(name, texts)

        async def nll(self, id, tokens, responses):
            return [1.0 for _ in responses]

    done = asyncio.run(align(run, Prompt("p", 0, "q"), (1,), Backend()))
    return done, *tables(done)


def tables(result: Done) -> tuple[dict, dict]:
    return schema.done_row(result, "raw", {}, "m", "r"), schema.candidates_row(result, "all", True)


@pytest.mark.parametrize("base", ["<think>still", "<think>x</think>base"])
@pytest.mark.parametrize("uses", [{"r": "select"}, {"r": "select", "other": "report"}, {"r": "select", "s": "select"}])
def test_thinking_without_an_end_is_never_scored_and_keeps_its_nulls(base, uses):
    run = thinking(**uses)
    done, row, kept = searched(run, base)
    assert (row["base_reward"] is None) == (base == "<think>still") and row["quarantined"] == 1
    again = rescore.rescore(run, done.prompt, row, kept, set(uses), lambda *_: pytest.fail("a reward was asked"))
    assert tables(again) == (row, kept)
    for new in ({"long": "select"}, {"long": "select", "r": "report"}, {"r": "select", "long": "select"}):
        known = set(uses) & set(new)
        found, after = tables(rescore.rescore(thinking(**new), done.prompt, row, kept, known, lengths))
        first, *others = after["candidates"]
        assert first["reward"] is None and {score["value"] for score in first["rewards"]} == {None}
        assert "ends inside its thinking: there is no </think>" in first["reason"]
        assert all(c["reward"] > 0 for c in others) and found["quarantined"] == 1 and found["completion"] == "abc"
        scores = [found["base_reward"], *(score["value"] for score in found["base_rewards"])]
        assert all(value is None if base == "<think>still" else value > 0 for value in scores)
        back = rescore.rescore(run, done.prompt, found, after, known & set(uses), lengths)
        assert tables(back) == (row, kept)


def test_a_null_base_reward_stays_where_no_reward_has_changed_and_is_asked_again_beside_another():
    run = thinking(null="select")
    run = run.model_copy(update={"generator": run.generator.model_copy(update={"thinking": "keep"})})
    done, row, kept = searched(thinking(r="select"), "base")
    row = row | {"base_reward": None, "base_rewards": [{"name": "r", "value": None}]}
    kept_r = run.model_copy(update={"rewards": thinking(r="select").rewards})
    again = rescore.rescore(kept_r, done.prompt, row, kept, {"r"}, lambda *_: pytest.fail("a reward was asked"))
    assert tables(again)[0]["base_reward"] is None
    both = run.model_copy(update={"rewards": thinking(r="select", s="select").rewards})
    asked = []
    rescore.rescore(
        both, done.prompt, row, kept, {"r"}, lambda n, t: asked.append((n, len(t))) or [Score(1.0)] * len(t)
    )
    assert asked == [("r", 1), ("s", 5)], "r may not apply to the base answer, or be quarantined: only it can tell"


def test_a_null_is_read_as_what_it_was():
    """combine joins reasons; a stored candidate gives back each reward's own."""
    scores = {"a": [Score(None, "NaN; odd")], "b": [Score(None)], "a.c": [Score(None, "the reward is inf")]}
    settings = {name: FunctionReward(function="f.py:f") for name in scores}
    (total,), _ = combine(settings, "weighted_sum", scores)
    values = dict.fromkeys(scores)
    assert [rescore._score(name, values, total.reason) for name in scores] == [found[0] for found in scores.values()]
    assert rescore._score("b", {"b": None}, None) == Score(None) and rescore._score("x", values, None) is None
    assert rescore._score("b", {"b": math.pi}, total.reason) == Score(math.pi)
