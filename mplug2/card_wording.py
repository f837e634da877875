"""How questions are worded, as recipes know it and as cards state it: the words that a module was trained on
are those that it understands."""

from collections.abc import Iterable

from mplug2.data.stream import Mixture
from mplug2.data.wording import Official, Plain, Wording
from mplug2.errors import CardError
from mplug2.hub.card import Card, Questions
from mplug2.recipe import Recipe


def wording_of(recipe: Recipe) -> Wording | None:
    """How a recipe's data word questions; None: as they are asked."""
    for objective in recipe.objectives.values():
        for data in objective.data.parts if isinstance(objective.data, Mixture) else (objective.data,):
            if (wording := getattr(data, "wording", None)) is not None:
                return wording
    return None


def questions_of(wording: Wording | None) -> Questions | None:
    """What cards say of a wording; None of one that they have no name for."""
    if isinstance(wording, Official):
        return Questions(kind="official", words=wording.asked_words)
    return Questions(kind="plain", words=wording.question_words) if isinstance(wording, Plain) else None


def wording_of_cards(cards: Iterable[Card]) -> Wording | None:
    """The wording that cards state; None where none does. Raises CardError where two state different ones."""
    stating = [card for card in cards if card.questions is not None]
    for card in stating[1:]:
        if card.questions != stating[0].questions:
            raise CardError(
                f"cards {stating[0].name} and {card.name} word questions differently: "
                f"{stating[0].questions}, {card.questions}"
            )
    said = stating[0].questions if stating else None
    if said is None:
        return None
    return Plain(question_words=said.words) if said.kind == "plain" else Official(asked_words=said.words)
