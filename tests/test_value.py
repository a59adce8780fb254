"""RE-Control: the value network, its ascent inside the engine, and what is refused."""

from __future__ import annotations

import itertools
import json

import pytest
import tiny
import torch

from aisp_dist.config import ConfigError, Generator
from aisp_dist.engine import decode, model
from aisp_dist.engine.guide import Guide
from aisp_dist.methods import value
from aisp_dist.records import Ascent, Round, Sampling
from jobs import prepare, settings, train_value


def network(dim: int, width: int = 24, seed: int = 0) -> value.Value:
    draw = torch.Generator().manual_seed(seed)
    sizes = [dim, width, width, 1]
    return value.Value(
        tuple((torch.randn(b, a, generator=draw), torch.randn(b, generator=draw)) for a, b in itertools.pairwise(sizes))
    )


def test_the_gradient_is_autograds_and_the_ascent_climbs():
    v, z = network(8), torch.randn(5, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    v(z).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(v.gradient(z), z.grad)
        path = [v(v.ascend(z, steps, 1e-4)) for steps in (0, 5, 20)]
    assert (path[0] < path[1]).all() and (path[1] < path[2]).all()
    torch.testing.assert_close(v.ascend(z, 2, 0.3), v.ascend(v.ascend(z, 1, 0.3), 1, 0.3))


def responses(count: int, seed: int, end: int = -1) -> list[value.States]:
    """Random walks whose reward is a linear function of the last state, or of the first."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        z = torch.randn(12, 6, generator=draw).cumsum(0) / 4
        made.append(value.sample(z, float(z[end] @ torch.arange(6.0)), 4, f"{seed}/{i}"))
    return made


TRAIN = {"width": 32, "epochs": 60, "lr": 3e-3, "batch": 32, "seed": 0, "device": torch.device("cpu")}


def test_it_learns_a_linear_reward_and_the_same_seed_gives_the_same_bits():
    made, _, measures = value.train(responses(300, 0), responses(60, 1), published=False, **TRAIN)
    again, _, _ = value.train(responses(300, 0), responses(60, 1), published=False, **TRAIN)
    assert measures.correlation > 0.9 > measures.early_correlation
    assert all(
        torch.equal(a, b) for x, y in zip(made.layers, again.layers, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_the_published_form_learns_at_the_first_token_by_one_hidden_layer():
    told = {p: value.train(responses(300, 0, 0), responses(60, 1, 0), published=p, **TRAIN) for p in (True, False)}
    assert len(told[True][0].layers) == 2 and len(told[False][0].layers) == 3
    assert told[True][2].early_correlation > 0.9 > told[False][2].early_correlation
    with pytest.raises(ValueError, match="all 3 training rewards are 0"):
        same = [s._replace(reward=0.0) for s in responses(3, 0)]
        value.train(same, same, published=False, **TRAIN)


def test_a_sample_keeps_both_ends_and_pairs_of_neighbours():
    z = torch.arange(40.0).reshape(20, 2)
    kept = value.sample(z, 1.0, 5, "a")
    assert kept.pairs == 19 and len(kept.now) == 5 and torch.equal(kept.next, kept.now + 2)
    assert torch.equal(kept.ends, z[[0, -1]]) and not torch.equal(kept.now, value.sample(z, 1.0, 5, "b").now)
    assert len(value.sample(z[:1], 1.0, 5, "a").now) == 0 and len(value.sample(z, 1.0, 99, "a").now) == 19


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tiny.save("llama", tmp_path_factory.mktemp("llama"))
    return model.load(Generator(model=str(folder)))


def climbing(size: float, prompt: str = "a") -> Round:
    return Round(0, prompt, (1, 70, 71, 72), 0, 0, 1, Sampling(guide=Ascent(3, size, False)))


def test_rows_climb_before_they_choose_and_others_keep_their_bits(lm):
    v = network(lm.hidden_size)
    make = lambda: decode.Engine(lm, 32, 8, guide=Guide(value=v))  # noqa: E731
    plain = Round(0, "b", (1, 80, 81), 0, 0, 2, Sampling(sigma2=1.0))
    (alone,) = make().run([plain])
    beside, climbed = make().run([plain, climbing(0.5)])
    assert beside == alone and make().run([climbing(0.5)]) == [climbed]
    greedy = Round(0, "a", (1, 70, 71, 72), 0, 0, 1, Sampling())
    (base,) = make().run([greedy])
    assert make().run([climbing(1e-12)])[0].trajectories[0].token_ids == base.trajectories[0].token_ids
    tokens = climbed.trajectories[0].token_ids
    assert tokens != base.trajectories[0].token_ids
    for t in range(len(tokens)):  # by the definition, one dense pass a token
        z, _ = lm.dense((*greedy.prompt_tokens, *tokens[:t]))
        assert int(lm.logits(v.ascend(z[-1:].float(), 3, 0.5)).argmax()) == tokens[t]


def test_an_engine_without_a_network_refuses_the_round(lm):
    with pytest.raises(ValueError, match="made without a guide for it"):
        decode.Engine(lm, 32, 8).submit(climbing(1.0))


CONFIG = """
output: {out}
prompts: {{source: demo}}
generator: {{model: demo, max_new_tokens: 12}}
rewards: {{helpful: {{kind: model, model: demo, self_test: false}}}}
method: {{kind: re_control, value: {value}}}
compare: {{prompts: 40}}
"""


def test_train_value_writes_a_network_that_a_run_takes_and_others_refuse(tmp_path, capsys, monkeypatch):
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(out=tmp_path / "out", value=tmp_path / "v"))
    flags = ["--prompts", "16", "--states", "4", "--width", "16", "--epochs", "3"]
    read = lambda *more: settings.read(settings.parser("align", ""), [str(config), *more])  # noqa: E731
    with pytest.raises(ConfigError, match="holds no value network"):
        prepare.prepare(*read()[1:])
    assert train_value.main([str(config), "--out", str(tmp_path / "v"), *flags]) == 0
    about = json.loads((tmp_path / "v/value.json").read_text())
    assert about["responses"] == 16 and about["hidden_size"] == 160 and "correlation" in capsys.readouterr().out
    first = prepare.prepare(*read()[1:]).fingerprint
    with pytest.raises(ConfigError, match="exists; name another"):
        train_value.main([str(config), "--out", str(tmp_path / "v"), *flags])
    with pytest.raises(ConfigError, match=r"method.published: True, but .* --published False"):
        prepare.prepare(*read("--method.published", "true")[1:])
    other = tiny.save("llama", tmp_path / "other")
    with pytest.raises(ConfigError, match="was trained for the base model 'demo', whose weights are not those of"):
        prepare.prepare(*read("--generator.model", str(other))[1:])
    assert train_value.main([str(config), "--out", str(tmp_path / "w"), *flags, "--lr", "0.01"]) == 0
    assert prepare.prepare(*read("--method.value", str(tmp_path / "w"))[1:]).fingerprint != first
    with pytest.raises(ConfigError, match="--prompts is 0; it must be above 0"):
        train_value.main([str(config), "--out", str(tmp_path / "x"), "--prompts", "0"])
    assert not list(tmp_path.glob("*.staged")) and not (tmp_path / "x").exists()
