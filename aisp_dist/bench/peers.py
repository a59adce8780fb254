"""Other ways to decode the same trajectories. Each takes prompts of one length and the noise v of every trajectory, and
returns the tokens of every trajectory, ordered by prompt.

Shapes: P prompts, N samples per prompt, B = P N rows, L prompt tokens, T new tokens, D hidden size.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from transformers import StaticCache

from aisp_dist.vllm import installed

Tokens = list[list[int]]
Peer = Callable[[torch.Tensor, torch.Tensor], Tokens]  # prompts [P, L], v [B, T, D]


@torch.inference_mode()
def generate(model: Any, prompts_PL: torch.Tensor, v_BTD: torch.Tensor) -> Tokens:
    """transformers' generate on repeated prompts; v is added to the input of the output layer."""
    rows_BL = prompts_PL.repeat_interleave(len(v_BTD) // len(prompts_PL), dim=0)
    left = iter(v_BTD.unbind(1))

    def add(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (hidden,) = args
        return (torch.cat([hidden[:, :-1], (hidden[:, -1].float() + next(left)).to(hidden.dtype)[:, None]], dim=1),)

    hook = model.get_output_embeddings().register_forward_pre_hook(add)
    ends = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    made = model.generate(rows_BL, attention_mask=torch.ones_like(rows_BL), max_new_tokens=v_BTD.shape[1], **ends)
    hook.remove()
    tokens: Tokens = made[:, prompts_PL.shape[1] :].tolist()
    return tokens


@torch.inference_mode()
def repeated_static(model: Any, prompts_PL: torch.Tensor, v_BTD: torch.Tensor) -> Tokens:
    """The stronger peer, a loop written by hand: each prompt is prefilled once, its keys and values are repeated for
    its samples, and all rows are decoded from one cache that is written in place."""
    (rows, steps, _), length = v_BTD.shape, prompts_PL.shape[1]
    samples = rows // len(prompts_PL)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    cache = StaticCache(model.config, max_cache_len=length + steps)
    z_BD = decoder(input_ids=prompts_PL, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
    z_BD = z_BD.repeat_interleave(samples, dim=0)
    for layer in cache.layers:
        layer.keys, layer.values = (x.repeat_interleave(samples, dim=0) for x in (layer.keys, layer.values))
        layer.batch_size = rows
    chosen: list[torch.Tensor] = []
    for t in range(steps):
        if t:
            at = torch.full((rows, 1), length + t - 1, device=v_BTD.device)
            passed = decoder(input_ids=chosen[-1], position_ids=at, past_key_values=cache, use_cache=True)
            z_BD = passed.last_hidden_state[:, -1]
        chosen.append(head((z_BD.float() + v_BTD[:, t]).to(z_BD.dtype)).argmax(-1, keepdim=True))
    tokens: Tokens = torch.cat(chosen, dim=1).tolist()
    return tokens


def vllm(twin: Any, dtype: str, rows: int, positions: int) -> Peer | str:
    """vLLM with its prefix cache and random weights in the shapes of `twin`. It samples without our noise, so its
    tokens are not compared. Returns the reason as text if vLLM is not installed."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    if not installed():
        return "not measured: vllm is not installed"
    library = importlib.import_module("vllm")
    twin.config.architectures = [type(twin).__name__]  # AutoConfig.for_model leaves it empty
    with tempfile.TemporaryDirectory() as folder:
        twin.config.save_pretrained(folder)
        llm = library.LLM(
            model=folder,
            dtype=dtype,
            load_format="dummy",
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            max_num_seqs=rows,
            max_model_len=positions,
            gpu_memory_utilization=0.4,  # two copies of the model are on the device already
        )

    def sample(prompts_PL: torch.Tensor, v_BTD: torch.Tensor) -> Tokens:
        settings = library.SamplingParams(
            n=len(v_BTD) // len(prompts_PL), max_tokens=v_BTD.shape[1], ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": tokens} for tokens in prompts_PL.tolist()]
        answers = llm.generate(prompts, settings, use_tqdm=False)
        return [list(one.token_ids) for answer in answers for one in answer.outputs]

    return sample
