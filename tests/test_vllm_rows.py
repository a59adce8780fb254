"""What vLLM's workers keep of requests, without vLLM."""

from __future__ import annotations

import torch

from aisp_dist.vllm.requests import Spec
from aisp_dist.vllm.rows import Rows


def test_states_of_ended_requests_wait_while_a_full_batch_goes_on():
    batch, dim = 50, 8
    rows = Rows(lambda z_ND: z_ND @ torch.ones(dim, 16), dim, torch.device("cpu"), batch)
    names = [f"r{i}" for i in range(2 * batch)]  # half of them end, and are asked for later
    made = {n: rows.row(n, lambda n=n: Spec(n, 1, forced=(1, 2, 3, 4), kept=True)) for n in names}
    for step in (1, 2, 3, 4):
        going = names if step < 3 else names[batch:]
        rows.logits(torch.full((len(going), dim), float(step)), [made[n] for n in going], [step] * len(going))
    assert {len(rows.kept[n]) for n in names[:batch]} == {2} and {len(rows.kept[n]) for n in names[batch:]} == {4}
