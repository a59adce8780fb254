"""Reading: every line becomes exactly one input, in order, with an id that limit, format and place leave alone."""

import csv
import datetime
import decimal
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aisp_dist.config import ConfigError, Prompts
from aisp_dist.data import prompts
from aisp_dist.data.prompts import read
from aisp_dist.records import BadInput, Prompt

MESSY = Path(__file__).parent / "data" / "messy.jsonl"
ROWS = [{"prompt": f"Question {i}?", "topic": f"t{i % 3}", "key": f"k{i}"} for i in range(20)]


def settings(source, **more):
    return Prompts(source=str(source), **more)


def all_of(source, **more):
    return list(read(settings(source, **more)))


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(inputs):
    return [item.content[-1][1] for item in inputs]


# Laws


@pytest.mark.parametrize("id_column", [None, "id"])
def test_every_line_is_one_input_in_its_place(id_column):
    inputs = all_of(MESSY, keep=["topic"], id_column=id_column)
    there = [line for line in MESSY.read_text(encoding="utf-8").split("\n") if line.strip()]
    assert [item.source_index for item in inputs] == list(range(len(there)))
    assert len({item.id for item in inputs}) == len(inputs)
    assert len({item.digest for item in inputs}) == len(inputs)
    good = [item.source_index for item in inputs if isinstance(item, Prompt)]
    assert good == ([0, 10, 12, 13, 14, 15, 16, 17] if id_column is None else [0, 10, 12, 14, 16, 17])
    for item in inputs:
        if isinstance(item, Prompt):
            assert dict(item.columns).keys() == {"topic"}
        else:
            assert item.reason


@pytest.mark.parametrize("more", [{}, {"shuffle_seed": 3}, {"id_column": "id"}, {"id_column": "id", "shuffle_seed": 3}])
def test_a_larger_limit_extends(more):
    whole = all_of(MESSY, keep=["topic"], **more)
    for limit in range(len(whole) + 2):
        assert all_of(MESSY, keep=["topic"], limit=limit, **more) == whole[:limit]


def test_a_shuffle_is_a_permutation_that_the_seed_decides(tmp_path):
    source = lines(tmp_path / "a.jsonl", ROWS)
    plain = all_of(source)
    once, again, other = (all_of(source, shuffle_seed=seed) for seed in (0, 0, 1))
    assert once == again and [p.id for p in once] != [p.id for p in other]
    assert sorted(p.id for p in once) == sorted(p.id for p in plain)
    assert [p.source_index for p in once] == list(range(len(ROWS)))
    # pinned: a resume by a later version of Python must see the same order
    assert texts(once)[:4] == [f"Question {i}?" for i in (15, 3, 12, 7)]


@pytest.mark.parametrize("more", [{}, {"limit": 7}, {"limit": 0}, {"shuffle_seed": 3}, {"id_column": "id"}])
def test_the_count_is_that_of_the_inputs(more):
    assert prompts.count(settings(MESSY, **more)) == len(all_of(MESSY, **more))


def test_a_shuffle_sorts_by_one_draw_a_line_and_carries_what_json_cannot(tmp_path):
    draw = random.Random(5).random
    rows = [{"prompt": f"{i}", "n": decimal.Decimal(i), "day": datetime.date(2024, 1, 1)} for i in range(3000)]
    write_parquet(tmp_path / "a.parquet", rows)
    order = sorted(range(3000), key=[draw() for _ in range(3000)].__getitem__)
    got = all_of(tmp_path / "a.parquet", id_column="n", keep=["day"], shuffle_seed=5)
    assert [p.id for p in got] == [str(i) for i in order] and got[0].columns == (("day", "2024-01-01"),)


def write_json(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_gz(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)


def write_pretty(path, rows):
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


WRITERS = {
    "a.json": write_json,
    "pretty.json": write_pretty,
    "lines.json": lines,
    "a.csv": write_csv,
    "a.jsonl.gz": write_gz,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_formats_agree(tmp_path, name):
    want = all_of(lines(tmp_path / "a.jsonl", ROWS), keep=["topic"])
    WRITERS[name](tmp_path / name, ROWS)
    assert all_of(tmp_path / name, keep=["topic"]) == want
    by_key = all_of(tmp_path / name, keep=["topic"], id_column="key")
    assert [p.id for p in by_key] == [row["key"] for row in ROWS]


def test_what_was_read_of_a_parquet_file_is_not_held(tmp_path):
    table = pa.table({"prompt": [random.Random(i).randbytes(600).hex() for i in range(6000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=200)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() for _ in read(settings(tmp_path / "a.parquet"))]
    assert max(held) - before < table.nbytes / 2


def test_messages_survive_parquet(tmp_path):
    rows = [{"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]}]
    write_parquet(tmp_path / "a.parquet", rows)
    (got,) = all_of(tmp_path / "a.parquet")
    assert got.content == (("system", "S"), ("user", "Hi"))


def test_directories_of_datasets(tmp_path):
    import datasets

    want = [p.id for p in all_of(lines(tmp_path / "a.jsonl", ROWS), keep=["topic"])]
    folder = tmp_path / "plain"
    folder.mkdir()
    write_parquet(folder / "train.parquet", ROWS)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for source in (folder, tmp_path / "saved"):
        assert [p.id for p in all_of(source, keep=["topic"])] == want
        with pytest.raises(ConfigError, match="'topic'"):
            all_of(source, keep=["absent"])
    with pytest.raises(ConfigError, match="split nowhere"):
        all_of(folder, split="nowhere")


def test_a_stream_gives_what_the_whole_does(tmp_path):
    rows = [{"prompt": f"ask {i}", "topic": i} for i in range(7)]
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / "train.parquet")
    whole, streamed = (
        list(prompts.read(Prompts(source=str(tmp_path / "set"), keep=("topic",), streaming=s, skip=2, limit=4)))
        for s in (False, True)
    )
    assert whole == streamed and [p.content[0][1] for p in whole] == [f"ask {i}" for i in (2, 3, 4, 5)]
    with pytest.raises(ConfigError, match="no column 'nope'"):
        list(prompts.read(Prompts(source=str(tmp_path / "set"), column="nope", streaming=True)))


@pytest.mark.parametrize("skip", [0, 1, 3, 99])
def test_what_is_skipped_changes_no_id(tmp_path, skip):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"ask {i}"}) + "\n" for i in range(5)))
    settings = Prompts(source=str(tmp_path / "p.jsonl"), shuffle_seed=1)
    some = settings.model_copy(update={"skip": skip})
    whole, rest = list(prompts.read(settings)), list(prompts.read(some))
    assert [p.id for p in rest] == [p.id for p in whole[skip:]] and [p.source_index for p in rest] == list(
        range(len(rest))
    )
    assert prompts.count(some) == len(rest)


def test_a_prompt_of_a_megabyte_and_one_with_nul_come_through(tmp_path):
    texts = ["x" * (1 << 20), "a\0b", "\u2028 \U0001f600"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    assert [p.content[0][1] for p in prompts.read(Prompts(source=str(tmp_path / "p.jsonl")))] == texts


def test_a_glob_reads_files_in_name_order_and_names_lines_without_their_root(tmp_path):
    for name, part in (("b/x.jsonl", ROWS[10:]), ("a/x.jsonl", ROWS[:10])):
        (tmp_path / name).parent.mkdir()
        lines(tmp_path / name, part)
        with (tmp_path / name).open("a") as stream:
            stream.write("{\n")
    inputs = all_of(tmp_path / "*" / "*.jsonl")
    assert [item.id for item in inputs if isinstance(item, BadInput)] == ["a/x.jsonl:11", "b/x.jsonl:11"]
    assert texts([item for item in inputs if isinstance(item, Prompt)]) == [row["prompt"] for row in ROWS]


# Ids


def test_duplicates_get_occurrence_numbers(tmp_path):
    rows = [{"prompt": text} for text in "ABAAB"]
    got = all_of(lines(tmp_path / "a.jsonl", rows))
    a, b = got[0].id, got[1].id
    assert [p.id for p in got] == [a, b, f"{a}#2", f"{a}#3", f"{b}#2"]
    assert a == got[0].id and len(a) == 32 and int(a, 16)


def test_an_id_is_of_content_and_columns_alone(tmp_path):
    one = all_of(lines(tmp_path / "a.jsonl", ROWS), keep=["topic"])
    two = all_of(lines(tmp_path / "b.jsonl", [{"extra": 1, **row} for row in reversed(ROWS)]), keep=["topic"])
    assert {p.id for p in one} == {p.id for p in two}
    assert {p.id for p in one}.isdisjoint(p.id for p in all_of(tmp_path / "a.jsonl"))
    assert {p.id for p in one}.isdisjoint(p.id for p in all_of(tmp_path / "a.jsonl", keep=["topic"], system="Be kind."))
    assert {p.id for p in one}.isdisjoint(p.id for p in all_of(tmp_path / "a.jsonl", keep=["topic"], format="raw"))


def test_a_users_id_again(tmp_path):
    rows = [
        {"prompt": text, "n": number}
        for text, number in (("A", 1), ("A", 1), ("B", 1), ("A", 1), ("C", 2), ("D", "1#2"))
    ]
    got = all_of(lines(tmp_path / "a.jsonl", rows), id_column="n")
    assert [p.id for p in got] == ["1", "1#2", "1#3", "1#4", "2", "1#2#2"]
    assert [type(p) for p in got] == [Prompt, Prompt, BadInput, Prompt, Prompt, BadInput]
    assert "a.jsonl:3 is that of source_index 0," in got[2].reason
    assert "a.jsonl:6 is that of source_index 1," in got[5].reason


def test_a_missing_id_is_a_bad_line(tmp_path):
    rows = [{"prompt": "A", "n": 1}, {"prompt": "B", "n": None}, {"prompt": "C"}, {"prompt": "D", "n": [1]}]
    got = all_of(lines(tmp_path / "a.jsonl", rows), id_column="n")
    assert [p.id for p in got] == ["1", "a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]
    assert all(isinstance(p, BadInput) and "'n'" in p.reason for p in got[1:])


def test_a_digest_changes_with_everything_but_the_place(tmp_path):
    base = {"prompt": "A", "topic": "t", "n": "1"}
    changed = [base, base | {"prompt": "B"}, base | {"topic": "u"}, base | {"n": "2"}]
    digests = []
    for row in changed:
        for before in ([], [{"prompt": "Z", "topic": "t", "n": "9"}]):
            path = lines(tmp_path / "a.jsonl", [*before, row])
            digests.append(all_of(path, keep=["topic"], id_column="n")[-1].digest)
    assert digests[::2] == digests[1::2] and len(set(digests)) == len(changed)


def test_a_digest_of_a_broken_line_changes_with_the_line(tmp_path):
    seen = set()
    for text in ("{\n", "{ \n", '{"prompt": 1}\n', '{"prompt": 2}\n'):
        (tmp_path / "a.jsonl").write_text(text)
        seen.add(all_of(tmp_path / "a.jsonl")[0].digest)
    assert len(seen) == 4


# Lines and files


def test_an_empty_file_has_no_inputs(tmp_path):
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt"):
        (tmp_path / name).write_text("")
        assert all_of(tmp_path / name) == []


def test_text_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\u2028still\rtwo\n\nlast".encode())
    got = list(prompts.located(settings(tmp_path / "a.txt", column="anything", format="raw")))
    assert [item.content for _, item in got] == ["one", "two\u2028still\rtwo", "last"]
    assert [where for where, _ in got] == ["a.txt:1", "a.txt:2", "a.txt:4"]


def test_bytes_that_are_no_text_fail_their_line_only(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ncaf\xe9\nthree\n")
    got = all_of(tmp_path / "a.txt")
    assert [type(item) for item in got] == [Prompt, BadInput, Prompt]
    assert "U+DCE9" in got[1].reason


def test_csv_records(tmp_path):
    (tmp_path / "a.csv").write_text(
        'prompt,n\n"two\nlines",1\nshort\n\n"a ""quoted"" one",2\n"never closed,3\nlost,4\n'
    )
    got = all_of(tmp_path / "a.csv", id_column="n")
    assert [item.id for item in got] == ["1", "a.csv:4", "2", "a.csv:7"]
    assert got[0].content == (("user", "two\nlines"),) and got[2].content == (("user", 'a "quoted" one'),)
    assert "1 fields where the header has 2" in got[1].reason and "lines 7 to 8" in got[3].reason
    long = "x" * 200_000
    write_csv(tmp_path / "b.csv", [{"prompt": long}])
    assert texts(all_of(tmp_path / "b.csv")) == [long]


def test_columns_come_as_plain_values(tmp_path):
    row = {"prompt": "A", "day": datetime.date(2024, 2, 3), "price": decimal.Decimal("1.50"), "deep": {"a": [1, None]}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (got,) = all_of(tmp_path / "a.parquet", keep=["day", "price", "deep"])
    assert got.columns == (("day", "2024-02-03"), ("price", "1.50"), ("deep", {"a": [1, None]}))
    pq.write_table(pa.Table.from_pylist([{"prompt": "A", "image": b"\x00"}]), tmp_path / "b.parquet")
    (pixels,) = all_of(tmp_path / "b.parquet", keep=["image"])
    assert pixels.columns == (("image", b"\x00"),)  # a run refuses such a column: schema.column_types


@pytest.mark.parametrize(
    ("source", "more", "words"),
    [
        ("none.jsonl", {}, "is not there"),
        ("*.none.jsonl", {}, "matches no file"),
        ("a.xlsx", {}, ".parquet"),
        ("a.jsonl", {"column": "question"}, "has 'prompt', 'topic', 'key'"),
        ("a.jsonl", {"keep": ["answer"]}, "no column 'answer'"),
        ("a.jsonl", {"id_column": "uid"}, "no column 'uid'"),
        ("a.parquet", {"column": "question"}, "no column 'question'"),
        ("cut.jsonl.gz", {}, "cannot be read"),
        ("cut.parquet", {}, "cannot be read"),
        ("broken.json", {}, "cannot be read"),
        ("a.jsonl", {"revision": "main"}, "hub"),
        ("a.jsonl", {"format": "raw", "system": "S"}, "prompts.system"),
        ("a.jsonl", {"format": "hh", "template_kwargs": {"a": 1}}, "prompts.template_kwargs"),
        ("a.jsonl", {"keep": ["topic", "topic"]}, "prompts.keep"),
        ("a.jsonl", {"keep": ["prompts"]}, "prompts.keep"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, source, more, words):
    lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.xlsx").write_text("")
    write_parquet(tmp_path / "a.parquet", ROWS)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "A"}\n' * 9999)[:-40])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-40])
    (tmp_path / "broken.json").write_text('[{"prompt": "A"},')
    with pytest.raises(ConfigError) as error:
        all_of(tmp_path / source, **more)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused_before_the_first_line(tmp_path):
    with pytest.raises(ConfigError):
        read(settings(tmp_path / "none.jsonl"))


def test_an_unreachable_hub_is_refused():
    with pytest.raises(ConfigError, match="reachable or cached"):
        read(settings("nobody/nothing-of-this-name"))


def test_the_demo_is_readable():
    got = all_of("demo", limit=5)
    assert len(got) == 5 and all(isinstance(p, Prompt) for p in got)


def test_reading_needs_no_torch():
    code = "import sys; from aisp_dist.data import prompts, render;"
    code += "assert not {'torch', 'transformers', 'datasets', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Content


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([{"role": "user", "content": ["part"]}], "part 1 of the content of message 1 of 1 is of type str"),
        ([{"role": "system", "content": "S"}], "last turn is the system's"),
        ([{"role": "user", "content": "\n"}], "last turn is empty"),
        (["Hi"], "message 1 of 1 is of type str"),
        ([{"role": "user", "content": "Hi", "tool_calls": [{}]}], "tool"),
        ({"role": "user"}, "neither text nor a list"),
    ],
)
def test_chats_that_cannot_be(tmp_path, value, words):
    (got,) = all_of(lines(tmp_path / "a.jsonl", [{"prompt": value}]))
    assert isinstance(got, BadInput) and words in got.reason


def test_the_system_message_yields_to_the_chats_own(tmp_path):
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "Hi"}]
    first, second = all_of(lines(tmp_path / "a.jsonl", [{"prompt": "Hi"}, {"prompt": own}]), system="S")
    assert first.content == (("system", "S"), ("user", "Hi")) and second.content == (("system", "own"), ("user", "Hi"))


def test_raw_text_is_as_it_is(tmp_path):
    text, chat = all_of(
        lines(tmp_path / "a.jsonl", [{"prompt": " A\n\n"}, {"prompt": [{"role": "user"}]}]), format="raw"
    )
    assert text.content == " A\n\n" and isinstance(chat, BadInput)


def test_shp(tmp_path):
    (got,) = all_of(lines(tmp_path / "a.jsonl", [{"prompt": "A post."}]), format="shp")
    assert got.content == (("user", "A post."),)


def test_dialogues(tmp_path):
    cases = {
        "\n\nHuman: Say Human: hi\nHuman: x\n\nAssistant: ok\n\nHuman: more \n\nAssistant: gone": (
            ("user", "Say Human: hi\nHuman: x"),
            ("assistant", "ok"),
            ("user", "more "),
        ),
        "\n\nHuman: a\n\nAssistant: \n\nAssistant: b": (("user", "a"), ("assistant", "")),
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: unanswered": (("user", "a"),),
        "\n\nHuman: a": None,
        "\n\nAssistant: a": None,
        "Human: a\n\nAssistant: b": None,
        "\n\nHuman:a\n\nAssistant: b": None,
    }
    got = all_of(lines(tmp_path / "a.jsonl", [{"prompt": text} for text in cases]), format="hh")
    assert [p.content if isinstance(p, Prompt) else None for p in got] == list(cases.values())


def test_real_posts_all_come_through(real_data):
    got = all_of(
        real_data / "data" / "shp_test_500.jsonl.gz",
        column="history",
        format="shp",
        id_column="post_id",
        keep=["preferred"],
    )
    assert len(got) == 500 and all(isinstance(p, Prompt) for p in got)
