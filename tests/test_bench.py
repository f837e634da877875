"""Tests of the benchmark: what it times is the train step, and its numbers are right where they can be
known."""

import json
import os
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from mplug2 import benchmark, benchmark_generate, recipes, tasks
from mplug2.arguments import UsageError
from mplug2.benchmark import Times
from mplug2.flops import step_flops
from mplug2.modules import decoder, universal, vision
from mplug2.network import Network
from mplug2.recipe import AdamW, Objective, Recipe
from mplug2.roles import Execution
from mplug2.tools import bench
from mplug2.tools.main import main


def tiny(**more) -> Recipe:
    return Recipe(
        name="tiny",
        modules={"vision": vision.tiny(), "universal": universal.tiny(), "decoder": decoder.tiny()},
        objectives={"caption": Objective(task=tasks.caption, data=None, batch=2)},
        optimizer=AdamW(learning_rate=1e-2, warmup=1),
        **more,
    )


def batches(recipe: Recipe) -> bench.Batches:
    random = np.random.default_rng(0)
    size = recipe.objectives["caption"].batch
    clips = random.integers(0, 256, (size, 1, 32, 32, 3), np.uint8)
    return {"caption": {"clips": clips, "caption": random.integers(1, 96, (size, 6), np.int32)}}


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as quick:
        quick.setattr(benchmark, "MATMUL_SIDES", (64,))
        quick.setattr(benchmark, "SECONDS_A_SIDE", 0.0)
        recipe = tiny(dropout=False)  # drawing what drops out takes half of the compiling
        return benchmark.measure_step(recipe, batches(recipe), steps=3)


def test_what_is_timed_trains(measured):
    assert measured.losses[1] < measured.losses[0]


def test_every_asked_step_is_timed_and_the_first_is_not(measured):
    assert len(measured.times.wall) == len(measured.times.cpu) == 3
    assert 0 < measured.times.best <= measured.times.median


def test_the_state_is_parameters_and_two_moments(measured):
    assert measured.trained == measured.parameters
    assert measured.state == pytest.approx(3 * 4 * measured.parameters, abs=200)


def test_the_share_is_the_step_s_rate_over_the_peak(measured):
    rate = measured.flops / measured.times.best
    assert measured.share("float32") == pytest.approx(rate / measured.peaks["float32"].rate)
    assert measured.resident > measured.state


def test_mfu_is_over_the_peaks_of_all_devices_and_nothing_where_none_is_known(measured):
    two = replace(measured, device_kind="gpu: NVIDIA H100 80GB HBM3", devices=2)
    rate = measured.flops / measured.times.median
    assert measured.mfu is None and two.mfu == pytest.approx(rate / (2 * 989e12), rel=0.01)


def test_a_word_more_costs_its_products_once_forward_and_twice_backward():
    recipe, batch, width = tiny(), 2, 32
    given = batches(recipe)["caption"]
    caption = given["caption"]
    more = {"caption": {**given, "caption": np.concatenate([caption, caption[:, :1]], axis=1)}}
    # One word more: the products of its row with every kernel of the decoder but those of the memory, and the
    # word table; forward once, backward twice. Attention itself adds its row and its column.
    kernels = 6 * width**2 + 2 * width * 64 + width**2 + width * 128
    before, after = caption.shape[1] - 1, caption.shape[1]
    seen = 1 + 16
    attention = 2 * width * (after**2 - before**2 + seen)
    grown = step_flops(recipe, more) - step_flops(recipe, {"caption": given})
    assert grown == batch * 3 * 2 * (kernels + attention)


@pytest.mark.parametrize(
    "execution", [Execution(remat="full"), Execution(scan=False), Execution(dtype="bfloat16")]
)
def test_flops_do_not_depend_on_how_the_network_is_run(execution):
    recipe = tiny()
    assert step_flops(tiny(execution=execution), batches(recipe)) == step_flops(recipe, batches(recipe))


def test_the_matmul_peak_is_the_best_of_its_sides():
    peak = benchmark.matmul_peak("float32", (2, 256), 0.0)
    assert peak.side == 256
    assert peak.rate > 1e8


def test_spread_is_the_middle_half():
    times = Times(wall=(1.0, 2.0, 3.0, 4.0, 100.0), cpu=(2.0,) * 5)
    assert (times.median, times.best, times.quartiles) == (3.0, 1.0, (2.0, 4.0))


def test_the_default_work_is_the_official_one():
    recipe, given = bench.official_work(), bench.official_batches(1)["caption"]
    shapes = jax.eval_shape(lambda: benchmark.Network(recipe.modules, recipe.execution).init(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(256.9e6, rel=1e-3)
    assert given["clips"].shape == (1, 4, 224, 224, 3)
    assert (given["caption"][:, 1:] != 0).sum() == 20
    assert recipe.dropout and recipe.optimizer.clip == 0


def test_the_table_says_what_was_measured(measured, capsys):
    bench.show(tiny(execution=Execution(scan=False), dropout=False), measured)
    table = capsys.readouterr().out
    for told in ("median", "minimum", "middle half", "compile", "resident at most", "GFLOP/s", "3 steps"):
        assert told in table
    assert "layers unrolled" in table and "dropout off" in table


def test_the_command_measures_a_recipe_on_its_own_data(measured, monkeypatch, capsys):
    asked = []
    monkeypatch.setitem(os.environ, "GLIBC_TUNABLES", bench.HUGE_PAGES)
    monkeypatch.setattr(
        benchmark, "measure_step", lambda *given, steps: asked.append((*given, steps)) or measured
    )
    words = ["--recipe", "image_caption.tiny", "--steps", "2", "--no-dropout", "--unroll", "--remat", "dots"]
    assert main(["bench", "step", "seed=7", *words, "--json"]) == 0
    ((recipe, given, steps),) = asked
    assert (steps, recipe.seed, recipe.dropout) == (2, 7, False)
    assert recipe.execution == Execution(scan=False, remat="dots")
    assert given["image_caption"]["clips"].shape == (recipe.objectives["image_caption"].batch, 1, 32, 32, 3)
    assert "index" not in given["image_caption"]
    report = json.loads(capsys.readouterr().out)
    assert report["recipe"] == recipes.find("image_caption.tiny").name
    assert len(report["times"]["wall"]) == 3


def test_huge_pages_are_set_once_before_python_starts(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(bench.platform, "libc_ver", lambda: ("glibc", "2.39"))
    monkeypatch.setattr(os, "execve", lambda *words: started.append(words))
    monkeypatch.setitem(os.environ, "GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    bench.ensure_huge_pages(["step"])
    (_, command, environment), said = started.pop(), capsys.readouterr().err
    assert command[-2:] == ["bench", "step"]
    assert environment["GLIBC_TUNABLES"] == f"glibc.malloc.arena_max=2:{bench.HUGE_PAGES}"
    assert bench.HUGE_PAGES in said
    monkeypatch.setitem(os.environ, "GLIBC_TUNABLES", environment["GLIBC_TUNABLES"])
    bench.ensure_huge_pages(["step"])
    assert not started


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["stride"],
        ["step", "--steps", "0"],
        ["step", "--scan", "--unroll"],
        ["load", "--megabytes", "0"],
    ],
)
def test_wrong_words_are_refused(words):
    with pytest.raises(UsageError, match="mplug2 bench"):
        bench.main(words)


def test_a_mesh_that_does_not_suit_is_refused_before_anything_is_read(monkeypatch, capsys):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    for words, said in (
        (("accumulate=3",), "a batch of 8 does not divide into 3 part(s)"),
        (("--mesh", "fsdp=2"), "needs 2 devices, there are 1"),
        (("--mesh", "tensors=2"), "tensor"),
    ):
        assert main(["bench", "step", "--recipe", "image_caption.tiny", *words]) == 2
        assert said in capsys.readouterr().err


def test_captions_are_timed_at_the_length_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    monkeypatch.setattr(benchmark_generate, "READ_BYTES", 1 << 20)
    command = ["bench", "generate", "--size", "tiny", "--batch", "1", "3", "--beams", "2"]
    assert main([*command, "--tokens", "4", "--steps", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [(one["batch"], one["tokens"], len(one["whole"]["wall"])) for one in said["reports"]] == [
        (1, 4, 2),
        (3, 4, 2),
    ]
    assert said["read_bytes_a_second"] > 0


def test_a_step_of_decoding_reads_every_weight_but_those_used_before():
    network = Network({"decoder": decoder.tiny()})
    width, hidden, vocabulary = 32, 64, 128
    # self: four products; cross: query and out; MLP; the predictor's product; the word table
    products = 6 * width**2 + 2 * width * hidden + width**2 + vocabulary * width
    rest = 6 * width + hidden + width + 6 * width + 2 * width + width + 2 * width + vocabulary
    read = benchmark_generate._weights_of_a_step(network.init(0)["decoder"])
    assert read == 4 * (products + rest)
