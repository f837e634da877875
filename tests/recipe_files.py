"""Recipe files as a user writes them: small enough that a step compiles in a second or two."""

from pathlib import Path

DATA = '''
from dataclasses import dataclass

import numpy as np

@dataclass(frozen=True)
class Dots:
    """Pictures of one brightness, and how bright they are."""

    examples: int = 6

    def source(self, split):
        from lazily import picture
        return [picture(index) for index in range(self.examples)]
'''

LAZILY = """
import numpy as np

def picture(index):
    clips = np.full((1, 8, 8, 3), 40 * index, np.uint8)
    return {"index": index, "clips": clips, "label": index % 2, "caption": "a dot"}
"""

NETWORK = """
from dataclasses import replace
from mplug2.modules import heads, universal, vision

MODULES = {
    "vision": replace(vision.tiny(), image=(8, 8), depth=1),
    "universal": replace(universal.tiny(), depth=1),
    "vision_classifier": heads.ClassifierConfig(width=32, classes=2),
}
"""

MINE = """
from mplug2 import tasks
from mplug2.data.pixels import Preprocessing
from mplug2.evaluations import Classification
from mplug2.recipe import Objective, Recipe

from network import MODULES
import dots

def bright(**changes):
    data = dots.Dots()
    settings = dict(
        name="mine.bright", modules=MODULES, steps=2, checkpoint_every=2, log_every=1,
        objectives={"bright": Objective(task=tasks.classify_vision, data=data, batch=2)},
        evaluations={"bright": Classification(data=data, batch=2)},
        preprocessing=Preprocessing(height=8, width=8, frames=1),
    )
    return Recipe(**{**settings, **changes})

def mine():
    return bright()
"""


def write(folder: Path, mine: str = MINE) -> Path:
    """The recipe file, with its neighbours beside it; `FILE:mine` is its recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("dots.py", DATA),
        ("lazily.py", LAZILY),
        ("network.py", NETWORK),
        ("mine.py", mine),
    ):
        (folder / name).write_text(text)
    return folder / "mine.py"
