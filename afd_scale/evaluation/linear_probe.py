"""A linear probe: can a straight line tell two sides apart by a few numbers of each clip, and could chance do as well?

Ridge regression on +1 and -1. Its held-out scores are linear in the labels, so the same matrices score thousands of
random labellings at once; what those reach is what chance reaches, whatever the number of clips, traits and prompts.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FOLDS = 8
LABELLINGS = 1999
# Of random labellings, that pass `Probed.chance`. A table has about nine probes: one in a hundred has a false alarm.
ALARM_RATE = 0.001
PENALTY = 1.0
FARTHEST = 4.0  # standard deviations; a trait farther out counts as so far

Floats = NDArray[np.float64]
Groups = NDArray[np.int64]
Labels = NDArray[np.bool_]


@dataclass(frozen=True)
class Probed:
    """What a probe reached on clips that it had not seen.

    Attributes:
        accuracy: mean of the two sides' shares that were told right; 0.5 is a coin.
        standard_error: of it.
        chance: accuracy that one random labelling in a thousand passes; 1 where these clips cannot show anything.
    """

    accuracy: float
    standard_error: float
    chance: float


def probe_traits(traits: Floats, labels: Labels, prompts: Sequence[Hashable]) -> Probed:
    """Tell sides apart by traits; the same answer every time.

    Clips of one prompt are in one fold, where there are prompts enough. Random labellings exchange what is
    exchangeable if the sides do not differ: clips of a prompt that both sides have, and whole prompts of one side.

    Args:
        traits: (N, D), any scale.
        labels: (N,) whether a clip is of the first side; both sides have clips.
        prompts: (N,) equal where clips are of the same prompt.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    groups = np.array([numbers[prompt] for prompt in prompts])
    random = np.random.default_rng(0)
    columns = np.concatenate([labels[:, None], _relabelled(labels, groups, random, LABELLINGS)], axis=1)
    right = _told_right(_standardised(traits), columns, _folds(labels, groups, random))
    shares = [_mean_of(right, columns), _mean_of(right, ~columns)]
    accuracy = (shares[0] + shares[1]) / 2
    passed = math.ceil((1 - ALARM_RATE) * (LABELLINGS + 1))
    chance = float(np.sort(accuracy[1:])[passed - 1])
    return Probed(float(accuracy[0]), _standard_error([share[0] for share in shares], labels), chance)


def _standardised(traits: Floats) -> Floats:
    spread = traits.std(axis=0)
    tiny = 1e-9 * (1 + np.abs(traits).max(axis=0, initial=0))
    scaled = np.where(spread > tiny, (traits - traits.mean(axis=0)) / np.maximum(spread, tiny), 0.0)
    return np.clip(scaled, -FARTHEST, FARTHEST) / math.sqrt(max(1, traits.shape[1]))


def _folds(labels: Labels, groups: Groups, random: np.random.Generator) -> Groups:
    """(N,) fold of each clip, each kind of prompt spread over all of them: of both sides, or of one."""
    if groups.max() + 1 < FOLDS:
        groups = np.arange(len(groups))
    folds = np.empty(groups.max() + 1, np.int64)
    kinds = _kinds(labels, groups)
    begin = 0
    for kind in range(3):
        own = random.permutation(np.flatnonzero(kinds == kind))
        folds[own] = (begin + np.arange(len(own))) % FOLDS
        begin += len(own)
    return np.asarray(folds[groups])


def _kinds(labels: Labels, groups: Groups) -> Groups:
    """(G,) of each group: 0 the second side's, 1 the first's, 2 both."""
    first, sizes = np.bincount(groups, labels), np.bincount(groups)
    return np.where(first == 0, 0, np.where(first == sizes, 1, 2))


def _relabelled(labels: Labels, groups: Groups, random: np.random.Generator, count: int) -> Labels:
    """(N, count) labellings at random."""
    kinds = _kinds(labels, groups)
    of_one_side = np.flatnonzero(kinds < 2)
    of_group = np.repeat(kinds[:, None], count, axis=1)
    of_group[of_one_side] = random.permuted(of_group[of_one_side], axis=0)
    changed = of_group[groups] == 1
    # Within a prompt of both sides: its labels go to its clips in a random order.
    places = np.flatnonzero(kinds[groups] == 2)
    places = places[np.argsort(groups[places], kind="stable")]
    order = np.argsort(groups[places][:, None] + random.random((len(places), count)), axis=0)
    np.put_along_axis(changed, places[order], labels[places][:, None], axis=0)
    return np.asarray(changed)


def _told_right(traits: Floats, columns: Labels, folds: Groups) -> Floats:
    """(N, L) whether each clip was told right under each labelling, 0.5 where it was not told at all.

    The line is halfway between the means of the two sides' scores, so that sides of other sizes count the same.
    """
    signs = np.where(columns, 1.0, -1.0)
    right = np.full(columns.shape, 0.5)
    for fold in np.unique(folds):
        seen, held_out = folds != fold, folds == fold
        if not seen.any():
            continue
        centre = traits[seen].mean(axis=0)
        known, asked = traits[seen] - centre, traits[held_out] - centre
        weights = _ridge(known, signs[seen] - signs[seen].mean(axis=0))
        fitted = known @ weights
        middle = (_mean_of(fitted, columns[seen]) + _mean_of(fitted, ~columns[seen])) / 2
        score = (asked @ weights - middle) * signs[held_out]
        right[held_out] = np.where(np.abs(score) < 1e-9, 0.5, score > 0)
    return right


def _ridge(known: Floats, aims: Floats) -> Floats:
    """(D, L) weights; of the two forms that are equal, the one with the smaller matrix."""
    clips, traits = known.shape
    if traits < clips:
        return np.linalg.solve(known.T @ known + PENALTY * np.eye(traits), known.T @ aims)
    return np.asarray(known.T @ np.linalg.solve(known @ known.T + PENALTY * np.eye(clips), aims))


def _mean_of(values: Floats, chosen: Labels) -> Floats:
    """(L,) means of the chosen values (N, L) of each column."""
    return np.asarray((values * chosen).sum(axis=0) / np.maximum(1, chosen.sum(axis=0)))


def _standard_error(shares: Sequence[float], labels: Labels) -> float:
    """Of the mean of two shares, none of which is held to be quite 0 or 1."""
    variance = 0.0
    for share, clips in zip(shares, (labels.sum(), (~labels).sum()), strict=True):
        likely = (share * clips + 1) / (clips + 2)
        variance += likely * (1 - likely) / clips
    return math.sqrt(variance) / 2
