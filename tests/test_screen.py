"""What is printed: harmless to the terminal, in any encoding, and a screen that is lost ends nothing."""

import errno
import io
import json
import os
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table

from mplug2 import screen
from mplug2.console import Console
from mplug2.logbook import Logbook
from mplug2.tools import main as dispatcher
from mplug2.tools.main import main

ROOT = Path(__file__).parent.parent

HOSTILE = {
    "escape": "\x1b[2J",
    "title": "\x1b]0;owned\x07",
    "C1": "\x9b31m",
    "carriage return": "right\rwrong",
    "bidi": "\u202egnp.exe",
    "isolate": "\u2066x\u2069",
    "surrogate": "caf\udce9",
    "delete": "a\x7fb",
    "backspace": "a\x08b",
    "line separator": "a\u2028b",
    "tag": "\U000e0041",
}
hostile = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)


def harmless(text: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in text)


class Broken(io.StringIO):
    """A stream whose writes fail, at once or when they are flushed."""

    def __init__(self, number: int, buffered: bool = False):
        super().__init__()
        self.number, self.buffered = number, buffered

    def write(self, text: str) -> int:
        if not self.buffered:
            raise OSError(self.number, os.strerror(self.number))
        return len(text)

    def flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


def in_encoding(encoding: str, errors: str = "strict") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)


def written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)  # pyright: ignore[reportAttributeAccessIssue]


# --- what a terminal would obey


@hostile
def test_what_a_terminal_would_obey_is_shown_instead(text, monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    with screen.held():
        print(text)
        sys.stdout.writelines([text, "\n"])
        print(text, file=sys.stderr)
        screen.note(text)
    assert harmless(out.getvalue()) and harmless(err.getvalue())
    assert out.getvalue().count("\\u") >= 2


@hostile
def test_tables_and_bars_show_text_and_keep_their_own_colours(text, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    with screen.held():
        console = Console(force_terminal=True, color_system="standard", width=70)
        table = Table("name", title=text)
        table.add_row(f"[red]{text}[/red]")
        console.print(table)
        console.print(text, style="bold")
        with Progress(TextColumn("{task.description}", markup=False), console=console) as bar:
            bar.add_task(text)
    said = out.getvalue()
    assert "[red]" in said and "\x1b[1m" in said  # markup is text, and bold is rich's own
    for own in ("\x1b", "\r"):
        said = said.replace(own, "")
    assert harmless(said) and "\x1b]" not in out.getvalue() and text not in out.getvalue()


def test_a_table_is_as_wide_as_what_it_shows():
    out = io.StringIO()
    table = Table("name")
    table.add_row("\x1b\x1b")
    table.add_row("plain")
    Console(file=out).print(table)
    assert len({len(line) for line in out.getvalue().splitlines()}) == 1
    assert "\\u001b\\u001b" in out.getvalue()  # whole


@hostile
def test_printed_json_means_the_same(text, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    with screen.held():
        print(json.dumps({"caption": text}))
    assert harmless(out.getvalue()) and json.loads(out.getvalue()) == {"caption": text}


def test_other_writing_stays_as_it_is():
    for text in ("plain", "caf\u00e9", "\u4e00\u3000\u4e8c", "a\tb\nc", "\U0001f600", "1\u00a0000"):
        assert screen.shown(text) == text
    assert {unicodedata.category(letter) for letter in "\u3000\u00a0"} == {"Zs"}


def test_a_refusal_is_one_line_of_bounded_length(capsys):
    assert main(["predict\x1b[2J\n" + "x" * 100_000]) == 2
    said = capsys.readouterr().err
    assert harmless(said) and said.count("\n") == 1 and len(said) < 3000


# --- encodings


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_an_encoding_lacks_is_escaped(encoding, monkeypatch):
    out = in_encoding(encoding)
    monkeypatch.setattr("sys.stdout", out)
    with screen.held():
        print("\u2192 caf\u00e9 \U0001f600 \udce9")
        console = Console(force_terminal=True, width=60)
        table = Table("\u4e00", title="\u2026")
        table.add_row("\u2603")
        console.print(table)
        with Progress(console=console) as bar:
            bar.advance(bar.add_task("\u2603", total=2))
    said = written(out)
    assert "caf" in said and ("\\u2192" in said) == (encoding != "utf-8")


@pytest.mark.parametrize("words", [["recipes"], ["show", "vision-small"], ["compose", "--help"], ["--help"]])
def test_lists_cards_and_help_are_printed_in_ascii(words, monkeypatch):
    out = in_encoding("ascii")
    monkeypatch.setattr("sys.stdout", out)
    assert main(words) == 0
    assert len(written(out)) > 100


# --- a screen that is lost


LOST = {
    "pipe": lambda: Broken(errno.EPIPE),
    "full": lambda: Broken(errno.ENOSPC),
    "full when flushed": lambda: Broken(errno.ENOSPC, buffered=True),
    "bad descriptor": lambda: Broken(errno.EBADF),
    "terminal gone": lambda: Broken(errno.EIO),
    "none": lambda: None,
    "closed": lambda: closed(),
}


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("words", [["recipes"], ["--version"], ["train", "--help"]])
def test_a_lost_screen_fails_what_it_was_for_in_one_sentence(kind, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", LOST[kind]())
    status, said = main(words), capsys.readouterr().err
    if kind == "pipe":  # its reader has left
        assert (status, said) == (0, "")
    else:
        assert status == 2 and said.startswith("mplug2: error: standard output is lost (")
        assert said.count("\n") == 1


@pytest.mark.parametrize("kind", LOST)
def test_work_goes_on_without_its_screen_and_says_so_once(kind, monkeypatch, capsys, tmp_path):
    class Tool:
        @staticmethod
        def main(argv: list[str]) -> None:
            with Logbook(tmp_path, name="x", step=0, steps=3, examples=1) as logbook:
                for step in (1, 2, 3):
                    print("a line", flush=True)
                    logbook.say("another")
                    logbook.log(step, {"loss": 1.0})

    monkeypatch.setitem(sys.modules, "mplug2.tools.train", Tool)
    monkeypatch.setattr("sys.stdout", LOST[kind]())
    assert main(["train", "anything"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("mplug2: warning: standard output is lost (") and said.count("\n") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("kind", LOST)
def test_statuses_are_the_same_without_standard_error(kind, monkeypatch):
    monkeypatch.setattr("sys.stderr", LOST[kind]())
    assert main(["recipe"]) == 2 and main(["recipes"]) == 0
    monkeypatch.setattr("sys.stdout", LOST[kind]())
    assert main(["recipes"]) == (0 if kind == "pipe" else 2)


def test_a_product_that_goes_to_a_file_needs_no_screen(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdout", None)
    assert main(["lock", "image_caption.tiny", "--out", str(tmp_path / "a.json")]) == 0
    assert main(["lock", "image_caption.tiny"]) == 2


def test_a_logbook_outside_of_a_command_loses_its_screen_too(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdout", Broken(errno.EIO))
    with Logbook(tmp_path, name="x", step=0, steps=1, examples=1) as logbook:
        logbook.log(1, {"loss": 1.0})
        logbook.say("finished")


def child(redirected: str) -> subprocess.CompletedProcess[str]:
    command = f"set -o pipefail; {sys.executable} -m mplug2.tools.main {redirected}"
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)


def test_a_process_that_loses_its_screen_ends_without_another_word():
    """Python's own flush at exit says nothing, and no descriptor of a closed stream is given to a file."""
    done = child("--help > /dev/full")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left" in done.stderr
    done = child("--help >&-")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    done = child("--help >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    code = "import os; from mplug2 import screen\nwith screen.held(): print(1, flush=True)\nos.write(1, b'x')"
    command = f'{sys.executable} -c "{code}" > /dev/full'  # as libraries write, by the descriptor
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    code = "from mplug2 import screen\nwith screen.held(): print(open('/dev/null').fileno() > 2)"
    command = f'{sys.executable} -c "{code}" 2>&- <&-'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n"


def test_only_one_file_makes_consoles():
    makers = [
        path.name
        for folder in ("mplug2", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if "rich.console" in path.read_text()
    ]
    assert makers == ["console.py"]


def test_every_command_is_known_as_one_that_shows_or_works():
    assert set(dispatcher.SHOWING) <= set(dispatcher.COMMANDS) and set(dispatcher.FILES) <= set(
        dispatcher.SHOWING
    )


def test_what_the_zoo_warns_of_is_a_sentence_and_what_others_warn_of_stays(capsys):
    ours, others = str(Path(screen.__file__).parent / "checkpoint.py"), []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: others.append(str(message))
        with screen.held():
            warnings.warn_explicit("a\x1b[2J checkpoint\nis damaged", UserWarning, ours, 7)
            warnings.warn_explicit("mend it", UserWarning, "/elsewhere/jax.py", 7)
            warnings.warn_explicit("another name", DeprecationWarning, ours, 8)
        warnings.warn_explicit("later", UserWarning, ours, 9)
    assert others == ["mend it", "another name", "later"]
    assert capsys.readouterr().err == "mplug2: warning: a\\u001b[2J checkpoint is damaged\n"
