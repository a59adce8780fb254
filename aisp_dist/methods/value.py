"""The value network of RE-Control (Kong et al. 2024): it predicts the reward of a response from the pre-logit of any of
its tokens, and a pre-logit ascends its gradient. Owns the network, its training and its directory; draws nothing.

The published code (github.com/Lingkai-Kong/RE-Control, train_value_model.py and inference_intervention.py) differs from
its paper in three places, which `published` keeps: it learns the reward at the first token of a response (an argmax
over its mask), the paper at the last; its temporal difference has a gradient on both sides; and the network that
generation uses has one hidden layer, the trained one two (here: one in both).

Shapes: N states, D hidden size, H width, R responses.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS, ABOUT = "model.safetensors", "value.json"


@dataclass(frozen=True, eq=False)
class Value:
    """ReLU layers in fp32, the last one with a single output."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # weight [out, in], bias [out]

    def __call__(self, z_ND: torch.Tensor) -> torch.Tensor:
        """V [N]."""
        return self._forward(z_ND)[0]

    def ascend(self, z_ND: torch.Tensor, steps: int, step_size: float) -> torch.Tensor:
        """z [N, D] after `steps` steps of gradient ascent on V. The gradient is written out, so no
        graph is kept."""
        for _ in range(steps):
            z_ND = z_ND + step_size * self.gradient(z_ND)
        return z_ND

    def gradient(self, z_ND: torch.Tensor) -> torch.Tensor:
        """dV/dz [N, D]."""
        _, alive = self._forward(z_ND)
        g = self.layers[-1][0].expand(len(z_ND), -1)
        for (weight, _), mask in zip(reversed(self.layers[:-1]), reversed(alive), strict=True):
            g = (g * mask) @ weight
        return g

    def _forward(self, z_ND: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x, alive = z_ND, []
        for weight, bias in self.layers[:-1]:
            x = torch.relu(x @ weight.T + bias)
            alive.append(x > 0)
        weight, bias = self.layers[-1]
        return (x @ weight.T + bias)[:, 0], alive


class States(NamedTuple):
    """The part of a response that is kept for training. now, next [M, D]: pre-logits of M pairs of neighbouring tokens,
    a sample of all `pairs`. ends [2, D]: pre-logits of the first and the last token. reward: the raw reward."""

    now: torch.Tensor
    next: torch.Tensor
    pairs: int
    ends: torch.Tensor
    reward: float


def sample(z_TD: torch.Tensor, reward: float, keep: int, seed: str) -> States:
    """At most `keep` pairs of neighbouring states of a response, chosen by `seed`, and both ends."""
    pairs = len(z_TD) - 1
    word = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "little")
    chosen = np.sort(np.random.default_rng(word).permutation(pairs)[:keep])
    at = torch.from_numpy(chosen).to(z_TD.device)
    ends = torch.stack([z_TD[0], z_TD[-1]])
    return States(z_TD[at].cpu(), z_TD[at + 1].cpu(), pairs, ends.cpu(), reward)


class Measures(NamedTuple):
    """Of the held-out responses: the mean loss after the last epoch, and the correlation of the reward with V at the
    token that learns it and with V at the first token (nan for fewer than three responses)."""

    loss: float
    correlation: float
    early_correlation: float


def train(
    responses: Sequence[States],
    held_out: Sequence[States],
    *,
    width: int,
    epochs: int,
    lr: float,
    batch: int,
    seed: int,
    published: bool,
    device: torch.device,
) -> tuple[Value, tuple[float, float], Measures]:
    """The network, mean and deviation of the training rewards, and how good the network is. It predicts the reward less
    that mean, in units of that deviation. Loss of a response (Kong et al. 2024, eq. 7): sum_t (V_t - V_{t+1})^2 +
    (V_T - r)^2, where the sum is estimated from the sample of pairs and V_{t+1} has no gradient unless `published`.
    Raises ValueError for rewards that are all equal."""
    rewards = np.array([r.reward for r in responses])
    mean, deviation = float(rewards.mean()), float(rewards.std())
    if not deviation > 0:
        raise ValueError(f"all {len(rewards)} training rewards are {mean:g}: there is nothing to learn")
    sizes = [responses[0].ends.shape[1], *([width] if published else [width, width]), 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    network = nn.Sequential(*(m for layer in linear for m in (layer, nn.ReLU())))[:-1].to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    order = np.random.default_rng(seed)

    def loss(some: Sequence[States]) -> torch.Tensor:
        now, following = (torch.cat([getattr(s, n) for s in some]).float().to(device) for n in ("now", "next"))
        weight = torch.tensor([s.pairs / len(s.now) for s in some for _ in s.now], device=device)
        end = torch.stack([s.ends[0 if published else 1] for s in some]).float().to(device)
        target = torch.tensor([(s.reward - mean) / deviation for s in some], device=device)
        v_next = network(following)[:, 0]
        change = network(now)[:, 0] - (v_next if published else v_next.detach())
        total: torch.Tensor = (weight * change.square()).sum() + (network(end)[:, 0] - target).square().sum()
        return total / len(some)

    for _ in range(epochs):
        shuffled = order.permutation(len(responses))
        for start in range(0, len(shuffled), batch):
            optimizer.zero_grad()
            loss([responses[i] for i in shuffled[start : start + batch]]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    value = Value(tuple((layer.weight.detach(), layer.bias.detach()) for layer in linear))
    with torch.no_grad():
        of = float(loss(held_out))
        ends = torch.stack([s.ends for s in held_out]).float().to(device)
        v_first, v_last = value(ends[:, 0]).cpu().numpy(), value(ends[:, 1]).cpu().numpy()
    seen = np.array([s.reward for s in held_out])
    learnt = v_first if published else v_last
    return value, (mean, deviation), Measures(of, _correlation(learnt, seen), _correlation(v_first, seen))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 2 and a.std() > 0 and b.std() > 0 else float("nan")


def save(value: Value, about: dict[str, Any], folder: Path) -> None:
    """Write a directory with the weights and a description. It appears whole, by a rename."""
    staged = folder.with_name(f".{folder.name}.staged")
    staged.mkdir(parents=True, exist_ok=True)
    tensors = {f"{i}.{n}": t.cpu().contiguous() for i, pair in enumerate(value.layers) for n, t in zip("wb", pair)}  # noqa: B905
    save_file(tensors, staged / WEIGHTS)
    (staged / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    staged.rename(folder)


def load(folder: str | Path, device: torch.device) -> Value:
    tensors = load_file(Path(folder) / WEIGHTS, device=str(device))
    return Value(tuple((tensors[f"{i}.w"], tensors[f"{i}.b"]) for i in range(len(tensors) // 2)))
