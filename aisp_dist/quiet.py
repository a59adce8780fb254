"""What other libraries print that is about their own future, about what they looked for while they were imported, or
about how far they are: nothing that a user of ours can act on. Python's own switch (-W, PYTHONWARNINGS) decides about
warnings where it is given."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

# torchao and bitsandbytes (peft imports both) report the extensions that they did not find, torch's pytree the
# deprecated calls that torchao makes
_TALKERS = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")

_one_load = threading.RLock()  # loads nest


def libraries() -> None:
    """Silence them from now on, in a process of our own. Call again once transformers is imported."""
    if not sys.warnoptions:
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        for handler in logging.getLogger("transformers").handlers:
            handler.addFilter(_is_news)


@contextmanager
def loading() -> Iterator[None]:
    """Silence them, and transformers' progress bars, while a model is imported and loaded. Every load happens in here,
    also in a user's own process, whose settings it restores; one thread at a time, as neither these settings nor
    transformers' from_pretrained, which patches torch while it runs, can be shared."""
    with _one_load, _silenced():
        yield


@contextmanager
def _silenced() -> Iterator[None]:
    levels = {logger: logger.level for logger in map(logging.getLogger, _TALKERS)}
    own = logging.getLogger("transformers").handlers  # which it sets when it is imported
    filters = {handler: list(handler.filters) for handler in own}
    with warnings.catch_warnings():
        libraries()
        from transformers import modeling_gguf_pytorch_utils as gguf
        from transformers.utils import logging as theirs

        bars, bar = theirs.is_progress_bar_enabled(), gguf.tqdm
        libraries()
        theirs.disable_progress_bar()
        gguf.tqdm = partial(bar, disable=True)  # of dequantising, which the switch does not reach
        try:
            yield
        finally:
            gguf.tqdm = bar
            if bars:
                theirs.enable_progress_bar()
            for handler in own:
                handler.filters = filters.get(handler, [])
            for logger, level in levels.items():
                logger.setLevel(level)


def _is_news(record: Any) -> bool:
    return "deprecat" not in record.getMessage().lower()
