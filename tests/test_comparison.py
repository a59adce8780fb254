"""What compare says of finished tables: equal prompts, paired differences, honest losses."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aisp_dist.analysis import arms, compare, outputs
from aisp_dist.analysis.arms import AISP, GAUSSIAN, POPULATION, RANDOM, TOP_P
from aisp_dist.config import Aisp, ConfigError, Ess, Gaussian, Nucleus, Population, Run
from aisp_dist.output.filesystem import Place

CONFIG = {
    "output": "o", "generator": {"model": "m"}, "method": {"kind": "best_of_n", "num_samples": 4, "num_iterations": 8},
    "rewards": {
        "r": {"kind": "function", "function": "a.py:b"},
        "other": {"kind": "function", "function": "a.py:c", "use": "report"},
    },
}  # fmt: skip


def write(
    folder, rewards: dict[str, float], base=0.0, failed: dict[str, int] | None = None, **config
) -> outputs.Output:
    """An output with these rewards by id. failed: ids and their place in the input."""
    rows = [
        {
            "id": id, "source_index": place, "prompt": [{"role": "user", "content": f"ask {id}"}],
            "reward": reward, "base_reward": base,
            "completion": [{"role": "assistant", "content": f"a b c d {id}"}], "base_completion": "e f g h",
            "rewards": [{"name": "other", "value": reward}], "base_rewards": [{"name": "other", "value": None}],
            "nll": 1.0, "base_nll": 0.5, "samples_spent": 32, "num_tokens": 9, "base_num_tokens": 4,
            "finish_reason": "stop", "quarantined": 0, "curve": [reward],
        }
        for place, (id, reward) in enumerate(rewards.items())
    ]  # fmt: skip
    for table, found in {
        "data": rows,
        "failed": [{"id": id, "source_index": at} for id, at in (failed or {}).items()],
    }.items():
        (folder / table).mkdir(parents=True)
        if found:
            change(folder, table, found)
    return outputs.Output(Place.at(folder), {"config": CONFIG | config, "rows_per_file": 1000})


def change(folder, table: str, rows: list[dict]) -> None:
    schema = pa.schema([("reward", pa.float64()), ("base_reward", pa.float64()), ("nll", pa.float64())])
    made = pa.Table.from_pylist(rows)
    for field in schema:
        if field.name in made.column_names:
            made = made.set_column(made.column_names.index(field.name), field, made[field.name].cast(field.type))
    pq.write_table(made, folder / table / "part-000000.parquet")


def compared(found: dict[str, list[outputs.Output]], main: str = AISP, limit=None) -> compare.Comparison:
    return compare.compare(
        {arm: [outputs.read(one, limit=limit) for one in seeds] for arm, seeds in found.items()}, main
    )


def test_paired_differences_are_over_the_prompts_that_every_arm_finished(tmp_path):
    found = {
        TOP_P: [write(tmp_path / "p", {"x": 1.0, "y": 2.0, "z": 9.0})],
        GAUSSIAN: [write(tmp_path / "g", {"x": 0.0, "y": 0.0, "z": 0.0})],
        AISP: [write(tmp_path / "a", {"x": 3.0, "y": 1.5})],
        "aisp, rewards shuffled": [write(tmp_path / "s", {"x": 1.0, "y": 1.0, "z": 1.0})],
    }
    found = compared(found)
    arms = {arm.name: arm for arm in found.arms}
    assert found.left_out == 1 and all(arm.prompts == 2 for arm in found.arms)
    assert arms[TOP_P].reward.mean == 1.5 and arms[TOP_P].versus.mean == pytest.approx((2.0 - 0.5) / 2)
    assert arms[AISP].versus == (0, 0, 0) and arms["base"].reward.mean == 0
    assert arms[AISP].held_out["other"].mean == 2.25 and "other" not in arms["base"].held_out
    assert found.loss["prompt"] == "ask y" and found.loss["best_of_n_reward"] == 2.0
    text = compare.text(found)
    assert "where aisp loses most" in text and "over 2 prompts; 1 that failed in some arm are left out" in text


def test_best_of_n_is_not_said_to_lose_to_itself(tmp_path):
    found = compared({TOP_P: [write(tmp_path / "p", {"x": 1.0})], AISP: [write(tmp_path / "a", {"x": 0.0})]}, TOP_P)
    assert "lose" not in compare.text(found)
    found = compared({TOP_P: [write(tmp_path / "q", {"x": 1.0})], AISP: [write(tmp_path / "b", {"x": 2.0})]}, AISP)
    assert "on no prompt does aisp lose to best-of-n top-p" in compare.text(found)


def test_a_rescored_arm_has_the_likelihoods_that_it_knows(tmp_path):
    def rescored(name, *unknown):
        output = write(tmp_path / name, {"x": 1.0, "y": 2.0})
        rows = pq.read_table(tmp_path / name / "data/part-000000.parquet").to_pylist()
        change(tmp_path / name, "data", [r | {"nll": None if r["id"] in unknown else 2.0} for r in rows])
        return [output]

    found = compared({AISP: rescored("a"), TOP_P: rescored("p", "x"), "none": rescored("n", "x", "y")})
    arms = {arm.name: arm for arm in found.arms}
    assert arms[TOP_P].nll == (2, 2, 2) and arms[TOP_P].nll_versus == (0, 0, 0)
    assert arms["none"].nll is arms["none"].nll_versus is None and arms["base"].nll_versus == (1.5, 1.5, 1.5)
    assert "nan" not in compare.text(found)


def test_seeds_are_averaged_before_prompts(tmp_path):
    def two(name, a, b):
        return [write(tmp_path / f"{name}0", {"x": a, "y": a}), write(tmp_path / f"{name}1", {"x": b, "y": b})]

    found = {
        TOP_P: two("p", 0.0, 2.0),
        GAUSSIAN: two("g", 1.0, 1.0),
        AISP: two("a", 2.0, 4.0),
        "aisp, rewards shuffled": two("s", 0.0, 0.0),
    }
    arms = {arm.name: arm for arm in compared(found).arms}
    assert arms[AISP].reward == (3, 3, 3) and arms[TOP_P].versus == (2, 2, 2)
    assert arms[AISP].std == pytest.approx(2**0.5) and compared(found).loss is None


def test_prompts_that_fail_everywhere_are_counted_and_more_rows_than_asked_are_not(tmp_path):
    found = {
        AISP: [write(tmp_path / "a", {"x": 1.0, "y": 2.0, "z": 9.0}, failed={"bad": 1})],
        TOP_P: [write(tmp_path / "p", {"x": 0.0, "y": 0.0, "z": 0.0}, failed={"bad": 1})],
    }
    result = compared(found, limit=2)
    assert result.left_out == 1 and [arm.prompts for arm in result.arms] == [2, 2, 2]
    assert {arm.name: arm for arm in result.arms}[AISP].reward.mean == 1.5
    assert "over 2 prompts; 1 that failed in some arm are left out" in compare.text(result)


def test_a_base_answer_without_any_reward_ends_nothing(tmp_path):
    found = compared(
        {
            AISP: [write(tmp_path / "a", {"x": 1.0}, base=None)],
            TOP_P: [write(tmp_path / "p", {"x": 2.0}, base=None)],
        }
    )
    assert found.arms[0].reward is None and found.arms[0].won is None and found.arms[1].reward.mean in (1.0, 2.0)
    assert "base: over the 0 of them with a reward" in compare.text(found)


def test_outputs_without_a_common_prompt_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no prompt was finished by every arm"):
        compared({AISP: [write(tmp_path / "a", {"x": 1.0})], TOP_P: [write(tmp_path / "p", {"y": 2.0})]})
    with pytest.raises(ConfigError, match="no prompt was finished by every arm"):
        compared({AISP: [write(tmp_path / "none", {}, failed={"x": 0})]})


def run(method) -> Run:
    rewards = {"r": {"kind": "function", "function": "a.py:b"}}
    return Run.model_validate({"output": "o", "generator": {"model": "m"}, "rewards": rewards, "method": method})


SIZE = {"num_samples": 4, "num_iterations": 3}
OWN = [
    {"kind": "aisp", "sigma2": 0.7, "lambda": 0.3},
    {"kind": "aisp", "sigma2": 0.7, "lambda": 0.3, "shuffle_rewards": True},
    {"kind": "population", "ess": 4.0},
    {"kind": "best_of_n", "sampling": {"top_p": 0.8}},
    {"kind": "best_of_n", "sampling": {"gaussian": 0.2}},
]


@pytest.mark.parametrize("own", OWN, ids=str)
def test_the_usual_arms_have_the_same_samples_and_keep_what_the_configuration_says(own):
    made = run(own | SIZE)
    found = arms.arms(made)
    assert {(m.num_samples, m.num_iterations) for name, m in found.items() if name != RANDOM} == {(4, 3)}
    assert {TOP_P, GAUSSIAN, AISP, POPULATION} < set(found)
    for name, method in found.items():
        assert name in (method.name, RANDOM), "an arm is called what runs there"
    assert found[RANDOM] == found[TOP_P].model_copy(update={"num_samples": 1, "num_iterations": 1})
    assert made.method in found.values()
    main = arms.main_arm(made, found)
    assert found[main] == made.method.shuffled(False), "the main arm is the configuration's own method"
    (shuffled,) = [m for m in found.values() if m.is_shuffled]
    learns = main if main in (AISP, POPULATION) else AISP
    assert shuffled == found[learns].model_copy(update={"shuffle_rewards": True})


def test_usual_arms_that_the_configuration_does_not_name_have_documented_defaults():
    found = arms.arms(run({"kind": "args"}))
    assert found[AISP] == Aisp(num_samples=1, num_iterations=1, lambda_=Ess(ess=0.1))
    assert found[POPULATION] == Population(num_samples=1, num_iterations=1)
    assert found[GAUSSIAN].sampling == Gaussian(gaussian=0.5) and found[TOP_P].sampling == Nucleus(top_p=0.95)
    assert arms.main_arm(run({"kind": "args"}), found) == "args"


def test_named_arms_replace_usual_ones_and_their_control_follows():
    mine = {"kind": "aisp", "sigma2": 2.0, "lambda": {"ess": 0.2}} | SIZE
    made = run({"kind": "best_of_n"} | SIZE)
    given = made.compare.model_validate({"arms": {AISP: mine, POPULATION: None, "own name": mine}})
    found = arms.arms(made.model_copy(update={"compare": given}))
    assert found[AISP] == found["own name"] == Aisp.model_validate(mine) and POPULATION not in found
    assert found["aisp, rewards shuffled"] == found[AISP].shuffled(True)
    assert found[GAUSSIAN].sampling == Gaussian(gaussian=2.0), "best-of-n has the noise of AISP's first iteration"


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (
            {"base": {"kind": "best_of_n", "num_samples": 1, "num_iterations": 1}},
            "'base' is the name of the greedy answers",
        ),
        (
            {"b": {"kind": "best_of_n", "num_samples": 4, "num_iterations": 3, "spend": {"plateau": 1}}},
            "`spend` differs",
        ),
    ],
)
def test_arms_that_would_mislead_are_refused(named, said):
    own = run({"kind": "aisp", "num_samples": 4, "num_iterations": 3, "lambda": {"ess": 0.1}})
    made = own.model_copy(
        update={
            "compare": own.compare.model_validate({"arms": {n: {"kind": "best_of_n", **m} for n, m in named.items()}})
        }
    )
    with pytest.raises(ConfigError, match=said):
        arms.arms(made)


def test_a_prompt_that_stopped_early_keeps_its_best_in_the_area(tmp_path):
    method = {"kind": "best_of_n", "num_samples": 2, "num_iterations": 4, "spend": {"plateau": 1}}
    for most, area in ((None, (0 + 4 + 4 + 4) / 4), (6, (0 + 5 * 4) / 6)):
        folder = tmp_path / f"{most}"
        output = write(folder, {"x": 1.0}, method=method | {"spend": {"plateau": 1, "max_iterations": most}})
        (row,) = pq.read_table(folder / "data/part-000000.parquet").to_pylist()
        change(folder, "data", [row | {"curve": [0.0, 4.0]}])
        assert compared({AISP: [output]}).arms[1].auc == pytest.approx(area)


def trace(folder, traces: dict[str, list[dict]]) -> None:
    (folder / "candidates").mkdir()
    rows = [{"id": id, "source_index": i, "trace": steps} for i, (id, steps) in enumerate(traces.items())]
    pq.write_table(pa.Table.from_pylist(rows), folder / "candidates/part-000000.parquet")


def test_costs_are_of_all_shared_prompts_and_given_tokens_are_not_drawn(tmp_path):
    method = {"kind": "best_of_n", "num_samples": 2, "num_iterations": 2}
    one = write(tmp_path / "a", {"x": 1.0, "y": 1.0, "z": 1.0}, method=method)
    two = write(tmp_path / "p", {"x": 1.0, "y": 1.0}, method={"kind": "args", "num_candidates": 5})
    for folder in ("a", "p"):
        steps = [{"lengths": [4, 6], "given": []}, {"lengths": [5, 5], "given": [2, 3]}]
        trace(tmp_path / folder, {"x": steps, "y": steps[:1], "z": steps * 50})
    base, ours, args = compared({AISP: [one], "args": [two]}).arms
    assert ours.model_tokens == args.model_tokens == ((10 + 10 - 5) + 10) / 2
    assert ours.reward_calls == ours.samples == 32 and args.reward_calls == 32 + 5 * args.model_tokens
    assert base.model_tokens is base.reward_calls is base.seconds is base.auc is None
    (tmp_path / "a/candidates/part-000000.parquet").unlink()
    _, ours, _ = compared({AISP: [one], "args": [two]}).arms
    assert ours.model_tokens is None and ours.reward_calls == 32, "without a trace only the samples are known"
