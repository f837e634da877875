"""The optimizer that a recipe asks for: AdamW over the trained modules, warm-up + cosine, clipping, a rate
per module.

Frozen modules never come here: their parameters are not differentiated and have no moments. AdamW as in
arXiv:1711.05101 (decay times the learning rate, applied to what the step began with), moments in float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from mplug2.recipe import AdamW
from mplug2.roles import Array

TABLES_KEPT = frozenset({"positions", "types", "latents"})
"""Matrices that are not decayed: their rows are learned tokens or places, not weights of a product."""


def decayed(axes: Mapping[str, Any]) -> dict[str, Any]:
    """Which parameters weight decay pulls to zero: `Network.axes` -> the same tree with a bool for every
    parameter.

    Kernels and word tables are. Not so what has at most one axis beside `layers` (norms, biases, the class
    token, the temperature) and the TABLES_KEPT.
    """

    def decays(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return decayed(value)
        return name not in TABLES_KEPT and sum(axis != "layers" for axis in value) >= 2

    return {name: decays(name, value) for name, value in axes.items()}


def schedule(settings: AdamW, steps: int) -> Callable[[Any], Array]:
    """Steps done before -> learning rate of the next one.

    The rate rises linearly to its peak at step `warmup` (counted from 1; the first step already learns), then
    falls as a half cosine to `final` times the peak at step `steps`, and stays there.
    """

    def rate(done: Any) -> Array:
        step = jnp.asarray(done, jnp.float32) + 1
        rise = step / max(settings.warmup, 1)
        fallen = jnp.clip((step - settings.warmup) / max(steps - settings.warmup, 1), 0.0, 1.0)
        fall = settings.final + (1 - settings.final) * 0.5 * (1 + jnp.cos(jnp.pi * fallen))
        return settings.learning_rate * jnp.where(step < settings.warmup, rise, fall)

    return rate


def optimizer(
    settings: AdamW, steps: int, axes: Mapping[str, Any], rates: Mapping[str, float]
) -> optax.GradientTransformation:
    """AdamW for the modules of `axes` (`Network.axes` of the trained ones); `rates` are factors of the
    learning rate by module, 1 where unsaid. Gradients and parameters are `{module: nested dict}`."""
    adamw = optax.adamw(
        schedule(settings, steps),
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        mask=decayed(axes),
    )
    clip = [optax.clip_by_global_norm(settings.clip)] if settings.clip else []
    return optax.chain(*clip, adamw, _by_module(rates))


def _by_module(rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies a module's whole update, decay included, as its own learning rate would."""

    def scaled(updates: Any, params: Any = None) -> Any:
        return {module: optax.tree.scale(rates.get(module, 1.0), tree) for module, tree in updates.items()}

    return optax.stateless(scaled)
