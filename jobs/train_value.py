"""`aisp train-value CONFIG --out DIR`: the value network of RE-Control for a base model and its rewards.

    training prompts -> one sampled response each -> combined reward -> states of a sample of its tokens -> network

In one process, without Ray: the states of a token take some thousand times its size, so they stay on the machine that
computes them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aisp_dist.config import BestOfN, ConfigError, Run
from aisp_dist.data import prompts
from aisp_dist.output import fingerprint
from aisp_dist.records import Prompt, Round, Sampling, TopP
from jobs import cli, prepare, settings
from jobs.progress import say

if TYPE_CHECKING:
    from aisp_dist.methods.value import States

_TOGETHER = 64  # prompts decoded and scored at a time


def main(args: Sequence[str]) -> int:
    parse = settings.parser("train-value", cli.VERBS["train-value"])
    parse.add_argument("--out", type=Path, help="directory to write; must not exist")
    parse.add_argument("--case", help="one of compare.cases")
    parse.add_argument(
        "--prompts", type=int, default=1000, help="training prompts, after the first compare.prompts (1000)"
    )
    parse.add_argument("--held-out", type=float, default=0.1, help="share of the responses that is held out (0.1)")
    parse.add_argument(
        "--states", type=int, default=16, help="pairs of neighbouring states that are kept of a response (16)"
    )
    parse.add_argument("--width", type=int, default=4096, help="width of the hidden layers (4096)")
    parse.add_argument("--epochs", type=int, default=100, help="passes over the responses (100)")
    parse.add_argument("--lr", type=float, default=1e-4, help="learning rate of Adam (1e-4)")
    parse.add_argument("--batch", type=int, default=64, help="responses in a step (64)")
    parse.add_argument("--published", action="store_true", help="train as the authors' code does, with its faults")
    options, run, base_dir = settings.read(parse, args)
    for name in ("prompts", "states", "width", "epochs", "lr", "batch"):
        if not getattr(options, name) > 0:
            raise ConfigError(f"--{name} is {getattr(options, name)}; it must be above 0")
    if not 0 < options.held_out < 1:
        raise ConfigError(f"--held-out is {options.held_out}; it must be between 0 and 1")
    if options.out is None:
        raise ConfigError("--out: missing; name the directory to write the value network to")
    if options.out.exists():
        raise ConfigError(f"--out: {str(options.out)!r} exists; name another directory, or remove it")
    if run.generator.endpoint:
        raise ConfigError("generator.endpoint: training a value network needs the model's states; leave it out")
    cases = settings.cases(run)
    if options.case and options.case not in cases:
        raise ConfigError(f"--case {options.case!r} is not among compare.cases ({', '.join(cases)})")
    run = cases[options.case] if options.case else run
    after = run.prompts.model_copy(update={"skip": run.prompts.skip + run.compare.prompts, "limit": options.prompts})
    run = run.model_copy(update={"prompts": after, "method": BestOfN(num_samples=1, num_iterations=1)})
    located = prepare.check(run, base_dir)
    parts = fingerprint.components(run, located, base_dir) | {"model": fingerprint.model_name(run)}
    lines = itertools.islice(prompts.read(located.prompts), options.prompts)
    asked = [line for line in lines if isinstance(line, Prompt)]
    if len(asked) < 10:
        raise ConfigError(
            f"prompts: {len(asked)} can be read after the first {run.compare.prompts}, which compare uses; a value "
            "network needs at least 10, and better thousands"
        )
    _train(options, located, base_dir, parts, asked)
    return 0


def _train(options: Any, run: Run, base_dir: Path, parts: dict[str, Any], asked: Sequence[Prompt]) -> None:
    import torch

    from aisp_dist.methods import value

    torch.use_deterministic_algorithms(True, warn_only=True)
    responses = list(_responses(run, base_dir, asked, options.states))
    if len(responses) < 10:
        raise cli.Exit(1, f"{len(responses)} of {len(asked)} prompts gave a response with a finite reward: too few")
    kept = max(2, math.ceil(options.held_out * len(responses)))
    chosen = {n: getattr(options, n) for n in ("width", "epochs", "lr", "batch", "published")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say(f"training on {len(responses) - kept} responses, {kept} held out")
    try:
        made, scale, measures = value.train(responses[kept:], responses[:kept], seed=run.seed, device=device, **chosen)
    except ValueError as error:
        raise cli.Exit(1, str(error)) from None
    about = {
        **{n: parts[n] for n in ("seed", "generator", "rewards", "combine", "prompts", "digests", "model")},
        "responses": len(responses),
        "hidden_size": responses[0].ends.shape[1],
        "reward_mean": scale[0],
        "reward_deviation": scale[1],
        "states": options.states,
        **chosen,
        **{f"held_out_{name}": None if math.isnan(v) else v for name, v in measures._asdict().items()},
    }
    value.save(made, about, options.out)
    print(
        f"{options.out}: held out {kept} of {len(responses)} responses: loss {measures.loss:.3f} (deviations of the "
        f"reward, squared), correlation with the reward {measures.correlation:.2f} at the token that learns it and "
        f"{measures.early_correlation:.2f} at the first"
    )


def _responses(run: Run, base_dir: Path, asked: Sequence[Prompt], keep: int) -> Iterator[States]:
    """The kept states of one response to each prompt, drawn by nucleus sampling and scored. A prompt that cannot be
    rendered and a response without a finite reward are skipped and counted."""
    from aisp_dist import rewards
    from aisp_dist.data import render
    from aisp_dist.engine import decode, model
    from aisp_dist.methods import value
    from aisp_dist.rewards.combine import combine

    lm = model.load(run.generator)
    engine = decode.Engine(lm, run.generator.batch_rows, run.generator.max_new_tokens, run.generator.stop)
    selecting = {name: reward for name, reward in run.rewards.items() if reward.use == "select"}
    scorers = {n: rewards.load(n, r, base_dir, columns=run.prompts.keep) for n, r in selecting.items()}
    max_tokens = run.prompts.max_tokens
    if lm.context_length is not None:
        max_tokens = min(max_tokens, lm.context_length - run.generator.max_new_tokens)
    sampling = Sampling(decode=TopP(0.95, 1.0))
    skipped = 0
    for start in range(0, len(asked), _TOGETHER):
        rounds = {}
        for prompt in asked[start : start + _TOGETHER]:
            try:
                tokens = render.render(prompt, run.prompts, lm.tokenizer, max_tokens)
                rounds[prompt.id] = prompt, Round(run.seed, prompt.id, tokens, 0, 0, 1, sampling)
            except render.Unrenderable:
                skipped += 1
        drawn = engine.run(round for _, round in rounds.values())
        for (prompt, round), rollout in zip(rounds.values(), drawn, strict=True):
            response = rollout.trajectories[0]
            raw = {name: score(prompt, [response.text]) for name, score in scorers.items()}
            (total,), _ = combine(selecting, run.combine, raw)
            if total.value is None:
                skipped += 1
                continue
            z_TD, _ = lm.dense((*round.prompt_tokens, *response.token_ids[:-1]))
            own = z_TD[len(round.prompt_tokens) - 1 :]
            yield value.sample(own, total.value, keep, f"{run.seed}/{prompt.id}")
        say(f"{min(start + _TOGETHER, len(asked))}/{len(asked)} prompts" + (f", {skipped} skipped" * (skipped > 0)))


if __name__ == "__main__":
    cli.run("train-value")
