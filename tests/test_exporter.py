"""What a scrape of the node says is what the exporter was told: every name, tag, value and bucket."""

from __future__ import annotations

import bisect
import time
import urllib.request
from collections import Counter
from dataclasses import replace

import pytest
import rows

from actors.metrics import COUNTERS, GAUGES, HISTOGRAMS, Exporter
from aisp_dist.records import Done

pytestmark = pytest.mark.ray

RESULTS = [rows.result(rows.prompt(i)) for i in range(24)]
ROUNDS = [(0.004, 16, 300), (0.5, 16, 1280), (0.7, 1, 80), (999.0, 16, 1)]
SCORED = [("helpful", 0.03, 16), ("helpful", 2.5, 16), ("judge", 0.011, 2)]
EVENTS = [("retry", "generator-0"), ("restart", "generator-0"), ("retry", "scorer-helpful-1"), ("retry", "generator-0")]
NOW = {key: 0.25 + i for i, key in enumerate(GAUGES)}
RUN, SHARD = 'run "a"\\b', "shard-0"


@pytest.fixture(scope="module")
def ray_with_quick_reports():
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        ray.init(
            address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False
        )
        yield ray
        ray.shutdown()


def scrape(ray) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, our tags) -> value of every figure of ours that the node exports."""
    from prometheus_client.parser import text_string_to_metric_families

    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    ours = {"run", "shard", "outcome", "reward", "kind", "replica", "le"}
    return {
        (
            s.name,
            tuple(sorted((k, str(float(v)) if k == "le" else v) for k, v in s.labels.items() if k in ours)),
        ): s.value
        for family in families
        for s in family.samples
        if s.name.startswith("ray_aisp_") and not s.name.endswith("_created")
    }


def expected() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The same from the records themselves; of histograms the buckets and the count."""
    done = [r for r in RESULTS if isinstance(r, Done)]
    said = {}

    def tell(name: str, value: float, **tags: str) -> None:
        said[name, tuple(sorted({"run": RUN, "shard": SHARD, **tags}.items()))] = value

    def told(name: str, values: list[float], **tags: str) -> None:
        boundaries = HISTOGRAMS[name][1]
        for le in boundaries:
            tell(f"ray_{name}_bucket", bisect.bisect_right(sorted(values), le), le=str(float(le)), **tags)
        tell(f"ray_{name}_bucket", len(values), le="inf", **tags)
        tell(f"ray_{name}_count", len(values), **tags)

    for key, (name, _) in GAUGES.items():
        tell(f"ray_{name}", NOW[key])
    tell("ray_aisp_prompts_finished_total", len(done), outcome="done")
    tell("ray_aisp_prompts_finished_total", len(RESULTS) - len(done), outcome="failed")
    tell("ray_aisp_samples_spent_total", sum(r.samples_spent for r in done))
    tell("ray_aisp_candidates_quarantined_total", sum(r.quarantined for r in done))
    tell("ray_aisp_iterations_total", len(ROUNDS))
    tell("ray_aisp_samples_total", sum(samples for _, samples, _ in ROUNDS))
    tell("ray_aisp_tokens_total", sum(tokens for _, _, tokens in ROUNDS))
    for reward in ("helpful", "judge"):
        tell("ray_aisp_responses_scored_total", sum(n for r, _, n in SCORED if r == reward), reward=reward)
        told("aisp_score_seconds", [seconds for r, seconds, _ in SCORED if r == reward], reward=reward)
    for (kind, replica), count in Counter(EVENTS).items():
        tell("ray_aisp_events_total", count, kind=kind, replica=replica)
    judged = [r for r in done if r.best.reward is not None and r.base.reward is not None]
    told("aisp_reward_gain_by_prompt", [r.best.reward - r.base.reward for r in judged])
    told("aisp_final_ess_ratio", [r.trace[-1].ess / rows.NUM_SAMPLES for r in done])
    told("aisp_final_kl_nats", [r.trace[-1].kl for r in done])
    told("aisp_samples_by_prompt", [r.samples_spent for r in done])
    told("aisp_round_seconds", [seconds for seconds, _, _ in ROUNDS])
    return said


def test_a_scrape_says_what_the_exporter_was_told(ray_with_quick_reports):
    ray = ray_with_quick_reports
    exporter = ray.remote(Exporter).remote(RUN, SHARD)
    for result in RESULTS:
        exporter.finished.remote(result)
    for numbers in ROUNDS:
        exporter.round.remote(*numbers)
    for numbers in SCORED:
        exporter.scored.remote(*numbers)
    for numbers in EVENTS:
        exporter.event.remote(*numbers)
    wanted = expected()
    assert len({name for name, _ in wanted}) == len(GAUGES) + len(COUNTERS) + 2 * len(HISTOGRAMS)
    for _ in range(60):
        ray.get(exporter.gauges.remote(NOW))
        seen = {key: value for key, value in scrape(ray).items() if not key[0].endswith("_sum")}
        if seen == wanted:
            break
        time.sleep(0.5)
    assert seen == wanted


def test_a_gain_that_is_none_or_negative_is_counted_and_best_of_n_has_no_ess():
    said = []
    exporter = Exporter(RUN, SHARD)
    exporter._observe = lambda name, value: said.append((name, value))
    done = next(r for r in RESULTS if isinstance(r, Done) and r.base.reward is not None)
    worse = replace(done, base=replace(done.base, reward=done.best.reward + 1), trace=())
    exporter.finished(worse)
    exporter.finished(replace(worse, base=replace(worse.base, reward=None)))
    exporter.finished(replace(worse, trace=tuple(replace(i, weights=()) for i in done.trace)))
    assert Counter(name for name, _ in said) == {"aisp_samples_by_prompt": 3, "aisp_reward_gain_by_prompt": 2}
    assert ("aisp_reward_gain_by_prompt", 0.0) in said and not exporter.broken


def test_unknown_figures_are_not_set_and_an_error_is_logged_once_and_hurts_nobody(caplog):
    exporter = Exporter(RUN, SHARD)
    exporter.gauges({"eta_seconds": None, "reward_gain": float("nan")})
    assert not exporter.broken and not caplog.records
    for _ in range(3):
        exporter.gauges({"no_such_key": 1.0})
        exporter.scored(None, "soon", 1)
    assert len(caplog.records) == 1 and "no_such_key" in caplog.text
    exporter.round(0.1, 0, 0)  # Ray refuses a count of nothing
    exporter.metrics.clear()
    exporter.finished(RESULTS[0])
    exporter.event("stall", "generator-0")
