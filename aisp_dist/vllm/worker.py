"""What vLLM's workers answer by collective_rpc: vLLM's `worker_extension_cls`.

Every rank of the last pipeline stage answers the same; the ranks of other stages see no logits and answer None. No
method raises: vLLM would leave the other ranks' answers where the next call finds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from aisp_dist.engine import calibrate, control
from aisp_dist.philox import prompt_key
from aisp_dist.records import Rates
from aisp_dist.vllm import requests
from aisp_dist.vllm.runners import Hook, empty, install, last_stage

Answer = tuple[bool, Any]  # True and what a method returns, or False and its error's text


def _told(method: Callable[..., Any]) -> Callable[..., Answer]:
    @functools.wraps(method)
    def call(*args: Any) -> Answer:
        try:
            return True, method(*args)
        except Exception as error:
            return False, f"{type(error).__name__}: {error}"

    return call


class Worker:
    model_runner: Any
    use_v2_model_runner: bool

    @_told
    def aisp_install(self) -> str | None:
        """Hook this worker's model; answers the hook's name. Its error is runners.Moved."""
        return type(install(self.model_runner, self.use_v2_model_runner)).__name__ if last_stage() else None

    @_told
    @torch.inference_mode()
    def aisp_finish(
        self,
        names: Sequence[str],
        round: Mapping[str, Any] | None,
        start: int,
        lengths: Sequence[int],
        steps: int,
    ) -> tuple[list[bool], float, list[tuple[float, float]]] | None:
        """Of a round's finished trajectories: whether their logits were finite, sum_t |m_t|^2 of the control, and each
        one's costs (records.Trajectory). round: None where it has no control. lengths: in tokens."""
        if (hook := self._hook) is None:
            return None
        rows = hook.rows
        sound = rows.finite.take(names)
        if round is None:
            return sound, 0.0, []
        asked = requests.round_of(round, start, start + len(lengths))
        made = rows.control(asked, steps)
        return sound, made.u_sq, control.costs(made, asked, lengths)

    @_told
    @torch.inference_mode()
    def aisp_calibrate(
        self, name: str, seed: int, prompt_id: str, length: int, round: Mapping[str, Any], rates: Sequence[float | None]
    ) -> dict[str, Any] | None:
        """The sampling with its rates turned into numbers (engine/calibrate.py), as in requests.plain; empty where the
        answer's logits were not finite. name: of the request that decoded the base answer, of `length` tokens."""
        if (hook := self._hook) is None:
            return None
        dtype = self.model_runner.model_config.dtype
        if not hook.rows.finite.take([name])[0]:
            return {}
        states = hook.rows.kept.pop(name, [])
        if len(states) != length:
            raise RuntimeError(f"{len(states)} of the base answer's {length} states were kept")
        sampling = requests.round_of(round, 0, 1).sampling
        found = calibrate.of_states(
            lambda z_ND: hook.plain(z_ND.to(dtype)).float(),
            sampling,
            Rates(*rates),
            prompt_key(seed, prompt_id),
            torch.stack(states).float(),
        )
        return requests.plain(replace(requests.round_of(round, 0, 1), sampling=found))["sampling"]  # type: ignore[no-any-return]

    @_told
    def aisp_empty(self) -> bool:
        """Zero all keys and values, in every stage."""
        empty(self.model_runner)
        return True

    @property
    def _hook(self) -> Hook | None:
        return getattr(self.model_runner, "aisp", None)
