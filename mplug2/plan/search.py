"""Which mesh and which remat policy: all of them on paper, the best few compiled, one recommended.

On paper a candidate must suit the batch and the heads and fit into the device's memory; those that do are
ordered by the time of a step of which nothing overlaps. What paper does not know (temporary arrays, what the
compiler adds) only the compiled ones tell, and one of those is recommended.
"""

import math
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mplug2 import plan
from mplug2.errors import RecipeError
from mplug2.network import Network
from mplug2.plan import Plan, Times, textbook
from mplug2.plan.machines import Topology
from mplug2.plan.textbook import Paper, Work
from mplug2.recipe import Recipe
from mplug2.roles import Execution
from mplug2.sharding import Mesh

WIDEST = 8
"""Of `tensor` and `sequence`: beyond, products grow narrow and nodes of GPUs end."""

TRIES = 3
"""How many candidates are compiled for each one that must fit."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A recipe with its mesh and policy, as paper sees it; `least` bytes that it takes of a device, were all
    activations spread over `tensor`."""

    recipe: Recipe
    work: Work
    paper: Paper
    times: Times

    @property
    def least(self) -> int:
        memory = dict(self.paper.memory)
        activations = memory.pop("activations")
        return sum(memory.values()) + activations // self.recipe.mesh.tensor

    @property
    def order(self) -> tuple[float, ...]:
        """The sooner the better, then the fewer bytes: moved to hosts (in a time that is not known), sent,
        held."""
        return self.times.worst or 0.0, self.work.hosted, sum(self.paper.traffic.values()), self.least


@dataclass(frozen=True)
class Search:
    """`dropped`: how many candidates were refused, by reason; `candidates`: the others, best first; `plans`:
    those compiled, with the reason where one does not fit; `best`: the recommended one, None if none fits."""

    dropped: dict[str, int]
    candidates: tuple[Candidate, ...]
    plans: tuple[tuple[Candidate, Plan | str], ...]

    @property
    def best(self) -> Plan | None:
        fitting = [it for _, it in self.plans if isinstance(it, Plan) and it.fits is not False]
        return min(fitting, key=lambda it: it.times.worst or 0.0, default=None)


def search(recipe: Recipe, topology: Topology, *, compiled: int, say: Say) -> Search:
    """Compares every mesh of the topology's devices and every remat policy; compiles the best until
    `compiled` of them fit. `say` is told what is being done."""
    dropped, candidates = _on_paper(recipe, topology, say)
    plans: list[tuple[Candidate, Plan | str]] = []
    fitting = 0
    for candidate in candidates[: TRIES * compiled]:
        if fitting == compiled:
            break
        say(f"compiling {said(candidate.recipe)} ({fitting} of {compiled} fit so far)")
        try:
            made = plan.make(candidate.recipe, topology, candidate.work)
            fitting += made.fits is not False
            plans.append((candidate, made))
        except RecipeError as error:  # no room, or what this compiler cannot do
            plans.append((candidate, str(error)))
    return Search(dropped, tuple(candidates), tuple(plans))


def said(recipe: Recipe) -> str:
    """`fsdp=64,tensor=4 remat=full`."""
    return f"{recipe.mesh} remat={recipe.execution.remat}"


def _on_paper(recipe: Recipe, topology: Topology, say: Say) -> tuple[dict[str, int], list[Candidate]]:
    policies = typing.get_args(typing.get_type_hints(Execution)["remat"])
    dropped: Counter[str] = Counter()
    fitting = []
    for policy in policies:
        run = replace(recipe, execution=replace(recipe.execution, remat=policy))
        say(f"tracing with remat={policy}")
        work = textbook.study(run)
        network = Network(run.parts, run.execution)
        for mesh in meshes(len(topology.devices)):
            tried = replace(run, mesh=mesh)
            try:
                paper = textbook.on_paper(tried, work, network)
            except RecipeError:
                dropped["batch or heads do not divide"] += 1
                continue
            found = Candidate(tried, work, paper, plan.paper_times(tried, work, paper, topology))
            if topology.chip.memory is not None and found.least > topology.chip.memory:
                dropped["does not fit on paper"] += 1
            else:
                fitting.append(found)
    return dict(dropped), sorted(fitting, key=lambda it: it.order)


def meshes(devices: int) -> Iterator[Mesh]:
    """Every way to lay devices along the axes, `tensor` and `sequence` not wider than WIDEST."""
    for tensor in _divisors(devices):
        for sequence in _divisors(devices // tensor):
            for fsdp in _divisors(devices // tensor // sequence):
                if max(tensor, sequence) <= WIDEST:
                    data = devices // (tensor * sequence * fsdp)
                    yield Mesh(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)


def _divisors(number: int) -> list[int]:
    small = [it for it in range(1, math.isqrt(number) + 1) if number % it == 0]
    return sorted({*small, *(number // it for it in small)})
