"""Three positions and a token type for every token of a sequence (specification sections 3.4 and 3.6).

Computed once per sequence from its length and its media, then sliced by absolute index, so that a chunk that
begins inside an image sees what the whole prompt would. Knows nothing of chunks, blocks or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.messages import MediaItem

MERGE = 2  # patches per token along rows, columns and (for videos) frames


class Positions:
    """Positions (t, h, w) of the tokens of one sequence, without end: text follows the last known token.

    Text and marker tokens have t = h = w = a running counter. A media item's tokens count frames, rows and
    columns from the counter, which then jumps past the largest of the three (the Paddle rule).
    """

    def __init__(self, num_tokens: int, media: Sequence[MediaItem]) -> None:
        """`num_tokens` known tokens, of which `media` (disjoint, in prompt order) fill their spans."""
        self._known = np.empty((3, num_tokens), np.int32)
        counter = end = 0
        for item in media:
            counter = self._fill_text(end, item.offset, counter)
            end = item.offset + item.num_tokens
            counter = self._fill_media(item, counter)
        self.num_known = num_tokens
        self.next_position = self._fill_text(end, num_tokens, counter)
        # What to add to the index of a token behind the known ones to get its position; mostly <= 0.
        self.delta = self.next_position - num_tokens

    def slice_into(self, out: np.ndarray, first: int) -> None:
        """Fill `out` [3, n] int32 with the positions of the tokens [first, first + n)."""
        count, known = out.shape[1], self._known.shape[1]
        num_known = min(max(known - first, 0), count)
        out[:, :num_known] = self._known[:, first : first + num_known]
        if num_known < count:
            begin = first + num_known + self.delta
            out[:, num_known:] = np.arange(begin, begin + count - num_known, dtype=np.int32)

    def _fill_text(self, start: int, end: int, counter: int) -> int:
        """Number the tokens [start, end); returns the next counter."""
        self._known[:, start:end] = np.arange(counter, counter + end - start, dtype=np.int32)
        return counter + end - start

    def _fill_media(self, item: MediaItem, counter: int) -> int:
        frames, rows, columns = token_grid(item.grid)
        index = np.arange(item.num_tokens, dtype=np.int32)
        span = self._known[:, item.offset : item.offset + item.num_tokens]
        span[0] = index // (rows * columns)
        span[1] = index // columns % rows
        span[2] = index % columns
        span += counter
        return counter + max(frames, rows, columns)


def token_grid(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """Patches in time, height and width -> tokens; a single frame is an image and keeps its frame."""
    frames, rows, columns = grid
    return max(frames // MERGE, 1), rows // MERGE, columns // MERGE


def token_types(token_ids: np.ndarray, image_patch_id: int, num_pools: int) -> np.ndarray:
    """0 for text, 1 for vision: which expert pool each token uses, the same rule in prefill and decode.

    Media markers have ids from the placeholder's up and count as vision. A model with one pool has
    only text tokens.
    """
    if num_pools < 2:
        return np.zeros(token_ids.shape, np.int32)
    return (token_ids >= image_patch_id).astype(np.int32)
