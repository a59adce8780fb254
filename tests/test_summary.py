"""The screenful at the end of a run, from the tables alone."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rows import at, result, store

from aisp_dist.analysis import summary
from aisp_dist.config import Aisp, Spend
from aisp_dist.output import manifest
from aisp_dist.output.filesystem import Place
from aisp_dist.records import Prompt


def output(folder: Path, rows: list[dict], **config) -> Place:
    rewards = {"a": {"use": "select"}, "b": {"use": "select"}, "judge": {"use": "report"}}
    manifest.write_run(Place.at(folder), {"config": {"rewards": rewards} | config})
    (folder / "data").mkdir(parents=True)
    scores = pa.list_(pa.struct({"name": pa.string(), "value": pa.float64()}))
    fields = {"reward": pa.float64(), "base_reward": pa.float64(), "rewards": scores, "base_rewards": scores,
              "nll": pa.float64(), "base_nll": pa.float64(), "quarantined": pa.int32(), "prompt": pa.string(),
              "completion": pa.string(), "base_completion": pa.string(), "samples_spent": pa.int32(),
              "finish_reason": pa.string(), "num_tokens": pa.int32(), "base_num_tokens": pa.int32()}  # fmt: skip
    for part in range(2):
        table = pa.Table.from_pylist(rows[part::2], pa.schema(list(fields.items())))
        pq.write_table(table, folder / "data" / f"part-{part:06d}.parquet")
    return Place.at(folder)


def row(reward, base, judge, base_judge, name="x"):
    return {
        "reward": reward, "base_reward": base, "nll": 1.5, "base_nll": 0.5, "quarantined": 1,
        "rewards": [{"name": "a", "value": reward}, {"name": "b", "value": None}, {"name": "judge", "value": judge}],
        "base_rewards": [{"name": "a", "value": base}, {"name": "b", "value": None},
                         {"name": "judge", "value": base_judge}],
        "samples_spent": 8, "finish_reason": "stop", "num_tokens": 3, "base_num_tokens": 2,
        "prompt": f"ask {name}", "completion": f"best {name}", "base_completion": f"base {name}",
    }  # fmt: skip


def test_means_are_paired_and_nulls_left_out(tmp_path):
    rows = [
        row(3.0, 1.0, 4.0, 1.0, "p"),
        row(9.0, None, 5.0, None, "q"),
        row(5.0, 1.0, 6.0, 1.0, "r"),
        row(4.0, 1.0, 5.0, 1.0, "s"),
    ]
    said = summary.text(output(tmp_path, rows), seconds=2.0, samples=100).splitlines()
    lines = {line[:24].strip(): line[24:].split("]") for line in said if "[" in line and "]" in line}
    assert [cell.split()[0] for cell in lines["reward"][:3]] == ["1.000", "4.000", "3.000"]
    assert [cell.split()[0] for cell in lines["held out: judge"][:3]] == ["1.000", "5.000", "4.000"]
    assert [cell.split()[0] for cell in lines["of it a"][:3]] == ["1.000", "4.000", "3.000"]
    assert "of it b" not in lines, "nothing finite to average"
    assert any("4 candidates without a finite reward" in line for line in said)
    assert any("100 samples in 2 s, 50 samples/s" in line for line in said)
    assert "selected  best s   [4.000]" in said, "the example is the row of median gain"


def test_what_was_spent_is_said_where_prompts_may_spend_less(tmp_path):
    method = Aisp(num_samples=4, num_iterations=3, spend=Spend(plateau=1, max_iterations=5)).model_dump(by_alias=True)
    rows = [row(1.0, 0.0, 1.0, 0.0) | {"samples_spent": spent} for spent in (4, 20, 9)]
    assert "samples spent: mean 11.0 of 20 a prompt" in summary.text(output(tmp_path / "a", rows, method=method), 0, 0)
    assert "of 12 a prompt" in summary.text(
        output(tmp_path / "b", rows, method=method | {"spend": Spend(target=1.0).model_dump()}), 0, 0
    )
    assert "samples spent" not in summary.text(output(tmp_path / "c", rows, method=method | {"spend": None}), 0, 0)


def test_likelihoods_that_rescoring_does_not_know_are_left_out_and_counted(tmp_path):
    rows = [row(1.0, 0.0, 1.0, 0.0), row(1.0, 0.0, 1.0, 0.0) | {"nll": None}]
    said = summary.text(output(tmp_path / "a", rows), 0, 0)
    assert "1 rows without NLL" in said and "base-model NLL" in said
    assert "base-model NLL /" not in summary.text(output(tmp_path / "b", rows[1:]), 0, 0)


def test_no_rows_say_so(tmp_path):
    assert "the input is empty" in summary.text(output(tmp_path, []), 0.0, 0)


def test_kept_values_that_do_not_fit_are_counted(tmp_path):
    lines = [Prompt(f"{n}", n, (("user", "hi"),), (("answer", "a"), ("grade", n / 2)), f"{n}") for n in range(4)]
    columns = {"answer": "string", "grade": "int64", "kept_as_json": "misfits"}
    rewards = {"main": {"use": "select"}}
    manifest.write_run(at(tmp_path), {"config": {"rewards": rewards}, "columns": columns})
    rows = store(tmp_path, columns=columns)
    for line in rows.plan(lines):
        rows.add(result(line, fails=line.source_index == 3))
    rows.finish()
    assert "kept column grade: 4 values are not int64 and are null there; kept_as_json holds them" in summary.text(
        at(tmp_path), 0.0, 0
    )
