"""Tasks of lm-evaluation-harness: what is refused, that answers find their requests, and that lm-eval's figures are
those of the tables."""

from __future__ import annotations

import functools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray_head
import rows
import yaml
from lm_eval.api.instance import Instance

from aisp_dist.analysis import tasks
from aisp_dist.analysis.export import alpaca_eval
from aisp_dist.config import ConfigError
from aisp_dist.output.filesystem import Place
from jobs import lm_eval
from jobs.cli import Exit

ROOT = Path(__file__).parent.parent
REWARDS = """
import re

def words(prompts, completions, **columns):
    return [float(len(set(c.split()))) for c in completions]

def verifier(prompts, completions, gold, **columns):
    said = [re.findall(r"my (\\w+)", c[-1]["content"]) for c in completions]
    return [float(words[:1] == [g]) for words, g in zip(said, gold)]

def strange(prompts, completions, **columns):
    assert not columns.keys() & {"gold", "answer", "question"} - {"log_extra"}, sorted(columns)
    return words(prompts, completions)
"""
RUN = {
    "output": "out",
    "prompts": {"overlong": "left"},
    "generator": {"model": "demo", "max_new_tokens": 12, "batch_rows": 32},
    "rewards": {"main": {"kind": "function", "function": "rewards.py:strange"}},
    "method": {"kind": "aisp", "num_samples": 4, "num_iterations": 2, "lambda": {"ess": 0.1}},
}


@pytest.fixture(scope="module")
def definitions(tmp_path_factory, real_data):
    folder = tmp_path_factory.mktemp("tasks")
    for file in (ROOT / "tests" / "data" / "tasks").glob("*.yaml"):
        (folder / file.name).write_text(file.read_text().replace("DATA/", f"{real_data}/data/"))
    return folder


@pytest.fixture(scope="module")
def indexed():
    """lm-eval's index of its thousands of tasks, made once: that takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TaskManager", functools.cache(tasks.TaskManager))
        yield


@pytest.fixture
def project(tmp_path, definitions):
    (tmp_path / "tasks").symlink_to(definitions)
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    return tmp_path


@pytest.fixture(scope="module")
def cluster():
    with ray_head.started() as env:
        yield env | {"PYTHONPATH": str(ROOT)}


def run(project: Path, env: dict[str, str], *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.lm_eval", "run.yaml", "--include-path", "tasks", *args]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def answers(project: Path, arm: str, column: str) -> dict[str, dict[str, str]]:
    """By task and document what the Parquet tables of an arm hold."""
    found: dict[str, dict[str, str]] = {}
    for file in (project / "out" / "lm-eval").glob(f"*/{arm}/data/*.parquet"):
        for row in pq.read_table(file).to_pylist():
            found.setdefault(row["id"].split("/")[0], {})[row["id"]] = row[column]
    return found


@pytest.mark.ray
def test_the_figures_are_those_of_the_tables_and_a_second_command_draws_nothing(cluster, project):
    done = run(project, cluster, "--tasks", "gsm8k_local,friend_local", "--limit", "6", "--log-samples")
    assert done.stderr.count("loading models") == 2, "one session for each generation setting, all arms on it"
    assert "do_sample=False" in done.stderr and "generator.max_new_tokens, 12" in done.stderr
    results = json.loads((project / "out" / "lm-eval" / "results.json").read_text())
    assert "oracle" not in results
    values = set()
    for arm, folder, column in (
        ("base", "aisp", "base_completion"),
        ("best-of-n top-p", "best-of-n-top-p", "completion"),
        ("aisp", "aisp", "completion"),
    ):
        found = answers(project, folder, column)
        assert {task: len(rows) for task, rows in found.items()} == {"gsm8k_local": 6, "friend_local": 6}
        hits = [re.findall(r"my (\w+)", text)[:1] == ["friend"] for text in found["friend_local"].values()]
        ours = results["arms"][arm]["results"]["friend_local"]["exact_match,after-my"]
        assert ours == pytest.approx(sum(hits) / 6)
        assert f"{ours:.4f}" in done.stdout
        assert results["arms"][arm]["spent"]["friend_local"]["samples"] == (1 if arm == "base" else 8)
        assert all("." not in text for text in found["friend_local"].values()), "the stop string is cut"
        values.add(ours)
        said = (
            project / "out" / "lm-eval" / "samples" / (arm if arm == "base" else folder) / "gsm8k_local.jsonl"
        ).read_text()
        logged = [json.loads(line) for line in said.splitlines()]
        assert [line["resps"] for line in logged] == [[[found["gsm8k_local"][f"gsm8k_local/{i}/0"]]] for i in range(6)]
    assert len(values) > 1, "figures that are all the same show little"
    again = run(project, cluster, "--tasks", "gsm8k_local,friend_local", "--limit", "6")
    assert again.stdout == done.stdout and "loading models" not in again.stderr
    assert json.loads((project / "out" / "lm-eval" / "results.json").read_text()) == results


@pytest.mark.ray
def test_a_verifier_with_the_gold_answer_is_the_metric_and_says_so(cluster, project):
    rewards = {"main": {"kind": "function", "function": "rewards.py:verifier"}}
    (project / "run.yaml").write_text(yaml.safe_dump(RUN | {"rewards": rewards}))
    args = ["--tasks", "friend_local", "--limit", "4", "--arms", "base,best-of-n", "--apply-chat-template"]
    done = run(project, cluster, *args, "--gold-column", "gold")
    results = json.loads((project / "out" / "lm-eval" / "results.json").read_text())
    assert "upper bound" in done.stdout and "best-of-n top-p (oracle)" in done.stdout and "gold" in results["oracle"]
    for arm in results["arms"].values():
        assert arm["results"]["friend_local"]["exact_match,after-my"] == arm["spent"]["friend_local"]["reward"]
    (group,) = (project / "out" / "lm-eval").glob("*/prompts.jsonl")
    first = json.loads(group.read_text().splitlines()[0])
    assert first.keys() == {"id", "prompt", "gold"} and [m["role"] for m in first["prompt"]] == ["user"]
    (data,) = group.parent.glob("best-of-n-top-p/data/*.parquet")
    assert {row["gold"] for row in pq.read_table(data).to_pylist()} == {"friend"}


def test_a_prompt_without_an_answer_ends_the_command_with_the_reason(tmp_path):
    output = rows.write(tmp_path / "out", rows.prompts(8))
    failed = pq.read_table(tmp_path / "out" / "failed").to_pylist()
    with pytest.raises(Exit, match=f"aisp: {len(failed)} prompts have no answer") as caught:
        lm_eval._read("aisp", Place.at(output))
    assert caught.value.code == 3 and failed[0]["id"] in str(caught.value) and failed[0]["reason"] in str(caught.value)


def instances(count: int) -> list[Instance]:
    settings = [{"until": ["\n"], "max_gen_toks": 5}, {"until": "x"}, {"until": ["\n"], "max_new_tokens": 5}]
    return [
        Instance("generate_until", {"gold": i}, (f"text {i}", settings[i % 3]), 0, (f"task{i % 2}", i // 2, 1))
        for i in range(count)
    ]


def test_answers_come_back_in_the_order_of_the_requests():
    asking = tasks.Asking(9, say=lambda _: None)
    requests = instances(30)
    for seed in range(5):
        random.Random(seed).shuffle(requests)
        asked: list[tasks.Group] = []

        def answer(group, asked=asked):
            asked.append(group)
            return [line["prompt"].upper() for line in group.lines]

        said = tasks.Answering(asking, {}, answer).generate_until(requests)
        assert said == [request.args[0].upper() for request in requests]
        assert sorted((g.stop, g.max_new_tokens, len(g.lines)) for g in asked) == [(("\n",), 5, 20), (("x",), 9, 10)]


def test_a_group_is_named_by_all_that_is_asked():
    def names(requests, *rest, **changes):
        return {group.name for group in tasks.Asking(*rest, say=lambda _: None, **changes).groups(requests, Gold())}

    class Gold(dict):
        def __missing__(self, task):
            return type("Task", (), {"doc_to_target": staticmethod(lambda doc: doc["gold"])})

    requests = instances(6)
    same = names(requests, 9)
    assert same == names(instances(6), 9)
    for other in (
        names(instances(9), 9),
        names(requests, 8),
        names(requests, 4, True),
        names(requests, 9, gold_column="g"),
    ):
        assert same != other


def test_only_a_gold_column_asks_a_task_for_its_answer_and_repeats_are_draws_of_their_own():
    request = instances(1)[0]
    (group,) = tasks.Asking(9, say=lambda _: None).groups([request, request], {})  # no task, so none can be asked
    assert [line["id"] for line in group.lines] == ["task0/0/0", "task0/0/1"]
    assert all(line.keys() == {"id", "prompt"} for line in group.lines)
    with pytest.raises(KeyError):
        tasks.Asking(9, gold_column="gold", say=lambda _: None).groups([request], {})


def test_the_most_tokens_are_the_tasks_unless_capped():
    said: list[str] = []
    request = Instance("generate_until", {}, ("text", {"max_gen_toks": 1024, "temperature": 0.7}), 0, ("task", 0, 1))
    assert tasks.Asking(100, say=said.append).groups([request], {})[0].max_new_tokens == 1024
    assert said == ["task asks for temperature=0.7: not used, since an arm draws as its method does (base: greedily)"]
    assert tasks.Asking(100, True, say=said.append).groups([request], {})[0].max_new_tokens == 100
    assert "max_gen_toks=1024, capped at generator.max_new_tokens, 100" in said[-1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("likelihood_local", ["likelihood_local (loglikelihood)", "no likelihood"]),
        ("mixed_local", ["likelihood_local (loglikelihood)"]),
        ("mmlu", ["(multiple_choice)", "and 53 more"]),
        ("gsm8kk", ["'gsm8kk'", "gsm8k_cot"]),
        ("humaneval_local", ["humaneval_local", "--unsafe-code"]),
        ("truthfulqa_gen", ["truthfulqa/truthful_qa", "reachable"]),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(indexed, definitions, name, words):
    with pytest.raises(ConfigError) as caught:
        tasks.load([name], str(definitions), False)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_code_that_may_run_is_loaded(indexed, definitions):
    (task,) = tasks.load(["humaneval_local"], str(definitions), True)
    assert len(task.eval_docs) == 164


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--tasks: give names"),
        (["--tasks", "gsm8k", "--limit", "0"], "--limit is 0"),
        (["--tasks", "gsm8k", "--num-fewshot", "-1"], "--num-fewshot is -1"),
        (["--tasks", "gsm8k", "--arms", "base,best"], "'best' is not among base, best-of-n-top-p"),
        (["--tasks", "gsm8k", "--gold-column", "reward"], "'reward' is a column of the output itself"),
        (["--tasks", "gsm8k", "--output", "s3://bucket/run"], "is not a local directory"),
    ],
)
def test_faults_of_the_command_are_found_before_lm_eval_is(project, args, words, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: pytest.fail("too late"))
    with pytest.raises(ConfigError, match=re.escape(words)):
        lm_eval.main([str(project / "run.yaml"), *args])


def test_gold_needs_a_function_and_a_missing_extra_is_named(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'aisp-dist[tasks]'")):
        lm_eval.main(["run.yaml", "--tasks", "gsm8k"])
    (project / "run.yaml").write_text(yaml.safe_dump(RUN | {"rewards": {"rm": {"kind": "model", "model": "demo"}}}))
    with pytest.raises(ConfigError, match="none of the rewards is one"):
        lm_eval.main(["run.yaml", "--tasks", "gsm8k", "--gold-column", "gold"])
    assert not (project / "out").exists()


def test_alpaca_eval_takes_one_question_and_its_answer():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    said = [{"role": "assistant", "content": "Because."}]
    table = [
        {"id": "a", "prompt": turns, "completion": said, "dataset": "koala"},
        {"id": "b", "prompt": "How?", "completion": "So."},
    ]
    assert [alpaca_eval(row, "demo + best_of_n") for row in table] == [
        {"dataset": "koala", "instruction": "Why?", "output": "Because.", "generator": "demo + best_of_n"},
        {"dataset": "unknown", "instruction": "How?", "output": "So.", "generator": "demo + best_of_n"},
    ]
    with pytest.raises(ValueError, match="prompt c has the turns user, assistant, user"):
        alpaca_eval({"id": "c", "prompt": [turns[1], *said, turns[1]], "completion": said}, "demo")
