"""Plans: what a compiled step does is read off its listing, beside the textbook's amounts worked out by hand.

Three tests at the end compile for TPUs and GPUs that are not here, where the extras plan-tpu and plan-gpu
are.
"""

import dataclasses
import importlib.util
import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from toy import toy

from mplug2 import overrides, plan, recipes
from mplug2.errors import RecipeError
from mplug2.losses import cross_entropy
from mplug2.network import Network
from mplug2.plan import machines, search, textbook
from mplug2.plan.program import Program
from mplug2.recipe import Objective, Recipe
from mplug2.roles import Execution
from mplug2.sharding import Mesh
from mplug2.step import Trainer
from mplug2.tools import main as command

# ------------------------------------------------------------------------------------------------------------
# The compiler's listing

LISTING = """\
HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %reduced = f32[8,4]{1,0} all-reduce(%p), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %share = f32[2,4]{1,0} dynamic-slice(%reduced), dynamic_slice_sizes={2,4}
}

%condition (state: (s32[], f32[8,4])) -> pred[] {
  %state = (s32[], f32[8,4]{1,0}) parameter(0)
  %index = s32[] get-tuple-element(%state), index=0
  %bound = s32[] constant(3)
  ROOT %less = pred[] compare(%index, %bound), direction=LT
}

%body (state.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%state.1), index=1
  %summed = f32[8,4]{1,0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add
  %scattered = f32[2,4]{1,0} fusion(%summed), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%x, %summed)
}

ENTRY %main (input: bf16[2,4]) -> f32[8,4] {
  %input = bf16[2,4]{1,0} parameter(0)
  %start = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%input), replica_groups=[2,4]<=[4,2]T(1,0)
  %done = bf16[8,4]{1,0} all-gather-done(%start)
  %kept = bf16[8,4]{1,0:T(8,128)S(1)} copy(%done)
  %wide = f32[8,4]{1,0} convert(%kept)
  %initial = (s32[], f32[8,4]{1,0}) tuple(%wide, %wide)
  %loop = (s32[], f32[8,4]{1,0}) while(%initial), condition=%condition, body=%body
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_collectives_count_as_often_as_their_loop_runs_and_once_when_they_run_in_the_background():
    found = {it.kind: it for it in Program(LISTING, 8).collectives()}
    assert len(found) == len(Program(LISTING, 8).collectives()) == 3
    gather, reduce, scatter = (found[kind] for kind in ("all-gather", "all-reduce", "reduce-scatter"))
    assert (gather.times, gather.sent, gather.members) == (1, 3 * 16, (0, 2, 4, 6))
    assert (reduce.times, reduce.sent, reduce.members) == (3, 2 * 128 / 2, (0, 1))
    assert (scatter.times, scatter.sent, scatter.members) == (3, 128 * 3 / 4, (0, 2, 4, 6))


def test_a_noted_number_of_runs_is_believed_before_the_loops_condition():
    noted = LISTING.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert {it.times for it in Program(noted, 8).collectives()} == {1, 5}


def test_memory_traffic_is_what_main_memory_sees():
    gathered, copied, converted = 2 * 16, 64, 128  # in and out of it; what lies elsewhere is free
    reduced, scattered = 2 * 128, 128 + 32
    assert Program(LISTING, 8).memory_bytes() == gathered + copied + converted + 3 * (reduced + scattered)


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", (0, 4)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("mesh['a'=8] {'a':(4)2}", (0, 1)),
    ],
)
def test_every_way_to_write_groups_of_devices_is_understood(groups, members):
    changed = LISTING.replace("[4,2]<=[8]", groups)
    (reduce,) = (it for it in Program(changed, 8).collectives() if it.kind == "all-reduce")
    assert reduce.members == members


# ------------------------------------------------------------------------------------------------------------
# The textbook


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The toy's data, as far as shapes go."""

    def example(self) -> dict[str, Any]:
        clips = np.zeros((1, 2, 2, 3), np.uint8)
        return {"clips": clips, "label": 0, "index": 0}


def learn(batch: Any, key: Any = None, *, vision: Any, head: Any) -> Any:
    hidden = vision(batch["clips"].reshape(len(batch["label"]), -1), key)
    return cross_entropy(head(hidden), batch["label"]).mean()


def numbers(batch: int = 8, **changes: Any) -> Recipe:
    """The toy with one objective: kernels 12 x 8 (vision) and 8 x 4 (head), biases 8 and 4."""
    return toy(objectives={"classify": Objective(task=learn, data=Numbers(), batch=batch)}, **changes)


KERNELS, BIASES = 4 * (12 * 8 + 8 * 4), 4 * (8 + 4)  # bytes, float32


def paper(recipe: Recipe) -> textbook.Paper:
    network = Network(recipe.parts, recipe.execution)
    return textbook.on_paper(recipe, textbook.study(recipe), network)


def test_fsdp_gathers_kernels_twice_and_sums_gradients_into_shares():
    found = paper(numbers(mesh=Mesh(fsdp=4)))
    assert found.memory["parameters"] == KERNELS / 4 + BIASES
    assert found.memory["optimizer"] == 2 * found.memory["parameters"]
    assert found.traffic == {
        ("all-gather", "fsdp"): 2 * KERNELS * 3 / 4,
        ("reduce-scatter", "fsdp"): KERNELS * 3 / 4,
        ("all-reduce", "fsdp"): 2 * BIASES * 3 / 4,
    }


def test_what_activations_are_computed_in_is_what_is_gathered_and_each_part_gathers_anew():
    narrow = paper(numbers(mesh=Mesh(fsdp=4), execution=Execution(dtype="bfloat16"), accumulate=2))
    wide = paper(numbers(mesh=Mesh(fsdp=4)))
    gather, scatter = ("all-gather", "fsdp"), ("reduce-scatter", "fsdp")
    assert narrow.traffic[gather] == wide.traffic[gather]  # half as wide, twice as often
    assert narrow.traffic[scatter] == 2 * wide.traffic[scatter]


def test_data_sums_all_gradients_once():
    assert paper(numbers(mesh=Mesh(data=8))).traffic == {
        ("all-reduce", "data"): 2 * (KERNELS + BIASES) * 7 / 8
    }


def test_weak_scaling_keeps_what_a_device_has_and_sends_once_data_grows():
    recipe = numbers(mesh=Mesh(fsdp=4))  # two examples a device
    work, network = textbook.study(recipe), Network(recipe.parts, recipe.execution)
    grown = {}
    for chips in (4, 8, 64):
        bigger = textbook.scaled(recipe, chips)
        assert (bigger.mesh, bigger.objectives["classify"].batch) == (
            Mesh(data=chips // 4, fsdp=4),
            2 * chips,
        )
        grown[chips] = textbook.on_paper(bigger, work.times(chips / 4), network)
    assert grown[64].memory == grown[8].memory == grown[4].memory
    sums = {chips: it.traffic.pop(("all-reduce", "data"), 0.0) for chips, it in grown.items()}
    assert 0 == sums[4] < sums[8] < sums[64] < 2 * sums[8]
    gathered = {it.traffic["all-gather", "fsdp"] for it in grown.values()}
    assert len(gathered) == 1


# ------------------------------------------------------------------------------------------------------------
# Plans


@pytest.mark.devices(8)
def test_a_plan_is_of_the_step_that_would_run():
    topology = machines.find("cpu:8")
    made = plan.make(numbers(mesh=Mesh(fsdp=4, data=2)), topology)
    assert made.state["parameters"] == KERNELS / 4 + BIASES
    assert made.temporary > 0 and made.total > sum(made.state.values())
    assert made.fits is None and made.times.best is None and made.utilization is None
    flows = {(flow.kind, flow.axes): flow for flow in made.flows}
    gather = flows["all-gather", "fsdp"]
    assert 0 < gather.sent <= gather.paper
    assert made.model_flops == made.flops > 0
    said = json.loads(json.dumps(made.as_json()))
    assert said["mesh"] == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}


@pytest.mark.devices(8)
def test_a_search_compiles_the_best_on_paper_and_recommends_one_of_them():
    told: list[str] = []
    found = search.search(numbers(), machines.find("cpu:8"), compiled=1, say=told.append)
    ((candidate, made),) = found.plans
    assert candidate == found.candidates[0] and made is found.best
    assert [it.order for it in found.candidates] == sorted(it.order for it in found.candidates)
    assert any("compiling" in line for line in told)


def test_every_mesh_is_considered_once():
    found = list(search.meshes(16))
    assert len(found) == len(set(found))
    assert all(np.prod(dataclasses.astuple(mesh)) == 16 for mesh in found)
    assert {mesh.tensor for mesh in found} == {1, 2, 4, 8}


@pytest.mark.devices(8)
@pytest.mark.slow
def test_the_command_reports_a_recipe_and_writes_it(tmp_path, capsys):
    words = "plan text_classify.tiny accumulate=1 --topology cpu:8 seed=1 --mesh fsdp=2,tensor=2,data=2"
    assert command.main([*words.split(), "--json", str(tmp_path / "plan.json")]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("parameters", "temporary", "all-gather", "textbook", "FLOPs"))
    assert json.loads((tmp_path / "plan.json").read_text())["recipe"] == "text_classify.tiny"


def test_the_command_scales_on_paper(capsys):
    words = ["plan", "text_classify.tiny", "--mesh", "fsdp=4", "--weak-scaling", "4,16"]
    assert command.main(words) == 0
    text = capsys.readouterr().out
    assert "data=4,fsdp=4" in text and "all sent" in text


@pytest.mark.parametrize(
    ("kind", "members", "rate"),
    [
        ("v5p", (0, 1), 200e9),  # along one of three dimensions
        ("v5p", (0, 1, 2, 3), 400e9),
        ("v6e", (0, 1), 200e9),
        ("v6e", (0, 1, 2, 3), 400e9),
        ("h100", (0, 1, 2, 3), 450e9),
        ("h100", (0, 8), 50e9),  # in two nodes
        ("cpu", (0, 1), None),
    ],
)
def test_a_collective_is_as_fast_as_the_links_that_its_members_lie_along(kind, members, rate):
    places = [SimpleNamespace(id=place, coords=(place % 2, place // 2, 0)) for place in range(16)]
    mesh: Any = SimpleNamespace(devices=np.array(places))
    assert machines.Topology(kind, machines.CHIPS[kind], places).rate(members, mesh) == rate


# ------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--topology v5:2x2", 'there is no "v5"; known are cpu, v5e, v5p, v6e, h100 (did you mean "v5'),
        ("--topology v5e:8", "expected v5e:SHAPE as in v5e:16x16 or v5p:8x8x4"),
        ("--topology cpu:0", "expected cpu:SHAPE as in cpu:8"),
        ("--topology cpu:1 --mesh fsdp=4", "mesh fsdp=4 has 4 device(s), cpu:1 has 1; say --mesh"),
        ("--topology cpu:1 --mesh fsdb=4", 'there is no axis "fsdb"; known are data, fsdp'),
        ("--topology cpu:1 --mesh fsdp=many", 'fsdp is "many", expected a number of devices'),
        ("--batches-times 0.01", "0.01 times a batch of 8 is not whole"),
        ("--mesh tensor=3 --weak-scaling 8", "8 devices do not divide by the mesh's"),
        ("--topology cpu:8 --mesh fsdp=8 --search", "--search looks for the mesh itself: leave --mesh out"),
        ("--weak-scaling 8,some", 'expected numbers of devices as in 8,64,512, got "8,some"'),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(words, reason, capsys):
    assert command.main(["plan", "text_classify.tiny", *words.split()]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


@pytest.mark.parametrize(("kind", "extra"), [("v5e:2x2", "plan-tpu"), ("h100:8", "plan-gpu")])
def test_a_missing_compiler_is_named_with_how_to_get_it(kind, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=rf'pip install "mplug2\[{extra}\]"'):
        machines.find(kind)


# ------------------------------------------------------------------------------------------------------------
# Devices that are not here


def absent(package: str, extra: str) -> Any:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f'{package} is not installed: pip install "mplug2[{extra}]"')


@absent("libtpu", "plan-tpu")
def test_a_step_is_compiled_for_tpus_and_one_that_does_not_fit_is_refused_with_numbers():
    topology = machines.find("v5e:2x2")
    made = plan.make(numbers(mesh=Mesh(fsdp=2, tensor=2)), topology)
    assert made.fits and made.times.worst and made.times.best and made.times.worst > made.times.best > 0
    assert any(flow.sent > 0 and flow.seconds for flow in made.flows)
    big = numbers(mesh=Mesh(data=4))
    layer: Any = big.modules["vision"]
    wide = {"vision": dataclasses.replace(layer, outputs=2**29), "head": big.modules["head"]}
    wide["head"] = dataclasses.replace(wide["head"], inputs=2**29)
    with pytest.raises(
        plan.NoRoomError, match="does not fit: the step needs .* of a device that has 15.75GiB"
    ):
        plan.make(dataclasses.replace(big, modules=wide), topology)


@pytest.mark.slow
@absent("libtpu", "plan-tpu")
def test_on_tpus_parameters_are_gathered_beside_products_within_accumulated_parts():
    changes = ("accumulate=2", "mesh.fsdp=4", "execution.dtype=bfloat16", "objectives.text_classify.batch=64")
    recipe = overrides.apply(recipes.find("text_classify.base"), changes)
    devices = machines.find("v5e:2x2").devices
    trainer = Trainer(recipe, Network(recipe.parts, recipe.execution), recipe.mesh.build(devices))
    program = trainer.lower(textbook.batches(recipe)).compile().as_text() or ""
    loops = re.findall(r"body=%?([\w.-]+)", program)
    bodies = dict(re.findall(r"^%?(\S+) \(.*?\{$(.*?)^\}", program, re.DOTALL | re.MULTILINE))
    assert sum("async-collective-start" in bodies[name] for name in loops) >= 2  # forward and backward


@absent("jax_cuda13_plugin", "plan-gpu")
def test_a_step_is_compiled_for_gpus_and_beyond_a_node_their_network_is_counted():
    topology = machines.find("h100:16")
    made = plan.make(numbers(batch=16, mesh=Mesh(data=16)), topology)
    assert made.fits
    (flow, *_) = made.flows
    assert flow.axes == "data" and flow.seconds == pytest.approx(flow.sent / 50e9)
