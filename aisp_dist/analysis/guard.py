"""Signs of reward hacking in the selected answers: they are cut, repeat themselves or win by length, and held-out
rewards do not follow. Pure; one accumulator serves a running search and a finished table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from aisp_dist.analysis.metrics import repetition
from aisp_dist.config import Guard
from aisp_dist.records import Done

SETTLED = 200  # prompts before the bounds are applied to a running search
_FEW = 3  # pairs without which a correlation says nothing


class GuardStop(Exception):
    """A bound of guard.* is broken, and guard.action is stop. What is finished is kept."""


@dataclass
class Tally:
    """Sums over done prompts. held_out: the rewards with `use: report`."""

    held_out: tuple[str, ...] = ()
    prompts: int = 0
    _truncated: int = 0
    _repetition: float = 0.0
    _base_repetition: float = 0.0
    _gains: dict[str, tuple[int, float]] = field(default_factory=dict)  # of a held-out reward: rows with both, sum
    _pairs: int = 0
    _mean: tuple[float, float] = (0.0, 0.0)  # of the gains in reward and in length
    _spread: tuple[float, float, float] = (0.0, 0.0, 0.0)  # sums of squares x x, y y, x y about the means

    def add(
        self,
        finish_reason: str,
        repetitions: tuple[float, float],
        gain: float,
        longer: float,
        held_out: Mapping[str, float],
    ) -> None:
        """A done prompt. repetitions: of the selected and of the base answer. gain, longer, held_out: selected minus
        base, in reward, in tokens and in each held-out reward; NaN where one of both has none."""
        self.prompts += 1
        self._truncated += finish_reason == "length"
        self._repetition += repetitions[0]
        self._base_repetition += repetitions[1]
        for name, value in held_out.items():
            if not math.isnan(value):
                count, total = self._gains.get(name, (0, 0.0))
                self._gains[name] = count + 1, total + value
        if not math.isnan(gain):
            self._pair(gain, longer)

    def add_done(self, done: Done) -> None:
        best, base = done.best, done.base
        scores, base_scores = dict(best.rewards), dict(base.rewards)
        self.add(
            best.finish_reason,
            (repetition(best.text), repetition(base.text)),
            _minus(best.reward, base.reward),
            float(len(best.token_ids) - len(base.token_ids)),
            {name: _minus(scores.get(name), base_scores.get(name)) for name in self.held_out},
        )

    def _pair(self, x: float, y: float) -> None:
        """Welford's sums: no cancellation, however far the means are from 0."""
        self._pairs += 1
        dx, dy = x - self._mean[0], y - self._mean[1]
        self._mean = self._mean[0] + dx / self._pairs, self._mean[1] + dy / self._pairs
        xx, yy, xy = self._spread
        self._spread = xx + dx * (x - self._mean[0]), yy + dy * (y - self._mean[1]), xy + dx * (y - self._mean[1])

    def measures(self) -> Measures:
        """Raises ZeroDivisionError before the first prompt."""
        xx, yy, xy = self._spread
        varies = self._pairs >= _FEW and xx > 0 and yy > 0
        return Measures(
            truncated=self._truncated / self.prompts,
            repetition=self._repetition / self.prompts,
            base_repetition=self._base_repetition / self.prompts,
            length_correlation=xy / (xx**0.5 * yy**0.5) if varies else None,
            gain=self._mean[0] if self._pairs else None,
            held_out={name: total / count for name, (count, total) in self._gains.items()},
        )


@dataclass(frozen=True)
class Measures:
    """truncated: share of selected answers that end by length. repetition: mean of metrics.repetition.
    length_correlation: Pearson's r of the gains in reward and in tokens over the base answer; None below three prompts
    and where one does not vary. gain, held_out: mean gains over the base answer, combined and of held-out rewards."""

    truncated: float
    repetition: float
    base_repetition: float
    length_correlation: float | None
    gain: float | None
    held_out: Mapping[str, float]

    def __str__(self) -> str:
        said = [
            f"{self.truncated:.1%} truncated",
            f"repetition {self.repetition:.3f} (base {self.base_repetition:.3f})",
        ]
        if self.length_correlation is not None:
            said.append(f"gains in reward and length correlate by {self.length_correlation:.2f}")
        if self.held_out and self.gain is not None:
            gains = ", ".join(f"{name} {gain:+.3f}" for name, gain in self.held_out.items())
            said.append(f"gain {self.gain:+.3f}, held out: {gains}")
        return f"selected answers: {'; '.join(said)}"


def broken(guard: Guard, found: Measures) -> list[str]:
    """One sentence for each bound that does not hold."""
    most = (
        ("max_truncated", "of the selected answers are truncated", guard.max_truncated, found.truncated),
        ("max_repetition", "is the mean repetition of the selected answers", guard.max_repetition, found.repetition),
        (
            "max_length_correlation",
            "is the correlation of gains in reward and length",
            guard.max_length_correlation,
            found.length_correlation,
        ),
    )
    said = [
        f"{value:.3g} {what}; guard.{key} allows {bound:g}"
        for key, what, bound, value in most
        if bound is not None and value is not None and value > bound
    ]
    least = guard.held_out_gain
    return said + [
        f"the held-out reward {name} gains {gain:.3g}; guard.held_out_gain asks for {least:g}"
        for name, gain in found.held_out.items()
        if least is not None and gain < least
    ]


def check(guard: Guard, tally: Tally, whole: bool = False) -> None:
    """Raise GuardStop where the guard stops runs and a bound is broken. whole: all prompts are finished; otherwise
    nothing is checked before SETTLED of them are."""
    if guard.action != "stop" or tally.prompts < (1 if whole else SETTLED):
        return
    if said := broken(guard, tally.measures()):
        raise GuardStop(
            f"after {tally.prompts} prompts: {'; '.join(said)}. What is finished is kept; with another bound, or "
            "guard.action: warn, the same command resumes"
        )


def _minus(x: float | None, y: float | None) -> float:
    return math.nan if x is None or y is None else x - y
