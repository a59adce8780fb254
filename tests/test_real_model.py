"""The protocol on a real model: its split and its tables, and a run of every arm that resumes."""

from __future__ import annotations

import asyncio
import gzip
import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import tiny

from aisp_dist import relabel
from aisp_dist.records import Rollout, Round, Sampling, TopP, Trajectory
from tests.bench.real_model import __main__ as program
from tests.bench.real_model import noisy, rewards, student, table, tasks

REWARD = """
def vowels(completions, **_):
    return [float(sum(letter in "aeiou" for letter in c[-1]["content"])) for c in completions]
"""
FIRST = ("1132", "1325", "k6kewo")
SMALL = ["--task", "shp", "--prompts", "2", "--samples", "32", "--tuning-prompts", "1", "--tuning-samples", "16"]


def test_the_split_is_fixed_and_no_prompt_is_in_two_parts(real_data):
    for task, first in (("ifeval", {"tune": FIRST[0], "student-test": FIRST[1]}), ("shp", {"report": FIRST[2]})):
        rows = tasks.lines(task, real_data / "data")
        parts = tasks.split(task, rows)
        assert parts == tasks.split(task, reversed(rows))
        assert {part: len(of) for part, of in parts.items()} == tasks.SPLITS[task]
        assert len({row["id"] for of in parts.values() for row in of}) == sum(tasks.SPLITS[task].values())
        assert {part: parts[part][0]["id"] for part in first} == first


def test_every_arm_spends_the_same_in_the_same_number_of_trials():
    for arm in tasks.ARMS.values():
        assert len(arm.points) == 4 == len({json.dumps(point) for point in arm.points})
        for point in arm.points:
            method = program.load.check(
                {"output": "o", "generator": {"model": "m"}, "rewards": tasks.REWARDS["shp"]}
                | {"method": arm.method(point, 64)}
            ).method
            assert method.num_samples * method.num_iterations == 64
    for arm in (tasks.FIXED | tasks.SENSITIVITY).values():
        (point,) = arm.points
        job = program.Job("report", "shp", "a", arm.method(point, 64), 0, [], 8)
        method = program._settings(tasks.run_values("shp", Path("p"), "m", 8, "auto"), job).method
        assert method.num_iterations == 64 // arm.together and not method.is_shuffled
    assert set(tasks.CONTROLS.values()) < tasks.ARMS.keys() | tasks.FIXED.keys()
    with pytest.raises(ValueError, match="--samples: 24 is not a multiple of 16"):
        tasks.ARMS["qalign, 16 chains"].method({}, 24)


def record(values, drawn, one="p", together=1):
    best = [{"at": i, "reward": v, "nll": -v} for i, v in enumerate(values) if v > max(values[:i], default=-1e9)]
    seconds = [float(1 + i // 2) for i in range(len(values))]  # iterations of two
    base = {"reward": -5.0, "nll": 0.0, "tokens": 3}
    return {
        "id": one,
        "rewards": values,
        "drawn": drawn,
        "seconds": seconds,
        "best": best,
        "base": base,
        "together": together,
    }


def test_equal_samples_tokens_and_seconds_are_what_best_of_n_spent_on_the_same_prompt():
    peer = record([1.0, 3.0, 2.0, 4.0], [10, 10, 10, 10])
    thrifty = record([0.0, 1.0, 5.0, 6.0], [10, 2, 2, 2])
    assert [table.spent(thrifty, "samples", n) for n in (1, 2, 9)] == [1, 2, 4]
    assert [table.spent(thrifty, "tokens", table.cost(peer, "tokens", n)) for n in (1, 2, 4)] == [1, 4, 4]
    assert [table.spent(thrifty, "seconds", s) for s in (0.1, 1.0, 2.0)] == [2, 2, 4]
    for n in range(1, 5):
        assert table.best(peer, n)["reward"] == list(accumulate(peer["rewards"], max))[n - 1]
    found = {tasks.BEST: {("p", 0): peer}, "thrifty": {("p", 0): thrifty}}
    rows = {(r["equal"], r["budget"], r["arm"]): r for r in table.rows("t", found, [2, 4])}
    assert rows["samples", 2, "thrifty"][f"reward, less {tasks.BEST}"].mean == 1.0 - 3.0
    assert rows["tokens", 2, "thrifty"][f"reward, less {tasks.BEST}"].mean == 6.0 - 3.0
    assert rows["tokens", 2, "thrifty"]["mean samples"] == 4 and rows["samples", 4, "greedy"]["reward"].mean == -5


def test_an_arm_less_itself_is_nothing_and_prompts_are_paired():
    of = {(f"p{i}", seed): record([i + seed, 2.0 * i], [5, 5], f"p{i}") for i in range(6) for seed in range(2)}
    few = {key: value for key, value in of.items() if key[0] != "p5"}
    more = {("another", 0): record([9.0, 9.0], [5, 5], "another")}
    for row in table.rows("t", {tasks.BEST: of, "same": of, "few": few, "more": of | more}, [1, 2]):
        if row["arm"] != "greedy" and row["equal"] != "seconds":  # one iteration has both samples
            assert row[f"reward, less {tasks.BEST}"] == row[f"nll, less {tasks.BEST}"] == (0, 0, 0)
            assert (row["prompts"], row["seeds"]) == (5 if row["arm"] == "few" else 6, 2)


def test_a_run_that_was_interrupted_has_a_table_of_the_prompts_that_all_arms_finished(tmp_path):
    for name, ids in ((tasks.BEST, "abc"), ("late", "cb"), ("aside", "a")):
        place = tmp_path / "report" / "t" / name / "0.jsonl"
        place.parent.mkdir(parents=True)
        place.write_text("".join(json.dumps(record([1.0, 2.0], [5, 5], one)) + "\n" for one in ids) + '{"id": "torn')
    found = table.tables(tmp_path, 8, "report", [tasks.BEST, "late", "not begun"])
    assert {(row["arm"], row["prompts"]) for row in found} == {(name, 2) for name in ("greedy", tasks.BEST, "late")}
    assert {row["prompts"] for row in table.tables(tmp_path, 8, "report", [tasks.BEST])} == {3}
    with pytest.raises(ValueError, match="run --stage tune first"):
        table.best_trial([tmp_path / "tune/t/a/0/0.jsonl"])


def test_seconds_of_prompts_that_ran_together_are_not_compared():
    of = {("p", 0): record([1.0, 2.0], [5, 5], together=4)}
    assert {row["equal"] for row in table.rows("t", {tasks.BEST: of}, [1, 2])} == {"samples", "tokens"}


def test_copied_counts_what_stands_in_the_prompt():
    prompt = "write a poem about the sea and the moon"
    assert rewards.copied("Write a poem about the sea", prompt) == 1
    assert rewards.copied("the sea is calm tonight and deep", prompt) == 0 == rewards.copied("write a poem", prompt)
    assert rewards.copied("write a poem about cats", prompt) == 1 / 2


def test_ifeval_is_scored_by_its_checkers(real_data):
    checks = [("punctuation:no_comma", {}), ("startend:quotation", {})]
    assert [rewards.share(t, checks) for t in ('"Fine."', '"So, fine."', "Fine.", "a, b", "")] == [1, 0.5, 0.5, 0, 0]
    for row in tasks.lines("ifeval", real_data / "data"):
        assert rewards.followed(["Yes, of course."] * 2, [row["checks"]] * 2)[0] in {n / 6 for n in range(7)} | {
            0.25,
            0.75,
        }


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    tiny.save("llama", folder / "model")
    (folder / "vowels.py").write_text(REWARD)
    with gzip.open(folder / "shp_test_500.jsonl.gz", "wt") as file:
        for i in range(78):
            file.write(json.dumps({"post_id": f"q{i}", "history": f"Why {i}?", "preferred": "So."}) + "\n")
    return folder


def test_a_run_tunes_measures_every_arm_and_resumes(project, monkeypatch, capsys):
    reward = {"alike": {"kind": "function", "function": str(project / "vowels.py:vowels")}}
    monkeypatch.setitem(tasks.REWARDS, "shp", reward)
    out = project / "out"
    args = ["--model", str(project / "model"), "--data", str(project), "--out", str(out), "--tokens", "8", *SMALL]
    program.main([*args, "--estimate"])
    assert "report: at most 576 samples" in capsys.readouterr().out and not out.exists()
    program.main(args)
    found = table.arms(out, "shp")
    assert found.keys() == tasks.ARMS.keys() | {c for c, of in tasks.CONTROLS.items() if of in tasks.ARMS}
    prompts = [row["id"] for row in tasks.split("shp", tasks.lines("shp", project))["report"][:2]]
    for name, of in found.items():
        assert [one for one, _ in of] == prompts
        for one in of.values():
            assert len(one["rewards"]) == len(one["drawn"]) == len(one["seconds"]) == 32
            assert one["best"][-1]["reward"] == max(one["rewards"])
            assert one["seconds"] == sorted(one["seconds"]) and one["seconds"][0] > 0
            assert min(one["drawn"]) > 0 and one["method"].get("shuffle_rewards", False) == ("shuffled" in name)
    assert (out / "report.json").exists() and "at the tokens of best-of-n" in capsys.readouterr().out

    place = out / "report/shp/population/0.jsonl"
    before = place.read_text()
    place.write_text(before.splitlines()[0] + '\n{"id": "torn')
    program.main([*args, "--arms", "population", "--arms", "best-of-n", "--no-controls"])
    mine, again = ([json.loads(line) for line in text.splitlines()] for text in (before, place.read_text()))
    timeless = [[{k: v for k, v in one.items() if k != "seconds"} for one in of] for of in (mine, again)]
    assert timeless[0] == timeless[1]
    monkeypatch.setattr(program, "LocalBackend", None)
    program.main(args)
    with pytest.raises(ValueError, match="give another --out"):
        program.main([*args, "--samples", "16"])
    with pytest.raises(ValueError, match="give another --out"):
        program.main([*args, "--tokens", "9"])

    monkeypatch.undo()  # the backend is needed again
    monkeypatch.setitem(tasks.REWARDS, "shp", reward)
    few = [tasks.BEST, "ar1 0.8, flip rate 0.2, ess 0.5"]
    monkeypatch.setattr(program.tasks, "SENSITIVITY", {name: tasks.SENSITIVITY[name] for name in few})
    program.main(
        [*args, "--stage", "sensitivity", "--stage", "report", "--arms", "qalign, beta large", "--together", "3"]
    )
    (of,) = table.arms(out, "shp", "sensitivity")[few[1]].values()
    assert len(of["rewards"]) == 16 and of["method"]["noise"] == {"ar1": 0.8}
    assert {row["arm"] for row in json.loads((out / "sensitivity.json").read_text())} == {"greedy", *few}
    assert len(table.arms(out, "shp")["qalign, beta large"]) == 2

    source = out / "prompts/report-shp.jsonl"
    values = tasks.run_values("shp", source, str(project / "model"), 8, "auto") | {"method": mine[1]["method"]}
    *_, row = relabel(values)
    assert (row["id"], row["reward"]) == (mine[1]["id"], mine[1]["best"][-1]["reward"])
    assert row["completion"][-1]["content"] == mine[1]["best"][-1]["text"]


def test_prompts_are_searched_by_all_arms_before_the_next_one(project, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        tasks.REWARDS, "shp", {"alike": {"kind": "function", "function": f"{project}/vowels.py:vowels"}}
    )
    args = ["--model", str(project / "model"), "--data", str(project), "--out", str(tmp_path), "--tokens", "4", *SMALL]
    program.main(
        [
            *args,
            "--stage",
            "report",
            "--arms",
            "qalign, beta large",
            "--arms",
            "population, defaults",
            "--arms",
            "population, noise beside draws",
            "--no-controls",
        ]
    )
    said = [line.split("prompt ")[1].split(";")[0] for line in capsys.readouterr().err.splitlines() if " of " in line]
    prompts = [row["id"] for row in tasks.split("shp", tasks.lines("shp", project))["report"][:2]]
    assert said == [prompts[0]] * 3 + [prompts[1]] * 3
    for record in table.arms(tmp_path, "shp")["population, noise beside draws"].values():
        assert len(record["drawn"]) == 32 and {0 < n <= 4 for n in record["drawn"]} == {True}


def test_an_interrupted_run_ends_the_engine_and_says_that_it_resumes(project, tmp_path, monkeypatch, capsys):
    closed = []

    class Backend(program.LocalBackend):
        def close(self):
            closed.append(self)
            super().close()

    async def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "LocalBackend", Backend)
    monkeypatch.setattr(program, "_search_all", interrupted)
    args = ["--model", str(project / "model"), "--data", str(project), "--out", str(tmp_path), "--tokens", "4", *SMALL]
    with pytest.raises(SystemExit, match="130"):
        program.main(args)
    assert len(closed) == 1 and not closed[0].service._thread.is_alive()
    assert "the same command resumes" in capsys.readouterr().err


def test_students_learn_from_each_kind_of_answer_and_what_is_finished_is_not_repeated(project, tmp_path, monkeypatch):
    rows = [
        {"key": i, "prompt": f"Say {i}.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        for i in range(306)
    ]
    (tmp_path / "ifeval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = {"followed": {"kind": "function", "function": f"{project}/vowels.py:vowels"}}
    monkeypatch.setitem(tasks.REWARDS, "ifeval", reward)
    args = ["--model", str(project / "model"), "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--tokens", "8"]
    tune = ["--stage", "tune", "--task", "ifeval", "--tuning-prompts", "1", "--tuning-samples", "8", "--settings", "1"]
    program.main([*args, *tune, "--arms", tasks.BEST])
    args += [
        "--arms",
        tasks.BEST,
        "--arms",
        "population, defaults",
        "--settings",
        "1",
        "--prompts",
        "3",
        "--samples",
        "16",
    ]
    args += ["--tests", "4", "--training-seeds", "2"]
    student.main(args)
    found = json.loads((tmp_path / "out/students.json").read_text())
    kinds = ["not trained", student.OWN, "samples at random", tasks.BEST, "population, defaults"]
    assert [row["student"] for row in found["rows"]] == kinds and (found["tests"], found["lessons"]) == (4, 3)
    lessons = student._lessons(tmp_path / "out", student._jobs(student._parser().parse_args(args)))
    best = table.arms(tmp_path / "out", "ifeval", "student")[tasks.BEST]
    assert {r["best"][-1]["text"] for r in best.values()} == {
        r["completion"][0]["content"] for r in lessons[tasks.BEST]
    }
    assert {r["base"]["text"] for r in best.values()} == {r["completion"][0]["content"] for r in lessons[student.OWN]}
    monkeypatch.setattr(student, "_train", None)
    monkeypatch.setattr(student.measure, "answers", None)
    monkeypatch.setattr(program, "LocalBackend", None)
    student.main(args)
    assert json.loads((tmp_path / "out/students.json").read_text()) == found


def test_noise_beside_draws_keeps_what_is_given_and_the_length():
    class Backend:
        tokenizer = tiny.tokenizer()

        async def rollout(self, round):
            asked.append(round)
            return Rollout((Trajectory(round.start, (50, 51, 52, 2), "", "stop"),))

    asked: list[Round] = []
    sampling = Sampling(sigma2=0.5, decode=TopP(0.9, 1.0))
    round = Round(0, "p", (1, 40), 3, 4, 6, sampling, starts=((), (60, 61)))
    long, short = (asyncio.run(noisy.rollout(Backend(), n, round)).trajectories for n in (8, 5))
    assert [t.token_ids for t in long] == [(50, 51, 52, 2), (60, 61, 50, 51, 52, 2)]
    assert [t.token_ids for t in short] == [(50, 51, 52, 2), (60, 61, 50, 51, 52)]
    assert [t.finish_reason for t in (*long, *short)] == ["stop", "stop", "stop", "length"]
    assert long[1].text == short[1].text == Backend.tokenizer.decode([60, 61, 50, 51, 52])
    assert [(r.prompt_tokens, r.start, r.stop) for r in asked[:2]] == [((1, 40), 4, 5), ((1, 40, 60, 61), 5, 6)]
    asyncio.run(noisy.rollout(Backend(), 8, replace(round, sampling=Sampling(decode=TopP(0.9, 1.0)))))
    assert asked[-1].starts == round.starts
