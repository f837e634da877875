"""Deltas: what adapts a module that stays as it is. A delta is a module beside its base; it has a form:

- `Lora`, `BitFit`, `Bottleneck` (mplug2.modules.forms) are functions of the base's parameters, nested dict ->
  nested dict of those that the base then computes with, and can be merged into it
- `Prompt` (mplug2.modules.prompt): tokens that the base is given with its own, which no parameter can say
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx

from mplug2 import roles
from mplug2.errors import RecipeError
from mplug2.modules.forms import BitFit, Bottleneck, Leaf, Lora, Path
from mplug2.modules.layers import parameter
from mplug2.modules.prompt import Prompt
from mplug2.roles import Array, Execution

Form = Lora | BitFit | Bottleneck | Prompt


@dataclass(frozen=True, kw_only=True)
class Config:
    """A delta in the given form, of modules of the config `of`."""

    of: roles.Config
    form: Form

    def __post_init__(self):
        self.form.check(self.of)

    def build(self, *, rngs: nnx.Rngs, execution: Execution = Execution()) -> "Delta":
        return Delta(self, rngs=rngs, execution=execution)

    @property
    def merged(self) -> roles.Config:
        """The config of the base with the delta merged into it."""
        return self.form.merged(self.of)

    def sum(self, parts: Sequence[tuple["Config", Any, float]]) -> tuple["Config", dict[str, Any]]:
        """One delta that changes what all of `parts`, (config, parameters, coefficient), together do. Raises
        RecipeError unless they are of one base config and one form."""
        for config, _, _ in parts:
            if config.of != self.of or type(config.form) is not type(self.form):
                raise RecipeError(
                    f"deltas {self.form} of {self.of} and {config.form} of {config.of} cannot be added: "
                    "they are of different bases or forms"
                )
        form, summed = type(self.form).sum([(c.form, _flat(tree), share) for c, tree, share in parts])  # type: ignore[arg-type]
        return Config(of=self.of, form=form), _nested(summed)


class _Part(nnx.Module):
    """Names on the way to a parameter."""


class Delta(nnx.Module):
    """Its parameters have the names of those of the base that they change."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, execution: Execution):
        base = nnx.state(nnx.eval_shape(lambda: config.of.build(rngs=nnx.Rngs(0), execution=execution)))
        leaves = {
            tuple(map(str, path)): Leaf(variable.get_value().shape, variable.get_metadata()["axes"])
            for path, variable in nnx.to_flat_state(base)
        }
        for (*parents, name), leaf in config.form.begin(leaves).items():
            node: Any = self
            for parent in parents:
                if not hasattr(node, parent):
                    setattr(node, parent, _Part())
                node = getattr(node, parent)
            setattr(node, name, parameter(leaf.init, leaf.shape, leaf.axes, rngs))
        self.form, self.merges = config.form, config.form.merges

    def __call__(self, params: Mapping[str, Any], *, key: Array | None = None) -> dict[str, Any]:
        """Of a delta that merges: the base's parameters -> what it computes with; those that are not changed
        are the very same.
        `key`: what is dropped out in a training step is drawn from it."""
        arrays = _flat(params)
        form: Any = self.form
        return _nested(arrays | form.adapted(arrays, self._own(), key))

    def around(self, module: Any) -> Any:
        """The base as an object -> one that is called like it and is given what this delta adds."""
        return self.form.around(module, self._own())

    def _own(self) -> dict[Path, Array]:
        return {tuple(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(self))}


def _flat(tree: Mapping[str, Any], prefix: Path = ()) -> dict[Path, Any]:
    found: dict[Path, Any] = {}
    for name, value in tree.items():
        path = (*prefix, name)
        found |= _flat(value, path) if isinstance(value, Mapping) else {path: value}
    return found


def _nested(arrays: Mapping[Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*parents, leaf), value in arrays.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
