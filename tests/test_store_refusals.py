"""What the store refuses: inputs, fingerprints, schemas and staged rows that are not those of its rows. What becomes of
an input or a value that fits no row."""

from __future__ import annotations

import errno
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import COLUMNS, changed, prompt, prompts, result, run, store, tables, write

from aisp_dist.config import ConfigError
from aisp_dist.output import kept_columns, schema
from aisp_dist.output.filesystem import Place
from aisp_dist.output.writer import Unfinished
from aisp_dist.records import BadInput, Prompt


def test_a_run_that_is_not_through_says_so(tmp_path):
    rows = store(tmp_path)
    plan = rows.plan(prompts(9))
    rows.add(result(next(plan)))
    with pytest.raises(Unfinished, match="3 inputs have no row, first line 1"):
        rows.finish()
    with pytest.raises(ValueError, match="never planned"):
        rows.add(result(prompt(8)))


@pytest.mark.parametrize("ordinal, part", [(0, 0), (7, 1), (9, 2)])
def test_a_changed_input_is_refused_and_named(tmp_path, ordinal, part):
    write(tmp_path, prompts(10))
    with pytest.raises(ConfigError, match=f"part-00000{part} was computed from other inputs"):
        list(store(tmp_path).plan(changed(ordinal, 13)))


def test_a_changed_input_is_refused_while_it_is_staged_only(tmp_path):
    rows = store(tmp_path)
    for line in rows.plan(prompts(3)):
        rows.add(result(line))
        if line.source_index == 1:
            rows.flush()
    list(store(tmp_path).plan(changed(2, 3)))  # not computed yet: no harm
    with pytest.raises(ConfigError, match="line 1 has changed"):
        list(store(tmp_path).plan(changed(1, 3)))


def test_inputs_in_another_order_are_refused_even_below_the_committed_end(tmp_path):
    write(tmp_path, prompts(4))
    other = [Prompt(f"id-{n}", n, (("user", "x"),), (), f"d{n}") for n in (0, 1)]
    list(store(tmp_path).plan(other))  # too few inputs to check the part's digest; the ids agree
    with pytest.raises(ConfigError, match="other inputs"):
        list(store(tmp_path).plan([Prompt("id-1", 0, (("user", "x"),)), Prompt("id-0", 1, (("user", "x"),))]))


def test_another_fingerprint_schema_or_a_damaged_part_is_refused_in_words(tmp_path):
    write(tmp_path, prompts(6))
    with pytest.raises(ConfigError, match="fingerprint ffffffff, this one has 0000; give another output"):
        list(store(tmp_path, fingerprint="0000").plan(prompts(6)))
    with pytest.raises(ConfigError, match="another schema, in answer, grade"):
        list(store(tmp_path, columns={"extra": "json"}).plan(prompts(6)))
    path = tmp_path / "data/part-000001.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"part-000001\.parquet is damaged .* delete this file"):
        list(store(tmp_path).plan(prompts(6)))
    path.unlink()
    want = tables(write(tmp_path / "want", prompts(6)))
    assert run(tmp_path, prompts(6)) == [4, 5]
    assert tables(tmp_path) == want


def test_a_disk_that_does_not_give_a_part_is_no_damage(tmp_path, monkeypatch):
    """The file may be whole: nobody is told to delete it."""
    write(tmp_path, prompts(6))
    (data,) = {len(file.read_bytes()) for file in (tmp_path / "data").glob("part-000000*")}

    class Stale(io.BytesIO):
        def read(self, *_):
            raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Place, "open", lambda *_: pa.PythonFile(Stale(bytes(data)), mode="r"))
    with pytest.raises(OSError, match="Stale file handle"):
        list(store(tmp_path).plan(prompts(6)))


def test_a_footer_that_arrow_cannot_decode_is_damage_told_in_one_line(tmp_path):
    write(tmp_path, prompts(6))
    path = tmp_path / "data/part-000001.parquet"
    data = bytearray(path.read_bytes())
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    data[footer : footer + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"^.*part-000001\.parquet is damaged .* delete this file.*$"):
        list(store(tmp_path).plan(prompts(6)))


def test_staging_of_another_run_is_refused(tmp_path):
    rows = store(tmp_path)
    rows.add(result(next(rows.plan(prompts(2)))))
    rows.flush()
    with pytest.raises(ConfigError, match="fingerprint"):
        list(store(tmp_path, fingerprint="0000").plan(prompts(2)))


def test_an_input_that_cannot_be_a_row_is_planned_as_a_bad_input(tmp_path):
    columns = (("answer", "a"), ("grade", 1), ("extra", None))
    lines = [
        Prompt("half", 0, (("user", "half \ud83d"),), columns, "d0"),
        Prompt("good", 1, (("user", "hello"),), columns, "d2"),
    ]
    rows = store(tmp_path)
    planned = list(rows.plan(lines))
    assert [type(line) for line in planned] == [BadInput, Prompt]
    for line in planned:
        rows.add(result(line))
    rows.finish()
    (half,) = pq.read_table(tmp_path / "failed").to_pylist()
    assert half["prompt"] == [{"role": "user", "content": "half ?"}] and "surrogate" in half["reason"]
    assert list(store(tmp_path).plan(lines)) == []


def test_a_kept_value_that_does_not_fit_its_column_costs_no_prompt_and_is_not_lost(tmp_path):
    odd = {"answer": "half \ud83d", "grade": 0.5, "extra": None}
    lines = [
        Prompt("good", 0, (("user", "hello"),), (("answer", "a"), ("grade", 1), ("extra", [2])), "d0"),
        Prompt("odd", 1, (("user", "hello"),), tuple(odd.items()), "d1"),
        Prompt("odd and failed", 2, (("user", "hello"),), tuple((odd | {"extra": b"x"}).items()), "d2"),
    ]
    rows = store(tmp_path)
    for line in rows.plan(lines):
        rows.add(result(line, fails=line.source_index == 2))
    rows.finish()
    good, done = pq.read_table(tmp_path / "data").to_pylist()
    (failed,) = pq.read_table(tmp_path / "failed").to_pylist()
    assert (good["answer"], good["grade"], good["extra"], good["kept_as_json"]) == ("a", 1, "[2]", [])
    assert (done["answer"], done["grade"]) == (failed["answer"], failed["grade"]) == (None, None)
    texts = {misfit["name"]: misfit["value"] for misfit in done["kept_as_json"]}
    assert {name: json.loads(text) for name, text in texts.items()} == {k: odd[k] for k in ("answer", "grade")}
    assert [misfit["name"] for misfit in failed["kept_as_json"]] == ["answer", "grade", "extra"]
    assert failed["kept_as_json"][2]["value"] is None  # bytes have no JSON form
    for row, line in ((good, lines[0]), (done, lines[1])):
        assert kept_columns.of_row(row, COLUMNS) == line.columns


def test_a_kept_number_that_json_has_no_word_for_is_told_as_text(tmp_path):
    nan, inf = float("nan"), float("inf")
    kept = [{"answer": "a", "grade": 1, "extra": "text"}, {"answer": -inf, "grade": nan, "extra": {"scores": [1, inf]}}]
    lines = [Prompt(str(n), n, (("user", "hello"),), tuple(k.items()), f"d{n}") for n, k in enumerate(kept)]
    types = schema.column_types([*kept[0]], lines)
    assert [types[name] for name in kept[0]] == ["json", "float64", "json"]
    rows = store(tmp_path)
    for line in rows.plan(lines):
        rows.add(result(line))
    rows.finish()
    row = pq.read_table(tmp_path / "data").to_pylist()[1]
    assert [row[name] for name in kept[1]] == [None] * 3

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    found = {one["name"]: json.loads(one["value"], parse_constant=refuse) for one in row["kept_as_json"]}
    assert found == {"answer": "-Infinity", "grade": "NaN", "extra": {"scores": [1, "Infinity"]}}


def test_a_place_is_tried_before_anything_is_computed_for_it(tmp_path):
    """/proc says to root that it may write there."""
    with pytest.raises(ConfigError, match=r"^output: nothing can be written into '/proc' \(.*\); give a directory"):
        Place.at("/proc/aisp/output").check()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; give a directory"):
        Place.at(tmp_path / "file" / "output").check()
    Place.at(tmp_path / "new" / "output").check()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
