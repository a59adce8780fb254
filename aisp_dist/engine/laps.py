"""Where the time of an engine's thread goes, by part of its work."""

from __future__ import annotations

import time

PARTS = ("prefill", "decoder", "control", "head", "draw", "likelihood", "record")


class Laps:
    """seconds: by part; a lap is from the end of the one before. On a GPU, whose work is queued, it is what the thread
    waited for."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.start()

    def start(self) -> None:
        """What comes before belongs to no part."""
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now
