"""The modules compute what the official code computed: two recorded cases, and any folder that MPLUG2_ORACLE
names.

golden/oracle/ holds, of the official code's recordings (random weights), question answering with a connected
fusion layer (`qa_stride2`, with a part of its gradients) and captions with temporal down-sampling and one
universal layer (`caption_tdown`), both with what the official search generated.
"""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from mplug2.convert import families, parity
from mplug2.convert.keys import to_ours
from mplug2.convert.optimizer import official_adamw
from mplug2.convert.parity_generation import compare_generation
from mplug2.convert.recorded import read_case
from mplug2.convert.shapes import read_settings
from mplug2.errors import CheckpointError
from mplug2.modules.vision import resize_positions
from mplug2.tools import main as dispatcher

GOLDEN = Path(__file__).parent / "golden" / "oracle"


@pytest.fixture(scope="module")
def result():
    return parity.compare(GOLDEN, 1e-4, resize_positions)


def test_every_recorded_stage_is_compared_and_holds(result):
    stages = {
        case: {check.stage for check in result.checks if check.case == case}
        for case in ("qa_stride2", "caption_tdown")
    }
    for case, compared in stages.items():
        recorded = {key[4:] for key in load_file(GOLDEN / f"{case}.io.safetensors") if key.startswith("out.")}
        assert recorded <= compared
    assert not result.misses


def test_every_recorded_gradient_is_compared_and_holds(result):
    compared = [check for check in result.checks if check.stage.startswith("gradient")]
    modules = {check.stage.split()[1] for check in compared}
    assert modules == {"vision", "temporal", "text", "universal", "fusion", "decoder", "officially"}
    assert not {"inf", "nan"} & {str(check.error) for check in compared}


def test_recorded_searches_hold_words_after_the_end(result):
    """Without them the official search could not be told from a sane one."""
    after = 0
    for path in GOLDEN.glob("*.io.safetensors"):
        given = load_file(path)
        for name in (key for key in given if ".gen." in key and key.endswith(".ids")):
            ids, last = given[name], given[name.replace(".ids", ".lengths")][..., None] - 1
            after += ((ids == 102) & (np.arange(ids.shape[-1]) < last)).any(-1).sum()
    assert after >= 3
    searched = [check for check in result.checks if check.stage.startswith("gen.")]
    assert len(searched) == 2 * 4 * 3  # cases, settings, and their ids, lengths, scores


def test_one_wrong_id_length_or_place_is_a_miss():
    case = read_case(GOLDEN, "qa_stride2", json.loads((GOLDEN / "qa_stride2.json").read_text()))
    memory, mask = case.given["out.decoder_memory"], case.given["out.decoder_memory_mask"]
    name, given = "out.gen.beam3.min0.max9", {key: case.given[key].copy() for key in case.given}
    given = {key: given[key] for key in given if key.startswith((name, "in.rank", "out.rank"))}
    given[f"{name}.ids"][0, 2, -1] += 1
    given[f"{name}.lengths"][1, 1] -= 1
    given["out.rank.topk_ids"][0, :2] = given["out.rank.topk_ids"][0, 1::-1]
    checks = compare_generation(dataclasses.replace(case, given=given), memory, mask, 1e-4)
    assert {
        check.stage.split(".", 1)[1].removeprefix("beam3.min0.max9."): check.error for check in checks
    } == {
        "ids": 1,
        "lengths": 1,
        "scores": pytest.approx(0, abs=1e-4),
        "topk_ids": 2,
        "topk_probs": pytest.approx(0, abs=1e-4),
    }
    assert [check.passed for check in checks] == [False, False, True, False, True]


def test_one_wrong_weight_is_a_miss():
    said = json.loads((GOLDEN / "caption_tdown.json").read_text())
    case = read_case(GOLDEN, "caption_tdown", said)
    kernels = case.params["temporal"]["branches"]["layers"]["before_mlp"]
    kernels["kernel"] = kernels["kernel"].at[1, 0, 3].add(0.05)
    made = parity.stages_of(case)
    recorded = [stage for stage in made if f"out.{stage}" in case.given]
    error = {stage: np.abs(made[stage] - case.given[f"out.{stage}"]).max() for stage in recorded}
    assert error["vision.block0"] < 1e-4 and error["vision.block1.lmhra1"] < 1e-4
    assert error["vision.block1.lmhra2"] > 1e-3 and error["text_decoder.logits"] > 1e-4


def test_a_folder_without_cases_is_refused(tmp_path, capsys):
    assert dispatcher.main(["parity", str(tmp_path)]) == 2
    assert "holds no case" in capsys.readouterr().err


def test_a_broken_case_is_refused_by_name(tmp_path):
    (tmp_path / "x.json").write_text('{"kind": "caption"}')
    (tmp_path / "x.params.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"x\.params\.safetensors: cannot be read"):
        parity.compare(tmp_path, 1e-4, resize_positions)


@pytest.fixture(scope="module")
def official():
    params = load_file(GOLDEN / "qa_stride2.params.safetensors")
    shapes = {key: tensor.shape for key, tensor in params.items()}
    return families.mplug2(shapes, read_settings(GOLDEN / "qa_stride2.json")), params


def test_the_official_optimizer_decays_and_paces_by_official_names(official):
    model, params = official
    ours = jax.tree.map(jnp.asarray, to_ours(model.keys, params))
    optimizer = official_adamw(model.keys, rate=0.1, vision_rate=0.01, weight_decay=0.5)

    @jax.jit
    def shrink(params):
        nothing = jax.tree.map(jnp.zeros_like, params)
        shrunk = optax.apply_updates(params, optimizer.update(nothing, optimizer.init(params), params)[0])
        return jax.tree.map(lambda after, before: after.sum() / before.sum(), shrunk, params)

    ratio = shrink(ours)
    assert ratio["vision"]["input_norm"]["scale"] == pytest.approx(1 - 0.01 * 0.5)  # CLIP's norms are decayed
    assert ratio["vision"]["input_norm"]["bias"] == pytest.approx(1)
    assert ratio["temporal"]["branches"]["layers"]["before_mlp"]["up"]["kernel"] == pytest.approx(
        0.995, rel=1e-4
    )
    assert ratio["universal"]["vision_norm"]["scale"] == pytest.approx(1 - 0.1 * 0.5)  # not called LayerNorm
    assert ratio["universal"]["latents"] == pytest.approx(0.95, rel=1e-3)
    assert ratio["decoder"]["embedding"]["norm"]["scale"] == pytest.approx(1)
    assert ratio["decoder"]["predictor"]["bias"] == pytest.approx(1)
    assert ratio["text"]["layers"]["layers"]["mlp"]["up"]["kernel"] == pytest.approx(0.95, rel=1e-3)


@pytest.mark.slow
def test_a_folder_of_recordings_holds_in_full(capsys):
    folder = os.environ.get("MPLUG2_ORACLE")
    if not folder:
        pytest.skip("MPLUG2_ORACLE names no folder of recordings")
    status = dispatcher.main(["parity", folder, "--each"])
    print(capsys.readouterr().out)
    assert status == 0
