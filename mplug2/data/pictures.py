"""Pictures: a file -> an upright RGB picture, by Pillow.

FORMATS lists what is opened; content decides, not the name. Not among them are formats that run a program
(PostScript, by Ghostscript), that hand their content on to any other format, or that hardly anything writes.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    TiffImageFile,
)

from mplug2.data.colours import to_rgb
from mplug2.data.inputs import opened, reason
from mplug2.errors import DataError

FORMATS = (
    "AVIF",
    "BMP",
    "GIF",
    "ICO",
    "JPEG",
    "JPEG2000",
    "PCX",
    "PNG",
    "PPM",
    "QOI",
    "SGI",
    "TGA",
    "TIFF",
    "WEBP",
)

PIXELS = 89_478_485
"""The most that a picture has; a lower `PIL.Image.MAX_IMAGE_PIXELS` is heeded as well."""


def read_image(path: str | Path) -> Image.Image:
    """The upright RGB picture in a file of one of FORMATS, on the ground and scaled as `colours.to_rgb` does;
    of an animation, its first frame. Raises DataError naming the file if it is missing, no picture, cut off,
    or has too many pixels."""
    with opened(path, "the picture") as file:
        most = min(PIXELS, Image.MAX_IMAGE_PIXELS or PIXELS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of decoders, about what a picture need not have
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file, formats=_formats()) as image:
                    kind = image.format
                    if image.width * image.height > most:
                        raise Image.DecompressionBombError
                    _settle_key(image)
                    ImageOps.exif_transpose(image, in_place=True)
                    return to_rgb(_as_stated(image, kind))
        except UnidentifiedImageError:
            kinds = ", ".join(FORMATS)
            raise DataError(f"{path} is not a picture of a kind that is read: {kinds}") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise DataError(f"{path} has too many pixels; the most is {most:,}") from None
        except OSError as error:
            raise DataError(f"cannot read the picture {path}: {reason(error)}") from None
        except Exception as error:  # a decoder raises whatever it comes upon
            raise DataError(f"the picture {path} is broken: {reason(error)}") from None


def _formats() -> list[str]:
    """Those of FORMATS that this Pillow has been built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _as_stated(image: Image.Image, kind: str | None) -> Image.Image:
    """Levels of more than 8 bits as their file states them, where Pillow hands on others."""
    if image.mode == "I" and kind in ("PPM", "PNG"):  # of 16 bits, as 32-bit numbers that state no white
        return image.convert("I;16")
    if not isinstance(image, TiffImageFile) or not image.mode.startswith("I"):
        return image
    levels = np.asarray(image)
    if image.mode == "I" and levels.min(initial=0) < 0 and image.tag_v2.get(SAMPLEFORMAT, (1,)) == (1,):
        return Image.fromarray(levels.view(np.uint32).astype(np.float32))  # unsigned, read as signed
    if image.tag_v2.get(BITSPERSAMPLE) == (12,):
        levels = levels << 4 | levels >> 8  # of 16 bits now: white stays white
    if image.mode == "I;16" and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
        levels = 65535 - levels
    return Image.fromarray(levels)


def _settle_key(image: Any) -> None:
    """A PNG states its transparent colour in the file's bits, and Pillow hands it on as it is, but widens or
    narrows the pixels to 8."""
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None or isinstance(key, bytes) or not image.tile:
        return
    raw = image.tile[0][3]
    if raw == "RGB;16B":
        image.info["transparency"] = tuple(part >> 8 for part in key)
    elif raw in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if raw == "L;2" else 17)
