"""A failed save is said once, in a sentence: its error is raised. What libraries print of it beside that,
from threads of their own, is left out.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class _SaidElsewhere(logging.Filter):
    """What is printed unless this says that it was said elsewhere."""

    def __init__(self, before: Callable[[Any], object]):
        super().__init__()
        self.before = before

    def filter(self, record: logging.LogRecord) -> bool:
        """Orbax logs the traceback of whatever one of its threads raises."""
        return not (record.exc_info and "orbax" in Path(record.pathname).parts)

    def unraisable(self, raised: Any) -> None:
        """TensorStore has one where a write ends after the event loop that waited for it, which another's
        failure has ended."""
        error = raised.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self.before(raised)


def say_once() -> None:
    """From here on. Called before each save: test runners and notebooks put hooks of their own in place."""
    hook = sys.unraisablehook
    if not isinstance(getattr(hook, "__self__", None), _SaidElsewhere):
        quiet = _SaidElsewhere(hook)
        sys.unraisablehook = quiet.unraisable
        logger = logging.getLogger("absl")
        for old in [one for one in logger.filters if isinstance(one, _SaidElsewhere)]:
            logger.removeFilter(old)
        logger.addFilter(quiet)
