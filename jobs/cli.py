"""`aisp VERB ...`: finds the verb's module and turns what it raises into an exit code and one readable message.

0 done; 1 failed; 2 bad usage or configuration; 3 too many failed rows; 130 / 143 interrupted, resumable.
"""

from __future__ import annotations

import atexit
import importlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from aisp_dist import quiet
from aisp_dist.config import ConfigError

VERBS = {
    "align": "relabel: prompts in, Parquet out; the same command resumes",
    "compare": "methods, one with shuffled rewards, on the same prompts at equal samples; the cost of the full run",
    "tune": "search each method's settings on a few prompts at the same budget; writes a configuration",
    "train-value": "train the value network of RE-Control for a base model and a reward",
    "submit": "align as a job on a Ray cluster: sends this directory, follows the log, ends with the job's exit code",
    "validate": "check a configuration without loading anything heavy",
    "schema": "the JSON schema of a configuration",
    "status": "progress of an output, from its files",
    "verify": "check that every input is in an output exactly once",
    "evaluate": "measures of a finished output: held-out rewards, win rate, diversity, coherence, KL, flips",
    "report": "one HTML page from finished outputs: curves, trade-offs, samples side by side",
    "export": "training sets from a finished output: sft, dpo, kto, reward, prompts, alpaca_eval",
    "rescore": "select again among kept candidates by other rewards, without the base model",
    "lm-eval": "tasks of lm-evaluation-harness: base, best-of-n and the configured method at equal samples",
    "doctor": "checks of the local engine and of reward models, with your models on your hardware",
    "bench": "speed of the engine (decode) or of whole runs (run) beside peers, as JSON",
}


class Exit(Exception):
    """Ends the command with a code and a message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def _show_everything() -> None:
    """Write characters that the terminal's encoding lacks as escapes, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> None:
    if argv is None:
        with _exit_code_kept():
            main(sys.argv[1:])
    _show_everything()
    args = list(argv or ())
    if not args or args[0] in ("-h", "--help"):
        print("usage: aisp VERB ...\n\n" + "\n".join(f"  {verb:13}{text}" for verb, text in VERBS.items()))
        print("\n`aisp VERB --help` says more; every configuration key is also a flag, as --method.num_iterations 8")
        sys.exit(0 if args else 2)
    run(args[0], args[1:])


def run(verb: str, args: Sequence[str] | None = None) -> None:
    """Run one verb and exit with its code. args: those of the process by default."""
    if args is None:
        with _exit_code_kept():
            run(verb, sys.argv[1:])
    _show_everything()
    quiet.libraries()
    if verb not in VERBS:
        sys.exit(_complain(f"{verb!r} is not a verb; there are: {', '.join(VERBS)}", 2))
    module = importlib.import_module(f"jobs.{verb.replace('-', '_')}")
    try:
        sys.exit(module.main(list(args or ())))
    except ConfigError as error:
        sys.exit(_complain(str(error), 2))
    except Exit as error:
        sys.exit(_complain(str(error), error.code))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted; the same command resumes", 130))
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:  # a full disk, a store that is away
        sys.exit(_complain(f"{error}; fix that, and the same command resumes", 1))
    except Exception as error:
        if not type(error).__module__.startswith("pyarrow"):
            raise
        what = " ".join(str(error).split())
        sys.exit(
            _complain(f"a file cannot be read: {what}; `aisp verify OUTPUT` names what is damaged in an output", 1)
        )


@contextmanager
def _exit_code_kept() -> Iterator[None]:
    """End the process with the exit code raised in this block, whatever libraries do at exit. Arrow's threads may
    still let go of Python objects while the interpreter is taken down, and abort the process after a finished command
    (apache/arrow#34314); so all exit handlers run, and the interpreter is not taken down."""
    code = 1  # for any other exception

    def leave() -> None:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):  # the reader went away
            os._exit(code or 1)
        os._exit(code)

    atexit.register(leave)  # the first registered is the last to run
    try:
        yield
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
        raise
    except KeyboardInterrupt:
        code = 130
        raise


def _complain(message: str, code: int) -> int:
    print(f"aisp: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
