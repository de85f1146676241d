"""Which frames of a video are used: the reference server's rules on frame numbers, no pixels."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from api.media.options import FramesSample, MediaOptions


class VideoFacts(NamedTuple):
    """What the container says, or what counting its packets told."""

    num_frames: int
    fps: float
    duration: float  # seconds


def choose_frames(facts: VideoFacts, options: MediaOptions, seed: int = 0) -> list[int]:
    """Ascending frame numbers; repeats are possible when the wanted rate exceeds the video's.

    An explicit target wins; else the rate, if the count it gives lies within the bounds; else the
    bound that it violates becomes the target.
    """
    target = options.video_target_frames
    if target <= 0:
        count = int(facts.duration * options.video_fps)
        if options.video_min_frames <= count <= options.video_max_frames:
            chosen = sample_by_rate(facts, options.video_fps, options.video_frames_sample)
            return chosen[: options.video_max_frames]
        target = min(max(count, options.video_min_frames), options.video_max_frames)
    return sample_by_count(facts.num_frames, target, options.video_frames_sample, seed)


def sample_by_count(num_frames: int, target: int, mode: FramesSample, seed: int = 0) -> list[int]:
    """One frame from each of `target` equal ranges; all frames if there are fewer."""
    target = min(target, num_frames)
    bounds = np.linspace(0, num_frames, target + 1).astype(int).tolist()
    ranges = [(first, after - 1) for first, after in pairwise(bounds)]
    if mode == "leading":
        return [first for first, _ in ranges]
    if mode == "middle":
        return [(first + last) // 2 for first, last in ranges]
    noise = random.Random(seed)
    return [noise.randint(first, last) for first, last in ranges]


def sample_by_rate(facts: VideoFacts, fps: float, mode: FramesSample) -> list[int]:
    """The frames nearest to every 1/fps seconds, rounding half to even; "rand" is as "leading"."""
    step, end = 1 / fps, facts.num_frames / facts.fps
    start = step / 2 if mode == "middle" else 0.0
    chosen = np.round(np.arange(start, end + start, step) * facts.fps).astype(int)
    return chosen[chosen < facts.num_frames].tolist()


def timestamps(indices: list[int], facts: VideoFacts) -> list[float]:
    """Seconds that are drawn onto the frames."""
    return [index * facts.duration / facts.num_frames for index in indices]
