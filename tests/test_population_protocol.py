"""tests/bench/population: the configuration is the protocol's, and the measurement is a run's own search."""

from __future__ import annotations

import json
from pathlib import Path

from aisp_dist.analysis import arms, metrics
from aisp_dist.config import Population
from jobs import prepare, settings
from tests.bench.population import measure

ROOT = Path(__file__).parent.parent
PROTOCOL = ROOT / "tests" / "bench" / "population"


def read(*flags):
    _, run, base_dir = settings.read(settings.parser("compare", ""), [str(PROTOCOL / "population.yaml"), *flags])
    return run, base_dir


def test_its_cases_are_whole_and_tuning_prompts_are_not_those_of_the_result(real_data, monkeypatch):
    monkeypatch.chdir(ROOT)
    run, base_dir = read("--generator.model", str(real_data / "models/stories260k"))
    cases = settings.cases(run)
    assert list(cases) == ["story, lexicon", "story, similarity", "demo, learned"]
    for case in cases.values():
        prepare.check(case, base_dir)
        assert {m.num_samples * m.num_iterations for m in arms.arms(case).values()} == {max(measure.BUDGETS)}
        assert arms.main_arm(case, arms.arms(case)) == "population"
        assert case.method == Population(num_samples=16, num_iterations=32)
        assert [reward.use for reward in case.rewards.values()].count("report") == 1
        assert (case.prompts.skip, case.prompts.limit, case.compare.seeds) == (measure.TUNING["limit"], 128, 3)
    lines = (PROTOCOL / "openings.txt").read_text().splitlines()
    assert len(set(lines)) == len(lines) == 48 + 128
    assert len({len(points) for points in measure.GRIDS.values()}) == 1  # the same tuning for each


def test_it_measures_what_a_run_selects_at_every_budget(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(measure, "TUNING", {"skip": 0, "limit": 2})
    monkeypatch.setattr(measure, "TRIAL", {"num_samples": 4, "num_iterations": 2})
    monkeypatch.setattr(measure, "BUDGETS", (4, 8, 16))
    monkeypatch.setattr(measure, "work", lambda jobs, _: [measure.search(j) for j in jobs if not j.file.exists()])

    def table(name, iterations):
        size = ["--method.num_samples", "4", "--method.num_iterations", str(iterations), "--compare.seeds", "1"]
        for arm in measure.GRIDS:
            monkeypatch.setitem(
                measure.GRIDS, arm, [p | {"num_samples": 4, "num_iterations": 4} for p in measure.GRIDS[arm][:2]]
            )
        args = ["--output", str(tmp_path / name), "--case", "demo, learned", "--prompts.limit", "3", *size]
        measure.main([str(PROTOCOL / "population.yaml"), *args])
        return tmp_path / name

    out = table("out", 4)
    rows = json.loads((out / "table.json").read_text())
    assert {row["arm"] for row in rows} == {measure.MAIN, measure.SHUFFLED, *measure.GRIDS}
    for row in rows:
        curve = [r["reward"][0] for r in rows if r["arm"] == row["arm"]]
        assert curve == sorted(curve) and row["drawn"][0] <= row["tokens"][0]
        if row["arm"] == "best-of-n top-p" and row["samples"] == 16:
            assert row["reward, less best-of-512"] == [0, 0, 0]
    found = json.loads((out / "result/demo, learned/population/0.json").read_text())["prompts"]
    assert all(p["16"]["diversity"] == metrics.diversity(p["16"]["text"]) for p in found)
    monkeypatch.setattr(measure, "BUDGETS", (4, 8))
    short = json.loads((table("short", 2) / "result/demo, learned/population/0.json").read_text())["prompts"]
    assert [p["8"] for p in short] == [p["8"] for p in found]
