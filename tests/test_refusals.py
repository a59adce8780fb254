"""What a user's mistake is answered with: exit code 2, one readable message, no traceback, nothing written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aisp_dist.output import manifest
from aisp_dist.output.filesystem import Place
from aisp_dist.output.lease import Lease
from jobs import cli, prepare, settings

CONFIG = {
    "output": "out",
    "prompts": {"source": "prompts.jsonl"},
    "generator": {"model": "demo"},
    "rewards": {"words": {"kind": "function", "function": "rewards.py:words"}},
    "method": {"kind": "aisp", "num_samples": 4, "num_iterations": 2, "lambda": {"ess": 0.1}},
}
JUDGE = {"kind": "http", "url": "http://h/v1", "model": "m", "rubric": "{prompt} {response}"}
JUDGE["requests_per_minute"] = 0.5


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("def words(completions, **_):\n    return [1.0 for _ in completions]\n")
    (tmp_path / "broken.jinja").write_text("{% for message in messages %}\n{{ message")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def refused(capsys, *args: str) -> str:
    """Run `aisp align run.yaml ...` here; its one line of complaint."""
    with pytest.raises(SystemExit) as left:
        cli.run("align", ["run.yaml", *args])
    said = capsys.readouterr()
    assert left.value.code == 2 and said.out == ""
    assert "Traceback" not in said.err and said.err.startswith("aisp: ") and said.err.count("\n") == 1
    assert not Path("out").exists()
    return said.err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--prompts.source", "nothing.jsonl"], "nothing.jsonl"),
        (["--prompts.source", "nothing-*.jsonl"], "matches no file"),
        (["--prompts.column", "question"], "question"),
        (["--prompts.id_column", "uid"], "uid"),
        (["--prompts.keep", '["reward"]'], "reward"),
        (["--method.sigma2", "-1"], "method.sigma2"),
        (["--method.num_samples", "0"], "method.num_samples"),
        (["--method.colour", "red"], "--method.colour"),
        (["--generator.model", "/no/such/model"], "'/no/such/model' is not a directory"),
        (["--generator.model", "."], "holds no config.json"),
        (["--generator.chat_template", "no.jinja"], "no.jinja"),
        (["--generator.chat_template", "broken.jinja"], "broken.jinja' is not valid Jinja (line 2: unexpected end of"),
        (["--generator.model", "gone.gguf"], "generator.model: there is no file 'gone.gguf'; name a GGUF file that"),
        (["--generator.model", "owner/gone.gguf"], "there is no file 'owner/gone.gguf'"),
        (["--rewards", '{"m": {"kind": "model", "model": "gone.gguf"}}'], "GGUF file, which rewards are not read from"),
        (["--prompts.template_kwargs", '{"messages": []}'], "template_kwargs: messages is set for every prompt"),
        (["--generator.engine", "local", "--generator.tensor_parallel", "2"], "tensor_parallel: 2 has no effect"),
        (["--generator.engine", "vllm"], "generator.engine: vllm is not installed where the model would run"),
        (["--rewards.words.function", "gone.py:words"], "gone.py"),
        (["--rewards.words.function", "no_such_module_here:words"], "no_such_module_here"),
        (["--rewards.words.function", "rewards.py:brief"], "rewards.py has no function 'brief' (it has words)"),
        (["--rewards", '{"m": {"kind": "model", "model": "./nowhere"}}'], "rewards.m.model"),
        (["--output", "run.yaml"], "is a file"),
        (["--output", "run.yaml/sub"], "is a file"),
        (["--output", "gs://bucket/out"], "output: gs:// is not implemented; give a local directory, or s3://"),
        (["--output", "s3://bucket"], "not of the form s3://bucket/path"),
        (
            ["--output", "s3://bucket/x", "--runtime.storage_options.endpoint_override", "127.0.0.1:1"],
            "cannot write to",
        ),
        (["--runtime.storage_options.colour", "red"], "--runtime.storage_options.colour"),
        (["--runtime.storage_options.access_key", "id"], "access_key and secret_key come together"),
        (["--runtime.shards", "0"], "runtime.shards"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (
            ["--rewards", json.dumps({"judge": JUDGE})],
            "rewards.judge.requests_per_minute: 0.5 is one in 120 s, and runtime.timeouts.reward: 120 needs one in 48 s"
            "; give at least 2, or runtime.timeouts.reward: 300",
        ),
    ],
)
def test_static_faults(project, capsys, args, said):
    assert said in refused(capsys, *args)


def test_pickled_weights(project, capsys):
    (project / "model").mkdir()
    (project / "model" / "config.json").write_text("{}")
    (project / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickled weights can run code" in refused(capsys, "--generator.model", "./model")


def test_a_relative_output_inside_a_ray_job(project, capsys, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert "give an absolute path" in refused(capsys)


def prepared(project):
    _, run, base_dir = settings.read(settings.parser("align", ""), ["run.yaml"])
    return prepare.prepare(run, base_dir)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused_with_output(capsys, *args):
    before = snapshot(Path("out"))
    with pytest.raises(SystemExit) as left:
        cli.run("align", ["run.yaml", *args])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "Traceback" not in said and snapshot(Path("out")) == before
    return said


def test_an_output_of_another_fingerprint_names_the_keys(project, capsys):
    manifest.write_run(Place.at(project / "out"), prepared(project).record())
    said = refused_with_output(capsys, "--method.sigma2", "0.9", "--seed", "4")
    assert "method.sigma2" in said and "seed" in said
    (project / "rewards.py").write_text("def words(completions, **_):\n    return [2.0 for _ in completions]\n")
    assert "differs in rewards.words;" in refused_with_output(capsys)


def test_other_part_sizes_are_refused(project, capsys):
    manifest.write_run(Place.at(project / "out"), prepared(project).record())
    assert "save.rows_per_file: 7" in refused_with_output(capsys, "--save.rows_per_file", "7")


def test_an_output_that_a_live_run_owns(project, capsys):
    manifest.write_run(Place.at(project / "out"), prepared(project).record())
    lease = Lease.take(Place.at(project / "out"))
    assert "is owned by a live run" in refused_with_output(capsys)
    lease.release()


def test_a_cluster_that_nobody_answers_for(project, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "RAY_ADDRESS: nobody answers at 127.0.0.1:1" in refused(capsys)


def test_a_folder_that_would_hide_our_packages(project, capsys):
    (project / "actors").mkdir()
    assert "has a folder 'actors'" in refused(capsys)


def test_run_json_holds_no_environment(project, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted_secret")
    assert "hf_planted_secret" not in json.dumps(prepared(project).record())


def test_an_unknown_verb_names_those_that_exist(capsys):
    with pytest.raises(SystemExit) as left:
        cli.run("fly", [])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "is not a verb" in said and all(verb in said for verb in cli.VERBS)


def test_verify_and_status_of_nothing(project, capsys):
    for verb in ("verify", "status"):
        with pytest.raises(SystemExit) as left:
            cli.run(verb, ["nowhere"])
        assert left.value.code == 2 and "no run" in capsys.readouterr().err
        with pytest.raises(SystemExit) as left:
            cli.run(verb, ["run.yaml"])
        assert left.value.code == 2 and "run.yaml is a file; give the output directory" in capsys.readouterr().err


@pytest.mark.parametrize(("args", "code"), [(["schema"], 0), (["verify", "nowhere"], 2)])
def test_the_exit_code_is_the_verbs_whatever_libraries_do_at_the_end(args, code):
    """Something that aborts when the interpreter is taken down, as threads of Arrow do now and then."""
    program = f"""
import atexit, os, sys
class Abort:
    def __del__(self, abort=os.abort):
        abort()
freed_last = Abort()
from jobs import cli
def load(*name, real=cli.importlib.import_module):
    if not name[1:]:
        atexit.register(print, "handlers run")
    return real(*name)
cli.importlib.import_module = load
sys.argv = ["aisp", *{args}]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == code and done.stdout.endswith("handlers run\n" if code else "}\nhandlers run\n")


def validated(capsys, *args: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        cli.run("validate", ["run.yaml", *args])
    said = capsys.readouterr()
    return left.value.code, said.out + said.err


def test_validate_looks_functions_up(project, capsys):
    for function in ("rewards.py:brief", "gone.py:words"):
        with pytest.raises(SystemExit) as left:
            cli.run("validate", ["run.yaml", "--rewards.words.function", function])
        said = capsys.readouterr()
        assert left.value.code == 2 and said.out == "" and said.err.startswith("aisp: rewards.words.function: ")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--generator.model", "gone.gguf"], "there is no file 'gone.gguf'"),
        (["--generator.chat_template", "broken.jinja"], "broken.jinja' is not valid Jinja"),
    ],
)
def test_validate_refuses_files_that_cannot_be_read(project, capsys, args, said):
    code, told = validated(capsys, *args)
    assert code == 2 and said in told


def test_validate_knows_the_tags_that_transformers_adds(project, capsys):
    Path("own.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}"
    )
    assert validated(capsys, "--generator.chat_template", "own.jinja")[0] == 0


def test_validate_names_the_lines_that_will_fail(project, capsys):
    good, bad = '{"prompt": "hi"}\n', '{"prompt": [{"role": "user"}]}\n'
    (project / "prompts.jsonl").write_text(f"{good}\n{bad}{{\n" + good * 9)
    code, said = validated(capsys)
    assert code == 0 and said.startswith("valid: ")
    assert "2 of the first 12 inputs will become failed rows:\nprompts.jsonl:3: message 1 of 1" in said
    assert "\nprompts.jsonl:4: the line is not JSON" in said
    (project / "prompts.jsonl").write_text(good * 3)
    assert validated(capsys)[1].count("\n") == 1
    (project / "prompts.jsonl").write_text("")
    assert "prompts.jsonl has no inputs" in validated(capsys)[1]
    (project / "prompts.jsonl").write_text(bad * 1500)
    code, said = validated(capsys)
    assert code == 2 and "none of the first 1000 inputs" in said and said.count("prompts.jsonl:") == 5


def test_validate_names_keys_of_servers_that_are_not_set_here(project, capsys, monkeypatch):
    server = {"kind": "http", "url": "http://127.0.0.1:1/score", "model": "m", "protocol": "classify"}
    Path("run.yaml").write_text(
        yaml.safe_dump(CONFIG | {"rewards": {"grader": server | {"api_key_env": "GRADER_KEY"}}})
    )
    monkeypatch.delenv("GRADER_KEY", raising=False)
    code, said = validated(capsys)
    assert code == 0 and "but GRADER_KEY, which rewards.grader.api_key_env names, is not set here" in said
    monkeypatch.setenv("GRADER_KEY", "secret")
    assert validated(capsys)[1].count("\n") == 1
    there = {"endpoint": {"url": "http://127.0.0.1:1/v1", "model": "m", "api_key_env": "SERVER_KEY"}}
    method = {"kind": "best_of_n"}
    Path("run.yaml").write_text(yaml.safe_dump(CONFIG | {"generator": CONFIG["generator"] | there, "method": method}))
    assert "but SERVER_KEY, which generator.endpoint.api_key_env names, is not set here" in validated(capsys)[1]


def test_a_limit_does_not_decide_the_types_of_kept_columns(project):
    lines = [{"prompt": f"ask {n}", "grade": n if n < 9 else n / 2} for n in range(20)]
    (project / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = CONFIG | {"prompts": {"source": "prompts.jsonl", "keep": ["grade"], "limit": 4}}
    prepared = prepare.prepare(settings.check(values), project)
    assert prepared.columns == {"grade": "float64", "kept_as_json": "misfits"}
