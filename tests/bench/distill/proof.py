"""Does a student learn more from AISP's answers than from best-of-n's or the teacher's own, at equal samples?

    python -m tests.bench.distill.proof [--config FILE] [--student MODEL] [--held-out FILE] [--seeds 3] [--out DIR]

    relabel (AISP, best-of-n: same prompts, same samples) -> aisp export --to dpo -> SFT, then DPO, by TRL, for each
    training seed -> greedy answers on held-out prompts: reward, held-out reward, the teacher's NLL, with intervals

The same command skips the steps that are finished. Needs the extra `distill`. For models of your own give a
configuration and held-out prompts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from aisp_dist.config import Run
from jobs import prepare, settings
from tests.bench.distill import measure, prompts

HERE = Path(__file__).resolve().parent
SFT = {"lr": 3e-4, "epochs": 3.0}
DPO = {"lr": 1e-4, "epochs": 1.0, "beta": 0.1}


def command(*words: str) -> None:
    print("+", *words, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True)


def relabelled(run: Run, config: str, out: Path) -> dict[str, Path]:
    """The output of every arm at equal samples, with pairs of its answer and the teacher's own beside it."""
    size = {"num_samples": run.method.num_samples, "num_iterations": run.method.num_iterations}
    best_of_n = json.dumps({"kind": "best_of_n", "sampling": {"top_p": 0.95}, **size})
    arms: dict[str, list[str]] = {"aisp": [], "best-of-n": ["--method", best_of_n]}
    for arm, flags in arms.items():
        command("jobs.align", config, "--output", str(out / arm), *flags)
        if not (out / f"{arm}-pairs").exists():
            pairs = ("--to", "dpo", "--rejected", "base", "--min-gap", "0.1", "--out", str(out / f"{arm}-pairs"))
            command("jobs.export", str(out / arm), *pairs)
    return {arm: out / arm for arm in arms}


def trained(teacher: str, outputs: dict[str, Path], out: Path, seed: int) -> dict[str, str]:
    """Directories of the students of one training seed, by what they learned from."""
    from datasets import load_dataset

    from tests.bench.distill import students  # loads TRL: after the checks

    def made(name: str, make: Any, rows: Any, start: str, how: dict[str, float]) -> str:
        folder = out / f"{name}-seed{seed}"
        if not (folder / "model.safetensors").exists():
            make(start, rows, folder, seed=seed, **how)
        return str(folder)

    found = {}
    own = load_dataset("parquet", data_files=str(outputs["aisp"] / "data/*.parquet"), split="train")
    said = own.map(lambda row: {"completion": [{"role": "assistant", "content": row["base_completion"]}]})
    found["SFT on its own answers"] = made("sft-base", students.sft, said, teacher, SFT)
    for arm, output in outputs.items():
        rows = load_dataset("parquet", data_files=str(output / "data/*.parquet"), split="train")
        sft = found[f"SFT on {arm}"] = made(f"sft-{arm}", students.sft, rows, teacher, SFT)
        pairs = load_dataset(f"{output}-pairs", "dpo", split="train")
        found[f"SFT, then DPO on {arm}"] = made(f"dpo-{arm}", students.dpo, pairs, sft, DPO)
    return found


def main(args: list[str]) -> int:
    parse = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parse.add_argument("--config", default=str(HERE / "relabel.yaml"), help="the relabelling run (relabel.yaml)")
    parse.add_argument("--student", help="model to train (the configuration's generator)")
    parse.add_argument("--held-out", default="demo", help="prompts.source of the measurement (demo)")
    parse.add_argument("--prompts", type=int, default=128, help="held-out prompts that are measured (128)")
    parse.add_argument("--seeds", type=int, default=3, help="training seeds (3)")
    parse.add_argument("--out", type=Path, default=Path("outputs/distill"), help="directory of all results")
    options = parse.parse_args(args)

    _, run, base_dir = settings.read(settings.parser("align", ""), [options.config])
    if run.prompts.source.endswith("distill/train.jsonl") and not Path(run.prompts.source).exists():
        prompts.main(run.prompts.source)
    run = prepare.check(run, base_dir)  # absolute paths, embedded names resolved
    outputs = relabelled(run, options.config, options.out)
    start = options.student or run.generator.model
    found: dict[str, list[measure.Columns]] = {}
    held_out = run.prompts.model_copy(update={"source": options.held_out})
    asked = run.model_copy(update={"prompts": held_out})
    for seed in range(options.seeds):
        students = {"not trained": start} | trained(start, outputs, options.out / "students", seed)
        for kind, columns in measure.measure(asked, base_dir, students, options.prompts).items():
            found.setdefault(kind, []).append(columns)
    selecting = next(name for name, reward in run.rewards.items() if reward.use == "select")
    rows = measure.table(found, "SFT on its own answers", selecting)
    (options.out / "students.json").write_text(json.dumps({"prompts": options.prompts, "rows": rows}, indent=2))
    heads = list(rows[0])
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        cells = (f"{c[0]:.2f} [{c[1]:.2f}, {c[2]:.2f}]" if isinstance(c, tuple) else c for c in row.values())
        print(f"| {' | '.join(c if isinstance(c, str) else f'{c:.3f}' for c in cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
