"""Video captioning on MSVD (Chen and Dolan, ACL 2011): 1,970 clips, about 41 captions each.

Number (MSVD, test split, 670 videos): the authors of mPLUG-2 published CIDEr 165.8 (theirs);
ours is not measured.
"""

from mplug2.data.annotations import CaptionLines
from mplug2.recipe import Recipe
from mplug2.recipes.released import BASE, LARGE, OFFICIAL, TINY, Benchmark, captioning

BENCHMARK = Benchmark(
    name="msvd_caption",
    root="data/msvd",
    annotations=CaptionLines(
        train="caption_train.jsonl", validation="caption_val.jsonl", test="caption_test.jsonl"
    ),
    examples=48_774,  # about: 1,200 videos, whose captions are filtered differently everywhere
)


def tiny() -> Recipe:
    return captioning(BENCHMARK, TINY)


def base() -> Recipe:
    """Begins afresh: no checkpoint of this size was released."""
    return captioning(BENCHMARK, BASE)


def large() -> Recipe:
    """The published fine-tuning of the released pretraining, without the official code's defects."""
    return captioning(BENCHMARK, LARGE)


def large_official() -> Recipe:
    """The same as the official code does it."""
    return captioning(BENCHMARK, OFFICIAL)
