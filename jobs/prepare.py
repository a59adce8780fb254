"""A configuration checked, pinned and fingerprinted. Whatever can be refused without a model is refused here, before
anything heavy is imported and before anything is written."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from actors.table import Table
from aisp_dist.config import ConfigError, FunctionReward, HttpReward, ModelReward, Run
from aisp_dist.data import prompts
from aisp_dist.engine import checkpoints, sizes
from aisp_dist.output import fingerprint, lease, manifest, schema
from aisp_dist.output.filesystem import Place
from aisp_dist.output.kept_columns import ColumnType
from aisp_dist.vllm.choice import Check, Choice
from jobs import engines


@dataclass(frozen=True)
class Prepared:
    """A run that passed every check that needs no model. located: with paths that other processes can open."""

    run: Run
    located: Run
    base_dir: Path
    output: Place
    components: dict[str, Any]
    columns: dict[str, ColumnType]
    model: str  # the base model as rows name it
    choice: Choice  # of the engine

    @property
    def fingerprint(self) -> str:
        return fingerprint.fingerprint(self.components)

    def table(self, retry_failed: bool = False) -> Table:
        return Table(self.located, self.output, self.columns, self.fingerprint, self.model, retry_failed=retry_failed)

    def record(self, check: Check | None = None, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """run.json. No environment variables: they hold secrets. check: of vLLM's batch invariance. before: run.json of
        the output that is resumed; what it does not promise of its rows is not promised now."""
        return {
            "config": self.run.model_dump(mode="json", by_alias=True),
            "fingerprint": self.fingerprint,
            "run_id": self.fingerprint[:12],
            "components": self.components,
            "rows_per_file": self.run.save.rows_per_file,
            "columns": self.columns,
            "model": self.model,
            "base_dir": str(self.base_dir),
            "directory": str(Path.cwd()),
            "command": [self._without_secrets(word) for word in sys.argv],
            "engine": {"name": self.choice.engine, "version": self.choice.version, "why": self.choice.why},
            "same_rows": self._same_rows(check, before),
            "versions": {"python": platform.python_version()}
            | {name: _version(name) for name in (*_PACKAGES, *_QUANTIZERS)},
            "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "platform": platform.platform()},
        }

    def _without_secrets(self, word: str) -> str:
        for _, value in self.run.runtime.storage_options:
            if isinstance(value, SecretStr):
                word = word.replace(value.get_secret_value(), str(value))
        return word

    def _same_rows(self, check: Check | None, before: Mapping[str, Any] | None) -> str:
        if self.choice.engine == "vllm":
            if check is None or check.difference:
                return f"not promised: {self.choice.promise}" + (f" ({check})" if check else "")
            if before and str(before.get("same_rows")).startswith("not promised"):
                return str(before["same_rows"])
        if self.choice.engine == "endpoint":
            return f"not promised: {self.choice.promise}"
        for name, reward in self.run.rewards.items():
            if isinstance(reward, ModelReward) and reward.engine == "vllm":
                return f"not promised: the bits of rewards.{name}, which vLLM scores, depend on what shares a batch"
        generator = self.located.generator
        directory = checkpoints.cached(generator.model, generator.revision)
        if directory and sizes.has_experts(sizes.read_config(directory)):
            return "up to rounding: the base model is a mixture of experts, whose bits depend on what shares a batch"
        same = "bit for bit on the same kind of hardware and software"
        if check:
            same += f" ({check})"
        if any(isinstance(reward, HttpReward) for reward in self.run.rewards.values()):
            return "not promised: what the servers of the http rewards answer is theirs; but for them, " + same
        if any(isinstance(reward, FunctionReward) for reward in self.run.rewards.values()):
            return f"{same}, as far as the function rewards are deterministic"
        return same


_PACKAGES = ("aisp-dist", "ray", "torch", "transformers", "datasets", "pyarrow", "tokenizers")
_QUANTIZERS = ("bitsandbytes", "torchao", "compressed-tensors")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check(run: Run, base_dir: Path) -> Run:
    """Check what needs neither torch nor a cluster. Returns the located run. Raises ConfigError."""
    check_output(run)
    return _check_rest(run, base_dir)


def _check_rest(run: Run, base_dir: Path) -> Run:
    located = fingerprint.locate(run, base_dir)
    sizes.check(run.generator, located.generator.model)
    schema.check_kept(run.prompts.keep)
    for name, reward in run.rewards.items():
        if isinstance(reward, HttpReward) and (why := reward.refuses(run.runtime.timeouts.reward)):
            raise ConfigError(f"rewards.{name}.{why}")
    prompts.check(located.prompts)
    return located


def check_output(run: Run) -> Place:
    """Raise ConfigError for an output that cannot be written, or that a Ray job would lose."""
    place = Place.at(run.output, run.runtime.storage_options)
    if not place.remote and not Path(run.output).is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ConfigError(
            f"output: {run.output!r} is relative, and a Ray job runs in a temporary copy that is deleted; "
            "give an absolute path, as in --output /data/run1"
        )
    place.check()
    return place


def prepare(run: Run, base_dir: Path, shard: tuple[int, int] = (0, 1)) -> Prepared:
    """Check, replace `null` revisions by commits (the output's own, if it exists), and take the fingerprint.

    Raises ConfigError; also where the output has another fingerprint or a live owner.
    """
    output = check_output(run)
    before = manifest.read_run(output)
    run, choice = engines.resolve(run, before)
    run = fingerprint.pin(run, before["config"] if before else {})
    located = _check_rest(run, base_dir)
    if before:
        columns: dict[str, ColumnType] = before["columns"]
    else:
        sample = prompts.sample(located.prompts)
        columns = schema.column_types(run.prompts.keep, sample, run.prompts.drop_last_answer)
    model = before["model"] if before and "model" in before else fingerprint.model_name(run)
    components = fingerprint.components(run, located, base_dir, None, choice.component, choice.version)
    prepared = Prepared(run, located, base_dir, output, components, columns, model, choice)
    if before:
        manifest.check_resume(before, prepared.record())
    for owner in lease.read_owners(output):
        if owner.excludes(shard) and owner.alive():
            raise ConfigError(f"output: {output} is owned by a live run ({owner}); wait for it, or stop it")
    return prepared
