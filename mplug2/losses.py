"""What training minimises: pure functions of logits and targets, computed in float32 whatever the logits'
type."""

import jax
import jax.numpy as jnp

from mplug2.roles import PAD, Array


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Negative log-likelihoods: logits `... V`, targets int `...` -> float32 `...`."""
    exact = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(exact, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(exact, axis=-1) - chosen


def word_losses(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Per word: logits `B S V`, targets `B S` with 0 where nothing is to be learned -> (losses `B S`,
    counted `B S`)."""
    counted = (targets != PAD).astype(jnp.float32)
    return cross_entropy(logits, targets) * counted, counted


def word_loss(logits: Array, targets: Array) -> Array:
    """The mean over all words of the batch that count."""
    losses, counted = word_losses(logits, targets)
    return losses.sum() / jnp.maximum(counted.sum(), 1.0)


def contrastive_loss(similarity: Array, positives: Array) -> Array:
    """Symmetric InfoNCE: similarities `B B` (row = vision, column = text, temperature applied), positives
    bool `B B`.

    A row with several positives (one caption that stands for two pictures of the batch) spreads its target
    evenly.
    """

    def one_way(similarity: Array, positives: Array) -> Array:
        targets = positives / positives.sum(-1, keepdims=True)
        return -(targets * jax.nn.log_softmax(similarity, axis=-1)).sum(-1).mean()

    weight = positives.astype(jnp.float32)
    return (one_way(similarity, weight) + one_way(similarity.T, weight.T)) / 2
