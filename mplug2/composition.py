"""Whether the modules of a recipe fit together, seen before any array exists: every objective is traced with
abstract arrays.

`check` is called where training starts. A refusal names the two modules that do not fit, their
widths or vocabularies, and the route that led there.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug2.data.examples import example_of, source_of
from mplug2.data.stream import Feed, collate, shares
from mplug2.data.tokens import SPECIAL
from mplug2.errors import Mplug2Error, RecipeError, nearest
from mplug2.mistakes import line_of, sentence
from mplug2.network import Network, select
from mplug2.recipe import Objective, Recipe

Shapes = Mapping[str, jax.ShapeDtypeStruct]


@dataclass
class Call:
    """A module called on the way: `where` ("universal.vision"), what it was given, and, once it is back, what
    it gave."""

    where: str
    lent: tuple[str, ...]
    given: list[Any]
    gave: list[Any] | None = None

    @property
    def module(self) -> str:
        return self.where.split(".")[0]


def check(recipe: Recipe) -> None:
    """Raises RecipeError unless vocabularies equal the tokenizer's and the modules fit; DataError where the
    tokenizer cannot be read."""
    check_vocabularies(recipe)
    check_modules(recipe)


def check_vocabularies(recipe: Recipe) -> None:
    """Raises RecipeError unless every module knows as many words as the tokenizer; DataError where its file
    cannot be read."""
    modules: Mapping[str, Any] = recipe.modules
    vocabularies = {name: it.vocabulary for name, it in modules.items() if hasattr(it, "vocabulary")}
    if any(size != recipe.tokenizer.size for size in vocabularies.values()):
        said = ", ".join(f"{name} has {size}" for name, size in vocabularies.items())
        raise RecipeError(
            f"recipe {recipe.name}: vocabularies must equal the tokenizer's: {said}, "
            f"{recipe.tokenizer} has {recipe.tokenizer.size}"
        )


def check_modules(recipe: Recipe) -> None:
    """Raises RecipeError unless every objective's task can be traced. Needs no vocabulary, and no data of a
    set that knows its examples' shapes."""
    network = abstract_network(recipe)
    for name, objective in recipe.objectives.items():
        forward, calls = watched(network, objective)
        try:
            loss = jax.eval_shape(forward, network.shapes, abstract_batch(objective))
        except Mplug2Error as error:
            raise RecipeError(f"recipe {recipe.name}, objective {name}: {error}") from None
        except Exception as error:  # of JAX, of einops, or of the task's own code
            reason = ": ".join(filter(None, (line_of(error), misfit(calls, recipe.modules, error))))
            raise RecipeError(f"recipe {recipe.name}, objective {name}: {reason}") from error
        if getattr(loss, "shape", None) != ():
            raise RecipeError(f"recipe {recipe.name}, objective {name}: expected a scalar loss, got {loss}")


def abstract_network(recipe: Recipe) -> Network:
    """The recipe's network for tracing, whatever devices are here: scanned, because a scan refuses stacks of
    unequal depth."""
    return Network(recipe.parts, replace(recipe.execution, scan=True, attention="written"))


class _Wordless:
    """A tokenizer of no file: only how long texts are matters to shapes."""

    size = len(SPECIAL) + 1
    prompt_length = 0

    def encode(self, text: str, length: int) -> np.ndarray:
        return np.zeros(length, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return ""

    def table(self) -> dict[str, int]:
        return SPECIAL | {"size": self.size}


def abstract_batch(objective: Objective | Feed) -> dict[str, jax.ShapeDtypeStruct]:
    """What a step sees of an objective: the fields and shapes of an example, `batch` times; clips normalised.
    The example is the data's stand-in (`Videos.example`), else its first one."""
    data = shares(objective.data)[0][0]
    if hasattr(data, "example"):
        example = data.example()
    else:
        example = example_of(source_of(data, "train", "its data"), 0, "its data")
    first = collate([example], objective.lengths, _Wordless(), seed=0)

    def abstract(field: str, value: Any) -> jax.ShapeDtypeStruct:
        kind = jnp.float32 if field == "clips" else value.dtype
        return jax.ShapeDtypeStruct((objective.batch, *value.shape[1:]), kind)

    return {field: abstract(field, value) for field, value in first.items()}


def watched(network: Network, objective: Objective) -> tuple[Callable[[Any, Shapes], Any], list[Call]]:
    """The objective's loss as a function (parameters, batch) that notes each module's calls in the list
    beside it, and puts them under `jax.named_scope`, so that a jaxpr tells whose work an operation is."""
    calls: list[Call] = []

    def forward(params: Any, batch: Shapes) -> Any:
        calls.clear()
        parts = select(objective.task, network.bind(params))
        return objective.task(
            _Fields(batch), **{name: _Watched(name, part, calls) for name, part in parts.items()}
        )

    return forward, calls


class _Fields(dict):
    def __missing__(self, field: str) -> Any:
        raise RecipeError(
            f'its task reads "{field}", its data and lengths give {sorted(self)}{nearest(field, self)}'
        )


class _Watched:
    """A module that plays its part, while its calls are noted."""

    def __init__(self, name: str, module: Any, calls: list[Call]):
        self._name, self._module, self._calls = name, module, calls

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._follow(self._name, self._module, *args, **named)

    def __getattr__(self, attribute: str) -> Any:
        value, where = getattr(self._module, attribute), f"{self._name}.{attribute}"
        if callable(value):
            return functools.partial(self._follow, where, value)
        if isinstance(value, jax.Array):
            self._calls.append(Call(where, (), [], [value]))
        return value

    def _follow(self, where: str, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        arguments = [*args, *named.values()]
        call = Call(
            where,
            lent=tuple(argument._name for argument in arguments if isinstance(argument, _Watched)),
            given=[argument for argument in arguments if isinstance(argument, jax.Array)],
        )
        self._calls.append(call)
        with jax.named_scope(where):
            result = function(*args, **named)
        call.gave = [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)]
        return result


def misfit(calls: list[Call], configs: Mapping[str, Any], error: Exception) -> str:
    """Why the last call failed: who gave it what it cannot read."""
    route = " → ".join(call.where for call in calls)
    failed = next((call for call in reversed(calls) if call.gave is None), None)
    if failed is None:
        return f"after {route}, the task failed: {_first_line(error)}"
    config = configs[failed.module]
    width = getattr(config, "inputs", None) or getattr(config, "width", None)
    for array in failed.given:
        length = array.shape[-1]
        if array.dtype == jnp.int32 and length > getattr(config, "positions", length):
            return f"a text of {length} ids goes to {failed.where}, which has {config.positions} positions"
        givers = [call for call in calls if call.gave and any(_alike(array, given) for given in call.gave)]
        if jnp.issubdtype(array.dtype, jnp.floating) and array.shape[-1] != width and givers:
            return (
                f"{givers[-1].where} gives width {array.shape[-1]} and {failed.where} reads width {width} "
                f"(route: {route})"
            )
    partners = [
        *failed.lent,
        *dict.fromkeys(call.module for call in calls[:-1] if call.module != failed.module),
    ]
    said = " and ".join(
        f"{name} ({_numbers(configs[name])})" for name in dict.fromkeys([failed.module, *partners[:1]])
    )
    return f"{said} do not fit together (route: {route}): {_first_line(error)}"


def _alike(array: Any, given: Any) -> bool:
    return array.ndim == given.ndim and array.shape[-1] == given.shape[-1]


def _numbers(config: Any) -> str:
    known = ("inputs", "width", "depth", "heads", "vocabulary", "classes", "space")
    return ", ".join(f"{name} {getattr(config, name)}" for name in known if hasattr(config, name))


def _first_line(error: Exception) -> str:
    if isinstance(error, LookupError | AttributeError | NameError):  # what they say does not say what it is
        return sentence(error)
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
