"""`aisp doctor`: whether this project's promises hold on this hardware, with the models of a run. Runs in one process
without Ray, with one model in memory at a time.

examine.py runs the checks of a run one after the other. engine.py checks that a row's bits do not depend on what is
decoded beside it, and that an engine's states and tokens are those of transformers; served.py checks vLLM's engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "FAILED"]


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. figure: what was measured; advice: what it means and what to do, "" if all is well."""

    name: str
    verdict: Verdict
    figure: str
    advice: str = ""

    def line(self) -> str:
        return f"{self.verdict:6} {self.name}: {self.figure}" + (f". {self.advice}" if self.advice else "")
