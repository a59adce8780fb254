"""What vLLM's workers keep of requests, without vLLM."""

from __future__ import annotations

import pytest
import torch

from aisp_dist.config import ConfigError, Generator
from aisp_dist.records import Round, Sampling
from aisp_dist.vllm.requests import Spec
from aisp_dist.vllm.rows import Rows, control_bytes
from aisp_dist.vllm.start import arguments


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
    h_ND[0, 3], h_ND[1, 2], h_ND[2, 1] = torch.inf, -torch.inf, torch.nan
    found = rows.logits(h_ND, [*made, None], [1] * 5)
    assert int(found.sampled[2].argmax()) == 1, "what is forced comes, whatever the logits"
    names = [spec.name for spec in specs]
    assert rows.finite.take(names) == [False, False, False, True]
    assert rows.finite.take(names) == [True] * 4


def test_controls_of_ended_requests_are_let_go():
    """So that they take what is set aside for them and no more: one for each row, or those that are kept."""
    batch, steps, dim = 4, 3, 8
    rows = Rows(lambda z_ND: z_ND @ torch.ones(dim, 16), dim, torch.device("cpu"), batch)
    alive: set[str] = set()
    for first in range(0, 40, batch):
        alive = {f"r{i}" for i in range(first, first + batch)}
        rows.forget(alive.__contains__)
        for name in alive:
            rows.row(name, lambda n=name: Spec(n, 1, Round(1, n, (5,), 0, 0, 1, Sampling(0.3)), steps))
        assert len(rows.rows) == batch
    assert control_bytes(256, 512, 4096) == 256 * (8 << 20) + 16 * (8 << 20)
    assert control_bytes(8, 128, 1024) == (1 << 30) + 16 * (1 << 19)


SHARES = [(80, 1.0, 0.92), (80, 0.5, 0.46), (24, 0.9, 0.811), (24, 0.2, 0.111)]


@pytest.mark.parametrize(("gpu", "share", "used"), SHARES)
def test_controls_have_their_memory_beside_vllms(gpu, share, used):
    """512 steps of an 8B model, 256 rows: 2.1 GiB. vLLM leaves 8 % of its share anyway."""
    wanted = arguments(Generator(model="m", engine="vllm", max_new_tokens=512), 4096, share, gpu << 30, 4096)
    taken = wanted["gpu_memory_utilization"]
    assert taken == pytest.approx(used, abs=1e-3)
    assert taken * (gpu << 30) + control_bytes(256, 512, 4096) <= share * (gpu << 30)
    with pytest.raises(ConfigError, match="up to 256 rows x 512 steps x 4096 numbers take 2.3 GB.*max_num_seqs"):
        arguments(Generator(model="m", engine="vllm", max_new_tokens=512), 4096, 0.05, 24 << 30, 4096)
