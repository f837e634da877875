"""Dual vision encoder: normalised clips `B T H W C` -> tokens `B 1+T*N D`, the class token first, then
frame by frame.

One encoder for images and videos: an image is a clip of one frame. Patching, spatial attention and MLP live
here; what only videos have lives in `temporal` and is lent for a call. mPLUG-2 section 3.1
(arXiv:2302.00402); CLIP's ViT, and with `Plain` blocks and `BiasedPatches` the ViT of other families.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx

from mplug2.errors import RecipeError
from mplug2.modules.functions import add, convolve, dense, drop_path, gelu, quick_gelu, repeated
from mplug2.modules.layers import (
    MLP,
    Attention,
    Norm,
    Stack,
    fold,
    normal,
    parameter,
    spread,
    spread_pictures,
    zeros,
)
from mplug2.roles import Array, Execution, Temporal, split_key


@dataclass(frozen=True, kw_only=True)
class Patches:
    """CLIP's stem: every patch is projected at once. `tubelet` frames make one token, a step of `stride`
    frames apart."""

    patch: int
    tubelet: int = 1
    stride: int = 1

    def build(self, width: int, *, rngs: nnx.Rngs) -> "PatchStem":
        return PatchStem(self, width, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class BiasedPatches(Patches):
    """The same with a bias, as every ViT but CLIP's has it."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> "BiasedPatchStem":
        return BiasedPatchStem(self, width, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class Convolutions:
    """A stem for small, sharp pictures: three 3x3 convolutions, the first two of stride 2, of `channels`; of
    each channel the largest response within a patch is projected."""

    patch: int
    channels: tuple[int, int, int] = (32, 64, 128)

    def __post_init__(self):
        if self.patch < 4 or self.patch % 4:
            raise RecipeError(f"vision: convolutions need a patch of 4, 8, 12 ... px, got {self.patch}")

    def build(self, width: int, *, rngs: nnx.Rngs) -> "ConvolutionStem":
        return ConvolutionStem(self, width, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """CLIP's blocks (arXiv:2103.00020): its quick GELU, and a norm before the first of them."""

    EPSILON: ClassVar[float] = 1e-5

    @property
    def activation(self) -> Callable[[Array], Array]:
        return quick_gelu

    def input_norm(self, width: int, *, rngs: nnx.Rngs) -> "Norm | Unchanged":
        return Norm(width, epsilon=self.EPSILON, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class OpenClip(Clip):
    """The same with the exact GELU, as open_clip trains them (github.com/mlfoundations/open_clip)."""

    @property
    def activation(self) -> Callable[[Array], Array]:
        return gelu


@dataclass(frozen=True, kw_only=True)
class Plain:
    """The plain ViT's blocks (arXiv:2010.11929) as timm, DeiT, DINO and MAE have them: exact GELU, tokens go
    into the first block as they are."""

    EPSILON: ClassVar[float] = 1e-6

    @property
    def activation(self) -> Callable[[Array], Array]:
        return gelu

    def input_norm(self, width: int, *, rngs: nnx.Rngs) -> "Norm | Unchanged":
        return Unchanged()


@dataclass(frozen=True, kw_only=True)
class Config:
    """`image` is the height and width in pixels that the position table is made for; others are
    interpolated."""

    image: tuple[int, int]
    stem: Patches | BiasedPatches | Convolutions
    width: int
    depth: int
    heads: int
    drop_path: float = 0.0
    blocks: Clip | OpenClip | Plain = Clip()

    def __post_init__(self):
        if self.width % self.heads:
            raise RecipeError(f"vision: width {self.width} does not divide into {self.heads} heads")
        if any(side % self.stem.patch for side in self.image):
            raise RecipeError(
                f"vision: an image of {self.image} pixels does not divide into {self.stem.patch} px patches"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image[0] // self.stem.patch, self.image[1] // self.stem.patch

    def build(self, *, rngs: nnx.Rngs, execution: Execution = Execution()) -> "Vision":
        return Vision(self, rngs=rngs, execution=execution)


def tiny() -> Config:
    return Config(
        image=(32, 32), stem=Convolutions(patch=8, channels=(8, 16, 32)), width=32, depth=2, heads=2
    )


def small() -> Config:
    return Config(image=(32, 32), stem=Convolutions(patch=8), width=128, depth=2, heads=4)


def base() -> Config:
    """CLIP ViT-B/16."""
    return Config(image=(224, 224), stem=Patches(patch=16), width=768, depth=12, heads=12)


def large() -> Config:
    """CLIP ViT-L/14, the size that mPLUG-2 was released at."""
    return Config(image=(224, 224), stem=Patches(patch=14), width=1024, depth=24, heads=16)


class PatchStem(nnx.Module):
    """`B T H W C -> B T' h w D`, no bias."""

    def __init__(self, config: Patches, width: int, *, rngs: nnx.Rngs):
        shape = (config.tubelet * config.patch**2 * 3, width)
        self.kernel = parameter(normal(shape[0] ** -0.5), shape, (None, "embed"), rngs)
        self.config = config

    def __call__(self, clips: Array) -> Array:
        p, tubelet, stride = self.config.patch, self.config.tubelet, self.config.stride
        reach = tubelet // 2
        clips = jnp.pad(clips, ((0, 0), (reach, reach), (0, 0), (0, 0), (0, 0)))
        steps = range(0, clips.shape[1] - tubelet + 1, stride)
        frames = (
            jnp.stack([clips[:, i : i + tubelet] for i in steps], axis=1)
            if tubelet > 1
            else clips[:, ::stride, None]
        )
        return dense(
            rearrange(frames, "b t f (h p) (w q) c -> b t h w (f p q c)", p=p, q=p), self.kernel[...]
        )


class BiasedPatchStem(PatchStem):
    """`B T H W C -> B T' h w D`."""

    def __init__(self, config: BiasedPatches, width: int, *, rngs: nnx.Rngs):
        super().__init__(config, width, rngs=rngs)
        self.bias = parameter(zeros, (width,), ("embed",), rngs)

    def __call__(self, clips: Array) -> Array:
        return add(super().__call__(clips), self.bias[...])


class ConvolutionStem(nnx.Module):
    """`B T H W C -> B T h w D`, each frame by itself. A response sees 15x15 pixels, more than a patch, and
    the largest is the same wherever in the patch it stands."""

    def __init__(self, config: Convolutions, width: int, *, rngs: nnx.Rngs):
        first, second, third = config.channels
        self.first = Convolution(3, first, stride=2, rngs=rngs)
        self.second = Convolution(first, second, stride=2, rngs=rngs)
        self.third = Convolution(second, third, stride=1, rngs=rngs)
        shape = (third, width)
        self.kernel = parameter(normal(shape[0] ** -0.5), shape, (None, "embed"), rngs)
        self.side = config.patch // 4

    def __call__(self, clips: Array) -> Array:
        frames = rearrange(clips, "b t h w c -> (b t) h w c")
        for convolution in (self.first, self.second, self.third):
            frames = quick_gelu(convolution(frames))
        patches = reduce(frames, "b (h p) (w q) c -> b h w c", "max", p=self.side, q=self.side)
        return rearrange(dense(patches, self.kernel[...]), "(b t) h w d -> b t h w d", t=clips.shape[1])


class Convolution(nnx.Module):
    """3x3, padded: `B H W inputs -> B H/stride W/stride outputs`."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, rngs: nnx.Rngs):
        shape = (3, 3, inputs, outputs)
        self.kernel = parameter(normal((9 * inputs / 2) ** -0.5), shape, (None, None, None, "mlp"), rngs)
        self.bias = parameter(zeros, (outputs,), ("mlp",), rngs)
        self.stride = stride

    def __call__(self, frames: Array) -> Array:
        convolved: Array = convolve(frames, self.kernel[...], self.stride)
        return spread_pictures(add(convolved, self.bias[...]), "mlp")


class Unchanged(nnx.Module):
    """Where other blocks have a norm: gives what it is given."""

    def __call__(self, x: Array) -> Array:
        return x


class Block(nnx.Module):
    """Pre-norm block on `B T 1+N D`: [temporal] -> spatial attention within a frame -> [temporal] -> MLP."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, execution: Execution):
        style = config.blocks
        self.attention_norm = Norm(config.width, epsilon=style.EPSILON, rngs=rngs)
        self.attention = Attention(config.width, config.heads, rngs=rngs, execution=execution)
        self.mlp_norm = Norm(config.width, epsilon=style.EPSILON, rngs=rngs)
        self.mlp = MLP(config.width, 4 * config.width, style.activation, rngs=rngs)
        self.drop_path = config.drop_path

    def __call__(self, x: Array, branches=None, *, key: Array | None = None) -> Array:
        attention_key, mlp_key = split_key(key, 2)
        if branches is not None:
            x = x.at[:, :, 1:].add(branches.before_attention(x[:, :, 1:]))
        x = x + drop_path(self.attention(self.attention_norm(x)), self.drop_path, attention_key)
        if branches is not None:
            x = x.at[:, :, 1:].add(branches.before_mlp(x[:, :, 1:]))
        return spread(x + drop_path(self.mlp(self.mlp_norm(x)), self.drop_path, mlp_key))


class Vision(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs, execution: Execution):
        height, width = config.grid
        self.stem = config.stem.build(config.width, rngs=rngs)
        self.class_token = parameter(normal(config.width**-0.5), (config.width,), ("norm",), rngs)
        # Louder than CLIP's, which small pictures' noise drowns: empty places are told apart from the first.
        self.positions = parameter(normal(0.5), (1 + height * width, config.width), ("places", "embed"), rngs)
        self.input_norm = config.blocks.input_norm(config.width, rngs=rngs)
        self.blocks = Stack(
            lambda rngs: Block(config, rngs=rngs, execution=execution),
            config.depth,
            rngs=rngs,
            execution=execution,
        )
        self.output_norm = Norm(config.width, epsilon=config.blocks.EPSILON, rngs=rngs)
        self.config, self.dtype = config, execution.dtype

    def __call__(self, clips: Array, temporal: Temporal | None = None, *, key: Array | None = None) -> Array:
        """Clips `B T H W C`; T, H and W are free as long as H and W divide into patches."""
        patch = self.config.stem.patch
        if clips.ndim != 5 or clips.shape[2] % patch or clips.shape[3] % patch:
            raise RecipeError(
                f"vision: expected clips B T H W C whose H and W divide by {patch}, got shape {clips.shape}"
            )
        patches = spread_pictures(self.stem(spread_pictures(clips.astype(self.dtype))))
        grid = patches.shape[2:4]
        patches = rearrange(patches, "b t h w d -> b t (h w) d")
        first: Array = repeated(
            self.class_token[...], (*patches.shape[:2], 1, patches.shape[-1]), patches.dtype
        )
        x = add(jnp.concatenate([first, patches], axis=2), self._positions_for(grid))
        x = fold(
            lambda x, block, branches, key: block(x, branches, key=key),
            spread(self.input_norm(x)),
            self.blocks,
            temporal.branches if temporal is not None else None,
            key=key,
        )
        whole = x[:, :, :1].mean(axis=1)
        tokens = jnp.concatenate([whole, rearrange(x[:, :, 1:], "b t n d -> b (t n) d")], axis=1)
        return self.output_norm(spread(tokens))

    def _positions_for(self, grid: tuple[int, ...]) -> Array:
        """The position table `1+h*w D`, interpolated bilinearly when the picture has another grid."""
        table = self.positions[...]
        if grid == self.config.grid:
            return table
        return resize_positions(table, self.config.grid, grid)


def resize_positions(table: Array, grid: tuple[int, ...], to: tuple[int, ...]) -> Array:
    """Position table `1+h*w D` of one grid -> of another; the class token's row is kept. Bilinear, as the
    official code."""
    places = rearrange(table[1:], "(h w) d -> h w d", h=grid[0])
    resized = jax.image.resize(places, (*to, table.shape[1]), "bilinear", antialias=False)
    return jnp.concatenate([table[:1], rearrange(resized, "h w d -> (h w) d")])
