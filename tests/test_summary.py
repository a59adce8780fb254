"""The screenful at the end of a run, from the tables alone."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from aisp_dist import manifest, summary
from aisp_dist.place import Place


def output(folder: Path, rows: list[dict]) -> Place:
    rewards = {"a": {"use": "select"}, "b": {"use": "select"}, "judge": {"use": "report"}}
    manifest.write_run(Place.at(folder), {"config": {"rewards": rewards}})
    (folder / "data").mkdir()
    scores = pa.list_(pa.struct({"name": pa.string(), "value": pa.float64()}))
    fields = {"reward": pa.float64(), "base_reward": pa.float64(), "rewards": scores, "base_rewards": scores,
              "nll": pa.float64(), "base_nll": pa.float64(), "quarantined": pa.int32(), "prompt": pa.string(),
              "completion": pa.string(), "base_completion": pa.string()}  # fmt: skip
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


def test_no_rows_say_so(tmp_path):
    assert "the input is empty" in summary.text(output(tmp_path, []), 0.0, 0)
