"""vLLM's tokens under control against the local engine's, both in fp32 on a tiny model."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import slow_path
import tiny
import torch
from engines import SHAPE, SPOILT, STEPS, settings

from aisp_dist.engine import model
from aisp_dist.engine.calibrate import calibrate
from aisp_dist.engine.decode import Engine
from aisp_dist.philox import prompt_key
from aisp_dist.records import BASE_ITERATION, Calibration, Late, Rates, Rollout, Round, Sampling, TopP
from aisp_dist.vllm import requests
from aisp_dist.vllm.service import NotFinite

PROMPT = tuple(range(60, 110))
NOISY = Sampling(0.3)


def rounds() -> dict[str, Round]:
    def one(name: str, sampling: Sampling, samples: int = 4, iterations: bool = False, **more: Any) -> Round:
        told = {"trace": slow_path.trace(3, samples, STEPS)} if iterations else {}
        return Round(3, name, PROMPT, 3 if iterations else 0, 0, samples, sampling, **told | more)

    likely = replace(NOISY, likelihood=True)
    drawn = Sampling(decode=TopP(0.9, 1.0))
    starts = tuple(tuple(range(40 + i, 40 + 2 * i)) for i in range(4))  # of 0 to 3 tokens
    return {
        "greedy": Round(3, "greedy", PROMPT, BASE_ITERATION, 0, 1, Sampling()),
        "u = 0": one("a", NOISY),
        "u != 0": one("b", NOISY, iterations=True),
        "marginal": one("c", replace(NOISY, after_eos="marginal", alpha=0.9), iterations=True),
        "ar1": one("d", Sampling(0.3, "ar1", 0.8), iterations=True),
        "shared": one("e", Sampling(0.3, "shared"), iterations=True),
        "mixture": one("f", Sampling(0.3, "mixture", 0.6), iterations=True),
        "mean": one("g", replace(NOISY, mean=True), 1, iterations=True, trace=slow_path.trace(3, 4, STEPS)),
        "top p": one("h", drawn),
        "hot": one("i", Sampling(decode=TopP(1.0, 1.5))),
        "noise and draws": one("j", replace(NOISY, decode=TopP(0.8, 0.7)), iterations=True),
        "given tokens, drawn": one("k", drawn, starts=starts),
        "given tokens, measured without draws": one("l", Sampling(likelihood=True), starts=starts),
        "given tokens, measured": one("m", replace(drawn, likelihood=True), starts=starts),
        "measured": one("n", likely, iterations=True),
        "late samples": replace(one("b", NOISY, iterations=True), start=2, stop=6),
    }


@pytest.fixture(scope="module")
def lm() -> Any:
    return model.adapt(tiny.causal("llama", **SHAPE), tiny.tokenizer())


@pytest.fixture(scope="module")
def local(lm: Any) -> dict[str, Rollout]:
    engine = Engine(lm, 32, STEPS)
    return dict(zip(rounds(), engine.run(rounds().values()), strict=True))


@pytest.fixture(scope="module")
def theirs(service: Any, on: Any) -> dict[str, Rollout]:
    """Every round, one after the other."""
    return {name: on(service.rollout(round)) for name, round in rounds().items()}


@pytest.mark.parametrize("name", list(rounds()))
def test_tokens_texts_and_costs_are_the_local_engines(
    name: str, local: dict[str, Rollout], theirs: dict[str, Rollout]
) -> None:
    ours, found = local[name], theirs[name]
    assert slow_path.tokens(found) == slow_path.tokens(ours)
    assert [(t.sample, t.text, t.finish_reason) for t in found.trajectories] == [
        (t.sample, t.text, t.finish_reason) for t in ours.trajectories
    ]
    assert found.u_sq == pytest.approx(ours.u_sq, rel=1e-9)
    for mine, right in zip(found.trajectories, ours.trajectories, strict=True):
        assert (mine.control_cost, mine.control_sq) == pytest.approx((right.control_cost, right.control_sq), rel=1e-6)
        assert (mine.nll is None) == (right.nll is None)
        assert mine.nll == pytest.approx(right.nll, abs=1e-4)


def test_the_cases_differ_from_greedy(local: dict[str, Rollout]) -> None:
    greedy = local["greedy"].trajectories[0].token_ids
    same = [name for name, r in local.items() if all(t.token_ids == greedy for t in r.trajectories)]
    assert same == ["greedy"]


def test_rounds_that_share_a_batch_are_as_alone(service: Any, on: Any, theirs: dict[str, Rollout]) -> None:
    async def together() -> list[Rollout]:
        return await asyncio.gather(*(service.rollout(round) for round in rounds().values()))

    assert [slow_path.tokens(r) for r in on(together())] == [slow_path.tokens(theirs[name]) for name in rounds()]
    assert service.meter.row_steps > service.meter.steps > 0
    assert not service.busy


def test_likelihoods_are_the_base_models(service: Any, on: Any, local: dict[str, Rollout]) -> None:
    answers = [t.token_ids for name in ("greedy", "u != 0", "top p") for t in local[name].trajectories]
    causal = tiny.causal("llama", **SHAPE)
    right = []
    for answer in answers:
        with torch.no_grad():
            logits = causal(torch.tensor([[*PROMPT, *answer]])).logits[0, len(PROMPT) - 1 : -1].double()
        right.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer))))
    assert on(service.nll(PROMPT, answers)) == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize("rates", [Rates(noise=0.1), Rates(drawing=0.3)])
def test_a_calibration_is_the_local_engines(service: Any, on: Any, lm: Any, rates: Rates, local: Any) -> None:
    base = local["greedy"].trajectories[0].token_ids
    asked = Calibration(3, "p", PROMPT, base, Sampling(likelihood=True), rates)
    right = calibrate(lm, asked.sampling, rates, prompt_key(3, "p"), PROMPT, base)
    assert on(service.calibrate(asked)) == right != asked.sampling


def test_answers_with_an_adapter_are_those_of_the_merged_model(
    service: Any, on: Any, adapter: tuple[Path, Any], local: dict[str, Rollout]
) -> None:
    from vllm.lora.request import LoRARequest

    directory, merged = adapter
    engine = Engine(model.adapt(merged, tiny.tokenizer()), 32, STEPS)

    async def together() -> list[Rollout]:
        return await asyncio.gather(*(service.rollout(round) for round in rounds().values()))

    before, service.served = service.served, replace(service.served, adapter=LoRARequest("adapter", 1, str(directory)))
    try:
        rollouts = on(together())
    finally:
        service.served = before
    for name, found, right in zip(rounds(), rollouts, engine.run(rounds().values()), strict=True):
        assert slow_path.tokens(found) == slow_path.tokens(right) != slow_path.tokens(local[name]), name
        for mine, other in zip(found.trajectories, right.trajectories, strict=True):
            assert (mine.control_cost, mine.text) == (pytest.approx(other.control_cost, rel=1e-6), other.text)
            assert mine.nll == pytest.approx(other.nll, abs=1e-4)


def test_a_cancelled_round_leaves_vllm(service: Any, on: Any) -> None:
    async def cancel() -> tuple[int, int]:
        call = asyncio.ensure_future(service.rollout(replace(rounds()["u = 0"], stop=24)))
        while not (there := service.llm.get_num_unfinished_requests()):
            await asyncio.sleep(0.001)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        return there, service.llm.get_num_unfinished_requests()

    before, after = on(cancel())
    assert before > after == 0
    assert not service.busy


def test_a_round_beyond_its_limit_is_late(service: Any, on: Any) -> None:
    service.limit, before = 1e-4, service.limit
    try:
        with pytest.raises(Late, match="not finished after 0.0001 s"):
            on(service.rollout(rounds()["u != 0"]))
    finally:
        service.limit = before


@pytest.mark.parametrize(
    ("round", "message"),
    [
        (replace(rounds()["u = 0"], prompt_tokens=()), "no tokens"),
        (replace(rounds()["u = 0"], prompt_tokens=(10_000,)), "vocabulary"),
        (replace(rounds()["u = 0"], prompt_tokens=PROMPT * 3), "positions"),
        (replace(rounds()["u = 0"], starts=((5,),) * 4), "one or the other"),
    ],
)
def test_a_round_that_does_not_fit_is_refused(service: Any, on: Any, round: Round, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on(service.rollout(round))


def test_logits_that_are_not_finite_are_never_an_answer(service: Any, on: Any) -> None:
    with pytest.raises(ValueError, match="not finite; lower method.sigma2"):
        on(service.rollout(Round(3, "inf", PROMPT, 0, 0, 2, Sampling(1e77))))


def test_what_is_not_finite_fails_alone(service: Any, on: Any, local: dict[str, Rollout]) -> None:
    """A greedy round, a given answer and a calibration. Rounds beside them and after them, in the blocks that they
    leave, are as ever."""
    spoilt, base = (*PROMPT, SPOILT), local["greedy"].trajectories[0].token_ids
    names = ("u != 0", "top p", "greedy")

    async def all() -> list[Any]:
        calls = [
            service.rollout(replace(rounds()["greedy"], prompt_tokens=spoilt)),
            service.nll(spoilt, [base]),
            service.calibrate(Calibration(3, "p", spoilt, base, Sampling(), Rates(noise=0.1))),
            *(service.rollout(rounds()[name]) for name in names),
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    *failed, first, second, third = on(all())
    assert [type(error) for error in failed] == [NotFinite] * 3
    assert "iteration -1: the logits of sample 0 are not finite" in str(failed[0])
    again = [on(service.rollout(rounds()[name])) for name in names]
    right = [slow_path.tokens(local[name]) for name in names]
    assert [slow_path.tokens(rollout) for rollout in (first, second, third)] == right
    assert [slow_path.tokens(rollout) for rollout in again] == right
    assert not service.busy


@pytest.mark.parametrize("printable", [True, False])
def test_stop_strings_and_end_tokens(
    service: Any, on: Any, lm: Any, local: dict[str, Rollout], printable: bool
) -> None:
    """The same ends as the local engine's, also of a string that begins in given tokens, or is no character."""
    text = local["top p"].trajectories[0].text
    stop = (next(c for c in text[1:] if c.isascii()) if printable else text[2:4], "<turn>")
    engine = Engine(lm, 32, STEPS, stop)
    before, service.served = service.served, replace(service.served, stop=engine.stop, end_ids=engine.end_ids)
    tokens = local["top p"].trajectories[0].token_ids
    begun = replace(rounds()["top p"], starts=(tokens[:3], (), (), ()))
    try:
        for round in (rounds()["top p"], begun):
            (right,), found = engine.run([round]), on(service.rollout(round))
            assert slow_path.tokens(found) == slow_path.tokens(right)
            assert [(t.text, t.finish_reason) for t in found.trajectories] == [
                (t.text, t.finish_reason) for t in right.trajectories
            ]
            assert right.trajectories[0].finish_reason == "stop" and len(right.trajectories[0].token_ids) > 1
    finally:
        service.served = before


@pytest.mark.parametrize("name", ["greedy", "top p", "given tokens, drawn", "given tokens, measured", "measured"])
def test_a_stop_string_that_vllm_sees_and_the_text_lacks(
    service: Any, on: Any, local: dict[str, Rollout], name: str
) -> None:
    """vLLM's answer ends at it, the trajectory goes on: with the tokens, end and likelihood as without any string."""
    right = local[name].trajectories
    within = slice(1, 2) if name == "given tokens, measured" else slice(3, -3)  # there, of the tokens that are given
    letter = next(c for c in right[-1].text[within] if c.isascii())
    deaf, decode = tiny.tokenizer(), tiny.tokenizer().decode
    deaf.decode = lambda *args, **more: decode(*args, **more).replace(letter, "")
    before, service.served = service.served, replace(service.served, stop=(letter,), tokenizer=deaf)
    asked: list[tuple[str, ...]] = []
    trajectory = requests.trajectory
    requests.trajectory = lambda *args: (asked.append(args[-1]), trajectory(*args))[1]  # type: ignore[func-returns-value]
    try:
        found = on(service.rollout(rounds()[name])).trajectories
    finally:
        service.served, requests.trajectory = before, trajectory
    assert asked.count(()) and asked.count((letter,)) == len(right)
    assert [(t.token_ids, t.finish_reason) for t in found] == [(t.token_ids, t.finish_reason) for t in right]
    assert [t.text for t in found] == [t.text.replace(letter, "") for t in right]
    assert [t.nll for t in found] == pytest.approx([t.nll for t in right], abs=1e-4)


def test_pickled_weights_are_read_only_where_that_is_asked_for(llama: Path, tmp_path: Path) -> None:
    """vLLM would take them from a hub id without safetensors."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    from aisp_dist.vllm.start import arguments

    (tmp_path / "pytorch_model.bin").write_bytes(b"")

    def files(**own: Any) -> list[str]:
        format = arguments(settings(llama, vllm=own), 100)["load_format"]
        loader: Any = get_model_loader(LoadConfig(load_format=format))
        found: list[str] = loader._prepare_weights(str(tmp_path), None, None, True, None)[1]
        return found

    assert files(load_format="auto") == [str(tmp_path / "pytorch_model.bin")]
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        files()
