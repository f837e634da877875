"""`mplug2 COMMAND ...`: finds the command's file and turns refusals into one line and an exit status.

Exit status: 0 done, 1 the command's own "no", 2 refused (one line on stderr), 130 interrupted. Standard
output that is lost fails the commands whose product it is, unless its reader has left; work goes on without
it.
"""

import errno
import importlib
import sys

import mplug2
from mplug2 import environment, programs, screen
from mplug2.errors import Mplug2Error, nearest

# command -> (file in tools/, what it does)
COMMANDS = {
    "train": ("train", "train a recipe, or continue its run"),
    "eval": ("evaluate", "score a run, a recipe or the shipped modules, with intervals and blind baselines"),
    "predict": ("predict", "caption, answer or classify an image or a video"),
    "download": ("download", "fetch the files of cards or of a recipe, or a released checkpoint as cards"),
    "cache": ("cache", "list, verify or prune the downloaded files"),
    "lock": ("lock", "write what a recipe is composed of, file by file, or check it"),
    "publish": ("publish", "write a run's modules as files with cards"),
    "compose": ("compose", "join modules of different origin, checked before anything is loaded"),
    "merge": ("merge", "make one module of several: soups, SLERP, task arithmetic, TIES and others"),
    "bundle": ("bundle", "write a recipe's or a run's network as one folder or tar, for any machine"),
    "quickstart": ("quickstart", "evaluate the shipped modules, train from scratch, write a report"),
    "recipes": ("recipes", "list the recipes"),
    "modules": ("modules", "list the modules and their sizes"),
    "show": ("show", "explain a recipe or a module: route, parameters, FLOPs"),
    "convert": ("convert", "turn a checkpoint of mPLUG-2, mPLUG, CLIP, a ViT or BERT into modules"),
    "parity": ("parity", "compare the modules with recorded tensors of the official code"),
    "plan": ("plan", "compile a train step for TPUs or GPUs that are not here: memory, traffic, time"),
    "bench": ("bench", "time a train step, or captions, on this machine"),
}


def usage() -> str:
    """The text of `mplug2 --help`."""
    lines = [f"  {command:<11} {summary}" for command, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mplug2 COMMAND ...",
            "",
            "A zoo of multimodal modules for JAX, and the network that composes them.",
            "",
            "commands:",
            *lines,
            "",
            "mplug2 COMMAND --help explains a command; mplug2 --version prints the version.",
        ]
    )


SHOWING = ("bench", "cache", "eval", "lock", "modules", "parity", "plan", "predict", "recipes", "show")
"""Commands whose product is what they print, unless an option names a file for it."""

FILES = {"eval": "--out", "lock": "--out", "plan": "--json"}


def main(argv: list[str] | None = None) -> int:
    """Run `argv` (default: the process's own arguments) and return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    with screen.held(tell=not _shows(words)) as out:
        status = _run(words)
        out.flush()
        # `mplug2 recipes | head`: a reader that has left is no error
        if status == 0 and out.lost and out.lost.errno != errno.EPIPE and _shows(words):
            status = _refuse(out.reason)
    return status


def _shows(words: list[str]) -> bool:
    """Is what is printed all that comes of it?"""
    command, rest = (words or [""])[0], words[1:]
    if command not in COMMANDS or {"-h", "--help"} & set(rest):
        return True
    file = FILES.get(command, "")
    written = any(len(word) > 3 and file.startswith(word.partition("=")[0]) for word in rest)
    return command in SHOWING and not written


def _run(words: list[str]) -> int:
    try:
        return _dispatch(words)
    except Mplug2Error as error:
        return _refuse(str(error))
    except SystemExit as stop:  # argparse has printed a help text
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        screen.note("interrupted")
        return 130
    except (ValueError, RuntimeError, AssertionError) as error:
        if reason := environment.said_by_jax(error):
            return _refuse(reason)
        raise
    except OSError as error:  # a full disk, a folder that may not be written
        return _refuse(f"{error.filename or 'a file'}: {error.strerror or error}")
    except Exception as error:
        from mplug2.mistakes import line_of, sentence

        if line := line_of(error):  # of the user's own code, wherever it was called
            return _refuse(f"{line}: {sentence(error)}")
        raise


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"mplug2 {mplug2.__version__}")
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        return _refuse(
            f'there is no command "{command}"{nearest(command, COMMANDS)}; "mplug2 --help" lists them'
        )
    environment.check(command)
    programs.keep()
    tool = importlib.import_module(f"mplug2.tools.{COMMANDS[command][0]}")
    if "jax" in sys.modules:
        programs.mend()
    return tool.main(rest) or 0


def _refuse(reason: str) -> int:
    screen.note(f"error: {reason}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
