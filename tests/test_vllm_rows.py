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


def test_logits_that_are_not_finite_are_told_of_every_kind_of_round():
    """Of greedy rows too, which want nothing else; once; and of no row beside them."""
    dim = 8
    rows = Rows(lambda z_ND: z_ND @ torch.ones(dim, 16), dim, torch.device("cpu"), 8)
    specs = [Spec("greedy", 1), Spec("measured", 1, measured=True), Spec("forced", 1, forced=(1,)), Spec("well", 1)]
    made = [rows.row(spec.name, lambda spec=spec: spec) for spec in specs]
    h_ND = torch.ones(5, dim)
    h_ND[0, 3], h_ND[1, 2], h_ND[2, 1] = torch.nan, torch.inf, -torch.inf
    rows.logits(h_ND, [*made, None], [1] * 5)
    names = [spec.name for spec in specs]
    assert rows.finite.take(names) == [False, False, False, True]
    assert rows.finite.take(names) == [True] * 4
