"""What a sample says is in its pictures: measured on the pixels, without the generator's own record."""

from __future__ import annotations

import re

import numpy as np
import pytest

from models.demo_training.names import COLOURS, DIRECTIONS
from models.demo_training.sample import Clip, rng_for
from models.demo_training.scene import Scene, random_scene
from models.demo_training.skills import video
from models.demo_training.skills.counting import counting_exercise
from models.demo_training.skills.reading import random_number, text_picture
from tests.models.builders import colour_map, count_things, draw, question_of, thing_pixels


def test_a_picture_shows_as_many_things_of_each_colour_as_the_scene_says():
    for index in range(12):
        rng = rng_for("training", 7, "pixels", index)
        scene = random_scene(rng, 1 + index % 4, may_be_large=False)
        measured = count_things(scene.render(rng, worn=False))
        expected = {c: len(scene.of(colour=c)) for c in COLOURS if scene.of(colour=c)}
        assert dict(measured) == expected, f"scene {index}"


def test_the_counted_number_is_that_of_the_things_asked_for():
    for index in range(25):
        rng = rng_for("training", 8, "pixels", index)
        exercise, scene = counting_exercise(rng, "en")
        answer = int(re.search(r"\d+", exercise.answer).group())
        colour = next((c for c in COLOURS if c in exercise.question), None)
        by_shape = re.search(r"circle|square|triangle|star|diamond|cross|heart|ring", exercise.question)
        shape = by_shape.group() if by_shape else None
        assert answer == len(scene.of(shape, colour)), f"{index}: {exercise.question}"
        if shape is None:
            measured = count_things(scene.render(rng, worn=False))
            assert answer == (measured[colour] if colour else sum(measured.values())), f"{index}"


def test_all_counts_from_one_to_nine_are_asked():
    answers = {counting_exercise(rng_for("training", 9, "c", i), "en")[0].answer for i in range(250)}
    assert set("123456789") <= {re.search(r"\d+", a).group() for a in answers}


def test_things_do_not_touch():
    for index in range(30):
        rng = rng_for("training", 10, "pixels", index)
        _, scene = counting_exercise(rng, "en")
        for a, b in _pairs(scene):
            width, height = scene.size
            gap = np.hypot((a.x - b.x) * width, (a.y - b.y) * height) - (a.radius + b.radius) * min(
                scene.size
            )
            assert gap >= 3, f"scene {index}: {a} and {b} are {gap:.1f} pixels apart"


def _pairs(scene: Scene):
    return [(a, b) for i, a in enumerate(scene.things) for b in scene.things[i + 1 :]]


def test_text_lies_inside_its_picture_and_can_be_seen():
    for index in range(30):
        rng = rng_for("training", 11, "text", index)
        number = random_number(rng)
        image = text_picture(rng, number, with_shape=0.0)
        ink = thing_pixels(image)
        height, width = np.ptp(ink, axis=0) + 1
        assert height >= 6, f"{index}: {number} is {height} pixels high"
        assert width >= 3 * len(number), f"{index}: {number} is {width} pixels wide"


@pytest.mark.parametrize("index", range(12))
def test_motion_is_what_the_middle_of_the_thing_does(index):
    sample = draw("motion", index)
    (clip,) = sample.media
    first, last = (thing_pixels(clip.frames[i]).mean(axis=0) for i in (0, -1))
    moved = last - first
    if sample.checker("It does not move."):
        assert np.abs(moved).max() < 2
        return
    step = next(step for step, name in DIRECTIONS.items() if sample.checker(f"It moves {name.en}."))
    along, across = (moved[1], moved[0]) if step[0] else (moved[0], moved[1])
    assert along * sum(step) > 8 and abs(across) < 4, f"{sample.answer}: moved {moved}"


@pytest.mark.parametrize("index", range(12))
def test_flashes_are_runs_of_frames_with_something_in_them(index):
    sample = draw("flashes", index)
    (clip,) = sample.media
    shown = [len(thing_pixels(frame)) > 30 for frame in clip.frames]
    rising = sum(now and not before for before, now in zip([False, *shown], shown, strict=False))
    assert sample.checker(str(rising)), f"{sample.answer}: {shown}"


@pytest.mark.parametrize("index", range(8))
def test_colours_follow_each_other_as_the_answer_says(index):
    rng = rng_for("training", 12, "colours", index)
    sample = video.sample_colour_order(rng)
    (clip,) = sample.media
    seen = [_main_colour(frame) for frame in clip.frames]
    order = [c for i, c in enumerate(seen) if c and (i == 0 or c != seen[i - 1])]
    if None not in seen:  # worn frames may hide the palette
        assert sample.checker(", then ".join(order)), f"{sample.answer}: {seen}"


def _main_colour(frame) -> str | None:
    colours, names = colour_map(frame)
    spots = np.bincount(colours[colours >= 0], minlength=len(names))
    return names[spots.argmax()] if spots.max() > 60 else None


@pytest.mark.parametrize("index", range(12))
def test_the_moment_is_the_time_of_the_first_changed_frame(index):
    sample = draw("moment", index)
    (clip,) = sample.media
    if not any(word in question_of(sample) for word in ("appear", "出现", "消失")):
        return
    shown = [len(thing_pixels(frame)) > 30 for frame in clip.frames]
    change = next(i for i in range(1, len(shown)) if shown[i] != shown[i - 1])
    assert sample.checker(f"At {change / clip.fps:g} seconds."), f"{sample.answer}: {shown}"


def test_two_pictures_that_differ_do_so_in_one_thing():
    for index in range(200):
        sample = draw("pictures", index)
        if "became" in sample.answer and not sample.thinks:
            assert len(sample.media) == 2
            old, new = sample.answer.removeprefix("The ").removesuffix(".").split(" became ")
            same = [a == b for a, b in zip(old.split(), new.split()[1:], strict=True)]
            assert same in ([True, False], [False, True])


def test_frames_of_a_clip_are_of_one_size():
    for skill in ("motion", "flashes", "colour_order", "moment"):
        for index in range(10):
            (clip,) = draw(skill, index).media
            assert isinstance(clip, Clip) and len(clip.frames) >= 3
            assert len({frame.size for frame in clip.frames}) == 1


def test_moments_can_be_told_with_two_decimals():
    for index in range(40):
        (clip,) = draw("moment", index).media
        assert 100 % clip.fps == 0, f"{index}: {clip.fps} frames per second"
