"""What population gains and costs at equal samples: paired differences from best-of-n, for candidates of its default.

    python -m tests.bench.population.bounds tests/bench/population/population.yaml --set tuning --seeds 2
    python -m tests.bench.population.bounds tests/bench/population/population.yaml --set unseen --arm typical --seeds 2

A default is chosen on the tuning prompts and reported on the others. Cases and files are as in measure.py; a prompt has
128 samples, in 8 iterations of 16. The result is `bounds.json`, with a row for every case, set, arm and number of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from aisp_dist.analysis.metrics import interval
from aisp_dist.config import Run
from jobs import settings
from tests.bench.population import measure

SETS = {  # lines of the case's source
    "tuning": measure.TUNING,
    "result": {"skip": 48, "limit": 128},
    "unseen": {"skip": 176, "limit": 32},  # openings of another make
}
TOP_P = {"story, lexicon": 0.8, "story, similarity": 0.9, "demo, learned": 0.95}  # as measure.py tuned best-of-n
SIZE = {"num_samples": 16, "num_iterations": 8}
PEER = "best-of-n"
_TYPICAL = {"limit": {"diversity": "typical"}}
ARMS: dict[str, dict[str, Any]] = {
    "no limit": {"limit": None},
    "typical": _TYPICAL,
    "typical, flip rate .26": _TYPICAL | {"sampling": {"flip_rate": 0.26}},
    "typical, flip rate .24": _TYPICAL | {"sampling": {"flip_rate": 0.24}},
    "typical, a quarter fresh": _TYPICAL | {"fresh": 0.25},
    "no limit, a quarter fresh": {"limit": None, "fresh": 0.25},
}
SHOWN = (32, 64, 128, 256, 512)


def arms(case: str, chosen: Iterable[str] = ARMS) -> dict[str, dict[str, Any]]:
    """Best-of-n as measure.py tuned it for the case, and population."""
    peer = {"kind": "best_of_n", "sampling": {"top_p": TOP_P[case]}}
    return {PEER: peer, **{arm: {"kind": "population"} | ARMS[arm] for arm in chosen}}


def main(args: Sequence[str]) -> None:
    parse = settings.parser("bounds", "population beside best-of-n at equal samples")
    parse.add_argument("--workers", type=int, default=1, help="processes")
    parse.add_argument("--case", action="append", help="only this case; may be repeated")
    parse.add_argument("--set", action="append", choices=sorted(SETS), help="of prompts; may be repeated; default: all")
    parse.add_argument("--arm", action="append", choices=list(ARMS), help="beside best-of-n; may be repeated")
    parse.add_argument("--seeds", type=int, default=1)
    parse.add_argument("--iterations", type=int, default=SIZE["num_iterations"], help="of 16 samples")
    options, run, base_dir = settings.read(parse, args)
    size = SIZE | {"num_iterations": options.iterations}
    out = Path(run.output) / "bounds"
    jobs = {
        (name, chosen, arm): [
            _job(out, base_dir, case, f"{name}/{chosen}/{arm}/{options.iterations}", method | size, chosen, seed)
            for seed in range(options.seeds)
        ]
        for name, case in settings.cases(run).items()
        if not options.case or name in options.case
        for chosen in options.set or SETS
        if name.startswith("story") or chosen != "unseen"  # which are openings
        for arm, method in arms(name, options.arm or ARMS).items()
    }
    measure.work([job for of in jobs.values() for job in of], options.workers)
    measure.write(out / "bounds.json", found := list(rows(jobs)))
    print(*map(line, found), sep="\n")


def _job(
    out: Path, base_dir: Path, case: Run, place: str, method: dict[str, Any], chosen: str, seed: int
) -> measure.Job:
    values = case.model_dump(mode="json", by_alias=True)
    values = values | {"seed": seed, "method": method, "prompts": values["prompts"] | SETS[chosen]}
    return measure.Job(out / place / f"{seed}.json", base_dir, values)


def rows(jobs: dict[tuple[str, str, str], list[measure.Job]]) -> Iterable[dict[str, Any]]:
    """Means and paired differences with intervals over prompts; a prompt's value is its mean over seeds."""
    for (case, chosen, arm), own in jobs.items():
        sizes = measure.read(own[0].file)["prompts"][0]
        for samples in (n for n in SHOWN if str(n) in sizes):
            mine, peer = measure.means(own, samples), measure.means(jobs[case, chosen, PEER], samples)
            row: dict[str, Any] = {"case": case, "set": chosen, "arm": arm, "samples": samples, "seeds": len(own)}
            for name in ("reward", "nll", "diversity", "held-out", "drawn"):
                row[name] = interval(mine[name])
                row[f"{name}, less {PEER}"] = interval([a - b for a, b in zip(mine[name], peer[name], strict=True)])
            yield row


def line(row: dict[str, Any]) -> str:
    cells = [str(row[name]) for name in ("case", "set", "arm", "samples", "seeds")]
    for name, digits in (("reward", 2), ("nll", 3), ("diversity", 3), ("held-out", 2)):
        for value in (row[name], row[f"{name}, less {PEER}"]):
            cells.append("{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*value, d=digits))
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main(sys.argv[1:])
