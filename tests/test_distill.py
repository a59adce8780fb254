"""The measurement of students: its parts, with real trainers on the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from aisp_dist import demo
from jobs import prepare, settings
from tests.bench.distill import measure, prompts, students

DISTILL = Path(__file__).parent / "bench" / "distill"


@pytest.fixture(scope="module")
def run():
    _, run, base_dir = settings.read(settings.parser("align", ""), [str(DISTILL / "relabel.yaml")])
    return prepare.check(
        run.model_copy(update={"prompts": run.prompts.model_copy(update={"source": "demo"})}), base_dir
    )


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_training_prompts_are_unique_and_none_is_measured(tmp_path):
    prompts.main(str(tmp_path / "t.jsonl"))
    asked = [json.loads(line)["prompt"] for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    measured = {json.loads(line)["prompt"] for line in demo.path("prompts").read_text().splitlines()}
    assert len(set(asked)) == len(asked) == 400 and not set(asked) & measured


def test_students_learn_what_they_are_taught_and_measures_are_of_the_student(run, tmp_path):
    """A student of one answer repeats it, at a high NLL by the teacher; training on pairs changes it again."""
    teacher = run.generator.model
    ask = [[{"role": "user", "content": f"What is {thing} for?"}] for thing in ("tea", "a map", "rain", "a bus")] * 8
    rows = Dataset.from_list([{"prompt": p, "completion": said("Cats cats cats cats cats cats.")} for p in ask])
    folder = students.sft(teacher, rows, tmp_path / "sft", lr=3e-3, epochs=6.0, seed=0)
    again = students.sft(teacher, rows, tmp_path / "again", lr=3e-3, epochs=6.0, seed=0)
    assert (folder / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    pairs = Dataset.from_list(
        [{"prompt": p, "chosen": said("Dogs."), "rejected": said("Cats cats cats cats cats cats.")} for p in ask]
    )
    other = students.dpo(str(folder), pairs, tmp_path / "dpo", lr=3e-4, epochs=1.0, beta=0.1, seed=0)
    first, second = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (folder, other))
    assert any((first[name] != second[name]).any() for name in first)
    found = measure.measure(run, DISTILL, {"teacher": teacher, "cats": str(folder)}, 8)
    own, cats = found["teacher"], found["cats"]
    assert set(own) == {"NLL by the teacher", "diversity", "tokens", "helpful", "other"}
    assert (cats["diversity"] < 1).any() and cats["helpful"].mean() < own["helpful"].mean()
    assert cats["NLL by the teacher"].mean() > own["NLL by the teacher"].mean() + 1


def test_the_table_pairs_prompts_and_averages_over_seeds():
    base = [{"r": np.array([0.0, 1.0, 2.0])}, {"r": np.array([0.0, 1.0, 2.0])}]
    more = [{"r": np.array([1.0, 2.0, 3.0])}, {"r": np.array([2.0, 3.0, 4.0])}]
    rows = measure.table({"base": base, "more": more}, against="base", main="r")
    assert rows[0]["r over base"] == (0, 0, 0) and rows[1]["r over base"] == (1.5, 1.5, 1.5)
    assert rows[1]["r, std over seeds"] == 0.5 and rows[1]["r"].mean == 2.5
