"""What vLLM's workers answer by collective_rpc: vLLM's `worker_extension_cls`. Every rank answers the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from aisp_dist.engine import calibrate, control
from aisp_dist.philox import prompt_key
from aisp_dist.records import Rates
from aisp_dist.vllm import requests
from aisp_dist.vllm.runners import Hook, install


class Worker:
    model_runner: Any
    use_v2_model_runner: bool

    def aisp_install(self) -> str:
        """Hook this worker's model. Raises runners.Moved."""
        return type(install(self.model_runner, self.use_v2_model_runner)).__name__

    @torch.inference_mode()
    def aisp_finish(
        self,
        names: Sequence[str],
        round: Mapping[str, Any] | None,
        start: int,
        lengths: Sequence[int],
        steps: int,
    ) -> tuple[list[bool], float, list[tuple[float, float]]]:
        """Of a round's finished trajectories: whether their logits were finite, sum_t |m_t|^2 of the control, and each
        one's costs (records.Trajectory). round: None where it has no control. lengths: in tokens."""
        rows = self._hook.rows
        sound = rows.finite.take(names)
        if round is None:
            return sound, 0.0, []
        asked = requests.round_of(round, start, start + len(lengths))
        made = rows.control(asked, steps)
        return sound, made.u_sq, control.costs(made, asked, lengths)

    @torch.inference_mode()
    def aisp_calibrate(
        self, name: str, seed: int, prompt_id: str, length: int, round: Mapping[str, Any], rates: Sequence[float | None]
    ) -> dict[str, Any]:
        """The sampling with its rates turned into numbers (engine/calibrate.py), as in requests.plain. name: of the
        request that decoded the base answer, of `length` tokens."""
        hook, dtype = self._hook, self.model_runner.model_config.dtype
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

    @property
    def _hook(self) -> Hook:
        return self.model_runner.aisp  # type: ignore[no-any-return]
