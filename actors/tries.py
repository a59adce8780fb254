"""Why one try of a call at a replica gave no answer. Knows neither pools nor what they do about it."""

from __future__ import annotations

from aisp_dist.rewards.client import Unavailable


class NoAnswer(Exception):
    """Why a try gave no answer."""


class Raised(NoAnswer):
    """The callee raised; its process is alive."""


class Down(NoAnswer):
    """The server behind the callee did not answer; the callee's process is well. why: without the server's address."""

    def __init__(self, error: Unavailable) -> None:
        super().__init__(str(error))
        self.why = error.why


class Over(NoAnswer):
    """The call took longer than its limit."""


class Lost(NoAnswer):
    """The process went away and has been replaced. counts: False where it was replaced because of another call."""

    def __init__(self, reason: str, counts: bool = True) -> None:
        super().__init__(reason)
        self.counts = counts


class Away(Exception):
    """The only slot that will do did not come back in time."""
