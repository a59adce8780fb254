"""An output of 0.1.0, kept under tests/data/: every command that reads a finished output still reads it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import yaml

from jobs import cli

OLD = Path(__file__).parent / "data/output-0.1.0"


@pytest.fixture
def old(tmp_path) -> Path:
    """A copy of the run's folder. run.json names the folder that the run was started in, which is this copy here."""
    folder = shutil.copytree(OLD, tmp_path / "old")
    record = json.loads((folder / "relabelled/run.json").read_text())
    assert record["versions"]["aisp-dist"] == "0.1.0" and record["config"]["method"]["preset"] == "auto"
    record |= {"directory": str(folder), "base_dir": str(folder)}
    (folder / "relabelled/run.json").write_text(json.dumps(record))
    return folder


def command(capsys, verb: str, *args: object) -> str:
    with pytest.raises(SystemExit) as left:
        cli.run(verb, [str(arg) for arg in args])
    said = capsys.readouterr()
    assert left.value.code == 0, said.err
    return said.out


def rows(folder: Path, table: str = "data") -> list[dict]:
    return pq.read_table(folder / table).to_pylist()


def test_status_and_verify_count_it(old, capsys):
    assert "5 done, 1 failed in 2 parts" in command(capsys, "status", old / "relabelled")
    assert "every input is there exactly once" in command(capsys, "verify", old / "relabelled")


def test_report_shows_every_row(old, capsys):
    command(capsys, "report", old / "relabelled")
    page = (old / "relabelled/report.html").read_text("utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    shown = {one["id"]: one["answers"][1]["text"] for one in data["prompts"]}
    assert shown == {row["id"]: row["completion"][-1]["content"] for row in rows(old / "relabelled")}


def test_export_writes_its_rows(old, capsys):
    command(capsys, "export", old / "relabelled", "--to", "sft", "--to", "alpaca_eval", "--out", old / "set")
    found = datasets.load_dataset("parquet", data_dir=str(old / "set/sft"), cache_dir=str(old / "cache"))["train"]
    assert [row["completion"] for row in found] == [row["completion"] for row in rows(old / "relabelled")]
    answers = json.loads((old / "set/alpaca_eval/outputs.json").read_text())
    assert {answer["generator"] for answer in answers} == {"demo + population {num_samples: 4, num_iterations: 2}"}


def test_rescore_selects_by_another_reward(old, capsys):
    wanted = {"words": {"kind": "function", "function": "my_rewards.py:word_count"}}
    (old / "words.yaml").write_text(yaml.safe_dump({"rewards": wanted}))
    command(capsys, "rescore", old / "relabelled", "--config", old / "words.yaml", "--out", old / "rescored")
    kept = {row["id"]: row["candidates"] for row in rows(old / "relabelled", "candidates")}
    for row in rows(old / "rescored"):
        assert row["reward"] == max(len(candidate["text"].split()) for candidate in kept[row["id"]])
    command(capsys, "verify", old / "rescored")


def test_evaluate_measures_it(old, capsys):
    command(capsys, "evaluate", old / "relabelled")
    found = json.loads((old / "relabelled/evaluation.json").read_text())
    assert found["prompts"] == found["sampled"] == 5
    mean = sum(row["reward"] for row in rows(old / "relabelled")) / 5
    assert found["measures"]["reward"]["selected"][0] == pytest.approx(mean)
    assert "undefined for population" in found["omitted"]["kl"] and found["flips"] is None


def test_a_method_that_no_present_one_draws_like_is_read_and_named_with_its_settings(old, capsys):
    """Noise beside draws, as 0.1.0 allowed."""
    path = old / "relabelled/run.json"
    record = json.loads(path.read_text())
    mixed = {"preset": "paper", "sigma2": 0.5, "branch": None, "decode": {"top_p": 0.9, "temperature": 1.0}}
    record["config"]["method"] |= mixed
    path.write_text(json.dumps(record))
    command(capsys, "report", old / "relabelled")
    command(capsys, "export", old / "relabelled", "--to", "sft", "--out", old / "set")
    card = (old / "set/README.md").read_text()
    assert "sigma2: 0.5" in card and "decode: {top_p: 0.9, temperature: 1.0}" in card and "branch" not in card
    command(capsys, "evaluate", old / "relabelled", "--no-model")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resuming_it_is_refused_with_its_version_and_nothing_is_written(old, capsys, monkeypatch):
    monkeypatch.chdir(old)
    with pytest.raises(SystemExit) as left:
        cli.run("align", ["run.yaml"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "preset: not a key of kind: aisp" in said
    values = yaml.safe_load((old / "run.yaml").read_text())
    (again,) = re.findall(r"write (\{.*\})$", said)
    (old / "run.yaml").write_text(yaml.safe_dump(values | {"method": yaml.safe_load(again)}))
    before = files(old)
    for args in (["run.yaml"], ["run.yaml", "--retry-failed"], ["run.yaml", "--shard", "0/2"]):
        with pytest.raises(SystemExit) as left:
            cli.run("align", args)
        said = capsys.readouterr().err
        assert left.value.code == 2 and said.count("\n") == 1 and "Traceback" not in said
        assert "aisp-dist 0.1.0 made it" in said and "give another output" in said
        assert "pip install aisp-dist==0.1.0" in said
    assert files(old) == before


def test_what_is_rescored_from_it_is_of_this_version_and_resumes(old, capsys):
    wanted = {"words": {"kind": "function", "function": "my_rewards.py:word_count"}}
    (old / "words.yaml").write_text(yaml.safe_dump({"rewards": wanted}))
    rescore = ("rescore", old / "relabelled", "--config", old / "words.yaml", "--out", old / "rescored")
    command(capsys, *rescore)
    before = {name: data for name, data in files(old / "rescored").items() if name.startswith("data")}
    command(capsys, *rescore)
    assert before == {name: data for name, data in files(old / "rescored").items() if name.startswith("data")}
    record = json.loads((old / "rescored/run.json").read_text())
    record["components"].pop("engine")
    (old / "rescored/run.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit) as left:
        cli.run("rescore", [str(word) for word in rescore[1:]])
    assert left.value.code == 2 and "made it, and this version may compute other rows" in capsys.readouterr().err
