"""The optimizer that a recipe asks for: AdamW over the trained modules, warm-up + cosine, clipping, a rate
per module.

Frozen modules never come here: their parameters are not differentiated and have no moments. AdamW as in
arXiv:1711.05101 (decay times the learning rate, applied to what the step began with), moments in float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from mplug2.recipe import AdamW, OfficialAdamW
from mplug2.roles import Array


def decayed(axes: Mapping[str, Any]) -> dict[str, Any]:
    """Which parameters weight decay pulls to zero: `Network.axes` -> the same tree with a bool for every
    parameter.

    Kernels and word tables are. Not so what has at most one axis beside `layers` (norms, biases, the class
    token, the temperature), and tables of `places`, whose rows are learned tokens or places and no weights of
    a product (positions, types, latents, prompts). The axes alone decide, whatever a parameter is called.
    """

    def decays(value: Any) -> Any:
        if isinstance(value, Mapping):
            return decayed(value)
        return "places" not in value and sum(axis != "layers" for axis in value) >= 2

    return {name: decays(value) for name, value in axes.items()}


_BERT = frozenset({"embedding", "layers", "predictor"})
"""What BERT's norms lie in; other norms are not called "LayerNorm" in the official code."""


def officially_decayed(axes: Mapping[str, Any]) -> dict[str, Any]:
    """`decayed` by the official rule, which goes by names: all but what is called "bias" or
    "LayerNorm.weight". So the norms of vision, of its branches and after the universal layers decay, class
    token, positions and latents too."""

    def decays(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {name: decays(inner, (*path, name)) for name, inner in value.items()}
        bias, scale = path[-1] == "bias", path[-1] == "scale"
        return not bias and not (scale and path[0] in _BERT)

    return {module: decays(tree, ()) for module, tree in axes.items()}


def schedule(settings: AdamW, steps: int, factor: float = 1.0) -> Callable[[Any], Array]:
    """Steps done before -> learning rate of the next one, for modules whose rate has `factor`.

    The rate rises linearly to its peak at step `warmup` (counted from 1; the first step already learns), then
    falls as a half cosine to `final` times the peak at step `steps`, and stays there.
    """
    if isinstance(settings, OfficialAdamW):
        return _official_schedule(settings, steps, factor)

    def rate(done: Any) -> Array:
        step = jnp.asarray(done, float) + 1
        rise = step / max(settings.warmup, 1)
        fallen = jnp.clip((step - settings.warmup) / max(steps - settings.warmup, 1), 0.0, 1.0)
        fall = settings.final + (1 - settings.final) * 0.5 * (1 + jnp.cos(jnp.pi * fallen))
        return factor * settings.learning_rate * jnp.where(step < settings.warmup, rise, fall)

    return rate


_SAWTOOTH = 100, 20_000
"""The official captioning's: every so many iterations of its first epoch, up to this one."""


def _official_schedule(settings: OfficialAdamW, steps: int, factor: float) -> Callable[[Any], Array]:
    """timm's cosine as the official loops drive it: each iteration sets the rate of the one after it."""
    peak, floor = factor * settings.learning_rate, settings.final * settings.learning_rate

    total = steps * settings.iterations

    def rate(done: Any) -> Array:
        # The last iteration before the one that ends this step: its number is the time.
        last = jnp.maximum((jnp.asarray(done, jnp.int32) + 1) * settings.iterations - 2, 0)
        every, until = _SAWTOOTH
        falls_back = (last < settings.sawtooth) & (last <= until) & (last % every == 0)
        time = jnp.where(falls_back, last // every, last).astype(float)
        risen = jnp.minimum(time / max(settings.warmup, 1), 1.0)
        fallen = jnp.clip((time - settings.warmup) / max(total - settings.warmup, 1), 0.0, 1.0)
        share = jnp.where(time < settings.warmup, risen, 0.5 * (1 + jnp.cos(jnp.pi * fallen)))
        return floor + (peak - floor) * share

    return rate


def optimizer(
    settings: AdamW, steps: int, axes: Mapping[str, Any], rates: Mapping[str, float]
) -> optax.GradientTransformation:
    """AdamW for the modules of `axes` (`Network.axes` of the trained ones); `rates` are factors of the
    learning rate by module, 1 where unsaid. Gradients and parameters are `{module: nested dict}`."""
    official = isinstance(settings, OfficialAdamW)
    adamw = optax.adamw(
        1.0,
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        mask=officially_decayed(axes) if official else decayed(axes),
    )
    clip = [optax.clip_by_global_norm(settings.clip)] if settings.clip else []
    rated = {module: schedule(settings, steps, rates.get(module, 1.0)) for module in axes}
    return optax.chain(*clip, adamw, _scheduled(rated))


def _scheduled(rates: Mapping[str, Callable[[Any], Array]]) -> optax.GradientTransformation:
    """Multiplies a module's whole update, decay included, by its own learning rate, a function of the steps
    done."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByScheduleState]:
        scaled = {
            module: optax.tree.scale(rates[module](state.count), tree) for module, tree in updates.items()
        }
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
