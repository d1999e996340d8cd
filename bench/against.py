"""Which ratios of a run fell against an earlier one.

    python -m bench.report --against bench/results/cpu.json mine.json

A ratio fell when its upper quartile lies below the lower quartile of the earlier run. Ratios are compared by benchmark
group and peer, so both runs must have timed the same shapes; what one of them lacks is named, not judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench import plots
from bench.plots import OURS, SPEED_UP, Source

Quartiles = tuple[float, float, float]
Ratios = dict[tuple[str, str], Quartiles]
"""Quartiles of (time of a peer / time of vptm) by group and peer."""


@dataclass(frozen=True)
class Verdict:
    """In lines for people, ratios that got worse, and those of the earlier run that this one lacks."""

    compared: int
    fell: list[str]
    lost: list[str]


def ratios(sources: Iterable[Source]) -> Ratios:
    """Every ratio over a peer; forms of vptm itself are no peers.

    Raises:
        ValueError: one ratio was measured twice.
    """
    found: Ratios = {}
    for run in plots.load(sources):
        quartiles = run.info.get("ratio quartiles", {})
        for name, value in run.info.items():
            peer = name.removeprefix(SPEED_UP)
            if peer == name or peer.startswith(f"{OURS} "):
                continue
            if (run.group, peer) in found:
                raise ValueError(f"{run.group}: {peer} must be measured once, got it again in {run.source}")
            low, _, high = quartiles.get(peer, (value,) * 3)
            found[run.group, peer] = low, value, high
    return found


def _spread(found: Quartiles) -> str:
    low, middle, high = found
    return f"{middle:.3g}x [{low:.3g}x, {high:.3g}x]"


def compare(before: Sequence[Source], after: Sequence[Source]) -> Verdict:
    """What `after` lost against `before`.

    Raises:
        ValueError: they have no ratio in common.
    """
    old, new = ratios(before), ratios(after)
    common = [key for key in old if key in new]
    if not common:
        raise ValueError("--against must hold a ratio of the same group and peer as JSON, got none in common")
    below = [key for key in common if new[key][2] < old[key][0]]
    fell = [
        f"{group}: over {peer}: {_spread(old[group, peer])} -> {_spread(new[group, peer])}, "
        f"{new[group, peer][1] / old[group, peer][1] - 1:+.1%}"
        for group, peer in sorted(below, key=lambda key: new[key][1] / old[key][1])
    ]
    refused = {(run.group, peer): why for run in plots.load(after) for peer, why in run.info.get("refused", {}).items()}
    groups = {group for group, _ in new}
    lost = [
        f"{group}: {peer}: {refused.get((group, peer), 'not timed')}"
        for group, peer in old
        if group in groups and (group, peer) not in new
    ]
    return Verdict(len(common), fell, lost)


def lines(before: Sequence[Source], after: Sequence[Source]) -> tuple[list[str], bool]:
    """What to print, and whether no ratio fell."""
    verdict = compare(before, after)
    places = [sorted({plots.machine(content) for _, content in sources}) for sources in (before, after)]
    said = [] if places[0] == places[1] else [f"measured elsewhere: {'; '.join(places[0])} and {'; '.join(places[1])}"]
    said += [f"no longer compared: {line}" for line in verdict.lost]
    said += [f"fell: {line}" for line in verdict.fell]
    count = f"{verdict.compared} ratios compared"
    said.append(f"{count}, {len(verdict.fell) or 'none'} fell beyond the quartiles of both runs")
    return said, not verdict.fell
