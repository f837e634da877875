"""The routes through the composition network that tasks share (mPLUG-2, figure 2): see, read, and look
while reading."""

import jax.numpy as jnp

from mplug2.roles import Array, Connector, Fusion, Temporal, Text, Universal, Vision, padding_mask, split_key


def see(
    clips: Array,
    *,
    vision: Vision,
    universal: Universal,
    temporal: Temporal | None = None,
    connector: Connector | None = None,
    key: Array | None = None,
) -> Array:
    """Normalised clips `B T H W C` -> vision tokens `B N D`. A clip of one frame is an image and goes past
    `temporal`."""
    vision_key, connector_key, universal_key = split_key(key, 3)
    tokens = vision(clips, temporal if clips.shape[1] > 1 else None, key=vision_key)
    if connector is not None:
        tokens = connector(tokens, key=connector_key)
    return universal.vision(tokens, key=universal_key)


def read(ids: Array, *, text: Text, universal: Universal, key: Array | None = None) -> Array:
    """Ids `B S` -> text tokens `B S D`."""
    text_key, universal_key = split_key(key, 2)
    return universal.text(text(ids, key=text_key), padding_mask(ids), key=universal_key)


def fused_memory(
    seen: Array, tokens: Array, ids: Array, *, fusion: Fusion, key: Array | None = None
) -> tuple[Array, Array]:
    """What a decoder answers from: vision tokens `B N D`, then the text's tokens that looked at them, and
    the mask `B N+S`."""
    seen, tokens = fusion(seen, tokens, padding_mask(ids), key=key)
    mask = jnp.concatenate([jnp.ones(seen.shape[:2], bool), padding_mask(ids)], axis=1)
    return jnp.concatenate([seen, tokens], axis=1), mask
