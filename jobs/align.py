"""`aisp align CONFIG`: relabel the prompts of a configuration. The same command resumes; a larger limit extends."""

from __future__ import annotations

from collections.abc import Sequence

from actors.coordinator import TooManyFailed
from aisp_dist import manifest, prompts, summary
from jobs import cli, prepare, session, settings
from jobs.progress import Progress, say


def main(args: Sequence[str]) -> int:
    parse = settings.parser("align", cli.VERBS["align"])
    parse.add_argument("--retry-failed", action="store_true", help="compute the rows of failed/ again")
    parse.add_argument("--dry-run", action="store_true", help="load the models, show the first prompt, write nothing")
    options, run, base_dir = settings.read(parse, args)
    prepared = prepare.prepare(run, base_dir)
    table = prepared.table(options.retry_failed)
    try:
        nothing_to_do = not options.dry_run and manifest.read_run(prepared.output) and table.whole()
    except TooManyFailed as error:
        raise cli.Exit(3, str(error)) from None
    if nothing_to_do:
        say("every input has its row already: nothing to do")
        print(summary.text(prepared.output, 0.0, 0))
        return 0
    with session.Session(prepared, say) as cluster:
        say(cluster.first_prompt())
        if options.dry_run:
            count = sum(1 for _ in prompts.read(prepared.located.prompts))
            samples = count * run.method.num_samples * run.method.num_iterations
            print(f"{count} inputs, {samples} samples; `aisp compare` measures what they cost. Nothing was written")
            return 0
        with Progress(prepared.output, prepared.located) as progress:
            cluster.relabel(prepared, table, progress)
    print(summary.text(prepared.output, progress.seconds, progress.samples))
    return 0


if __name__ == "__main__":
    cli.run("align")
