"""The training step: one pure function of state, frozen parameters and batches, compiled once.

State is a dict: `step` (steps done), `params` and, if the recipe keeps a running average, `ema` (`{module:
nested dict}` of the trained modules), `moments` of the optimizer, `window` (sums of the metrics since the
last line of the log) and `bad` (the first step whose numbers were not finite, with them). Frozen modules, and
those that are adapted by a delta, are an argument, never differentiated.

Batches are by feed (`Recipe.feeds`). Every objective's loss is computed in every step; what is minimised is
their sum by weight. With accumulation, a batch is cut into `accumulate` parts, computed one after the other;
loss and gradient are those of the undivided batch (mplug2.accumulation). What only the whole batch can tell
(how many words it has; for contrast and matching, what all its texts and clips look like) is found before.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from mplug2 import accumulation, kernels, optim, processes, sharding
from mplug2.errors import RecipeError
from mplug2.network import Network, Parameters, select
from mplug2.recipe import Recipe
from mplug2.roles import Array

State = dict[str, Any]
Metrics = dict[str, Any]
Batches = Mapping[str, Mapping[str, Array]]

NEVER = -1
KEYS = {"cpu": "rbg"}
"""Generators of random bits by platform, JAX's default elsewhere. `rbg`, XLA's own, is quick to compile;
JAX's is written out in every program that drops something, and on CPUs compiling those copies takes several
times as long as everything else together. But XLA does not split its own among devices: each would draw, and
hold, the bits of the whole batch, which for attention over 4097 tokens are gigabytes an example."""


def trained(recipe: Recipe) -> list[str]:
    """The modules that are trained. Raises RecipeError if there are none."""
    names = [name for name in recipe.parts if recipe.trains(name)]
    if not names:
        raise RecipeError(f"recipe {recipe.name}: every module is frozen, nothing is trained")
    return names


def _understood(recipe: Recipe, mesh: jax.sharding.Mesh) -> dict[str, Any] | None:
    """The recipe's options of the compiler. Raises RecipeError with the first that XLA does not know on such
    devices."""
    for name, value in recipe.compiler.items():
        place = SingleDeviceSharding(mesh.devices.flat[0])
        try:
            jax.jit(lambda: 0, out_shardings=place, compiler_options={name: value}).lower().compile()
        except (jax.errors.JaxRuntimeError, TypeError) as error:
            said = str(error).splitlines()[0]
            raise RecipeError(f"recipe {recipe.name}: compiler.{name} is {value!r}: {said}") from None
    return dict(recipe.compiler) or None


def check_mesh(recipe: Recipe, mesh: sharding.AnyMesh) -> None:
    """Raises RecipeError unless the mesh divides the recipe's heads and the parts of its batches."""
    sharding.check_heads(mesh, recipe.parts)
    shares = sharding.batch_shares(mesh)
    unit = recipe.accumulate * shares
    for name, objective in recipe.objectives.items():
        if objective.batch % unit:
            below = objective.batch // unit * unit
            raise RecipeError(
                f"objective {name}: a batch of {objective.batch} does not divide into {recipe.accumulate}"
                f" part(s) (accumulate) for each of {shares} device(s) (mesh data x fsdp);"
                f" {f'{below} or ' if below else ''}{below + unit} would"
            )


def check_attention(recipe: Recipe, platform: str) -> None:
    """Raises RecipeError where kernels are asked for that cannot be had."""
    execution = recipe.execution
    if needed := kernels.needed(execution, platform):
        raise RecipeError(
            f"recipe {recipe.name}: execution.attention={execution.attention} needs {needed},"
            f" here are {platform} and {execution.dtype}; written and xla run anywhere"
        )


def _unrolled_on_cpus(network: Network, mesh: jax.sharding.Mesh) -> Network:
    """The network with its layers unrolled where several processes train on CPUs. There XLA (jax 0.10.2)
    starts a collective as soon as a loop before it has *started*, so that those of the loop come in no
    certain order and processes may wait for different ones.

    Two loops stay: that over parts of a batch (`accumulate`), for whose result every later collective waits;
    and that over chunks of words, which may still hang (`mplug2.losses`: only where a device has more logits
    than a chunk holds)."""
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return network
    return Network(network.configs, replace(network.execution, scan=False))


class Trainer:
    """A recipe and its network made ready to train: `begin`, `step`, and where everything lies.

    On one device nothing is sharded; on a mesh parameters, moments and averages follow the table of
    mplug2.sharding. `mesh` (default: the recipe's, of the devices that are here) may be one of devices that
    are not, for a step that is only compiled (`lower`). `network` is then the one that is trained, which has
    its layers unrolled in several processes of CPUs.
    """

    def __init__(self, recipe: Recipe, network: Network, mesh: jax.sharding.Mesh | None = None):
        self.mesh = recipe.mesh.build() if mesh is None else mesh
        check_mesh(recipe, self.mesh)
        check_attention(recipe, self.mesh.devices.flat[0].platform)
        self.recipe, self.network = recipe, _unrolled_on_cpus(network, self.mesh)
        self.names = trained(recipe)
        axes = {name: network.axes[name] for name in self.names}
        self.rate = optim.schedule(recipe.optimizer, recipe.steps)
        self.optimizer = optim.optimizer(recipe.optimizer, recipe.steps, axes, recipe.learning_rates)
        self.shardings = self._state_shardings() if self.mesh.size > 1 else None
        placed = None if self.shardings is None else (self.shardings, self._replicated)
        self.step: Callable[[State, Parameters, Batches], tuple[State, Metrics]]
        self.step = jax.jit(
            self._step,
            donate_argnums=0,
            out_shardings=placed,
            compiler_options=_understood(recipe, self.mesh),
        )
        """(state, frozen parameters, batches) -> (state, metrics). The state's buffers are reused, do not
        keep them."""

    # --------------------------------------------------------------------------------------------------------
    # State

    def begin(self, params: Parameters) -> State:
        """The state before the first step. `params` (all modules', or the trained ones') are copied: a step
        reuses the buffers of its state."""

        def copied(params: Parameters) -> State:
            return jax.tree.map(jnp.copy, self._state(params))

        params = {name: params[name] for name in self.names}
        if self.shardings is not None:
            params = processes.place(params, self.shardings["params"])
        return jax.jit(copied, out_shardings=self.shardings)(params)

    def resume(self, step: int, saved: State) -> State:
        """The state after `step` steps, of which `params`, `moments`, `window` and `ema` were saved."""
        counters = jax.jit(self._counters)()  # a buffer of its own for every number, for the step to reuse
        state = counters | saved | {"step": counters["step"] + step}
        # All of it placed alike: arrays that are not would compile the next step a second time.
        return processes.place(state, jax.tree.map(lambda leaf: leaf.sharding, self.abstract))

    def _state(self, params: Parameters) -> State:
        state = {"params": params, "moments": self.optimizer.init(params), **self._counters()}
        return state | ({"ema": params} if self.recipe.ema else {})

    def _counters(self) -> State:
        zero = jnp.zeros((), float)  # float32, where JAX is not told to compute in float64
        metrics = ("loss", *(f"loss/{name}" for name in self.recipe.objectives), "gradient_norm")
        return {
            "step": jnp.zeros((), jnp.int32),
            "window": {"count": jnp.zeros((), jnp.int32), "sums": dict.fromkeys(metrics, zero)},
            "bad": {"step": jnp.full((), NEVER, jnp.int32), "values": dict.fromkeys(metrics, zero)},
        }

    @property
    def abstract(self) -> State:
        """The state's shapes and types, and where its arrays lie: what a checkpoint is restored into."""
        shapes = jax.eval_shape(self._state, {name: self.network.shapes[name] for name in self.names})
        places = self.shardings
        if places is None:
            places = jax.tree.map(lambda _: self._only, shapes)
        return jax.tree.map(_placed, shapes, places)

    @property
    def abstract_frozen(self) -> Parameters:
        """The same of the frozen modules."""
        shapes = {name: tree for name, tree in self.network.shapes.items() if name not in self.names}
        if self.shardings is None:
            return jax.tree.map(lambda leaf: _placed(leaf, self._only), shapes)
        axes = {name: self.network.axes[name] for name in shapes}
        return jax.tree.map(_placed, shapes, sharding.shardings(self.mesh, axes, shapes))

    def abstract_batches(self, batches: Any) -> Any:
        """The same of whole batches of such shapes and types, `{feed: batch}`."""
        place = self._only if self.shardings is None else sharding.batch_sharding(self.mesh)
        return jax.tree.map(lambda leaf: _placed(leaf, place), batches)

    def lower(self, batches: Any) -> jax.stages.Lowered:
        """The step, lowered for batches of such shapes and types; no array is needed."""
        step: Any = self.step
        return step.lower(self.abstract, self.abstract_frozen, self.abstract_batches(batches))

    def place_frozen(self, params: Parameters) -> Parameters:
        """The frozen modules of `params` on their devices."""
        frozen = {name: tree for name, tree in params.items() if name not in self.names}
        if self.shardings is None:
            return jax.device_put(frozen)
        axes = {name: self.network.axes[name] for name in frozen}
        return processes.place(frozen, sharding.shardings(self.mesh, axes, frozen))

    def place_batch(self, array: Any) -> Array:
        """One array of a batch (this process's share of it) on its devices."""
        if self.shardings is None:
            return jax.device_put(array)
        own, everywhere = self._shares
        whole = (len(array) * everywhere // own, *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding.batch_sharding(self.mesh), array, whole)

    @cached_property
    def _shares(self) -> tuple[int, int]:
        """Of the equal parts that a batch is spread in: how many this process holds, and how many there
        are."""
        everywhere = sharding.batch_shares(self.mesh)
        return len(processes.held(self.mesh, everywhere)), everywhere

    @property
    def _only(self) -> SingleDeviceSharding:
        return SingleDeviceSharding(self.mesh.devices.flat[0])

    @property
    def _replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def _state_shardings(self) -> State:
        shapes = {name: self.network.shapes[name] for name in self.names}
        params = sharding.shardings(self.mesh, {name: self.network.axes[name] for name in self.names}, shapes)
        state = jax.eval_shape(self._state, shapes)
        places = jax.tree.map(lambda _: self._replicated, state)
        places["moments"] = optax.tree.map_params(
            self.optimizer,
            lambda _, place: place,
            state["moments"],
            params,
            transform_non_params=lambda _: self._replicated,
        )
        return places | {name: params for name in ("params", "ema") if name in state}

    # --------------------------------------------------------------------------------------------------------
    # Step

    def loss(
        self, params: Parameters, frozen: Parameters, batches: Batches, key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        """(sum by weight, {objective: loss}). Clips come as uint8 and are normalised here."""
        modules = self.network.bind({**frozen, **params}, key)
        ready = {feed: self._normalised(batch) for feed, batch in batches.items()}
        total, losses = jnp.zeros((), float), {}
        for place, (name, objective) in enumerate(self.recipe.objectives.items()):
            own_key = None if key is None else jax.random.fold_in(key, place)
            batch = ready[self.recipe.feed_of(name)]
            losses[name] = objective.task(batch, own_key, **select(objective.task, modules))
            total += objective.weight * losses[name]
        return total, losses

    def _normalised(self, batch: Mapping[str, Array]) -> Mapping[str, Array]:
        if "clips" not in batch:
            return batch
        return {**batch, "clips": self.recipe.preprocessing.to_float(batch["clips"])}

    def gradients(
        self, params: Parameters, frozen: Parameters, batches: Batches, key: Array | None
    ) -> tuple[tuple[Array, dict[str, Array]], Parameters]:
        """((sum, losses), gradient of the sum) of the whole batch, computed in parts or not."""
        with sharding.on(self.mesh):
            return self._gradients(params, frozen, batches, key)

    def _gradients(
        self, params: Parameters, frozen: Parameters, batches: Batches, key: Array | None
    ) -> tuple[tuple[Array, dict[str, Array]], Parameters]:
        differentiate = jax.value_and_grad(self.loss, has_aux=True)
        parts = self.recipe.accumulate
        if parts == 1:
            return differentiate(params, frozen, batches, key)

        def of_part(function: Callable, params: Parameters, frozen: Parameters, key: Any, *part: Any) -> Any:
            index, batch = part
            return function(params, frozen, batch, None if key is None else jax.random.fold_in(key, index))

        # Every device keeps examples of its own in every part: example i goes to part i modulo `parts`.
        split = jax.tree.map(lambda array: rearrange(array, "(b a) ... -> a b ...", a=parts), dict(batches))
        known = accumulation.found(partial(of_part, self.loss), parts, split, params, frozen, key)
        # No collective of the parts begins before these have ended: on CPUs they would mix.
        split, known = jax.lax.optimization_barrier((split, known))

        def one_part(sums: Any, part: Any) -> tuple[Any, None]:
            index, batch = part
            with accumulation.part_of(parts, index, known):
                its = of_part(differentiate, params, frozen, key, index, batch)
            return jax.tree.map(jnp.add, sums, its), None

        shapes = jax.eval_shape(differentiate, params, frozen, batches, key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        sums, _ = jax.lax.scan(one_part, zeros, (jnp.arange(parts), split))
        return jax.tree.map(lambda total: total / parts, sums)

    def _step(self, state: State, frozen: Parameters, batches: Batches) -> tuple[State, Metrics]:
        recipe, done = self.recipe, state["step"]
        generator = KEYS.get(self.mesh.devices.flat[0].platform)
        key = (
            jax.random.fold_in(jax.random.key(recipe.seed, impl=generator), done) if recipe.dropout else None
        )
        (total, losses), gradients = self.gradients(state["params"], frozen, batches, key)
        updates, moments = self.optimizer.update(gradients, state["moments"], state["params"])
        params = self._within_bounds(optax.apply_updates(state["params"], updates))

        values = {"loss": total, **{f"loss/{name}": loss for name, loss in losses.items()}}
        # Fenced off: XLA on CPUs would share the squares with the optimizer, and so write all of them down.
        fenced = jax.tree.map(jax.lax.optimization_barrier, gradients)
        values["gradient_norm"] = optax.tree.norm(fenced)
        new = {"step": done + 1, "params": params, "moments": moments}
        new["window"] = _windowed(state["window"], values, fresh=done % recipe.log_every == 0)
        new["bad"] = _first_bad(state["bad"], values, done + 1)
        if recipe.ema:
            new["ema"] = averaged(state["ema"], params, recipe.ema, done)
        count = new["window"]["count"]
        metrics = {name: total / count for name, total in new["window"]["sums"].items()}
        # Outputs of their own, since the state's buffers are donated to the next step.
        return new, {
            "metrics": metrics | {"learning_rate": self.rate(done)},
            "bad": jax.tree.map(jnp.copy, new["bad"]),
        }

    def _within_bounds(self, params: Any) -> Parameters:
        """Those that have bounds brought back to them: no momentum carries a parameter away, from where it
        would take as many steps to return."""
        bounds = {name: self.network.bounds[name] for name in params}
        return jax.tree.map(lambda array, own: jnp.clip(array, *own) if own else array, params, bounds)


def _placed(leaf: Any, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def averaged(ema: Parameters, params: Parameters, decay: float, done: Array | int) -> Parameters:
    """The running average after one step more, `done` steps having gone before: `d * ema + (1 - d) * params`
    with `d = min(decay, (1 + done) / (10 + done))`, so that the random start is soon forgotten."""
    done = jnp.asarray(done, float)
    share = jnp.minimum(decay, (1 + done) / (10 + done))
    return jax.tree.map(lambda old, new: share * old + (1 - share) * new, ema, params)


def _windowed(window: State, values: Mapping[str, Array], *, fresh: Array) -> State:
    """Sums since the last line of the log, this step included; they begin anew where `fresh`."""
    return {
        "count": jnp.where(fresh, 0, window["count"]) + 1,
        "sums": {name: jnp.where(fresh, 0.0, window["sums"][name]) + value for name, value in values.items()},
    }


def _first_bad(bad: State, values: Mapping[str, Array], step: Array) -> State:
    """Keeps the first step at which something was not finite, and its numbers."""
    finite = jnp.stack([jnp.isfinite(value) for value in values.values()]).all()
    happened = (bad["step"] == NEVER) & ~finite
    return jax.tree.map(
        lambda new, old: jnp.where(happened, new, old), {"step": step, "values": dict(values)}, bad
    )
