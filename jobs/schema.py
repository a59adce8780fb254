"""`aisp schema`: the JSON schema of a configuration, for editors."""

from __future__ import annotations

import json
from collections.abc import Sequence

from aisp_dist.config import Run
from jobs import cli, settings


def main(args: Sequence[str]) -> int:
    settings.parser("schema", cli.VERBS["schema"], config=False).parse_args(args)
    print(json.dumps(Run.model_json_schema(), indent=2))
    return 0


if __name__ == "__main__":
    cli.run("schema")
