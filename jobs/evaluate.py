"""`aisp evaluate OUTPUT [OUTPUT ...]`: measures of finished outputs, into evaluation.json of each and as a table."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from aisp_dist import quiet
from aisp_dist.config import ConfigError, JudgeSettings, Reward, Run, load
from aisp_dist.output.filesystem import Place
from aisp_dist.output.fingerprint import locate_reward
from jobs import cli, settings, verify
from jobs.progress import say
from jobs.status import OUTPUT


def main(args: Sequence[str]) -> int:
    parse = settings.parser("evaluate", cli.VERBS["evaluate"], config=False)
    parse.add_argument("outputs", nargs="+", help=f"{OUTPUT}; several: one run with several seeds")
    parse.add_argument("--against", metavar="OUTPUT", help="another method's output on the same prompts")
    parse.add_argument("--config", help="YAML file whose `rewards` are further held-out ones")
    parse.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="NAME=REWARD",
        help="a further held-out reward: file.py:function, a model, or the section as in a configuration",
    )
    parse.add_argument("--embeddings", metavar="MODEL", help="sentence-transformers model, for coherence")
    parse.add_argument("--judge", metavar="URL", help="OpenAI-compatible API of a judge, for the win rate")
    parse.add_argument("--judge-model", metavar="NAME", help="the judge's name there")
    parse.add_argument("--judge-key-env", metavar="VAR", help="environment variable with its API key")
    parse.add_argument("--sample", type=int, default=64, help="prompts taken by the measures that ask a model (64)")
    parse.add_argument("--seed", type=int, default=0, help="seed of the sample (0)")
    parse.add_argument("--no-model", action="store_true", help="without the base model: no KL, no flips")
    options = parse.parse_args(args)
    if options.sample < 1 or options.seed < 0:
        raise ConfigError(f"--sample {options.sample}, --seed {options.seed}: at least 1 and at least 0")
    judge_settings = _judge(options)
    if options.embeddings and importlib.util.find_spec("sentence_transformers") is None:
        raise ConfigError("--embeddings needs sentence-transformers; pip install 'aisp-dist[evaluate]'")

    from aisp_dist.analysis import outputs
    from aisp_dist.analysis.evaluate import evaluated

    runs = [outputs.open_output(Place.at(output)) for output in options.outputs]
    against = outputs.open_output(Place.at(options.against)) if options.against else None
    evaluated.check(runs)
    for output in runs if against is None else [*runs, against]:
        outputs.check_finished(output, inputs(output.place))
    wanted = _rewards(options, runs[0].run)
    served = any(run.run.generator.endpoint for run in runs)  # its methods have neither control nor noise
    generator = None if options.no_model or served else evaluated.generator(runs[0])

    from aisp_dist import rewards
    from aisp_dist.analysis import judge
    from aisp_dist.analysis.evaluate import document, texts
    from aisp_dist.rewards import client

    columns = runs[0].run.prompts.keep
    loaded = {name: rewards.load(name, reward, base, columns=columns) for name, (reward, base) in wanted.items()}
    quiet.libraries()
    embed = texts.embedder(options.embeddings) if options.embeddings else None
    place = runs[0].place
    cache = None if place.remote else Path(place.uri, "judge.jsonl")
    ask = partial(judge.compare_answers, judge_settings, cache=cache) if judge_settings else None
    try:
        asked = document.Asked(options.sample, options.seed, generator, embed, loaded, ask)
        found = document.evaluate(runs, asked, against)
    except client.Unavailable as error:
        kept = f"; its replies so far are in {cache}" if cache else ""
        raise cli.Exit(1, f"{error}{kept}; once it answers, the same command resumes") from None
    data = (json.dumps(found, indent=2, allow_nan=False) + "\n").encode()
    for output in runs:
        output.place.write("evaluation.json", data)
    print(document.text(found))
    print("written: " + ", ".join(f"{output}/evaluation.json" for output in runs))
    return 0


def _judge(options: Any) -> JudgeSettings | None:
    """The judge; its API key is looked up at once. Raises ConfigError."""
    given = {"url": options.judge, "model": options.judge_model, "api_key_env": options.judge_key_env}
    if not any(given.values()):
        return None
    if not (options.judge and options.judge_model):
        raise ConfigError("--judge, --judge-model: a judge needs both, and --judge-key-env goes with them")
    try:
        judge = JudgeSettings.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"--judge: {'; '.join(fault['msg'] for fault in error.errors())}") from None

    from aisp_dist.rewards.client import Client

    Client("judge", judge)
    return judge


def inputs(output: Place) -> int | None:
    """How many inputs a run has; None, with a message, where its source is gone."""
    try:
        lines = verify.inputs(output)
        return None if lines is None else sum(1 for _ in lines)
    except ConfigError as error:
        say(f"whether rows are missing cannot be told, since the inputs are not there: {error}")
        return None


def _rewards(options: Any, run: Run) -> dict[str, tuple[Reward, Path]]:
    """The rewards of --config and --reward with the directories of their functions. Raises ConfigError."""
    sections: dict[str, tuple[Any, Path]] = {}
    if options.config:
        values = load.read_yaml(Path(options.config)).get("rewards")
        if not isinstance(values, dict):
            raise ConfigError(f"--config: {options.config} has no `rewards` by name; give them as in a run's file")
        sections |= {name: (value, Path(options.config).resolve().parent) for name, value in values.items()}
    for given in options.reward:
        name, _, value = given.partition("=")
        try:
            section = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--reward {given}: not valid YAML: {' '.join(str(error).split())}") from None
        if not name or not section:
            raise ConfigError(f"--reward {given!r}: give NAME=file.py:function, NAME=MODEL or NAME={{kind: ...}}")
        if isinstance(section, str):
            kind = "function" if ":" in section else "model"
            section = {"kind": kind, kind: section}
        sections[name] = (section, Path.cwd())
    if taken := sorted(sections.keys() & run.rewards.keys()):
        raise ConfigError(f"rewards: {', '.join(taken)} is a reward of the run already; give another name")
    config = run.model_dump(mode="json", by_alias=True)
    merged = config | {"rewards": config["rewards"] | {name: section for name, (section, _) in sections.items()}}
    checked = load.check(merged).rewards
    return {name: (locate_reward(name, checked[name], base), base) for name, (_, base) in sections.items()}


if __name__ == "__main__":
    cli.run("evaluate")
