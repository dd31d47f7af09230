"""Which runs may stand side by side by strength, and how their strength axis is marked."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.series import Series, number, variants_of

MOST_VARIANTS = 6


def comparable(series: tuple[Series, ...]) -> dict[str, tuple[Series, ...]]:
    """Groups of at least two runs that differ in strength alone, by what they share."""
    groups = {
        name: tuple(one for one in group if one.strength is not None)
        for name, group in variants_of(series).items()
    }
    return {name: group for name, group in groups.items() if len(group) > 1}


def strength_ticks(group: Sequence[Series], *, most: int) -> tuple[list[int], list[str]]:
    """A strength at every place, or at every second, third … where there are many."""
    places = list(range(0, len(group), -(-len(group) // most)))
    return places, [number(group[place].strength or 0.0) for place in places]


def strength_axis(series: Sequence[Series]) -> str:
    names = {one.kind == "hidden_state" for one in series if one.strength is not None}
    if len(names) > 1:
        return "Strength (β, or s for hidden states)"
    return "Feedback strength s" if True in names else "Bias strength β"


def left_out_notes(
    groups: dict[str, tuple[Series, ...]],
    shown: dict[str, tuple[Series, ...]],
    series: Sequence[Series],
) -> list[str]:
    notes = []
    if len(groups) > len(shown):
        notes.append(f"The first {len(shown)} of {len(groups)} variants; --run chooses others.")
    inside = {one.run for group in groups.values() for one in group}
    outside = [one.label for one in series if one.run not in inside]
    if outside:
        names = "; ".join(outside[:4]) + ("; …" if len(outside) > 4 else "")
        notes.append(f"Without a run of another strength to compare, so not drawn: {names}.")
    return notes
