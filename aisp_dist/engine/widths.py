"""How many rows a step computes. To compute fewer rows than there are slots is cheaper, but a matrix product of another
size may add up in another order, and then it gives other bits. So only those sizes are used that give the bits of all
slots, which is tried once, with the model's own weights, in the process that decodes.
"""

from __future__ import annotations

import torch

from aisp_dist.engine.attention import TILE, Layer
from aisp_dist.engine.lm import LM


@torch.inference_mode()
def widths(lm: LM, num_rows: int) -> tuple[int, ...]:
    """Numbers of rows, ascending, whose states and logits have the bits that they have among `num_rows`, which is the
    last. The others begin with a quarter of TILE; from TILE on four make twice as many, and eight from 4 TILE on.
    Attention is left out: it is computed by blocks (kv.py)."""
    tokens_B1 = (torch.arange(num_rows, device=lm.device) * 7919 % lm.vocab_size)[:, None]
    positions_B1 = (torch.arange(num_rows, device=lm.device) % (lm.context_length or num_rows))[:, None]

    def computed(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        z_BD = lm.states(_own_value, tokens_B1[:rows], positions_B1[:rows])[:, 0]
        return z_BD, lm.logits(z_BD.float())

    steps = ((TILE << k, TILE << k >> (2 if k < 2 else 3)) for k in range(num_rows.bit_length()))
    larger = (rows for first, step in steps for rows in range(first, 2 * first, step))
    fewer = [rows for rows in (*range(TILE // 4, TILE, TILE // 4), *larger) if rows < num_rows]
    if not fewer:
        return (num_rows,)
    whole = computed(num_rows)
    same = [rows for rows in fewer if all(torch.equal(a, b[:rows]) for a, b in zip(computed(rows), whole, strict=True))]
    return (*same, num_rows)


def _own_value(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """An attention pass in which every token sees itself alone."""
    return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
