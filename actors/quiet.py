"""What other libraries print that is about their own future, or about what they looked for while they were imported:
nothing that a user of ours can act on."""

from __future__ import annotations

import logging
import sys
import warnings


def libraries() -> None:
    """Silence it in this process, progress bars included. Call again once transformers is imported. Python's own switch
    (-W, PYTHONWARNINGS) decides about warnings where it is given."""
    if not sys.warnoptions:
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it reports the extensions that it did not find
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        for handler in logging.getLogger("transformers").handlers:
            handler.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "deprecat" not in record.getMessage().lower()
