"""What must not happen: secrets written down, data that runs as code, code of a checkpoint that nobody asked for, ports
that nobody expects. Every test has the counterpart that shows it can fail."""

from __future__ import annotations

import ast
import json
import os
import pickle
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import tiny
import yaml
from safetensors import SafetensorError

from aisp_dist import rewards
from aisp_dist.config import ConfigError, Generator, ModelReward, Prompts
from aisp_dist.data import prompts, sources
from aisp_dist.engine import checkpoints, model, pretrained

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent
SECRETS = {"HF_TOKEN": f"planted-{secrets.token_hex(12)}", "AWS_SECRET_ACCESS_KEY": f"planted-{secrets.token_hex(12)}"}
REWARD = """
import pathlib, time
def words(completions, **columns):
    while not pathlib.Path(GO).exists():
        time.sleep(0.1)
    return [float(len(set(c[-1]["content"].split()))) for c in completions]
"""
BARE = """
import os, sys, time, psutil, ray
class Bare:
    def pid(self):
        return os.getpid()
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
actor = ray.remote(num_cpus=0)(Bare).remote()
pids = os.getpid(), ray.get(actor.pid.remote())
time.sleep(3)  # a process that has just started may not listen yet
for pid in pids:
    listening = (c for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN)
    print(len({c.laddr.port for c in listening}))
"""


def listening(processes: list[psutil.Process]) -> list[int]:
    """Numbers of ports at which each listens for longer than a moment."""

    def look(process: psutil.Process) -> set[int]:
        return {c.laddr.port for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}

    looks = []
    for _ in range(4):
        time.sleep(0.5)
        looks.append([look(process) for process in processes])
    return [len(set.intersection(*of)) for of in zip(*looks, strict=True)]


def command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() or [""]
    except psutil.Error:
        return [""]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One local run with secrets in its environment: its files, what it printed, and how many ports its processes and
    those of a bare Ray program on the same cluster listened at."""
    folder, temp = tmp_path_factory.mktemp("run"), Path(tempfile.mkdtemp(prefix="aisp", dir="/tmp"))
    (folder / "rewards.py").write_text(REWARD.replace("GO", repr(str(folder / "go"))))
    (folder / "p.jsonl").write_text('{"prompt": "What is tea?"}\n{"prompt": "What is a bicycle for?"}\n')
    config = {
        "output": "out",
        "prompts": {"source": "p.jsonl"},
        "generator": {"model": "demo", "max_new_tokens": 8, "batch_rows": 8},
        "rewards": {"words": {"kind": "function", "function": "rewards.py:words"}},
        "method": {"kind": "aisp", "num_samples": 2, "num_iterations": 2, "lambda": {"ess": 0.1}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    env = os.environ | SECRETS | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(temp)}
    env.pop("RAY_ADDRESS", None)
    with (folder / "log").open("w") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", "jobs.align", "run.yaml"], cwd=folder, env=env, stdout=log, stderr=log
        )
    try:
        actors: dict[str, psutil.Process] = {}
        deadline = time.monotonic() + 200
        ours = {"ray::Coordinator", "ray::Generator", "ray::Scorer"}
        while not ours <= actors.keys() or "first prompt" not in ((folder / "log").read_text()):
            assert started.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.5)
            family = [(p, command(p)) for p in psutil.Process(started.pid).children(recursive=True)]
            actors = {words[0].split(".")[0]: p for p, words in family}
        ports = listening([psutil.Process(started.pid), *(actors[name] for name in sorted(ours))])
        nice = {name: actors[name].nice() - os.nice(0) for name in ours}
        found = next(word for _, words in family for word in words if word.startswith("--gcs-address="))
        address = found.partition("=")[2]
        bare = subprocess.run(
            [sys.executable, "-c", BARE, address], env=env, capture_output=True, text=True, timeout=400
        )
        (folder / "go").touch()
        assert started.wait(200) == 0, (folder / "log").read_text()
        yield folder, temp, ports, [int(n) for n in bare.stdout.split()], nice
    finally:
        started.kill()
        shutil.rmtree(temp, ignore_errors=True)


def test_no_file_holds_a_secret_of_the_environment(run):
    folder, temp, *_ = run
    files = [f for top in (folder, temp) for f in top.rglob("*") if f.is_file()]
    names = {f.name for f in files}
    assert {"run.json", "config.yaml", "metrics.jsonl", "log", "raylet.out"} <= names
    text = {f: f.read_bytes() for f in files}
    assert any(b"What is tea?" in t for t in text.values())  # the search finds what is there
    assert not [f for f, t in text.items() for secret in SECRETS.values() if secret.encode() in t]


def test_a_run_listens_where_any_ray_program_does_and_nowhere_else(run):
    _, _, (driver, *actors), (bare_driver, bare_actor), _ = run
    assert 0 < driver <= bare_driver and len(actors) == 3, run[2:]
    assert max(actors) <= bare_actor and any(actors), run[2:]


def test_actors_of_a_cluster_of_our_own_run_at_normal_priority(run):
    assert set(run[-1].values()) == {0}, run[-1]


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["p.pkl", "p.pt", "p.jsonl", "p.json", "p.csv", "p.parquet", "p.txt", "p.jsonl.gz", "p"]
)
def test_a_pickle_in_place_of_prompts_never_runs(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    try:
        lines = list(sources.open_source(Prompts(source=str(tmp_path / name), shuffle_seed=1)).lines)
        assert name == "p.txt" or all(isinstance(line.row, sources.Broken) for line in lines)
    except ConfigError:
        pass
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.safetensors"])
def test_a_pickle_in_place_of_weights_never_runs(tmp_path, name):
    tiny.save("llama", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises((ConfigError, SafetensorError)):
        model.load(Generator(model=str(tmp_path / "model")), "cpu")
    with pytest.raises((ConfigError, SafetensorError)):
        rewards.load("r", ModelReward(model=str(tmp_path / "model")), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_nothing_in_the_sources_unpickles_or_evaluates():
    """All calls that turn data into code, by name; the one that is there reads what the same process wrote."""
    risky = {"load", "loads", "Unpickler", "eval", "exec", "unsafe_load", "full_load", "compile"}
    modules = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch", "yaml", "np", "numpy"}
    found = set()
    for file in (f for top in ("aisp_dist", "actors", "jobs") for f in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                module, _, last = name.rpartition(".")
                if (module in modules and last in risky) or name in ("eval", "exec", "compile"):
                    found.add((str(file.relative_to(ROOT)), name))
    assert found == {("aisp_dist/data/sources.py", "pickle.load")}


def test_reading_prompts_and_models_unpickles_nothing(tmp_path):
    """By the interpreter's own audit: every class or function that an unpickler looks up."""
    global looked_up
    tiny.save("llama", tmp_path / "model")
    (tmp_path / "p.jsonl").write_text('{"prompt": "What is tea?"}\n{"prompt": "And coffee?"}\n')
    sys.addaudithook(lambda event, args: looked_up.append(args) if event == "pickle.find_class" else None)
    looked_up = []
    list(prompts.read(Prompts(source=str(tmp_path / "p.jsonl"), shuffle_seed=1)))
    list(prompts.read(Prompts(limit=3)))
    model.load(Generator(model=str(tmp_path / "model")), "cpu")
    rewards.load("r", ModelReward(model="demo"), device="cpu")
    assert looked_up == []
    pickle.loads(pickle.dumps(Generator))
    assert len(looked_up) == 1


looked_up: list[tuple] = []
CODE = """
from pathlib import Path
Path({target!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
class Own(LlamaConfig):
    model_type = {model_type!r}
class OwnModel(LlamaForCausalLM):
    config_class = Own
class OwnReward(LlamaForSequenceClassification):
    config_class = Own
"""


@pytest.fixture(params=["llama", "unheard_of"])
def with_code(request, tmp_path, monkeypatch):
    """A checkpoint that brings code of its own, of a family that transformers knows too, and of one it does not."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tiny.save("llama", tmp_path / "model")
    classes = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
    classes["AutoModelForSequenceClassification"] = "own.OwnReward"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": request.param, "auto_map": classes}))
    (folder / "own.py").write_text(CODE.format(target=str(tmp_path / "ran"), model_type=request.param))
    return folder


def test_code_of_a_checkpoint_stays_where_it_is(with_code, tmp_path):
    for load in (
        lambda: model.load(Generator(model=str(with_code)), "cpu"),
        lambda: pretrained.tokenizer(Generator(model=str(with_code))),
        lambda: rewards.load("r", ModelReward(model=str(with_code)), device="cpu"),
        lambda: checkpoints.digest("generator.model", str(with_code), None),
    ):
        try:
            load()
        except ConfigError as error:
            assert "code" in str(error) or "lacks" in str(error), error
    assert not (tmp_path / "ran").exists()


def test_and_runs_where_it_is_trusted(with_code, tmp_path):
    try:
        model.load(Generator(model=str(with_code), trust_remote_code=True), "cpu")
    except ConfigError as error:
        print(error)  # whether such a family can be decoded is another matter
    assert (tmp_path / "ran").exists()
