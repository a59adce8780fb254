"""prompts.drop_last_answer: the answer that a dialogue came with is scored beside the new one; nothing else changes."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import finished
import pyarrow.parquet as pq
import pytest
import yaml
from rows import at, prompt, result, store
from test_verify import RUN, edit

import aisp_dist
from aisp_dist.align import align
from aisp_dist.analysis import compare, summary
from aisp_dist.analysis.report import contents, page
from aisp_dist.config import ConfigError, Prompts, Run
from aisp_dist.data import prompts
from aisp_dist.output import manifest, schema
from aisp_dist.output.filesystem import Place
from aisp_dist.output.verify import verify
from aisp_dist.records import BadInput, Done, Original, Prompt, Rollout, Score, Trajectory
from jobs import cli, export
from jobs.rescore import _Scorer

COLUMNS = {"original_completion": "original"}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def dialogue(question, answer):
    return {"prompt": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# Inputs


def test_the_answer_is_part_of_what_names_a_row(tmp_path):
    source = lines(tmp_path / "a.jsonl", [dialogue("q", "a"), dialogue("q", "b"), dialogue("q", "a"), {"prompt": "q"}])
    first, other, same, none = prompts.read(Prompts(source=source, drop_last_answer=True))
    assert [p.original for p in (first, other, same, none)] == ["a", "b", "a", None]
    assert len({p.content for p in (first, other, same, none)}) == 1
    assert first.id != other.id and same.id == f"{first.id}#2" and none.id not in (first.id, other.id)
    assert first.digest != other.digest
    (plain,) = prompts.read(Prompts(source=lines(tmp_path / "b.jsonl", [{"prompt": "q"}])))
    assert plain == replace(none, source_index=0)


def test_one_id_with_two_answers_is_a_conflict(tmp_path):
    rows = [dialogue("q", answer) | {"n": "one"} for answer in "aab"]
    settings = Prompts(source=lines(tmp_path / "a.jsonl", rows), id_column="n", drop_last_answer=True)
    first, same, other = prompts.read(settings)
    assert (first.id, same.id) == ("one", "one#2") and isinstance(other, BadInput) and "other content" in other.reason


# The search


def search(original, thinking="keep", fails=()):
    calls = []

    class Backend:
        async def rollout(self, round):
            texts = ["base"] if round.iteration < 0 else ["<think>x</think>ab", "abc"]
            return Rollout(tuple(Trajectory(i, (i, 7), text, "stop") for i, text in enumerate(texts)))

        async def score(self, name, prompt, responses):
            calls.append((name, tuple(responses)))
            return [Score(None, "NaN") if r in fails else Score(len(r) + 100.0 * (name == "h")) for r in responses]

        async def nll(self, id, tokens, responses):
            return [1.0 for _ in responses]

    uses = {"r": "select", "s": "select", "h": "report"}
    rewards = {n: {"kind": "function", "function": "r.py:f", "use": use} for n, use in uses.items()}
    run = Run.model_validate(
        {"output": "o", "generator": {"model": "m", "thinking": thinking}, "rewards": rewards,
         "method": {"kind": "best_of_n", "num_samples": 2, "num_iterations": 1}, "combine": "standardized"}
    )  # fmt: skip
    return asyncio.run(align(run, Prompt("p", 0, "q", original=original), (1,), Backend())), calls


def test_it_is_scored_by_every_reward_and_changes_nothing_else():
    without, calls = search(None)
    done, more = search("original answer")
    assert replace(done, prompt=without.prompt, original=None) == without and without.original is None
    assert dict(done.original.rewards) == {"r": 15.0, "s": 15.0, "h": 115.0}
    scale = (done.best.reward - done.base.reward) / (len(done.best.text) - len(done.base.text))
    assert done.original.reward == pytest.approx(done.base.reward + scale * (15 - len("base"))), (
        "combined as all others"
    )
    assert [call for call in more if "original answer" not in call[1]] == calls
    assert all(len(texts) == 1 for _, texts in more if "original answer" in texts), "it is in no other answer's batch"


def test_it_may_have_no_score():
    done, _ = search("bad", fails=("bad",))
    assert done.original == Original(None, (("r", None), ("s", None), ("h", None)))
    done, calls = search("<think>unfinished", thinking="strip")
    assert done.original == Original(None, (("r", None), ("s", None), ("h", None)))
    assert not any("unfinished" in text for _, texts in calls for text in texts)


def test_rewards_see_it_without_its_thinking():
    done, calls = search("<think>why</think>abcd", thinking="strip")
    assert dict(done.original.rewards) == {"r": 4.0, "s": 4.0, "h": 104.0} and ("r", ("abcd",)) in calls
    assert done.prompt.original == "<think>why</think>abcd"


# The table


def table(root, texts):
    """A whole output of eight inputs that came with these answers in turn; the inputs and their results by id."""
    inputs, results = [], {}
    for i in range(8):
        line, text = prompt(i), texts[i % len(texts)]
        if isinstance(line, Prompt):
            line = replace(line, columns=(), original=text)
        inputs.append(line)
        found = result(line)
        if isinstance(found, Done) and text is not None:
            found = replace(found, original=Original(0.5, (("main", 0.5), ("words", None))))
        results[line.id] = found
    manifest.write_run(at(root), RUN | {"columns": COLUMNS})
    rows = store(root, columns=COLUMNS)
    for line in rows.plan(inputs):
        rows.add(results[line.id])
    rows.finish()
    return inputs, results


@pytest.mark.parametrize("texts", [["a", None], [None], ["a", "b"]])
def test_the_schema_is_one_whatever_the_rows_are(texts, tmp_path):
    inputs, results = table(tmp_path, texts)
    assert verify(at(tmp_path), inputs).violations == ()
    schemas = schema.schemas("chat", COLUMNS)
    for name, expected in (("data", schemas.data), ("failed", schemas.failed)):
        found = at(tmp_path).dataset(name).to_table()
        assert found.schema.equals(expected)
        for row in found.to_pylist():
            text = getattr(results[row["id"]].prompt, "original", None)
            assert row["original_completion"] == text
            if name == "data":
                scores = [{"name": "main", "value": 0.5}, {"name": "words", "value": None}]
                assert row["original_reward"] == (None if text is None else 0.5)
                assert row["original_rewards"] == (None if text is None else scores)


@pytest.mark.parametrize("change", [{"original_completion": None}, {"original_rewards": None}])
def test_an_answer_and_its_scores_come_together(change, tmp_path):
    table(tmp_path, ["a"])
    edit(tmp_path / "data/part-000000.parquet", lambda rows: rows[0].update(change))
    (broken,) = verify(at(tmp_path)).violations
    assert "an original_completion without its scores, or scores without it" in broken


def test_the_columns_are_there_with_the_key_alone():
    names = schema.schemas("chat", {}).data.names
    assert not [name for name in names if name.startswith("original")]
    assert [n for n in schema.schemas("chat", COLUMNS).data.names if n not in names] == [
        "original_completion",
        "original_reward",
        "original_rewards",
    ]
    assert schema.column_types((), [], True) == COLUMNS
    assert schema.column_types(("a",), [], True) == {"a": "json", "kept_as_json": "misfits"} | COLUMNS
    for name in ("original_completion", "original_reward", "original_rewards"):
        with pytest.raises(ConfigError, match=f"{name!r} is a column of the output itself"):
            schema.check_kept([name])


# After the search


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A project with a finished output: two dialogues that came with an answer, and a prompt without one."""
    folder = finished.project(tmp_path_factory.mktemp("answers"))
    lines(
        folder / "prompts.jsonl",
        [dialogue("What is it?", "aaaa"), dialogue("Why?", "bcd xyz xyz xyz"), {"prompt": "How?"}],
    )
    finished.output(folder, "out", prompts=PROMPTS)
    return folder


PROMPTS = {"id_column": None, "keep": [], "drop_last_answer": True}


def rewards(folder):
    """The rewards of a project, by hand."""
    names: dict = {}
    exec((folder / "rewards.py").read_text(), names)
    return {"main": names["vowels"], "words": names["words"]}


def rows_of(output):
    return pq.read_table(output / "data").to_pylist()


def test_the_rows_have_the_scores_of_the_answers_that_were_there(folder):
    rows = rows_of(folder / "out")
    assert [row["original_completion"] for row in rows] == ["aaaa", "bcd xyz xyz xyz", None]
    for row in rows[:2]:
        answer = [[{"role": "assistant", "content": row["original_completion"]}]]
        found = {score["name"]: score["value"] for score in row["original_rewards"]}
        assert found == {name: reward(answer)[0] for name, reward in rewards(folder).items()}
        assert row["original_reward"] == found["main"]
    assert (rows[2]["original_reward"], rows[2]["original_rewards"]) == (None, None)


def test_relabel_yields_the_same_rows(folder):
    values = json.loads((folder / "out" / "run.json").read_text())["config"]
    for reward in values["rewards"].values():
        reward["function"] = f"{folder}/{reward['function']}"
    found = list(aisp_dist.relabel(values))
    same = [{key: value for key, value in row.items() if key not in ("run_id", "reason")} for row in found]
    assert same == [{key: value for key, value in row.items() if key != "run_id"} for row in rows_of(folder / "out")]


def test_rescoring_scores_them_too_and_asks_only_for_what_has_changed(folder, monkeypatch):
    out = rows_of(folder / "out")
    same = rescored(folder, "same", combine="weighted_sum")
    assert [row | {"run_id": ""} for row in same] == [row | {"run_id": ""} for row in out]
    held = {"kind": "function", "function": "rewards.py:vowels", "use": "report"}
    turned = {"words": {"kind": "function", "function": "rewards.py:words"}, "main": held, "new": held}
    asked = []
    monkeypatch.setattr(_Scorer, "score", watch(_Scorer.score, asked))
    for row, old in zip(rescored(folder, "turned", rewards=turned), out, strict=True):
        scores = [{s["name"]: s["value"] for s in r["original_rewards"] or ()} for r in (row, old)]
        assert row["original_reward"] == scores[1].get("words")
        assert scores[0] == ({**scores[1], "new": scores[1]["main"]} if scores[1] else {})
    originals = {"aaaa", "bcd xyz xyz xyz"}
    assert {name for name, texts in asked if originals & set(texts)} == {"new"}


def watch(own, asked):
    def score(self, name, prompt, texts):
        asked.append((name, texts))
        return own(self, name, prompt, texts)

    return score


def rescored(folder, out, **config):
    (folder / f"{out}.yaml").write_text(yaml.safe_dump(config))
    words = ["rescore", str(folder / "out"), "--config", str(folder / f"{out}.yaml"), "--out", str(folder / out)]
    for verb, *args in (words, ["verify", str(folder / out)]):
        with pytest.raises(SystemExit) as ended:
            cli.run(verb, args)
        assert ended.value.code == 0
    return rows_of(folder / out)


def test_the_summary_says_whether_the_new_answers_are_better(folder):
    said = summary.text(summary.read(Place.at(folder / "out")))
    rows = rows_of(folder / "out")[:2]
    better = sum(row["reward"] > row["original_reward"] for row in rows) / 2
    equal = sum(row["reward"] == row["original_reward"] for row in rows) / 2
    found = f"2 prompts came with an answer: the selected one is better for {better:.1%}, equal for {equal:.1%}"
    assert found in said
    mean = sum(row["original_reward"] for row in rows) / 2
    table = said.split("original  ")[1]
    assert table.splitlines()[1].split()[:2] == ["reward", f"{mean:.3f}"] and "held out: words" in table
    plain = finished.output(folder, "plain", prompts={"id_column": None, "keep": []})
    said = summary.text(summary.read(Place.at(plain))).splitlines()
    assert not [line for line in said if "original" in line and " failed: " not in line], "but in a reason"


def test_the_comparison_and_the_report_say_so_too(folder):
    found = contents.read([Place.at(folder / "out")])
    originals, rows = found.comparison.originals, rows_of(folder / "out")[:2]
    assert (originals.prompts, originals.better) == (2, sum(row["reward"] > row["original_reward"] for row in rows) / 2)
    names = {"original": "original_reward", "base": "base_reward", "main": "reward"}
    for name, column in names.items():
        assert getattr(originals, name).mean == pytest.approx(sum(row[column] for row in rows) / 2)
    said = f"2 prompts came with an answer; out is better for {originals.better:.1%} of them"
    assert said in compare.text(found.comparison) and said in page.render(found, 1).decode()
    plain = contents.read([Place.at(finished.output(folder, "without", prompts={"id_column": None, "keep": []}))])
    assert plain.comparison.originals is None and "came with an answer" not in page.render(plain, 1).decode()


def test_pairs_are_made_where_the_selected_answer_is_better(folder, tmp_path):
    words = [str(folder / "out"), "--to", "dpo", "--rejected", "original", "--out", str(tmp_path / "pairs")]
    assert export.main(words) == 0
    pairs = pq.read_table(tmp_path / "pairs/dpo").to_pylist()
    rows = {row["id"]: row for row in rows_of(folder / "out")}
    better = [id for id, row in rows.items() if row["original_reward"] and row["reward"] > row["original_reward"]]
    assert [pair["id"] for pair in pairs] == better
    for pair in pairs:
        row = rows[pair["id"]]
        assert pair["chosen"] == row["completion"] and pair["rejected"][0]["content"] == row["original_completion"]
        assert (pair["chosen_reward"], pair["rejected_reward"]) == (row["reward"], row["original_reward"])
