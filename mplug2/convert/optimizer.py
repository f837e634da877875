"""The official fine-tuning optimizer, for recipes whose published number came from it.

AdamW with one rate for the vision tower and another for the rest; decay by the official rule, which goes by
names: whatever is not called "bias" or "LayerNorm.weight" decays. So CLIP's norms, the branches' norms, the
norm after the universal layers, class token, position tables and latents decay, which the zoo's own optimizer
(mplug2.optim) avoids.
"""

from typing import Any

import jax
import optax

from mplug2.convert.keys import KeyMap
from mplug2.network import nested

Rate = float | optax.Schedule


def official_adamw(
    keys: KeyMap,
    *,
    rate: Rate = 2e-5,
    vision_rate: Rate = 2e-6,
    weight_decay: float = 0.02,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> optax.GradientTransformation:
    """For `{module: nested dict}` of the modules that `keys` maps; defaults are the released configurations'.

    A module that the loss does not reach must be left out: PyTorch skips what has no gradient, AdamW here
    would decay it.
    """
    decayed = _tree(
        keys, lambda names: not any("bias" in name or "LayerNorm.weight" in name for name in names)
    )
    visual = _tree(keys, lambda names: all(name.startswith("visual_encoder.") for name in names))

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda seen, _: "vision" if seen else "rest", _only(visual, params), params)

    def adamw(of: Rate) -> optax.GradientTransformation:
        mask = lambda params: _only(decayed, params)  # noqa: E731
        return optax.adamw(of, b1=betas[0], b2=betas[1], eps=epsilon, weight_decay=weight_decay, mask=mask)

    return optax.partition({"vision": adamw(vision_rate), "rest": adamw(rate)}, labels)


def _tree(keys: KeyMap, rule: Any) -> dict[str, Any]:
    """`rule(official names of an array)` for every array, as a tree like the parameters."""
    flat = {
        (module, *name.split(".")): rule([piece.key for piece in source.pieces])
        for (module, name), source in keys.sources.items()
    }
    return nested(flat)


def _only(tree: dict[str, Any], params: Any) -> dict[str, Any]:
    return {module: tree[module] for module in params}
