"""The screenful at the end of a run, from the tables alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
from rows import RECORD, at, result, store

from aisp_dist.analysis import summary
from aisp_dist.config import Aisp, Spend
from aisp_dist.output import manifest
from aisp_dist.output.filesystem import Place
from aisp_dist.records import Prompt


def output(folder: Path, rows: list[dict], **config) -> Place:
    def reward(use: str) -> dict[str, str]:
        return {"kind": "function", "function": "a.py:b", "use": use}

    rewards = {"a": reward("select"), "b": reward("select"), "held": reward("report")}
    method = {"kind": "best_of_n", "num_samples": 8, "num_iterations": 1}
    values = {"output": "o", "generator": {"model": "m"}, "rewards": rewards, "method": method}
    manifest.write_run(Place.at(folder), RECORD | {"config": values | config, "rows_per_file": 2})
    (folder / "data").mkdir(parents=True)
    scores = pa.list_(pa.struct({"name": pa.string(), "value": pa.float64()}))
    fields = {"id": pa.string(), "source_index": pa.int64(), "curve": pa.list_(pa.float64()),
              "reward": pa.float64(), "base_reward": pa.float64(), "rewards": scores, "base_rewards": scores,
              "nll": pa.float64(), "base_nll": pa.float64(), "quarantined": pa.int32(), "prompt": pa.string(),
              "completion": pa.string(), "base_completion": pa.string(), "samples_spent": pa.int32(),
              "finish_reason": pa.string(), "num_tokens": pa.int32(), "base_num_tokens": pa.int32()}  # fmt: skip
    rows = [row | {"id": f"{i}", "source_index": i, "curve": [row["reward"]]} for i, row in enumerate(rows)]
    for part in range(2):
        table = pa.Table.from_pylist(rows[2 * part :][:2], pa.schema(list(fields.items())))
        pq.write_table(table, folder / "data" / f"part-{part:06d}.parquet")
    return Place.at(folder)


def said(place: Place, *speed) -> str:
    return summary.text(summary.read(place), *speed)


def row(reward, base, held, base_held, name="x"):
    return {
        "reward": reward, "base_reward": base, "nll": 1.5, "base_nll": 0.5, "quarantined": 1,
        "rewards": [{"name": "a", "value": reward}, {"name": "b", "value": None}, {"name": "held", "value": held}],
        "base_rewards": [{"name": "a", "value": base}, {"name": "b", "value": None},
                         {"name": "held", "value": base_held}],
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
    told = said(output(tmp_path, rows), 2.0, 100).splitlines()
    lines = {line[:24].strip(): line[24:].split("]") for line in told if "[" in line and "]" in line}
    assert [cell.split()[0] for cell in lines["reward"][:3]] == ["1.000", "4.000", "3.000"]
    assert [cell.split()[0] for cell in lines["held out: held"][:3]] == ["1.000", "5.000", "4.000"]
    assert [cell.split()[0] for cell in lines["part a"][:3]] == ["1.000", "4.000", "3.000"]
    assert "part b" not in lines, "nothing finite to average"
    assert any("4 candidates without a finite reward" in line for line in told)
    assert any("100 samples in 2 s, 50 samples/s" in line for line in told)
    assert "selected  best s   [4.000]" in told, "the example is the row of median gain"


def test_what_was_spent_is_said_where_prompts_may_spend_less(tmp_path):
    spend = Spend(plateau=1, max_iterations=5)
    method = Aisp(num_samples=4, num_iterations=3, lambda_=0.3, spend=spend).model_dump(by_alias=True)
    rows = [row(1.0, 0.0, 1.0, 0.0) | {"samples_spent": spent} for spent in (4, 20, 9)]
    assert "samples spent: mean 11.0 of 20 a prompt" in said(output(tmp_path / "a", rows, method=method))
    assert "of 12 a prompt" in said(
        output(tmp_path / "b", rows, method=method | {"spend": Spend(target=1.0).model_dump()})
    )
    assert "samples spent" not in said(output(tmp_path / "c", rows, method=method | {"spend": None}))


def test_likelihoods_that_rescoring_does_not_know_are_left_out_and_counted(tmp_path):
    rows = [row(1.0, 0.0, 1.0, 0.0), row(1.0, 0.0, 1.0, 0.0) | {"nll": None}]
    told = said(output(tmp_path / "a", rows))
    assert "1 rows without NLL" in told and "base-model NLL" in told
    assert "base-model NLL /" not in said(output(tmp_path / "b", rows[1:]))


def test_no_rows_say_so(tmp_path):
    place = output(tmp_path, [])
    assert "the input is empty" in said(place) and summary.tally(summary.read(place)).prompts == 0


def test_kept_values_that_do_not_fit_are_counted(tmp_path):
    lines = [Prompt(f"{n}", n, (("user", "hi"),), (("answer", "a"), ("grade", n / 2)), f"{n}") for n in range(4)]
    columns = {"answer": "string", "grade": "int64", "kept_as_json": "misfits"}
    rewards = {name: {"kind": "function", "function": "a.py:b"} for name in ("main", "words")}
    config = {"output": "o", "generator": {"model": "m"}, "rewards": rewards, "method": {"kind": "best_of_n"}}
    manifest.write_run(at(tmp_path), RECORD | {"config": config, "columns": columns})
    rows = store(tmp_path, columns=columns)
    for line in rows.plan(lines):
        rows.add(result(line, fails=line.source_index == 3))
    rows.finish()
    told = said(at(tmp_path))
    assert "kept column grade: 4 values are not int64 and are null there; kept_as_json holds them" in told
    assert "\n  1 failed: no candidate has a finite reward\n" in told and "other reasons" not in told


def test_the_most_frequent_reasons_are_said_and_the_others_counted(tmp_path):
    folder = tmp_path / "failed"
    folder.mkdir()
    reasons = [name for times, name in enumerate("abcde", 1) for _ in range(times)]
    pq.write_table(pa.table({"reason": reasons}), folder / "part-000000.parquet")
    said = summary._reasons(SimpleNamespace(place=Place.at(tmp_path)))
    assert said == [
        "  5 failed: e",
        "  4 failed: d",
        "  3 failed: c",
        "  3 failed for other reasons, which their rows have",
    ]


def test_the_summary_names_the_method_that_ran(tmp_path):
    method = {"kind": "best_of_n", "num_samples": 3, "num_iterations": 2, "sampling": {"gaussian": 0.5}}
    told = said(output(tmp_path, [row(1.0, 0.0, 1.0, 0.0)], method=method))
    ran = "best-of-n gaussian {num_samples: 3, num_iterations: 2, sampling: {gaussian: 0.5}}"
    assert f"method: {ran}" in told.splitlines()
    assert "aisp" not in told.replace(str(tmp_path), "").lower()


def test_aisp_as_published_is_called_so(tmp_path):
    method = {"kind": "aisp", "num_samples": 32, "num_iterations": 32, "lambda": 0.3}
    for name, more, ran in (("a", {}, "aisp as published {"), ("b", {"lambda": {"ess": 0.1}}, "aisp {")):
        told = said(output(tmp_path / name, [row(1.0, 0.0, 1.0, 0.0)], method=method | more))
        assert f"method: {ran}lambda: " in told
