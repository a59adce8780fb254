"""What consumers see: the schema, kept columns, kept candidates, and the real readers and a real trainer on it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import COLUMNS, prompt, prompts, result, store, tables, write

from aisp_dist.config import ConfigError
from aisp_dist.output import parts, schema
from aisp_dist.records import BadInput, Failed, Prompt


@pytest.fixture(scope="module", params=["chat", "raw"])
def output(tmp_path_factory, request):
    return write(tmp_path_factory.mktemp(request.param), prompts(10, request.param), kind=request.param)


def load(output, *name):
    import datasets

    return datasets.load_dataset(str(output), *name, split="train", cache_dir=str(output / ".cache"))


def test_datasets_loads_every_table_by_its_name(output):
    done = load(output)
    assert done["source_index"] == [0, 1, 2, 4, 6, 7, 8, 9]
    assert load(output, "failed")["source_index"] == [3, 5]
    kept = load(output, "candidates")
    assert kept["id"] == done["id"]
    assert all(row["completion"] for row in done)


def test_datasets_loads_a_run_without_failures_and_one_with_an_empty_part(tmp_path):
    write(tmp_path, prompts(3), rows_per_file=5)
    assert load(tmp_path).num_rows == 3
    with pytest.raises(ValueError, match="failed"):
        load(tmp_path, "failed")
    other = tmp_path / "other"
    rows = store(other, rows_per_file=1)
    for line in rows.plan(prompts(7)):
        rows.add(result(line, fails=line.source_index == 0))
    rows.finish()
    assert pq.read_metadata(other / "data/part-000000.parquet").num_rows == 0
    assert load(other)["source_index"] == [1, 2, 3, 4, 6]
    assert load(other, "failed").num_rows == 2


def test_pandas_reads_the_tables_as_they_are(output):
    data = pd.read_parquet(output / "data")
    assert data["reward_difference"].equals(data["reward"] - data["base_reward"])
    assert pd.read_parquet(output / "failed")["reason"].notna().all()
    assert len(pd.read_parquet(output / "candidates")["candidates"][0]) == 2


def test_sft_trainer_trains_on_the_table(output, tmp_path):
    trl = pytest.importorskip("trl")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    done = load(output)
    assert trl.data_utils.is_conversational(done[0]) == (output.name[:4] == "chat")
    words = ["<pad>", "<eos>", "<unk>", "answer", "Question", "user", "assistant", *map(str, range(10))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}",
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
        )
    )
    settings = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(model, settings, train_dataset=done, processing_class=tokenizer)
    assert math.isfinite(trainer.train().training_loss)


def test_the_schema_depends_on_format_and_kept_columns_only(tmp_path):
    chat, raw = schema.schemas("chat", COLUMNS), schema.schemas("raw", COLUMNS)
    assert chat.data.field("prompt").type == chat.data.field("completion").type != pa.string()
    assert raw.data.field("prompt").type == raw.data.field("completion").type == pa.string()
    assert chat.candidates == raw.candidates
    assert not {"margin", "messages"} & set(chat.data.names)
    assert schema.schemas("raw", {}).data.names == [n for n in raw.data.names if n not in COLUMNS]
    write(tmp_path, [BadInput("a:1", 0, "bad", None)])  # no value anywhere tells a type
    found = [pq.read_schema(tmp_path / table / "part-000000.parquet").remove_metadata() for table in ("data", "failed")]
    assert found == list(chat[:2])


TAKEN = "reward id run_id reason messages margin input_ids kept_as_json image images tools chat_template_kwargs label"
TAKEN += " environment trainer_state chosen_reward"


@pytest.mark.parametrize("name", TAKEN.split())
def test_a_kept_column_with_a_taken_name_is_refused(name):
    with pytest.raises(ConfigError, match=rf"prompts\.keep: .*'{name}'.*rename it"):
        schema.check_kept([name])


def typed(*values, names=("x",)):
    lines = [Prompt(str(n), n, "p", (("x", value),)) for n, value in enumerate(values)]
    return schema.column_types(names, lines)["x"]


def test_kept_column_types():
    assert typed("a", None, "b") == "string"
    assert typed(1, None, 2) == "int64"
    assert typed(1, 2.5) == "float64"
    assert typed(True, False) == "bool"
    assert typed(1, "a") == typed([1]) == typed({"a": 1}) == typed(True, 1) == "json"
    assert typed(1 << 70) == typed("\ud800") == "json"
    assert typed((1 << 53) + 1, 0.5) == "json"  # a float would round it
    assert typed() == typed(None) == "json"
    with pytest.raises(ConfigError, match="'x' holds a bytes"):
        typed(b"image")
    with pytest.raises(ConfigError, match="twice"):
        typed(1, names=("x", "x"))


def test_no_kept_columns_make_no_column_for_what_does_not_fit():
    assert schema.column_types((), [Prompt("0", 0, "p")]) == {}
    assert schema.column_types(("x",), []) == {"x": "json", "kept_as_json": "misfits"}


def test_kept_columns_come_back_as_they_went_in(tmp_path):
    values = {"answer": ["a", None, "é"], "grade": [-(1 << 63), None, 7], "extra": [[1, {"a": "ü"}], None, "text"]}
    lines = [Prompt(str(n), n, (("user", "p"),), tuple((k, v[n]) for k, v in values.items())) for n in range(3)]
    rows = store(tmp_path)
    for line in rows.plan(lines):
        rows.add(result(line, fails=line.source_index == 2))
    rows.finish()
    back = [*pq.read_table(tmp_path / "data").to_pylist(), *pq.read_table(tmp_path / "failed").to_pylist()]
    for n, row in enumerate(back):
        assert (row["answer"], row["grade"]) == (values["answer"][n], values["grade"][n])
        assert (row["extra"] and json.loads(row["extra"])) == values["extra"][n]


def test_top_bottom_keeps_the_best_and_the_worst_and_all_keeps_the_quarantined():
    done = result(prompt(8))
    rewards = [2.0, None, 1.0, 2.0, 0.0, 1.0]
    done = replace(done, candidates=tuple(replace(c, reward=r) for c, r in zip(done.candidates, rewards, strict=True)))

    def kept(keep):
        return [3 * c["iteration"] + c["sample"] for c in schema.candidates_row(done, keep, True)["candidates"]]

    assert kept((1, 1)) == [0, 4]  # the earlier of two equals
    assert kept((2, 2)) == [0, 2, 3, 4]
    assert kept((50, 50)) == [0, 2, 3, 4, 5]
    assert [kept((k, 0)) for k in (1, 2, 3, 50)] == [[0], [0, 3], [0, 2, 3], [0, 2, 3, 4, 5]]
    assert kept("all") == [0, 1, 2, 3, 4, 5]
    assert schema.candidates_row(done, "none", True)["candidates"] == []
    assert schema.candidates_row(done, "none", False) is None


def test_the_selected_candidate_is_kept_however_many_better_ones_are_beyond_the_limit():
    done = result(prompt(8))
    rewards, within = [2.0, 3.0, 1.0, 2.0, 0.0, 1.0], [False, False, True, False, True, True]
    pairs = zip(done.candidates, rewards, within, strict=True)
    done = replace(done, candidates=tuple(replace(c, reward=r, within=w) for c, r, w in pairs))

    def kept(keep):
        return [3 * c["iteration"] + c["sample"] for c in schema.candidates_row(done, keep, True)["candidates"]]

    assert kept((1, 0)) == [2]  # the earliest of the best within the limit
    assert kept((1, 1)) == [2, 4]
    assert kept((4, 0)) == [1, 2, 4, 5]


@pytest.mark.parametrize(("room", "groups"), [(1, {8}), (900, {2, 3, 4, 5})])  # 8 rows
def test_a_part_of_several_row_groups_has_the_rows_of_one(tmp_path, monkeypatch, room, groups):
    whole = write(tmp_path / "one", prompts(10), rows_per_file=10)
    monkeypatch.setattr(parts, "ROW_GROUP", room)
    split = write(tmp_path / "many", prompts(10), rows_per_file=10)
    for name in ("data", "candidates"):
        files = [pq.ParquetFile(folder / name / "part-000000.parquet") for folder in (whole, split)]
        assert files[0].num_row_groups == 1 and files[1].num_row_groups in groups
        assert parts.read_table(files[1]).equals(parts.read_table(files[0]))
    assert load(split)["source_index"] == load(whole)["source_index"]


def test_floats_survive_exactly_and_no_reward_is_ever_nan(tmp_path):
    done = result(prompt(0))
    base = replace(done.base, reward=math.nan, rewards=(("main", math.inf),))
    done = replace(done, base=base, nll=0.1 + 0.2, curve=(None, done.best.reward))
    rows = store(tmp_path, candidates="all")
    list(rows.plan(prompts(1)))
    rows.add(done)
    rows.finish()
    (row,) = pq.read_table(tmp_path / "data").to_pylist()
    assert (row["base_reward"], row["reward_difference"], row["base_rewards"][0]["value"]) == (None, None, None)
    assert row["nll"] == 0.1 + 0.2 and row["reward"] == done.best.reward and row["curve"] == list(done.curve)
    (kept,) = pq.read_table(tmp_path / "candidates").to_pylist()
    assert [c["reward"] for c in kept["candidates"]] == [c.reward for c in done.candidates]
    assert [tuple(i["weights"]) for i in kept["trace"]] == [i.weights for i in done.trace]
    with pytest.raises(ValueError, match="a Done has a finite one"):
        rows.add(replace(done, best=replace(done.best, reward=math.nan)))


def test_nothing_in_a_part_tells_when_or_where_it_was_written(tmp_path):
    first = tables(write(tmp_path / "a", prompts(10)))
    assert first == tables(write(tmp_path / "b" / "deeper", prompts(10)))
    path = tmp_path / "a/data/part-000002.parquet"
    metadata = pq.read_metadata(path).metadata
    names = {key.decode() for key in metadata} - {"ARROW:schema"}
    assert names == {f"aisp.{name}" for name in parts.Header._fields}
    assert (metadata[b"aisp.start"], metadata[b"aisp.end"]) == (b"8", b"10")


def test_a_prompt_of_the_wrong_format_is_a_fault_of_the_program_a_failed_one_is_written(tmp_path):
    rows = store(tmp_path, kind="raw")
    list(rows.plan(prompts(2, "raw")))
    with pytest.raises(ValueError, match="raw output"):
        rows.add(result(prompt(0, "chat")))
    rows.add(Failed(BadInput("a:0", 0, "bad", (("user", "hi"),)), "bad \ud800"))
    rows.add(result(prompt(1, "raw")))
    rows.finish()
    (row,) = pq.read_table(tmp_path / "failed").to_pylist()
    assert (row["prompt"], row["reason"]) == ('[["user", "hi"]]', "bad ?")
