"""Files as users have them: from Windows, with blank lines, in directories; what is read is what is on disk."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aisp_dist.config import ConfigError, Prompts
from aisp_dist.data import prompts
from aisp_dist.records import Prompt

QUESTIONS = ["Where is 北京?", "Was ist eine Brücke?", 'Who said "no"?']


def read(source, **more):
    return list(prompts.read(Prompts(source=str(source), **more)))


def texts(source, **more):
    found = read(source, **more)
    assert all(isinstance(line, Prompt) for line in found), found
    return [line.content[-1][1] for line in found]


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(*questions, **columns):
    return [{"prompt": question, **columns} for question in questions]


# Encodings

CONTENT = {
    "p.jsonl": "\r\n".join(json.dumps({"prompt": q}, ensure_ascii=False) for q in QUESTIONS),
    "p.json": json.dumps([{"prompt": q} for q in QUESTIONS], ensure_ascii=False, indent=1),
    "p.csv": "prompt\r\n" + "\r\n".join('"' + q.replace('"', '""') + '"' for q in QUESTIONS) + "\r\n",
    "p.txt": "\r\n".join(QUESTIONS) + "\r\n",
}
MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("codec", MARKS)
def test_a_byte_order_mark_names_the_encoding(tmp_path, name, codec):
    data = MARKS[codec] + CONTENT[name].encode(codec)
    (tmp_path / name).write_bytes(data)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
    assert texts(tmp_path / name) == texts(tmp_path / f"{name}.gz") == QUESTIONS


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_refused(tmp_path, name, codec):
    (tmp_path / name).write_bytes(CONTENT[name].encode(codec))
    with pytest.raises(ConfigError, match=rf"{name}' is not text: it holds NUL bytes, .* save it as UTF-8"):
        read(tmp_path / name)


def test_half_a_surrogate_pair_in_utf_16_fails_its_line_only(tmp_path):
    (tmp_path / "p.txt").write_bytes(codecs.BOM_UTF16_LE + "one\n\ud83d\nthree\n".encode("utf-16-le", "surrogatepass"))
    assert [type(line).__name__ for line in read(tmp_path / "p.txt")] == ["Prompt", "BadInput", "Prompt"]


# Blank lines and separators


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", '\n{"prompt": "A"}\n\n  \n{"prompt": "B"}\n\n'),
        ("p.ndjson", '\n{"prompt": "A"}\n\n  \n{"prompt": "B"}\n\n'),
        ("p.json", '\n{"prompt": "A"}\n\n  \n{"prompt": "B"}\n\n'),
        ("p.txt", "\nA\r\n\r\n  \nB\n\n"),
    ],
)
def test_a_blank_line_is_no_input_and_no_line_loses_its_number(tmp_path, name, text):
    (tmp_path / name).write_text(text, newline="")
    assert texts(tmp_path / name) == ["A", "B"]
    found = list(prompts.located(Prompts(source=str(tmp_path / name))))
    assert [(where, line.source_index) for where, line in found] == [(f"{name}:2", 0), (f"{name}:5", 1)]
    assert prompts.count(Prompts(source=str(tmp_path / name))) == 2


def test_blank_lines_of_csv_are_no_rows_and_empty_cells_are(tmp_path):
    (tmp_path / "p.csv").write_text('prompt,topic\n"two\n\nlines",a\n\n  \n,b\n')
    two, empty = read(tmp_path / "p.csv", keep=["topic"])
    assert two.content[0][1] == "two\n\nlines" and "empty" in empty.reason


def test_a_csv_with_another_separator_is_refused_with_the_reason(tmp_path):
    (tmp_path / "p.csv").write_text("prompt;topic\nWhy?;food\n")
    with pytest.raises(ConfigError, match="separates its columns by ';'"):
        read(tmp_path / "p.csv")


# A name twice


def test_a_line_with_a_key_twice_fails_alone_and_says_which(tmp_path):
    lines = ['{"prompt": "A"}', '{"prompt": "B", "prompt": "C"}', '{"prompt": [{"role": "user", "role": "x"}]}']
    for name, order in (("p.jsonl", (0, 1, 2)), ("p.json", (1, 0, 2))):
        (tmp_path / name).write_text("\n".join(lines[i] for i in order))
        found = {i: line for i, line in zip(order, read(tmp_path / name), strict=True)}
        assert found[0].content == (("user", "A"),)
        assert [found[i].reason for i in (1, 2)] == [
            f"the line has the key {key!r} twice in one object" for key in ("prompt", "role")
        ]


def test_an_array_with_a_key_twice_is_refused(tmp_path):
    (tmp_path / "p.json").write_text('[{"prompt": "A"},\n {"prompt": "B", "prompt": "C"}]')
    with pytest.raises(ConfigError, match="RepeatedKey: the key 'prompt' twice in one object"):
        read(tmp_path / "p.json")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_column_twice_is_refused_where_it_is_read(tmp_path, suffix):
    path = tmp_path / f"p.{suffix}"
    if suffix == "csv":
        path.write_text("prompt,note,note,,\nA,x,y,,\n")
    else:
        pq.write_table(pa.table([["A"], ["x"], ["y"]], names=["prompt", "note", "note"]), path)
    assert texts(path) == ["A"]
    with pytest.raises(ConfigError, match=r"has 2 columns 'note', .*rename or remove"):
        read(path, keep=["note"])


def test_a_byte_order_mark_inside_a_file_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "A"}\n\ufeff{"prompt": "B"}\n')
    assert "Unexpected UTF-8 BOM" in read(tmp_path / "p.jsonl")[1].reason


# Directories


def output(folder: Path, *questions: str) -> Path:
    """A directory with a dataset card, as our outputs and exports are."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": list(questions)}), folder / "data" / "part-000000.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n---\n# A\n")
    return folder


def test_a_directory_is_read_as_it_is_now_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    first, second = output(tmp_path / "a" / "out", "of a"), output(tmp_path / "b" / "out", "of b")
    assert texts(first) == ["of a"] and texts(second) == ["of b"]
    for root in ("a", "b"):  # relative, the spelling is one
        monkeypatch.chdir(tmp_path / root)
        assert texts("./out") == [f"of {root}"]
    pq.write_table(pa.table({"prompt": ["later"]}), first / "data" / "part-000001.parquet")
    assert texts(first) == ["of a", "later"]
    output(first, "else")
    assert texts(first) == ["else", "later"]
    (first / "data" / ".part-000001.parquet.crc").write_text("x")
    (first / "data" / "part-000001.parquet.crc").write_text("x")
    assert texts(first) == ["else", "later"]


def test_a_name_that_is_not_there_is_no_cached_directory_of_that_name(tmp_path, monkeypatch):
    """In a process of its own, since `datasets` reads where its cache is when it is imported."""
    output(tmp_path / "a" / "mine", "of a")
    (tmp_path / "b").mkdir()
    code = """
import os, datasets
from aisp_dist.config import ConfigError, Prompts
from aisp_dist.data import prompts
os.chdir("a")
assert datasets.load_dataset("mine", split="train")["prompt"] == ["of a"]
os.chdir("../b")
assert datasets.load_dataset("mine", split="train")["prompt"] == ["of a"], "datasets has changed: is the check needed?"
try:
    print(list(prompts.read(Prompts(source="mine"))))
except ConfigError as error:
    print(error)
"""
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    env |= {"PYTHONPATH": str(Path(__file__).parent.parent)}
    said = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True)
    assert "'mine' is no file or directory here" in said


def test_a_directory_reads_as_the_glob_of_its_files(tmp_path):
    jsonl(tmp_path / "set" / "a.jsonl", asked("A", topic="x"))
    jsonl(tmp_path / "set" / "b.jsonl", [{"prompt": "B", "note": 1}, {"prompt": "C", "topic": "y"}])
    folder, pattern = (read(tmp_path / name, keep=["topic"]) for name in ("set", "set/*.jsonl"))
    assert folder == pattern
    assert [line.columns for line in folder] == [(("topic", "x"),), (("topic", None),), (("topic", "y"),)]
    prompts.check(Prompts(source=str(tmp_path / "set"), keep=("topic", "note")))
    with pytest.raises(ConfigError, match="none of the 2 files .* 'absent'"):
        prompts.check(Prompts(source=str(tmp_path / "set"), keep=("topic", "absent")))
    jsonl(tmp_path / "set" / "c.jsonl", [{"question": "D"}])
    with pytest.raises(ConfigError, match=r"no column 'prompt' in .*c\.jsonl', line 1, which has 'question'"):
        prompts.check(Prompts(source=str(tmp_path / "set")))


def test_files_of_several_formats_are_all_read(tmp_path):
    jsonl(tmp_path / "set" / "a.jsonl", asked("A"))
    (tmp_path / "set" / "b.csv").write_text("prompt\nB\n")
    (tmp_path / "set" / "c.txt").write_text("C\n")
    pq.write_table(pa.Table.from_pylist(asked("D")), tmp_path / "set" / "d.parquet")
    (tmp_path / "set" / "notes.md").write_text("no data")
    assert texts(tmp_path / "set") == ["A", "B", "C", "D"]


@pytest.mark.parametrize("name", ["b.jsonl.zst", "b.arrow", "b.tsv", "b.parquet.gz"])
def test_data_that_cannot_be_read_is_not_passed_over(tmp_path, name):
    jsonl(tmp_path / "set" / "a.jsonl", asked("A"))
    for stray in ("a.jsonl~", "a.jsonl.bak", "a.jsonl.crc", "notes.md"):
        (tmp_path / "set" / stray).write_text("x")
    assert texts(tmp_path / "set") == ["A"]
    (tmp_path / "set" / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=f"{name}' is not one of .*; convert it, or move it out"):
        read(tmp_path / "set")


def test_the_first_row_is_checked_after_lines_that_are_none(tmp_path):
    (tmp_path / "p.jsonl").write_text('{\n[]\n{"question": "A"}\n')
    with pytest.raises(ConfigError, match=r"no column 'prompt' in .*, line 3, which has 'question'"):
        prompts.check(Prompts(source=str(tmp_path / "p.jsonl")))


def test_splits_and_tables_of_a_directory(tmp_path):
    for split in ("train", "test"):
        jsonl(tmp_path / "set" / f"{split}-0.jsonl", asked(split))
    assert texts(tmp_path / "set") == ["train"] and texts(tmp_path / "set", split="test") == ["test"]
    with pytest.raises(ConfigError, match="has no split dev: it has train, test"):
        read(tmp_path / "set", split="dev")
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: train-*.jsonl\n- config_name: two\n  data_files:\n"
        "  - {split: train, path: test-0.jsonl}\n---\n"
    )
    assert texts(tmp_path / "set", subset="one") == ["train"] and texts(tmp_path / "set", subset="two") == ["test"]
    with pytest.raises(ConfigError, match=r"prompts\.subset: .* several tables; name one of one, two"):
        read(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"prompts\.subset: 'three' is not in"):
        read(tmp_path / "set", subset="three")
    shutil.rmtree(tmp_path / "set")
    (tmp_path / "set").mkdir()
    with pytest.raises(ConfigError, match=r"has no split train: it has no \.jsonl"):
        read(tmp_path / "set")


def test_a_directory_needs_no_torch(tmp_path):
    jsonl(tmp_path / "a.jsonl", asked("A"))
    code = "from aisp_dist.config import Prompts; from aisp_dist.data import prompts; import sys\n"
    code += f"list(prompts.read(Prompts(source={str(tmp_path)!r}))); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("shape", ["file", "directory"])
def test_a_file_name_that_is_not_utf_8_names_its_lines_all_the_same(tmp_path, shape):
    for name in (b"caf\xe9.jsonl", "caf\u00e9.jsonl".encode()):
        (tmp_path / os.fsdecode(name)).write_text('{"prompt": "A"}\n{\n')
    source = tmp_path / (os.fsdecode(b"caf\xe9.jsonl") if shape == "file" else "*.jsonl")
    ids = {line.id for line in read(source) if not isinstance(line, Prompt)}
    assert ids == {"caf\\xe9.jsonl:2"} | ({"caf\u00e9.jsonl:2"} if shape != "file" else set())


# Kept columns


def test_a_row_without_a_kept_column_is_a_prompt(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", [*asked("A", n=1), *asked("B"), *asked("C", n=0.5)])
    assert [line.columns for line in read(source, keep=["n"])] == [(("n", n),) for n in (1, None, 0.5)]
