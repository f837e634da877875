"""What training minimises: pure functions of logits and targets, computed in float32 at least, whatever the
logits' type."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from mplug2 import sharding
from mplug2.accumulation import everywhere
from mplug2.roles import PAD, Array, sum_dtype

CHUNK = 1 << 24
"""How many logits a device holds at once, 64 MiB of them in float32."""


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Negative log-likelihoods: logits `... V`, targets int `...` -> float32 `...`."""
    exact = logits.astype(sum_dtype(logits))
    chosen = jnp.take_along_axis(exact, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(exact, axis=-1) - chosen


def word_losses(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Per word: logits `B S V`, targets `B S` with 0 where nothing is to be learned -> (losses `B S`,
    counted `B S`)."""
    counted = (targets != PAD).astype(jnp.float32)
    return cross_entropy(logits, targets) * counted, counted


def word_loss(logits: Array, targets: Array) -> Array:
    """The mean over all words of the batch that count, of a part of a batch its share of that."""
    return mean_of_words(*word_losses(logits, targets))


def mean_of_words(losses: Array, counted: Array) -> Array:
    """The sum of losses over the number of those that are counted (1) and not left out (0), of `B S` each, as
    `word_losses` gives them, or of other shapes. The number is that of the whole batch, also in a part."""
    counts = everywhere(counted.sum()[None])
    return losses.sum() * len(counts) / jnp.maximum(counts.sum(), 1.0)


def predicted_losses(
    tokens: Array, predict: Callable[[Array], Array], targets: Array, chunk: int = CHUNK
) -> tuple[Array, Array]:
    """`word_losses` of `predict(tokens)`, tokens `B S D` -> logits `B S V`: where these are more than `chunk`
    on a device, of a few places of each text at a time, forward and (computed again) backward."""
    batch, places, _ = tokens.shape
    mesh = sharding.here()
    # `sequence` does not share the few places of a text.
    devices = mesh.size // mesh.shape["sequence"] if mesh else 1
    logits = jax.eval_shape(predict, tokens).size / devices
    parts = min(places, -int(-logits // chunk))
    if parts <= 1:
        return word_losses(predict(tokens), targets)
    lacking = -places % parts
    tokens, targets = (
        jnp.pad(tokens, ((0, 0), (0, lacking), (0, 0))),
        jnp.pad(targets, ((0, 0), (0, lacking))),
    )
    cut = rearrange(tokens, "b (n s) d -> n b s d", n=parts), rearrange(targets, "b (n s) -> n b s", n=parts)
    found = jax.lax.map(jax.checkpoint(lambda part: word_losses(predict(part[0]), part[1])), cut)
    return jax.tree.map(lambda array: rearrange(array, "n b s -> b (n s)")[:, :places], found)


def contrastive_loss(similarity: Array, positives: Array) -> Array:
    """Symmetric InfoNCE: similarities `B B` (row = vision, column = text, temperature applied), positives
    bool `B B`.

    A row with several positives (one caption that stands for two pictures of the batch) spreads its target
    evenly.
    """

    def one_way(similarity: Array, positives: Array) -> Array:
        targets = positives / positives.sum(-1, keepdims=True)
        return -(targets * jax.nn.log_softmax(similarity, axis=-1)).sum(-1).mean()

    weight = positives.astype(sum_dtype(similarity))
    return (one_way(similarity, weight) + one_way(similarity.T, weight.T)) / 2
