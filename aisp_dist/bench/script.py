"""What a user would script in place of a run: vLLM's `generate` with n samples of each prompt, the same rewards, the
best answer kept. It reads prompts, renders them and scores by the same code as a run does, so that the two differ in
how answers are drawn."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from aisp_dist import rewards
from aisp_dist.align import tokens_of
from aisp_dist.bench.apart import Work
from aisp_dist.config import Generator, Run
from aisp_dist.data import prompts
from aisp_dist.data.chat import end_of_turn
from aisp_dist.engine import pretrained
from aisp_dist.records import Prompt
from aisp_dist.rewards.combine import combine

# Where nothing else is set: all cores decode, and blocks of 32 tokens, since a block of 128 shares no part of a short
# prompt. On GPUs vLLM's own block size stays.
_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "{cores}", "VLLM_CPU_KVCACHE_SPACE": "4"}
_BLOCK = 32
TOP_K = 50


def variants(run: Run) -> dict[str, dict[str, Any]]:
    """vLLM's sampling by the contender's name: as the method draws, then without top_p, then with top_k. A method that
    finds top_p for each prompt is beside top_p 0.9; one that decodes greedily under noise, beside greedy decoding."""
    sampling, rates = run.method.draws()
    if sampling.decode is None and rates.drawing is None:
        return {"vllm greedy": {"temperature": 0.0}}
    p, temperature = (sampling.decode.p, sampling.decode.temperature) if sampling.decode else (0.9, 1.0)
    return {
        f"vllm top_p {p:g}": {"temperature": temperature, "top_p": p},
        "vllm without top_p": {"temperature": temperature},
        f"vllm top_k {TOP_K}": {"temperature": temperature, "top_k": TOP_K},
    }


@contextmanager
def script(run: Run, base_dir: Path, folder: str, count: int, engine: Mapping[str, Any]) -> Iterator[Work]:
    """Load vLLM and the rewards. Yields the work: `work(sampling, count)` answers the first prompts.

    run: located. folder: for a copy of the model, where vLLM does not read its file. engine: arguments of vllm.LLM,
    over those that the configuration gives."""
    on_cpu = _settle()
    vllm = importlib.import_module("vllm")
    tokenizer, settings = pretrained.tokenizer(run.generator), run.generator
    lines = [line for line in islice(prompts.read(run.prompts), count) if isinstance(line, Prompt)]
    asked = [tokens_of(run, line, tokenizer, None) for line in lines]
    model = _directory(settings, folder)
    arguments = {
        "model": model,
        "revision": settings.revision,
        "dtype": settings.dtype,
        "max_model_len": max(map(len, asked)) + settings.max_new_tokens,
        # One seed for all that is drawn: with one a request vLLM 0.32 draws row by row, and its CPU engine dies where
        # it reads a prompt in pieces ("CPU Generator does not use offset").
        "seed": run.seed % (1 << 32),  # numpy, which vLLM seeds too, takes no larger one
        "enable_prefix_caching": True,
        **({"block_size": _BLOCK} if on_cpu else {}),
        **engine,
    }
    llm = vllm.LLM(**arguments)
    selecting = {name: reward for name, reward in run.rewards.items() if reward.use == "select"}
    score = {name: rewards.load(name, r, base_dir, None, run.prompts.keep) for name, r in selecting.items()}
    turn_end = end_of_turn(tokenizer)
    ends = {"stop": list(settings.stop) or None, "stop_token_ids": None if turn_end is None else [turn_end]}
    samples = run.method.num_samples * run.method.num_iterations

    def work(sampling: Mapping[str, Any], count: int) -> dict[str, Any]:
        drawn = _draw(vllm, llm, asked[:count], samples, {**ends, **sampling}, settings.max_new_tokens)
        best, tokens = [], 0
        for line, answers in zip(lines, drawn, strict=False):
            texts = [answer.text for answer in answers]
            tokens += sum(len(answer.token_ids) for answer in answers)
            totals, _ = combine(selecting, run.combine, {name: score[name](line, texts) for name in selecting}, {})
            best.append(max((t.value for t in totals if t.value is not None), default=None))
        found = [value for value in best if value is not None]
        return {"prompts": len(best), "tokens": tokens, "reward": fmean(found) if found else None}

    yield work


def _draw(
    vllm: Any, llm: Any, asked: list[Any], samples: int, sampling: Mapping[str, Any], new_tokens: int
) -> list[list[Any]]:
    """The answers of each prompt. Greedy samples are one request each, since vLLM refuses n > 1 for them."""
    n, times = (1, samples) if sampling["temperature"] == 0 else (samples, 1)
    params = vllm.SamplingParams(n=n, max_tokens=new_tokens, **sampling)
    given = [{"prompt_token_ids": list(tokens)} for tokens in asked for _ in range(times)]
    outputs = llm.generate(given, params, use_tqdm=False)
    flat = [answer for output in outputs for answer in output.outputs]
    return [flat[i : i + samples] for i in range(0, len(flat), samples)]


def _directory(settings: Generator, folder: str) -> str:
    """The model as vLLM reads it: a GGUF file's weights, and those with an adapter, are written out as the
    run has them: dequantised, merged."""
    if not Path(settings.model).is_file() and not settings.adapter:
        return settings.model
    pretrained.weights(settings, torch.device("cpu")).save_pretrained(folder)
    pretrained.tokenizer(settings).save_pretrained(folder)
    return folder


def _settle() -> bool:
    """Environment of vLLM, before it is imported. Returns whether it will run on the CPU."""
    if torch.cuda.is_available():
        return False
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    for name, value in _CPU.items():
        os.environ.setdefault(name, value.format(cores=cores))
    return True
