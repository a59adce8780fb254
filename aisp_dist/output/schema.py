"""What the rows of an output look like: one fixed Arrow schema per table, and how a Result becomes a row.

Lists of structs stand where a dict keyed by name might, so that the schema depends on the prompt format and the columns
of `column_types` only. Knows no files and no parts. No row holds a time, a host or a path.

In data/, `reward` is the end of `curve`, which is of the candidates drawn (of those kept, where rescore.py chose among
them), and `nll` is null only where rescoring has selected another answer than the search did.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from aisp_dist.config import ConfigError
from aisp_dist.output import kept_columns
from aisp_dist.output.kept_columns import ColumnType
from aisp_dist.records import BadInput, Candidate, Done, Failed, Input, Message, Original, Prompt

VERSION = 1
Kind = Literal["chat", "raw"]
Row = dict[str, Any]


def _list(values: pa.DataType) -> pa.DataType:
    """A list whose field has the name it has in Parquet, so that a table read back has the very same schema."""
    return pa.list_(pa.field("element", values))


def _structs(**fields: pa.DataType) -> pa.DataType:
    return _list(pa.struct(list(fields.items())))


_MESSAGES = _structs(role=pa.string(), content=pa.string())
_SCORES = _structs(name=pa.string(), value=pa.float64())
_CANDIDATES = _structs(
    iteration=pa.int32(),
    sample=pa.int32(),
    text=pa.string(),
    token_ids=_list(pa.int32()),
    finish_reason=pa.string(),
    reward=pa.float64(),
    reason=pa.string(),
    rewards=_SCORES,
    nll=pa.float64(),
    within=pa.bool_(),
)
_TRACE = _structs(
    weights=_list(pa.float32()),
    lengths=_list(pa.int32()),
    ess=pa.float64(),
    kl=pa.float64(),
    mean_reward=pa.float64(),
    best_reward=pa.float64(),
    sigma2=pa.float64(),
    top_p=pa.float64(),
    parents=_list(pa.int32()),
    given=_list(pa.int32()),
)
_DONE = {
    "reward": pa.float64(),
    "rewards": _SCORES,
    "base_completion": pa.string(),
    "base_reward": pa.float64(),
    "base_rewards": _SCORES,
    "reward_difference": pa.float64(),
    "num_tokens": pa.int32(),
    "prompt_tokens": pa.int32(),
    "prompt_hash": pa.string(),
    "base_num_tokens": pa.int32(),
    "finish_reason": pa.string(),
    "nll": pa.float64(),
    "base_nll": pa.float64(),
    "samples_spent": pa.int32(),
    "quarantined": pa.int32(),
    "best_iteration": pa.int32(),
    "best_sample": pa.int32(),
    "curve": _list(pa.float64()),
}
ARROW: dict[ColumnType, pa.DataType] = {  # of the columns that an output may have or not
    "bool": pa.bool_(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "string": pa.string(),
    "json": pa.string(),
    "misfits": _structs(name=pa.string(), value=pa.string()),
    "original": pa.string(),
}
ORIGINAL = "original_completion"  # the answer that a dialogue came with (prompts.drop_last_answer), and its scores
_ORIGINAL = {ORIGINAL: pa.string(), "original_reward": pa.float64(), "original_rewards": _SCORES}
_OURS = {"id", "source_index", "prompt", "completion", "reason", "model", "run_id", *_DONE, *_ORIGINAL}
_OURS |= {kept_columns.MISFITS, "chosen_reward", "rejected_reward"}  # the last two of exported pairs
# TRL 1.16 takes these for its own: it would train on them in place of, or beside, prompt and completion, hand them to
# the chat template, or look for pictures. The last line are arguments that GRPO adds to a reward function's columns.
TRAINERS = {"messages", "conversations", "text", "input_ids", "labels", "completion_mask", "assistant_masks"}
TRAINERS |= {"chosen", "rejected", "margin", "label", "image", "images", "tools", "chat_template_kwargs"}
TRAINERS |= {"prompt_ids", "completion_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"}
TRAINERS |= {"seq_lengths", "environment", "environments", "trainer_state", "log_extra", "log_metric"}


class Tables(NamedTuple):
    """One value per table of the output: its schema, or its rows."""

    data: Any
    failed: Any
    candidates: Any


def check_kept(names: Iterable[str]) -> None:
    """Raise ConfigError for a kept column whose name is taken."""
    for name in names:
        if name in _OURS:
            raise ConfigError(f"prompts.keep: {name!r} is a column of the output itself; rename it in your input")
        if name in TRAINERS:
            raise ConfigError(
                f"prompts.keep: trainers (TRL) that read the output take a column {name!r} for their own; rename it in "
                "your input"
            )


def schemas(kind: Kind, columns: Mapping[str, ColumnType]) -> Tables:
    """The schemas of an output. columns: the kept ones, as `column_types` gives them."""
    text = _MESSAGES if kind == "chat" else pa.string()
    first = {"id": pa.string(), "source_index": pa.int64(), "prompt": text}
    kept = {name: ARROW[type_] for name, type_ in columns.items() if type_ != "original"}
    original = _ORIGINAL if ORIGINAL in columns else {}
    last = {"run_id": pa.string()}
    data = first | {"completion": text} | _DONE | original | kept | {"model": pa.string()} | last
    failed = first | {"reason": pa.string()} | ({ORIGINAL: pa.string()} if original else {}) | kept | last
    candidates = {"id": pa.string(), "source_index": pa.int64(), "candidates": _CANDIDATES, "trace": _TRACE}
    return Tables(*(pa.schema(list(fields.items())) for fields in (data, failed, candidates)))


def done_row(done: Done, kind: Kind, columns: Mapping[str, ColumnType], model: str, run_id: str) -> Row:
    """A row of data/. Raises ValueError for a result without a finite reward, which no method may call done."""
    best, base = done.best, done.base
    reward, base_reward = _finite(best.reward), _finite(base.reward)
    if reward is None:
        raise ValueError(f"prompt {done.prompt.id}: reward {best.reward}; a Done has a finite one, else it is a Failed")
    return {
        "id": done.prompt.id,
        "source_index": done.prompt.source_index,
        "prompt": _prompt(done.prompt.content, kind),
        "completion": [{"role": "assistant", "content": best.text}] if kind == "chat" else best.text,
        "reward": reward,
        "rewards": _scores(best),
        "base_completion": base.text,
        "base_reward": base_reward,
        "base_rewards": _scores(base),
        "reward_difference": None if base_reward is None else reward - base_reward,
        "num_tokens": len(best.token_ids),
        "prompt_tokens": done.prompt_tokens,
        "prompt_hash": done.prompt_hash,
        "base_num_tokens": len(base.token_ids),
        "finish_reason": best.finish_reason,
        "nll": done.nll,
        "base_nll": done.base_nll,
        "samples_spent": done.samples_spent,
        "quarantined": done.quarantined,
        "best_iteration": best.iteration,
        "best_sample": best.sample,
        "curve": list(done.curve),
        **(_original(done) if ORIGINAL in columns else {}),
        **kept_columns.to_row(done.prompt, columns),
        "model": model,
        "run_id": run_id,
    }


def failed_row(failed: Failed, kind: Kind, columns: Mapping[str, ColumnType], run_id: str) -> Row:
    """A row of failed/: as much of the input as can be written."""
    prompt = failed.prompt
    return {
        "id": as_utf8(prompt.id),
        "source_index": prompt.source_index,
        "prompt": None if prompt.content is None else _read_prompt(prompt.content, kind),
        "reason": as_utf8(failed.reason),
        **({ORIGINAL: prompt.original if isinstance(prompt, Prompt) else None} if ORIGINAL in columns else {}),
        **kept_columns.to_row(prompt, columns),
        "run_id": run_id,
    }


def candidates_row(done: Done, keep: Literal["all", "none"] | tuple[int, int], trace: bool) -> Row | None:
    """A row of candidates/ with the candidates to keep (a pair: so many best and so many worst); None if nothing is
    kept."""
    kept = () if keep == "none" else done.candidates if keep == "all" else _extremes(done.candidates, *keep)
    if not kept and not (trace and done.trace):
        return None
    return {
        "id": done.prompt.id,
        "source_index": done.prompt.source_index,
        "candidates": [
            {
                "iteration": c.iteration,
                "sample": c.sample,
                "text": c.text,
                "token_ids": c.token_ids,
                "finish_reason": c.finish_reason,
                "reward": _finite(c.reward),
                "reason": None if c.reason is None else as_utf8(c.reason),
                "rewards": _scores(c),
                "nll": c.nll,
                "within": c.within,
            }
            for c in kept
        ],
        "trace": [
            {
                "weights": i.weights,
                "lengths": i.lengths,
                "ess": i.ess,
                "kl": i.kl,
                "mean_reward": i.mean_reward,
                "best_reward": i.best_reward,
                "sigma2": i.sigma2,
                "top_p": i.top_p,
                "parents": i.parents,
                "given": i.given,
            }
            for i in (done.trace if trace else ())
        ],
    }


def column_types(
    names: Sequence[str], sample: Iterable[Input], drops_last_answer: bool = False
) -> dict[str, ColumnType]:
    """The columns of an output beside those that every output has: the kept ones with their types, from a sample of the
    inputs; the one for values that fit no longer; and where `drops_last_answer` the one for the original answers.

    Raises ConfigError as `kept_columns.types` does, and for a name that is taken or kept twice.
    """
    original: dict[str, ColumnType] = {ORIGINAL: "original"} if drops_last_answer else {}
    if not names:
        return original
    check_kept(names)
    if len(set(names)) < len(names):
        raise ConfigError(f"prompts.keep: {list(names)} names a column twice; name it once")
    return kept_columns.types(names, sample) | {kept_columns.MISFITS: "misfits"} | original


def misfit(line: Input) -> str | None:
    """Why this input cannot be written as a row, or None."""
    content = line.content or ""
    texts = (content,) if isinstance(content, str) else (text for message in content for text in message)
    if any(as_utf8(text) != text for text in (line.id, *texts)):
        return "the id or the prompt holds half a surrogate pair (\\ud800 to \\udfff), which UTF-8 cannot write"
    return None


def writable(line: Input) -> Input:
    """The input, or, where it cannot be written as a row, the bad input it then is."""
    if isinstance(line, BadInput) or (reason := misfit(line)) is None:
        return line
    return BadInput(line.id, line.source_index, reason, line.content, line.columns, line.digest)


def as_utf8(text: str) -> str:
    """The text with every half of a surrogate pair as `?`."""
    return text.encode("utf-8", "replace").decode()


def _extremes(candidates: Sequence[Candidate], num_best: int, num_worst: int) -> list[Candidate]:
    """The best and the worst by reward, the earlier of equals first, in order of (iteration, sample). Those within
    method.limit are better than the others, so that the selected one is the best."""
    scored = sorted(
        ((c.iteration, c.sample, reward, c) for c in candidates if (reward := _finite(c.reward)) is not None),
        key=lambda entry: entry[:2],
    )
    best = sorted(scored, key=lambda entry: (not entry[3].within, -entry[2]))[:num_best]
    worst = sorted(scored, key=lambda entry: entry[2])[:num_worst]
    kept = {entry[:2] for entry in (*best, *worst)}
    return [candidate for iteration, sample, _, candidate in scored if (iteration, sample) in kept]


def _prompt(content: str | tuple[Message, ...], kind: Kind) -> Any:
    if isinstance(content, str) != (kind == "raw"):
        raise ValueError(f"prompt {_short(content)} in a {kind} output: chat takes messages, all others text")
    return content if isinstance(content, str) else [{"role": role, "content": text} for role, text in content]


def _read_prompt(content: str | tuple[Message, ...], kind: Kind) -> Any:
    """The prompt of a failed row; what could be read of a bad line need not have the output's format."""
    if isinstance(content, str):
        return as_utf8(content) if kind == "raw" else _prompt((("user", as_utf8(content)),), kind)
    if kind == "raw":
        return json.dumps(content)
    return _prompt(tuple((as_utf8(role), as_utf8(text)) for role, text in content), kind)


def _original(done: Done) -> Row:
    found = done.original
    return {
        ORIGINAL: done.prompt.original,
        "original_reward": _finite(found.reward) if found else None,
        "original_rewards": _scores(found) if found else None,
    }


def _scores(answer: Candidate | Original) -> list[Row]:
    return [{"name": name, "value": _finite(value)} for name, value in answer.rewards]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
