"""The stream: same batches for any number of threads, processes and hosts, resumed exactly."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest

from mplug2.data.handwriting import Handwriting
from mplug2.data.stream import Feed, Mixture, Stream, collate, corrupt, stream
from mplug2.data.tokens import SPECIAL, SentencePiece
from mplug2.errors import DataError

TOKENIZER = SentencePiece()
FEEDS = {
    "caption": Feed(Mixture({Handwriting("caption"): 3, Handwriting("retrieval"): 1}), 8, {"caption": 20}),
    "unmask": Feed(Handwriting("text", examples=30), 4, {"masked": 20}),
}


@dataclass(frozen=True)
class Words:
    """A text data set whose example i is the i-th of `count` repetitions of one word."""

    word: str
    count: int

    def source(self, split: str) -> "Words":
        return self

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return {"text": self.word, "index": index}


def take(steps: Stream, count: int) -> list[dict]:
    with_close = list(itertools.islice(steps, count))
    steps.close()
    return with_close


def assert_same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for feed in one:
            assert one[feed].keys() == other[feed].keys()
            for name, value in one[feed].items():
                np.testing.assert_array_equal(value, other[feed][name])


def test_a_batch_has_the_contracts_fields_shapes_and_types():
    feed = Feed(Handwriting("question", frames=4), 6, {"question": 14, "answer": 5})
    (step,) = take(stream({"answer": feed}, tokenizer=TOKENIZER), 1)
    found = {name: (value.shape, str(value.dtype)) for name, value in step["answer"].items()}
    assert found == {
        "clips": ((6, 4, 32, 32, 3), "uint8"),
        "question": ((6, 14), "int32"),
        "answer": ((6, 5), "int32"),
        "index": ((6,), "int32"),
    }


def test_labels_travel_with_their_example():
    feed = Feed(Handwriting("digit"), 32, {"caption": 12})
    (step,) = take(stream({"digit": feed}, tokenizer=TOKENIZER), 1)
    source = Handwriting("digit").source("train")
    assert [source[index]["label"] for index in step["digit"]["index"].tolist()] == step["digit"][
        "label"
    ].tolist()


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_the_order_does_not_depend_on_threads_and_resumes_exactly(threads):
    whole = take(stream(FEEDS, tokenizer=TOKENIZER, seed=3, threads=0), 9)
    first = stream(FEEDS, tokenizer=TOKENIZER, seed=3, threads=threads)
    begun = [next(first) for _ in range(4)]
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    second = stream(FEEDS, tokenizer=TOKENIZER, seed=3, threads=threads)
    second.set_state(state)
    assert_same(begun + take(second, 5), whole)


@pytest.mark.slow
def test_worker_processes_give_the_same_batches():
    whole = take(stream(FEEDS, tokenizer=TOKENIZER, threads=0), 4)
    assert_same(take(stream(FEEDS, tokenizer=TOKENIZER, workers=2), 4), whole)


def test_hosts_read_their_shares_of_the_same_global_batches():
    whole = take(stream(FEEDS, tokenizer=TOKENIZER, seed=1), 5)
    hosts = [
        take(stream(FEEDS, tokenizer=TOKENIZER, seed=1, held=of), 5)
        for of in (lambda batch: range(batch // 2), lambda batch: range(batch // 2, batch))
    ]
    joined = [
        {name: {key: np.concatenate([a[name][key], b[name][key]]) for key in a[name]} for name in a}
        for a, b in zip(*hosts, strict=True)
    ]
    assert_same(joined, whole)


def test_another_seed_is_another_order():
    first, second = (take(stream(FEEDS, tokenizer=TOKENIZER, seed=seed), 1)[0] for seed in (0, 1))
    assert first["caption"]["index"].tolist() != second["caption"]["index"].tolist()


def test_every_epoch_shows_every_example_once_in_a_new_order():
    feed = Feed(Words("red", 30), 6, {"text": 4})
    seen = [
        step["words"]["index"].tolist() for step in take(stream({"words": feed}, tokenizer=TOKENIZER), 15)
    ]
    epochs = [sum(seen[start : start + 5], []) for start in (0, 5, 10)]
    assert all(sorted(order) == list(range(30)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3


def test_a_mixture_keeps_its_weights():
    data = Mixture({Words("red", 50): 3, Words("blue", 70): 1})
    steps = take(stream({"words": Feed(data, 8, {"text": 3})}, tokenizer=TOKENIZER), 50)
    words = Counter(TOKENIZER.decode(row) for step in steps for row in step["words"]["text"])
    assert words == {"red": 300, "blue": 100}


def test_a_state_of_another_stream_is_refused():
    steps = stream(FEEDS, tokenizer=TOKENIZER, seed=3)
    with pytest.raises(DataError, match="'seed': 4"):
        steps.set_state(stream(FEEDS, tokenizer=TOKENIZER, seed=4).get_state())


def test_masking_follows_bert():
    text = "a yellow nine left of a red five left of a green seven"
    ids = np.stack([TOKENIZER.encode(text, 20)] * 4000)
    masked, target = corrupt(ids, np.arange(4000), TOKENIZER, seed=0)
    chosen = target != 0
    words = ids >= len(SPECIAL)
    assert not chosen[~words].any() and (masked[~chosen] == ids[~chosen]).all()
    np.testing.assert_array_equal(target[chosen], ids[chosen])
    assert chosen.any(axis=1).all()
    share = chosen[words].mean()
    assert 0.15 <= share < 0.15 + 0.85**13 / 13 + 0.01  # a little over 15%, because at least one is chosen
    kinds = [(masked == SPECIAL["mask"]), (masked == ids)]
    assert abs(kinds[0][chosen].mean() - 0.8) < 0.02
    assert abs(kinds[1][chosen].mean() - 0.1) < 0.02  # 10% kept; a random word is rarely the same
    assert (masked[words] >= SPECIAL["mask"]).all()


def test_masking_is_a_function_of_the_example_not_of_its_batch():
    ids = np.stack([TOKENIZER.encode("a red three above a blue five", 12)] * 3)
    whole = corrupt(ids, np.array([5, 6, 7]), TOKENIZER, seed=2)
    alone = corrupt(ids[:1], np.array([6]), TOKENIZER, seed=2)
    np.testing.assert_array_equal(whole[0][1], alone[0][0])
    other = corrupt(np.repeat(ids, 20, axis=0), np.arange(60), TOKENIZER, seed=2)[0]
    assert len({tuple(row) for row in other.tolist()}) > 20


SENTENCE = "a yellow nine left of a red five left of a green seven"


@dataclass(frozen=True)
class Drawn(Words):
    """Words whose examples also draw something of their own in every epoch."""

    def at(self, index: int, epoch: int) -> dict:
        return self[index] | {"label": 100 * epoch + index}


def met(data: object, steps: int, *, start: int = 0, seed: int = 0, batch: int = 6) -> list[dict]:
    """Batches of masked texts from step `start` on."""
    words = stream({"words": Feed(data, batch, {"masked": 18})}, tokenizer=TOKENIZER, seed=seed, threads=0)
    words.set_state(words.get_state() | {"step": start})
    return [step["words"] for step in take(words, steps)]


@pytest.mark.parametrize("data", [Words(SENTENCE, 30), Mixture({Words(SENTENCE, 30): 2, Words("red", 3): 1})])
def test_masks_are_drawn_anew_in_every_epoch(data):
    """Also of a mixture, whose parts come round at different times."""
    masks: dict[int, Counter] = {}
    for batch in met(data, 60):
        for index, text, target in zip(batch["index"], batch["masked"], batch["masked_target"], strict=True):
            if (text != 0).sum() > 10:  # "red" has one word, which is always chosen
                masks.setdefault(int(index), Counter())[(target != 0).tobytes()] += 1
    assert len(masks) == 30 and min(counts.total() for counts in masks.values()) >= 7
    assert min(len(counts) for counts in masks.values()) > 3


def test_masks_of_a_later_epoch_are_resumed_exactly_and_depend_on_the_seed():
    whole = met(Words(SENTENCE, 30), 20)
    for start in (7, 12, 19):
        resumed = met(Words(SENTENCE, 30), 20 - start, start=start)
        assert_same([{"words": batch} for batch in resumed], [{"words": batch} for batch in whole[start:]])

    def drawn(batches: list[dict]) -> set:
        rows = [zip(one["index"].tolist(), one["masked_target"], strict=True) for one in batches]
        return {(index, row.tobytes()) for some in rows for index, row in some}

    assert len(drawn(whole) & drawn(met(Words(SENTENCE, 30), 20, seed=1))) < 30


def test_a_source_may_draw_its_examples_anew_in_every_epoch():
    for place, batch in enumerate(met(Drawn(SENTENCE, 30), 15)):
        np.testing.assert_array_equal(batch["label"], 100 * (place // 5) + batch["index"])


def test_a_text_without_words_is_left_alone():
    ids = np.array([[2, 3, 0, 0]], np.int32)
    masked, target = corrupt(ids, np.array([0]), TOKENIZER, seed=0)
    assert masked.tolist() == ids.tolist() and not target.any()


@dataclass(frozen=True)
class Rows:
    """A data set of the given rows."""

    rows: tuple[Mapping, ...]

    def source(self, split: str) -> tuple[Mapping, ...]:
        return self.rows


def test_a_field_that_the_data_lack_names_the_nearest():
    feed = Feed(Handwriting("caption"), 2, {"captions": 8})
    with pytest.raises(DataError, match='no text field "captions".*did you mean "caption"'):
        next(stream({"caption": feed}, tokenizer=TOKENIZER, threads=0))


def test_clips_of_different_shapes_are_refused():
    rows = [{"index": 0, "clips": np.zeros((size, 8, 8, 3), np.uint8)} for size in (1, 2)]
    with pytest.raises(DataError, match=r"\(1, 8, 8, 3\), \(2, 8, 8, 3\)"):
        collate(rows, {}, TOKENIZER, seed=0)


@pytest.mark.parametrize("view, frames", [("describe", 1), ("scene", 1), ("scene", 4)])
def test_a_batch_says_which_of_its_texts_hold_of_which_clips(view, frames):
    """By the first column of `fits` and the others, as its source tells; also of shares of a batch."""
    data, lengths = Handwriting(view, frames), {"text": 18, "fits": 137}
    (step,) = take(stream({"it": Feed(data, 48, lengths)}, tokenizer=TOKENIZER, threads=0), 1)
    batch, source = step["it"], data.source("train")
    indices = batch["index"].tolist()
    texts, truths = [source.texts(i)["text"] for i in indices], [source.fits(i) for i in indices]
    found = (batch["fits"][:, None] == batch["fits"][None, :, :1]).any(-1)
    np.testing.assert_array_equal(found, [[text in holds for text in texts] for holds in truths])
    assert found.diagonal().all() and found.sum() > 48


def test_texts_hold_of_their_own_clips_alone_where_the_data_do_not_say():
    rows = [{"index": place, "text": text} for place, text in enumerate(("red", "two", "red"))]
    fits = collate(rows, {"text": 3, "fits": 4}, TOKENIZER, seed=0)["fits"]
    assert fits.shape == (3, 4) and (fits[:, 0] > 0).all() and not fits[:, 1:].any()
    assert fits[0, 0] == fits[2, 0] != fits[1, 0]
    many = [{"index": 7, "text": "red", "fits": ("two", "one", "red", "left")}]
    with pytest.raises(DataError, match="4 texts hold of the clips of example 7, and lengths.fits is 3"):
        collate(many, {"text": 3, "fits": 3}, TOKENIZER, seed=0)
    with pytest.raises(DataError, match='"fits" says which texts .* the data have no "text"'):
        collate([{"index": 0, "caption": "red"}], {"fits": 3}, TOKENIZER, seed=0)


def test_an_empty_data_set_is_refused():
    with pytest.raises(DataError, match="empty"):
        stream({"none": Feed(Rows(()), 1, {})}, tokenizer=TOKENIZER)


def test_a_batch_without_examples_is_refused():
    with pytest.raises(DataError, match='feed "caption": no example of a batch of 0'):
        stream({"caption": Feed(Handwriting("caption"), 0, {})}, tokenizer=TOKENIZER)


def test_a_state_of_several_hosts_continues_in_one_with_the_same_global_batches():
    whole = take(stream(FEEDS, tokenizer=TOKENIZER, seed=1), 6)
    hosts = [stream(FEEDS, tokenizer=TOKENIZER, seed=1, held=lambda n: range(n // 2)) for _ in range(2)]
    states = [(take(host, 4), json.loads(json.dumps(host.get_state())))[1] for host in hosts]
    assert states[0] == states[1]
    for held in (range, lambda batch: range(1, batch, 2)):  # one host; one of two that hold every other row
        resumed = stream(FEEDS, tokenizer=TOKENIZER, seed=1, held=held)
        resumed.set_state(states[0])
        expected = [
            {name: {key: value[list(held(8 if name == "caption" else 4))] for key, value in batch.items()}}
            for step in whole[4:]
            for name, batch in step.items()
        ]
        found = [{name: batch} for step in take(resumed, 2) for name, batch in step.items()]
        assert_same(found, expected)
