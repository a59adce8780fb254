"""`aisp report` on outputs that were searched for real: the page says what the files say, and nothing in them can
break it."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import finished
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished import AISP, BEST_OF_N

from aisp_dist.analysis import compare, outputs
from aisp_dist.analysis.report import contents, samples
from aisp_dist.analysis.report.verdict import verdict
from aisp_dist.config import ConfigError
from aisp_dist.output.filesystem import Place
from jobs import cli, evaluate
from jobs.report import main as report_main

ARMS = {"aisp": ["aisp", "aisp-seed1"], "best": ["best", "best-seed1"], "shuffled": ["shuffled", "shuffled-seed1"]}
HOSTILE = "</script><img src=x onerror=alert(1)> <!-- & \" ' $\\frac{1}$ \u2028 \u202e \0 🦜 é ]]>"
VOID = {"meta", "input", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """Every tag closed in order, ids once, and what the page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.tags, self.rows, self.data, self.text = [], [], Counter(), [], "", ""
        self.alts = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags[tag] += 1
        self.ids += [given["id"]] if "id" in given else []
        self.alts += [given["aria-label"]] if given.get("role") == "img" else []
        assert not given.keys() & {"src", "srcset", "action", "onerror", "onload"}, (tag, attrs)
        assert given.get("href", given.get("xlink:href", "#")).startswith("#"), attrs
        if tag not in VOID:
            self.open.append((tag, given))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        tags = [tag for tag, _ in self.open]
        if self.open and self.open[-1][1].get("id") == "data":
            self.data += text
        elif not {"script", "style"} & set(tags):
            self.text += text
            if "td" in tags or "th" in tags:
                self.rows[-1][-1] += text.strip()


def compared(folder, arms: dict[str, list[str]], limit: int | None = None) -> compare.Comparison:
    def read(name: str) -> outputs.Columns:
        return outputs.read(outputs.open_output(Place.at(folder / name)), limit=limit)

    return compare.compare({arm: [read(name) for name in seeds] for arm, seeds in arms.items()}, "aisp")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A comparison of three arms with two seeds, one of them evaluated; tests read it and never change it."""
    folder = finished.project(tmp_path_factory.mktemp("project"), count=8)
    methods = {"aisp": AISP, "best": BEST_OF_N, "shuffled": {**AISP, "shuffle_rewards": True}}
    for arm, seeds in ARMS.items():
        for seed, name in enumerate(seeds):
            finished.output(folder, name, methods[arm], seed)
    document = compared(folder, ARMS).json() | {"outputs": ARMS}
    (folder / "comparison.json").write_text(json.dumps(document))
    assert evaluate.main([str(folder / "aisp"), "--sample", "4"]) == 0
    return folder


@pytest.fixture(scope="module")
def shown(made, tmp_path_factory):
    """The page of that comparison, as a file, by the command."""
    path = tmp_path_factory.mktemp("shown") / "page.html"
    assert report_main([str(made), "--out", str(path)]) == 0
    return path


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def report(capsys, *args) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        cli.run("report", [str(arg) for arg in args])
    return left.value.code, capsys.readouterr().err


def read(path) -> Page:
    return Page(path.read_text("utf-8"))


def test_the_page_says_what_comparison_json_says(made, shown):
    assert [path.name for path in shown.parent.iterdir()] == ["page.html"]
    head, *rows = read(shown).rows[:5]
    table = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    arms = json.loads((made / "comparison.json").read_text())["arms"]
    assert list(table) == ["base", *ARMS] == [arm["name"] for arm in arms]
    for arm in arms:
        row = table[arm["name"]]
        cells = {"reward": arm["reward"], "NLL / token": arm["nll"], "held out: words": arm["held_out"]["words"]}
        cells |= {} if arm["name"] == "aisp" else {"aisp minus it": arm["versus"]}
        for name, cell in cells.items():
            assert [float(x) for x in re.findall(r"[-\d.]+", row[name])] == [round(x, 3) for x in cell], name
        assert row["samples"] == f"{arm['samples']:g}"
        assert row["drawn tokens"] == ("" if arm["model_tokens"] is None else f"{arm['model_tokens']:.0f}")
        assert row["won by aisp"] == ("" if arm["name"] == "aisp" else f"{arm['won']:.0%}")


def test_separate_outputs_are_compared_as_compare_does(made):
    names = ["aisp", "best", "shuffled"]
    ours = contents.read([Place.at(made / name) for name in names]).comparison
    assert ours == compared(made, {name: [name] for name in names})


def test_a_comparison_of_fewer_prompts_than_its_outputs_hold_is_shown_as_it_was_made(copied):
    document = compared(copied, ARMS, limit=5).json() | {"outputs": ARMS, "limit": 5}
    (copied / "comparison.json").write_text(json.dumps(document))
    found = contents.read([Place.at(copied)])
    assert len(found.ids) == 5 and json.loads(json.dumps(found.comparison.json())) == json.loads(
        json.dumps({key: document[key] for key in found.comparison.json()})
    )
    assert {curve.shape for of in found.curves.values() for curve in of.values()} == {(5, 3)}


def test_nothing_is_fetched_and_every_figure_is_told(shown):
    text = shown.read_text("utf-8")
    assert not re.search(r"(?i)https?:|//[a-z]|@import|url\((?!#)|import\(|fetch\(", text)
    found = Page(text)
    assert not found.open
    assert [id for id, times in Counter(found.ids).items() if times > 1] == []
    assert found.tags["script"] == 2
    assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", text)) <= set(found.ids)
    assert len(found.alts) == text.count('<div role="img"') == 12 and all(map(str.strip, found.alts))
    assert {"Tokens that the control changes", "Reward against KL"} <= set(re.findall(r">([^<>]+)</text>", text))
    assert "nan" not in found.text.lower().split()


def test_the_browser_holds_the_answers_of_the_outputs(made, shown):
    data = json.loads(read(shown).data)
    assert data["arms"] == ["base", *ARMS] and data["arms"][data["main"]] == "aisp" and data["left_out"] == 0
    for arm, (name, _) in ARMS.items():
        rows = {row["id"]: row for row in pq.read_table(made / name / "data").to_pylist()}
        assert sorted(rows) == sorted(p["id"] for p in data["prompts"])
        for prompt in data["prompts"]:
            base, answer = prompt["answers"][0], prompt["answers"][data["arms"].index(arm)]
            row = rows[prompt["id"]]
            assert answer["text"] == outputs.answer(row["completion"])
            assert (answer["reward"], answer["nll"], answer["tokens"]) == (row["reward"], row["nll"], row["num_tokens"])
            assert base["text"] == row["base_completion"]


@pytest.mark.parametrize("total", [1, 2, 3, 7, 50, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_shown_prompts_are_both_ends_and_evenly_between(total, count):
    places = samples._spread(total, count)
    assert len(set(places.tolist())) == len(places) == min(total, count)
    assert (np.diff(places) > 0).all() and places[0] >= 0 and places[-1] < total
    if count >= 3:
        third = min(count // 3, total)
        assert set(range(third)) | set(range(total - third, total)) <= set(places.tolist())


def test_the_page_is_bounded_by_samples(made, shown, capsys, tmp_path):
    assert shown.stat().st_size < 1_000_000
    assert report(capsys, made, "--samples", 3, "--out", tmp_path / "few.html") == (0, "")
    found = read(tmp_path / "few.html")
    assert "5 more are left out" in found.text and "are left out" not in read(shown).text
    few, all_ = (json.loads(one.data) for one in (found, read(shown)))
    gains = [p["answers"][few["main"]]["reward"] - p["answers"][few["rival"]]["reward"] for p in all_["prompts"]]
    assert gains == sorted(gains, reverse=True)
    assert (few["left_out"], all_["left_out"]) == (5, 0)
    assert [few["prompts"][i]["id"] for i in (0, 2)] == [all_["prompts"][i]["id"] for i in (0, 7)]
    assert samples._short("x" * 30_000) == "x" * 20_000 + " … (10000 more characters are in the output)"
    assert report(capsys, made, "--samples", 0)[0] == 2


def test_hostile_texts_and_names_are_harmless(copied, capsys):
    for path in (copied / "aisp" / "data").glob("*.parquet"):
        table = pq.read_table(path)
        rows = [
            row | {"base_completion": HOSTILE, "completion": [{"role": "assistant", "content": HOSTILE}]}
            for row in table.to_pylist()
        ]
        footer = pq.read_metadata(path).metadata
        with pq.ParquetWriter(path, table.schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=table.schema))
            writer.add_key_value_metadata({key: value for key, value in footer.items() if key != b"ARROW:schema"})
    name = "<b onclick=x>$\\undefined_1$ & _é\x01"
    (copied / "aisp").rename(copied / name)
    (copied / "best").rename(copied / "_$x$<script>")
    assert report(capsys, copied / name, copied / "_$x$<script>") == (0, "")
    text = (copied / name / "report.html").read_text("utf-8")
    found = Page(text)
    assert not found.open and found.tags["script"] == 2 and not found.tags["b"] and "\0" not in text
    assert json.loads(found.data)["prompts"][0]["answers"][1]["text"] == HOSTILE
    assert not re.search("[<>&\u2028]", found.data)


def test_one_output_is_enough_and_says_what_is_missing(copied, capsys):
    assert report(capsys, copied / "best") == (0, "")
    found = read(copied / "best" / "report.html")
    assert [row[0] for row in found.rows[:3]] == ["", "base", "best"]
    for said in ("No other method with 12 samples", "needs aisp evaluate", "8 prompts"):
        assert said in found.text, said


def test_other_budgets_prompts_or_rewards_are_refused(made, capsys, tmp_path):
    folder = finished.project(tmp_path / "other", count=8)
    finished.output(folder, "small", {**AISP, "num_samples": 2})
    finished.output(
        folder, "weighted", AISP, rewards={"main": {"kind": "function", "function": "rewards.py:vowels", "weight": 2.0}}
    )
    finished.output(folder, "fewer", AISP, prompts={"limit": 5})
    shutil.copytree(made / "aisp", folder / "aisp")
    for name, told in {"small": "small has 6", "weighted": "'main': 2.0", "fewer": "prompts.limit"}.items():
        code, said = report(capsys, folder / "aisp", folder / name)
        assert code == 2 and told in said, said
    code, said = report(capsys, folder, "--out", tmp_path / "none.html")
    assert code == 2 and "neither run.json nor comparison.json" in said
    (folder / "comparison.json").write_text('{"arms": []}')
    code, said = report(capsys, folder)
    assert code == 2 and "comparison.json cannot be read by this version" in said
    document = json.loads((made / "comparison.json").read_text())
    (folder / "comparison.json").write_text(json.dumps(document | {"main": "another"}))
    code, said = report(capsys, folder)
    assert code == 2 and "its main arm is not among its outputs" in said
    code, said = report(capsys, made, "--out", f"{tmp_path}/")
    assert code == 2 and "name a file in it" in said
    assert not list(tmp_path.rglob("*.html"))


def arm(name, reward, held=0.0, nll=0.0, prompts=100, width=0.1):
    def cell(mean):
        return [mean, mean - width, mean + width]

    return {"name": name, "prompts": prompts, "reward": cell(-reward), "versus": cell(reward), "nll_versus": cell(nll),
            "held_out_versus": {"other": cell(held)}}  # fmt: skip


@pytest.mark.parametrize(
    ("best", "shuffled", "says", "held", "warns"),
    [
        (arm("best", 1.0, 1.0), arm("shuffled", 1.0, 1.0), "aisp wins at 8", "agrees", []),
        (arm("best", -1.0, -1.0), arm("shuffled", 1.0, 1.0), "aisp does not win at 8", "agrees", []),
        (
            arm("best", 0.0, 0.0),
            arm("shuffled", 1.0, 1.0),
            "There is no clear winner at 8",
            "establishes no difference",
            [],
        ),
        (
            arm("best", 1.0, 1.0),
            arm("shuffled", 0.05, 1.0),
            "aisp wins",
            "agrees",
            ["The gain over shuffled"],
        ),
        (
            arm("best", 1.0, 0.0),
            arm("shuffled", 1.0, 1.0),
            "aisp wins",
            "does not establish it",
            ["does not support the gain over best"],
        ),
        (
            arm("best", 1.0, -1.0),
            arm("shuffled", 1.0, 1.0),
            "aisp wins",
            "disagrees",
            ["does not support the gain over best"],
        ),
        (
            arm("best", 1.0, 1.0, nll=1.0),
            arm("shuffled", 1.0, 1.0),
            "aisp wins",
            "agrees",
            ["less likely to the base model"],
        ),
    ],
)
def test_the_sentence_and_the_warnings_follow_from_the_figures(best, shuffled, says, held, warns):
    figures = [arm("base", 2.0, 2.0), best, arm("aisp", 0.0), shuffled, arm("pick", 2.0, 2.0)]
    found = verdict(figures, "aisp", {"best": 8, "aisp": 8, "shuffled": 8, "pick": 1}, ["shuffled"])
    assert found.says[0].startswith(says) and found.rival == "best"
    assert [part in warning for part, warning in zip(warns, found.warnings, strict=True)] == [True] * len(warns)
    assert f"The held-out reward other {held}" in found.says[1]
    assert ("less likely" in found.says[2]) == (best["nll_versus"][0] > 0)


def test_few_prompts_are_warned_of():
    figures = [arm("base", 2.0, 2.0), arm("best", 1.0, 1.0), arm("aisp", 0.0, prompts=6)]
    assert "Only 6 prompts" in verdict(figures, "aisp", {"best": 8, "aisp": 8}, []).warnings[0]
    with pytest.raises(ConfigError):
        contents.read([Place.at("/nowhere")])


def test_without_matplotlib_the_extra_is_named_and_nothing_is_written(made, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, said = report(capsys, made / "aisp", "--out", tmp_path / "page.html")
    assert code == 2 and "pip install 'aisp-dist[report]'" in said and not list(tmp_path.iterdir())
