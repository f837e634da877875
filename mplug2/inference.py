"""Inference: functions of a batch and the modules that they name -> outputs; compiled, and run over a split.

The functions are the tasks of mplug2.tasks without their losses. Over a split batches are of a fixed size;
the last one is filled up, and what was filled up is cut off again. Several processes take the batches in
turn, each on devices of its own: the same batches, and so the same numbers, as one process.
"""

import copy
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug2 import processes, sharding
from mplug2.data.examples import example_of, source_of
from mplug2.data.pixels import Preprocessing
from mplug2.data.stream import collate, shares
from mplug2.data.tokens import Tokenizer
from mplug2.errors import DataError
from mplug2.generate import Search, decode
from mplug2.network import Network, Parameters, select
from mplug2.ranking import AnswerList, Write
from mplug2.recipe import Recipe
from mplug2.roles import (
    Array,
    Connector,
    Contrastive,
    Decoder,
    Fusion,
    Head,
    Temporal,
    Text,
    Universal,
    Vision,
    base_of,
    padding_mask,
)
from mplug2.routes import fused_memory, read, see

Example = Mapping[str, Any]
Batch = Mapping[str, Array]


@dataclass(frozen=True)
class Writer:
    """How texts are generated: a search, and the special ids of the tokenizer."""

    search: Search
    begin: int
    end: int
    seed: int = 0

    def __call__(self, decoder: Decoder, memory: Array, mask: Array | None, index: Array) -> Array:
        """The best text for each memory: ids `B 1+length`. What a sample draws depends on
        the first of the examples `index` `B`."""
        key = jax.random.fold_in(jax.random.key(self.seed), index[0])
        return decode(decoder, memory, mask, self.search, begin=self.begin, end=self.end, key=key).ids[:, 0]


# ------------------------------------------------------------------------------------------------------------
# Outputs: (what is fixed, batch, *, modules) -> arrays whose first axis is that of the batch


def vision_classes(
    batch: Batch,
    *,
    vision: Vision,
    universal: Universal,
    vision_classifier: Head,
    temporal: Temporal | None = None,
    connector: Connector | None = None,
) -> Array:
    """`clips` -> class logits."""
    seen = see(batch["clips"], vision=vision, universal=universal, temporal=temporal, connector=connector)
    return vision_classifier(seen)


def text_classes(batch: Batch, *, text: Text, universal: Universal, text_classifier: Head) -> Array:
    """`text` -> class logits."""
    return text_classifier(read(batch["text"], text=text, universal=universal))


def vision_vectors(
    batch: Batch,
    *,
    vision: Vision,
    universal: Universal,
    contrastive: Contrastive,
    temporal: Temporal | None = None,
    connector: Connector | None = None,
) -> Array:
    """`clips` -> unit vectors of the contrastive space."""
    seen = see(batch["clips"], vision=vision, universal=universal, temporal=temporal, connector=connector)
    return contrastive.vision(seen)


def vision_likenesses(
    batch: Batch,
    *,
    vision: Vision,
    universal: Universal,
    contrastive: Contrastive,
    temporal: Temporal | None = None,
    connector: Connector | None = None,
) -> Array:
    """`clips`, `names` `C D` (unit vectors of the contrastive space) -> probabilities `B C` of each clip's
    being called so."""
    seen = vision_vectors(
        batch,
        vision=vision,
        universal=universal,
        contrastive=contrastive,
        temporal=temporal,
        connector=connector,
    )
    return jax.nn.softmax(seen @ batch["names"].T / contrastive.temperature(), -1)


def scaled_vision_vectors(
    batch: Batch,
    *,
    vision: Vision,
    universal: Universal,
    contrastive: Contrastive,
    temporal: Temporal | None = None,
    connector: Connector | None = None,
) -> Array:
    """`clips` -> vectors of the contrastive space over its temperature: times the unit vectors of names, the
    logits of `vision_likenesses`, of any number of names by one program."""
    seen = vision_vectors(
        batch,
        vision=vision,
        universal=universal,
        contrastive=contrastive,
        temporal=temporal,
        connector=connector,
    )
    return seen.astype(np.float32) / contrastive.temperature()


def matches(
    batch: Batch,
    *,
    vision: Vision,
    text: Text,
    universal: Universal,
    fusion: Fusion,
    matching: Head,
    temporal: Temporal | None = None,
    connector: Connector | None = None,
) -> Array:
    """`clips`, `text`, `other` -> probabilities `B 2` that each of the two texts belongs to the clip."""
    seen = see(batch["clips"], vision=vision, universal=universal, temporal=temporal, connector=connector)

    def belongs(ids: Array) -> Array:
        tokens = read(ids, text=text, universal=universal)
        _, looked = fusion(seen, tokens, padding_mask(ids))
        return jax.nn.softmax(matching(looked), -1)[:, 1]

    return jnp.stack([belongs(batch["text"]), belongs(batch["other"])], 1)


def class_vectors(prompts: np.ndarray, classes: int) -> np.ndarray:
    """Unit vectors of as many prompts for every class, `classes*P D` -> the unit vector of each class's mean,
    `classes D`."""
    means = prompts.reshape(classes, -1, prompts.shape[-1]).mean(1)
    return means / np.linalg.norm(means, axis=-1, keepdims=True)


def text_vectors(batch: Batch, *, text: Text, universal: Universal, contrastive: Contrastive) -> Array:
    """`text` -> unit vectors of the contrastive space."""
    return contrastive.text(read(batch["text"], text=text, universal=universal))


def captions(
    write: Write,
    batch: Batch,
    *,
    vision: Vision,
    universal: Universal,
    decoder: Decoder,
    temporal: Temporal | None = None,
    connector: Connector | None = None,
) -> Array:
    """`clips` -> ids of a caption."""
    seen = see(batch["clips"], vision=vision, universal=universal, temporal=temporal, connector=connector)
    return write(decoder, seen, None, batch["index"])


def answers(
    write: Write,
    batch: Batch,
    *,
    vision: Vision,
    text: Text,
    universal: Universal,
    fusion: Fusion,
    decoder: Decoder,
    temporal: Temporal | None = None,
    connector: Connector | None = None,
) -> Array:
    """`clips`, `question` -> ids of an answer."""
    seen = see(batch["clips"], vision=vision, universal=universal, temporal=temporal, connector=connector)
    tokens = read(batch["question"], text=text, universal=universal)
    memory, mask = fused_memory(seen, tokens, batch["question"], fusion=fusion)
    return write(decoder, memory, mask, batch["index"])


def completions(write: Write, batch: Batch, *, text: Text, universal: Universal, decoder: Decoder) -> Array:
    """`text` -> ids of its continuation."""
    memory = read(batch["text"], text=text, universal=universal)
    return write(decoder, memory, padding_mask(batch["text"]), batch["index"])


# ------------------------------------------------------------------------------------------------------------
# Compiled

PROGRAMS = 48
"""Each may take some hundred of the 65,530 mappings that Linux gives a process, and tens of megabytes."""

BUCKET = 32
"""Rows of the largest batch where callers choose how many there are."""

Compute = Callable[[Mapping[str, Any]], Any]
"""A batch of NumPy arrays, clips uint8 -> NumPy arrays."""


class Compiled:
    """Outputs of one network with its parameters, deltas merged into them: each is compiled once for each
    shape of a batch, and the PROGRAMS used last are kept. Parameters, examples and caches are spread over a
    `mesh` of this process's devices, if there is one. Raises RecipeError where it would cut a head."""

    def __init__(
        self,
        network: Network,
        params: Parameters,
        preprocessing: Preprocessing,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self._mesh = mesh or sharding.Mesh().of_process()
        sharding.check_heads(self._mesh, network.configs)
        self._preprocessing = preprocessing
        self._params = self._placed(network, params)
        self._program = self._programs(network)

    def _programs(self, network: Network) -> Any:
        """(outputs, what is fixed, shapes) -> their program. It holds no parameters."""
        preprocessing, mesh = self._preprocessing, self._mesh

        def program(outputs: Callable[..., Any], fixed: tuple, shapes: tuple) -> Callable:
            def compute(params: Parameters, batch: Batch) -> Any:
                if "clips" in batch:
                    batch = dict(batch) | {"clips": preprocessing.to_float(batch["clips"])}
                with sharding.on(mesh):
                    return outputs(*fixed, batch, **network.bind(params))

            return jax.jit(compute)  # of one shape, so that it is let go with it

        return functools.lru_cache(maxsize=PROGRAMS)(program)

    def _placed(self, network: Network, params: Parameters) -> Parameters:
        """Deltas merge where their bases lie; what is merged may be of another shape."""

        def put(params: Parameters) -> Parameters:
            if self._mesh.size == 1:
                return jax.device_put(params)
            axes = network.axes
            where = {name: sharding.shardings(self._mesh, axes[name], tree) for name, tree in params.items()}
            return jax.device_put(params, where)

        return put(network.adapted(put(params)))

    def _spread(self, array: Any) -> Any:
        """An array `B ...` of a batch, by examples where they divide."""
        if self._mesh.size == 1:
            return array
        axes = ("batch", *(None,) * (array.ndim - 1))
        return jax.device_put(array, sharding.sharding(self._mesh, axes, array.shape))

    def on(self, network: Network, params: Parameters) -> "Compiled":
        """The same programs on parameters that are adapted otherwise: `params` of `network`, which has the
        same modules and any deltas. Nothing is compiled again where the shapes are the same, unless a
        delta is not merged: a prompt makes a program of its own."""
        other = copy.copy(self)
        other._params = self._placed(network, params)
        if any(map(base_of, {**self._params, **other._params})):  # other inputs are another program
            other._program = other._programs(network)
        return other

    def __call__(self, outputs: Callable[..., Any], *fixed: Any) -> Compute:
        """`outputs(*fixed, batch, **modules)`. Raises RecipeError, naming it, on a module that is missing."""
        params = self._chosen(outputs)

        def compute(batch: Mapping[str, Any]) -> Any:
            shapes = tuple(sorted((name, array.shape, str(array.dtype)) for name, array in batch.items()))
            program = self._program(outputs, fixed, shapes)
            return jax.device_get(program(params, jax.tree.map(self._spread, dict(batch))))

        return compute

    def _chosen(self, outputs: Callable[..., Any]) -> Parameters:
        """The modules that `outputs` composes, with the deltas that are not merged into them."""
        parts = select(outputs, self._params)
        return parts | {name: tree for name, tree in self._params.items() if base_of(name) in parts}

    def __len__(self) -> int:
        """How many programs are kept."""
        return self._program.cache_info().currsize


def in_buckets(compute: Compute) -> Compute:
    """`compute` for any number of rows, by few programs: pieces of at most BUCKET rows, the last one filled
    up to a power of two with its first row. Answers are those of the rows alone, but for rounding: programs
    of other sizes add in another order."""

    def computed(batch: Mapping[str, Any]) -> Any:
        rows = len(next(iter(batch.values())))
        parts = []
        for start in range(0, rows, BUCKET):
            count = min(BUCKET, rows - start)
            places = np.full(1 << (count - 1).bit_length(), start)
            places[:count] += np.arange(count)
            found = compute({name: array[places] for name, array in batch.items()})
            parts.append(jax.tree.map(operator.itemgetter(slice(count)), found))
        return jax.tree.map(lambda *found: np.concatenate(found), *parts)

    return computed


# ------------------------------------------------------------------------------------------------------------
# Over a split


@dataclass(frozen=True, kw_only=True)
class Inference:
    """A network's compiled outputs, and the examples that it is asked about: the first `limit` of `split`.

    `advance` is told how many examples are done, of how many.
    """

    compiled: Compiled
    recipe: Recipe
    tokenizer: Tokenizer
    split: str = "test"
    limit: int | None = None
    advance: Callable[[int, int], None] = lambda done, total: None

    def over(
        self,
        data: Any,
        lengths: Mapping[str, int],
        batch: int,
        outputs: Callable[..., Any],
        *fixed: Any,
        prepare: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict,
    ) -> tuple[list[Example], Any]:
        """Every example of the split, `frames` instead of `clips`, and its outputs. `prepare` changes batches
        before.

        Raises DataError on an empty split, RecipeError on a module that is missing.
        """
        compute, places = self.compiled(outputs, *fixed), self.places(data)

        def part(start: int) -> tuple[list[Example], Any]:
            chosen = places[start : start + batch]
            rows = [dict(example_of(source, index, "the evaluation's data")) for source, index in chosen]
            full = collate(rows + rows[:1] * (batch - len(rows)), lengths, self.tokenizer, seed=0)
            computed = compute(prepare({name: full[name] for name in full if name != "label"}))
            self.advance(start + len(rows), len(places))
            cut = jax.tree.map(operator.itemgetter(slice(len(rows))), computed)
            return [_without_pixels(row) for row in rows], cut

        parts = processes.dealt(part, range(0, len(places), batch))
        examples = [example for some, _ in parts for example in some]
        return examples, jax.tree.map(lambda *found: np.concatenate(found), *(found for _, found in parts))

    def places(self, data: Any) -> list[tuple[Any, int]]:
        """(source, index) of every example that is asked about. Raises DataError where there is none."""
        sources = [source_of(part, self.split, "the evaluation's data") for part, _ in shares(data)]
        places = [(source, index) for source in sources for index in range(len(source))][: self.limit]
        if not places:
            raise DataError(f"the {self.split} split of {data} holds no example")
        return places

    def text_vectors(self, texts: Sequence[str], length: int, batch: int) -> np.ndarray:
        """Unit vectors of texts, each cut or padded to `length` ids."""
        compute = self.compiled(text_vectors)

        def part(start: int) -> np.ndarray:
            some = list(texts[start : start + batch])
            ids = [self.tokenizer.encode(text, length) for text in some + some[:1] * (batch - len(some))]
            return compute({"text": np.stack(ids)})[: len(some)]

        return np.concatenate(processes.dealt(part, range(0, len(texts), batch)))

    def writer(self, search: Search | AnswerList) -> Write:
        """What writes texts by a search, or chooses them from a list."""
        if isinstance(search, AnswerList):
            return search.writer(self.tokenizer)
        special = self.tokenizer.table()
        return Writer(search, special["begin"], special["end"], self.recipe.seed)

    def texts(self, ids: np.ndarray) -> list[str]:
        return [self.tokenizer.decode(row) for row in ids]


def _without_pixels(example: Example) -> Example:
    frames = {"frames": len(example["clips"])} if "clips" in example else {}
    return {name: value for name, value in example.items() if name != "clips"} | frames
