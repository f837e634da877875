"""Downloads from a server that misbehaves: the file is right or the refusal is clear, and the cache never
holds a wrong file."""

import dataclasses
import hashlib
import random
import time
from collections import Counter
from typing import ClassVar

import pytest
from misbehaving import CONTENT, QUICK, TRICKS, Heard, Server, Wanted, planned, right  # pyright: ignore[reportMissingImports]

from mplug2.errors import DownloadError
from mplug2.hub import remote
from mplug2.hub.cache import Cache
from mplug2.hub.download import fetch
from mplug2.hub.meter import Bar
from mplug2.hub.remote import Patience

pytestmark = pytest.mark.usefixtures("online")


def got(cache: Cache, *tricks: str, patience: Patience = QUICK) -> list[tuple[str, str, int]]:
    """Fetches from one address that does `tricks`, checks the file, and returns the server's log."""
    with Server(CONTENT, planned(*tricks)) as server:
        path = fetch(Wanted((server.url("f"),)), cache, patience=patience)
    assert path.read_bytes() == CONTENT and path == cache.path(Wanted(()).sha256)
    return server.log


# --- one trick at a time


@pytest.mark.parametrize("trick", TRICKS)
def test_every_trick_ends_with_the_right_file_or_a_clear_refusal(trick, cache):
    with Server(CONTENT, planned("drop", trick, trick, "good")) as server:
        url = server.url("f")
        try:
            assert fetch(Wanted((url,)), cache, patience=QUICK).read_bytes() == CONTENT
        except DownloadError as error:
            assert f"vision.safetensors (sha256 {Wanted(()).sha256}" in str(error) and url in str(error)
            assert not cache.entries()
    assert right(cache)


@pytest.mark.parametrize(
    ("tricks", "said"),
    [
        (["missing"], "answers 404 Not Found"),
        (["busy"], r"answers 429 .*\(4 times in a row\)"),
        (["wrong_bytes"], "sent a file of sha256"),
        (["longer"], "has 20004 bytes, expected 20000"),
        (["shorter"], "has 19999 bytes, expected 20000"),
        (["endless"], "sent a file of sha256"),
        (["stall"], r"the connection broke \(timed out\)|too slow: \d+ bytes in"),  # on a busy machine
        (["to_file"], "redirects to 'file:///etc/hostname'; addresses of files begin with https://"),
        (["in_circles"], "more than 5 redirects"),
        (["garbage"], "not an answer of HTTP"),
        (["coded"], "another coding, gzip"),
        (["slow_head"], r"the connection broke \(no whole answer in 0.1 s\)"),
        (["drop_at_once"], "the connection broke"),
        (["unasked_range"], 'answers 206 with "bytes 0-10000/20000" to a request for bytes from 0 on'),
    ],
)
def test_a_refusal_says_what_the_server_did(tricks, said, cache):
    with Server(CONTENT, planned(*tricks)) as server, pytest.raises(DownloadError, match=said):
        fetch(Wanted((server.url("f"),)), cache, patience=QUICK)
    assert not cache.entries()


def test_what_came_before_a_connection_broke_is_not_asked_for_again(cache):
    log = got(cache, "drop", "drop", "drop", "good")
    starts = [start for _, _, start in log]
    assert starts[0] == 0 and sorted(starts) == starts and starts[-1] > 0


@pytest.mark.parametrize("trick", ["wrong_range", "changed"])
def test_a_part_that_does_not_continue_the_first_is_not_glued_to_it(trick, cache):
    with Server(CONTENT, planned("drop", trick, "good", "good")) as server:
        server.changed.discard("f")
        if trick == "changed":  # away and back again: the first part was of the right file
            server.plan = lambda path: (server.changed.clear(), "good")[1] if len(server.log) > 1 else "drop"
        assert fetch(Wanted((server.url("f"),)), cache, patience=QUICK).read_bytes() == CONTENT


def test_a_part_of_a_file_with_another_tag_is_refused_before_a_byte_of_it_is_read(cache):
    def other(self, request, content, tag, start, path):  # a server that heeds Range and not If-Range
        self._send(request, content, '"two"' if start else tag, start)

    with Server(CONTENT, planned("drop", "other", "good")) as server:
        server._other = other.__get__(server)  # pyright: ignore[reportAttributeAccessIssue]
        fetch(Wanted((server.url("f"),)), cache, patience=QUICK)
    first, asked, again = (start for *_, start in server.log)
    assert first == again == 0 < asked


def test_a_glued_file_that_is_wrong_is_fetched_once_more_in_one_piece(cache):
    assert [start for *_, start in got(cache, "drop", "wrong_tail", "good")][-1] == 0


def test_without_a_validator_a_broken_download_begins_again(cache):
    for trick in ("no_tag", "weak_tag"):
        log = got(Cache(cache.folder / trick), trick, "good")
        assert all(start == 0 for *_, start in log)


def test_a_server_is_given_the_time_it_asks_for_but_not_more(cache, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(
        Server, "_busy", lambda self, request, *_: self._status(request, 429, Retry_After="7")
    )
    patience = dataclasses.replace(QUICK, longest_wait=10)
    got(cache, "busy", "busy", "good", patience=patience)
    assert slept[:2] == [7, 7]
    with Server(CONTENT, planned("busy")) as server, pytest.raises(DownloadError, match="asks to wait 7 s"):
        other = Cache(cache.folder / "other")
        fetch(Wanted((server.url("f"),)), other, patience=dataclasses.replace(QUICK, longest_wait=5))


def test_waits_grow_and_stay_bounded(cache, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    patience = dataclasses.replace(QUICK, attempts=8, backoff=1, longest_wait=10)
    with Server(CONTENT, planned("failing")) as server, pytest.raises(DownloadError):
        fetch(Wanted((server.url("f"),)), cache, patience=patience)
    assert len(slept) == 7
    assert all(0.5 * full <= wait <= full for wait, full in zip(slept, [1, 2, 4, 8, 10, 10, 10], strict=True))


def test_a_trickle_of_bytes_is_too_slow(cache, monkeypatch):
    def trickle(self, request, content, tag, start, path):
        self._send(request, content, tag, start, cut=0)
        for at in range(start, len(content)):
            request.wfile.write(content[at : at + 1])
            time.sleep(0.01)

    monkeypatch.setattr(Server, "_good", trickle)
    patience = dataclasses.replace(QUICK, slowest=10_000)
    with Server(CONTENT, planned("good")) as server, pytest.raises(DownloadError, match="too slow: "):
        fetch(Wanted((server.url("f"),)), cache, patience=patience)


def test_a_bar_belongs_to_its_own_file(cache, monkeypatch):
    """The second file begins while the first one's bar is on the screen."""

    class Progress:
        bars: ClassVar[dict[int, list]] = {}

        def start(self):
            pass

        def add_task(self, name, total):
            self.bars[len(self.bars)] = [name, total, 0]
            return len(self.bars) - 1

        def update(self, task, completed):
            self.bars[task][2] = completed

    monkeypatch.setattr("mplug2.hub.meter._progress", Progress)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bar, other = Bar(), CONTENT[:5000]
    second = Wanted((), "b", hashlib.sha256(other).hexdigest(), len(other))
    for content, wanted in ((CONTENT, Wanted(())), (other, second)):
        with Server(content, planned("drop", "good")) as server:
            wanted = dataclasses.replace(wanted, urls=(server.url("f"),))
            fetch(wanted, cache, patience=QUICK, meter=bar)
    expected = [["vision.safetensors", 20000, 20000], ["b", 5000, 5000]]
    assert list(Progress.bars.values()) == expected


def test_the_next_address_is_tried_and_the_failure_told(cache):
    heard = Heard()
    with Server(CONTENT, lambda path: {"a": "missing", "b": "wrong_bytes"}.get(path, "good")) as server:
        urls = tuple(map(server.url, "abc"))
        assert fetch(Wanted(urls), cache, patience=QUICK, meter=heard).read_bytes() == CONTENT
    assert [path for path, *_ in server.log] == ["a", "b", "c"]
    assert "404" in heard.sentences[0] and heard.places[-1] == len(CONTENT)


def test_no_more_than_the_stated_bytes_are_read(cache, monkeypatch):
    read: list[int] = []
    real = remote._watched
    monkeypatch.setattr(
        remote,
        "_watched",
        lambda reader, patience: real(lambda n: (piece := reader(n), read.append(len(piece)))[0], patience),
    )
    with Server(CONTENT, planned("endless")) as server, pytest.raises(DownloadError):
        fetch(Wanted((server.url("f"),)), cache, patience=QUICK)
    assert sum(read) == len(CONTENT)


# --- offline, and the disk


def test_offline_says_what_is_missing_and_where_it_belongs(cache, monkeypatch):
    monkeypatch.setenv("MPLUG2_OFFLINE", "1")
    wanted = Wanted(("https://example.org/f",))
    with pytest.raises(DownloadError) as refused:
        fetch(wanted, cache)
    said = str(refused.value)
    assert (
        "MPLUG2_OFFLINE is set" in said and wanted.sha256 in said and str(cache.path(wanted.sha256)) in said
    )
    path = cache.path(wanted.sha256)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert fetch(wanted, cache) == path


def test_a_file_without_an_address_is_refused(cache):
    with pytest.raises(DownloadError, match="its card gives no address"):
        fetch(Wanted(()), cache)


def test_a_full_disk_is_our_error(cache, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match="has 0 MB left"):
        fetch(Wanted(("https://example.org/f",)), cache)


def test_a_cache_that_cannot_be_written_is_our_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot be written .*MPLUG2_CACHE names another"):
        fetch(Wanted(("https://example.org/f",)), Cache(tmp_path / "file"))


# --- many runs


@pytest.mark.parametrize("runs", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_every_run_ends_with_the_right_file_or_a_clear_refusal(runs, tmp_path):
    ends: Counter[str] = Counter()
    with Server(CONTENT, lambda path: "good", stall=0.15) as server:
        for seed in range(runs):
            draw = random.Random(seed)
            liked = [draw.choice(TRICKS) for _ in range(3)]
            server.plan = lambda path, draw=draw, liked=liked: draw.choice([*liked, "good", "drop"])
            server.random.seed(1000 + seed)
            server.changed.clear()
            cache = Cache(tmp_path / str(seed))
            urls = tuple(server.url(f"{seed}/{mirror}") for mirror in range(draw.randint(1, 3)))
            try:
                assert fetch(Wanted(urls), cache, patience=QUICK).read_bytes() == CONTENT
                ends["right"] += 1
            except DownloadError as error:
                assert all(url in str(error) for url in urls) and "\n" not in str(error)
                assert not cache.entries()
                ends["refused"] += 1
            assert right(cache)
    assert ends.total() == runs and ends["right"] > runs / 2 and ends["refused"] > runs / 20
    assert runs < 200 or {trick for _, trick, _ in server.log} == set(TRICKS)
