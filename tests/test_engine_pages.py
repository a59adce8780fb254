"""The GPU path without a GPU: kernels by Triton's interpreter and by its compiler, the step on fake CUDA tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import slow_path
import tiny
import torch

from aisp_dist.engine import attention, kernels, model, noise, noise_kernel
from aisp_dist.engine.pages import PAGE, Pages
from aisp_dist.engine.step import Batch
from aisp_dist.records import BASE_ITERATION, Rollout, Round, Sampling

if torch.cuda.is_available():
    pytest.skip("these tests stand in for a GPU", allow_module_level=True)

STEPS = 5
K, G, C, P = 2, 3, 12, 16  # no power of two but P


def table() -> kernels.Tables:
    """Two prompts of 40 and 9 tokens, for rows 0, 1, 3 and 2, 5; row 4 is empty."""
    pages = torch.zeros(12, 4, dtype=torch.int32)
    pages[:6, :2] = torch.randperm(12, dtype=torch.int32).view(6, 2) + 1
    pages[6, :3], pages[7, 0] = torch.tensor([15, 13, 14]), 16
    lengths = torch.zeros(12, dtype=torch.int32)
    lengths[6], lengths[7] = 40, 9
    tiles = torch.tensor([[-1, -1], [0, 3], [1, -1], [5, 2]], dtype=torch.int32)
    lines = torch.tensor([-1, 6, 6, 7], dtype=torch.int32)
    return kernels.Tables(pages, lengths, torch.tensor([6, 6, 7, 6, -1, 7], dtype=torch.int32), lines, tiles, 4)


@pytest.mark.parametrize(
    ("window", "softcap", "sinks"), [(0, 0.0, False), (7, 0.0, False), (30, 2.0, False), (0, 0.0, True)]
)
def test_attention_over_pages(window: int, softcap: float, sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SPLIT", 2 * P)  # the longer prompt in two parts
    torch.manual_seed(0)
    where = table()
    stores = torch.full((20, K, P, C), torch.nan), torch.full((20, K, P, C), torch.nan)
    at = torch.tensor([0, 17, 5, 20, 0, 3], dtype=torch.int32)
    for line, length in [*enumerate(at.tolist()), (6, 40), (7, 9)]:  # what nobody wrote stays NaN
        for place in range(length):
            for store in stores:
                store[where.pages[line, place // P], :, place % P] = torch.randn(K, C)
    q, k, v = torch.randn(6, K, G, C), torch.randn(6, K, C), torch.randn(6, K, C)
    sink = torch.randn(K * G) if sinks else None
    out = kernels.attend(q, k, v, *stores, at, *where, 0.3, window, softcap, sink)
    assert not out[4].any()

    def line(store: torch.Tensor, number: int, length: int) -> torch.Tensor:
        return torch.cat([store[page].transpose(0, 1) for page in where.pages[number]])[:length]

    for row in (0, 1, 2, 3, 5):
        prompt = int(where.prompt[row])
        keys, values = (
            torch.cat([line(x, prompt, int(where.lengths[prompt])), line(x, row, int(at[row]) + 1)]) for x in stores
        )
        scores = torch.einsum("kgc,lkc->kgl", q[row], keys) * 0.3
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        scores[..., : max(0, len(keys) - window) if window else 0] = -torch.inf
        extra = scores[..., :0] if sink is None else sink.view(K, G, 1)
        weights = torch.cat([scores, extra], -1).softmax(-1)[..., : len(keys)]
        torch.testing.assert_close(out[row], torch.einsum("kgl,lkc->kgc", weights, values), rtol=0, atol=1e-6)


def test_noise_of_the_kernel_has_the_bits_of_the_tensor_operations() -> None:
    key = torch.tensor([[3, 0xFFFFFFFF], [0x9ABCDEF0, 7]])
    step, word = torch.tensor([1, 2**31 - 1]), torch.tensor([noise.sample_word(3, 5), noise.sample_word(40000, 65535)])
    table = noise.normal_table("cpu")
    assert torch.equal(noise_kernel.white(key, step, word, 1037, table), noise.white(key, step, word, 1037))
    steps = torch.arange(1, 4)
    expected = noise.white(key[0], steps, word[0], 20)
    assert torch.equal(noise_kernel.white(key[0], steps, word[0], 20, table), expected)


def paged(
    monkeypatch: pytest.MonkeyPatch, family: str, stride: int = 1, pages: int = 40, **overrides: Any
) -> slow_path.Watched:
    """An engine of four rows over pages: what it does on a GPU but the recording of graphs."""
    monkeypatch.setattr(attention, "TILE", 4)
    made = tiny.causal(family, **overrides)
    made.generation_config.eos_token_id = [tiny.EOS_ID, *range(60, 80)]
    engine = slow_path.Watched(model.adapt(made, tiny.tokenizer()), 4, STEPS)
    engine.kv, engine.stride = Pages(engine.lm, 4, STEPS, pages), stride
    return engine


def rounds() -> list[Round]:
    short, long = tuple(range(30, 39)), tuple(i % 200 + 30 for i in range(PAGE + 9))
    trace = slow_path.trace(2, 3, STEPS)
    return [
        Round(3, "a", short, 2, 0, 2, Sampling(0.5, "ar1", 0.7), trace),
        Round(3, "a", short, BASE_ITERATION, 0, 1, Sampling()),
        Round(3, "b", long, 0, 0, 1, Sampling(0.5)),
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2", "gpt_oss"])
def test_states_over_pages_are_dense_ones(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, reference = paged(monkeypatch, family), tiny.causal(family)
    round = rounds()[2]
    for trajectory in engine.run([round])[0].trajectories:
        z_TD = slow_path.states(reference, [*round.prompt_tokens, *trajectory.token_ids])
        for step in range(1, len(trajectory.token_ids) + 1):
            z_D = engine.seen[round.prompt_id, round.iteration, trajectory.sample, step]
            assert float((z_D - z_TD[len(round.prompt_tokens) + step - 2]).abs().max()) < 1e-5


def test_the_same_alone_together_several_steps_at_once_and_short_of_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_hidden_layers": 1, "num_key_value_heads": 1}
    alone: list[Rollout] = [paged(monkeypatch, "llama", **small).run([round])[0] for round in rounds()]
    together = paged(monkeypatch, "llama", stride=3, **small)
    assert together.run(rounds()) == alone
    tight = paged(monkeypatch, "llama", stride=3, **small)
    suspended: list[int] = []
    suspend = tight._suspend
    monkeypatch.setattr(tight, "_suspend", lambda slot: (suspended.append(slot), suspend(slot)))
    reserve = tight.kv.reserve  # pages run out once, when rows are under way
    monkeypatch.setattr(tight.kv, "reserve", lambda lengths: (suspended or max(lengths) <= 3) and reserve(lengths))
    pages = len(tight.kv.free)
    assert tight.run(rounds()) == alone
    assert suspended
    assert tight.row_steps == together.row_steps == sum(len(t.token_ids) for r in alone for t in r.trajectories)
    assert len(tight.kv.free) + sum(map(len, tight.kv.held.values())) == pages  # every page is somewhere


def test_a_prompt_that_no_store_holds_is_refused_with_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = paged(monkeypatch, "llama", pages=7)
    assert engine.kv.capacity == 2 * PAGE
    with pytest.raises(
        ValueError, match=r"129 prompt tokens take .* GB .* lower prompts.max_tokens, generator.batch_rows"
    ):
        engine.submit(Round(0, "p", tuple([40] * (2 * PAGE + 1)), 0, 0, 2, Sampling(0.5)))


def hollow(thing: Any) -> None:
    """Every tensor that a module or object holds loses its values: on the meta device, whatever asks for one fails."""
    held = [vars(thing), *((thing._parameters, thing._buffers) if isinstance(thing, torch.nn.Module) else ())]
    for names in held:
        names.update({name: x.to("meta") for name, x in names.items() if isinstance(x, torch.Tensor)})


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "gpt2", "phi3"])
def test_a_step_never_asks_the_host(family: str) -> None:
    """What a CUDA graph needs: shapes fit without values, no tensor comes from the host, none is read."""
    lm = model.adapt(tiny.causal(family), tiny.tokenizer())
    batch, pages = Batch(lm, 4, STEPS, frozenset({1})), Pages(lm, 4, STEPS, 20)
    assert pages.reserve([1, 1, 1, 1])
    for thing in (*lm.decoder.modules(), *lm.head.modules(), batch, batch.plans, batch.controls):
        hollow(thing)
    pages.store = [tuple(x.to("meta") for x in kv) for kv in pages.store]
    pages.tables = pages.tables.copy(torch.device("meta"))
    for drawn in (False, True):
        batch.step(pages.attend, first=False, controlled=True, drawn=drawn)
    assert batch.tokens_BT.shape == (4, STEPS)
    with pytest.raises(RuntimeError, match="meta"):  # it would have been seen
        batch.rows_BF.sum().item()


COMPILE = """
import pathlib, re, subprocess, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from aisp_dist.engine import noise_kernel
from aisp_dist.engine import kernels
TOOL = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LIMIT = 0  # bytes of registers that do not fit
store = {"k_store": "*bf16", "v_store": "*bf16", "pages": "*i32", "at": "*i32", "width": "i32"}
sizes = {"K": 8, "C": 128, "CP": 128, "V": 128, "VP": 128, "P": 64}
how = {"G": 4, "S": 4, "SPLIT": 512, "WINDOW": 0, "SOFTCAP": 0.0}
parts = {"queries": "*bf16", "lengths": "*i32", "part": "*fp32", "lse": "*fp32", "scale": "fp32", **store}
cases = [
    (kernels._write, {"keys": "*bf16", "values": "*bf16", **store}, sizes),
    (kernels._prefix, {"tile_line": "*i32", "tile_rows": "*i32", **parts}, {"R": 16, "Q": 64, **sizes, **how}),
    (
        kernels._prefix,
        {"tile_line": "*i32", "tile_rows": "*i32", **parts},
        {"R": 8, "Q": 32, **sizes, "C": 256, "CP": 256, "V": 256, "VP": 256, **how, "WINDOW": 512, "SOFTCAP": 50.0},
    ),
    (
        kernels._suffix,
        {"prompt": "*i32", "sinks": "*fp32", "out": "*bf16", **parts},
        {"SINKS": True, "GP": 16, **sizes, **how},
    ),
    (
        noise_kernel._white,
        {**dict.fromkeys(("keys", "steps", "samples"), "*i64"), "table": "*fp32", "out": "*fp32", "dim": "i32"},
        {"STREAM": 0, "BLOCK": 1024},
    ),
]
for kernel, types, constants in cases:
    assert set(types) | set(constants) == set(kernel.arg_names), kernel.arg_names
    source = ASTSource(fn=kernel, signature={**types, **dict.fromkeys(constants, "constexpr")}, constexprs=constants)
    warps = {"num_warps": 8 if constants.get("C") == 256 else 4}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=warps)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    print(kernel.__name__, constants.get("C"), made.metadata.shared, usage.splitlines()[-1])
    assert made.metadata.shared < 99_000 and int(re.search(r"STACK:(\d+)", usage)[1]) <= LIMIT
"""


def test_the_kernels_compile_for_the_gpu_that_is_not_here() -> None:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_round_is_cancelled_after_a_long_prompt_has_widened_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = paged(monkeypatch, "llama", num_hidden_layers=1, max_position_embeddings=4096)
    long = Round(0, "p", tuple([40] * (17 * PAGE)), 0, 0, 2, Sampling(0.5))
    engine.submit(long)
    assert engine.step() == []
    assert engine.kv._pages.shape[1] == 32
    engine.cancel(long)
    assert not engine.busy and sum(map(len, engine.kv.held.values())) == 17  # the idle prompt's
