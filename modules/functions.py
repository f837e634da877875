"""What layers compute: products, attention, activations, dropout. Functions of arrays; no parameter is owned
here.

Activations keep the dtype they come in; softmax and sums are float32. A dropout happens only where a key is
given. Some gradients are written out: those of `dense` and `attention` for the layouts that they work in,
those of parameters that meet many tokens for sums in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mplug2.roles import Array, sum_dtype
from mplug2.sharding import Axes, here

KEPT = "kept"

PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(KEPT),
)
"""What the backward pass does not compute again, by Execution's remat "dots": products with weights, and what
drops out, which is a bit to save but slow to draw. Attention's own products are little work and large arrays
(arXiv:2205.05198, section 5)."""

OFFLOADED = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
"""Remat "offload": the same products wait in the host's memory."""


@jax.custom_vjp
def dense(x: Array, kernel: Array) -> Array:
    """`... I`, `I O` -> `... O`, multiplied in x's dtype, accumulated in float32.

    The gradients are written out: the kernel's contracts all token axes at once, in the layout that the
    kernel is stored in (XLA's own rule transposes it, a copy of every weight each step), and every product
    accumulates in float32 (on CPUs a bfloat16 product that returns float32 is also twice as fast as one
    that returns bfloat16).
    """
    return _product(x, kernel)


def _product(x: Array, kernel: Array) -> Array:
    return lax.dot_general(
        x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=sum_dtype(x)
    ).astype(x.dtype)


def _dense_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    # Not `dense`: remat policies would see a call, not a product that is worth keeping.
    return _product(x, kernel), (x, kernel)


def _dense_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    to_x = lax.dot_general(
        gradient,
        kernel.astype(gradient.dtype),
        (((gradient.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=sum_dtype(gradient),
    )
    if here() is None:
        # As a product of two matrices: with several token axes XLA would transpose x first, a copy of every
        # activation. (On a mesh, axes that are joined would be gathered.)
        x, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    leading = tuple(range(x.ndim - 1))
    to_kernel = lax.dot_general(
        x, gradient, ((leading, leading), ((), ())), preferred_element_type=sum_dtype(x)
    )
    return to_x.astype(x.dtype), to_kernel.astype(kernel.dtype)


dense.defvjp(_dense_forward, _dense_backward)


# -----------------------------------------------------------------------------------------------------------
# Parameters that meet many tokens. Cast to bfloat16 and then spread out, a parameter would get the sum of its
# tokens' gradients in bfloat16: of thousands of them little but rounding is left (8 bits lose what is below
# 1/256 of the sum so far).


def add(x: Array, parameter: Array) -> Array:
    """x `... D` + a parameter of its last axes, in x's dtype."""
    everywhere: Array = repeated(parameter, x.shape, x.dtype)
    return x + everywhere


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def repeated(parameter: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """The parameter in that dtype, broadcast to that shape as NumPy does."""
    return jnp.broadcast_to(parameter.astype(dtype), shape)


def _repeated_forward(parameter: Array, shape: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
    return repeated(parameter, shape, dtype), parameter


def _repeated_backward(shape: tuple[int, ...], dtype: Any, parameter: Array, gradient: Array) -> tuple[Array]:
    return (_summed(gradient, parameter),)


repeated.defvjp(_repeated_forward, _repeated_backward)


@jax.custom_vjp
def scale(x: Array, parameter: Array) -> Array:
    """x `... D` times a parameter of its last axes, in x's dtype."""
    return x * parameter.astype(x.dtype)


def _scale_forward(x: Array, parameter: Array) -> tuple[Array, tuple[Array, Array]]:
    return scale(x, parameter), (x, parameter)


def _scale_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, parameter = saved
    exact = sum_dtype(x)
    to_parameter = _summed(gradient.astype(exact) * x.astype(exact), parameter)
    return gradient * parameter.astype(gradient.dtype), to_parameter


scale.defvjp(_scale_forward, _scale_backward)


def _summed(gradient: Array, parameter: Array) -> Array:
    """The gradient of what the parameter was broadcast to -> that of the parameter."""
    added = gradient.ndim - parameter.ndim
    grown = (
        added + axis for axis, size in enumerate(parameter.shape) if size != gradient.shape[added + axis]
    )
    summed = gradient.sum((*range(added), *grown), dtype=sum_dtype(gradient))
    return summed.reshape(parameter.shape).astype(parameter.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: Array, kernel: Array, stride: int) -> Array:
    """`B H W I`, `h w I O` -> `B H/stride W/stride O`, padded, in x's dtype."""
    return _convolved(x, kernel, stride)


def _convolved(x: Array, kernel: Array, stride: int) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _convolve_forward(x: Any, kernel: Any, stride: int) -> tuple[Array, Any]:
    wanted = () if x.perturbed else None  # not of pixels: nobody asks for their gradient
    return _convolved(x.value, kernel.value, stride), (x.value, kernel.value, wanted)


def _convolve_backward(stride: int, saved: Any, gradient: Array) -> tuple[Array | None, Array]:
    x, kernel, wanted = saved
    exact, to_x = sum_dtype(x), None
    if wanted is not None:
        (to_x,) = jax.linear_transpose(lambda x: _convolved(x, kernel, stride), x)(gradient)
    (to_kernel,) = jax.linear_transpose(lambda kernel: _convolved(x.astype(exact), kernel, stride), kernel)(
        gradient.astype(exact)
    )
    return to_x, to_kernel


convolve.defvjp(_convolve_forward, _convolve_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def bounded(parameter: Array, least: float, most: float) -> Array:
    """The parameter, or the bound that it is beyond. There a gradient passes that leads back, none that leads
    further out (`clip` would let neither, and what is once beyond could never come back)."""
    return jnp.clip(parameter, least, most)


def _bounded_forward(parameter: Array, least: float, most: float) -> tuple[Array, Array]:
    return jnp.clip(parameter, least, most), parameter


def _bounded_backward(least: float, most: float, parameter: Array, gradient: Array) -> tuple[Array]:
    # A step goes against its gradient. What is at a bound, where a step leaves it, has the whole gradient, so
    # that gradients of a batch's parts still add up to the batch's.
    leads_out = ((parameter < least) & (gradient > 0)) | ((parameter > most) & (gradient < 0))
    return (jnp.where(leads_out, 0, gradient),)


bounded.defvjp(_bounded_forward, _bounded_backward)


# -----------------------------------------------------------------------------------------------------------
# Attention


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attention(
    query: Array, keys: Array, values: Array, mask: Array | None, kept: Array | None, rate: float
) -> Array:
    """Scaled dot-product attention by heads: `B K N D`, `B K M D`, `B K M D` -> `B K N D` (or with further
    axes before K); softmax in float32. `mask`, True = may look, broadcasts to `B K N M`; weights that are
    not `kept`, `B K N M`, drop out, at `rate`.

    The gradients are written out: every product takes its factors as they lie (XLA's own rules turn them,
    and the weights, several times), and the softmax needs a sum over D instead of one over M.
    """
    return _attention_forward(query, keys, values, mask, kept, rate)[0]


def _attention_forward(
    query: Array, keys: Array, values: Array, mask: Array | None, kept: Array | None, rate: float
) -> tuple[Array, Any]:
    scores = _by_head(query, keys, -1, -1)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp((scores - scores.max(-1, keepdims=True)) * query.shape[-1] ** -0.5)
    share = 1 / weights.sum(-1, keepdims=True)  # of what is mixed, not of the weights: fewer to multiply
    dropped = _dropped(weights, kept, rate).astype(values.dtype)
    mixed = (_by_head(dropped, values, -1, -2) * share).astype(query.dtype)
    return mixed, (query, keys, values, mask, kept, weights, share, mixed)


def _attention_backward(rate: float, saved: Any, gradient: Array) -> tuple[Array | None, ...]:
    query, keys, values, mask, kept, weights, share, mixed = saved
    scaled = gradient * share
    dropped = _dropped(weights, kept, rate).astype(values.dtype)
    to_values = _by_head(dropped, scaled.astype(values.dtype), -2, -2)
    to_weights = _dropped(_by_head(scaled.astype(values.dtype), values, -1, -1), kept, rate)
    to_scores = weights * (to_weights - (scaled * mixed).sum(-1, keepdims=True)) * query.shape[-1] ** -0.5
    if mask is not None:  # of a row that may look nowhere, whose weights are not 0
        to_scores = jnp.where(mask, to_scores, 0)
    to_scores = to_scores.astype(query.dtype)
    to_query = _by_head(to_scores, keys, -1, -2)
    to_keys = _by_head(to_scores, query, -2, -2)
    return (
        to_query.astype(query.dtype),
        to_keys.astype(keys.dtype),
        to_values.astype(values.dtype),
        None,
        None,
    )


attention.defvjp(_attention_forward, _attention_backward)


def fused_attention(
    query: Array, keys: Array, values: Array, mask: Array | None, implementation: str, axes: Axes
) -> Array:
    """`attention` without dropout by `jax.nn.dot_product_attention`, its "xla" or "cudnn", or by the "splash"
    kernels of TPUs, and XLA's where those do not fit: no weights are kept for the gradient.

    `axes` are the logical ones of the query. A row that may look nowhere is undefined by cuDNN and splash.
    """
    if implementation == "splash":
        from mplug2.modules import splash  # half a second that only TPUs need

        if splash.fits(query, keys, mask):
            return splash.splash_attention(query, keys, values, mask, axes)
        implementation = "xla"
    turned = (rearrange(x, "... k n d -> (...) n k d") for x in (query, keys, values))
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*query.shape[:-3], 1, query.shape[-2], keys.shape[-2]))
        mask = rearrange(mask, "... k n m -> (...) k n m")
    how: Any = implementation
    mixed = jax.nn.dot_product_attention(*turned, mask=mask, implementation=how)
    return rearrange(mixed, "b n k d -> b k n d").reshape(query.shape)


def _by_head(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """The product of every head of every example, summed over an axis of each, in float32."""
    each = tuple(range(left.ndim - 2))
    contracted = (((left.ndim + left_axis,), (right.ndim + right_axis,)), (each, each))
    return lax.dot_general(left, right, contracted, preferred_element_type=sum_dtype(left, right))


def _dropped(x: Array, kept: Array | None, rate: float) -> Array:
    return x if kept is None else jnp.where(kept, x / (1.0 - rate), 0)


# -----------------------------------------------------------------------------------------------------------
# Activations, dropout


def quick_gelu(x: Array) -> Array:
    """CLIP's approximation, x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """The exact one, with the error function, as BERT has it."""
    return jax.nn.gelu(x, approximate=False)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    return _dropped(x, keep(key, rate, x.shape), rate).astype(x.dtype)


def drop_path(branch: Array, rate: float, key: Array | None) -> Array:
    """Drops the whole residual branch of some examples: `B ...`."""
    shape = branch.shape[:1] + (1,) * (branch.ndim - 1)
    return _dropped(branch, keep(key, rate, shape), rate).astype(branch.dtype)


def keep(key: Array | None, rate: float, shape: tuple[int, ...]) -> Array | None:
    """True where nothing drops out, at random; None where nothing does at all."""
    if key is None or rate == 0.0:
        return None
    return checkpoint_name(jax.random.bernoulli(key, 1.0 - rate, shape), KEPT)
