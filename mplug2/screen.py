"""The one gate between the work and the screen: what a terminal shows is printable, and a screen that is lost
ends nothing.

A terminal obeys what it is sent: escape sequences, carriage returns and signs that turn the direction of
writing. Answers, names, fields of cards and messages of libraries are strangers' text, so everything that is
printed while `held` lasts passes `shown`. Tables, colours and bars are mplug2.console's.
"""

import os
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

_PACKAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")


def shown(text: str) -> str:
    """`text` with whatever a terminal would obey instead of showing it written as JSON escapes it
    (`\\u001b`), so that printed JSON means the same as before. Lines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(letter if _harmless(letter) else escaped(letter) for letter in text.replace("\r\n", "\n"))


def printable(text: str, most: int = 2000) -> str:
    """`text` as one line that is `shown`, cut after `most` letters: a stranger may have written it."""
    line = shown(" ".join(text.split()))
    return line if len(line) <= most else f"{line[:most]}..."


def escaped(letter: str) -> str:
    """`"\\x1b" -> "\\\\u001b"`; two escapes for what lies beyond U+FFFF, as JSON has them."""
    units = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def _harmless(letter: str) -> bool:
    return letter.isprintable() or letter in "\n\t" or unicodedata.category(letter) == "Zs"


def note(sentence: str) -> None:
    """A line on standard error, if there is one."""
    held = isinstance(sys.stderr, Screen)
    stream = sys.stderr if held else cast(TextIO, Screen(Sink(sys.stderr, "standard error", None)))
    print(f"mplug2: {printable(sentence)}", file=stream, flush=True)


def _goes_on(reason: str) -> None:
    note(f"warning: {reason}; the work goes on without it")


def _warner(before: Callable[..., None]) -> Callable[..., None]:
    """What the zoo warns of, as a sentence; what other libraries warn of as they would have it."""

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        if category is UserWarning and os.path.abspath(filename).startswith(_PACKAGE):
            note(f"warning: {message}")
        else:
            before(message, category, filename, *rest)

    return show


class Sink:
    """A text stream that may be lost: written to after that, it takes everything and raises nothing. What its
    encoding lacks is escaped. `tell` is told, once, what is lost and why."""

    def __init__(self, stream: TextIO | None, name: str, tell: Callable[[str], None] | None = _goes_on):
        self.stream, self.name, self.lost = stream, name, cast(OSError | None, None)
        self._tell = tell

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    @property
    def reason(self) -> str:
        """A clause: which stream is lost, and why."""
        return f"{self.name} is lost ({self.lost and self.lost.strerror or 'it is closed'})"

    def write(self, text: str) -> int:
        if text and self.lost is None:
            self._try(lambda stream: self._write(stream, text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        if self.stream is not None and self.lost is None:
            self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        with suppress(OSError, ValueError, AttributeError):
            return cast(TextIO, self.stream).isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _write(self, stream: TextIO, text: str) -> None:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            stream.write("".join(map(self._encodable, text)))

    def _encodable(self, letter: str) -> str:
        try:
            letter.encode(self.encoding)
            return letter
        except UnicodeEncodeError:
            return escaped(letter)

    def _try(self, use: Callable[[TextIO], object]) -> None:
        try:
            if self.stream is None:
                raise OSError
            use(self.stream)
        except OSError as error:
            self._lose(error)
        except ValueError:  # I/O operation on closed file
            self._lose(OSError())

    def _lose(self, error: OSError) -> None:
        self.lost = error
        with suppress(OSError, ValueError, AttributeError):
            # What is buffered would be tried again as Python ends, which then exits with 120.
            if (number := cast(TextIO, self.stream).fileno()) in (1, 2):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
        if self._tell is not None:
            self._tell(self.reason)


class Screen:
    """What `sys.stdout` and `sys.stderr` are while they are `held`: everything written is `shown`. Rich has
    escape sequences of its own, and finds the sink by the name that it looks for."""

    def __init__(self, sink: Sink):
        self.rich_proxied_file = sink

    def write(self, text: str) -> int:
        return self.rich_proxied_file.write(shown(text))

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def held(tell: bool = True) -> Iterator[Sink]:
    """Both standard streams, and what the zoo warns of, pass the gate until the block ends. Gives that of
    standard output, which knows whether it is lost; with `tell` that is said on standard error as soon as it
    happens."""
    _open_standard_descriptors()
    before = sys.stdout, sys.stderr
    out = Sink(sys.stdout, "standard output", _goes_on if tell else None)
    err = Sink(sys.stderr, "standard error", None)
    sys.stdout, sys.stderr = cast(TextIO, Screen(out)), cast(TextIO, Screen(err))
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warner(warnings.showwarning)
            yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def _open_standard_descriptors() -> None:
    """A file opened later would get the number of a standard stream that is closed (`>&-`), and libraries
    that write there would write into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
