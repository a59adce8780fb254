"""The engine against transformers' own `generate`, token for token, and against dense hidden states."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import slow_path
import tiny
import torch

from aisp_dist.engine import model
from aisp_dist.records import BASE_ITERATION, Round, Sampling

STEPS, SAMPLES, DIM = 20, 5, 32
PROMPT = tuple(int(x) for x in torch.randint(4, 260, (21,), generator=torch.Generator().manual_seed(1)))
SAMPLING = Sampling(sigma2=0.3)


def adapted(family: str, **overrides: Any) -> model.LM:
    """A model that no end token stops, so that every comparison runs over all steps."""
    made = tiny.causal(family, **overrides)
    made.config.get_text_config().eos_token_id = made.generation_config.eos_token_id = None
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    return model.adapt(made, tokenizer)


def controlled(sampling: Sampling = SAMPLING, iterations: int = 2, prompt: tuple[int, ...] = PROMPT) -> Round:
    trace = slow_path.trace(iterations, SAMPLES, STEPS)
    return Round(7, "p", prompt, iterations, 0, SAMPLES, sampling, trace)


def distance(lm: model.LM, reference: Any, round: Round) -> tuple[float, list[list[int]]]:
    """Largest |dz| of the engine's states against the reference's dense ones on the engine's own tokens, and those."""
    engine = slow_path.Watched(lm, SAMPLES, STEPS)
    made = slow_path.tokens(engine.run([round])[0])
    worst = 0.0
    for sample, tokens in zip(range(round.start, round.stop), made, strict=True):
        z_TD = slow_path.states(reference, [*round.prompt_tokens, *tokens])[len(round.prompt_tokens) - 1 :]
        for step in range(1, STEPS + 1):
            z_D = engine.seen[round.prompt_id, round.iteration, sample, step]
            worst = max(worst, float((z_D - z_TD[step - 1]).abs().max()))
    return worst, made


FAMILIES = [
    "llama",
    "mistral",
    "qwen3",
    "gemma3",
    "gemma2",
    "gpt2",
    "phi3",
    "gemma3_multimodal",
    "gpt_oss",
    "mixtral",
    "cohere",
    "opt",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_and_states_as_generate(family: str) -> None:
    round, reference = controlled(), tiny.causal(family)
    worst, made = distance(adapted(family), reference, round)
    assert worst < 1e-5
    assert made == slow_path.generate(reference, round, STEPS)
    assert len({tuple(row) for row in made}) > 1  # noise does something


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.3, "ar1", 0.8), Sampling(0.3, "mixture", 0.6), Sampling(0.3, "shared"), Sampling(0.3, "mixture", 0.0)],
)
@pytest.mark.parametrize("iterations", [0, 3])
def test_every_noise_kind_is_the_one_of_its_covariance(sampling: Sampling, iterations: int) -> None:
    round = controlled(sampling, iterations)
    rollout = slow_path.Watched(adapted("llama"), SAMPLES, STEPS).run([round])[0]
    assert slow_path.tokens(rollout) == slow_path.generate(tiny.causal("llama"), round, STEPS)


@pytest.mark.parametrize(
    ("family", "overrides"), [("mistral", {"sliding_window": 9}), ("gemma3", {"sliding_window": 7})]
)
def test_a_window_off_by_one_would_be_seen(family: str, overrides: dict[str, int]) -> None:
    worst, _ = distance(adapted(family), tiny.causal(family, **overrides), controlled())
    assert worst > 1e-3


@pytest.mark.parametrize("window", [1, 2, 20, 21, 22, 64])
def test_windows_around_the_length_of_the_prompt(window: int) -> None:
    reference = tiny.causal("mistral", sliding_window=window)
    worst, _ = distance(adapted("mistral", sliding_window=window), reference, controlled())
    assert worst < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("length", [1, 21])
def test_no_control_is_greedy_generate(family: str, length: int) -> None:
    round = Round(0, "p", PROMPT[:length], BASE_ITERATION, 0, 1, Sampling())
    rollout = slow_path.Watched(adapted(family), 4, STEPS).run([round])[0]
    assert slow_path.tokens(rollout) == slow_path.generate(tiny.causal(family), round, STEPS)
    assert rollout.u_sq == 0.0


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere"])
def test_nll_is_the_mean_cross_entropy_of_the_whole_model(family: str) -> None:
    response = tuple(range(30, 42))
    with torch.no_grad():
        logits_TV = tiny.causal(family)(torch.tensor([PROMPT + response])).logits[0, len(PROMPT) - 1 : -1]
    expected = float(torch.nn.functional.cross_entropy(logits_TV.double(), torch.tensor(response)))
    assert slow_path.Watched(adapted(family), 4, STEPS).nll(PROMPT, response) == pytest.approx(expected, rel=1e-5)


def test_a_long_prompt_is_prefilled_and_measured_in_chunks() -> None:
    long = {"max_position_embeddings": 1024}
    prompt = tuple(int(x) for x in torch.randint(4, 260, (700,), generator=torch.Generator().manual_seed(2)))
    for family in ("llama", "gemma2"):
        reference, lm = tiny.causal(family, **long), adapted(family, **long)
        worst, _ = distance(lm, reference, dataclasses.replace(controlled(prompt=prompt), stop=2))
        assert worst < 1e-5
        with torch.no_grad():
            logits_TV = reference(torch.tensor([prompt])).logits[0, :-1].double()
        expected = float(torch.nn.functional.cross_entropy(logits_TV, torch.tensor(prompt[1:])))
        assert slow_path.Watched(lm, 4, 1).nll(prompt[:1], prompt[1:]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_a_head_in_fp32_beside_a_model_in_bf16(family: str) -> None:
    """Its logits are those of the whole model's own map in fp32, on the same states; the shared weights stay bf16."""
    made = tiny.causal(family).to(torch.bfloat16)
    lm = model.adapt(made, tiny.tokenizer(), fp32_head=True)
    z_TD = lm.dense(PROMPT)[0]
    reference = model.adapt(tiny.causal(family).to(torch.bfloat16).float(), tiny.tokenizer())
    assert torch.equal(lm.logits(z_TD.float() + 1e-4), reference.logits(z_TD.float() + 1e-4))
    plain = model.adapt(tiny.causal(family).to(torch.bfloat16), tiny.tokenizer())
    assert not torch.equal(lm.logits(z_TD), plain.logits(z_TD))
    assert made.get_output_embeddings().weight.dtype == torch.bfloat16
