"""The sections of a report, in the order in which a reader decides, and the page that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from aisp_dist.analysis.arms import BASE
from aisp_dist.analysis.compare import originals_table, originals_text, table
from aisp_dist.analysis.report import figures, samples
from aisp_dist.analysis.report.contents import Contents
from aisp_dist.analysis.report.figures import Look, panel
from aisp_dist.analysis.report.verdict import verdict
from aisp_dist.output import log

_POINTS = 1500  # of an arm in a scatter; of more prompts every n-th
Lines = dict[str, tuple[np.ndarray, np.ndarray]]
Looks = Mapping[str, Look]


@dataclass(frozen=True)
class Panel:
    """A figure, and what it shows in words for readers who do not see it."""

    svg: str
    alt: str


@dataclass(frozen=True)
class Section:
    """Title and text around figures and a table (its first row is the head); arms: for the legend. Without figures and
    table the text says what would give them."""

    title: str
    text: str
    panels: Sequence[Panel] = ()
    table: Sequence[Sequence[str]] = ()
    arms: Sequence[str] = ()


def render(contents: Contents, count: int) -> bytes:
    """The page. count: prompts in the sample browser, at most."""
    look = figures.looks(list(contents.arms), contents.main, BASE)
    budgets = {name: contents.output(name).budget for name in contents.arms}
    found = verdict(contents.comparison.json()["arms"], contents.main, budgets, contents.shuffled)
    answers = samples.collect(contents, found.rival, count)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
    text = template.render(
        main=contents.main,
        seeds=max(map(len, contents.arms.values())),
        prompts=len(contents.ids),
        left_out=contents.comparison.left_out,
        budget=budgets[contents.main],
        settings=_settings(contents),
        verdict=found,
        table=table(contents.comparison),
        sections=[section for build in _SECTIONS if (section := build(contents, look))],
        look=look,
        answers=answers,
        data=samples.script(answers),
    )
    return text.replace("\0", "\ufffd").encode("utf-8", "replace")


def _settings(contents: Contents) -> list[tuple[str, str]]:
    run, left_out = contents.output(contents.main).run, contents.comparison.left_out
    rewards = (f"{name} ({'selects' if r.use == 'select' else 'held out'})" for name, r in run.rewards.items())
    lost = f", {left_out} more failed in some arm and are left out" if left_out else ""
    seeds = {name: f"{len(of)} seed{'s' * (len(of) > 1)}" for name, of in contents.arms.items()}
    return [
        ("Prompts", f"{len(contents.ids)} of {run.prompts.source}{lost}"),
        ("Base model", contents.output(contents.main).model_name),
        ("Rewards", ", ".join(rewards)),
        *((f"Arm {name}", f"{contents.output(name).method_name}, {seeds[name]}") for name in contents.arms),
        ("Samples", f"{contents.output(contents.main).budget} a prompt"),
        ("Tokens", f"at most {run.generator.max_new_tokens} an answer"),
    ]


def _lines(contents: Contents, curve: str) -> Lines:
    """The arms whose search has at least two iterations with this curve, over their iterations."""
    curves = {arm: of[curve] for arm, of in contents.curves.items()}
    return {a: (np.arange(1, c.shape[1] + 1), c) for a, c in curves.items() if c.shape[1] > 1 and np.isfinite(c).any()}


def _line_panel(drawn: Lines, look: Looks, x: str, y: str, title: str) -> Panel:
    def draw(axes: Any) -> None:
        figures.lines(axes, drawn, look)
        if x == "iteration":
            figures.whole(axes)

    ends = "; ".join(f"{arm} ends at {np.nanmean(values[:, -1]):.3f}" for arm, (_, values) in drawn.items())
    return Panel(panel(draw, x, y, title), f"{title}, {y} over {x}: {ends}.")


def _measured(contents: Contents, name: str) -> dict[str, Any]:
    """One entry of evaluation.json by arm, where there is one."""
    return {arm: found[name] for arm, found in contents.evaluations.items() if found.get(name)}


def _originals(contents: Contents, look: Looks) -> Section | None:
    if (result := contents.comparison).originals is None:
        return None
    text = f"{originals_text(result)}. Mean rewards are over these prompts."
    return Section("The answers that were there", text, table=originals_table(result))


def _progress(contents: Contents, look: Looks) -> Section:
    titles = {"mean": "Mean of the iteration's samples", "best": "Best of the iteration's samples"}
    titles["so far"] = "Best so far"
    found = {name: _lines(contents, name) for name in titles}
    panels = [_line_panel(drawn, look, "iteration", "reward", titles[n]) for n, drawn in found.items() if drawn]
    text = "A search that learns raises the mean of what it draws; one that only draws more does not. "
    text += "Lines are means over prompts, bands their 95 % intervals."
    if not panels:
        text = "Not there: a search of one iteration has no curve; save.trace: true keeps one for those that have more."
    elif not found["mean"]:
        text += " Mean and best of an iteration need save.trace: true."
    return Section("How the search goes", text, panels, arms=list(found["so far"]))


def _budget(contents: Contents, look: Looks) -> Section:
    best = {arm: values for arm, (_, values) in _lines(contents, "so far").items()}
    seconds = {arm.name: arm.seconds for arm in contents.comparison.arms}
    x: dict[str, Lines] = {"samples of a prompt": {}, "generated tokens of a prompt": {}, "seconds": {}}
    for arm, values in best.items():
        samples_K, tokens_K = (contents.curves[arm][name] for name in ("samples", "tokens"))
        if samples_K.shape != values.shape or not np.isfinite(samples_K).any():
            continue
        tokens = np.nanmean(tokens_K, axis=0)
        x["samples of a prompt"][arm] = np.nanmean(samples_K, axis=0), values
        x["generated tokens of a prompt"][arm] = tokens, values
        if of_arm := seconds[arm]:
            x["seconds"][arm] = of_arm * tokens / tokens[-1], values
    panels = [
        _line_panel(drawn, look, label, "best reward so far", f"Against {label.removesuffix(' of a prompt')}")
        for label, drawn in x.items()
        if drawn
    ]
    text = "The same best reward so far against what it costs. Seconds are those of the whole arm, divided among its "
    text += "iterations by the tokens that each generated."
    if not panels:
        text = "Not there: save.trace: true keeps how many tokens each sample has."
    return Section("What it costs", text, panels, arms=list(x["samples of a prompt"]))


def _tradeoff(contents: Contents, look: Looks) -> Section:
    nll = {arm.name: (arm.nll, arm.reward) for arm in contents.comparison.arms if arm.nll and arm.reward}
    kl = {n: (found["estimate"], nll[n][1]) for n, found in _measured(contents, "kl").items() if n in nll}

    def points(of: Mapping[str, Any], x: str, what: str) -> Panel:
        told = "; ".join(f"{name} at {x[0]:.3f} with reward {y[0]:.3f}" for name, (x, y) in of.items())
        svg = panel(lambda axes: figures.points(axes, of, look), x, "reward", f"Reward against {what}")
        return Panel(svg, f"Reward against {what}: {told}.")

    panels = [points(nll, "NLL per token, base model", "NLL")]
    text = "Up is more reward, left is closer to the base model: an arm above and to the left of another is better in "
    text += "both. Bars are 95 % intervals over prompts."
    if kl:
        panels.append(points(kl, "KL to the base model, nats", "KL"))
    else:
        text += " Reward against KL needs `aisp evaluate` on each output."
    pairs = {n: (_side(contents, n, "tokens"), _side(contents, n, "reward")) for n in (BASE, contents.main)}
    every = -(-len(contents.ids) // _POINTS)
    shown = {name: (x[::every], y[::every]) for name, (x, y) in pairs.items()}
    title = "Reward against length"
    svg = panel(lambda axes: figures.cloud(axes, shown, look), "tokens of the answer", "reward", title)
    said = "The correlation of reward and length is "
    said += " and ".join(f"{_correlation(*pair)} for {name}" for name, pair in pairs.items())
    panels.append(Panel(svg, f"{said}; one point for each of {len(shown[BASE][0])} prompts."))
    return Section("What it trades", f"{text} {said}.", panels, arms=list(nll))


def _side(contents: Contents, name: str, measure: str) -> np.ndarray:
    """[P] of the main arm, or of the base answers beside it."""
    return contents.values(contents.main, measure, base=name == BASE)


def _correlation(x: np.ndarray, y: np.ndarray) -> str:
    there = np.isfinite(x) & np.isfinite(y)
    if there.sum() < 2 or not np.ptp(x[there]) or not np.ptp(y[there]):
        return "undefined, as one does not vary,"
    return f"{np.corrcoef(x[there], y[there])[0, 1]:.2f}"


def _distribution(contents: Contents, look: Looks) -> Section:
    title = "Reward of base and selected answers"
    rewards = {name: _side(contents, name, "reward") for name in (BASE, contents.main)}
    arms = {name: found for name, values in rewards.items() if (found := values[np.isfinite(values)]).size}
    alt = f"{title}: mean " + " and ".join(f"{values.mean():.3f}" for values in arms.values()) + "."
    shown = Panel(panel(lambda axes: figures.histograms(axes, arms, look), "reward", "prompts", title), alt)
    text, rates = "Lines in the histogram are means.", _measured(contents, "win_rate")
    for name, rate in rates.items():
        low, high = rate["interval"]
        text += f" By the judge, {name} wins {rate['win']:.0%} [{low:.0%}, {high:.0%}] against {rate['against']}"
        text += f" and ties {rate['tie']:.0%}."
    if not rates:
        text += " A judge's win rate needs `aisp evaluate --judge URL --judge-model NAME`."
    return Section("Prompt by prompt", text, [shown], arms=list(arms))


def _control(contents: Contents, look: Looks) -> Section:
    panels: list[Panel] = []
    shown: list[str] = []
    for name, y, title in (("ess", "ESS", "Effective samples"), ("kl", "nats", "KL of the control")):
        drawn = {a: d for a, d in _lines(contents, name).items() if contents.method(a).kind.endswith("aisp")}
        shown += drawn
        panels += [_line_panel(drawn, look, "iteration", y, title)] if drawn else []
    flips = {n: np.array([[one["rate"][0] for one in found]]) for n, found in _measured(contents, "flips").items()}
    if flips:
        drawn = {name: (np.arange(1, rates.shape[1] + 1), rates) for name, rates in flips.items()}
        panels.append(_line_panel(drawn, look, "iteration", "share of positions", "Tokens that the control changes"))
    text = "Effective samples near one: the weights follow a single sample (raise lambda); near all: the rewards say "
    text += "little. The control's KL is how far the search has moved from the base model."
    if not panels:
        text = "Not there: save.trace: true keeps the weights of an AISP search."
    if not flips:
        text += " Flip rates need `aisp evaluate` with the base model."
    return Section("What the search did", text, panels, arms=list(dict.fromkeys([*shown, *flips])))


def _machine(contents: Contents, look: Looks) -> Section:
    """How answers end, and the pace of each arm's machines."""
    every = {
        name: [end for c in seeds for end in c.about("finish_reason", contents.ids)]
        for name, seeds in contents.arms.items()
    }
    reasons = sorted(set().union(*every.values()))
    rows = [["", *(f"ends by {reason}" for reason in reasons), "samples / s", "tokens / s", "idle time"]]
    for name, seeds in contents.arms.items():
        lines = [line for c in seeds for line in log.commands(c.output.place)]
        seconds = sum(log.seconds(c.output.place) or 0.0 for c in seeds)
        row = [name, *(f"{every[name].count(reason) / len(every[name]):.1%}" for reason in reasons)]
        row += [f"{sum(line[key] for line in lines) / seconds:.1f}" if seconds else "" for key in ("samples", "tokens")]
        idle = lines[-1].get("idle") or {} if lines else {}
        rows.append([*row, ", ".join(f"{actor} {share:.0%}" for actor, share in idle.items() if share is not None)])
    text = (
        "How selected answers end, and the pace over all commands that filled each arm; idle time is that of the last. "
    )
    text += "Arms as short as a pilot's are mostly start and end."
    return Section("Answers and machines", text, table=rows)


_SECTIONS: tuple[Callable[[Contents, Looks], Section | None], ...] = (
    _originals,
    _progress,
    _budget,
    _tradeoff,
    _distribution,
    _control,
    _machine,
)
