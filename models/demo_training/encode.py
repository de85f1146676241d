"""A sample as the model sees it: token ids, labels, 3-D positions, token types, patches.

Rendering, tokenising, resizing, frame choice, time stamps and patch order are the server's own functions
(api/), so training sees what serving will. Positions and token types are written here a second time,
straight from the specification (3.4, 3.6): the server's are tested against what this trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from api.markers import MarkerScanner
from api.media.geometry import num_image_tokens, num_video_tokens, smart_resize
from api.media.images import resize
from api.media.options import MediaOptions
from api.media.patches import PATCH_BYTES, write_patches
from api.media.sampling import VideoFacts, choose_frames, timestamps
from api.media.timestamp import TimestampFont, format_timestamp
from api.template import ChatTemplate
from api.tokenizer import Tokenizer, load_tokenizer
from engine.errors import RequestError
from models.demo_training import config
from models.demo_training.labels import NUM_COLUMNS, patch_labels
from models.demo_training.looking import kind_id
from models.demo_training.regions import KEY, describe, stamp_regions
from models.demo_training.sample import Clip, Message, Sample, Target

Grid = tuple[int, int, int]

_MARKS = frozenset({"<|image@placeholder|>", "<|video@placeholder|>"})
_EOS = "</s>"
SEEKING = 2  # last tokens of a prompt that are taught where to look


@dataclass(frozen=True)
class Example:
    """One encoded sample.

    skills       of its answers in order; the last is the sample's own
    token_ids    [L] int32, prompt then target
    answers      [L] uint8: 0 in the prompt, k in the k-th answer that bears loss
    branches     [L] uint8: 0 is seen by all that follows, k only by the k-th of several questions
    sought       [L] uint16: what a token is to look for in the media (kind_id in looking.py), 0 for nothing
    positions    [3, L] int32, rows t, h, w
    token_types  [L] uint8, 1 for vision experts
    patches      [P, 588] uint8 of all media in prompt order
    patch_labels [P, NUM_COLUMNS] uint8, what each patch shows; see labels.py
    grids        (frames, patch rows, patch columns) per picture or clip
    """

    skills: tuple[str, ...]
    token_ids: np.ndarray
    answers: np.ndarray
    branches: np.ndarray
    sought: np.ndarray
    positions: np.ndarray
    token_types: np.ndarray
    patches: np.ndarray
    patch_labels: np.ndarray
    grids: list[Grid]

    @property
    def num_prompt(self) -> int:
        """Tokens before the first answer that bears loss."""
        bearing = np.flatnonzero(self.answers)
        return int(bearing[0]) if len(bearing) else len(self.token_ids)

    @property
    def next_position(self) -> int:
        """Of the first token behind the known ones."""
        return int(self.positions.max()) + 1


class Encoder:
    """Made once per process from a folder with tokenizer and template."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        path = folder / "chat_template.jinja"
        self._template = ChatTemplate(path.read_text(encoding="utf-8"), str(path))
        self._scanner = MarkerScanner({*self.tokenizer.markers, *_MARKS})
        self._font = TimestampFont(folder)
        self._media_ids = config.demo_model().media
        self.options = MediaOptions(
            image_min_pixels=config.MIN_IMAGE_PIXELS,
            image_max_pixels=config.MAX_IMAGE_PIXELS,
            video_min_pixels=config.MIN_FRAME_PIXELS,
            video_max_pixels=config.MAX_FRAME_PIXELS,
        )

    def encode(self, sample: Sample, *, with_target: bool = True) -> Example:
        """`with_target` False stops behind the generation prompt, as a request does."""
        cut = [self._cut(item) for item in sample.media]
        grids = [grid for _, grid, _ in cut]
        if with_target:
            ids, answers, sought, branches, placed = self._branches(sample, grids)
        else:
            ids = self.prompt_ids(sample, grids)
            answers = branches = sought = [0] * len(ids)
            placed = positions(np.array(ids, np.int32), grids, self._media_ids.patch)
        token_ids = np.array(ids, np.int32)
        return Example(
            tuple(t.skill for t in sample.targets) if with_target else (),
            token_ids,
            np.array(answers, np.uint8),
            np.array(branches, np.uint8),
            np.array(sought, np.uint16),
            placed,
            (token_ids >= self._media_ids.patch).astype(np.uint8),
            np.concatenate([np.empty((0, PATCH_BYTES), np.uint8), *(patches for patches, _, _ in cut)]),
            np.concatenate([np.empty((0, NUM_COLUMNS), np.uint8), *(labels for _, _, labels in cut)]),
            grids,
        )

    def _branches(
        self, sample: Sample, grids: list[Grid]
    ) -> tuple[list[int], list[int], list[int], list[int], np.ndarray]:
        """Ids, answers, what is sought, branches, positions: the media once, then each question alone."""
        ids, answers, sought = self._taught(sample, grids)
        placed = [positions(np.array(ids, np.int32), grids, self._media_ids.patch)]
        shared = 1 + max((i for i, token in enumerate(ids) if token >= self._media_ids.patch), default=-1)
        branches = [0] * shared + [1 if sample.others else 0] * (len(ids) - shared)
        for number, other in enumerate(sample.others, 2):
            other_ids, other_answers, other_sought = self._taught(other, grids)
            assert other_ids[:shared] == ids[:shared], "questions about different media"
            placed.append(positions(np.array(other_ids, np.int32), grids, self._media_ids.patch)[:, shared:])
            before = max(answers)
            ids += other_ids[shared:]
            sought += other_sought[shared:]
            answers += [before + a if a else 0 for a in other_answers[shared:]]
            branches += [number] * (len(other_ids) - shared)
        return ids, answers, sought, branches, np.concatenate(placed, axis=1)

    def prompt_ids(self, sample: Sample, grids: list[Grid]) -> list[int]:
        return self._prompt(self._rendered(sample, len(sample.messages), sample.thinks), iter(grids))

    def _taught(self, sample: Sample, grids: list[Grid]) -> tuple[list[int], list[int], list[int]]:
        """Prompt and answer of every turn that is taught, as if each had just been generated."""
        ids: list[int] = []
        answers: list[int] = []
        sought: list[int] = []
        remaining = iter(grids)
        known = ""
        turns = [(i, m["taught"]) for i, m in enumerate(sample.messages) if "taught" in m]
        for number, (index, turn) in enumerate([*turns, (len(sample.messages), sample.target)], 1):
            rendered = self._rendered(sample, index, turn.reasoning is not None)
            assert rendered.startswith(known), "a template that changes earlier turns"
            prompt = self._prompt(rendered[len(known) :], remaining)
            reasoning, answer = self._reasoning_ids(turn), self._answer_ids(turn)
            ids += prompt + reasoning + answer
            answers += [0] * len(prompt)
            answers += [0 if turn.is_given else number] * len(reasoning) + [number] * len(answer)
            sought += _seeking(turn, len(prompt), len(reasoning) + len(answer))
            if index < len(sample.messages):
                known = self._rendered(sample, index + 1, None)
        return ids, answers, sought

    def _rendered(self, sample: Sample, num_messages: int, thinks: bool | None) -> str:
        """The first messages; thinks: None for no generation prompt."""
        render = partial(
            self._template.render,
            [_template_message(m) for m in sample.messages[:num_messages]],
            sample.tools,
            {"enable_thinking": bool(thinks)},
            add_generation_prompt=thinks is not None,
        )
        try:
            return render()
        except RequestError:  # a request has seconds, and this process may have been paused meanwhile
            return render()

    def _prompt(self, rendered: str, remaining: Iterator[Grid]) -> list[int]:
        ids: list[int] = []
        for piece, is_marker in self._scanner.split(rendered):
            if piece in _MARKS:
                ids += [self._media_ids.patch] * num_tokens(next(remaining))
            elif is_marker:
                ids.append(self.tokenizer.markers[piece])
            else:
                ids += self.tokenizer.encode(piece)
        return ids

    def target_ids(self, turn: Target) -> list[int]:
        """What the model shall write: reasoning and its end tag if it thinks, the answer, </s>."""
        return self._reasoning_ids(turn) + self._answer_ids(turn)

    def _reasoning_ids(self, turn: Target) -> list[int]:
        return [] if turn.reasoning is None else self._text(f"\n{turn.reasoning}\n</think>\n")

    def _answer_ids(self, turn: Target) -> list[int]:
        ids: list[int] = []
        before, letters, after = (
            turn.answer.partition(turn.spelled) if turn.spelled else (turn.answer, "", "")
        )
        for part in (before, *letters, after):
            ids += self._text(part)
        return [*ids, self.tokenizer.markers[_EOS]]

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids)

    def _text(self, text: str) -> list[int]:
        """With the markers that the model itself writes: </think> and <tool_call>."""
        ids: list[int] = []
        for piece, is_marker in self._scanner.split(text):
            ids += [self.tokenizer.markers[piece]] if is_marker else self.tokenizer.encode(piece)
        return ids

    def _cut(self, item: Image.Image | Clip) -> tuple[np.ndarray, Grid, np.ndarray]:
        """Patches [P, 588] in the order of the windows, the grid, labels [P, NUM_COLUMNS]."""
        return self._cut_clip(item) if isinstance(item, Clip) else cut_picture(item)

    def _cut_clip(self, clip: Clip) -> tuple[np.ndarray, Grid, np.ndarray]:
        """Choose frames, stamp them, and make their number even by repeating the last (5.2 to 5.4)."""
        facts = VideoFacts(len(clip.frames), clip.fps, clip.duration)
        indices = choose_frames(facts, self.options)
        first = clip.frames[0]
        height, width = smart_resize(
            first.height, first.width, self.options.video_min_pixels, self.options.video_max_pixels
        )
        even = len(indices) + len(indices) % 2
        grid = (even, height // 14, width // 14)
        patches = np.empty((even, grid[1] * grid[2], PATCH_BYTES), np.uint8)
        labels = np.empty((even, grid[1] * grid[2], NUM_COLUMNS), np.uint8)
        for row, (index, seconds) in enumerate(zip(indices, timestamps(indices, facts), strict=True)):
            frame = clip.frames[index].copy()
            self._font.draw(frame, seconds)
            told = [*stamp_regions(frame.size, format_timestamp(seconds)), *frame.info.get(KEY, [])]
            labels[row] = patch_labels(describe(frame, told), *grid[1:])
            write_patches(resize(frame, height, width), patches[row])
        if even > len(indices):
            patches[-1], labels[-1] = patches[-2], labels[-2]
        return patches.reshape(-1, PATCH_BYTES), grid, labels.reshape(-1, NUM_COLUMNS)


def cut_picture(image: Image.Image) -> tuple[np.ndarray, Grid, np.ndarray]:
    height, width = smart_resize(image.height, image.width, config.MIN_IMAGE_PIXELS, config.MAX_IMAGE_PIXELS)
    grid = (1, height // 14, width // 14)
    patches = np.empty((grid[1] * grid[2], PATCH_BYTES), np.uint8)
    write_patches(resize(image, height, width), patches)
    return patches, grid, patch_labels(image, *grid[1:])


def _seeking(turn: Target, num_prompt: int, num_written: int) -> list[int]:
    """What its tokens look for: the prompt's last and the answer's first, unless it thinks before."""
    sought = [0] * (num_prompt + num_written)
    if turn.sought is not None and turn.reasoning is None:
        sought[num_prompt - SEEKING : num_prompt + 1] = [kind_id(turn.sought)] * (SEEKING + 1)
    return sought


def _template_message(message: Message) -> Message:
    """Pictures and clips become the parts that templates know."""
    message = {key: value for key, value in message.items() if key != "taught"}
    content = message["content"]
    if isinstance(content, str):
        return message
    kinds = {"text": "text", "image": "image_url", "video": "video_url"}
    parts = [
        {"type": kinds[p["type"]], **({"text": p["text"]} if p["type"] == "text" else {})} for p in content
    ]
    return {**message, "content": parts}


def num_tokens(grid: Grid) -> int:
    return num_image_tokens(*grid[1:]) if grid[0] == 1 else num_video_tokens(*grid)


def positions(token_ids: np.ndarray, grids: list[Grid], placeholder: int) -> np.ndarray:
    """[3, L] int32: t = h = w for text; frames, rows and columns from a running counter for media."""
    columns: list[tuple[int, int, int]] = []
    remaining = iter(grids)
    counter = index = 0
    while index < len(token_ids):
        if token_ids[index] != placeholder:
            columns.append((counter, counter, counter))
            counter, index = counter + 1, index + 1
            continue
        frames, rows, width = next(remaining)
        extent = (max(1, frames // 2), rows // 2, width // 2)
        columns += [
            (counter + t, counter + h, counter + w)
            for t in range(extent[0])
            for h in range(extent[1])
            for w in range(extent[2])
        ]
        index += extent[0] * extent[1] * extent[2]
        counter += max(extent)
    return np.array(columns, np.int32).T.copy()
