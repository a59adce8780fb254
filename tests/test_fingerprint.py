"""What makes two runs one: the content of what their configurations name, never its spelling or its place."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import finished
import huggingface_hub
import pytest

from aisp_dist.config import ConfigError, ModelReward, Prompts
from aisp_dist.data import prompts
from aisp_dist.output import manifest
from aisp_dist.output.filesystem import Place
from aisp_dist.vllm.choice import Check, Choice, weakest
from jobs import cli, prepare, settings

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    folder = finished.project(tmp_path / "project")
    (folder / "chat.jinja").write_text(TEMPLATE)
    shutil.copytree(folder / "model", folder / "reward")
    monkeypatch.chdir(folder)
    return folder


def values(**changes):
    plain = {
        "output": "out",
        "prompts": {"source": "prompts.jsonl", "id_column": "name", "keep": ["note"]},
        "generator": {"model": "./model", "chat_template": "chat.jinja", "max_new_tokens": 12},
        "rewards": {"main": {"kind": "function", "function": "rewards.py:vowels"}},
        "method": finished.AISP,
    }
    return settings.merge(plain, changes)


def prepared(base_dir=None, **changes) -> prepare.Prepared:
    return prepare.prepare(settings.check(values(**changes)), base_dir or Path.cwd())


def section(name, **changes):
    return {name: values()[name] | changes}


def test_another_spelling_of_the_same_content_is_the_same_run(project):
    here = prepared().components
    shutil.copytree(project, project.parent / "copy")
    copy = project.parent / "copy"
    for changes in (
        section("prompts", source="./prompts.jsonl"),
        section("prompts", source="../project/prompts.jsonl"),
        section("prompts", source=str(copy / "prompts.jsonl")),
        section("prompts", source="prompts*.jsonl"),
        section("generator", model=str(project / "model")),
        section("generator", model=str(copy / "model")),
        section("generator", model="reward"),
        section("generator", chat_template=str(copy / "chat.jinja")),
        {"rewards": {"main": {"kind": "function", "function": str(copy / "rewards.py") + ":vowels"}}},
        {"output": "elsewhere"},
    ):
        assert prepared(**changes).components == here, changes
    assert prepared(base_dir=copy).components == here


def test_a_hub_id_and_its_snapshot_in_the_cache_are_the_same_run(project, monkeypatch, tmp_path):
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub"
    folder = cache / "models--some--model"
    shutil.copytree(project / "model", folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.file_download.constants, "HF_HUB_OFFLINE", True)
    reward = {"kind": "model", "self_test": False}
    runs = [
        prepared(
            **section("generator", model=name),
            rewards={"main": reward | {"model": name}},
        )
        for name in ("some/model", str(folder / "snapshots" / commit))
    ]
    assert runs[0].components == runs[1].components
    assert runs[0].components["digests"]["generator.model"] == runs[0].components["digests"]["rewards.main"] == commit
    assert prepared(**section("generator", model="./model")).fingerprint != runs[0].fingerprint


def test_what_is_said_of_rows_that_are_computed_again(project):
    """Of vLLM's, that they may differ, unless every engine was tried; and what an output once lacked it lacks."""
    local = prepared()
    run = replace(local, choice=Choice("vllm", "as configured", "0.32.0"))
    well, ill = Check(256, None), Check(256, "row 3 of 256 differs")

    def said(check=None, before=None, run=run):
        return run.record(check, {"same_rows": before} if before else None)["same_rows"]

    assert said(run=local).startswith("bit for bit")
    for found in (None, ill, weakest([well, ill]), weakest([well, None]), weakest([None, None]), weakest([])):
        assert said(found).startswith("not promised: ") and "computed again may differ" in said(found)
    assert "row 3 of 256 differs" in said(ill) and "1 of 2 generators" in said(weakest([well, None]))
    assert said(weakest([well, well])).startswith("bit for bit") and "256 rows" in said(well)
    assert said(well, said(ill)) == said(ill)
    assert said(well, said(well)) == said(well) and said(None, said(well)) == said()
    judged = {"main": ModelReward(model="demo", engine="vllm")}
    for one in (run, local):
        scored = replace(one, run=one.run.model_copy(update={"rewards": judged}))
        assert said(well, run=scored).startswith("not promised: the bits of rewards.main")


def test_other_content_under_the_same_name_is_another_run_and_named(project):
    manifest.write_run(Place.at("out"), prepared().record())
    sound = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    for name, key in {
        "prompts.jsonl": "prompts.source",
        "model/config.json": "generator.model",
        "chat.jinja": "generator.chat_template",
        "rewards.py": "rewards.main",
    }.items():
        path = project / name
        path.write_bytes(b" " + sound[path] if name.endswith(".json") else sound[path].replace(b"Say", b"Ask") + b" ")
        prepare.checkpoints.digest.cache_clear()
        with pytest.raises(ConfigError, match=f"another run, which differs in {key};"):
            prepared()
        path.write_bytes(sound[path])
    prepare.checkpoints.digest.cache_clear()
    prepared()
    other = {"rewards": {"main": {"kind": "function", "function": "rewards.py:words"}}}
    with pytest.raises(ConfigError, match=r"differs in rewards\.main;"):
        prepared(**other)


def test_lines_that_are_added_extend_the_run(project):
    before = prepared().fingerprint
    with (project / "prompts.jsonl").open("a") as stream:
        stream.write(json.dumps({"name": "late", "prompt": "Say it late", "note": None}) + "\n")
    assert prepared().fingerprint == before
    assert prepared(**section("prompts", limit=2)).fingerprint == before
    assert prepared(**section("prompts", skip=1)).fingerprint != before


def test_every_source_has_a_first_digest(tmp_path):
    texts = {"a.jsonl": "", "b.jsonl": "{\n", "c.jsonl": '{"prompt": "hi"}\n'}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert len({prompts.first_digest(prompts.read(Prompts(source=str(tmp_path / name)))) for name in texts}) == 3


def test_rows_name_the_model_without_a_path_and_a_resume_by_another_name_keeps_it(project):
    assert (
        prepared().model == "model"
        and prepared(**section("generator", model="demo", chat_template=None)).model == "demo"
    )
    shutil.copytree("model", "renamed")
    assert prepared(**section("generator", model="renamed")).model == "renamed"
    manifest.write_run(Place.at("out"), prepared().record())
    resumed = prepared(**section("generator", model=str(project / "renamed")))
    assert resumed.model == resumed.table().model == "model"


def test_a_moved_or_copied_output_verifies_against_its_own_record(project, monkeypatch, capsys):
    def verified(output: Path) -> str:
        with pytest.raises(SystemExit) as left:
            cli.run("verify", [str(output)])
        said = capsys.readouterr()
        assert left.value.code == 0, said
        return said.out

    finished.output(project, "out", output="out", prompts={"source": "prompts.jsonl"})
    monkeypatch.chdir(project.parent)
    assert "6 done" in verified(project / "out")
    shutil.copytree(project / "out", project.parent / "backup" / "kept")  # the output alone
    assert "6 done" in verified(project.parent / "backup" / "kept")
    shutil.copytree(project, project.parent / "copy")
    (project / "prompts.jsonl").write_text('{"name": "x", "prompt": "other"}\n')  # the copy has its own
    assert "6 done" in verified(project.parent / "copy" / "out")
    shutil.rmtree(project)
    assert "6 done" in verified(project.parent / "copy" / "out")
    with pytest.raises(SystemExit) as left:
        cli.run("verify", [str(project.parent / "backup" / "kept")])
    assert left.value.code == 2 and "'prompts.jsonl' is gone from" in capsys.readouterr().err
