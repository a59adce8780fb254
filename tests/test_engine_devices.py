"""The engine off the CPU, tested without a GPU: the attention that other devices use, run on the CPU; a whole step on
fake CUDA tensors, which have shapes and devices but no values; and the arithmetic of memory.

Shapes: X, Y batch dimensions, T queries, L keys, C head size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import slow_path
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from aisp_dist.config import ConfigError
from aisp_dist.engine import attention, kv, memory, model, noise, starts
from aisp_dist.engine.decode import Engine
from aisp_dist.engine.step import Batch, Seat
from aisp_dist.records import Round, Sampling, TopP

STEPS = 8
FAMILIES = ["llama", "gemma3", "gemma2", "gpt_oss", "gpt2", "phi3"]
CUDA = torch.device("cuda", 0)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as on a device that has no fused operator."""
    for module in (attention, kv):
        monkeypatch.setattr(module, "fused", lambda layer, q: False)


def adapted(family: str, ends: list[int] | None = None, **overrides: Any) -> model.LM:
    made, tokenizer = tiny.causal(family, **overrides), tiny.tokenizer()
    made.config.get_text_config().eos_token_id, made.generation_config.eos_token_id = None, ends
    tokenizer.eos_token = None
    return model.adapt(made, tokenizer)


def prompt(length: int) -> tuple[int, ...]:
    return tuple((7919 * i + 31 * length) % 250 + 5 for i in range(length))


# Attention by tensor operations


def parts(layer: attention.Layer, mask: attention.Mask | None, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Output and log-sum-exp by the fused operator, and by tensor operations."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, size, 16, generator=draw) for size in (32, 40, 40))
    by_operator = attention.attend_part(layer, q, k, v, mask)
    with monkeypatch.context() as patched:
        patched.setattr(attention, "fused", lambda layer, q: False)
        return by_operator, attention.attend_part(layer, q, k, v, mask)


@pytest.mark.parametrize("window", [None, 1, 7])
def test_attention_of_other_devices_is_that_of_the_cpu_operator(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = attention.Layer(0, 0.3, window, None, None)
    assert attention.fused(layer, torch.empty(1, 3, 32, 16))
    at, to = torch.arange(-4, 28)[:, None], torch.arange(40)  # the first four queries see no key
    masked = attention.mask(attention.seen(at, to, window)[None, None], torch.float32)
    for mask in (masked, None):
        (out, lse), (expected, expected_lse) = parts(layer, mask, monkeypatch)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=2e-6)
        if mask:
            assert torch.equal(out[:, :, :4], torch.zeros(2, 3, 4, 16)) and lse[:, :, :4].eq(-math.inf).all()


def test_only_the_cpu_without_softcap_has_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = attention.Layer(0, 1.0, None, None, None)
    few, many = torch.empty(1, 3, 4, 16), torch.empty(1, 3, 32, 16)
    assert not attention.fused(layer, many.to("meta"))
    assert not attention.fused(dataclasses.replace(layer, softcap=30.0), many)
    for emulated in (False, True):  # products in bfloat16 pay for a few queries, where the CPU has them
        monkeypatch.setattr(attention, "emulated", lambda dtype, here=emulated: here)
        assert attention.fused(layer, few) and attention.fused(layer, many.bfloat16())
        assert attention.fused(layer, few.bfloat16()) is emulated


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_tokens_are_those_of_transformers(plain: None, family: str) -> None:
    trace = slow_path.trace(2, 5, STEPS)
    round, reference = Round(7, "p", prompt(21), 2, 0, 5, Sampling(0.3, "ar1", 0.7), trace), tiny.causal(family)
    engine = slow_path.Watched(adapted(family), 32, STEPS)
    made = slow_path.tokens(engine.run([round])[0])
    assert made == slow_path.generate(reference, round, STEPS)
    for sample, tokens in enumerate(made):
        z_TD = slow_path.states(reference, [*round.prompt_tokens, *tokens])[len(round.prompt_tokens) - 1 :]
        for step in range(1, STEPS + 1):
            assert float((engine.seen["p", 2, sample, step] - z_TD[step - 1]).abs().max()) < 1e-5


def test_rows_have_the_same_bits_alone_and_in_company(plain: None) -> None:
    """Several tiles of queries a prompt, several prompts, late starters and several blocks."""
    sampling, steps = Sampling(0.5, likelihood=True), 70
    rounds = [Round(3, str(n), prompt(n), 0, 0, size, sampling) for n, size in ((1, 12), (40, 30), (23, 3))]
    lm = adapted("llama", ends=[*range(60, 64)])
    alone = [Engine(lm, 64, steps).run([round])[0] for round in rounds]
    assert max(len(t.token_ids) for rollout in alone for t in rollout.trajectories) > 64
    together = Engine(lm, 64, steps)
    answers = {}
    for round in rounds[::-1]:
        together.submit(round)
        answers.update(together.step())
    while together.busy:
        answers.update(together.step())
    assert [answers[round] for round in rounds] == alone


# A step on a GPU that is not there


aten = torch.ops.aten
CASTS = {torch.Tensor.float: torch.float32, torch.Tensor.double: torch.float64, torch.Tensor.long: torch.int64}
OTHERS = {
    torch.Tensor.copy_: aten.copy_,
    torch.Tensor.contiguous: aten.contiguous,
    torch.Tensor.__invert__: aten.bitwise_not,
}


class ByOperators(TorchFunctionMode):
    """Calls operators where Python's methods want the CUDA runtime, even of fake tensors: indexing, casts, copies."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            view, tensors = basic(*args)
            return aten.index.Tensor(view, tensors) if tensors else view
        if func is torch.Tensor.__setitem__:
            (view, tensors), value = basic(*args[:2]), args[2]
            if not isinstance(value, torch.Tensor):
                value = torch.full((), value, device=view.device)
            value = aten._to_copy(value, dtype=view.dtype)
            return aten.index_put_(view, tensors, value) if tensors else aten.copy_(view, value)
        if func in CASTS:
            return aten._to_copy(args[0], dtype=CASTS[func])
        if func is torch.Tensor.to:
            where = {"dtype" if isinstance(x, torch.dtype) else "device": x for x in args[1:]}
            return aten._to_copy(args[0], **where, **(kwargs or {}))
        return OTHERS.get(func, func)(*args, **(kwargs or {}))


def basic(x: torch.Tensor, index: Any) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The view by the ints, slices and None of an index, and its tensors by dimension, [] if there are none."""
    index = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [i for i in index if not isinstance(i, (torch.Tensor, list))]:
        at = next(n for n, i in enumerate(index) if i is Ellipsis)
        index[at : at + 1] = [slice(None)] * (x.ndim - sum(i is not None for i in index) + 1)
    dim, tensors = 0, list[torch.Tensor | None]()
    for i in index:
        if isinstance(i, int):
            x = aten.select.int(x, dim, i)
            continue
        if i is None:
            x = aten.unsqueeze(x, dim)
        elif isinstance(i, slice):
            x = aten.slice.Tensor(x, dim, i.start, i.stop, i.step or 1)
        one = torch.tensor(i, device=x.device) if isinstance(i, list) else i
        tensors.append(one if isinstance(one, torch.Tensor) else None)
        assert not isinstance(one, torch.Tensor) or one.device == x.device  # CUDA would take it, after a copy
        dim += 1
    return x, tensors if any(i is not None for i in tensors) else []


def on_fake_cuda(lm: model.LM) -> model.LM:
    """The model with fake parameters and buffers on a GPU. Call it in a FakeTensorMode."""
    for module in [*lm.decoder.modules(), *lm.head.modules()]:
        for held in (module._parameters, module._buffers, vars(module)):
            for name, x in held.items():
                if isinstance(x, torch.Tensor):
                    held[name] = torch.empty(x.shape, dtype=x.dtype, device=CUDA)
    return dataclasses.replace(lm, device=CUDA)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Everything inside is fake and on a GPU; a value that is read, or a CPU tensor in company of others, raises."""

    def run(work: Callable[[model.LM], None], lm: model.LM) -> None:
        monkeypatch.setattr(noise, "normal_table", lambda device: torch.empty(1 << 16, device=device))
        with FakeTensorMode(), ByOperators(), torch.no_grad():
            work(on_fake_cuda(lm))

    return run


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"gpt_oss"}))  # whose experts ask which GPU it is
def test_a_step_on_a_gpu_meets_no_tensor_of_the_cpu(family: str, on_gpu: Any) -> None:
    def work(lm: model.LM) -> None:
        batch, cache = Batch(lm, 32, STEPS, frozenset({1})), kv.KVCache(32, 2 * STEPS, 100 + 2 * 32 * 32)
        batch.step(None, controlled=False, drawn=False)
        samplings = [Sampling(0.5, "ar1", 0.7, likelihood=True), Sampling(decode=TopP(0.9, 1.0))]
        for slot, (sampling, length) in enumerate(zip(samplings, (40, 1), strict=True)):
            z_TD, dense = lm.dense(prompt(length), keep=True)
            prefix = cache.keep(dense, z_TD[-1])
            cache.seat(slot, prefix)
            line = batch.controls.put(torch.zeros(STEPS, lm.hidden_size, device=CUDA))
            plan = batch.plans.line(sampling)
            batch.seat([Seat(slot, length, plan, line, (3, 5), slot, prefix.z_D, (7, 8))])
        cache.reach(0, 40)  # over several blocks
        attend = cache.attend([40, 0, *[-1] * 30])
        batch.step(attend, controlled=True, drawn=True, measured=True)
        tiles = starts.extend(lm, prefix, {}, [(7,) * 40], measured=False)
        cache.leave(1)
        cache.seat(1, prefix, [tile.kv for tile in starts.chain(tiles, (7,) * 40, False) or []])
        for made in (batch.rows_BF, batch.nll_BT, batch.dots_BT, lm.logits(batch.states(attend))):
            assert made.device == CUDA and len(made) == 32

    on_gpu(work, adapted(family))


def test_a_value_that_the_host_reads_would_be_seen(on_gpu: Any) -> None:
    def work(lm: model.LM) -> None:
        Batch(lm, 32, STEPS, frozenset({1})).rows_BF.max().item()

    with pytest.raises(Exception, match="local_scalar_dense"):
        on_gpu(work, adapted("llama"))


def test_a_tensor_of_the_cpu_would_be_seen(on_gpu: Any) -> None:
    def work(lm: model.LM) -> None:
        Batch(lm, 32, STEPS, frozenset({1})).control(torch.zeros(32, lm.hidden_size))

    with pytest.raises(Exception, match="cuda"):
        on_gpu(work, adapted("llama"))


# Memory


@pytest.mark.parametrize("device", [torch.device("cpu"), CUDA])
def test_rows_that_do_not_fit_are_refused_and_the_named_number_fits(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, asked = dataclasses.replace(adapted("llama"), device=device), 4096
    free = sum(memory.parts(lm, asked // 2, 128).values())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free if device == CUDA else 0, 1 << 60))
    available = SimpleNamespace(available=0 if device == CUDA else free, total=0 if device == CUDA else 1 << 60)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: available)
    with pytest.raises(
        ConfigError, match=r"4096 rows of 128 .*: suffixes .*; set generator.batch_rows to (\d+)$"
    ) as no:
        memory.kv_cache(lm, asked, 128)
    fits = int(str(no.value).rpartition(" ")[2])
    assert asked // 4 < fits < asked // 2
    assert memory.kv_cache(lm, fits, 128).capacity >= lm.context_length + fits * 64
    with pytest.raises(ConfigError):
        memory.kv_cache(lm, fits + 32, 128)


def test_a_model_that_leaves_room_for_no_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda *_: 1000)
    with pytest.raises(ConfigError, match="set a smaller generator.max_new_tokens, or use a smaller model"):
        memory.kv_cache(adapted("llama"), 32, 128)


def test_a_prompt_longer_than_the_cache_is_refused_with_the_arithmetic() -> None:
    engine = Engine(adapted("llama"), 4, STEPS, kv_tokens=128 + 32 * 32)
    with pytest.raises(
        ValueError, match=r"a prompt of 129 tokens .* room for 1153 tokens .* GB.*; lower prompts.max_tokens"
    ):
        engine.submit(Round(0, "p", (40,) * 129, 0, 0, 2, Sampling(0.5)))


@pytest.mark.parametrize("device", [torch.device("cpu"), CUDA])
def test_processes_that_load_together_do_not_count_the_same_memory(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    total, held = 1000, 100
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (900, total))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: held)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=900, total=total))
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=held))
    monkeypatch.setattr(memory.psutil, "Process", lambda: process)
    assert memory.free_bytes(device) == 900
    assert [memory.free_bytes(device, share) for share in (0.6, 0.4, 0.05)] == [500, 300, 0]
