"""Pixels: pictures -> clips uint8 T H W C of a network's size, and clips -> normalised float32 inside the
jitted step.
 An image is a clip of one frame. Resizing is bicubic with antialiasing and squashes to the target's height
and width, so that nothing is cropped away; a picture that already has that size passes unchanged.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mplug2.data.colours import to_rgb
from mplug2.data.pictures import read_image as read_image  # pictures are read where pixels are

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of DeiT, DINO and MAE
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """What a vision module expects: height and width in pixels, frames to a video clip, and the channel mean
    and standard deviation of pixels in 0..1. The defaults are those of handwriting; large models use
    CLIP_MEAN and CLIP_STD."""

    height: int = 32
    width: int = 32
    frames: int = 4
    mean: tuple[float, float, float] = (0.14, 0.14, 0.13)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)

    def to_float(self, clips: jax.Array) -> jax.Array:
        """Clips uint8 B T H W C -> float32, zero mean and unit variance by channel; meant for inside
        `jax.jit`."""
        scale = 1 / (255 * np.asarray(self.std, np.float32))
        shift = np.asarray(self.mean, np.float32) / np.asarray(self.std, np.float32)
        return jnp.asarray(clips, float) * scale - shift  # float64 where JAX is told to compute in it

    def from_pil(self, image: Image.Image) -> np.ndarray:
        """A picture of any size and mode -> a clip uint8 1 H W C, RGB as `colours.to_rgb` has it."""
        image = to_rgb(image)
        if image.size != (self.width, self.height):
            image = image.resize((self.width, self.height), Image.Resampling.BICUBIC)
        return np.asarray(image)[None]

    def from_frames(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        """T frames uint8 H' W' C of any size -> a clip uint8 T H W C."""
        return np.concatenate([self.from_pil(Image.fromarray(frame)) for frame in frames])
