"""The composition network: every module that a recipe selects, owned once, under its name.

Sharing is by call, never by reference: `universal` is one object that the text route and the vision route
both call. So parameters are a plain dict `{module: nested dict of float32 arrays}`, and one entry of it is
the unit of selection, of checkpoints, of publishing, of freezing and of sharding. Objects exist inside a
pure function only: `bind(params)`.
"""

import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.core import Tracer

from mplug2 import sharding
from mplug2.errors import RecipeError, nearest
from mplug2.roles import Array, Config, Execution, base_of

Parameters = dict[str, Any]


class Network:
    """Modules by name, without arrays: their structure, initialisation and logical axes."""

    def __init__(self, modules: Mapping[str, Config], execution: Execution = Execution()):
        self.configs = dict(modules)
        self.execution = execution
        self._graphs: dict[str, Any] = {}
        self._states: dict[str, Any] = {}
        for name in self.configs:
            self._graphs[name], self._states[name] = nnx.split(
                nnx.eval_shape(lambda name=name: self._build(name, 0))
            )

    def _build(self, name: str, seed: int | Array) -> nnx.Module:
        # A key of its own for each name: selecting one module more does not change how the others begin.
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        return self.configs[name].build(rngs=nnx.Rngs(key), execution=self.execution)

    def init(self, seed: int) -> Parameters:
        """Fresh parameters; a pure function, so that `jax.jit` with output shardings creates them where
        they belong."""
        return {name: nnx.to_pure_dict(nnx.split(self._build(name, seed))[1]) for name in self.configs}

    @property
    def shapes(self) -> Parameters:
        """`jax.ShapeDtypeStruct` of every parameter, in the structure of `init`."""
        return {name: nnx.to_pure_dict(state) for name, state in self._states.items()}

    @property
    def axes(self) -> Parameters:
        """The tuple of logical axis names of every parameter, in the structure of `init`."""
        return self._told(lambda metadata: metadata["axes"])

    @property
    def bounds(self) -> Parameters:
        """The least and the largest value that training leaves each parameter, () for any, in the structure
        of `init`."""
        return self._told(lambda metadata: metadata.get("bounds", ()))

    def _told(self, read: Callable[[Mapping[str, Any]], Any]) -> Parameters:
        """What each parameter was made with (`modules.layers.parameter`)."""
        return {
            name: nested({path: read(leaf.get_metadata()) for path, leaf in nnx.to_flat_state(state)})
            for name, state in self._states.items()
        }

    def bind(self, params: Parameters, key: Array | None = None) -> dict[str, Any]:
        """Module objects around `params`; call it inside the function that is jitted. Tasks that call a
        module with the very same arrays share one computation, forward and backward. A module whose delta
        is among `params` is adapted by it; `key` is what deltas drop out by (None: nothing)."""
        params = self.adapted(self._gathered(params), key)
        objects = {
            name: nnx.merge(graph, params[name]) for name, graph in self._graphs.items() if name in params
        }
        for name, delta in list(objects.items()):
            if (base := base_of(name)) is not None:
                del objects[name]
                if base in objects:
                    objects[base] = delta.around(objects[base])
        return {name: Once(module) for name, module in objects.items()}

    def _gathered(self, params: Parameters) -> Parameters:
        """Ready for use on the mesh that is traced on, but for those of stacks, which gather one layer at a
        time (modules.layers.fold)."""
        if sharding.here() is None:
            return params

        def ready(array: Array, axes: sharding.Axes) -> Array:
            return array if axes[:1] == ("layers",) else sharding.gathered(array, axes)

        axes = self.axes
        return jax.tree.map(ready, params, {name: axes[name] for name in params})

    def adapted(self, params: Parameters, key: Array | None = None) -> Parameters:
        """`params` with every delta that merges applied to the module that it is of, and gone: other arrays
        are the very same. (Outside a trace this merges them.)"""
        applied = {name: tree for name, tree in params.items() if base_of(name) is None}
        for name, base in ((name, base_of(name)) for name in params):
            if base in applied:
                delta = nnx.merge(self._graphs[name], params[name])
                if delta.merges:
                    own_key = None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))
                    applied[base] = delta(applied[base], key=own_key)
                else:
                    applied[name] = params[name]
        return applied


class Once:
    """A module that computes once for the same arguments (by identity), which is sound because modules are
    pure.

    Several tasks on one batch thus see its clips once, without knowing of each other. It lives as long as a
    trace.
    """

    def __init__(self, module: Any):
        self._module = module
        self._known: dict[Any, tuple[Any, Any]] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._remember("__call__", self._module, arguments, named)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if not inspect.ismethod(value):
            return value
        return lambda *arguments, **named: self._remember(name, value, arguments, named)

    def _remember(self, method: str, function: Callable, arguments: tuple, named: dict[str, Any]) -> Any:
        given = (*arguments, *named.values())
        if not any(isinstance(value, Tracer) for value in given):
            return function(*arguments, **named)  # a constant is the same in every trace, its results are not
        key = (method, tuple(map(id, arguments)), tuple((name, id(named[name])) for name in sorted(named)))
        if key not in self._known:
            # The arguments are kept too: an identity means something only while its object lives.
            self._known[key] = given, function(*arguments, **named)
        return self._known[key][1]


def nested(flat: Mapping[tuple, Any]) -> dict[str, Any]:
    """`{("a", "b"): x}` -> `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def flat(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """`{"a": {"b": x}}` -> `{"a.b": x}`: the names that arrays have in files, reports and errors."""
    names: dict[str, Any] = {}
    for name, value in tree.items():
        path = (*prefix, str(name))
        names.update(flat(value, path) if isinstance(value, Mapping) else {".".join(path): value})
    return names


def parts_of(task: Callable) -> dict[str, bool]:
    """The modules that a task composes, {name: required?}: its keyword-only arguments are the declaration."""
    return {
        name: argument.default is inspect.Parameter.empty
        for name, argument in inspect.signature(task).parameters.items()
        if argument.kind is inspect.Parameter.KEYWORD_ONLY
    }


def select(task: Callable, modules: Mapping[str, Any]) -> dict[str, Any]:
    """Of `modules` those that `task` composes. Raises RecipeError when one that it needs is missing."""
    parts = parts_of(task)
    if missing := [name for name, required in parts.items() if required and name not in modules]:
        hints = "".join(nearest(name, set(modules) - set(parts)) for name in missing)
        raise RecipeError(
            f"task {task.__name__} composes {sorted(name for name, required in parts.items() if required)}, "
            f"but the recipe selects {sorted(modules)}: missing {missing}{hints}"
        )
    return {name: modules[name] for name in parts if name in modules}
