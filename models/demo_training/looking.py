"""Teaches where to look: at what a question names, and to bring back what is seen there.

To say which picture shows a red ring, or what colour the ring is, some head has to look from the question to
the ring; only then does an answer depend on what is found there, and until it does its loss teaches nothing.
So the attention of two heads is taught itself: of every token that seeks, they look at tokens that show what
is sought, and behind their layer it knows what those were told. They are always the same two: when any one
head would do, each answered for some things only, and what it brought back drowned in what the others did.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.demo_training.labels import (
    COLUMNS,
    FORM_AND_COLOUR,
    SEATS,
    TOLD_OF_THINGS,
    UNKNOWN,
    WHICH_PICTURE,
    colour_class,
    form_class,
)
from models.demo_training.sample import Kind

# What a seeking token knows of what it found.
FOUND = (SEATS[WHICH_PICTURE]._replace(weight=1.0), *(COLUMNS[i] for i in TOLD_OF_THINGS))
_COLOURS = 16


@dataclass(frozen=True)
class Seekers:
    """M tokens that seek something that is shown.

    rows, columns  [M] where they are
    wanted         [M, L] bool: media tokens of their row that show it
    """

    rows: np.ndarray
    columns: np.ndarray
    wanted: np.ndarray


def kind_id(kind: Kind) -> int:
    """A number for form and colour, 0 for neither; it fits in 16 bits."""
    form, colour = kind
    of_form = 0 if form is None else form_class(form)
    return of_form * _COLOURS + (0 if colour is None else colour_class(colour))


def seekers(sought: np.ndarray, is_media: np.ndarray, shown: np.ndarray) -> Seekers:
    """sought [B, L] uint16 of kind_id; is_media [B, L] bool; shown [T, 8, NUM_COLUMNS], T media in order."""
    rows, columns = np.nonzero(sought)
    wanted = np.zeros((len(rows), sought.shape[1]), bool)
    starts = np.concatenate([[0], np.cumsum(is_media.sum(1))])
    for index, (row, kind) in enumerate(zip(rows.tolist(), sought[rows, columns].tolist(), strict=True)):
        wanted[index, is_media[row]] = _shows(shown[starts[row] : starts[row + 1]], kind)
    answered = wanted.any(1)
    return Seekers(rows[answered], columns[answered], wanted[answered])


def _shows(shown: np.ndarray, kind: int) -> np.ndarray:
    """[T, 8, NUM_COLUMNS] -> [T] whether one of a token's patches shows the kind."""
    form, colour = divmod(kind, _COLOURS)
    left, right, colours = (shown[:, :, column] for column in FORM_AND_COLOUR)
    is_form = (left == form) | (right == form) if form else True
    is_colour = colours == colour if colour else True
    stands_out = (left > 0) & (left != UNKNOWN)
    result: np.ndarray = (is_form & is_colour & stands_out).any(1)
    return result


def found_labels(seeking: Seekers, is_media: np.ndarray, shown: np.ndarray, seats: np.ndarray) -> np.ndarray:
    """[M, len(FOUND)] uint8: what all wanted tokens were told alike, UNKNOWN where they differ.

    seats [T, len(SEATS)], of the media tokens.
    """
    of_things = shown[:, :, TOLD_OF_THINGS].copy()
    of_things[(of_things == 0) & _has_background()] = UNKNOWN
    told = np.full((*is_media.shape, len(FOUND)), UNKNOWN, np.uint8)
    told[is_media] = np.concatenate([seats[:, [WHICH_PICTURE]], of_things.min(1)], axis=1)
    has_one_picture = np.where(told[:, :, 0] == UNKNOWN, 0, told[:, :, 0]).max(1) == 0
    told[has_one_picture, :, 0] = UNKNOWN  # which of one is no question
    of_seekers = told[seeking.rows]
    counts = seeking.wanted[:, :, None] & (of_seekers != UNKNOWN)
    least = np.where(counts, of_seekers, UNKNOWN).min(1)
    most = np.where(counts, of_seekers, 0).max(1)
    return np.where(least == most, least, UNKNOWN).astype(np.uint8)


def _has_background() -> np.ndarray:
    return np.array([COLUMNS[i].has_background for i in TOLD_OF_THINGS])
