"""Every private part of vLLM that AISP touches, for both of its model runners: the logits of the one call of a step
that feeds the sampler become those of rows.py. Prompt log-probabilities and dummy runs call `compute_logits` too, so
the hook is armed for one call.

    execute_model (V1) | sample (V2) -> compute_logits(h) -> base logits -> log-probabilities
                                                          -> exchange    -> argmax

`install` checks each part first and names the one that has moved. Written for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch

from aisp_dist.vllm.requests import Spec, parse
from aisp_dist.vllm.rows import Row, Rows

Part = tuple[str, tuple[str, ...] | None]  # dotted name, and its first parameters where it is called or replaced

V1: tuple[Part, ...] = (
    ("execute_model", ("scheduler_output",)),
    ("model.compute_logits", ()),
    ("sampler.apply_logits_processors", ("logits",)),
    ("input_batch.req_ids", None),
    ("kv_caches", None),
    ("requests", None),
    ("optimistic_seq_lens_cpu", None),
    ("model_config.get_hidden_size", ()),
    ("max_num_reqs", None),
    ("device", None),
)
V2: tuple[Part, ...] = (
    ("sample", ("hidden_states", "input_batch", "grammar_output")),
    ("model.compute_logits", ()),
    ("sampler.add_request", ("req_idx", "sampling_params")),
    ("sampler.apply_sampling_params", ("logits",)),
    ("req_states.req_id_to_index", None),
    ("kv_caches", None),
    ("model_config.get_hidden_size", ()),
    ("max_num_reqs", None),
    ("device", None),
)
_V2_BATCH = ("req_ids", "idx_mapping_np", "seq_lens_cpu_upper_bound")


class Moved(RuntimeError):
    """This vLLM has another inside than the one that the hook was written for."""


def check(runner: Any, parts: Sequence[Part]) -> None:
    """Raises Moved for the first part that is not where it was."""
    from vllm import __version__

    for name, parameters in parts:
        what = f"vLLM {__version__}: {type(runner).__name__}.{name}"
        fix = "install a version that the extra aisp-dist[vllm] allows, or set generator.engine: local"
        try:
            found = attrgetter(name)(runner)
        except AttributeError as error:
            raise Moved(f"{what} is gone ({error}); {fix}") from None
        if parameters is None:
            continue
        if not callable(found):
            raise Moved(f"{what} is no function any more; {fix}")
        told = tuple(inspect.signature(found).parameters)[: len(parameters)]
        if told != parameters:
            raise Moved(f"{what} takes {told} and not {parameters}; {fix}")


class Hook:
    """compute_logits of a runner's model, under control."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.armed = runner, False
        self.plain: Callable[..., torch.Tensor] = runner.model.compute_logits
        self.rows = Rows(self.plain, runner.model_config.get_hidden_size(), runner.device, runner.max_num_reqs)
        self.sampled: torch.Tensor | None = None  # what the sampler shall go on with
        runner.model.compute_logits = self.compute_logits

    def batch(self) -> tuple[list[Row | None], list[int]]:
        """The rows of the batch, and for each the tokens of its sequence before the one that is sampled."""
        raise NotImplementedError

    def compute_logits(self, h_ND: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        armed, self.armed = self.armed, False
        if not armed or (found := self.rows.logits(h_ND, *self.batch())) is None:
            return self.plain(h_ND, *args, **kwargs)
        self.sampled = found.sampled
        return found.base

    def exchange(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """The logits that the sampler chooses from."""
        sampled, self.sampled = self.sampled, None
        return logits_NV if sampled is None else sampled.to(logits_NV.dtype)


class V1Hook(Hook):
    """On GPUModelRunner and CPUModelRunner, whose execute_model computes the logits."""

    def __init__(self, runner: Any) -> None:
        check(runner, V1)
        super().__init__(runner)
        execute, process = runner.execute_model, runner.sampler.apply_logits_processors

        def execute_model(*args: Any, **kwargs: Any) -> Any:
            self.armed = True
            try:
                return execute(*args, **kwargs)
            finally:
                self.armed = False

        def apply_logits_processors(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            processed: torch.Tensor = process(self.exchange(logits), *args, **kwargs)
            return processed

        runner.execute_model = execute_model
        runner.sampler.apply_logits_processors = apply_logits_processors

    def batch(self) -> tuple[list[Row | None], list[int]]:
        runner = self.runner
        names: list[str] = runner.input_batch.req_ids
        self.rows.forget(runner.requests.__contains__)
        rows = [self.rows.row(name, partial(self._spec, name)) for name in names]
        return rows, runner.optimistic_seq_lens_cpu[: len(names)].tolist()

    def _spec(self, name: str) -> Spec | None:
        return parse(self.runner.requests[name].sampling_params)


class V2Hook(Hook):
    """On vllm.v1.worker.gpu.model_runner.GPUModelRunner, whose `sample` computes the logits."""

    def __init__(self, runner: Any) -> None:
        from vllm import __version__
        from vllm.v1.worker.gpu.input_batch import InputBatch

        check(runner, V2)
        if missing := [name for name in _V2_BATCH if name not in InputBatch.__dataclass_fields__]:
            raise Moved(f"vLLM {__version__}: InputBatch.{missing[0]} is gone; set generator.engine: local")
        if getattr(runner, "batch_sharder", None) is not None:
            raise Moved("vLLM samples a batch in shards, which the control does not see; switch that off")
        super().__init__(runner)
        sampler, sample, add = runner.sampler, runner.sample, runner.sampler.add_request
        process = sampler.apply_sampling_params
        self.params: dict[int, Any] = {}  # by the slot of a request
        self.now: Any = None

        def sample_batch(hidden_states: torch.Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            self.armed, self.now = True, input_batch
            try:
                return sample(hidden_states, input_batch, *args, **kwargs)
            finally:
                self.armed, self.now = False, None

        def add_request(req_idx: int, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
            self.params[req_idx] = sampling_params
            return add(req_idx, sampling_params, *args, **kwargs)

        def apply_sampling_params(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            processed: torch.Tensor = process(self.exchange(logits), *args, **kwargs)
            return processed  # the base logits are read again for the log-probabilities

        runner.sample = sample_batch
        sampler.add_request, sampler.apply_sampling_params = add_request, apply_sampling_params

    def batch(self) -> tuple[list[Row | None], list[int]]:
        now = self.now
        names: list[str] = now.req_ids
        self.rows.forget(self.runner.req_states.req_id_to_index.__contains__)
        slots = now.idx_mapping_np.tolist()[: len(names)]
        rows = [self.rows.row(name, partial(self._spec, slot)) for name, slot in zip(names, slots, strict=True)]
        return rows, now.seq_lens_cpu_upper_bound[: len(names)].tolist()

    def _spec(self, slot: int) -> Spec | None:
        return parse(self.params.get(slot))


def empty(runner: Any) -> None:
    """Zero the keys and values of a runner."""
    waiting = list(runner.kv_caches)
    while waiting:
        cache = waiting.pop()
        if isinstance(cache, torch.Tensor):
            cache.zero_()
        else:  # several tensors of one layer
            waiting += cache


def last_stage() -> bool:
    """Whether this worker has the model's last layers, and so its logits."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_last_rank)


def install(runner: Any, v2: bool) -> Hook:
    """Hook a runner, once. Raises Moved."""
    if isinstance(getattr(runner, "aisp", None), Hook):
        return runner.aisp  # type: ignore[no-any-return]
    if getattr(runner, "speculative_config", None):
        raise Moved("speculative decoding checks tokens against logits without control; switch it off")
    runner.aisp = (V2Hook if v2 else V1Hook)(runner)
    return runner.aisp  # type: ignore[no-any-return]
