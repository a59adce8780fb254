"""verify finds nothing in a sound output and each kind of damage in a spoilt one; status counts from files only."""

from __future__ import annotations

import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import RECORD as RUN
from rows import at, prompts, result, store, write

from aisp_dist.config import ConfigError
from aisp_dist.output import manifest, parts, staging
from aisp_dist.output.lease import Lease
from aisp_dist.output.verify import status, verify


@pytest.fixture(params=["chat", "raw"])
def output(tmp_path, request):
    manifest.write_run(at(tmp_path), RUN)
    return write(tmp_path, prompts(10, request.param), kind=request.param)


def edit(path, change):
    """Rewrite a part file with its rows changed, its metadata as it was."""
    file = pq.ParquetFile(path)
    rows = file.read().to_pylist()
    header = parts.header(file.metadata)
    change(rows)
    path.write_bytes(parts.encode(pa.Table.from_pylist(rows, file.schema_arrow.remove_metadata()), header))


def kind_of(output):
    return "raw" if pq.read_schema(output / "data/part-000000.parquet").field("prompt").type == pa.string() else "chat"


def test_a_sound_output_has_no_violation(output):
    verdict = verify(at(output), prompts(10, kind_of(output)))
    assert verdict.violations == () and verify(at(output)).violations == ()
    assert (verdict.done, verdict.failed, verdict.staged, verdict.parts) == (8, 2, 0, 3)


DAMAGE = {
    "no row": ("data/part-000000", lambda rows: rows.pop(1)),
    "a done and a failed row": ("failed/part-000000", lambda rows: rows.insert(0, rows[0] | {"source_index": 1})),
    "outside of the range": ("data/part-000001", lambda rows: rows.append(rows[0] | {"source_index": 30})),
    "not in input order": ("data/part-000001", lambda rows: rows.reverse()),
    "not in input order, each once": ("data/part-000000", lambda rows: rows.insert(0, rows[0])),
    "the id is not the input's": ("data/part-000000", lambda rows: rows[0].update(id="id-8")),
    "no completion": ("data/part-000000", lambda rows: rows[0].update(completion=None)),
    "a reward_difference": ("data/part-000000", lambda rows: rows[0].update(reward_difference=0.1)),
    "no nll": ("data/part-000000", lambda rows: rows[0].update(nll=None)),
    "no base_nll": ("data/part-000000", lambda rows: rows[0].update(base_nll=None)),
    "end of its curve": ("data/part-000000", lambda rows: rows[0]["curve"].append(9.0)),
    "another run": ("data/part-000000", lambda rows: rows[0].update(run_id="0000")),
    "no reason": ("failed/part-000000", lambda rows: rows[0].update(reason=None)),
    "no done row": ("candidates/part-000000", lambda rows: rows[0].update(source_index=-1)),
    "another id than its data row": ("candidates/part-000000", lambda rows: rows[0].update(id="x")),
    "a better candidate": ("candidates/part-000000", lambda rows: rows[0]["candidates"][0].update(reward=99.0)),
    "no best candidate": ("data/part-000000", lambda rows: rows[0].update(best_sample=99)),
    "another text": (
        "candidates/part-000000",
        lambda rows: [c.update(text="x") for row in rows for c in row["candidates"]],
    ),
    "samples_spent": ("candidates/part-000000", lambda rows: rows[0]["trace"].pop()),
}


@pytest.mark.parametrize("law", DAMAGE)
def test_each_law_is_seen_broken(output, law):
    name, change = DAMAGE[law]
    edit(output / f"{name}.parquet", change)
    violations = verify(at(output), prompts(10, kind_of(output))).violations
    assert any(law in violation and name[-6:] in violation for violation in violations), violations


def test_files_that_are_missing_foreign_torn_or_of_another_commit_are_named(output):
    data = output / "data"
    whole = (data / "part-000001.parquet").read_bytes()

    def found(*needles):
        return all(any(needle in violation for violation in verify(at(output)).violations) for needle in needles)

    (data / "part-000001.parquet").unlink()
    assert found("data/part-000001: is missing")
    (data / "part-000001.parquet").write_bytes(whole[:-5])
    assert found("data/part-000001: cannot be read")
    (data / "part-000001.parquet").write_bytes((data / "part-000000.parquet").read_bytes())
    assert found("covers lines 0 to 3, its name says 4 to 7", "failed/part-000001: is of another commit")
    (data / "part-000001.parquet").write_bytes((data / "part-000002.parquet").read_bytes())
    (data / "part-000002.parquet").write_bytes(whole)
    assert found("part-000001: covers lines 8", "part-000002: covers lines 4")
    (data / "part-000001.parquet").write_bytes(whole)
    table = pq.read_table(data / "part-000001.parquet").drop_columns("grade")
    header = parts.header(pq.read_metadata(data / "part-000001.parquet"))
    (data / "part-000001.parquet").write_bytes(parts.encode(table.replace_schema_metadata(None), header))
    (data / "part-1.parquet").write_bytes(whole)
    assert found("another schema", "data/part-1.parquet: is no part")


def test_what_a_commit_wrote_beside_the_rows_is_missed(output):
    """Candidates, failed rows and the files that describe the output: none may go without a word."""
    sound = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for name, words in {
        "candidates/part-000001.parquet": "candidates/part-000001: is missing: the commit wrote 3",
        "failed/part-000001.parquet": "data/part-000001: line 5: no row",
        "README.md": "README.md: is missing",
        "config.yaml": "config.yaml: is missing",
    }.items():
        (output / name).unlink()
        assert any(words in violation for violation in verify(at(output)).violations), name
        (output / name).write_bytes(sound[output / name])
    edit(output / "candidates/part-000001.parquet", lambda rows: rows.pop())
    assert verify(at(output)).violations == ("candidates/part-000001: has 2 rows, the commit wrote 3",)
    (output / "candidates/part-000001.parquet").write_bytes(sound[output / "candidates/part-000001.parquet"])
    (output / "config.yaml").write_text("output: elsewhere\n")
    (output / "README.md").write_text("# Mine\n")
    assert verify(at(output)).violations == (
        "config.yaml: is not the configuration in run.json",
        "README.md: its `configs` lack candidates, default, failed, so that `datasets` does not find them",
    )


@pytest.mark.parametrize("keep", ["none", "all"])
@pytest.mark.parametrize("trace", [False, True])
def test_what_was_not_to_be_kept_is_not_missed(tmp_path, keep, trace):
    manifest.write_run(at(tmp_path), RUN)
    write(tmp_path, prompts(6), candidates=keep, trace=trace)
    assert verify(at(tmp_path), prompts(6)).violations == ()
    assert bool(at(tmp_path).parts("candidates")) == (keep == "all" or trace)
    write(tmp_path, prompts(10), candidates="all")  # the setting is free to change when a run is extended
    assert verify(at(tmp_path), prompts(10)).violations == ()


STRAYS = (".part-000000.parquet.crc", "part-000000.parquet.crc", "README.md", "part-000000.parquet~", "x.parquet")


def test_files_that_are_not_the_runs_are_passed_over_and_named(output):
    before = at(output).dataset("data").to_table(), status(at(output))
    for folder in ("data", "failed", "candidates"):
        for name in STRAYS:
            (output / folder / name).write_bytes(b"x")
    (output / ".staging/part-000000").mkdir()
    (output / ".staging/part-000000/seg-mine").write_bytes(b"x")
    assert (at(output).dataset("data").to_table(), status(at(output))) == before
    kind = kind_of(output)
    assert list(store(output, kind=kind).plan(prompts(10, kind))) == []
    named = [violation.partition(":")[0] for violation in verify(at(output)).violations]
    assert sorted(named) == sorted(
        f"{table}/{name}" for table in ("candidates", "data", "failed") for name in STRAYS[1:]
    )


def test_a_foreign_run_json_is_refused_by_every_reader(output):
    for text in ("[]", "{}", '{"config": 3}', json.dumps({k: v for k, v in RUN.items() if k != "run_id"})):
        (output / "run.json").write_text(text)
        for look in (verify, status, manifest.write_card):
            with pytest.raises(ConfigError, match=r"run\.json describes no run"):
                look(at(output))


def test_the_card_tells_of_the_tables_that_are_there_until_a_user_has_changed_it(tmp_path):
    card = tmp_path / "README.md"
    manifest.write_run(at(tmp_path), RUN)
    for count, tables in ((3, ["data", "candidates"]), (6, ["data", "failed", "candidates"])):  # line 3 fails
        write(tmp_path, prompts(count))
        assert re.findall(r"^\| `(\w+)/` \|", card.read_text(), re.M) == tables
    shutil.rmtree(tmp_path / "failed")
    card.write_text(card.read_text() + "Mine.\n")
    manifest.write_card(at(tmp_path))
    assert card.read_text().endswith("Mine.\n") and "`failed/`" in card.read_text()


def test_datasets_sees_what_is_on_disk(tmp_path):
    import datasets

    def seen(place, table=None):
        cache = str(tmp_path / "cache")
        return sorted(datasets.load_dataset(str(place), table, split="train", cache_dir=cache)["id"])

    def written(folder, count):
        manifest.write_run(at(tmp_path / folder), RUN)
        return write(tmp_path / folder, prompts(count))

    first, other = written("a/out", 3), written("b/out", 2)
    assert len(seen(first)) == 3 and len(seen(other)) == 2
    (first / "README.md").write_text((first / "README.md").read_text() + "A word of mine.\n")
    written("a/out", 9)
    assert len(seen(first)) == 7 == len(seen(first, "candidates"))
    assert (first / "README.md").read_text().endswith("A word of mine.\n")


def test_other_more_and_fewer_inputs_are_seen(output):
    kind = kind_of(output)
    assert any("digest" in v for v in verify(at(output), [*prompts(9, kind), prompts(12, kind)[11]]).violations)
    assert verify(at(output), prompts(11, kind)).violations == (
        "data/part-000002: unfinished: 1 inputs from line 10 on have no row",
    )
    assert any("part-000003: is missing: 1 inputs" in v for v in verify(at(output), prompts(13, kind)).violations)
    assert any("has rows of 2 inputs" in v for v in verify(at(output), prompts(9, kind)).violations)
    assert any("part-000002: has rows of 2 inputs" in v for v in verify(at(output), prompts(8, kind)).violations)


def test_an_unfinished_run_is_counted_and_said(tmp_path):
    manifest.write_run(at(tmp_path), RUN)
    write(tmp_path, prompts(6))
    rows = store(tmp_path)
    for line in rows.plan(prompts(10)):
        if line.source_index != 8:
            rows.add(result(line))
    rows.flush()
    verdict = verify(at(tmp_path), prompts(10))
    assert (verdict.done, verdict.failed, verdict.staged) == (6, 2, 1)
    assert "unfinished: 1 prompts of part 2 are staged; run the same command again" in verdict.violations
    assert status(at(tmp_path)) == {"done": 6, "failed": 2, "staged": 1, "parts": 2, "owners": [], "metrics": None}


def test_a_row_beyond_a_smaller_limit_waits_and_is_no_violation(tmp_path):
    manifest.write_run(at(tmp_path), RUN)
    rows = store(tmp_path)
    for line in rows.plan(prompts(10)):
        if line.source_index != 8:
            rows.add(result(line))
    rows.flush()
    write(tmp_path, prompts(9))
    verdict = verify(at(tmp_path), prompts(9))
    assert (verdict.violations, verdict.staged) == ((), 0)
    assert (
        "unfinished: 1 prompts of part 2 are staged; run the same command again"
        in verify(at(tmp_path), prompts(10)).violations
    )


def test_rows_that_are_retried_are_not_counted_twice(tmp_path):
    manifest.write_run(at(tmp_path), RUN)
    write(tmp_path, prompts(4))
    for again in (False, True):  # staged twice over: the first attempt was killed
        rows = store(tmp_path)
        (line,) = store(tmp_path).plan(prompts(4), retry_failed=True)
        segment = staging.Finished(3, line.digest, failed=rows._finished(result(line)).failed)
        staging.write(at(tmp_path), 0, f"{again}", "f" * 8, rows._schemas, [segment])
    seen = status(at(tmp_path))
    assert (seen["done"], seen["failed"], seen["staged"]) == (3, 1, 0)


def test_status_names_the_owner_and_the_last_whole_metrics_line(output):
    lease = Lease.take(at(output))
    (output / "metrics.jsonl").write_text('{"done": 1}\n{"done": 2}\n{"do')
    seen = status(at(output))
    assert [(owner["alive"], owner["shard"]) for owner in seen["owners"]] == [(True, [0, 1])] and seen["metrics"] == {
        "done": 2
    }
    lease.release()
    assert status(at(output))["owners"] == []


def test_a_directory_without_a_run_is_refused(tmp_path):
    for look in (verify, status):
        with pytest.raises(ConfigError, match=r"no run\.json"):
            look(at(tmp_path))


def test_run_json_comes_back_and_is_replaced_whole(tmp_path):
    assert manifest.read_run(at(tmp_path)) is None
    manifest.write_run(at(tmp_path), RUN)
    assert manifest.read_run(at(tmp_path)) == RUN
    manifest.write_run(at(tmp_path), RUN | {"run_id": "é"})
    assert manifest.read_run(at(tmp_path))["run_id"] == "é"
    assert (tmp_path / "config.yaml").read_text() == "output: o\n"
    assert at(tmp_path).names("") == [".staging", "config.yaml", "run.json"]
    with pytest.raises(ConfigError, match="differs in seed"):
        manifest.write_run(at(tmp_path), RUN | {"fingerprint": "0", "components": {"seed": 1}})
    assert manifest.read_run(at(tmp_path))["fingerprint"] == RUN["fingerprint"]
    (tmp_path / "run.json").write_text(json.dumps(RUN)[:20])
    with pytest.raises(ConfigError, match="is not JSON"):
        manifest.read_run(at(tmp_path))


def test_a_resume_with_other_settings_is_refused_and_names_the_keys():
    parts_of = {"seed": 0, "method": {"kind": "aisp", "sigma2": 0.5}, "rewards": {"main": {"weight": 1.0}}}
    old = RUN | {"components": parts_of}
    new = {"seed": 0, "method": {"kind": "aisp", "sigma2": 0.7}, "rewards": {"main": {"weight": 1.0}, "words": {}}}
    manifest.check_resume(old, old)
    with pytest.raises(ConfigError, match=r"differs in method\.sigma2, rewards\.words; give another output"):
        manifest.check_resume(old, old | {"fingerprint": "0", "components": new})
    with pytest.raises(ConfigError, match=r"save\.rows_per_file: 5, .* set it to 4"):
        manifest.check_resume(old, old | {"rows_per_file": 5})
    made = old | {"versions": {"aisp-dist": "0.1.0"}}
    with pytest.raises(ConfigError, match=r"aisp-dist 0\.1\.0 made it, .* give another output, .* aisp-dist==0\.1\.0"):
        manifest.check_resume(made, made | {"components": parts_of | {"engine": 2}})
    assert manifest.differing_keys({"a": {"b": 1}}, {"a": 1}) == ["a"]
    assert manifest.differing_keys(old, old) == []
