"""Lessons for patches and tokens: what each shows, in classes, which tutor.py teaches.

`patch_labels` turns the regions of a drawing into a class per patch for each of `COLUMNS`. That reaches every
patch directly, where an answer's loss has to find its way back through the whole decoder; and what a question
about the whole picture needs (how many of a kind, which letter of a word, which way) is told where it shows.
`seat_labels` says what only the decoder knows: where a token is; `letter_labels` what it has to sort.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from models.demo_training.names import COLOURS, SHAPES
from models.demo_training.regions import KEY, Region

UNKNOWN = 255  # of a patch nobody described, and where a question makes no sense
MOST_COUNTED = 11
_FORMS = [*SHAPES, *"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"]
_COLOURS = list(COLOURS)
_MOTIONS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
_ORDERS, _PLACES, _SIZES, _TURNS = 8, 12, 8, 6
_SMALLEST, _LARGEST = 0.06, 0.66  # of the shorter side, of what is told apart by size


class Column(NamedTuple):
    """One thing to tell of every patch; class 0 of `has_background` means that there is nothing.

    known_to: who is asked first; the tower sees single frames, the resampler two, the decoder all.
    """

    name: str
    num_classes: int
    weight: float
    has_background: bool = False
    known_to: Literal["tower", "resampler", "decoder"] = "tower"


# A patch is two characters wide where they are small, so its halves are told apart.
COLUMNS = (
    Column("form, left half", len(_FORMS) + 1, 0.5, has_background=True),
    Column("form, right half", len(_FORMS) + 1, 0.5, has_background=True),
    Column("colour", len(_COLOURS) + 1, 0.6, has_background=True),
    Column("which letter, left half", _ORDERS, 0.3),
    Column("which letter, right half", _ORDERS, 0.3),
    Column("x of the middle", _PLACES, 0.3),
    Column("y of the middle", _PLACES, 0.3),
    Column("size", _SIZES, 0.1),
    Column("things of its shape", MOST_COUNTED, 0.2),
    Column("things of its colour", MOST_COUNTED, 0.2),
    Column("things of its kind", MOST_COUNTED, 0.2),
    Column("things", MOST_COUNTED, 0.2),
    Column("number from the left", MOST_COUNTED, 0.2),
    Column("whether its middle", 2, 0.2),
    Column("motion", 5, 0.5, known_to="resampler"),
    Column("number within its shape", MOST_COUNTED, 0.2, known_to="decoder"),
    Column("number within its colour", MOST_COUNTED, 0.2, known_to="decoder"),
    Column("number within its kind", MOST_COUNTED, 0.2, known_to="decoder"),
    Column("number", MOST_COUNTED, 0.2, known_to="decoder"),
    Column("turn", _TURNS, 0.5, known_to="decoder"),
)
NUM_COLUMNS = len(COLUMNS)
NUM_CLASSES = sum(column.num_classes for column in COLUMNS if column.known_to != "decoder")
(_LEFT_FORM, _RIGHT_FORM, _COLOUR, _LEFT_ORDER, _RIGHT_ORDER, _X, _Y, _SIZE, _SHAPE_COUNT, _COLOUR_COUNT,
 _KIND_COUNT, _COUNT, _RANK, _MIDDLE, _MOTION, _SHAPE_NUMBER, _COLOUR_NUMBER, _KIND_NUMBER,
 _NUMBER, _TURN) = range(NUM_COLUMNS)  # fmt: skip

# Of a token in the decoder; the last ones are what its patches are told.
SEATS = (
    Column("x of the token", _PLACES, 0.25),
    Column("y of the token", _PLACES, 0.25),
    Column("which picture", 4, 0.25),
    Column("which pair of frames", 8, 0.25),
    Column("x of what it shows", _PLACES, 0.25),
    Column("y of what it shows", _PLACES, 0.25),
    Column("its motion", 5, 0.5),
    *COLUMNS[_SHAPE_NUMBER:],
)
# Of a token that shows letters, in the decoder: up to three side by side, by their place in the word, because
# that is what an answer that is being spelled looks for.
LETTERS = (
    Column("place of its first letter", _ORDERS, 0.3),
    *(Column(f"its letter at a place 3n + {i}", len(_FORMS) + 1, 0.4) for i in range(3)),
)
WHICH_PICTURE = 2  # of SEATS
FORM_AND_COLOUR = (_LEFT_FORM, _RIGHT_FORM, _COLOUR)
TOLD_OF_THINGS = [_LEFT_FORM, _COLOUR, _X, _Y, _SHAPE_COUNT, _COLOUR_COUNT, _KIND_COUNT, _COUNT]
_SHOWN = [_X, _Y, _MOTION, *range(_SHAPE_NUMBER, NUM_COLUMNS)]


def form_class(form: str) -> int:
    """Of its columns; 0 is nothing."""
    return 1 + _FORMS.index(form)


def colour_class(colour: str) -> int:
    return 1 + _COLOURS.index(colour)


def patch_labels(image: Image.Image | None, rows: int, columns: int) -> np.ndarray:
    """[rows * columns, NUM_COLUMNS] uint8 in the order of the windows (2 x 2 patches together)."""
    labels = np.full((rows, columns, NUM_COLUMNS), UNKNOWN, np.uint8)
    if image is not None and KEY in image.info:
        labels[..., [_LEFT_FORM, _RIGHT_FORM, _COLOUR]] = 0
        for region in image.info[KEY]:
            _tell_forms(labels, region)
            told = [UNKNOWN] * NUM_COLUMNS
            if region.form is not None:
                _tell_place(told, region, rows, columns)
            if region.colour is not None:
                told[_COLOUR] = colour_class(region.colour)
                told[_MIDDLE] = 0
            if region.motion is not None:
                told[_MOTION] = _MOTIONS.index(region.motion)
            if region.turn is not None:
                told[_TURN] = min(region.turn, _TURNS) - 1
            inside = np.ix_(*_box(region, rows, columns), [_COLOUR, *range(_X, _MOTION + 1), _TURN])
            labels[inside] = [told[_COLOUR], *told[_X : _MOTION + 1], told[_TURN]]
        _tell_counts(labels, [r for r in image.info[KEY] if r.colour is not None])
    windows = labels.reshape(rows // 2, 2, columns // 2, 2, NUM_COLUMNS).transpose(0, 2, 1, 3, 4)
    return windows.reshape(-1, NUM_COLUMNS)


def _tell_forms(labels: np.ndarray, region: Region) -> None:
    """Form and order, for the left and the right half of every patch."""
    rows, columns = labels.shape[:2]
    across = _covered(_middles(2 * columns), region.left, region.right)
    down = _covered(_middles(rows), region.top, region.bottom)
    form = UNKNOWN if region.form is None else form_class(region.form)
    order = UNKNOWN if region.order is None else min(region.order, _ORDERS - 1)
    for half, columns_of_half in ((across[0::2], (_LEFT_FORM, _LEFT_ORDER)),
                                  (across[1::2], (_RIGHT_FORM, _RIGHT_ORDER))):  # fmt: skip
        labels[np.ix_(down, half, columns_of_half)] = form, order


def _tell_place(told: list[int], region: Region, rows: int, columns: int) -> None:
    told[_X] = _bin((region.left + region.right) / 2, _PLACES)
    told[_Y] = _bin((region.top + region.bottom) / 2, _PLACES)
    side = (region.right - region.left) * columns / min(rows, columns)
    told[_SIZE] = _bin(np.log(side / _SMALLEST) / np.log(_LARGEST / _SMALLEST), _SIZES)


def _tell_counts(labels: np.ndarray, things: list[Region]) -> None:
    """All patches of a thing are told how many there are, the one in its middle which of them it is."""
    rows, columns = labels.shape[:2]
    totals = Counter(key for thing in things for key in _groups(thing))
    seen: Counter[object] = Counter()
    middles = [_middle(thing, rows, columns) for thing in things]
    for (row, column), thing in sorted(zip(middles, things, strict=True), key=lambda pair: _reading(pair[0])):
        inside = np.ix_(*_box(thing, rows, columns), range(_SHAPE_COUNT, _RANK + 1))
        counts = [min(totals[key], MOST_COUNTED) - 1 for key in _groups(thing)]
        labels[inside] = [*counts, min(_rank(thing, things), MOST_COUNTED - 1)]
        seen.update(_groups(thing))
        labels[row, column, _MIDDLE] = 1
        labels[row, column, _SHAPE_NUMBER : _NUMBER + 1] = [
            min(seen[key], MOST_COUNTED) - 1 for key in _groups(thing)
        ]


def _rank(thing: Region, things: list[Region]) -> int:
    """How many are further to the left."""
    return sum(other.left + other.right < thing.left + thing.right for other in things)


def _groups(thing: Region) -> tuple[object, ...]:
    """What it is counted among, in the order of the columns."""
    return ("shape", thing.form), ("colour", thing.colour), (thing.form, thing.colour), "all"


def _middle(region: Region, rows: int, columns: int) -> tuple[int, int]:
    return _bin((region.top + region.bottom) / 2, rows), _bin((region.left + region.right) / 2, columns)


def _reading(patch: tuple[int, int]) -> tuple[int, ...]:
    """Tokens, which are 2 x 2 patches, row by row; then patches within."""
    return patch[0] // 2, patch[1] // 2, *patch


def _box(region: Region, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows and columns it covers."""
    down = _covered(_middles(rows), region.top, region.bottom)
    return down, _covered(_middles(columns), region.left, region.right)


def seat_labels(grids: np.ndarray, tokens_per_sample: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """[T, len(SEATS)] uint8 of all media tokens in prompt order.

    grids [N, 3] frames, patch rows, patch columns; tokens_per_sample [B]; shown [T, 8, NUM_COLUMNS] the
    labels of each token's patches. Of several things in a token the first counts.
    """
    extents = [(max(1, f // 2), rows // 2, columns // 2) for f, rows, columns in grids.tolist()]
    places = np.concatenate([_own_places(*extent) for extent in extents])
    starts = np.cumsum([0, *(t * h * w for t, h, w in extents)])
    samples = np.searchsorted(np.cumsum(tokens_per_sample), starts[:-1], side="right")
    firsts = np.searchsorted(samples, samples)
    numbers = np.minimum(np.arange(len(extents)) - firsts, SEATS[WHICH_PICTURE].num_classes - 1)
    of_tokens = np.repeat(numbers, np.diff(starts))[:, None]
    things = shown[:, :, _SHOWN].min(1)
    things[places[:, 2] == 0, _SHOWN.index(_MOTION)] = UNKNOWN  # nothing has been seen to move yet
    return np.concatenate([places[:, :2], of_tokens, places[:, 2:], things], axis=1).astype(np.uint8)


def letter_labels(shown: np.ndarray) -> np.ndarray:
    """shown [T, 8, NUM_COLUMNS] -> [T, len(LETTERS)] uint8; UNKNOWN where there are no letters at all."""
    forms = np.concatenate([shown[:, :, _LEFT_FORM], shown[:, :, _RIGHT_FORM]], axis=1)
    orders = np.concatenate([shown[:, :, _LEFT_ORDER], shown[:, :, _RIGHT_ORDER]], axis=1)
    labels = np.full((len(shown), len(LETTERS)), UNKNOWN, np.uint8)
    labels[:, 0] = orders.min(1)
    for residue in range(3):
        of_residue = np.where((orders != UNKNOWN) & (orders % 3 == residue), orders, UNKNOWN)
        first = of_residue.argmin(1)[:, None]
        found = np.take_along_axis(of_residue, first, 1)[:, 0] != UNKNOWN
        labels[:, 1 + residue] = np.where(found, np.take_along_axis(forms, first, 1)[:, 0], 0)
    labels[labels[:, 0] == UNKNOWN] = UNKNOWN
    return labels


@lru_cache(maxsize=4096)
def _own_places(pairs: int, rows: int, columns: int) -> np.ndarray:
    """[pairs * rows * columns, 3] bins of x and y, and the pair; UNKNOWN for a picture's."""
    pair, y, x = np.meshgrid(np.arange(pairs), _middles(rows), _middles(columns), indexing="ij")
    pair = np.minimum(pair, SEATS[3].num_classes - 1) if pairs > 1 else np.full_like(pair, UNKNOWN)
    bins = [(x * _PLACES).astype(np.uint8), (y * _PLACES).astype(np.uint8), pair.astype(np.uint8)]
    return np.stack(bins, axis=-1).reshape(-1, 3)


def _bin(share: float, count: int) -> int:
    return min(count - 1, max(0, int(share * count)))


def _middles(count: int) -> np.ndarray:
    return (np.arange(count) + 0.5) / count


def _covered(middles: np.ndarray, low: float, high: float) -> np.ndarray:
    """Which of them lie between; at least the one nearest to the middle."""
    inside = (middles >= low) & (middles <= high)
    inside[np.abs(middles - (low + high) / 2).argmin()] = True
    return inside
