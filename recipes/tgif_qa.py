"""Questions about what animated GIFs show: TGIF-QA's FrameQA (Jang et al., CVPR 2017).

Number (TGIF-QA FrameQA, test split, 13,691 questions): the authors' accuracy is 75.4%, as table 13 of VAST
(theirs) cites it; ours is not measured. The data set has no validation split: hold some of `train` out to
choose anything by.
"""

from mplug2.data.annotations import QuestionLines
from mplug2.recipe import Recipe
from mplug2.recipes.released import BASE, LARGE, OFFICIAL, TINY, Benchmark, answering

BENCHMARK = Benchmark(
    name="tgif_qa",
    root="data/tgif",
    annotations=QuestionLines(train="qa_train.jsonl", validation="", test="qa_test.jsonl"),
    examples=39_392,
)


def tiny() -> Recipe:
    return answering(BENCHMARK, TINY)


def base() -> Recipe:
    """Begins afresh: no checkpoint of this size was released."""
    return answering(BENCHMARK, BASE)


def large() -> Recipe:
    """The published fine-tuning of the released pretraining, without the official code's defects."""
    return answering(BENCHMARK, LARGE)


def large_official() -> Recipe:
    """The same as the official code does it."""
    return answering(BENCHMARK, OFFICIAL)
