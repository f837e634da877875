"""Questions about the videos of MSVD (Xu et al., ACM Multimedia 2017), made of their captions.

Number (MSVD-QA, test split, 13,157 questions): the authors of mPLUG-2 published accuracy 58.1% (theirs);
ours is not measured.
"""

from mplug2.data.annotations import QuestionLines
from mplug2.recipe import Recipe
from mplug2.recipes.released import BASE, LARGE, OFFICIAL, TINY, Benchmark, answering

BENCHMARK = Benchmark(
    name="msvd_qa",
    root="data/msvd",
    annotations=QuestionLines(train="qa_train.jsonl", validation="qa_val.jsonl", test="qa_test.jsonl"),
    examples=30_933,
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
