"""The method sections of 0.1.0 in the present spelling: what a refusal tells the user to write, and how the run.json of
an output of 0.1.0 is read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import yaml

KEYS = ("preset", "branch", "decode")  # of kind aisp and batched_aisp
_AUTO = {"sigma2": 0.0, "decode": {"flip_rate": 0.28}, "branch": {"ess": 8.0}}  # what preset: auto filled in
_SIZES = {
    "aisp": {"num_samples": 16, "num_iterations": 8},
    "batched_aisp": {"num_prompts": 8, "budget": 128},
}

_WRONG = (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError)  # what a value of another type raises


def translated(method: Mapping[str, Any]) -> dict[str, Any] | None:
    """A method section of 0.1.0 as the section that draws the same samples here, itself where it has none of KEYS.
    None where there is no such section: for noise beside draws or beside continued answers."""
    if not any(key in method for key in KEYS):
        return dict(method)
    full = _filled(method)
    continues, draws = full["branch"] is not None, full["decode"] != "greedy"
    if full["sigma2"] == 0:
        return _population(full) if continues and draws else None
    return None if continues or draws else _algorithm1(full)


def refusal(method: Mapping[str, Any]) -> str:
    """Why a section with KEYS is refused, with the section to write in its place."""
    keys = ", ".join(key for key in KEYS if key in method)
    kind = method.get("kind", "aisp")
    was = f"{keys}: not a key of kind: {kind}, which is Algorithm 1 of the paper (noise, greedy decoding)"
    try:
        same, full = translated(method), _filled(method)
        if same is not None:
            return f"{was}; for the same samples as in 0.1.0 write {_flow(same)}"
        return (
            f"{was}; noise cannot go with draws or continued answers, so write {_flow(_algorithm1(full))} for the "
            f"noise or {_flow(_population(full))} for the rest"
        )
    except _WRONG:
        return f"{was}; leave it out, or give kind: population"


def recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `config` of a run.json, of this version or of 0.1.0, as this version's. Without `compare` and `tune`, which
    are no part of an output, and without settings that had no effect, which `Run` refuses. A method that cannot be
    translated stays as it is, for `Run` to refuse."""
    kept = {key: value for key, value in config.items() if key not in ("compare", "tune")}
    if isinstance(method := config.get("method"), Mapping):
        with suppress(*_WRONG):
            kept["method"] = _effective_method(translated(method) or method)
    if isinstance(rewards := config.get("rewards"), Mapping):
        kept["rewards"] = {name: _effective_reward(r) if isinstance(r, Mapping) else r for name, r in rewards.items()}
    return kept


def readable(config: Mapping[str, Any]) -> dict[str, Any]:
    """`recorded`, for readers of a finished output: a method of 0.1.0 with noise beside draws or continued answers is
    read as its noise alone. Sizes, limit and stopping rule are the same, and each row's trace has the rest."""
    kept = recorded(config)
    method = kept.get("method")
    if isinstance(method, Mapping) and any(key in method for key in KEYS):
        with suppress(*_WRONG):
            kept["method"] = _algorithm1(_filled(method))
    return kept


def _effective_method(method: Mapping[str, Any]) -> dict[str, Any]:
    spend = method.get("spend")
    if isinstance(spend, Mapping) and spend.get("plateau") is None:
        return {**method, "spend": {key: value for key, value in spend.items() if key != "min_gain"}}
    return dict(method)


def _effective_reward(reward: Mapping[str, Any]) -> dict[str, Any]:
    idle = {"weight"} if reward.get("use") == "report" else set()
    if reward.get("kind") == "http" and reward.get("protocol", "chat") != "chat":
        idle |= {"scale", "max_tokens"}
    return {key: value for key, value in reward.items() if key not in idle}


def _filled(method: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults of 0.1.0."""
    given = {"lambda" if key == "lambda_" else key: value for key, value in method.items() if key != "preset"}
    defaults = {"kind": "aisp", "lambda": {"ess": 0.1}, "sigma2": 0.5, "decode": "greedy", "branch": None}
    auto = _AUTO if method.get("preset") == "auto" else {}
    return defaults | _SIZES[given.get("kind", "aisp")] | auto | given


def _algorithm1(full: Mapping[str, Any]) -> dict[str, Any]:
    sigma2 = full["sigma2"] or 0.5
    return {key: value for key, value in full.items() if key not in KEYS} | {"sigma2": sigma2}


def _population(full: Mapping[str, Any]) -> dict[str, Any]:
    if full["kind"] == "batched_aisp":
        full = {**full, "num_samples": full["budget"] // full["num_prompts"], "num_iterations": full["num_prompts"]}
    size = {key: full[key] for key in ("num_samples", "num_iterations")}
    ess = (full["branch"] or {}).get("ess", 8.0)
    sampling = {"flip_rate": 0.28} if full["decode"] == "greedy" else full["decode"]
    rest = {key: full[key] for key in ("limit", "shuffle_rewards", "spend") if full.get(key)}
    return {"kind": "population", **size, "ess": ess, "sampling": sampling, **rest}


def _flow(values: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(values), default_flow_style=True, sort_keys=False, width=float("inf"))
    return text.strip()
