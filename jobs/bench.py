"""`aisp bench decode|run`: speed beside peers, in the same run.

One JSON document on stdout, everything else on stderr. torch is loaded only to measure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jobs import cli, settings

PEERS = ("generate", "repeated_static", "vllm")
ABOUT = {
    "decode": "the engine beside model.generate, repeated KV and vLLM, on the same prompts and noise",
    "run": "a configuration's first prompts from end to end, beside vLLM's generate and the same rewards",
}


def main(args: Sequence[str]) -> int:
    parse = settings.parser("bench", cli.VERBS["bench"], config=False)
    about = "; ".join(f"{what}: {text}" for what, text in ABOUT.items())
    parse.add_argument("what", choices=ABOUT, help=f"{about}. `aisp bench WHAT --help` lists its flags")
    what = parse.parse_args(args[:1]).what
    if what == "run":
        from jobs import bench_run

        read = settings.read(bench_run.parser(), args[1:])
        return document(what, lambda: bench_run.measure(*read))
    options = parser().parse_args(args[1:])

    from aisp_dist.bench import decode

    return document(what, lambda: decode.measure(options))


def document(what: str, measure: Callable[[], dict[str, Any]]) -> int:
    """Measure and print the JSON document. Returns the exit code: 1 where a check of agreement fails."""
    load = os.getloadavg()[0]
    with contextlib.redirect_stdout(sys.stderr):
        result = measure()
    print(json.dumps({"bench": what, "load_average_before": load, **result}, indent=2))
    return 0 if result.get("agrees", True) else 1


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser("aisp bench decode", description=ABOUT["decode"], allow_abbrev=False)
    add, counts = parse.add_argument, several(positive)
    add("--suite", choices=("cpu",), help="five models and lengths, in place of the next three flags")
    add("--shape", type=several(str), help="random weights of family:hidden/layers/vocab (llama:512/8/16k)")
    add("--prompt-tokens", type=counts, metavar="N", help="tokens of a prompt (512)")
    add("--new-tokens", type=counts, metavar="N", help="tokens of a response (64)")
    add("--samples", type=counts, default=[32], metavar="N", help="responses to a prompt (32)")
    add("--prompts", type=counts, default=[1], metavar="N", help="prompts in flight (1)")
    add("--batch-rows", type=counts, metavar="N", help="rows of a batch (all samples of all prompts)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(float32)")
    add("--device", help="a torch device (cuda if there is one, else cpu)")
    add("--threads", type=positive, default=1, metavar="N", help="threads of torch (1)")
    add("--repeat", type=positive, default=3, metavar="N", help="repetitions; contenders take turns in each (3)")
    known = f"comma list of {', '.join(PEERS)} (all)"
    add("--peers", "--peer", type=several(_peer), default=list(PEERS), help=known)
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


if __name__ == "__main__":
    cli.run("bench")
