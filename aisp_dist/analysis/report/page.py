"""The sections of a report in the order in which a reader decides, and the page that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from aisp_dist.analysis.arms import BASE
from aisp_dist.analysis.report import figures, samples
from aisp_dist.analysis.report.figures import Look, panel
from aisp_dist.analysis.report.sources import LIMITS, Source
from aisp_dist.analysis.report.verdict import verdict

_POINTS = 1500  # of an arm in a scatter; of more prompts every n-th
Draw = Callable[[Any], None]
Lines = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Panel:
    """A figure, and what it shows in words for who does not see it."""

    svg: str
    alt: str


@dataclass(frozen=True)
class Section:
    """title and text around figures and a table (its first row is the head); arms: for the legend. Without figures and
    table the text says what would give them."""

    title: str
    text: str
    panels: Sequence[Panel] = ()
    table: Sequence[Sequence[str]] = ()
    arms: Sequence[str] = ()


def render(source: Source, count: int) -> bytes:
    """The page. count: prompts in the sample browser, at most."""
    look = figures.looks(list(source.arms), source.main, BASE)
    budgets = {name: source.budget(name) for name in source.arms}
    found = verdict(source.figures, source.main, budgets, sorted(source.controls))
    sections = [build(source, look) for build in _SECTIONS]
    answers = samples.collect(source, found.rival, count)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
    text = template.render(
        main=source.main,
        seeds=max(map(len, source.arms.values())),
        prompts=len(source.shared),
        left_out=source.left_out,
        budget=budgets[source.main],
        settings=_settings(source),
        verdict=found,
        table=_table(source),
        sections=[section for section in sections if section is not None],
        look=look,
        answers=answers,
        data=samples.script(answers),
    )
    return text.replace("\0", "\ufffd").encode("utf-8", "replace")


def _settings(source: Source) -> list[tuple[str, str]]:
    run = source.arms[source.main][0].output.run
    rewards = ", ".join(f"{name} ({'selects' if r.use == 'select' else 'held out'})" for name, r in run.rewards.items())
    lost = f", {source.left_out} more failed in some arm and are left out" if source.left_out else ""
    return [
        ("Prompts", f"{len(source.shared)} of {run.prompts.source}{lost}"),
        ("Base model", run.generator.model),
        ("Rewards", rewards),
        (
            "Arms",
            ", ".join(f"{name} ({len(seeds)} seed{'s' * (len(seeds) > 1)})" for name, seeds in source.arms.items()),
        ),
        ("Samples", f"{source.budget(source.main)} a prompt"),
        ("Tokens", f"at most {run.generator.max_new_tokens} an answer"),
    ]


def _cell(cell: Sequence[float] | None) -> str:
    return "" if cell is None else f"{cell[0]:.3f} [{cell[1]:.3f}, {cell[2]:.3f}]"


def _table(source: Source) -> list[list[str]]:
    names = list(dict.fromkeys(name for arm in source.figures for name in arm["held_out"]))
    head = [
        "",
        "samples",
        "reward",
        f"{source.main} minus it",
        f"won by {source.main}",
        *(f"held out: {n}" for n in names),
    ]
    head += ["NLL / token", "diversity", "tokens", "std over seeds", "area", "drawn tokens", "reward calls", "seconds"]
    rows = [head]
    for arm in source.figures:
        ours = arm["name"] == source.main
        row = [arm["name"], f"{arm['samples']:g}", _cell(arm["reward"])]
        row += ["", ""] if ours else [_cell(arm["versus"]), "" if arm["won"] is None else f"{arm['won']:.0%}"]
        row += [_cell(arm["held_out"][name]) if name in arm["held_out"] else "" for name in names]
        row += [_cell(arm["nll"]), f"{arm['diversity'][0]:.3f}", f"{arm['num_tokens']:.1f}"]
        row += ["" if arm[name] is None else f"{arm[name]:.3f}" for name in ("std", "auc")]
        rows.append(
            row + ["" if arm[n] is None else f"{arm[n]:.0f}" for n in ("model_tokens", "reward_calls", "seconds")]
        )
    return rows


def _curve(source: Source, arm: str, name: str) -> np.ndarray:
    """[P', K] averaged over seeds; of seeds that traced other prompts the first alone."""
    found = [seed.curves[name] for seed in source.arms[arm]]
    same = [one for one in found if one.shape == found[0].shape]
    mean: np.ndarray = np.mean(same, axis=0)
    return mean


def _iterations(source: Source, name: str, least: int = 2) -> Lines:
    curves = {arm: _curve(source, arm, name) for arm in source.arms}
    return {
        a: (np.arange(1, c.shape[1] + 1), c) for a, c in curves.items() if c.shape[1] >= least and np.isfinite(c).any()
    }


def _ends(drawn: Lines) -> str:
    return "; ".join(f"{arm} ends at {np.nanmean(values[:, -1]):.3f}" for arm, (_, values) in drawn.items())


def _line_panel(drawn: Lines, look: Mapping[str, Look], x: str, y: str, title: str, integers: bool = True) -> Panel:
    def draw(axes: Any) -> None:
        figures.lines(axes, drawn, look)
        if integers:
            figures.whole(axes)

    return Panel(panel(draw, x, y, title), f"{title}, {y} over {x}: {_ends(drawn)}.")


def _measured(source: Source) -> dict[str, Any]:
    """evaluation.json by arm, where there is one."""
    return {arm: seeds[0].evaluation for arm, seeds in source.arms.items() if seeds[0].evaluation}


def _progress(source: Source, look: Mapping[str, Look]) -> Section:
    titles = {
        "mean": "Mean of the iteration's samples",
        "best": "Best of the iteration's samples",
        "so far": "Best so far",
    }
    found = {name: _iterations(source, name) for name in titles}
    panels = [_line_panel(d, look, "iteration", "reward", titles[n]) for n, d in found.items() if d]
    text = "A search that learns raises the mean of what it draws; one that only draws more does not. "
    text += "Lines are means over prompts, bands their 95 % intervals."
    if not panels:
        text = "Not there: a search of one iteration has no curve; save.trace: true keeps one for those that have more."
    elif not found["mean"]:
        text += " Mean and best of an iteration need save.trace: true."
    return Section("How the search goes", text, panels, arms=list(found["so far"]))


def _budget(source: Source, look: Mapping[str, Look]) -> Section:
    best = _iterations(source, "so far")
    seconds = {arm["name"]: arm["seconds"] for arm in source.figures}
    x: dict[str, dict[str, np.ndarray]] = {"samples": {}, "generated tokens": {}, "seconds": {}}
    for arm in best:
        for label, name in (("samples", "samples"), ("generated tokens", "tokens")):
            curve = _curve(source, arm, name)
            if curve.shape == best[arm][1].shape:
                x[label][arm] = np.nanmean(curve, axis=0)
        if seconds.get(arm) and arm in x["generated tokens"]:
            x["seconds"][arm] = seconds[arm] * x["generated tokens"][arm] / x["generated tokens"][arm][-1]
    panels = []
    for label, arms in x.items():
        drawn = {arm: (found, best[arm][1]) for arm, found in arms.items()}
        unit = label if label == "seconds" else f"{label} of a prompt"
        panels += [_line_panel(drawn, look, unit, "best reward so far", f"Against {label}", False)] if drawn else []
    text = "The same best reward so far against what it costs. Seconds are those of the whole arm, laid over its "
    text += "iterations by the tokens that each generated."
    if not panels:
        text = "Not there: save.trace: true keeps how many tokens each sample has."
    return Section("What it costs", text, panels, arms=list(x["samples"]))


def _batched(source: Source, look: Mapping[str, Look]) -> Section | None:
    batched = [name for name in source.arms if source.method(name).kind == "batched_aisp"]
    if not batched:
        return None
    best = _iterations(source, "so far", least=1)
    drawn = {arm: best[arm] for arm in batched if arm in best}
    ends = {arm: float(source.values(arm, "reward").mean()) for arm in source.arms if arm not in batched}

    def draw(axes: Any) -> None:
        figures.lines(axes, drawn, look)
        for arm, end in ends.items():
            axes.axhline(end, color=look[arm].color, linestyle=look[arm].line, linewidth=1.1)
        figures.whole(axes)

    alt = f"Best reward so far of the batched arms by iteration: {_ends(drawn)}. Where the others end: "
    alt += "; ".join(f"{arm} {end:.3f}" for arm, end in ends.items()) + "."
    shown = Panel(panel(draw, "iteration", "best reward so far", "Batched AISP"), alt)
    text = "Batched AISP runs as many prompts side by side as it has iterations, so that a batch takes the decoding "
    text += "steps of best-of-n. Level lines are where the other arms end."
    return Section("Batched search", text, [shown], arms=[*batched, *ends])


def _tradeoff(source: Source, look: Mapping[str, Look]) -> Section:
    nll = {arm["name"]: (arm["nll"], arm["reward"]) for arm in source.figures if arm["nll"] and arm["reward"]}
    measured = _measured(source)
    kl = {n: (e["kl"]["estimate"], nll[n][1]) for n, e in measured.items() if e.get("kl") and n in nll}

    def told(of: Mapping[str, Any]) -> str:
        return "; ".join(f"{name} at {x[0]:.3f} with reward {y[0]:.3f}" for name, (x, y) in of.items()) + "."

    drawn = panel(
        lambda axes: figures.points(axes, nll, look), "NLL per token, base model", "reward", "Reward against NLL"
    )
    panels = [Panel(drawn, f"Reward against NLL: {told(nll)}")]
    text = "Up is more reward, left is closer to the base model: an arm above and to the left of another is better in "
    text += "both. Bars are 95 % intervals over prompts."
    if kl:
        drawn = panel(
            lambda axes: figures.points(axes, kl, look), "KL to the base model, nats", "reward", "Reward against KL"
        )
        panels.append(Panel(drawn, f"Reward against KL: {told(kl)}"))
    else:
        text += " Reward against KL needs `aisp evaluate` on each output."
    limited = {name: found for name, seeds in source.arms.items() if (found := seeds[0].frontier) is not None}
    if limited:
        at = {name: (LIMITS, found) for name, found in limited.items()}
        panels.append(_line_panel(at, look, "NLL allowed above the base answer's", "reward", "Frontier", False))
        text += " The frontier is the best kept answer whose NLL per token is at most so far above the base answer's."
    else:
        text += " The frontier of reward by allowed NLL needs method.limit, which measures every candidate's."
    lengths, said = _lengths(source, look)
    panels.append(lengths)
    text += said
    return Section("What it trades", text, panels, arms=list(nll))


def _lengths(source: Source, look: Mapping[str, Look]) -> tuple[Panel, str]:
    pairs = {BASE: _pair(source, source.main, True), source.main: _pair(source, source.main)}
    every = -(-len(source.shared) // _POINTS)
    drawn = {name: (x[::every], y[::every]) for name, (x, y) in pairs.items()}
    svg = panel(
        lambda axes: figures.cloud(axes, drawn, look), "tokens of the answer", "reward", "Reward against length"
    )
    told = " and ".join(f"{_correlation(*pair)} for {name}" for name, pair in pairs.items())
    said = f"The correlation of reward and length is {told}"
    return Panel(svg, f"{said}; one point for each of {len(drawn[BASE][0])} prompts."), f" {said}."


def _pair(source: Source, arm: str, base: bool = False) -> tuple[np.ndarray, np.ndarray]:
    return source.values(arm, "tokens", base), source.values(arm, "reward", base)


def _correlation(x: np.ndarray, y: np.ndarray) -> str:
    there = np.isfinite(x) & np.isfinite(y)
    if there.sum() < 2 or not np.ptp(x[there]) or not np.ptp(y[there]):
        return "undefined, as one does not vary,"
    return f"{np.corrcoef(x[there], y[there])[0, 1]:.2f}"


def _distribution(source: Source, look: Mapping[str, Look]) -> Section:
    arms = {BASE: source.values(source.main, "reward", True), source.main: source.values(source.main, "reward")}
    arms = {name: values[np.isfinite(values)] for name, values in arms.items()}
    title = "Reward of base and selected answers"
    alt = f"{title}: mean {arms[BASE].mean():.3f} and {arms[source.main].mean():.3f}." if len(arms[BASE]) else title
    arms = {name: values for name, values in arms.items() if len(values)}
    panels = [Panel(panel(lambda axes: figures.histograms(axes, arms, look), "reward", "prompts", title), alt)]
    others = [arm for arm in source.figures if arm["name"] != source.main and arm["won"] is not None]
    names = [figures.plain(arm["name"]) for arm in others]
    won = {"won": [arm["won"] for arm in others]}

    def wins(axes: Any) -> None:
        figures.bars(axes, names, won, [look[source.main].color])
        axes.axvline(0.5, color=figures.GREY, linestyle="--", linewidth=1)

    alt = f"Share of prompts that {source.main} wins, ties half: "
    alt += "; ".join(f"{arm['won']:.0%} against {arm['name']}" for arm in others) + "."
    title = f"Prompts that {figures.plain(source.main)} wins"
    panels.append(Panel(panel(wins, "share of prompts, by reward", "", title), alt))
    text = "Lines in the histogram are means."
    judged = {n: e["win_rate"] for n, e in _measured(source).items() if e.get("win_rate")}
    for name, rate in judged.items():
        text += f" By the judge, {name} wins {rate['win']:.0%} against {rate['against']}, ties {rate['tie']:.0%}."
    if not judged:
        text += " A judge's win rate needs `aisp evaluate --judge URL --judge-model NAME`."
    return Section("Prompt by prompt", text, panels, arms=list(arms))


def _control(source: Source, look: Mapping[str, Look]) -> Section:
    moving = {"ess": "Effective samples", "kl": "KL of the control"}
    panels: list[Panel] = []
    shown: list[str] = []
    for name, title in moving.items():
        drawn = {a: d for a, d in _iterations(source, name).items() if source.method(a).kind.endswith("aisp")}
        shown += drawn
        panels += [_line_panel(drawn, look, "iteration", "ESS" if name == "ess" else "nats", title)] if drawn else []
    measured = _measured(source)
    flips = {n: [one["rate"] for one in e["flips"]] for n, e in measured.items() if e.get("flips")}
    if flips:
        drawn = {n: (np.arange(1, len(r) + 1), np.array(r)[:, 0][None]) for n, r in flips.items()}
        panels.append(_line_panel(drawn, look, "iteration", "share of positions", "Tokens that the control changes"))
    for name, found in {n: e["projections"] for n, e in measured.items() if e.get("projections")}.items():
        panels += [_projected(name, one, look) for one in found]
    text = "Effective samples near one: the weights follow a single sample (raise lambda); near all: the rewards say "
    text += "little. The control's KL is how far the search has moved from the base model."
    if not panels:
        text = "Not there: save.trace: true keeps the weights of an AISP search."
    if not flips:
        text += " Flip rates and the pre-logits' histograms need `aisp evaluate` with the base model."
    return Section("What the search did", text, panels, arms=list(dict.fromkeys([*shown, *flips])))


def _projected(arm: str, one: Mapping[str, Any], look: Mapping[str, Look]) -> Panel:
    colors = (figures.GREY, look[arm].color)
    svg = panel(
        lambda axes: figures.projection(axes, one["base"], one["moved"], colors),
        f"pre-logits of {figures.plain(repr(one['token']))}",
        "density",
        one["name"],
    )
    distance = f"distance from a normal {one['base']['ks']:.3f} before and {one['moved']['ks']:.3f} after"
    return Panel(svg, f"{arm}: {one['positions']} pre-logits on {one['name']}, {distance} the move.")


def _sensitivity(source: Source, look: Mapping[str, Look]) -> Section:
    if source.trials is None:
        return Section("Sensitivity", "Not there: `aisp tune` tries settings and writes tune/trials.json.")
    panels = []
    for k, entry in enumerate(source.trials["arms"]):
        name, trials = entry["arm"], entry["trials"]
        how = look.get(name) or list(look.values())[1 + k % (len(look) - 1)]
        for setting in entry["best"]:
            x = np.array([trial["settings"][setting] for trial in trials], dtype=float)
            y = np.array([trial["reward"] for trial in trials], dtype=float)
            panels.append(_tried(figures.plain(name), setting, x, y, entry["best"][setting], how))
    text = f"Reward of every trial of `aisp tune` on {source.trials['tune']['prompts']} other prompts by one setting "
    text += "at a time, the others varying with it; bars are 95 % intervals, the upright line marks the chosen value."
    return Section("Sensitivity", text, panels)


def _tried(name: str, setting: str, x: np.ndarray, y: np.ndarray, best: float, how: Look) -> Panel:
    def draw(axes: Any) -> None:
        error = [y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]]
        axes.errorbar(x, y[:, 0], yerr=error, fmt=how.marker, color=how.color, markersize=4, linewidth=0.9, capsize=2)
        axes.axvline(best, color=figures.GREY, linestyle="--", linewidth=1)
        if x.min() > 0 and x.max() / x.min() > 50:
            axes.set_xscale("log")

    told = f"{len(x)} trials, rewards {y[:, 0].min():.3f} to {y[:, 0].max():.3f}, chosen {best:.4g}"
    return Panel(panel(draw, setting, "reward", name), f"{name}, reward by {setting}: {told}.")


def _machine(source: Source, look: Mapping[str, Look]) -> Section:
    reasons = sorted({reason for seeds in source.arms.values() for seed in seeds for reason in seed.table.finish})
    rows = [["", *(f"ends by {reason}" for reason in reasons), "samples / s", "tokens / s", "idle time"]]
    for name, seeds in source.arms.items():
        ends = sum((seed.table.finish for seed in seeds), start=type(seeds[0].table.finish)())
        row = [name, *(f"{ends[reason] / ends.total():.1%}" for reason in reasons)]
        lines = [seed.metrics for seed in seeds if seed.metrics and seed.metrics.get("seconds")]
        seconds = sum(line["seconds"] for line in lines)
        row += [f"{sum(ln[key] for ln in lines) / seconds:.1f}" if lines else "" for key in ("samples", "tokens")]
        idle = lines[-1].get("idle") or {} if lines else {}
        rows.append([*row, ", ".join(f"{actor} {share:.0%}" for actor, share in idle.items() if share is not None)])
    text = "How selected answers end, and what the machines did in the last command of each arm; idle time is that of "
    text += "the last seed. Arms as short as a pilot's are mostly start and end."
    return Section("Answers and machines", text, table=rows)


_SECTIONS = (_progress, _budget, _batched, _tradeoff, _distribution, _control, _sensitivity, _machine)
