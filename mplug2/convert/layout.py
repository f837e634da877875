"""How a foreign tensor lies in one of our arrays: kernels are `inputs, outputs` here, `outputs, inputs`
there.

A Turn takes a tensor to ours and back, without loss. Both directions return views where numpy can.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from einops import rearrange


class Turn(Protocol):
    def to_ours(self, tensor: np.ndarray) -> np.ndarray: ...

    def to_foreign(self, array: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Same:
    """Biases, norms, tables; `lead` axes of size 1 that the foreign tensor has before its own."""

    lead: int = 0

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(tensor.shape[self.lead :])

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        return array.reshape((1,) * self.lead + array.shape)


@dataclass(frozen=True)
class Matrix:
    """A linear layer's weight `O I` -> kernel `I O`; `tail` axes of size 1 make it a pointwise
    convolution's."""

    tail: int = 0

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(tensor.shape[:2]).T

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        return array.T.reshape(array.shape[::-1] + (1,) * self.tail)


@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution over time, `D 1 F 1 1` -> `F D`."""

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return rearrange(tensor, "d 1 f 1 1 -> f d")

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        return rearrange(array, "f d -> d 1 f 1 1")


@dataclass(frozen=True)
class Patches:
    """The patch convolution of clips, `D C F p p` -> `F*p*p*C D`; of pictures (`flat`), `D C p p`, inflated
    to F frames."""

    patch: int
    tubelet: int = 1
    flat: bool = False

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        solid = inflate(tensor, self.tubelet) if self.flat else tensor
        return rearrange(solid, "d c f p q -> (f p q c) d")

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        solid = rearrange(array, "(f p q c) d -> d c f p q", f=self.tubelet, p=self.patch, q=self.patch)
        return solid[:, :, self.tubelet // 2] if self.flat else solid


def inflate(kernel: np.ndarray, tubelet: int) -> np.ndarray:
    """A picture's patch convolution `D C p p` -> a clip's, `D C F p p`: the middle frame sees it, the others
    nothing."""
    solid = np.zeros((*kernel.shape[:2], tubelet, *kernel.shape[2:]), kernel.dtype)
    solid[:, :, tubelet // 2] = kernel
    return solid
