"""The layers that modules are made of; the only file that names logical axes (devices live in
mplug2.sharding).

Every parameter is a float32 `nnx.Param` with an `axes` tuple, one logical name a dimension. Kernels are
stored `inputs, outputs`, so that one decoded token is a row times a matrix read in memory order.
Activations keep the dtype they come in; norm statistics are float32.

Source: BERT (post-norm layer) and CLIP (pre-norm block, in vision.py) as used by the official mPLUG-2 code.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax

from mplug2.errors import RecipeError
from mplug2.modules.functions import (
    OFFLOADED,
    PRODUCTS,
    add,
    attention,
    dense,
    dropout,
    fused_attention,
    gelu,
    keep,
)
from mplug2.roles import PAD, Array, Execution, split_key, sum_dtype
from mplug2.sharding import Axes, constrain, gathered, here

Initializer = Callable[[Array, tuple[int, ...]], Array]


def normal(deviation: float = 0.02) -> Initializer:
    return lambda key, shape: deviation * jax.random.normal(key, shape, jnp.float32)


def zeros(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.zeros(shape, jnp.float32)


def ones(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.ones(shape, jnp.float32)


def parameter(
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    rngs: nnx.Rngs,
    bounds: tuple[float, float] | tuple[()] = (),
) -> nnx.Param:
    """A float32 parameter with one logical axis name a dimension, which training keeps within `bounds`."""
    # Cast: a weakly typed array (`jnp.full` of a Python number) would turn strong in the first step and
    # compile it again.
    return nnx.Param(init(rngs.params(), shape).astype(jnp.float32), axes=axes, bounds=bounds)


def spread(x: Array, last: str | None = None) -> Array:
    """Activations `B D`, `B N D` or `B T N D` on the devices of a mesh; `last` names the last axis."""
    leading = {2: ("batch",), 3: ("batch", "tokens"), 4: ("batch", "frames", "tokens")}
    return constrain(x, *leading[x.ndim], last)


def whole(x: Array) -> Array:
    """All of it on every device of a mesh."""
    return constrain(x, *(None,) * x.ndim)


def spread_pictures(x: Array, channels: str | None = None) -> Array:
    """The same of pictures, `B H W C` or `B T H W C`, that no device has a part of: XLA's convolutions cut by
    height and by channels at once are wrong (jax 0.10.2: sums over both axes of the mesh)."""
    return constrain(x, *("batch", "frames")[: x.ndim - 3], None, None, channels)


def spread_heads(x: Array, tokens: str | None, last: str | None = None) -> Array:
    """The same of heads, `B K N D` or `B T K N D`; `tokens` names N, None where it is to be whole."""
    return constrain(x, *heads_axes(x, tokens, last))


def heads_axes(x: Array, tokens: str | None, last: str | None = None) -> Axes:
    """The logical axes of heads `B K N D` or `B T K N D`, or of attention's weights `B K N M` or `B T K N M`;
    `tokens` is that of N, `last` that of D or M."""
    return (*("batch", "frames")[: x.ndim - 3], "heads", tokens, last)


# -----------------------------------------------------------------------------------------------------------
# Layers


class Linear(nnx.Module):
    """`... inputs -> ... outputs`. Begins with outputs as large as its inputs (BERT's 0.02 does so at no
    width but its own, and leaves the narrow modules of the shelf hardly any signal)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        axes: tuple[str, str],
        rngs: nnx.Rngs,
        init: Initializer | None = None,
    ):
        self.kernel = parameter(init or normal(inputs**-0.5), (inputs, outputs), axes, rngs)
        self.bias = parameter(zeros, (outputs,), axes[1:], rngs)

    def __call__(self, x: Array) -> Array:
        return add(dense(x, self.kernel[...]), self.bias[...])


class Norm(nnx.Module):
    """Layer norm over the last axis, statistics in float32."""

    def __init__(self, width: int, *, epsilon: float, rngs: nnx.Rngs):
        self.scale = parameter(ones, (width,), ("norm",), rngs)
        self.bias = parameter(zeros, (width,), ("norm",), rngs)
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        exact = x.astype(sum_dtype(x))
        centred = exact - exact.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        scaled = centred * lax.rsqrt(variance + self.epsilon) * self.scale[...] + self.bias[...]
        return scaled.astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention of `B N D` over itself or over a context `B M E`; of `B T N D` within each of T
    frames.

    On a mesh the longer side is spread over `sequence`: queries over their devices, which then need all keys,
    or the keys, whose shares of the softmax are then summed.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rngs: nnx.Rngs,
        context_width: int | None = None,
        dropout: float = 0.0,
        execution: Execution = Execution(),
    ):
        if width % heads:
            raise RecipeError(f"a width of {width} does not divide into {heads} heads")
        context_width = context_width or width
        self.query = Linear(width, width, axes=("embed", "heads"), rngs=rngs)
        self.key = Linear(context_width, width, axes=("embed", "heads"), rngs=rngs)
        self.value = Linear(context_width, width, axes=("embed", "heads"), rngs=rngs)
        self.out = Linear(width, width, axes=("heads", "embed"), rngs=rngs)
        self.heads, self.dropout = heads, dropout
        self.implementation = execution.attention

    def _split(self, x: Array) -> Array:
        return rearrange(x, "... n (k d) -> ... k n d", k=self.heads)

    def memory(self, context: Array) -> tuple[Array, Array]:
        """What is attended to: keys and values `B K M D` of a context `B M E`."""
        keys, values = self._split(self.key(context)), self._split(self.value(context))
        return spread_heads(keys, "tokens"), spread_heads(values, "tokens")

    def attend(
        self, x: Array, memory: tuple[Array, Array], mask: Array | None = None, *, key: Array | None = None
    ) -> Array:
        """x `B N D` attends to ready keys and values `B K M D`; mask, True = may look, broadcasts to `B K N
        M`."""
        query, (keys, values) = self._split(self.query(x)), memory
        many, few = ("tokens", None) if query.shape[-2] >= keys.shape[-2] else (None, "tokens")
        query, keys, values = spread_heads(query, many), spread_heads(keys, few), spread_heads(values, few)
        kept = keep(key, self.dropout, (*query.shape[:-1], keys.shape[-2]))
        if kept is not None:
            kept = spread_heads(kept, many, few)
        mixed: Array
        if kept is None and self.implementation != "written":
            axes = heads_axes(query, many)
            mixed = fused_attention(query, keys, values, mask, self.implementation, axes)
        else:
            mixed = attention(query, keys, values, mask, kept, self.dropout)
        return spread(self.out(spread(rearrange(mixed, "... k n d -> ... n (k d)"), "heads")))

    def __call__(
        self, x: Array, context: Array | None = None, mask: Array | None = None, *, key: Array | None = None
    ) -> Array:
        return self.attend(x, self.memory(x if context is None else context), mask, key=key)


class MLP(nnx.Module):
    """Feed-forward network `... D -> ... D` with one hidden layer."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Array], Array], *, rngs: nnx.Rngs):
        self.up = Linear(width, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.down = Linear(hidden, width, axes=("mlp", "embed"), rngs=rngs)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        return spread(self.down(self.activation(spread(self.up(x), "mlp"))))


class Sizes(Protocol):
    """What a layer reads of its module's Config: width, heads, hidden units, and the rate of dropout."""

    @property
    def width(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def hidden(self) -> int: ...

    @property
    def dropout(self) -> float: ...


class PostNormLayer(nnx.Module):
    """BERT's layer: self-attention, then (where a context is given) cross-attention, then MLP, a norm after
    each sum."""

    EPSILON = 1e-12

    def __init__(self, config: Sizes, *, cross: bool, rngs: nnx.Rngs, execution: Execution):
        width, rate = config.width, config.dropout
        self.attention = Attention(width, config.heads, dropout=rate, rngs=rngs, execution=execution)
        self.attention_norm = Norm(width, epsilon=self.EPSILON, rngs=rngs)
        if cross:
            self.cross = Attention(width, config.heads, dropout=rate, rngs=rngs, execution=execution)
            self.cross_norm = Norm(width, epsilon=self.EPSILON, rngs=rngs)
        self.mlp = MLP(width, config.hidden, gelu, rngs=rngs)
        self.mlp_norm = Norm(width, epsilon=self.EPSILON, rngs=rngs)
        self.dropout = rate

    def __call__(
        self,
        x: Array,
        mask: Array | None = None,
        context: Array | None = None,
        context_mask: Array | None = None,
        *,
        key: Array | None = None,
    ) -> Array:
        """x `B N D`, context `B M D`; masks, True = may look, broadcast to `B K N N` and `B K N M`."""
        self_key, cross_key, *branch_keys = split_key(key, 5)
        x = self._after(self.attention_norm, x, self.attention(x, mask=mask, key=self_key), branch_keys[0])
        if context is not None:
            seen = self.cross(x, context, context_mask, key=cross_key)
            x = self._after(self.cross_norm, x, seen, branch_keys[1])
        return self._after(self.mlp_norm, x, self.mlp(x), branch_keys[2])

    def step(
        self,
        x: Array,
        past: tuple[Array, Array],
        position: Array,
        context: tuple[Array, Array],
        context_mask: Array | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """One decoded token for each of R rows: x `B R D`, past keys and values `B*R K S D`, context ready
        `B K M D`.

        The rows of one input are extra queries over its one context, which is thus never repeated.
        """
        rows = rearrange(x, "b r d -> (b r) 1 d")
        past = jax.tree.map(
            lambda whole, new: lax.dynamic_update_slice_in_dim(whole, new, position, 2),
            past,
            self.attention.memory(rows),
        )
        past = jax.tree.map(lambda whole: spread_heads(whole, None), past)
        seen = jnp.arange(past[0].shape[2]) <= position
        rows = self.attention_norm(rows + self.attention.attend(rows, past, seen))
        x = rearrange(rows, "(b r) 1 d -> b r d", r=x.shape[1])
        x = self.cross_norm(x + self.cross.attend(x, context, context_mask))
        return self.mlp_norm(x + self.mlp(x)), past

    def _after(self, norm: Norm, x: Array, branch: Array, key: Array | None) -> Array:
        return spread(norm(x + dropout(branch, self.dropout, key)))


class WordEmbedding(nnx.Module):
    """BERT's embedding: word + position + token type 0, normed: ids `B S` -> `B S D`."""

    def __init__(
        self,
        vocabulary: int,
        positions: int,
        width: int,
        *,
        dropout: float,
        rngs: nnx.Rngs,
        execution: Execution,
    ):
        self.words = parameter(normal(), (vocabulary, width), ("vocab", "embed"), rngs)
        self.positions = parameter(normal(), (positions, width), ("places", "embed"), rngs)
        self.types = parameter(normal(), (2, width), ("places", "embed"), rngs)
        self.norm = Norm(width, epsilon=PostNormLayer.EPSILON, rngs=rngs)
        self.dropout, self.dtype = dropout, execution.dtype

    def __call__(self, ids: Array, position: Array | int = 0, *, key: Array | None = None) -> Array:
        """`position` is that of the first id: decoding embeds one token at a time."""
        # Whole along its tokens: XLA adds what pads a text of another length to the gradient of word 0.
        words = constrain(self.words[...][ids], "batch", None, None)
        # Padding is not learned: its row moves only as an output class, where the table is tied to one.
        words = jnp.where((ids == PAD)[..., None], lax.stop_gradient(words), words)
        places = lax.dynamic_slice_in_dim(self.positions[...], position, ids.shape[-1])
        embedded = self.norm(spread(words) + places + self.types[0])
        return dropout(embedded, self.dropout, key).astype(self.dtype)


class WordPredictor(nnx.Module):
    """BERT's prediction head: tokens `... D` -> vocabulary logits `... V` through a word table `V D` given
    by the caller."""

    def __init__(self, width: int, vocabulary: int, *, rngs: nnx.Rngs):
        self.transform = Linear(width, width, axes=("embed", "mlp"), rngs=rngs)
        self.norm = Norm(width, epsilon=PostNormLayer.EPSILON, rngs=rngs)
        self.bias = parameter(zeros, (vocabulary,), ("vocab",), rngs)

    def __call__(self, tokens: Array, table: Array) -> Array:
        return self.project(tokens, table.T)

    def project(self, tokens: Array, kernel: Array) -> Array:
        """The same with the table already turned to `D V`: a decoding loop turns it once."""
        hidden = self.norm(gelu(spread(self.transform(tokens), "mlp")))
        return spread(add(dense(spread(hidden), kernel), self.bias[...]), "vocab")


# -----------------------------------------------------------------------------------------------------------
# Stacks: equal layers in one module whose parameters have a leading `layers` axis


class Stack(nnx.Module):
    """`depth` equal layers, stored stacked (one array a parameter, axis 0 = layer) and run by `fold`."""

    def __init__(
        self, layer: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs, execution: Execution
    ):
        graph, _ = nnx.split(nnx.eval_shape(lambda: layer(nnx.Rngs(0))))
        keys = jax.random.split(rngs.params(), depth)
        states = jax.vmap(lambda key: nnx.split(layer(nnx.Rngs(key)))[1])(keys)
        self.layers = nnx.merge(graph, states)
        for _, variable in nnx.to_flat_state(nnx.state(self.layers)):
            variable.set_metadata(axes=("layers", *variable.get_metadata()["axes"]))
        self.depth, self.execution = depth, execution

    def __getitem__(self, index: int) -> Any:
        """The layer at `index`, sharing nothing with the stack but its values."""
        graph, state = nnx.split(self.layers)
        return nnx.merge(graph, _ready(jax.tree.map(lambda values: values[index], state)))


def _ready(state: Any) -> Any:
    """The parameters of one layer of a stack, gathered from where a mesh stores them: so only one layer's are
    whole at a time."""
    if here() is None:
        return state

    def ready(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(gathered(variable[...], variable.get_metadata()["axes"][1:]))

    return jax.tree.map(ready, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def fold(apply: Callable[..., Any], carry: Any, *stacks: Stack | None, key: Array | None = None) -> Any:
    """Runs `carry = apply(carry, *layers, key=layer_key)` through stacks of equal depth, side by side.

    A stack may be None (its layer is then None), which is how vision blocks go without temporal branches.
    The first stack's `Execution` says whether the layers are scanned or unrolled, and what the backward
    pass recomputes.
    """
    first = next(stack for stack in stacks if stack is not None)
    graphs, states = zip(
        *(nnx.split(stack.layers) if stack else (None, None) for stack in stacks), strict=True
    )
    keys = None if key is None else jax.random.split(key, first.depth)

    def body(carry: Any, inputs: Any) -> tuple[Any, None]:
        states, layer_key = inputs
        layers = [
            graph and nnx.merge(graph, _ready(state)) for graph, state in zip(graphs, states, strict=True)
        ]
        return apply(carry, *layers, key=layer_key), None

    if first.execution.remat != "none":
        policy = {"dots": PRODUCTS, "offload": OFFLOADED, "full": None}[first.execution.remat]
        body = jax.checkpoint(body, policy=policy, prevent_cse=not first.execution.scan)
    if first.execution.scan:
        return lax.scan(body, carry, (states, keys))[0]
    # Split, not indexed: the gradient of a split is one concatenation, that of an index a whole stack of
    # zeros.
    leaves, tree = jax.tree.flatten(states)
    layers = zip(*(lax.split(values, (1,) * first.depth) for values in leaves), strict=True)
    for index, layer in enumerate(layers):
        state = tree.unflatten([values[0] for values in layer])
        carry, _ = body(carry, (state, None if keys is None else keys[index]))
    return carry
