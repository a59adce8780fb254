"""`aisp report OUTPUT [OUTPUT ...]`: finished outputs as one HTML file that shows itself without a network."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from aisp_dist.config import ConfigError
from aisp_dist.output.filesystem import Place
from jobs import cli, settings
from jobs.status import OUTPUT


def main(args: Sequence[str]) -> int:
    parse = settings.parser("report", cli.VERBS["report"], config=False)
    parse.add_argument("outputs", nargs="+", help=f"{OUTPUT}, or of `aisp compare`; several: side by side")
    parse.add_argument("--out", metavar="FILE", help="where to write (report.html in the first output)")
    parse.add_argument("--samples", type=int, default=200, help="prompts whose answers the page shows, at most (200)")
    options = parse.parse_args(args)
    if options.samples < 1:
        raise ConfigError(f"--samples is {options.samples}; it must be at least 1")
    if (options.out or "x").endswith("/"):
        raise ConfigError(f"--out is {options.out}, a folder; name a file in it")

    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("aisp report draws with matplotlib, which is not installed: pip install 'aisp-dist[report]'")

    from aisp_dist.analysis.report import contents, page

    places = [Place.at(output) for output in options.outputs]
    data = page.render(contents.read(places), options.samples)
    place, name = places[0], "report.html"
    if options.out:
        folder, _, name = options.out.rpartition("/")
        place = Place.at(folder or ("/" if options.out.startswith("/") else Path.cwd()))
    place.write(name, data)
    if options.out and not place.remote:
        with suppress(OSError):  # a folder that is no output of ours gets the file and nothing else
            Path(place.uri, ".staging").rmdir()
    print(f"written: {place}/{name} ({len(data) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    cli.run("report")
