"""Words of a command line: options with the nearest name of what is misspelt, numbers that are numbers, text
that is text. A refusal is one sentence, as everywhere."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mplug2.errors import Mplug2Error, nearest


class UsageError(Mplug2Error):
    """Words that a command does not understand."""


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are UsageErrors. `type=int` takes what 64 bits hold and `type=float` what is
    finite; no word may be empty, unless that is an option's default, nor bytes that are not UTF-8, unless a
    file has that name."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.register("type", int, _whole)
        self.register("type", float, _finite)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None:  # the chosen one looks at its own words
            self._check_options(words)
        return super().parse_known_args(words, namespace)

    def _check_options(self, words: Sequence[str]) -> None:
        """Before argparse, which would miss a required option before it tells of a misspelt one."""
        known = self._option_string_actions
        for word in words[: words.index("--")] if "--" in words else words:
            name = word.partition("=")[0]
            is_option = re.match(r"-[^\d.\s]", name) and " " not in word  # as argparse tells them from values
            begins = name if name.startswith("--") else name[:2]
            if is_option and not any(option.startswith(begins) for option in known):
                self.error(f'there is no option "{name}"{nearest(name, known)}')

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if not arg_string.strip() and action.default != "":
            raise argparse.ArgumentError(action, "expected a value, got an empty word")
        if not _is_text(arg_string):
            raise argparse.ArgumentError(
                action, f'"{arg_string}" is not UTF-8, and no file is called so: was it written in Latin-1?'
            )
        return super()._get_value(action, arg_string)  # pyright: ignore[reportAttributeAccessIssue]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)  # pyright: ignore[reportAttributeAccessIssue]
        except argparse.ArgumentError as error:
            error.message += nearest(str(value), map(str, action.choices or ()))
            raise

    def error(self, message: str) -> NoReturn:
        raise UsageError(f'{self.prog}: {message}; "{self.prog} --help" explains it')


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return "\0" not in word and os.path.lexists(word)
    return "\0" not in word


def _whole(word: str) -> int:
    number = int(word) if re.fullmatch(r"\s*[-+]?[\d_]{1,20}\s*", word) else 1 << 63
    if not -(1 << 63) <= number < 1 << 63:
        raise argparse.ArgumentTypeError(f'expected a whole number, got "{word}"')
    return number


def at_least(least: int) -> Callable[[str], int]:
    """The `type` of a whole number that must not be less."""

    def read(word: str) -> int:
        if (number := _whole(word)) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {number}")
        return number

    return read


def _finite(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f'expected a finite number, got "{word}"')
    return number
