"""Draws the samples of the chat page: pictures, a clip and a first question for each.

    python -m models.page_samples [OUT]        api/static/samples, unless another folder is named

Made with the drawing of models/demo_training, at sizes its generators draw, but clean and in one format so
that they make a calm row of cards. Needs the extra `demo` for its typefaces. `samples.json` lists what
the page offers; the answers in it are the truth, for tests.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from models.demo_training import drawing, fonts
from models.demo_training.names import DIRECTIONS
from models.demo_training.sample import Clip, rng_for
from models.demo_training.scene import Scene, Thing, place_things
from models.demo_training.skills.reading import render_text
from models.demo_training.wire import encode_clip

FOLDER = Path(__file__).resolve().parent.parent / "api" / "static" / "samples"

# Multiples of the 28 pixels of a token, so the server resizes nothing.
WIDE = (280, 196)
TALL = (112, 140)  # two of them stand side by side
FRAME = (168, 112)
LOOK = 16  # draws a dark background, plain

Kind = tuple[str, str]  # shape, colour


@dataclass(frozen=True)
class PageSample:
    """`files` by name, in prompt order."""

    question: str
    answer: str
    files: dict[str, bytes]


def scene_png(
    size: tuple[int, int], kinds: list[Kind], radii: tuple[float, float], arrangement: int
) -> bytes:
    """One of the many arrangements of these things, chosen by eye."""
    rng = rng_for("evaluation", 0, "page", arrangement)
    return _png(Scene(size, place_things(rng, kinds, size, radii)).render(rng, worn=False))


def number_png(number: str) -> bytes:
    """A number in large slanted digits."""
    image = Image.new("RGB", WIDE, drawing.BACKGROUNDS[7])
    face = fonts.Face("fontpkg_roboto_slab", "RobotoSlab[wght].ttf", "Bold")
    stamp = render_text(number, face, 76, drawing.RGB["blue"], 5.0)
    image.paste(stamp, ((WIDE[0] - stamp.width) // 2, (WIDE[1] - stamp.height) // 2), stamp)
    return _png(image)


def motion_mp4(shape: str, colour: str, step: tuple[int, int]) -> bytes:
    """A thing that crosses the frame in two seconds, below the place of the server's time stamp."""
    assert step in DIRECTIONS and step[1] == 0, "it moves to the left or to the right"
    frames = []
    for index in range(12):
        share = index / 11 if step[0] > 0 else 1 - index / 11
        there = Thing(shape, colour, 0.16 + 0.68 * share, 0.56, 0.21)
        frames.append(Scene(FRAME, (there,)).render(random.Random(LOOK), worn=False))
    return encode_clip(Clip(tuple(frames), 5.0))


def page_samples() -> list[PageSample]:
    stars = [("star", "blue")] * 5 + [("circle", "orange"), ("square", "green")]
    mixed = [("heart", "red"), ("ring", "purple"), ("triangle", "yellow")]
    triangles = [("triangle", "purple")] * 4 + [("cross", "orange"), ("circle", "pink")]
    return [
        PageSample(
            "How many stars are there?",
            "There are 5 stars.",
            {"stars.png": scene_png(WIDE, stars, (0.12, 0.19), 6)},
        ),
        PageSample(
            "What is in the picture?",
            "A purple ring, a red heart and a yellow triangle.",
            {"shapes.png": scene_png(WIDE, mixed, (0.22, 0.27), 6)},
        ),
        PageSample("What number is written here?", "4072", {"number.png": number_png("4072")}),
        PageSample(
            "Which picture shows a green diamond?",
            "Picture 2.",
            {
                "first.png": scene_png(TALL, [("heart", "pink")], (0.28, 0.31), 5),
                "second.png": scene_png(TALL, [("diamond", "green")], (0.34, 0.37), 7),
            },
        ),
        PageSample(
            "Which way does the star move?",
            "It moves to the right.",
            {"motion.mp4": motion_mp4("star", "yellow", (1, 0))},
        ),
        PageSample(
            "图中有几个三角形？",
            "有4个三角形。",
            {"triangles.png": scene_png(WIDE, triangles, (0.15, 0.2), 2)},
        ),
    ]


def write(folder: Path, samples: list[PageSample]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for sample in samples:
        for name, data in sample.files.items():
            (folder / name).write_bytes(data)
        listed.append({"question": sample.question, "answer": sample.answer, "files": list(sample.files)})
    (folder / "samples.json").write_text(json.dumps(listed, ensure_ascii=False, indent=1) + "\n")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the samples of the chat page.")
    parser.add_argument("out", nargs="?", type=Path, default=FOLDER)
    write(parser.parse_args().out, page_samples())


if __name__ == "__main__":
    main()
