"""`aisp export OUTPUT [OUTPUT ...] --to dpo --out DIR`: training sets that trainers take as they are, in a directory
that `datasets.load_dataset(DIR, "dpo")` reads. It is there with everything in it or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from aisp_dist.analysis import export
from aisp_dist.analysis.alpaca_eval import alpaca_eval
from aisp_dist.analysis.evaluate import outputs
from aisp_dist.analysis.evaluate.outputs import Output
from aisp_dist.config import ConfigError
from aisp_dist.output.filesystem import Place
from jobs import cli, evaluate, settings
from jobs.progress import say

_SHARD = 50_000  # rows of a file
_FILTERS: tuple[tuple[str, type, str], ...] = (
    ("min-gap", float, "smallest difference of the two rewards"),
    ("min-tokens", int, "of the chosen answer"),
    ("max-tokens", int, "of the chosen answer"),
    ("max-repetition", float, "share of 4-grams of words that have come before in the chosen answer"),
)
# https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md; not run here.
_LLAMA_FACTORY: dict[str, dict[str, Any]] = {
    "sft": {"columns": {"messages": "messages"}},
    "dpo": {"ranking": True, "columns": {"messages": "prompt", "chosen": "chosen", "rejected": "rejected"}},
    "kto": {"columns": {"messages": "prompt", "response": "completion", "kto_tag": "label"}},
}
_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def main(args: Sequence[str]) -> int:
    parse = settings.parser("export", cli.VERBS["export"], config=False)
    parse.add_argument("outputs", nargs="+", metavar="OUTPUT", help="finished outputs; those of one kind of prompt")
    parse.add_argument("--to", action="append", required=True, choices=export.KINDS, help="may be repeated")
    parse.add_argument("--out", required=True, help="local directory to write; must not exist")
    parse.add_argument("--rejected", default="base", help="base (default), worst, median, or lowest-above:FLOOR")
    parse.add_argument("--sft-format", default="prompt-completion", choices=("prompt-completion", "messages"))
    for name, kind, about in _FILTERS:
        parse.add_argument(f"--{name}", type=kind, help=about)
    parse.add_argument("--finish", choices=("stop", "length"), help="how the chosen answer ends")
    parse.add_argument("--held-out-agrees", metavar="REWARD", help="a reward that must prefer the chosen answer too")
    parse.add_argument("--dedup", action="store_true", help="of prompts equal but for white space keep the first")
    parse.add_argument("--partial", action="store_true", help="of an output that is not finished, what is there")
    parse.add_argument("--push-to-hub", metavar="REPO", help="upload the directory as a private dataset")
    options = parse.parse_args(args)
    if "://" in options.out:
        raise ConfigError(f"--out: {options.out!r} is no local directory; write to one and copy it, or --push-to-hub")
    options.out = Path(options.out)
    found = [outputs.open_output(Place.at(name)) for name in options.outputs]
    rejected, filters = export.Rejected.parse(options.rejected), _filters(options, found)
    chat = _chat(found)
    if options.sft_format == "messages" and not chat:
        raise ConfigError("--sft-format messages: these prompts are plain text (format: raw); use prompt-completion")
    if options.out.exists():
        raise ConfigError(f"--out: {str(options.out)!r} is there already; name another directory, or remove it")
    for output in found:
        if not options.partial:
            outputs.check_finished(output, evaluate.inputs(dict(output.record)))
    staged = options.out.with_name(f".{options.out.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)  # of a call that was interrupted
    try:
        told = {
            kind: _table(kind, found, rejected, filters, staged, chat, options) for kind in dict.fromkeys(options.to)
        }
        _describe(staged, told, found, options, chat)
        os.replace(staged, options.out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    for kind, counts in told.items():
        removed = "".join(f", {n} by {name}" for name, n in counts["removed"].items())
        print(f"{kind}: {counts['rows']} rows from {counts['kept']} of {counts['read']} prompts{removed}")
    print(f"written: {options.out}")
    if options.push_to_hub:
        _push(options.out, options.push_to_hub)
    return 0


def _filters(options: Any, found: Sequence[Output]) -> export.Filters:
    for output in found:
        if options.held_out_agrees and options.held_out_agrees not in output.run.rewards:
            there = ", ".join(output.run.rewards)
            raise ConfigError(f"--held-out-agrees: {options.held_out_agrees!r} is no reward of {output} ({there})")
    given = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name, _, _ in _FILTERS}
    return export.Filters(**given, held_out=options.held_out_agrees, finish=options.finish, dedup=options.dedup)


def _chat(found: Sequence[Output]) -> bool:
    runs = [output.record["run_id"] for output in found]
    if len(set(runs)) < len(runs):
        raise ConfigError("outputs: two are of the same run, so their rows are the same; name each run once")
    kinds = {output.run.prompts.format != "raw" for output in found}
    if len(kinds) > 1:
        raise ConfigError("outputs: some have chats for prompts and some plain text; export them apart")
    return kinds.pop()


def _table(
    kind: export.Kind,
    found: Sequence[Output],
    rejected: export.Rejected,
    filters: export.Filters,
    staged: Path,
    chat: bool,
    options: Any,
) -> dict[str, Any]:
    """Write one table; what was read, kept and removed by which filter."""
    sieve = export.Sieve(filters, kind in export.PAIRED)
    several = len(found) > 1

    def named(output: Output) -> Iterator[export.Example]:
        """Ids of several outputs are told apart by their run."""
        for example in export.examples(output, rejected):
            yield replace(example, id=f"{output.record['run_id']}/{example.id}") if several else example

    kept = filter(sieve, chain.from_iterable(map(named, found)))
    folder = staged / kind
    folder.mkdir(parents=True)
    if kind == "alpaca_eval":
        answers, several_turns = [], 0
        for output in found:
            name = f"{output.run.generator.model} + {output.run.method.kind}"
            for example in filter(sieve, named(output)):
                row = {"id": example.id, "prompt": example.prompt, "completion": example.chosen}
                try:
                    answers += alpaca_eval([row], name)
                except ValueError:
                    several_turns += 1
        (folder / "outputs.json").write_text(json.dumps(answers, indent=1, ensure_ascii=False), encoding="utf-8")
        sieve.removed.update({"several turns": several_turns} if several_turns else {})
        rows = sieve.passed = len(answers)
    else:
        how = {"sft_messages": True} if kind == "sft" and options.sft_format == "messages" else {}
        shards = lambda i: (folder / f"train-{i:05d}.parquet").open("wb")  # noqa: E731
        rows = export.written(kind, kept, chat, shards, _SHARD, **how)
    removed = dict(sorted(sieve.removed.items()))
    if not rows:
        why = ", ".join(f"{n} removed by {name}" for name, n in removed.items()) or "there is no row in data/"
        raise ConfigError(f"--to {kind}: nothing is left of {sieve.read} prompts ({why}); loosen the filters")
    return {"read": sieve.read, "kept": sieve.passed, "removed": removed, "rows": rows}


def _describe(staged: Path, told: dict[export.Kind, Any], found: Sequence[Output], options: Any, chat: bool) -> None:
    """export.json, the dataset card, and LLaMA-Factory's dataset_info.json."""
    chosen = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("out", "outputs")}
    about: dict[str, Any] = {
        "tables": told,
        "options": chosen,
        "runs": [
            {
                "output": output.place.uri,
                **{name: output.record[name] for name in ("run_id", "fingerprint", "versions")},
                "model": output.run.generator.model,
                "rewards": output.record["config"]["rewards"],
                "method": output.record["config"]["method"],
                "failed": output.place.dataset("failed").count_rows() if output.place.names("failed") else 0,
            }
            for output in found
        ],
        "aisp-dist": version("aisp-dist"),
    }
    (staged / "export.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    tables = [kind for kind in told if kind != "alpaca_eval"]
    configs = [{"config_name": kind, "data_files": f"{kind}/*.parquet"} for kind in tables]
    lines = ["---", yaml.safe_dump({"configs": configs}, sort_keys=False).strip(), "---", "", "# Training sets", ""]
    lines += ["By `aisp export`, from:", ""]
    for run in about["runs"]:
        method, names = run["method"]["kind"], ", ".join(run["rewards"])
        lines.append(f"- {run['model']}, {method}, rewards {names}; run {run['run_id']}, {run['failed']} failed inputs")
    lines += ["", "| table | prompts read | removed | rows |", "|---|---|---|---|"]
    for kind, counts in told.items():
        removed = ", ".join(f"{n} {name}" for name, n in counts["removed"].items()) or "none"
        lines.append(f"| {kind} | {counts['read']} | {removed} | {counts['rows']} |")
    lines += ["", f"The rejected answer is: {options.rejected}. All settings are in `export.json`.", ""]
    card = "\n".join(lines)
    (staged / "README.md").write_text(card, encoding="utf-8")
    mapped = {
        kind: {
            "file_name": kind,
            "formatting": "sharegpt",
            **_LLAMA_FACTORY[kind],
            "tags": _TAGS,
        }
        for kind in tables
        if chat and kind in _LLAMA_FACTORY and (kind != "sft" or options.sft_format == "messages")
    }
    if mapped:
        (staged / "dataset_info.json").write_text(json.dumps(mapped, indent=2) + "\n", encoding="utf-8")


def _push(folder: Path, repo: str) -> None:
    """Raises Exit; the directory is there in any case."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, repo_type="dataset", private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, repo_type="dataset", folder_path=str(folder))
    except Exception as error:  # the hub's, the network's, a missing token's
        raise cli.Exit(
            1, f"--push-to-hub {repo}: {type(error).__name__}; {folder} is written, upload it later"
        ) from None
    say(f"pushed to https://huggingface.co/datasets/{repo}, private")


if __name__ == "__main__":
    cli.run("export")
