"""Publications that are raced, killed and starved of room; what is in the folder then. As a program, which
forks its publishers (`python publishers.py races 200 1 FOLDER`), it prints what it counted as JSON."""

import contextlib
import errno
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mplug2 import hub
from mplug2.errors import Mplug2Error
from mplug2.hub import gate, publishing
from mplug2.hub.card import COMMITTED, Tokens, Trained, card_files
from mplug2.hub.publication import publication
from mplug2.modules import heads
from mplug2.network import nested

MODULES: dict[str, Any] = {
    "contrastive": heads.ContrastiveConfig(width=8, space=4),
    "vision_classifier": heads.ClassifierConfig(width=8, classes=3),
}


def publish(folder: Path, number: int) -> None:
    """A publication of two modules, a tokenizer and the page, in which everything states `number`."""
    words = f"[PAD]\n{number}\n".encode()
    tokens = Tokens(
        file="words.txt", sha256=hashlib.sha256(words).hexdigest(), ids={"pad": 0}, kind="wordpiece"
    )
    facts = Trained(recipe="r", commit="c", steps=1, seed=number, data="d", machine="m")
    with publication(folder, page="") as new:
        (new.staged / tokens.file).write_bytes(words)
        for module, config in MODULES.items():
            shapes = gate.shapes(config, module)
            arrays = {tuple(n.split(".")): np.full(s.shape, number, np.float32) for n, s in shapes.items()}
            params = nested(arrays)
            publishing.write(
                new.staged, f"{module}-x", module, config, params, trained=facts, tokenizer=tokens
            )


def opened(folder: Path) -> int:
    """The number of the publication that is in the folder, whole. Raises AssertionError for a mixture."""
    return hub.again(lambda: _opened(folder))


def _opened(folder: Path) -> int:
    cards = hub.cards(folder)
    assert set(cards) == set(MODULES), sorted(cards)
    seen = set()
    for card in cards.values():
        assert card.trained and card.tokenizer
        numbers = {float(array.ravel()[0]) for array in hub.stored(card).values()}
        seen |= numbers | {card.trained.seed}
        try:
            words = (card.folder / card.tokenizer.file).read_bytes()
        except FileNotFoundError:
            raise hub.Republished("its tokenizer is gone") from None
        assert hashlib.sha256(words).hexdigest() == card.tokenizer.sha256
    assert len(seen) == 1, seen
    return int(seen.pop())


def files_of(folder: Path) -> tuple[set[str], set[str]]:
    """(what there is, what the cards name): alike where nothing is left over."""
    there = {path.name for path in folder.iterdir()}
    named = {"README.md"} | {path.name for path in card_files(folder)}
    for card in hub.cards(folder).values():
        named |= {card.file.path, card.tokenizer.file if card.tokenizer else ""}
    return there, named


@contextlib.contextmanager
def full(after: Callable[[list[int]], bool]) -> Iterator[list[int]]:
    """Whatever takes room on a disk fails with ENOSPC when `after` (bytes or calls so far: the list that is
    given holds both) says so."""
    used = [0, 0]

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*words: Any, **more: Any) -> Any:
            if name not in ("open", "fdopen") or (name == "open" and words[1] & os.O_CREAT):
                take(0)
            made = None if name == "fsync" else real(*words, **more)  # which takes its time
            return Limited(made) if name == "fdopen" and "w" in words[1] else made

        return call

    def take(size: int) -> None:
        used[0] += size
        used[1] += 1
        if after(used):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Limited:
        def __init__(self, file: Any):
            self.file = file

        def write(self, piece: Any) -> int:
            take(memoryview(piece).nbytes)
            return self.file.write(piece)

        def __enter__(self) -> "Limited":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def flush(self) -> None:
            self.file.flush()

    names = ("fdopen", "fsync", "replace", "rename", "mkdir", "open")
    before = {name: getattr(os, name) for name in names}
    try:
        for name in names:
            setattr(os, name, counted(name))
        yield used
    finally:
        for name, function in before.items():
            setattr(os, name, function)


def starved(folder: Path, number: int, after: Callable[[list[int]], bool]) -> tuple[bool, list[int]]:
    """Whether a publication came through, and what it used."""
    with full(after) as used:
        try:
            publish(folder, number)
            return True, used
        except Mplug2Error as error:
            assert "No space left on device" in str(error) and ".publishing-" not in str(error), str(error)
            return False, used


# --- A program


def child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            work()
            status = 0
        os._exit(status)
    return pid


def ended(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] == pid


def races(folder: Path, count: int, chance: random.Random) -> Counter[str]:
    """Two publish at once, and a third reads all the time."""
    counts: Counter[str] = Counter()
    publish(folder, 0)
    before, number = 0, 0
    for _ in range(count):
        waits = [chance.uniform(0, 0.004) for _ in range(2)]
        both = [number + 1, number + 2]
        number += 2
        running = [
            child(lambda n=n, wait=wait: (time.sleep(wait), publish(folder, n))[1])
            for n, wait in zip(both, waits, strict=True)
        ]
        while running:
            assert opened(folder) in (before, *both)
            counts["reads"] += 1
            running = [pid for pid in running if not ended(pid)]
        before = opened(folder)
        assert before in both, (before, both)
        counts["first" if before == both[0] else "second"] += 1
        there, named = files_of(folder)
        assert there == named, (there, named)
    return counts


def kills(folder: Path, count: int, chance: random.Random) -> Counter[str]:
    """SIGKILL at a random instant of a publication."""
    counts: Counter[str] = Counter()
    publish(folder, 0)
    began = time.perf_counter()
    for _ in range(5):
        os.waitpid(child(lambda: publish(folder, 0)), 0)
    takes, before = (time.perf_counter() - began) / 5, 0
    for number in range(1, count + 1):
        pid = child(lambda n=number: publish(folder, n))
        time.sleep(chance.uniform(0, 1.2 * takes))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        found = opened(folder)
        assert found in (before, number), (before, number, found)
        there, named = files_of(folder)
        counts["new" if found == number else "old"] += 1
        counts["killed"] += os.WIFSIGNALED(status)
        counts["with leftovers"] += there != named
        counts["committed, not settled"] += COMMITTED in there
        before = found
    publish(folder, 0)
    there, named = files_of(folder)
    assert there - named <= {"words.txt"}, (
        there,
        named,
    )  # which may be a user's: it does not say whose it is
    return counts


def disks(folder: Path, count: int, chance: random.Random) -> Counter[str]:
    """A disk that has room for a random number of bytes, or of calls, and stays full."""
    counts: Counter[str] = Counter()
    publish(folder, 0)
    _, (size, calls) = starved(folder, 0, lambda used: False)
    before = 0
    for number in range(1, count + 1):
        kind = chance.randrange(2)
        room = chance.uniform(0, 1.1 * (size, calls)[kind])
        there_before = files_of(folder)[0]
        through, _ = starved(folder, number, lambda used, kind=kind, room=room: used[kind] > room)
        found = opened(folder)
        assert found in (before, number) and (found == number or not through), (before, number, found)
        counts["new" if found == number else "old"] += 1
        there, named = files_of(folder)
        assert found == number or there <= there_before | named, (there, named)
        before = found
    return counts


if __name__ == "__main__":
    what, count, seed, folder = sys.argv[1:]
    began = time.perf_counter()
    found = {"races": races, "kills": kills, "disks": disks}[what](
        Path(folder), int(count), random.Random(int(seed))
    )
    print(json.dumps({**found, "seconds": round(time.perf_counter() - began, 1)}))
