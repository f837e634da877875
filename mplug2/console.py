"""Rich's console behind mplug2.screen's gate: a caption `[red]` is text, and styles are given by `Text`."""

import sys
from collections.abc import Iterable
from typing import IO, Any, cast

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from mplug2.screen import Sink, shown

WIDTH_OF_A_PIPE = 120


def console() -> "Console":
    """Of standard output. Tables as wide as the terminal; into a pipe, as wide as is read well."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console(width=None if terminal else WIDTH_OF_A_PIPE)


def bold(text: str) -> Text:
    return Text(text, style="bold")


class Console(rich.console.Console):
    """Writes what it is given as it is: neither markup nor emoji names are looked for. Control sequences are
    those of rich alone, and a screen that is lost raises nothing."""

    _guard: Sink | None = None

    def __init__(self, **settings: Any):
        super().__init__(**{"markup": False, "highlight": False, "emoji": False, **settings})

    def _guarded(self) -> IO[str]:
        file = super().file
        while not isinstance(file, Sink) and hasattr(file, "rich_proxied_file"):
            file = cast(Any, file).rich_proxied_file
        if isinstance(file, Sink):
            return cast(IO[str], file)
        if self._guard is None or self._guard.stream is not file:
            self._guard = Sink(cast(Any, file), f"standard {'error' if self.stderr else 'output'}")
        return cast(IO[str], self._guard)

    file = property(_guarded, rich.console.Console.file.fset)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(shown(text), **settings)  # here, so that tables know how wide it is

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=shown(segment.text))
