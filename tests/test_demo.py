"""The demo: laws of its domain, files that are ordinary models, and reward models that generalise to held-out
questions."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from aisp_dist import demo
from tests.demo_recipe import domain, measure, recipe

CLASSES = {
    "base": AutoModelForCausalLM,
    "reward": AutoModelForSequenceClassification,
    "judge": AutoModelForSequenceClassification,
}
PROMPTS = [json.loads(line) for line in demo.path("prompts").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def loaded():
    return {
        name: (cls.from_pretrained(demo.path(name), dtype="auto"), AutoTokenizer.from_pretrained(demo.path(name)))
        for name, cls in CLASSES.items()
    }


def test_combinations_are_split_without_overlap():
    parts = [domain.combinations(part) for part in ("first", "second", "held_out")]
    everything = itertools.product(range(len(domain.topics())), domain.KINDS)
    assert Counter(c for part in parts for c in part) == Counter(everything)
    assert [len(part) for part in parts] == [len(domain.topics()) * share for share in (4, 4, 2)]
    assert len(domain.topics()) >= 20 and len(domain.KINDS) >= 8


def test_same_seed_same_pairs():
    def drawn(seed):
        rng = Random(seed)
        return [domain.pair(rng, measure.draw_question(rng, "held_out")) for _ in range(30)]

    assert drawn(1) == drawn(1) != drawn(2)


def test_pairs_are_ordered_and_no_answer_beats_a_complete_one():
    rng = Random(3)
    for _ in range(500):
        q = measure.draw_question(rng, "first", "second", "held_out")
        pair = domain.pair(rng, q)
        assert pair.gap >= 1 and pair.better != pair.worse
        best = domain.complete(rng, q)
        given = domain.answer(rng, q, flawed=0.5)
        assert given.quality <= best.quality
        assert domain.damage(rng, given.text, given.quality, best.text).quality < given.quality


def test_a_voice_misses_phrasings_the_other_knows():
    heard = {v: {domain.question(Random(i), 0, "how", v).text for i in range(200)} for v in ("all", "early", "late")}
    assert heard["early"] < heard["all"] > heard["late"]
    assert heard["early"] | heard["late"] == heard["all"] and heard["early"] != heard["late"]


def test_path_names_its_choices_and_needs_no_torch():
    with pytest.raises(ValueError, match="no 'big'; choose one of base, reward, judge, prompts"):
        demo.path("big")
    code = "import sys, aisp_dist.demo as d; d.path('base'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(demo.__file__).parents[2]).returncode == 0


def test_the_files_are_small():
    assert sum(f.stat().st_size for f in demo.path("base").parent.rglob("*") if f.suffix != ".pyc") < 10_000_000


@pytest.mark.parametrize("name", CLASSES)
def test_fp16_on_disk_is_fp32_of_equal_value_in_memory(loaded, name):
    model, _ = loaded[name]
    stored = load_file(demo.path(name) / "model.safetensors")
    held = model.state_dict()
    assert model.dtype == torch.float32 and {v.dtype for v in stored.values()} == {torch.float16}
    assert all(torch.equal(held[key], value.float()) for key, value in stored.items())
    if name != "base":
        assert model.config.num_labels == 1 and model.config.pad_token_id not in (None, model.config.eos_token_id)


@pytest.mark.parametrize("name", CLASSES)
def test_the_template_writes_the_only_bos(loaded, name):
    _, tok = loaded[name]
    messages = [{"role": "user", "content": "How do I make soup?"}, {"role": "assistant", "content": "Fry the onions."}]
    text = tok.apply_chat_template(messages, tokenize=False)
    assert text.endswith(f"Fry the onions.{tok.eos_token}")
    assert tok.encode(text, add_special_tokens=False).count(tok.bos_token_id) == 1
    assert tok.encode(text).count(tok.bos_token_id) == 2  # the tokenizer's own, as Llama's
    opened = tok.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(opened)
    assert tok.decode(tok.encode("It's odd,  isn't it? é", add_special_tokens=False)) == "It's odd,  isn't it? é"


def test_prompts_are_unique_and_held_out():
    texts = [p["prompt"] for p in PROMPTS]
    assert len(texts) >= 160 and len(set(texts)) == len(texts) == len({p["id"] for p in PROMPTS})
    trained = {
        domain._say(Random(0), (phrasing,), topic, "all")
        for topic, kind in domain.combinations("first", "second")
        for phrasing in domain.QUESTIONS[kind]
    }
    assert not trained & set(texts)
    assert len({t.lower() for t in texts[:20]}) == 20 and texts != sorted(texts)


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_pairwise_accuracy_on_fresh_held_out_pairs(loaded, name):
    found = measure.measure_reward(*loaded[name], measure.held_out_pairs(seed=20260, count=240), seed=20260)
    assert found["accuracy"] >= 0.9, found
    means = found["mean_reward"]
    for bad in ("gibberish", "repeated", "off topic", "empty"):
        assert means[bad] < means["better of a pair"] < means["complete"], found


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_batched_scores_equal_single_ones(loaded, name):
    texts = [(p.question.text, p.better) for p in measure.held_out_pairs(seed=1, count=12)]
    single = [measure.score(*loaded[name], [text])[0] for text in texts]
    assert measure.score(*loaded[name], texts) == pytest.approx(single, abs=1e-3)
    assert measure.score(*loaded[name], texts[::-1]) == pytest.approx(single[::-1], abs=1e-3)


def test_greedy_answers_end_and_stay_short(loaded):
    model, tok = loaded["base"]
    rows = [measure.render(tok, p["prompt"], None) for p in PROMPTS[:32]]
    ids, mask = measure.pad(rows, tok.pad_token_id, left=True)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=96, do_sample=False)[:, ids.shape[1] :]
    lengths = [(row == tok.eos_token_id).nonzero()[0].item() for row in out if (row == tok.eos_token_id).any()]
    assert len(lengths) >= 28 and sorted(lengths)[len(lengths) // 2] <= 64


def test_the_recipe_runs(tmp_path, capsys):
    recipe.main(["--out", str(tmp_path), "--quick"])
    card = json.loads((tmp_path / "card.json").read_text())
    assert set(card["models"]) == set(CLASSES) and card["prompts"] == len(PROMPTS)
    assert (tmp_path / "prompts.jsonl").read_bytes() == demo.path("prompts").read_bytes()
    for name in CLASSES:
        shipped, made = ({f.name for f in (where / name).iterdir()} for where in (demo.path("base").parent, tmp_path))
        assert made == shipped
    assert "accuracy_by_gap" in capsys.readouterr().out
