"""`aisp evaluate` on outputs that were searched for real: what it writes, and what it refuses, writing nothing."""

from __future__ import annotations

import json
import math
import re
import shutil
from operator import eq, gt, lt

import finished
import judge_server
import numpy as np
import pyarrow.parquet as pq
import pytest
from finished import AISP, BEST_OF_N

from aisp_dist.analysis import outputs
from aisp_dist.analysis.evaluate import evaluated
from aisp_dist.analysis.evaluate.document import TEXTS
from aisp_dist.analysis.evaluate.document import measure as document_measure
from aisp_dist.analysis.metrics import diversity
from aisp_dist.config import ConfigError
from aisp_dist.engine import checkpoints
from aisp_dist.output.filesystem import Place
from jobs import cli

NAMES = ("diversity", "repetition", "immediate_repeat", "reward", "nll", "tokens", "reward main", "reward words")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with outputs that tests read and never change."""
    folder = finished.project(tmp_path_factory.mktemp("project"))
    finished.output(folder, "one")
    finished.output(folder, "two", seed=1)
    finished.output(folder, "best", BEST_OF_N)
    finished.output(folder, "bare", save={"candidates": "none", "trace": False})
    finished.output(folder, "tokenless", {**AISP, "noise": {"ar1": 0.5}}, save={"candidates": "none"})
    return folder


@pytest.fixture
def here(project, tmp_path, monkeypatch):
    """A copy of the outputs, as the current directory; models and inputs stay where they are."""
    for name in ("one", "two", "best", "bare", "tokenless"):
        shutil.copytree(project / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.run("evaluate", list(args))
    said = capsys.readouterr()
    return left.value.code, said.out, said.err


def document(capsys, *args: str) -> dict:
    code, out, err = evaluate(capsys, *args)
    assert code == 0, err
    found = json.loads((finished.Path(args[0]) / "evaluation.json").read_text())
    assert all(why in out for why in found["omitted"].values()) and all(name in out for name in found["measures"])
    return found


def table(folder) -> list[dict]:
    return pq.read_table(folder / "data").to_pylist()


def test_all_measures_of_one_output(here, capsys):
    found, rows = document(capsys, "one"), table(here / "one")
    assert (found["prompts"], found["sampled"], found["trials"], found["left_out"]) == (6, 6, 1, 0)
    assert set(found["measures"]) == {*NAMES, "reward_length_correlation"}
    for name, column in (("reward", "reward"), ("nll", "nll"), ("tokens", "num_tokens")):
        sides = found["measures"][name]
        selected, base = (np.array([row[prefix + column] for row in rows]) for prefix in ("", "base_"))
        assert [sides[s][0] for s in ("selected", "base")] == pytest.approx([selected.mean(), base.mean()])
        assert sides["difference"][0] == pytest.approx((selected - base).mean())
        assert sides["selected"][1] <= sides["selected"][0] <= sides["selected"][2]
    said = np.mean([diversity(row["completion"][0]["content"]) for row in rows])
    assert found["measures"]["diversity"]["selected"][0] == pytest.approx(said)
    assert sum(found["finish_reasons"].values()) == pytest.approx(1)
    assert found["reward_std_over_trials"] is None and found["win_rate"] is None and found["against"] is None
    assert [one["iteration"] for one in found["flips"]] == [0, 1, 2]
    assert all(0 < one["rate"][0] < 1 for one in found["flips"])
    assert found["kl"]["exact"][1] > 0 and found["kl"]["control"][0] > 0
    assert math.isfinite(found["kl"]["estimate"][0])
    assert set(found["omitted"]) == {"coherence", "win_rate"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    with pytest.raises(SystemExit) as left:
        cli.run("verify", ["one"])
    assert left.value.code == 0


def test_the_same_command_writes_the_same_and_a_sample_is_of_the_seed(here, capsys):
    first = document(capsys, "one", "--sample", "3")
    assert document(capsys, "one", "--sample", "3") == first and first["sampled"] == 3
    assert document(capsys, "one", "--sample", "3", "--seed", "5")["kl"] != first["kl"]


def test_measures_do_not_depend_on_how_rows_are_batched(here):
    output = outputs.open_output(Place.at(here / "one"))
    whole, single = outputs.read(output, TEXTS), outputs.read(output, TEXTS, batch_rows=1)
    assert whole.rows.equals(single.rows) and list(whole.rows.index) == [f"p{i}" for i in range(6)]
    rows = evaluated.rows(whole, ["p5", "p0"])  # of two parts, in the order that was asked for
    assert [row["id"] for row in rows] == ["p5", "p0"] and all(len(row["trace"]) == 3 for row in rows)
    assert all(len(row["tokens"]) == row["num_tokens"] for row in rows)
    assert output.prompt(rows[0]).columns == (("note", {"n": 5}),)


def test_seeds_are_averaged_and_their_means_deviate(here, capsys):
    found = document(capsys, "one", "two")
    means = [np.mean([row["reward"] for row in table(here / name)]) for name in ("one", "two")]
    assert found["trials"] == 2 and found["measures"]["reward"]["selected"][0] == pytest.approx(np.mean(means))
    assert found["reward_std_over_trials"] == pytest.approx(np.std(means, ddof=1)) and means[0] != means[1]
    assert (here / "two/evaluation.json").read_bytes() == (here / "one/evaluation.json").read_bytes()
    alone = [document(capsys, name, "--seed", "0")["kl"]["exact"][0] for name in ("one", "two")]
    assert found["kl"]["exact"][0] == pytest.approx(np.mean(alone))


def test_a_difference_is_paired_over_the_prompts_that_have_both():
    x, nan = np.array([1.0, 5.0, -2.0, 8.0]), float("nan")
    assert document_measure(x + 2, x)["difference"] == (2, 2, 2)
    some = document_measure(np.array([3.0, nan, nan]), np.array([1.0, 4.0, nan]))
    assert some == {"selected": (3, 3, 3), "base": some["base"], "difference": (2, 2, 2)} and some["base"].mean == 2.5
    assert document_measure(np.array([nan]), np.array([nan])) == dict.fromkeys(("selected", "base", "difference"))


@pytest.mark.parametrize("method", [AISP, BEST_OF_N], ids=["aisp", "best_of_n"])
def test_searches_that_spend_adaptively_are_measured_as_far_as_each_went(tmp_path, capsys, method):
    folder = finished.project(tmp_path / "project")
    spend = {"plateau": 1, "max_iterations": 6}
    output = finished.output(folder, "spent", method | {"num_samples": 2, "num_iterations": 2, "spend": spend})
    ran = [len(row["curve"]) for row in table(output)]
    assert min(ran) < max(ran) > 2, "the searches tell nothing"
    found = document(capsys, str(output))
    assert [(one["iteration"], one["prompts"]) for one in found["flips"]] == [
        (k, sum(n > k for n in ran)) for k in range(max(ran))
    ]
    assert all(0 <= one["rate"][0] <= 1 for one in found["flips"])
    columns = outputs.read(outputs.open_output(Place.at(output)))
    assert columns.output.most_iterations == 6 and columns.output.budget == 4


def test_best_of_n_has_no_kl_and_its_noise_flips(here, capsys):
    found = document(capsys, "best")
    assert found["kl"] is None and "undefined for best-of-n gaussian" in found["omitted"]["kl"]
    assert len(found["flips"]) == 3


def test_what_the_output_does_not_keep_is_left_out_with_the_setting_that_keeps_it(here, capsys):
    bare, tokenless = document(capsys, "bare"), document(capsys, "tokenless")
    assert bare["kl"] is bare["flips"] is None
    assert all("save.trace: true" in bare["omitted"][name] for name in ("kl", "flips"))
    assert tokenless["kl"]["exact"][0] > 0 and tokenless["flips"] is None
    assert "save.candidates: {top_bottom: 1}" in tokenless["omitted"]["flips"]
    assert "--no-model" in document(capsys, "one", "--no-model")["omitted"]["kl"]


def test_further_rewards_score_both_answers(here, project, capsys):
    (here / "extra.py").write_text(
        "def length(completions, note, **_):\n"
        "    return [float(len(c[-1]['content'])) + n['n'] for c, n in zip(completions, note)]\n"
        "def some(prompts, completions, **_):\n"
        "    if prompts[0][-1]['content'].endswith('3'):\n        raise ValueError('no three')\n"
        "    return [None] + [1.0] * (len(completions) - 1)\n"
    )
    (here / "extra.yaml").write_text("rewards:\n  length: {kind: function, function: 'extra.py:length', use: report}\n")
    found = document(capsys, "one", "--config", "extra.yaml", "--reward", "some=extra.py:some", "--no-model")
    rows = table(here / "one")
    said = [len(row["completion"][0]["content"]) + row["source_index"] for row in rows]
    assert found["measures"]["reward length"]["selected"][0] == pytest.approx(np.mean(said))
    some = found["measures"]["reward some"]
    assert some["selected"] is None and some["base"] == [1, 1, 1] and some["difference"] is None
    assert "2 of 12 answers are left out" in found["omitted"]["reward some"] and "no three" in str(found["omitted"])


def test_against_another_method_the_differences_are_paired(here, capsys):
    found = document(capsys, "one", "--against", "best", "--no-model")["against"]
    ours, theirs = ({row["id"]: row["reward"] for row in table(here / name)} for name in ("one", "best"))
    assert found["prompts"] == 6
    assert found["differences"]["reward"][0] == pytest.approx(np.mean([ours[id] - theirs[id] for id in ours]))
    itself = document(capsys, "one", "--against", "one", "--no-model")["against"]["differences"]
    assert all(value == [0, 0, 0] for value in itself.values())


@pytest.fixture
def judge():
    """A judge that likes the longer answer, if it is not asked about the third prompt."""
    with judge_server.serving() as told:

        def answer(_, body):
            question = body["messages"][1]["content"]
            if "\nSay 3\n" in question:
                return judge_server.chat("No.")
            a, b = re.search(r"\[Answer A\]\n(.*)\n\[End.*\[Answer B\]\n(.*)\n\[End", question, re.S).groups()
            return judge_server.chat(f"A: {9 if len(a) > len(b) else 2}\nB: {9 if len(b) > len(a) else 2}")

        told.answer = answer
        yield told


def test_the_judge_compares_with_the_base_or_with_the_other_output(here, capsys, judge):
    def lengths(ours, theirs):
        pairs = [(len(a), len(b)) for a, b in zip(ours, theirs, strict=True)]
        return [sum(won(a, b) for i, (a, b) in enumerate(pairs) if i != 3) / 5 for won in (gt, eq, lt)]

    judged = ["--judge", judge.url, "--judge-model", "j", "--no-model"]
    said = {name: [row["completion"][0]["content"] for row in table(here / name)] for name in ("one", "best")}
    base = [row["base_completion"] for row in table(here / "one")]
    found = document(capsys, "one", *judged)
    assert found["win_rate"]["against"] == "base" and found["win_rate"]["unparsed"] == 1
    assert [found["win_rate"][k] for k in ("win", "tie", "loss")] == pytest.approx(lengths(said["one"], base))
    assert found["win_rate"]["interval"][0] <= found["win_rate"]["win"] <= found["win_rate"]["interval"][1]
    assert "1 of 6 comparisons are left out" in found["omitted"]["win_rate"]
    asked = len(judge.seen)
    assert document(capsys, "one", *judged) == found and len(judge.seen) <= asked  # from judge.jsonl
    found = document(capsys, "one", "--against", "best", *judged)
    assert found["win_rate"]["against"].endswith("best") and len(judge.seen) > asked
    assert [found["win_rate"][k] for k in ("win", "tie", "loss")] == pytest.approx(lengths(*said.values()))


def test_a_judge_that_does_not_answer_is_no_measure(here, capsys, judge):
    judge.faults = [(401, {})] * 20
    code, _, err = evaluate(capsys, "one", "--judge", judge.url, "--judge-model", "j", "--no-model")
    assert code == 1 and "401" in err and "same command" in err and not (here / "one/evaluation.json").exists()


def test_an_output_on_s3(here, capsys, server, monkeypatch):
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    for file in (here / "one").rglob("*"):
        if file.is_file():
            server.client.upload_file(str(file), "bucket", f"run/{file.relative_to(here / 'one')}")
    code, _, err = evaluate(capsys, "s3://bucket/run")
    assert code == 0, err
    found = json.loads(server.client.get_object(Bucket="bucket", Key="run/evaluation.json")["Body"].read())
    assert found == document(capsys, "one")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere"], "holds no run (no run.json)"),
        (["one", "--sample", "0"], "--sample 0"),
        (["one", "one"], "seed 0: two of the outputs have it"),
        (["one", "best"], ", method.kind, "),
        (["one", "--embeddings", "./no-model"], "'./no-model' is not a directory"),
        (["one", "--reward", "main=x.py:f"], "main is a reward of the run already"),
        (["one", "--reward", "new=x.py:f"], "no file"),
        (["one", "--reward", "new={kind: function}"], "rewards.new"),
        (["one", "--reward", "new=./nowhere"], "rewards.new.model: './nowhere' is not a directory"),
        (["one", "--config", "missing.yaml"], "missing.yaml"),
        (["one", "--judge", "http://127.0.0.1:1/v1"], "a judge needs both"),
        (["one", "--judge-key-env", "KEY"], "a judge needs both"),
        (["one", "--judge", "ftp://x", "--judge-model", "j"], "not of the form http"),
        (["one", "--judge", "http://x/v1", "--judge-model", "j", "--judge-key-env", "NOT_SET"], "NOT_SET is not set"),
    ],
)
def test_refusals_write_nothing(here, capsys, args, said):
    code, out, err = evaluate(capsys, *args)
    assert code == 2 and said in err and err.count("\n") == 1 and "Traceback" not in err and out == ""
    assert not list(here.glob("*/evaluation.json"))


def test_other_prompts_are_refused_with_what_differs(tmp_path, here, capsys):
    other = finished.project(tmp_path / "other", count=4)
    finished.output(other, "few", BEST_OF_N, prompts={"begin": "Human:"})
    code, _, err = evaluate(capsys, "one", "--against", str(other / "few"), "--no-model")
    assert code == 2 and "4 ids are shared" in err and "2 are missing there" in err and "prompts.begin" in err
    assert not (here / "one/evaluation.json").exists()


def test_an_unfinished_output_says_how_many_rows_are_missing(tmp_path, capsys):
    folder = finished.project(tmp_path / "project")
    finished.output(folder, "out")
    with (folder / "prompts.jsonl").open("a") as stream:
        stream.write('{"name": "new", "prompt": "one more", "note": null}\n')
    code, _, err = evaluate(capsys, str(folder / "out"))
    assert code == 2 and "1 of 7 rows are missing" in err and not (folder / "out/evaluation.json").exists()
    (folder / "prompts.jsonl").unlink()
    code, _, err = evaluate(capsys, str(folder / "out"), "--no-model")
    assert code == 0 and "cannot be told" in err


def test_a_base_model_of_other_files_is_refused(tmp_path, capsys):
    folder = finished.project(tmp_path / "project")
    finished.output(folder, "out")
    (folder / "model/notes.txt").write_text("changed")
    checkpoints.digest.cache_clear()
    code, _, err = evaluate(capsys, str(folder / "out"))
    assert code == 2 and "generator.model (now" in err and not (folder / "out/evaluation.json").exists()
    assert evaluate(capsys, str(folder / "out"), "--no-model")[0] == 0


def test_no_done_row_is_nothing_to_measure(tmp_path):
    folder = finished.project(tmp_path / "project", count=0)
    finished.output(folder, "out")
    with pytest.raises(ConfigError, match="no done row"):
        outputs.check_finished(outputs.open_output(Place.at(folder / "out")), 0)
