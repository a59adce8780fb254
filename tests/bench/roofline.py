"""How long an 8B model takes: Llama-3-8B, and a reward model of its size, at a GPU's roofline. Arithmetic only."""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass

from aisp_dist.records import Round

# Llama-3-8B: parameters of the layers and of the output layer; bytes of keys and values per token in bf16; operations
# of a row's attention to one token, 4 x layers x width.
LAYERS, HEAD, KV_BYTES, ATTEND = 6.98e9, 0.525e9, 131072, 4 * 32 * 4096
KEPT = 1 << 13  # tokens of prefixes that a scorer keeps (aisp_dist/rewards/prefix.py)


@dataclass(frozen=True, slots=True)
class Plan:
    """A cluster of one coordinator, its work, and its faults. Times in seconds.

    coordinator: CPU seconds per round. spread: response lengths are uniform from (1 - spread) x new_tokens to
    new_tokens. deaths: per replica and hour; a share `stalls` of them only hang. bandwidth, flops: of one GPU. queue:
    requests that a scorer has at a time. bundle: rows simulated as one.
    """

    generators: int = 8
    scorers: int = 8
    prompts: int = 400
    coordinator: float = 0.0
    samples: int = 32
    iterations: int = 32
    batch_rows: int = 256
    prompt_tokens: int = 500
    new_tokens: int = 128
    spread: float = 0.5
    deaths: float = 0.0
    stalls: float = 0.1
    startup: float = 120.0
    retries: int = 3
    bandwidth: float = 4.3e12
    flops: float = 7.9e14
    queue: int = 1
    bundle: int = 8
    seed: int = 0

    def step(self, rows: float) -> float:
        """Seconds of one decoding step of `rows` rows, each half way through its answer, of rows / samples prompts."""
        own = self.new_tokens * (1 - self.spread / 2) / 2
        keys = (math.ceil(rows / self.samples) * self.prompt_tokens + rows * own) * KV_BYTES
        products = max(2 * (LAYERS + HEAD) / self.bandwidth, 2 * (LAYERS + HEAD) * rows / self.flops)
        return products + max(keys / self.bandwidth, ATTEND * rows * (self.prompt_tokens + own) / self.flops)

    def read(self, tokens: float) -> float:
        """Seconds to read tokens in parallel: a prefill, or a reward model's pass."""
        return 2 * LAYERS * tokens / self.flops

    def lengths(self, round: Round) -> list[int]:
        """Lengths of the round's trajectories in tokens."""
        count = round.stop - round.start
        text = f"{self.seed} {round.prompt_id} {round.iteration} {round.start}"
        words = hashlib.shake_128(text.encode()).digest(4 * count)
        share = [1 - self.spread * word / (1 << 32) for word in struct.unpack(f"{count}I", words)]
        return [max(1, math.ceil(s * self.new_tokens)) for s in share]
