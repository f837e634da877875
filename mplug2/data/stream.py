"""The stream: raw examples -> shuffled, mixed, tokenised batches of fixed shape, resumed exactly, on Grain.

A batch is a flat dict: `clips` uint8 B T H W C, `label` and `index` int32 (B,), and each text field that the
feed gives a length, int32 B S: `begin ... end pad pad`. A feed that asks for `masked` also gets BERT's
corruption of its `caption` or `text` as `masked` and `masked_target` (0 = not chosen); one that asks for
`caption_target` gets the ids of `caption` that are learned: 0 for a tokenizer's prompt; one that asks for
`fits` gets fingerprints of texts, int32 B F: the first of the example's own `text`, then, where the source
knows, of every other text that holds of its clips (0: no more). A step of the stream is one batch per feed.

Order is a pure function of (seed, step): the state is the step alone, the same for any number of threads,
worker processes and hosts. What is drawn for an example (masks, and what a source draws `at` an epoch) is a
pure function of (seed, epoch, index): another one each time that the data come round. Each host reads of
every global batch the examples that its devices hold.
"""

import sys
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import grain
import numpy as np

from mplug2.data.examples import check, source_of
from mplug2.data.tokens import SPECIAL, Tokenizer
from mplug2.errors import DataError, nearest
from mplug2.fields import said
from mplug2.mistakes import in_words
from mplug2.source import Package, install, installed

Batch = dict[str, np.ndarray]
_ENDLESS = sys.maxsize


class Source(Protocol):
    """Raw examples by index, each a dict of `clips`, strings, `label` and `index`; Grain's
    RandomAccessDataSource. One whose examples are drawn anew in every epoch (other frames, another crop) also
    has `at(index, epoch)`; epoch 0 is that of `source[index]`. One that knows which texts hold of the clips
    of an example has `fits(index)`, all of them that another example may have."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Data(Protocol):
    """A data set: gives the source of a split."""

    def source(self, split: str) -> Source: ...


@dataclass(frozen=True)
class Mixture:
    """Several data sets of like views in fixed proportions, e.g. `Mixture({Handwriting("caption"): 3, mine:
    1})`."""

    parts: Mapping[Any, float]  # Data -> weight


@dataclass(frozen=True)
class Feed:
    """What one task reads: `batch` examples of `data` a step (over all hosts together), and the length in
    tokens of each text field it wants, e.g. `{"caption": 24}` or `{"masked": 24}`."""

    data: Any  # Data | Mixture
    batch: int
    lengths: Mapping[str, int]


class Stream(Iterator[dict[str, Batch]]):
    """Endless steps `{feed: batch}`. `get_state()` is JSON-able; `set_state` continues with the very next
    step."""

    def __init__(self, steps: "_Steps", workers: int, threads: int):
        self._steps, self._workers, self._threads = steps, workers, threads
        self._step = 0
        self._running: list[Any] = []  # the open Grain iterator, if any
        weakref.finalize(self, _stop, self._running)  # also at exit, before Grain's modules are torn down

    def __next__(self) -> dict[str, Batch]:
        if not self._running:
            self._running.append(self._open())
        step = next(self._running[0])
        self._step += 1
        if self._workers:  # out of the shared memory of a worker process, which ends before its batches may
            step = {
                feed: {field: np.array(array) for field, array in batch.items()}
                for feed, batch in step.items()
            }
        return step

    def get_state(self) -> dict[str, Any]:
        return {"step": self._step, **self._order()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken. Raises DataError on a state of a stream in another order."""
        theirs = {key: value for key, value in state.items() if key != "step"}
        if theirs != self._order():
            raise DataError(
                f"the saved position is of a stream with {theirs}; this stream has {self._order()}"
            )
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Ends the background threads and processes; the next step starts them again."""
        _stop(self._running)

    def _order(self) -> dict[str, Any]:
        return {
            "seed": self._steps.seed,
            "batch": {name: feed.batch for name, feed in self._steps.feeds.items()},
        }

    def _open(self) -> Iterator[dict[str, Batch]]:
        steps = grain.MapDataset.source(replace(self._steps, start=self._step))
        ahead = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=2 * self._threads)
        steps = steps.to_iter_dataset(ahead)
        if self._workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # Grain's workers read them, and only absl.app parses them
                flags.FLAGS(sys.argv[:1])
            # First of all a worker must be able to import what recipe files define.
            begin = partial(_begin_worker, installed())
            steps = steps.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers), worker_init_fn=begin
            )
        return iter(steps)


def _begin_worker(packages: list[Package], worker: int, workers: int) -> None:
    install(packages)


def _stop(running: list[Any]) -> None:
    while running:
        running.pop().close()


def shares(data: Any) -> list[tuple[Any, float]]:
    """The data sets that are mixed, each with its share."""
    return list(data.parts.items()) if isinstance(data, Mixture) else [(data, 1.0)]


def check_data(feeds: Mapping[str, Feed], split: str = "train") -> None:
    """Raises DataError if the data of a feed is not there; nothing but its annotations is read."""
    for name, feed in feeds.items():
        for data, _ in shares(feed.data):
            source_of(data, split, f"the data of {name}")


def stream(
    feeds: Mapping[str, Feed],
    *,
    tokenizer: Tokenizer,
    seed: int = 0,
    split: str = "train",
    workers: int = 0,
    threads: int = 1,
    held: Callable[[int], Sequence[int]] = range,
) -> Stream:
    """The endless stream of `feeds`, reshuffled every epoch.

    `threads` prepare steps in the background (0: in the caller); `workers` are processes that do so instead,
    worth their start-up only where decoding is heavy. `held(batch)`: which examples of a global batch of that
    size are read here (default: all).
    """
    rows = {name: tuple(held(feed.batch)) for name, feed in feeds.items()}
    for name, feed in feeds.items():
        if not rows[name]:
            raise DataError(f'feed "{name}": no example of a batch of {feed.batch} is read here')
    return Stream(_Steps(dict(feeds), tokenizer, seed, split, rows), workers, threads)


def collate(
    examples: Sequence[Mapping[str, Any]],
    lengths: Mapping[str, int],
    tokenizer: Tokenizer,
    seed: int,
    epochs: Sequence[int] | int = 0,
) -> Batch:
    """Raw examples -> one batch; `epochs`: how often the data had come round before each, for what is drawn.
    Raises DataError on a field they lack, or on clips of different shapes."""
    for example in examples:
        check(example)
    first = examples[0]
    for field in ("clips", "label"):
        if lacking := [example["index"] for example in examples if (field in example) != (field in first)]:
            raise DataError(
                f'"{field}" is in some examples and not in others: compare {lacking[0]} to the first'
            )
    batch: Batch = {"index": np.array([example["index"] for example in examples], np.int32)}
    if "clips" in first:
        shapes = {example["clips"].shape for example in examples}
        if len(shapes) > 1:
            raise DataError(
                f"clips of one batch must have one shape T H W C; got {', '.join(map(str, sorted(shapes)))}"
            )
        batch["clips"] = np.stack([example["clips"] for example in examples])
    if "label" in first:
        batch["label"] = np.array([example["label"] for example in examples], np.int32)
    for field, length in lengths.items():
        if field == "fits":
            batch[field] = np.stack([_fingerprints(example, length) for example in examples])
            continue
        written = field
        if field == "masked":
            written = "caption" if "caption" in first else "text"
        elif field == "caption_target":
            written = "caption"
        if not isinstance(first.get(written), str):
            known = [name for name, value in first.items() if isinstance(value, str)] + ["masked"]
            raise DataError(
                f'no text field "{field}" in the data; it has {", ".join(known)}{nearest(field, known)}'
            )
        if wrong := [one for one in examples if not isinstance(one.get(written), str)]:
            raise DataError(
                f'example {wrong[0]["index"]}: its "{written}" is {said(wrong[0].get(written))}, '
                "expected a text"
            )
        batch[field] = np.stack([tokenizer.encode(example[written], length) for example in examples])
    if "masked" in lengths:
        batch["masked"], batch["masked_target"] = corrupt(
            batch["masked"], batch["index"], tokenizer, seed, epochs
        )
    if "caption_target" in lengths:
        batch["caption_target"][:, : tokenizer.prompt_length] = 0
    return batch


def _fingerprints(example: Mapping[str, Any], length: int) -> np.ndarray:
    """Of an example's text, then of all that hold of its clips: int32 (length,)."""
    if not isinstance(example.get("text"), str):
        raise DataError(
            f'"fits" says which texts hold of which clips; the data have no "text": {sorted(example)}'
        )
    said = list(dict.fromkeys((example["text"], *example.get("fits", ()))))
    if len(said) > length:
        raise DataError(
            f"{len(said)} texts hold of the clips of example {example['index']}, and lengths.fits is {length}"
        )
    numbers = [1 + zlib.crc32(text.encode()) % (2**31 - 1) for text in said]
    return np.array(numbers + [0] * (length - len(said)), np.int32)


def corrupt(
    ids: np.ndarray,
    index: np.ndarray,
    tokenizer: Tokenizer,
    seed: int,
    epochs: Sequence[int] | int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's masking of ids int32 B S: 15% of the words are chosen, at least one; of these 80% become `mask`,
    10% a random word, 10% stay. -> corrupted ids, targets (0 = not chosen). A pure function of (seed, epoch,
    example, position)."""
    table = tokenizer.table()
    special = np.array([table[name] for name in SPECIAL])
    vocabulary = np.setdiff1d(np.arange(table["size"]), special)
    word = ~np.isin(ids, special)
    choice, kind, other = (_uniform(seed, epochs, index, ids.shape[1], salt) for salt in range(3))
    choice = np.where(word, choice, 2.0)
    chosen = word & ((choice < 0.15) | (choice == choice.min(axis=1, keepdims=True)))
    random_word = vocabulary[(other * len(vocabulary)).astype(np.int64)]
    corrupted = np.where(kind < 0.8, table["mask"], np.where(kind < 0.9, random_word, ids))
    return np.where(chosen, corrupted, ids).astype(np.int32), np.where(chosen, ids, 0).astype(np.int32)


def _uniform(seed: int, epochs: Sequence[int] | int, index: np.ndarray, length: int, salt: int) -> np.ndarray:
    """Counter-based random numbers in [0, 1), float64 (B, length): SplitMix64 of (seed, salt, epoch, example,
    position)."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    drawn = np.uint64(seed * 4 + salt) + (np.atleast_1d(epochs).astype(np.uint64) << np.uint64(32))
    rows = mix(mix(drawn * golden) + index.astype(np.uint64) * golden)
    return (
        mix(rows[:, None] + np.arange(1, length + 1, dtype=np.uint64) * golden) >> np.uint64(11)
    ) * 2.0**-53


@dataclass(frozen=True)
class _Steps:
    """Steps by index, counted from `start`, as a Grain source: the part of the stream that worker processes
    hold."""

    feeds: dict[str, Feed]
    tokenizer: Tokenizer
    seed: int
    split: str
    rows: Mapping[str, Sequence[int]]  # of the global batch of each feed
    start: int = 0

    def __post_init__(self) -> None:
        orders = {}
        for place, (name, feed) in enumerate(self.feeds.items()):
            parts = shares(feed.data)
            seeds = (self.seed * 1009 + place * 31 + number for number in range(len(parts)))
            shuffled = [
                _shuffled(source_of(data, self.split, f"the data of {name}"), seed, "fits" in feed.lengths)
                for (data, _), seed in zip(parts, seeds, strict=True)
            ]
            weights = [share for _, share in parts]
            orders[name] = grain.MapDataset.mix(shuffled, weights) if len(parts) > 1 else shuffled[0]
        object.__setattr__(self, "_orders", orders)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> dict[str, Batch]:
        batches = {}
        for name, feed in self.feeds.items():
            first = (self.start + index) * feed.batch
            order = self._orders[name]  # pyright: ignore[reportAttributeAccessIssue]
            with in_words(f"the data of {name}", kind=DataError):
                examples, epochs = zip(*(order[first + row] for row in self.rows[name]), strict=True)
                batches[name] = collate(examples, feed.lengths, self.tokenizer, self.seed, epochs)
        return batches


def _shuffled(source: Source, seed: int, fits: bool) -> grain.MapDataset:
    """Endless (example, epoch), every epoch in an order of its own."""
    order = grain.MapDataset.range(len(source)).seed(seed % 2**32).shuffle().repeat()
    return order.map_with_index(partial(_seen, source, fits))


def _seen(source: Any, fits: bool, place: int, index: int) -> tuple[dict[str, Any], int]:
    """What stands at a place of the endless order: example `index`, and the epoch in which it does."""
    epoch = place // len(source)
    example = source.at(index, epoch) if hasattr(source, "at") else source[index]
    if fits and hasattr(source, "fits"):
        example = {**example, "fits": source.fits(index)}
    return example, epoch
