"""Commands on outputs as they are found: with files that nobody expects, on terminals that show little."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import finished
import pytest
import tiny_gguf
import yaml

from jobs import cli

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = finished.project(tmp_path_factory.mktemp("cli"))
    out = finished.output(folder, "out")
    config = json.loads((out / "run.json").read_text())["config"]
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def project(made, tmp_path, monkeypatch) -> Path:
    """A copy with the whole output in it, and the current directory."""
    copy = shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(copy)
    return copy


def command(capsys, verb: str, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.run(verb, args)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return left.value.code, said.out, said.err


COMMANDS = [
    ("align", "run.yaml", "--output", "out"),
    ("status", "out"),
    ("export", "out", "--to", "dpo", "--rejected", "worst", "--out", "pairs"),
    ("report", "out"),
]


@pytest.mark.parametrize("args", COMMANDS, ids=lambda args: args[0])
def test_files_that_are_not_the_runs_end_no_command(project, capsys, args):
    clean = command(capsys, *args)
    shutil.rmtree("pairs", ignore_errors=True)
    for table in ("data", "failed", "candidates"):
        Path("out", table).mkdir(exist_ok=True)
        for name in ("part-000000.parquet.crc", "README", "part-000000.parquet~", "extra.parquet"):
            Path("out", table, name).write_bytes(b"x")
    code, said, _ = command(capsys, *args)
    assert code == clean[0] == 0 and said.partition(" (")[0] == clean[1].partition(" (")[0]


@pytest.mark.parametrize("args", COMMANDS, ids=lambda args: args[0])
@pytest.mark.parametrize("name", ["run.json", "data/part-000000.parquet", "candidates/part-000000.parquet"])
def test_a_torn_file_of_an_output_ends_a_command_with_a_message(project, capsys, args, name):
    path = project / "out" / name
    path.write_bytes(path.read_bytes()[:40])
    code, _, said = command(capsys, *args)
    assert code in (1, 2) or name.startswith("candidates")
    assert code == 0 or "run.json is not JSON" in said or "is damaged" in said or "aisp verify" in said


def test_the_card_is_written_again_where_a_kill_kept_it_from_being_written(project, capsys):
    card = Path("out/README.md").read_text()
    Path("out/README.md").unlink()
    assert "README.md: is missing" in command(capsys, "verify", "out")[1]
    assert command(capsys, *COMMANDS[0])[0] == 0
    assert Path("out/README.md").read_text() == card and command(capsys, "verify", "out")[0] == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_a_terminal_cannot_show_is_escaped(project, encoding):
    words = "„déjà vu“ 日本"
    values = yaml.safe_load(Path("run.yaml").read_text())
    values["output"] = words
    Path("run.yaml").write_text(yaml.safe_dump(values))
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    for args, code in ((["validate", "run.yaml"], 0), (["verify", words], 2)):
        done = subprocess.run(
            [sys.executable, "-c", f"from jobs import cli; cli.main({args!r})"], env=env, capture_output=True
        )
        shown = words.encode(encoding, "backslashreplace")
        assert done.returncode == code and shown in done.stdout + done.stderr, done.stderr


def test_status_adds_shards_up(project, capsys):
    lines = [{"time": 0.0, "seconds": 1.0, "command": f"{i}", "shard": [i, 2], "total": 3, "done": 2, "failed": 1,
              "in_flight": 0} for i in (0, 1)]  # fmt: skip
    Path("out/metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert "3/? prompts of shards 0, 0 in flight" in command(capsys, "status", "out")[1]
    Path("out/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "6/6 prompts of shards 0, 1, 0 in flight" in command(capsys, "status", "out")[1]


def test_libraries_are_quiet_about_their_own_future():
    code = """
import logging, warnings
from transformers.utils import logging as theirs
from aisp_dist import quiet
quiet.libraries()
warnings.warn("old spelling", FutureWarning)
warnings.warn("look at this")
theirs.get_logger("transformers.models").warning("`torch_dtype` is deprecated")
theirs.get_logger("transformers.models").warning("weights are missing")
logging.getLogger("torchao.extensions").warning("Skipping import of cpp extensions")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0 and "look at this" in done.stderr and "weights are missing" in done.stderr
    assert not any(words in done.stderr for words in ("old spelling", "deprecated", "Skipping import")), done.stderr
    shown = subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert "old spelling" in shown.stderr


def test_loading_models_in_a_users_process_prints_nothing_and_changes_none_of_its_settings(tmp_path):
    code = """
import logging, sys, warnings
from aisp_dist import relabel
def rows(model):
    run = {"generator": {"model": model, "max_new_tokens": 2}, "rewards": {"main": {"kind": "model", "model": "demo"}}}
    run["method"] = {"kind": "best_of_n", "num_samples": 2, "num_iterations": 1}
    return list(relabel(run, prompts=["Hi"]))
assert rows("demo")[0]["reason"] is None
from transformers.utils import logging as theirs
assert rows(sys.argv[1])[0]["reason"] is None
assert theirs.is_progress_bar_enabled() and not logging.getLogger("transformers").handlers[0].filters
assert logging.getLogger("torchao").level == logging.NOTSET
"""
    file = tiny_gguf.save(tmp_path / "m.gguf")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, env=env)
    said = [line for line in done.stderr.splitlines() if not line.startswith("rewards.main prefers the worse answer")]
    assert (done.returncode, done.stdout, said) == (0, "", []), done.stderr
