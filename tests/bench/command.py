"""What the programs of this directory share: flags, one JSON document on stdout, exit code 2 for bad flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from aisp_dist.config import ConfigError
from jobs import bench


def parser(what: str, about: str | None) -> argparse.ArgumentParser:
    """A parser for the program `what`. about: its docstring, whose first paragraph is the description."""
    return argparse.ArgumentParser(
        f"python -m tests.bench.{what}",
        description=(about or "").split("\n\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def run(
    parse: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], dict[str, Any]], args: Sequence[str] | None
) -> int:
    """Measure with the flags `args`; returns the exit code."""
    options = parse.parse_args(args)
    try:
        return bench.document(parse.prog.rpartition(".")[2], lambda: measure(options))
    except ConfigError as error:
        parse.error(str(error))


def model_flags(parse: argparse.ArgumentParser, shape: str, prompt_tokens: int, samples: int) -> None:
    """The flags of a model with random weights and of the sizes of its work."""
    add = parse.add_argument
    add("--shape", default=shape, help="random weights of family:hidden/layers/vocab")
    add("--prompt-tokens", type=bench.positive, default=prompt_tokens, metavar="N", help="tokens of a prompt")
    add("--new-tokens", type=bench.positive, default=64, metavar="N", help="tokens of a response")
    add("--samples", type=bench.positive, default=samples, metavar="N", help="responses to a prompt")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights")
    add("--device", help="a torch device; cuda if there is one, else cpu")
    add("--threads", type=bench.positive, default=1, metavar="N", help="threads of torch, in each process")
    add("--repeat", type=bench.positive, default=3, metavar="N", help="repetitions")


def not_negative(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0")
    return float(text)
