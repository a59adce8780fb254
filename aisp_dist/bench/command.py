"""The flags of `aisp bench`, and what surrounds a measurement: one JSON document on stdout, all else on stderr. Loads
torch only to measure, so that --help and bad usage answer at once."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

PEERS = ("generate", "repeated_static", "vllm")
ABOUT = {
    "decode": "the engine beside model.generate, repeated KV and vLLM, on the same prompts and noise",
    "score": "a reward model's scorer beside transformers' own padded batch",
    "pipeline": "decoding and scoring at the same time, beside the slower of the two alone",
}


def run(what: str, args: Sequence[str]) -> int:
    """Measures, prints the JSON and answers the exit code: 1 where the check of agreement fails. Raises ConfigError."""
    options = parser(what).parse_args(args)
    load = os.getloadavg()[0]
    with contextlib.redirect_stdout(sys.stderr):
        result: dict[str, Any] = importlib.import_module(f"aisp_dist.bench.{what}").measure(options)
    print(json.dumps({"bench": what, "load_average_before": load, **result}, indent=2))
    return 0 if result["agrees"] else 1


def parser(what: str) -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(f"aisp bench {what}", description=ABOUT[what], allow_abbrev=False)
    add, sweep = parse.add_argument, what == "decode"
    count = several(positive) if sweep else positive
    length, samples, shape = (256, 16, "llama:256/4/4k") if what == "pipeline" else (512, 32, "llama:512/8/16k")

    def size(flag: str, default: int, about: str) -> None:  # of a sweep, decode.py knows the defaults
        add(flag, type=count, default=None if sweep else default, metavar="N", help=f"{about} ({default})")

    about = f"random weights of llama3-8b or family:hidden/layers/vocab ({shape})"
    add("--shape", type=several(str) if sweep else str, default=None if sweep else shape, help=about)
    size("--prompt-tokens", length, "tokens of a prompt")
    size("--new-tokens", 64, "tokens of a response")
    size("--samples", samples, "responses to a prompt")
    if what != "score":
        size("--prompts", 1 if sweep else 8, "prompts in flight")
    add("--batch-rows", type=count, metavar="N", help="rows of a batch (room for all; of a pipeline, for half)")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default=None if sweep else "float32", help="(float32; of --suite gpu, bfloat16)")
    add("--device", help="as torch names it (cuda where there is one, else cpu)")
    add("--threads", type=positive, default=1, metavar="N", help="threads of torch, in each process (1)")
    add("--repeat", type=positive, default=3, metavar="N", help="repetitions; contenders take turns in each (3)")
    if what == "pipeline":
        add("--iterations", type=positive, default=4, metavar="N", help="of the search (4)")
    if what == "decode":
        add("--suite", choices=("cpu", "gpu"), help="named models and lengths, in place of flags for them")
        known = f"comma list of {', '.join(PEERS)} (all)"
        add("--peers", "--peer", type=several(_peer), default=list(PEERS), help=known)
        add("--bandwidth", type=float, default=4.3e12, help="bytes/s of the roofline on a GPU (4.3e12, an H200's)")
        add("--flops", type=float, default=7.9e14, help="FLOP/s of the roofline on a GPU (7.9e14, an H200's in bf16)")
    return parse


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def _peer(text: str) -> str:
    if text not in PEERS:
        raise argparse.ArgumentTypeError(f"{text!r} must be one of {', '.join(PEERS)}")
    return text
