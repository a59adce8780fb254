"""Whole runs as a user starts them: the command line on a real Ray cluster with real models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import ray_head
import s3
import tiny
import yaml

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent
REWARD = """
def words(prompts, completions, **columns):
    return [float(len(set(c[-1]["content"].split()))) for c in completions]
def minus(prompts, completions, **columns):
    return [-float(len(c[-1]["content"])) for c in completions]
"""
REWARD_OF = {
    "raises": """
def words(prompts, completions, **columns):
    return [float(len(set(c[-1]["content"].split()))) for c in completions]
def raises(prompts, completions, **columns):
    if "coffee" in prompts[0][-1]["content"]:
        raise RuntimeError("no opinion on coffee")
    return words(prompts, completions)
""",
    "hangs": """
def hangs(prompts, completions, **columns):
    import time
    if "coffee" in prompts[0][-1]["content"]:
        time.sleep(3600)
    return words(prompts, completions)
""",
    "all_nan": """
def all_nan(prompts, completions, **columns):
    bad = "coffee" in prompts[0][-1]["content"]
    return [float("nan") if bad or i == 1 else x for i, x in enumerate(words(prompts, completions))]
""",
    "too_few": """
def too_few(prompts, completions, **columns):
    values = words(prompts, completions)
    return values[1:] if "coffee" in prompts[0][-1]["content"] else values
""",
}
QUESTIONS = ["How do I train a puppy?", "Is coffee good?", "What is a bicycle for?", "How do I learn Spanish?"] * 3


@pytest.fixture(scope="module")
def cluster():
    """A head node of our own; commands join it through RAY_ADDRESS."""
    with ray_head.started() as env:
        yield env | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def project(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARD)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": q, "n": i}) + "\n" for i, q in enumerate(QUESTIONS))
    )
    write(tmp_path)
    return tmp_path


def write(folder: Path, **changes) -> None:
    config = {
        "output": "out",
        "prompts": {"source": "prompts.jsonl", "keep": ["n"]},
        "generator": {"model": "demo", "max_new_tokens": 24, "batch_rows": 32},
        "rewards": {
            "words": {"kind": "function", "function": "rewards.py:words"},
            "minus": {"kind": "function", "function": "rewards.py:minus", "use": "report"},
        },
        # What a search may ask of a generator beside noise: draws, given tokens, likelihoods, a calibration.
        "method": {"kind": "population", "num_samples": 8, "num_iterations": 3, "limit": {"nll": 3.0}},
        "save": {"rows_per_file": 5, "flush_seconds": 0.2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config | changes))


def aisp(
    verb: str, *args: str, cwd: Path, env: dict[str, str], code: int | None = 0
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"jobs.{verb}", *args]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=400)
    if code is not None:
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def tables(output: Path) -> dict[str, list[dict]]:
    return {str(f.relative_to(output)): pq.read_table(f).to_pylist() for f in sorted(output.glob("*/part-*.parquet"))}


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """The table of one quiet run; what every disturbed run must equal. The run id is the configuration's alone."""
    folder = tmp_path_factory.mktemp("quiet")
    (folder / "rewards.py").write_text(REWARD)
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": q, "n": i}) + "\n" for i, q in enumerate(QUESTIONS))
    )
    write(folder)
    done = aisp("align", "run.yaml", cwd=folder, env=cluster)
    assert "12 rows done, 0 failed" in done.stdout and "held out: minus" in done.stdout
    return tables(folder / "out"), folder


def test_bench_run_relabels_and_leaves_nothing(cluster, project):
    flags = ["run", "run.yaml", "--prompts", "2", "--repeat", "2", "--peers", "none"]
    found = json.loads(aisp("bench", *flags, cwd=project, env=cluster).stdout)
    (ours,) = found["contenders"].values()
    assert found["method"] == "population" and len(ours["tokens"]) == 2 and min(ours["tokens"]) > 2 * 8 * 3
    assert all(reward is not None for reward in ours["mean_reward"])
    parts = {name: share for name, share in found["time"].items() if not name.endswith(" busy")}
    assert 0 < sum(parts.values()) <= found["time"]["generator busy"] <= 1 and "words busy" in found["time"]
    assert {name for name, share in parts.items() if not share} == {"generator control"}  # population has no noise
    assert not (project / "out").exists()


def test_a_run_can_be_read_by_pandas_and_datasets_and_verified(cluster, undisturbed):
    folder = undisturbed[1]
    frame = pd.concat(pd.read_parquet(f) for f in sorted((folder / "out" / "data").glob("*.parquet")))
    assert list(frame["source_index"]) == list(range(12)) and list(frame["n"]) == list(range(12))
    assert frame["id"].is_unique and (frame["samples_spent"] == 24).all()
    assert ((frame["reward"] - frame["base_reward"]) == frame["reward_difference"]).all()
    import datasets

    loaded = datasets.load_dataset(str(folder / "out"), split="train", cache_dir=str(folder / "cache"))
    assert loaded[3]["prompt"] == [{"role": "user", "content": QUESTIONS[3]}]
    assert loaded[3]["completion"][0]["role"] == "assistant"
    done = aisp("verify", "out", cwd=folder, env=cluster)
    assert "every input is there exactly once" in done.stdout
    assert "12 done" in aisp("status", "out", cwd=folder, env=cluster).stdout


def test_rows_in_one_process_are_those_of_a_run(cluster, project):
    """Bad lines and a reward that fails included, whatever shared the batches."""
    bad = '{"prompt": "", "n": 0}\n{broken\n'
    (project / "prompts.jsonl").write_text(bad + (project / "prompts.jsonl").read_text())
    (project / "rewards.py").write_text(REWARD_OF["raises"] + REWARD)
    rewards = {"raises": {"kind": "function", "function": "rewards.py:raises"}, "model": {"kind": "model"}}
    rewards["model"] |= {"model": "demo", "weight": 0.1}
    write(project, rewards=rewards)
    aisp("align", "run.yaml", cwd=project, env=cluster)
    found = {name: rows for name, rows in tables(project / "out").items() if not name.startswith("candidates")}
    written = {row["source_index"]: row for part in found.values() for row in part}
    code = (
        "import aisp_dist, json, sys\n"
        "for row in aisp_dist.relabel('run.yaml'): print(json.dumps(row))\n"
        "assert 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=project, env=cluster, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["source_index"] for row in rows] == list(range(14)) == sorted(written), done.stderr
    assert sum(row["reason"] is not None for row in rows) == 5
    for row in rows:
        assert written[row["source_index"]].items() <= row.items()


def test_a_damaged_table_fails_verify(cluster, undisturbed, tmp_path):
    import shutil

    shutil.copytree(undisturbed[1], tmp_path / "copy")
    part = tmp_path / "copy" / "out" / "data" / "part-000001.parquet"
    part.unlink()
    done = aisp("verify", "out", cwd=tmp_path / "copy", env=cluster, code=1)
    assert "violation" in done.stdout


def test_the_same_rows_from_other_replicas_and_two_coordinators_on_s3(cluster, undisturbed, project, server):
    options = {"endpoint_override": server.address, "scheme": "http", "region": "us-east-1"} | s3.KEYS
    replicas = {"generators": {"replicas": 3}, "rewards": {"words": {"replicas": 2}, "minus": {"replicas": 2}}}
    write(project, output=f"s3://{s3.BUCKET}/run", runtime={"shards": 2, "storage_options": options} | replicas)
    done = aisp("align", "run.yaml", cwd=project, env=cluster)
    assert "12 rows done, 0 failed" in done.stdout
    written = {
        entry["Key"].removeprefix("run/"): server.client.get_object(Bucket=s3.BUCKET, Key=entry["Key"])["Body"].read()
        for entry in server.client.list_objects_v2(Bucket=s3.BUCKET, Prefix="run/")["Contents"]
    }
    quiet = undisturbed[1] / "out"
    parts = {str(f.relative_to(quiet)): f.read_bytes() for f in quiet.glob("*/part-*.parquet")}
    assert {name: data for name, data in written.items() if name.endswith(".parquet")} == parts
    secret = s3.KEYS["secret_key"]
    assert not [name for name, data in written.items() if secret.encode() in data] and secret not in done.stderr
    done = aisp("verify", f"s3://{s3.BUCKET}/run", cwd=project, env=cluster | server.env)
    assert "every input is there exactly once" in done.stdout


def test_failed_rows_are_tried_again_and_a_larger_limit_extends(cluster, project):
    """The reward's file is not in the fingerprint's way: it reads a file that says which prompts it refuses."""
    (project / "rewards.py").write_text(
        REWARD + "def moody(prompts, completions, **columns):\n"
        f"    if 'coffee' in prompts[0][-1]['content'] and open({str(project / 'mood')!r}).read() == 'bad':\n"
        "        raise RuntimeError('not today')\n"
        "    return words(prompts, completions)\n"
    )
    (project / "mood").write_text("bad")
    write(project, rewards={"words": {"kind": "function", "function": "rewards.py:moody"}})
    aisp("align", "run.yaml", "--prompts.limit", "3", cwd=project, env=cluster)
    assert [row["source_index"] for row in tables(project / "out")["failed/part-000000.parquet"]] == [1]
    (project / "mood").write_text("good")
    done = aisp("align", "run.yaml", "--prompts.limit", "4", "--retry-failed", cwd=project, env=cluster)
    assert "4 rows done, 0 failed" in done.stdout
    rows = tables(project / "out")
    assert [row["source_index"] for row in rows["data/part-000000.parquet"]] == [0, 1, 2, 3]
    assert "failed/part-000000.parquet" not in rows
    again = aisp("align", "run.yaml", "--prompts.limit", "4", cwd=project, env=cluster)
    assert "nothing to do" in again.stderr and "Ray" not in again.stderr
    assert "every input is there exactly once" in aisp("verify", "out", cwd=project, env=cluster).stdout


def test_rewards_that_fail_on_a_prompt_fail_that_row(cluster, project):
    """Four rewards, each with a prompt of its own that it fails on, and a fifth prompt."""
    failures = {
        "raises": ("coffee", "no opinion on"),
        "hangs": ("bicycle", "no answer within 8 s"),
        "all_nan": ("Spanish", "finite"),
        "too_few": ("bread", "values for"),
    }
    words = ["puppy", *(word for word, _ in failures.values())]
    (project / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"What of {w}?"}) + "\n" for w in words))
    (project / "rewards.py").write_text(
        "".join(REWARD_OF[name].replace("coffee", word) for name, (word, _) in failures.items())
    )
    rewards = {name: {"kind": "function", "function": f"rewards.py:{name}"} for name in failures}
    write(project, rewards=rewards, prompts={"source": "prompts.jsonl"}, runtime={"timeouts": {"reward": 8}})
    aisp("align", "run.yaml", cwd=project, env=cluster)
    rows = tables(project / "out")
    assert [row["source_index"] for row in rows["data/part-000000.parquet"]] == [0]
    assert rows["data/part-000000.parquet"][0]["quarantined"] == 3  # one of each iteration
    failed = rows["failed/part-000000.parquet"]
    assert [row["source_index"] for row in failed] == [1, 2, 3, 4]
    for row, (_, reason) in zip(failed, failures.values(), strict=True):
        assert reason in row["reason"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"runtime": {"generators": {"num_gpus": 1, "replicas": 3}}},
            "the actors need 3 GPU (generator 3 x 1) and the cluster has 0",
        ),
        ({"rewards": {"words": {"kind": "function", "function": "broken.py:words"}}}, "importing 'broken.py' raised"),
        ({"generator": {"model": "falcon", "max_new_tokens": 8}}, "generator.model: "),
    ],
)
def test_what_only_models_or_the_cluster_can_refuse(cluster, project, change, said):
    (project / "broken.py").write_text("import no_such_package\ndef words(prompts, completions): ...\n")
    if "generator" in change:
        tiny.save("falcon", project / "falcon")
    write(project, **change)
    done = aisp("align", "run.yaml", cwd=project, env=cluster, code=2)
    assert said in done.stderr and "Traceback" not in done.stderr.split("aisp: ")[-1]
    assert not (project / "out").exists()


def test_a_dry_run_shows_the_first_prompt_and_writes_nothing(cluster, project):
    done = aisp("align", "run.yaml", "--dry-run", cwd=project, env=cluster)
    assert "first prompt" in done.stderr and "How do I train a puppy?" in done.stderr
    assert "full run: 12 prompts, 288 samples" in done.stdout and "suggested: replicas" in done.stdout
    assert not (project / "out").exists()


def test_an_empty_input_says_so(cluster, project):
    (project / "prompts.jsonl").write_text("")
    write(project, prompts={"source": "prompts.jsonl"})
    done = aisp("align", "run.yaml", cwd=project, env=cluster)
    assert "the input is empty" in done.stdout
    assert tables(project / "out") == {"data/part-000000.parquet": []}


def test_real_posts_through_a_real_story_model(cluster, project, real_data):
    """SHP posts, a pretrained model from a path, a function as reward: the whole path on what users have."""
    write(
        project,
        prompts={"source": str(real_data / "data/shp_test_500.jsonl.gz"), "column": "history", "id_column": "post_id",
                 "format": "shp", "limit": 5, "max_tokens": 300, "overlong": "left"},
        generator={"model": str(real_data / "models/stories260k"), "max_new_tokens": 32, "batch_rows": 32},
        method={"kind": "aisp", "num_samples": 8, "num_iterations": 2, "sigma2": 1.0, "noise": {"ar1": 0.5},
                "lambda": {"ess": 0.1}},
    )  # fmt: skip
    aisp("align", "run.yaml", cwd=project, env=cluster)
    rows = tables(project / "out")["data/part-000000.parquet"]
    assert [row["id"] for row in rows][:2] == ["puaynu", "nqvub1"]
    assert all(row["curve"] == sorted(row["curve"]) and row["reward"] == row["curve"][-1] for row in rows)
    assert any(row["completion"][0]["content"] != row["base_completion"] for row in rows)
    assert "every input is there exactly once" in aisp("verify", "out", cwd=project, env=cluster).stdout


def test_compare_runs_every_method_and_repeats_nothing(cluster, project):
    """All methods on one configuration; a case of its own models beside it; the second time nothing is drawn."""
    train = ["run.yaml", "--out", "value", "--prompts", "10", "--width", "8", "--epochs", "2", "--compare.prompts", "2"]
    aisp("train_value", *train, cwd=project, env=cluster)
    others = {
        "batched": {"kind": "batched_aisp", "num_prompts": 4, "budget": 24, "lambda": {"ess": 0.1}},
        "args": {"kind": "args", "num_candidates": 3},
        "re-control": {"kind": "re_control", "value": "value", "steps": 3},
        "best-of-n gaussian": None,
    }
    tiny.save("llama", project / "tiny")
    small = {"generator": {"model": "tiny", "max_new_tokens": 8}, "compare": {"arms": dict.fromkeys(others)}}
    write(project, compare={"prompts": 3, "arms": others, "cases": {"same": {}, "other model": small}})
    done = aisp("compare", "run.yaml", cwd=project, env=cluster)
    root = project / "out" / "compare"
    found = json.loads((root / "same" / "comparison.json").read_text())
    arms = {arm["name"]: arm for arm in found["arms"]}
    usual = {"base", "best-of-n top-p", "aisp", "population", "population, rewards shuffled", "random pick"}
    assert found["main"] == "population" and set(arms) == usual | set(others) - {"best-of-n gaussian"}
    once = {"base", "random pick", "args", "re-control"}
    assert {name: arm["samples"] for name, arm in arms.items()} == {n: 1 if n in once else 24 for n in arms}
    assert all("minus" in arm["held_out"] and arm["prompts"] == 3 for arm in found["arms"])
    tokens = arms["args"]["model_tokens"]
    assert arms["args"]["reward_calls"] == pytest.approx(3 * tokens + 1) and arms["aisp"]["reward_calls"] == 24
    assert arms["re-control"]["reward_calls"] == 1 and arms["random pick"]["auc"] is None
    assert all(arm["seconds"] > 0 for name, arm in arms.items() if name != "base")
    other = json.loads((root / "other-model" / "comparison.json").read_text())["arms"]
    assert {arm["name"] for arm in other} == set(arms) - set(others), "the case has left these out"
    assert "full run: 12 prompts, 288 samples" in done.stdout
    kept = tables(root / "same" / "best-of-n-top-p")["candidates/part-000000.parquet"]
    drawn = {row["id"]: {(c["iteration"], c["sample"]): c["text"] for c in row["candidates"]} for row in kept}
    for row in tables(root / "same" / "random-pick")["data/part-000000.parquet"]:  # best-of-n's (0, 0), where kept
        assert drawn[row["id"]].get((0, 0), row["completion"][0]["content"]) == row["completion"][0]["content"]
    for folder in ("args", "re-control", "batched"):
        assert "exactly once" in aisp("verify", str(root / "same" / folder), cwd=project, env=cluster).stdout
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*.parquet")}
    again = aisp("compare", "run.yaml", cwd=project, env=cluster)
    assert "joined the Ray cluster" not in again.stderr and "full run" not in again.stdout
    assert before == {file: file.stat().st_mtime_ns for file in root.rglob("*.parquet")}


def test_tune_spends_the_same_on_every_arm_and_its_configuration_is_compared_next(cluster, project):
    write(project, compare={"prompts": 8}, tune={"prompts": 2, "trials": 2, "search": "tpe"})
    flags = ["run.yaml", "--method.num_iterations", "2", "--arm", "population", "--arm", "best-of-n top-p"]
    aisp("tune", *flags, cwd=project, env=cluster)
    found = json.loads((project / "out/tune/trials.json").read_text())["arms"]
    assert [(arm["arm"], [t["samples"] for t in arm["trials"]]) for arm in found] == [
        ("population", [32, 32]), ("best-of-n top-p", [32, 32]),
    ]  # fmt: skip
    asked = {
        row["prompt"][0]["content"]
        for f in (project / "out/tune").glob("*/data/*.parquet")
        for row in pq.read_table(f).to_pylist()
    }
    assert asked == set(QUESTIONS[8:10]), "those after the ones that compare takes"
    tuned = yaml.safe_load((project / "out/tune/tuned.yaml").read_text())
    assert tuned["method"]["ess"] == found[0]["best"]["ess"]
    arms = tuned["compare"]["arms"]
    assert arms["population, rewards shuffled"] == tuned["method"] | {"shuffle_rewards": True}
    assert "best-of-n gaussian" in arms and tuned["output"] == "out/tuned"
    assert {f"sampling.{key}": value for key, value in arms["random pick"]["sampling"].items()} == found[1]["best"]
    before = (project / "out/tune/trials.json").read_bytes()
    again = aisp("tune", *flags, cwd=project, env=cluster)
    assert "joined the Ray cluster" not in again.stderr and (project / "out/tune/trials.json").read_bytes() == before
    aisp("validate", "out/tune/tuned.yaml", cwd=project, env=cluster)
    said = aisp("tune", *flags, "--tune.prompts", "5", cwd=project, env=cluster, code=2).stderr
    assert "tune.prompts: 5, but after the first 8 inputs, which compare takes, there are 4" in said


def test_ray_job_submit(cluster, undisturbed, project):
    """What the README tells: the unpacked working directory is all that the job has."""
    ray = str(Path(sys.executable).with_name("ray"))
    job = project / "job"
    job.mkdir()
    for top in ("aisp_dist", "actors", "jobs"):
        (job / top).symlink_to(ROOT / top)
    for name in ("rewards.py", "prompts.jsonl", "run.yaml"):
        (job / name).write_text((project / name).read_text())
    env = {k: v for k, v in cluster.items() if k != "PYTHONPATH"}
    command = [ray, "job", "submit", "--working-dir", str(job), "--", sys.executable, "-m", "jobs.align", "run.yaml"]
    refused = subprocess.run(command, cwd=job, env=env, capture_output=True, text=True, timeout=400)
    assert (
        refused.returncode == 1
        and "is relative, and a Ray job runs in a temporary copy" in refused.stdout + refused.stderr
    )
    done = subprocess.run(
        [*command, "--output", str(project / "out")], env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert tables(project / "out") == undisturbed[0]


def test_a_directory_that_is_another_one_elsewhere_is_refused(cluster, project):
    """A second machine: a raylet whose file system has an empty directory where ours has the output. The last test of
    this cluster, which holds a dead machine from then on."""
    elsewhere = project / "shared"
    elsewhere.mkdir()
    ray = f"{Path(sys.executable).with_name('ray')} start --address={cluster['RAY_ADDRESS']} --num-cpus=1"
    hide = ["unshare", "--mount", "bash", "-c", f"mount -t tmpfs none {elsewhere} && exec {ray}"]
    mark = {ray_head.MARK: str(elsewhere)}
    started = subprocess.run(hide, env=cluster | mark, capture_output=True, text=True, timeout=240)
    if started.returncode and "permi" in started.stderr:
        pytest.skip("a file system of one's own needs root")
    assert not started.returncode, started.stderr
    try:
        write(project, output=str(elsewhere / "out"))
        done = aisp("align", "run.yaml", cwd=project, env=cluster, code=2)
        assert "is not the same place on" in done.stderr and not (elsewhere / "out" / "run.json").exists()
    finally:
        ray_head.end(str(elsewhere))
