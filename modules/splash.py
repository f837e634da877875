"""Attention on TPUs by the splash kernels that come with JAX: weights are never in main memory, neither
forward nor backward.

A kernel works in tiles of 128 tokens. Sides are padded to them, and the keys that are padding are hidden; of
fewer tokens than a tile the padding would cost more than it saves (`fits`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)

from mplug2.roles import Array
from mplug2.sharding import Axes, even, here, shares

TILE = 128

BLOCK = 1024
"""Tokens of a side that a kernel holds at once, at most; that many squared are 4 MB of scores."""


def fits(query: Array, keys: Array, mask: Array | None) -> bool:
    """Whether the kernels serve: as many queries as keys or more (those are what a mesh spreads), a tile of
    each or more, and a mask of keys alone, `B 1 1 M` or `B 1 1 1 M`, or none."""
    by_key = mask is None or (mask.ndim == query.ndim and mask.shape[-3:-1] == (1, 1))
    return by_key and query.shape[-2] >= keys.shape[-2] >= TILE


def splash_attention(
    query: Array, keys: Array, values: Array, mask: Array | None, axes: Axes, *, interpret: bool = False
) -> Array:
    """`mplug2.modules.functions.attention` without dropout, of what `fits`: `B K N D`, `B K M D`, `B K M D`
    -> `B K N D`, or with frames, `B T K N D`.

    On a mesh each device attends with its own examples, heads and queries, by the logical `axes` of the
    query. `interpret` runs the kernels as plain JAX, on any device."""
    tokens, lead = query.shape[-2], query.ndim - 3
    visible = jnp.ones((*query.shape[:lead], keys.shape[-2]), bool)
    if mask is not None:
        visible &= mask[..., 0, 0, :]
    spread = _padded(query, TILE * shares(axes[-2]))
    if here() is None or even(spread.shape, *axes)[-2] is None:  # other axes take those devices
        spread = _padded(query, TILE)
    keys, values = _padded(keys, TILE), _padded(values, TILE)
    visible = jnp.pad(visible, [(0, 0)] * lead + [(0, keys.shape[-2] - visible.shape[-1])])
    attend = partial(_attend, interpret=interpret)
    if here() is not None:
        by_query = even(spread.shape, *axes)
        by_key = even(keys.shape, *axes[:-2], None, None)
        specs = (by_query, by_key, by_key, even(visible.shape, *axes[:lead], None))
        attend = jax.shard_map(attend, in_specs=specs, out_specs=by_query, check_vma=False)
    return attend(spread, keys, values, visible)[..., :tokens, :]


def _padded(x: Array, multiple: int) -> Array:
    """`... N D` with N up to the next multiple."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % multiple), (0, 0)])


def _attend(query: Array, keys: Array, values: Array, visible: Array, *, interpret: bool) -> Array:
    """Of one device; `visible` is `B M` or `B T M`."""
    heads, many, width = query.shape[-3:]
    few = keys.shape[-2]
    query_block, key_block = _block(many), _block(few)
    kernel: Any = make_splash_mha_single_device(
        MultiHeadMask([FullMask((many, few))] * heads),
        block_sizes=BlockSizes(
            block_q=query_block,
            block_kv=key_block,
            block_q_dkv=query_block,
            block_kv_dkv=key_block,
            use_fused_bwd_kernel=True,
        ),
        interpret=interpret,
    )
    # Who may see each other has the same number.
    queried, seen = jnp.zeros(many, jnp.int32), (~visible).astype(jnp.int32)

    def one(query: Array, keys: Array, values: Array, seen: Array) -> Array:
        return kernel(query, keys, values, SegmentIds(queried, seen))

    def each(x: Array, kept: int) -> Array:
        """Examples, or their frames, along one axis before the last `kept` ones."""
        return x.reshape(-1, *x.shape[x.ndim - kept :])

    mixed = jax.vmap(one)(each(query * width**-0.5, 3), each(keys, 3), each(values, 3), each(seen, 1))
    return mixed.reshape(query.shape)


def _block(tokens: int) -> int:
    return next(block for block in range(BLOCK, 0, -TILE) if tokens % block == 0)
