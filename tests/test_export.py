"""Exports: prompts are conserved through filters, real trainers train on the tables, nothing is half written."""

from __future__ import annotations

import json
import random
import re
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import datasets
import finished
import pyarrow.parquet as pq
import pytest
import tiny
import tiny_chat
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from aisp_dist.analysis import export
from aisp_dist.config import ConfigError
from jobs import cli
from jobs import export as job


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = finished.project(tmp_path_factory.mktemp("export"), count=10)
    finished.output(folder, "chat")
    finished.output(folder, "raw", prompts={"format": "raw"})
    finished.output(folder, "bare", save={"candidates": "none"}, seed=1)
    return folder


def run(folder: Path, out: Path, *flags: str, name: str = "chat") -> dict:
    assert job.main([str(folder / name), "--out", str(out), *flags]) == 0
    return json.loads((out / "export.json").read_text())["tables"]


def example(**changes) -> export.Example:
    made = export.Example(
        "a", [{"role": "user", "content": "q"}], "good", 2.0, {"h": 1.0}, 5, "stop", "bad", 1.0, {"h": 0.0}
    )
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("filters", "changes", "removed"),
    [
        ({}, {}, None),
        ({}, {"rejected": None, "rejected_reward": None}, "no rejected answer"),
        ({}, {"rejected": " good "}, "rejected is not worse"),
        ({}, {"rejected_reward": 2.0}, "rejected is not worse"),
        ({"min_gap": 1.0}, {}, None),
        ({"min_gap": 1.1}, {}, "gap"),
        ({"finish": "stop"}, {"finish": "length"}, "finish"),
        ({"min_tokens": 5, "max_tokens": 5}, {}, None),
        ({"max_tokens": 4}, {}, "tokens"),
        ({"min_tokens": 6}, {}, "tokens"),
        ({"max_repetition": 0.1}, {"chosen": "a b c d a b c d a b c d"}, "repetition"),
        ({"held_out": "h"}, {}, None),
        ({"held_out": "h"}, {"rejected_rewards": {"h": 1.0}}, "held-out reward"),
        ({"held_out": "h"}, {"chosen_rewards": {"h": None}}, "held-out reward"),
    ],
)
def test_each_filter_by_itself(filters, changes, removed):
    sieve = export.Sieve(export.Filters(**filters), paired=True)
    assert sieve(example(**changes)) is (removed is None) and dict(sieve.removed) == ({removed: 1} if removed else {})


def test_the_first_of_equal_prompts_is_kept():
    sieve = export.Sieve(export.Filters(dedup=True), paired=False)
    prompts = [[{"role": "user", "content": text}] for text in ("a b", " a  b\n", "ab", "a b")]
    assert [sieve(example(prompt=prompt)) for prompt in prompts] == [True, False, True, False]


def test_a_prompt_among_many_costs_few_bytes():
    sieve, made = export.Sieve(export.Filters(dedup=True), paired=False), example()
    tracemalloc.start()
    try:
        for at in range(20_000):
            assert sieve(replace(made, prompt=f"prompt {at}"))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 32 * 20_000 and not sieve(replace(made, prompt=" prompt  7"))


def test_what_goes_in_comes_out_or_is_counted(folder, tmp_path):
    draw, some = random.Random(0), []
    for i in range(20, 36):
        flags = []
        for flag, values in (("--min-gap", (0.1, 1)), ("--max-tokens", (3, 9)), ("--min-tokens", (2, 5)),
                             ("--max-repetition", (0.0, 0.5)), ("--finish", ("stop", "length"))):  # fmt: skip
            flags += [flag, str(draw.choice(values))] if draw.random() < 0.5 else []
        flags += ["--dedup"] * draw.randrange(2) + ["--held-out-agrees", "words"] * draw.randrange(2)
        kinds = draw.sample(["sft", "dpo", "kto", "reward", "prompts"], 2)
        try:
            told = run(folder, tmp_path / str(i), *flags, *(f"--to={kind}" for kind in kinds))
        except ConfigError as error:
            removed = [int(n) for n in re.findall(r"(\d+) removed by", str(error))]
            assert (
                "nothing is left of 10 prompts" in str(error)
                and sum(removed) == 10
                and not list(tmp_path.glob(f"*{i}*"))
            )
            continue
        some.append(i)
        for kind, counts in told.items():
            assert counts["read"] == 10 == counts["kept"] + sum(counts["removed"].values())
            assert counts["rows"] == counts["kept"] * (2 if kind == "kto" else 1)
            assert len(datasets.load_dataset(str(tmp_path / str(i)), kind, split="train")) == counts["rows"]
    assert len(some) > 2


def test_a_reward_that_selects_may_agree_about_candidates(folder, tmp_path):
    assert run(folder, tmp_path / "o", "--to=dpo", "--rejected=worst", "--held-out-agrees=main")["dpo"]["kept"] > 0


@pytest.mark.parametrize("rule", ["base", "worst", "median", "lowest-above:-1"])
def test_the_rejected_answer_is_the_rules(folder, tmp_path, rule):
    run(folder, tmp_path / "o", "--to", "dpo", "--rejected", rule)

    def table(*path: str) -> dict:
        return {row["id"]: row for f in sorted(Path(*path).glob("*.parquet")) for row in pq.read_table(f).to_pylist()}

    rows, data = table(tmp_path, "o/dpo"), table(folder, "chat/data")
    kept = {id: row["candidates"] for id, row in table(folder, "chat/candidates").items()}
    assert rows
    for id, row in rows.items():
        rewards = sorted(c["reward"] for c in kept[id])
        expected = {
            "base": data[id]["base_reward"], "worst": rewards[0], "median": rewards[(len(rewards) - 1) // 2],
            "lowest-above:-1": min((r for r in rewards if r >= -1), default=None),
        }[rule]  # fmt: skip
        assert row["rejected_reward"] == expected < row["chosen_reward"] == data[id]["reward"]
        assert row["chosen"] == data[id]["completion"] and row["prompt"] == data[id]["prompt"]
        texts = {c["text"] for c in kept[id] if c["reward"] == expected} | {data[id]["base_completion"]}
        assert row["rejected"][0]["content"] in texts


def trained(kind: str, folder: Path, out: Path, models: Path) -> float:
    """The loss of one step of TRL's trainer of this kind."""
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
    from trl.experimental.kto import KTOConfig, KTOTrainer

    rows = datasets.load_dataset(str(folder), kind, split="train")
    common = {"output_dir": str(out), "max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none",
              "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}  # fmt: skip
    cls, config = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig),
                   "reward": (RewardTrainer, RewardConfig)}[kind]  # fmt: skip
    name = models / ("reward" if kind == "reward" else "base")
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    more = {"num_labels": 1} if kind == "reward" else {}
    model = auto.from_pretrained(name, dtype=torch.float32, **more)
    made = cls(
        model=model, args=config(**common), train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(name)
    )
    return made.train().training_loss


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny.save("llama", root / "base")
    tok = tiny_chat.tokenizer()
    tiny_chat.classifier(root / "reward", tok, pad_token_id=tok.pad_token_id)
    return root


@pytest.mark.parametrize("name", ["chat", "raw"])
def test_the_real_trainers_train_on_them(folder, tmp_path, models, name):
    kinds = ["sft", "dpo", "kto", "reward"]
    run(folder, tmp_path / "o", *(f"--to={kind}" for kind in kinds), "--rejected", "worst", name=name)
    for kind in kinds:
        columns = pq.read_schema(next((tmp_path / "o" / kind).glob("*.parquet"))).names
        assert "margin" not in columns and not {"prompt", "messages"} <= set(columns)
        loss = trained(kind, tmp_path / "o", tmp_path / kind, models)
        assert loss > 0 and loss == loss


def test_messages_for_sft_and_the_files_of_other_tools(folder, tmp_path, models):
    run(folder, tmp_path / "o", "--to", "sft", "--to", "alpaca_eval", "--to", "prompts", "--sft-format", "messages")
    rows = datasets.load_dataset(str(tmp_path / "o"), "sft", split="train")
    assert [m["role"] for m in rows[0]["messages"]] == ["user", "assistant"]
    assert trained("sft", tmp_path / "o", tmp_path / "t", models) > 0
    assert json.loads((tmp_path / "o/dataset_info.json").read_text())["sft"]["file_name"] == "sft"
    answers = json.loads((tmp_path / "o/alpaca_eval/outputs.json").read_text())
    assert len(answers) == 10 and set(answers[0]) == {"dataset", "instruction", "output", "generator"}
    ran = "aisp {sigma2: 0.3, lambda: {ess: 0.1}, num_samples: 4, num_iterations: 3}"
    assert {answer["generator"] for answer in answers} == {f"model + {ran}"}
    card = (tmp_path / "o/README.md").read_text()
    assert f"method `{ran}`" in card and "| sft | 10 | none | 10 |" in card and "config_name: prompts" in card


def test_the_same_call_gives_the_same_bytes_and_several_outputs_keep_their_ids_apart(folder, tmp_path):
    for out in ("a", "b"):
        run(folder, tmp_path / out, "--to", "dpo")
    files = [{f.name: f.read_bytes() for f in (tmp_path / out / "dpo").iterdir()} for out in "ab"]
    assert files[0] == files[1]
    flags = [str(folder / "chat"), str(folder / "bare"), "--to", "prompts", "--out", str(tmp_path / "both")]
    assert job.main(flags) == 0
    ids = [row["id"] for row in pq.read_table(tmp_path / "both/prompts").to_pylist()]
    assert len(set(ids)) == len(ids) == 20


def test_a_fault_in_the_middle_leaves_nothing(folder, tmp_path, monkeypatch):
    def fails(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(job, "_describe", fails)
    with pytest.raises(OSError):
        job.main([str(folder / "chat"), "--to", "sft", "--out", str(tmp_path / "o")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["bare", "--to", "dpo", "--rejected", "worst"], "kept none .save.candidates: none.; use --rejected base"),
        (["chat", "--to", "dpo", "--rejected", "original"], "has none; use another rule, or a run with prompts.drop_"),
        (["chat", "--to", "dpo", "--rejected", "best"], "--rejected is 'best'; give base, original, worst, median"),
        (["chat", "--to", "dpo", "--rejected", "lowest-above:nan"], "lowest-above:FLOOR with a number"),
        (["chat", "--to", "dpo", "--rejected", "lowest-above:x"], "lowest-above:FLOOR with a number"),
        (["chat", "--to", "dpo", "--held-out-agrees", "nobody"], "'nobody' is no reward of"),
        *(
            (["chat", "--to", "dpo", "--held-out-agrees", "words", "--rejected", rule], f"{rule} takes a candidate")
            for rule in ("worst", "median", "lowest-above:0")
        ),
        (["raw", "--to", "sft", "--sft-format", "messages"], "plain text"),
        (["chat", "raw", "--to", "sft"], "export them separately"),
        (["nothing", "--to", "sft"], "holds no run"),
        (["chat", "chat", "--to", "sft"], "two are of the same run"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(folder, tmp_path, flags, said):
    names = [str(folder / word) if word in ("bare", "chat", "raw", "nothing") else word for word in flags]
    with pytest.raises(ConfigError, match=said):
        job.main([*names, "--out", str(tmp_path / "o")])
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_there_and_an_unreachable_hub(folder, tmp_path):
    (tmp_path / "o").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        run(folder, tmp_path / "o", "--to", "sft")
    with pytest.raises(cli.Exit, match="--push-to-hub me/x: .*is written, upload it later"):
        job.main([str(folder / "chat"), "--to", "sft", "--out", str(tmp_path / "p"), "--push-to-hub", "me/x"])
    assert (tmp_path / "p" / "export.json").exists()


def test_a_place_that_is_no_local_directory_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is no local directory"):
        job.main([str(folder / "chat"), "--to", "sft", "--out", "s3://bucket/x"])
    assert list(tmp_path.iterdir()) == []


def test_hostile_texts_come_back_as_they_were(tmp_path):
    texts = ["a\0b", "\u2028 \U0001f600 </script>", '{"role": "user"}', "x" * 100_000]
    found = [example(id=str(i), chosen=text, rejected=f"{text}!") for i, text in enumerate(texts)]
    count = export.write("dpo", iter(found), tmp_path, export.schema("dpo", True, {}), 3)
    back = [row for f in sorted(tmp_path.iterdir()) for row in pq.read_table(f).to_pylist()]
    assert count == 4 and [row["chosen"][0]["content"] for row in back] == texts and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "reward", "prompts"])
def test_kept_columns_are_carried_into_every_table(folder, tmp_path, kind):
    run(folder, tmp_path / "o", "--to", kind)
    notes = {row["id"]: row["note"] for row in pq.read_table(folder / "chat/data").to_pylist()}
    rows = pq.read_table(tmp_path / "o" / kind).to_pylist()
    assert rows and all(row["note"] == notes[row["id"]] and row["kept_as_json"] == [] for row in rows)


def test_outputs_whose_kept_columns_differ(folder, tmp_path):
    """One that lacks a column has nulls there; one with another type is exported apart."""
    (tmp_path / "rewards.py").write_text(finished.REWARDS)
    for name, note in (("none", None), ("text", "a"), ("number", 1)):
        row = {"name": name, "prompt": f"Say {name}"} | ({} if note is None else {"note": note})
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        keep = {"source": str(tmp_path / f"{name}.jsonl"), "keep": [] if note is None else ["note"]}
        finished.output(tmp_path, name, prompts=keep, generator={"model": str(folder / "model")})
    names = [str(tmp_path / name) for name in ("none", "text")]
    assert job.main([*names, "--to", "prompts", "--out", str(tmp_path / "both")]) == 0
    assert [row["note"] for row in pq.read_table(tmp_path / "both/prompts").to_pylist()] == [None, "a"]
    with pytest.raises(ConfigError, match="'note' is string in one of them and int64 in"):
        job.main([names[1], str(tmp_path / "number"), "--to", "prompts", "--out", str(tmp_path / "o")])


def test_another_export_to_the_same_place_is_another_table_for_datasets(folder, tmp_path):
    for rule in ("base", "worst"):
        shutil.rmtree(tmp_path / "pairs", ignore_errors=True)
        run(folder, tmp_path / "pairs", "--to", "dpo", "--rejected", rule)
        there = pq.read_table(tmp_path / "pairs/dpo").to_pylist()
        seen = datasets.load_dataset(str(tmp_path / "pairs"), "dpo", split="train", cache_dir=str(tmp_path / "cache"))
        assert seen.to_list() == there
