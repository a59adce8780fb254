"""`aisp export OUTPUT [OUTPUT ...] --to dpo --out DIR`: training sets that trainers take as they are, in a directory
that `datasets.load_dataset(DIR, "dpo")` reads. The directory appears with everything in it or not at all."""

from __future__ import annotations

import hashlib
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

from aisp_dist.analysis import export, outputs
from aisp_dist.analysis.outputs import Output
from aisp_dist.config import ConfigError
from aisp_dist.output.filesystem import Place
from jobs import cli, evaluate, settings
from jobs.progress import say

_ROWS_PER_FILE = 50_000
_FILTERS: dict[str, tuple[type, str]] = {
    "min-gap": (float, "smallest difference of the two rewards"),
    "min-tokens": (int, "smallest length of the chosen answer"),
    "max-tokens": (int, "largest length of the chosen answer"),
    "max-repetition": (float, "largest share of repeated 4-grams of words in the chosen answer"),
}
# https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md; not run here.
_LLAMA_FACTORY: dict[str, dict[str, Any]] = {
    "sft": {"columns": {"messages": "messages"}},
    "dpo": {"ranking": True, "columns": {"messages": "prompt", "chosen": "chosen", "rejected": "rejected"}},
    "kto": {"columns": {"messages": "prompt", "response": "completion", "kto_tag": "label"}},
}
_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def main(args: Sequence[str]) -> int:
    options = _options(args)
    rejected = export.Rejected.parse(options.rejected)
    found = [outputs.open_output(Place.at(name)) for name in options.outputs]
    filters, chat = _filters(options, found, rejected), _chat(found)
    if options.sft_format == "messages" and not chat:
        raise ConfigError("--sft-format messages: these prompts are plain text (format: raw); use prompt-completion")
    if options.out.exists():
        raise ConfigError(f"--out: {str(options.out)!r} exists already; name another directory, or remove it")
    carried, left_out = export.kept_columns(found)
    if left_out:
        say(f"left out, since trainers take these names for their own: {', '.join(left_out)}")
    for output in found:
        if not options.partial:
            outputs.check_finished(output, evaluate.inputs(output.place))
    staged = options.out.with_name(f".{options.out.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)  # of a command that was interrupted
    try:
        told: dict[export.Kind, dict[str, Any]] = {}
        for kind in dict.fromkeys(options.to):
            sieve = export.Sieve(filters, kind in export.PAIRED)
            (staged / kind).mkdir(parents=True)
            told[kind] = _table(kind, found, rejected, sieve, staged / kind, chat, carried, options.sft_format)
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


def _options(args: Sequence[str]) -> Any:
    parse = settings.parser("export", cli.VERBS["export"], config=False)
    parse.add_argument("outputs", nargs="+", metavar="OUTPUT", help="finished outputs; those of one kind of prompt")
    parse.add_argument("--to", action="append", required=True, choices=export.KINDS, help="may be repeated")
    parse.add_argument("--out", required=True, help="local directory to write; must not exist")
    parse.add_argument(
        "--rejected",
        default="base",
        help="base (default: the greedy answer), original (the dialogue's own), worst, median, or lowest-above:FLOOR",
    )
    parse.add_argument("--sft-format", default="prompt-completion", choices=("prompt-completion", "messages"))
    for name, (kind, about) in _FILTERS.items():
        parse.add_argument(f"--{name}", type=kind, help=about)
    parse.add_argument("--finish", choices=("stop", "length"), help="how the chosen answer ends")
    parse.add_argument("--held-out-agrees", metavar="REWARD", help="a reward that must prefer the chosen answer too")
    parse.add_argument("--dedup", action="store_true", help="of prompts equal but for white space keep the first")
    parse.add_argument("--partial", action="store_true", help="export an unfinished output as far as it is")
    parse.add_argument("--push-to-hub", metavar="REPO", help="upload the directory as a private dataset")
    options = parse.parse_args(args)
    if "://" in options.out:
        raise ConfigError(f"--out: {options.out!r} is no local directory; write to one and copy it, or --push-to-hub")
    options.out = Path(options.out)
    return options


def _filters(options: Any, found: Sequence[Output], rejected: export.Rejected) -> export.Filters:
    judge = options.held_out_agrees
    for output in found:
        if judge and judge not in output.run.rewards:
            there = ", ".join(output.run.rewards)
            raise ConfigError(f"--held-out-agrees: {judge!r} is no reward of {output} ({there})")
        if judge in output.held_out and rejected.among_candidates:  # it would remove every prompt
            raise ConfigError(
                f"--held-out-agrees: {judge!r} is held out in {output}, so it scored no candidate, and --rejected "
                f"{options.rejected} takes a candidate; use --rejected base, or leave --held-out-agrees out"
            )
    given = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in _FILTERS}
    return export.Filters(**given, held_out=judge, finish=options.finish, dedup=options.dedup)


def _chat(found: Sequence[Output]) -> bool:
    """Whether prompts are chats. Raises ConfigError for outputs that cannot be exported together."""
    runs = [output.record["run_id"] for output in found]
    if len(set(runs)) < len(runs):
        raise ConfigError("outputs: two are of the same run, so their rows are the same; name each run once")
    kinds = {output.run.prompts.format != "raw" for output in found}
    if len(kinds) > 1:
        raise ConfigError("outputs: some have chats for prompts and some plain text; export them separately")
    return kinds.pop()


def _table(
    kind: export.Kind,
    found: Sequence[Output],
    rejected: export.Rejected,
    sieve: export.Sieve,
    folder: Path,
    chat: bool,
    carried: export.Columns,
    sft_format: str,
) -> dict[str, Any]:
    """Write one table; how many prompts were read, kept and removed by which filter, and how many rows were written."""

    def kept(output: Output) -> Iterator[export.Example]:
        for example in filter(sieve, export.examples(output, rejected)):
            several = len(found) > 1  # then ids are told apart by their run
            yield replace(example, id=f"{output.record['run_id']}/{example.id}") if several else example

    if kind == "alpaca_eval":
        rows = sieve.passed = _write_alpaca_eval(folder / "outputs.json", [(o, kept(o)) for o in found], sieve)
    else:
        of = export.schema(kind, chat, carried, sft_messages=sft_format == "messages")
        rows = export.write(kind, chain.from_iterable(map(kept, found)), folder, of, _ROWS_PER_FILE)
    removed = dict(sorted(sieve.removed.items()))
    if not rows:
        why = ", ".join(f"{n} removed by {name}" for name, n in removed.items()) or "there is no row in data/"
        raise ConfigError(f"--to {kind}: nothing is left of {sieve.read} prompts ({why}); loosen the filters")
    return {"read": sieve.read, "kept": sieve.passed, "removed": removed, "rows": rows}


def _write_alpaca_eval(
    file: Path, found: Sequence[tuple[Output, Iterator[export.Example]]], sieve: export.Sieve
) -> int:
    answers = []
    for output, kept in found:
        name = f"{output.model_name} + {output.method_name}"
        for example in kept:
            row = {**example.kept, "id": example.id, "prompt": example.prompt, "completion": example.chosen}
            try:
                answers.append(export.alpaca_eval(row, name))
            except ValueError:
                sieve.removed["several turns"] += 1
    file.write_text(json.dumps(answers, indent=1, ensure_ascii=False), encoding="utf-8")
    return len(answers)


def _describe(staged: Path, told: dict[export.Kind, Any], found: Sequence[Output], options: Any, chat: bool) -> None:
    """export.json, the dataset card, and LLaMA-Factory's dataset_info.json."""
    chosen = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("out", "outputs")}
    runs = [
        {
            "output": output.place.uri,
            **{name: output.record[name] for name in ("run_id", "fingerprint", "versions")},
            "model": output.model_name,
            "rewards": output.record["config"]["rewards"],
            "method": output.record["config"]["method"],
            "failed": outputs.count(output.place, "failed"),
        }
        for output in found
    ]
    about = {"tables": told, "options": chosen, "runs": runs, "aisp-dist": version("aisp-dist")}
    (staged / "export.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    tables = [kind for kind in told if kind != "alpaca_eval"]
    configs = [  # `datasets` caches by these; the digest makes another export of the same place another table
        {"config_name": kind, "data_files": f"{kind}/*.parquet", "description": f"files {_digest(staged / kind)}"}
        for kind in tables
    ]
    lines = ["---", yaml.safe_dump({"configs": configs}, sort_keys=False).strip(), "---", "", "# Training sets", ""]
    lines += ["Written by `aisp export` from:", ""]
    for output, run in zip(found, runs, strict=True):
        names = ", ".join(run["rewards"])
        lines.append(
            f"- {run['model']}, method `{output.method_name}`, rewards {names}; run {run['run_id']}, {run['failed']} "
            "failed inputs"
        )
    lines += ["", "| table | prompts read | removed | rows |", "|---|---|---|---|"]
    for kind, counts in told.items():
        removed = ", ".join(f"{n} {name}" for name, n in counts["removed"].items()) or "none"
        lines.append(f"| {kind} | {counts['read']} | {removed} | {counts['rows']} |")
    lines += ["", f"The rejected answer is: {options.rejected}. All settings are in `export.json`.", ""]
    (staged / "README.md").write_text("\n".join(lines), encoding="utf-8")
    mapped = {
        kind: {"file_name": kind, "formatting": "sharegpt", **_LLAMA_FACTORY[kind], "tags": _TAGS}
        for kind in tables
        if chat and kind in _LLAMA_FACTORY and (kind != "sft" or options.sft_format == "messages")
    }
    if mapped:
        (staged / "dataset_info.json").write_text(json.dumps(mapped, indent=2) + "\n", encoding="utf-8")


def _digest(folder: Path) -> str:
    found = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "blake2b").digest())
    return found.hexdigest()


def _push(folder: Path, repo: str) -> None:
    """Raises Exit; the directory stays in any case."""
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
