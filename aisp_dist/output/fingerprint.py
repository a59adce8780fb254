"""Everything that can change a row, in one hash: the row settings of the configuration, and the digests of what they
name: model weights, templates, functions' source, the input. Two runs with the same fingerprint write the same rows.
How a path is spelled, and where its files lie, is not part of it.

    run -> pin (revisions) -> locate (paths) -> components -> fingerprint
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aisp_dist import engine
from aisp_dist.config import ConfigError, FunctionReward, Method, ModelReward, Prompts, ReControl, Reward, Run
from aisp_dist.data import prompts
from aisp_dist.data.sources import is_local
from aisp_dist.engine import checkpoints
from aisp_dist.rewards import function, templates

_OF_MODEL = ("model", "revision", "chat_template")  # settings of a model that digests stand for


def pin(run: Run, before: Mapping[str, Any]) -> Run:
    """The run with a revision for every hub model that names none: the one in `before`, an earlier configuration of the
    same output ({} if there is none), else today's commit."""
    generator = _pinned("generator", "generator", run.generator, before.get("generator", {}))
    return run.model_copy(update={"generator": generator, "rewards": pin_rewards(run, before)})


def pin_rewards(run: Run, before: Mapping[str, Any]) -> dict[str, Reward]:
    """The rewards as `pin` leaves them."""
    return {
        name: _pinned(f"rewards.{name}", "reward", reward, before.get("rewards", {}).get(name, {}))
        if isinstance(reward, ModelReward)
        else reward
        for name, reward in run.rewards.items()
    }


def _pinned(key: str, role: checkpoints.Role, model: Any, old: Mapping[str, Any]) -> Any:
    place = checkpoints.locate(f"{key}.model", model.model, role)
    if model.revision is not None or Path(place).exists():
        return model
    known = old.get("revision") if old.get("model") == model.model else None
    return model.model_copy(update={"revision": known or checkpoints.commit(f"{key}.model", place, None)})


def locate(run: Run, base_dir: Path) -> Run:
    """The run with every local path absolute and every embedded name resolved, as other processes need it.

    Raises ConfigError for a checkpoint, template or function file that is not there.
    """
    base = run.generator
    place = checkpoints.locate("generator.model", base.model, "generator")
    adapter = checkpoints.locate_adapter(base)
    own = templates.file("generator.chat_template", base.chat_template, base_dir) if base.chat_template else None
    return run.model_copy(
        update={
            "method": _locate_method(run.method),
            "generator": base.model_copy(update={"model": place, "adapter": adapter, "chat_template": own}),
            "rewards": {name: locate_reward(name, reward, base_dir) for name, reward in run.rewards.items()},
            "prompts": locate_prompts(run.prompts),
        }
    )


def _locate_method(method: Method) -> Method:
    if not isinstance(method, ReControl):
        return method
    about = checkpoints.value_network("method.value", method.value)
    if about["published"] != method.published:
        raise ConfigError(
            f"method.published: {method.published}, but {method.value!r} was trained with --published "
            f"{about['published']}; set it to that, or train another"
        )
    return method.model_copy(update={"value": str(Path(method.value).expanduser().resolve())})


def locate_reward(name: str, reward: Reward, base_dir: Path) -> Reward:
    """One reward as `locate` does it. Raises ConfigError as it does."""
    if isinstance(reward, ModelReward):
        where = checkpoints.locate(f"rewards.{name}.model", reward.model, "reward")
        template = templates.locate(f"rewards.{name}.chat_template", reward.chat_template, base_dir)
        return reward.model_copy(update={"model": where, "chat_template": template})
    if isinstance(reward, FunctionReward):
        function.check(f"rewards.{name}.function", reward, base_dir)
    return reward


def locate_prompts(settings: Prompts) -> Prompts:
    """The section with an absolute source, where it is a local one."""
    if settings.source == "demo" or not is_local(settings.source):
        return settings
    return settings.model_copy(update={"source": str(Path(settings.source).expanduser().absolute())})


def components(
    run: Run,
    located: Run,
    base_dir: Path,
    first_input: str | None = None,
    vllm: str | None = None,
    version: str | None = None,
) -> dict[str, Any]:
    """What the fingerprint is taken of, as nested JSON values, kept in run.json so that a refusal can name keys.
    first_input: prompts.first_digest of inputs that are read in place of prompts.source. vllm: what names the engine,
    where it is not the local one (vllm.choice.Choice.component). version: vLLM's, where a reward model runs on it."""
    base = located.generator
    digests = {"generator.model": checkpoints.digest("generator.model", base.model, base.revision)}
    if base.adapter:
        digests["generator.adapter"] = checkpoints.adapter_digest(base.adapter)
    if base.chat_template:
        digests["generator.chat_template"] = _hash(Path(base.chat_template).read_bytes())
    digests |= reward_digests(located.rewards, base_dir)
    if isinstance(method := located.method, ReControl):
        about = checkpoints.value_network("method.value", method.value)
        if any(about["digests"].get(key) != digests.get(key) for key in ("generator.model", "generator.adapter")):
            raise ConfigError(
                f"method.value: {method.value!r} was trained for the base model {about['model']!r}, whose weights are "
                f"not those of {model_name(run)!r}; train one for it by `aisp train-value`"
            )
        digests["method.value"] = checkpoints.digest("method.value", method.value, None)
    settings = run.row_settings()
    settings["rewards"] = {name: reward_settings(reward, version) for name, reward in settings["rewards"].items()}
    for name in (*_OF_MODEL, "adapter"):
        del settings["generator"][name]
    settings["method"].pop("value", None)
    if first_input is None and (run.prompts.source == "demo" or is_local(located.prompts.source)):
        first_input = prompts.first_digest(prompts.read(prompts.whole(located.prompts)))
    if first_input is not None:
        del settings["prompts"]["source"]
        digests["prompts.source"] = first_input
    return settings | {"engine": vllm or engine.VERSION, "digests": digests}


def reward_settings(settings: Mapping[str, Any], version: str | None) -> dict[str, Any]:
    """A reward's settings without those whose content is among the digests. version: vLLM's, which stands beside the
    name of the engine where a model runs on it."""
    named = {"model": _OF_MODEL, "function": ("function",), "http": ()}[settings["kind"]]
    kept = {name: value for name, value in settings.items() if name not in named}
    return kept | {"engine": f"vllm {version}"} if "engine" in kept else kept


def model_name(run: Run) -> str:
    """The base model as rows name it, and its adapter: no path."""
    name = run.generator.model
    if ("generator", name) not in checkpoints.EMBEDDED:
        place = Path(checkpoints.locate("generator.model", name, "generator"))
        name = place.name if place.exists() else name
    adapter = checkpoints.locate_adapter(run.generator)
    return f"{name} + {Path(adapter).name}" if adapter else name


def reward_digests(located: Mapping[str, Reward], base_dir: Path) -> dict[str, str]:
    """Of located rewards: their weights, templates and functions. Raises ConfigError."""
    digests = {}
    for name, reward in located.items():
        if isinstance(reward, ModelReward):
            digests[f"rewards.{name}"] = checkpoints.digest(f"rewards.{name}.model", reward.model, reward.revision)
            if reward.chat_template:
                digests[f"rewards.{name}.chat_template"] = _hash(templates.read(reward.chat_template).encode())
        elif isinstance(reward, FunctionReward):  # what a server runs is known by its address and the model's name
            digests[f"rewards.{name}"] = function.digest(reward, base_dir)
    return digests


def fingerprint(parts: dict[str, Any]) -> str:
    """128 bits of blake2b over the components, as hex. The first 12 digits are the run id."""
    return _hash(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode())


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
