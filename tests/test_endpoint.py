"""The base model behind a server: what goes out, what comes back, what is refused. A real HTTP server that runs a tiny
model, as vLLM's completions answer (tests/vllm/test_endpoint.py asks vLLM's own)."""

from __future__ import annotations

import asyncio
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from judge_server import serving
from replicas import pool

from actors import pool as pools
from actors.generator import Generator as Actor
from aisp_dist import endpoint, placement, relabel
from aisp_dist.analysis import arms
from aisp_dist.analysis.doctor import examine
from aisp_dist.config import ConfigError, Generator, Replicas, Run, Runtime, load
from aisp_dist.engine import decode, model, sizes
from aisp_dist.output import manifest
from aisp_dist.placement import Group
from aisp_dist.records import BASE_ITERATION, Late, Round, Sampling, TopP, Trajectory
from aisp_dist.rewards.client import Unavailable
from aisp_dist.vllm.choice import Found, choose

T = 12
PROMPT = tuple(range(20, 40))
DRAWN = Sampling(decode=TopP(0.9, 1.0))


class Completions:
    """POST /v1/completions of a model, with vLLM's fields. longest: tokens that the server holds. most: that one answer
    may have, whatever is asked."""

    def __init__(self, longest: int | None = None, most: int = 1 << 20) -> None:
        self.longest, self.most = longest, most
        self.model = tiny.causal("llama").eval()
        self.tokenizer = tiny.tokenizer()
        self.turn = threading.Lock()

    @torch.inference_mode()
    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "other", "max_model_len": 3}, {"id": "tiny", "max_model_len": self.longest}]}
        assert path == "/v1/completions" and body["return_token_ids"] and body["n" if "n" in body else "top_k"] == 0
        with self.turn:
            tokens, drawn = list(body["prompt"]), torch.Generator().manual_seed(body.get("seed", 0) % (1 << 62))
            choice: dict[str, Any] = {"finish_reason": "length"}
            if "prompt_logprobs" in body:
                losses = self.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
                places = [{str(t): {"logprob": float(losses[i, t])}} for i, t in enumerate(tokens[1:])]
                choice["prompt_logprobs"] = [None, *places]
            said: list[int] = []
            while len(said) < min(body["max_tokens"], self.most):
                logits = self.model(torch.tensor([tokens + said])).logits[0, -1].double()
                if body["temperature"]:
                    chances = (logits / body["temperature"]).softmax(-1)
                    said.append(int(torch.multinomial(chances, 1, generator=drawn)))
                else:
                    said.append(int(logits.argmax()))
                text = self.tokenizer.decode(said, skip_special_tokens=True)
                if said[-1] in body.get("stop_token_ids", ()) or any(stop in text for stop in body.get("stop", ())):
                    choice["finish_reason"] = "stop"
                    break
            return {"choices": [choice | {"token_ids": said, "text": text}]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def told() -> Any:
    with serving() as told:
        told.answer = Completions()
        yield told


def settings(directory: Path, told: Any, **more: Any) -> Generator:
    there = {"url": told.url, "model": "tiny", "retries": 0, "max_parallel": 4}
    return Generator(**{"model": str(directory), "max_new_tokens": T, "endpoint": there} | more)


def local(directory: Path, rounds: list[Round], **more: Any) -> list[list[Trajectory]]:
    lm = model.load(Generator(model=str(directory), dtype="float32", engine="local"), "cpu")
    done = decode.Engine(lm, 8, T, **more).run(rounds)
    return [list(rollout.trajectories) for rollout in done]


def asked(configured: Generator, *rounds: Round) -> list[list[Trajectory]]:
    async def main() -> list[list[Trajectory]]:
        service = await endpoint.connect(configured, 100)
        try:
            return [list((await service.rollout(one)).trajectories) for one in rounds]
        finally:
            service.close()

    return asyncio.run(main())


GREEDY = Sampling()


def round_of(sampling: Sampling = GREEDY, samples: int = 1, **more: Any) -> Round:
    return Round(0, "p", PROMPT, BASE_ITERATION if samples == 1 else 0, 0, samples, sampling, **more)


def test_greedy_answers_are_those_of_the_local_engine(directory: Path, told: Any) -> None:
    """Also where tokens are given, and where a stop string ends them in the middle."""
    plain = round_of()
    ((whole,),) = local(directory, [plain])
    given = round_of(starts=(whole.token_ids[:5],))
    assert asked(settings(directory, told), plain, given) == [[whole], [whole]]
    stop = whole.text[4:6]
    cut = asked(settings(directory, told, stop=(stop,)), plain)
    assert stop.strip() and cut == local(directory, [plain], stop=(stop,))
    bodies = [body for _, body in told.seen if body.get("max_tokens") == T - 5]
    assert [body["prompt"] for body in bodies] == [[*PROMPT, *whole.token_ids[:5]]]


def test_likelihoods_are_the_base_models(directory: Path, told: Any) -> None:
    rounds = [round_of(Sampling(decode=TopP(0.9, 0.5), likelihood=True), 3)]
    (found,) = asked(settings(directory, told), *rounds)
    lm = model.load(Generator(model=str(directory), dtype="float32", engine="local"), "cpu")
    engine = decode.Engine(lm, 8, T)
    assert [t.nll for t in found] == pytest.approx([engine.nll(PROMPT, t.token_ids) for t in found], abs=1e-5)


def test_every_sample_has_a_seed_of_its_own_and_keeps_it(directory: Path, told: Any) -> None:
    """Of its seed, prompt, iteration and number, so that the same request draws the same answer, and no other does."""
    rounds = [round_of(DRAWN, 3), Round(1, "p", PROMPT, 0, 0, 3, DRAWN), Round(0, "q", PROMPT, 0, 0, 3, DRAWN)]
    rounds += [Round(0, "p", PROMPT, 1, 0, 3, DRAWN)]
    first, again = asked(settings(directory, told), *rounds), asked(settings(directory, told), *rounds)
    assert first == again and len({t.token_ids for of in first for t in of}) == 12
    drawn = [body for _, body in told.seen if body.get("temperature") == 1.0]
    assert len({body["seed"] for body in drawn}) == 12 and {body["top_p"] for body in drawn} == {0.9}
    assert all(0 <= body["seed"] < 1 << 63 for body in drawn)


def test_no_more_than_max_parallel_requests_are_in_flight(directory: Path, told: Any) -> None:
    told.delay = lambda body: 0.02
    asked(settings(directory, told), round_of(DRAWN, 20))
    assert 2 <= told.most <= 4


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"token_ids": None}, "returns no token ids"),
        ({"token_ids": ["a"]}, "returns no token ids"),
        ({"prompt_logprobs": None}, "no likelihood"),
        ({"token_ids": tiny.tokenizer().encode("abc"), "text": "xyz"}, "its tokenizer reads as 'abc' what"),
    ],
)
def test_a_server_that_cannot_serve_is_refused_at_the_start(
    directory: Path, told: Any, wrong: dict[str, Any], says: str
) -> None:
    right = told.answer
    told.answer = lambda path, body: {"choices": [of | wrong for of in right(path, body).get("choices", [])]}
    with pytest.raises(ConfigError, match=says):
        asked(settings(directory, told))


@pytest.mark.parametrize("fault", [(401, {}), (404, {})])
def test_a_wrong_key_or_address_is_said_at_the_start(directory: Path, told: Any, fault: Any) -> None:
    told.faults = [fault] * 9
    with pytest.raises(ConfigError, match="generator.endpoint: .*look at url, model and key"):
        asked(settings(directory, told))


def test_a_request_that_is_refused_is_about_its_round(directory: Path, told: Any) -> None:
    async def main() -> None:
        service = await endpoint.connect(settings(directory, told), 100)
        told.faults = [(400, {})]
        with pytest.raises(ValueError, match="the server answers 400"):
            await service.rollout(round_of())
        told.faults = [(503, {})]
        with pytest.raises(Unavailable):
            await service.rollout(round_of())
        assert (await service.rollout(round_of())).trajectories
        service.close()

    asyncio.run(main())


def test_an_answer_that_ends_early_is_asked_for_its_rest(directory: Path, told: Any) -> None:
    """As where --override-generation-config bounds max_tokens."""
    told.answer = Completions(most=5)
    plain = round_of()
    assert asked(settings(directory, told), plain) == local(directory, [plain])
    (drawn,) = asked(settings(directory, told), round_of(DRAWN, 3))
    assert {len(t.token_ids) for t in drawn if t.finish_reason == "length"} <= {T}
    seeds = [body["seed"] for _, body in told.seen if "seed" in body]
    assert len(seeds) == len(set(seeds)) > 3


def test_what_the_server_holds_bounds_prompts(directory: Path, told: Any) -> None:
    async def context(longest: int | None) -> int:
        told.answer = Completions(longest)
        service = await endpoint.connect(settings(directory, told), 100)
        service.close()
        return service.served.context_length

    assert asyncio.run(context(None)) == asyncio.run(context(1000)) == 100 + T
    assert asyncio.run(context(60)) == 59, "the likelihood of an answer asks for a token more"
    with pytest.raises(ConfigError, match="the server holds 13 tokens, and generator.max_new_tokens is 12"):
        asyncio.run(context(T + 1))


def test_a_slow_answer_is_about_its_round_where_others_are_answered(directory: Path, told: Any) -> None:
    async def main() -> None:
        service = await endpoint.connect(settings(directory, told), 100, 1.0)
        told.delay = lambda body: 2.0 if body["temperature"] else 0.0
        slow = asyncio.ensure_future(service.rollout(round_of(DRAWN, 2)))
        await asyncio.sleep(0.2)
        await service.rollout(round_of())
        with pytest.raises(Late, match="while others were answered"):
            await slow
        with pytest.raises(Unavailable):
            await service.rollout(round_of(DRAWN, 2))
        service.close()

    asyncio.run(main())


def test_a_call_that_is_cancelled_leaves_nothing_behind(directory: Path, told: Any) -> None:
    """Its places among `max_parallel` are free at once, though the server goes on."""

    async def main() -> None:
        service = await endpoint.connect(settings(directory, told), 100)
        let = threading.Event()
        told.delay = lambda body: let.wait(60) and 0.0 if body["temperature"] else 0.0
        four = asyncio.ensure_future(service.rollout(round_of(DRAWN, 4)))
        async with asyncio.timeout(50):  # below the server's wait
            while told.running < 4:
                await asyncio.sleep(0.01)
            four.cancel()
            await asyncio.gather(four, return_exceptions=True)
            assert (await service.rollout(round_of())).trajectories
        let.set()
        service.close()

    asyncio.run(main())


def test_a_server_that_comes_back_costs_no_process(directory: Path, told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_PAUSE", 0.01)
    run = config(directory, told)

    class Process:
        name, restarts = "generator-0", list[str]()
        actor = Actor(run, Path(), name, Group("generator", 1, 1, 1.0, 0.0, None))

        async def call(self, method: str, *args: Any) -> Any:
            return await getattr(self.actor, method)(*args)

        async def restart(self, why: str) -> None:
            self.restarts.append(why)

        async def health(self) -> Any:
            return await self.actor.health()

    async def main() -> None:
        process = Process()
        assert await process.actor.load() == 100 + T
        one = pool(process, timeout=None, outage=30.0)
        told.faults = ["close", (503, {}), "close"]
        assert (await one.call("p", "rollout", round_of())).trajectories
        assert not process.restarts and one.repeats == 3
        told.faults = [(503, {})] * 1000
        short = pool(process, timeout=None, outage=0.1)
        with pytest.raises(Exception, match="asked again for 0.1 s"):
            await short.call("p", "rollout", round_of())

    asyncio.run(main())


def config(directory: Path, told: Any, **changes: Any) -> Run:
    there = {"url": told.url, "model": "tiny", "retries": 0}
    values = {
        "output": "out",
        "prompts": {"format": "raw", "max_tokens": 100},
        "generator": {"model": str(directory), "max_new_tokens": T, "endpoint": there, "engine": "endpoint"},
        "rewards": {"long": {"kind": "function", "function": f"{Path(__file__).parent}/finished.py:long"}},
        "method": {"kind": "best_of_n", "num_samples": 4, "num_iterations": 2},
    }
    return load.check(values | changes)


NUCLEUS = {"sampling": {"top_p": 0.9}, "num_iterations": 3}


@pytest.mark.parametrize(
    "method",
    [
        {"kind": "best_of_n", "num_samples": 4, "num_iterations": 2},
        {"kind": "population", "num_samples": 4, **NUCLEUS},
        {"kind": "qalign", "chains": 2, **NUCLEUS},
        {"kind": "best_of_n", "num_samples": 4, "num_iterations": 2, "limit": {"nll": 9.0}},
    ],
    ids=["best_of_n", "population", "qalign", "with a limit"],
)
def test_whole_searches(directory: Path, told: Any, tmp_path: Path, method: dict[str, Any]) -> None:
    """Rows of a search in one process, again the same ones; base is the local engine's greedy answer."""
    code = "def long(completions, **_):\n    return [float(len(set(str(c)))) for c in completions]\n"
    (tmp_path / "rewards.py").write_text(code)
    rewards = {"long": {"kind": "function", "function": f"{tmp_path}/rewards.py:long"}}
    run = config(directory, told, method=method, rewards=rewards)
    prompts = ["one two", "three four five"]
    rows = list(relabel(run, prompts))
    timed = {"created"}
    first, again = (
        [{k: str(v) for k, v in r.items() if k not in timed} for r in of] for of in (rows, relabel(run, prompts))
    )
    assert first == again
    tokens = [tuple(tiny.tokenizer().encode(prompt)) for prompt in prompts]
    base = local(directory, [Round(0, "b", of, BASE_ITERATION, 0, 1, Sampling()) for of in tokens])
    assert [row["base_completion"] for row in rows] == [of[0].text for of in base]
    assert all(row["reason"] is None and math.isfinite(row["nll"]) for row in rows)


@pytest.mark.parametrize(
    "method",
    [
        {"kind": "aisp", "num_samples": 4, "num_iterations": 2, "lambda": 0.3, "sigma2": 0.3},
        {"kind": "population"},
        {"kind": "best_of_n", "sampling": {"gaussian": 0.5}},
        {"kind": "args"},
    ],
)
def test_what_needs_more_than_tokens_is_refused(directory: Path, told: Any, method: Any) -> None:
    """In a configuration, and where a comparison puts a method into one."""
    with pytest.raises(ConfigError, match="method: .* a server behind generator.endpoint"):
        config(directory, told, method=method)
    run = config(directory, told)
    reward = {"demo": {"kind": "model", "model": "demo"}}
    values = {"output": "o", "generator": {"model": "demo"}, "rewards": reward, "method": method}
    with pytest.raises(ConfigError, match="method: .* a server behind generator.endpoint"):
        choose(run.model_copy(update={"method": load.check(values).method}), None, lambda: Found(0, None))


def test_a_comparison_has_the_arms_that_a_server_can_decode(directory: Path, told: Any) -> None:
    assert set(arms.arms(config(directory, told))) == {"best-of-n top-p", "random pick"}
    population = {"kind": "population", "num_samples": 4, **NUCLEUS}
    found = set(arms.arms(config(directory, told, method=population)))
    assert found == {"best-of-n top-p", "random pick", "population", "population, rewards shuffled"}


def test_doctor_asks_the_server(directory: Path, told: Any, tmp_path: Path) -> None:
    run = config(directory, told)
    checks = list(examine.examine(run, tmp_path, 4, lambda line: None))
    assert [check.verdict for check in checks if check.name == "decoding"] == ["note"] and told.seen
    told.faults = [(503, {})]
    assert [check.verdict for check in examine.examine(run, tmp_path, 4, lambda line: None)] == ["FAILED"]
    told.faults = [(404, {})]
    with pytest.raises(ConfigError, match="look at url, model and key"):
        list(examine.examine(run, tmp_path, 4, lambda line: None))


def test_an_output_keeps_to_its_server() -> None:
    for old, new, fix in (("endpoint", 7, "put generator.endpoint back"), (7, "endpoint", "take .* out")):
        one, two = ({"components": {"engine": engine}} for engine in (old, new))
        with pytest.raises(ConfigError, match=fix):
            manifest.check_resume(one, two)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"engine": "vllm"}, "endpoint has no effect with engine: vllm"),
        ({"endpoint": None, "engine": "endpoint"}, "needs the section endpoint"),
        ({"adapter": "x"}, "adapter has no effect behind endpoint"),
        ({"dtype": "bfloat16"}, "dtype has no effect behind endpoint"),
        ({"batch_rows": 8}, "batch_rows: 8 has no effect behind endpoint"),
        ({"tensor_parallel": 2}, "tensor_parallel: 2 has no effect behind endpoint"),
    ],
)
def test_what_the_server_decides_is_no_setting(directory: Path, told: Any, more: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        settings(directory, told, **more)


def test_choice_plan_and_fingerprint(directory: Path, told: Any) -> None:
    """A server needs no GPU and nobody who looks for one; its address and model are part of what decides rows, how it
    is asked is not."""

    def never() -> Found:
        raise AssertionError

    run = config(directory, told)
    auto = run.model_copy(update={"generator": run.generator.model_copy(update={"engine": "auto"})})
    for one in (run, auto):
        chosen = choose(one, None, never)
        assert chosen.engine == chosen.component == "endpoint" and "may differ" in chosen.line()
    filling = run.model_copy(update={"runtime": Runtime(generators=Replicas(replicas="auto"))})
    for one in (run, filling):
        plan = placement.plan(one, [{"CPU": 40.0, "GPU": 1.0}])
        assert (plan.groups[0].role, plan.groups[0].replicas, plan.groups[0].num_gpus) == ("generator", 1, 0)
        assert not sizes.of_models(run) and not any("idle" in note for note in plan.notes)
    with pytest.raises(ConfigError, match="use no GPU"):
        config(directory, told, runtime={"generators": {"num_gpus": 1}})
    free = run.generator.model_copy(
        update={"endpoint": run.generator.endpoint.model_copy(update={"max_parallel": 7, "retries": 3, "timeout": 1.0})}
    )
    other = run.generator.model_copy(update={"endpoint": run.generator.endpoint.model_copy(update={"model": "b"})})
    rows = [run.model_copy(update={"generator": g}).row_settings() for g in (run.generator, free, other)]
    assert rows[0] == rows[1] != rows[2] and rows[0]["generator"]["endpoint"] == {"url": told.url, "model": "tiny"}
    assert free.rows == 7
