"""The dashboard asks for what is exported and for nothing else, and a real Prometheus answers every panel."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import rows
import yaml

from actors.metrics import COUNTERS, GAUGES, HISTOGRAMS, Exporter
from aisp_dist.records import Done

pytestmark = pytest.mark.ray

FOLDER = Path(__file__).parent.parent / "configs" / "grafana"
BOARD = json.loads((FOLDER / "aisp.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
TAGS = {"run", "shard"}
LABELS = {f"ray_{name}": TAGS for name, _ in GAUGES.values()}
LABELS |= {f"ray_{name}_total": {*TAGS, *tags} for name, (_, tags) in COUNTERS.items()}
LABELS |= {f"ray_{name}_count": {*TAGS, *tags} for name, (_, _, tags) in HISTOGRAMS.items()}
LABELS |= {f"ray_{name}_bucket": {*TAGS, *tags, "le"} for name, (_, _, tags) in HISTOGRAMS.items()}


def test_every_panel_has_a_place_a_unit_and_says_what_a_good_value_is():
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    assert len({panel["title"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    for panel in PANELS:
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
    for a, b in combinations((panel["gridPos"] for panel in BOARD["panels"]), 2):
        apart = [a[x] + a[size] <= b[x] or b[x] + b[size] <= a[x] for x, size in (("x", "w"), ("y", "h"))]
        assert any(apart) and max(g["x"] + g["w"] for g in (a, b)) <= 24


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_a_query_names_only_what_is_exported(title, query):
    selectors = re.findall(r"(ray_\w+)\{([^}]*)\}", query)
    assert len(selectors) == query.count("ray_") > 0
    for name, matchers in selectors:
        assert set(re.findall(r"(\w+)=", matchers)) <= LABELS[name]
        assert 'run="$run", shard=~"$shard"' in matchers
        for by in re.findall(r"by \(([^)]*)\)", query):
            assert set(by.split(", ")) <= LABELS[name]
    if "histogram_quantile" in query:
        assert all(name.endswith("_bucket") for name, _ in selectors) and "by (le" in query
    boundary = re.search(r'le="([^"]*)"', query)
    assert boundary is None or boundary[1] == str(HISTOGRAMS["aisp_reward_gain_by_prompt"][1][0])


def test_its_variables_are_declared_and_what_is_exported_is_shown():
    text = " ".join(query for _, query in QUERIES)
    declared = [variable["name"] for variable in BOARD["templating"]["list"]]
    assert {"datasource", *re.findall(r"\$(\w+)", text)} == {"__rate_interval", *declared}
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            assert re.search(r"label_values\((\w+)", variable["query"])[1] in LABELS
    shown = {re.sub("_(bucket|count)$", "", name) for name in re.findall(r"ray_\w+", text)}
    assert shown == {re.sub("_(bucket|count)$", "", name) for name in LABELS}


# What the panels must answer: bounds for each of their targets, from what `feed` says.
PLAUSIBLE = {
    "Prompts finished": [(0.5, 0.5)],
    "Time left": [(120, 120)],
    "Iterations and tokens per second": [(3, 3), (900, 900)],
    "Failed rows": [(0.2, 0.3)],
    "Reward gain": [(1.5, 1.5)],
    "Generators and scorers": [(2, 2), (3, 3)],
    "Prompts": [(40, 40), (10, 10), (8, 8), (100, 100)],
    "Prompts per second": [(1e-3, 50)],
    "Reward gain by prompt": [(0, 1e-6), (1, 2), (2, 3)],
    "Prompts without gain": [(0.3, 0.37)],
    "Effective sample size of the last iteration": [(0.55, 0.75)] * 3,
    "KL of the last iteration": [(500, 1000)] * 3,
    "Samples per prompt": [(6, 6), (0, 8), (0, 8)],
    "Quarantined candidates": [(0.01, 0.5)],
    "Idle time": [(0.02, 0.02), (0.4, 0.4)],
    "Slot utilisation": [(0.9, 0.9)],
    "Rounds waiting for a generator": [(4, 4)],
    "Round latency": [(1, 2), (1, 2)],
    "Tokens per second": [(1, 50_000)],
    "Rounds and samples per second": [(1e-3, 50), (1e-3, 800)],
    "Responses scored per second": [(1e-3, 800)],
    "Scoring latency": [(0.01, 0.5)],
    "Requests waiting for a scorer": [(1, 1)],
    "Actors that answer": [(2, 2), (3, 3)],
    "Faults by replica": [(1, 2)],
}
NOW = {"in_flight": 8, "queued_rounds": 4, "queued_scores": 1, "generators_alive": 2, "scorers_alive": 3,
       "slot_utilisation": 0.9, "generator_idle": 0.02, "scorer_idle": 0.4, "iterations_per_second": 3.0,
       "tokens_per_second": 900.0, "reward_gain": 1.5, "eta_seconds": 120.0, "total_prompts": 100, "committed": 40,
       "staged": 10}  # fmt: skip


def results():
    """Three that are done, with gains 0, 1.25 and 2.5, and one that failed."""
    done = [r for r in map(rows.result, rows.prompts(20)) if isinstance(r, Done) and r.quarantined][:3]
    for gain, r in zip((-1.0, 1.25, 2.5), done, strict=True):
        trace = (*r.trace[:-1], replace(r.trace[-1], kl=700.0))
        yield replace(r, base=replace(r.base, reward=r.best.reward - gain), trace=trace)
    yield rows.result(rows.prompt(3), fails=True)


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """An exporter actor, and `ask`: a query to a Prometheus that scrapes it as Ray's own configuration tells it to."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus on the PATH")
    import ray

    shutil.copy(FOLDER / "aisp.json", tmp_path)
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    monkeypatch.setenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", str(tmp_path))
    context = ray.init(
        address="local", num_cpus=1, include_dashboard=True, object_store_memory=80 * 2**20, log_to_driver=False
    )
    server = None
    try:
        metrics = Path(context.address_info["session_dir"], "metrics")
        settings = (metrics / "prometheus" / "prometheus.yml").read_text().replace(" 10s", " 1s")
        (tmp_path / "prometheus.yml").write_text(settings)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            at = f"127.0.0.1:{free.getsockname()[1]}"
        server = subprocess.Popen(
            ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=tsdb", f"--web.listen-address={at}"],
            cwd=tmp_path,
            stderr=subprocess.DEVNULL,
        )

        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://{at}/-/ready", timeout=10).close()
                break
            except OSError:  # not up yet
                time.sleep(0.1)

        def ask(query: str) -> list[float]:
            url = f"http://{at}/api/v1/query?" + urllib.parse.urlencode({"query": query})
            with urllib.request.urlopen(url, timeout=10) as page:  # HTTP 400 for what does not parse
                return [float(series["value"][1]) for series in json.load(page)["data"]["result"]]

        yield ray.remote(Exporter).remote("abc123", "shard-0"), ask, metrics / "grafana"
    finally:
        if server is not None:
            server.kill()
            server.wait()
        ray.shutdown()


def test_prometheus_answers_every_panel(watched, tmp_path):
    import ray

    exporter, ask, grafana = watched
    (provider,) = yaml.safe_load((grafana / "provisioning/dashboards/default.yml").read_text())["providers"]
    beside = {json.loads(path.read_text())["uid"] for path in Path(provider["options"]["path"]).glob("*.json")}
    assert {"aisp", "rayDefaultDashboard"} <= beside  # where Ray's Grafana looks, and Ray has left ours alone

    exporter.event.remote("restart", "generator-0")
    exporter.event.remote("retry", "generator-0")
    exporter.event.remote("retry", "generator-0")
    values = {"$run": "abc123", "$shard": ".*", "$window": "1m", "$__rate_interval": "1m"}
    wrong = ["nothing was asked"]
    for _ in range(120):
        for result in results():
            exporter.finished.remote(result)
        exporter.round.remote(1.5, 16, 1280)
        exporter.scored.remote("helpful", 0.3, 16)
        exporter.scored.remote("judge", 0.015, 2)
        ray.get(exporter.gauges.remote(NOW))
        time.sleep(0.5)
        wrong = []
        for panel in PANELS:
            for target, (low, high) in zip(panel["targets"], PLAUSIBLE[panel["title"]], strict=True):
                answer = ask(re.sub(r"\$\w+", lambda name: values[name[0]], target["expr"]))
                print(panel["title"], target.get("legendFormat"), answer)
                if not answer or not all(low * (1 - 1e-6) <= value <= high * (1 + 1e-6) for value in answer):
                    wrong.append((panel["title"], target["expr"], answer))
        if not wrong:
            break
    assert not wrong
    assert len(PLAUSIBLE) == len(PANELS)
