"""Draws the samples of the chat page: pictures, a clip and a first question for each.

    python -m models.page_samples [OUT]             api/static/samples, unless another folder is named
    python -m models.page_samples --find URL        asks a running server which variations it answers right

Made with the drawing of models/demo_training, at sizes its generators draw, but clean and in one format so
that they make a calm row of cards. Needs the extra `demo` for its typefaces. `samples.json` lists what
the page offers; the answers in it are the truth, for tests. CHOSEN are variations that the demo model answers
right, at bf16 on one rank and at wint4 on eight: with another model, look for others.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import random
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from models.demo_training import drawing, fonts
from models.demo_training.checkers import mentions, normalise, numbers_in
from models.demo_training.names import COLOURS, DIRECTIONS, SHAPES, a_thing, join, sentence
from models.demo_training.sample import Clip, rng_for
from models.demo_training.scene import Scene, Thing, compatible_colours, place_things
from models.demo_training.skills.reading import render_text
from models.demo_training.wire import data_url, encode_clip

FOLDER = Path(__file__).resolve().parent.parent / "api" / "static" / "samples"

# Multiples of the 28 pixels of a token, so the server resizes nothing.
WIDE = (252, 168)
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


def count(rng: random.Random) -> PageSample:
    shape, number, kinds = _things_to_count(rng)
    things = SHAPES[shape].say("en", 2)
    answer = f"There are {number} {things}."
    return PageSample(
        f"How many {things} are there?", answer, _one_scene(rng, "count.png", kinds, (0.12, 0.2))
    )


def count_in_chinese(rng: random.Random) -> PageSample:
    shape, number, kinds = _things_to_count(rng)
    name = SHAPES[shape].zh
    answer = f"有{number}个{name}。"
    return PageSample(f"图中有几个{name}？", answer, _one_scene(rng, "zh.png", kinds, (0.12, 0.2)))


def contents(rng: random.Random) -> PageSample:
    kinds = _kinds(rng, rng.choice((2, 3)))
    answer = sentence(join([a_thing(*kind, "en") for kind in kinds], "en"), "en")
    return PageSample("What is in the picture?", answer, _one_scene(rng, "shapes.png", kinds, (0.2, 0.27)))


def colour(rng: random.Random) -> PageSample:
    ((shape, name),) = _kinds(rng, 1)
    answer = f"{name.capitalize()}."
    files = _one_scene(rng, "colour.png", [(shape, name)], (0.28, 0.33))
    return PageSample(f"What colour is the {shape}?", answer, files)


def number(rng: random.Random) -> PageSample:
    """A number in large slanted digits."""
    digits = str(rng.randint(1, 9999))
    image = Image.new("RGB", WIDE, drawing.BACKGROUNDS[7])
    face = fonts.Face("fontpkg_roboto_slab", "RobotoSlab[wght].ttf", "Bold")
    stamp = render_text(digits, face, 64, drawing.RGB["blue"], rng.choice((-4.0, 0.0, 5.0)))
    image.paste(stamp, ((WIDE[0] - stamp.width) // 2, (WIDE[1] - stamp.height) // 2), stamp)
    return PageSample("What number is written here?", digits, {"number.png": _png(image)})


def which(rng: random.Random) -> PageSample:
    first, second = _kinds(rng, 2)
    wanted, place = rng.choice(((first, 1), (second, 2)))
    files = {
        name: _scene_png(rng, TALL, [kind], (0.28, 0.36))
        for name, kind in (("first.png", first), ("second.png", second))
    }
    return PageSample(f"Which picture shows {a_thing(*wanted, 'en')}?", f"Picture {place}.", files)


def motion(rng: random.Random) -> PageSample:
    """A thing that crosses the frame in two seconds, below the place of the server's time stamp."""
    ((shape, colour),) = _kinds(rng, 1)
    way = rng.choice(((1, 0), (-1, 0)))
    frames = []
    for index in range(12):
        share = index / 11 if way[0] > 0 else 1 - index / 11
        there = Thing(shape, colour, 0.16 + 0.68 * share, 0.56, 0.21)
        frames.append(Scene(FRAME, (there,)).render(random.Random(LOOK), worn=False))
    answer = f"It moves to the {DIRECTIONS[way].en}."
    files = {"motion.mp4": encode_clip(Clip(tuple(frames), 5.0))}
    return PageSample(f"Which way does the {shape} move?", answer, files)


FAMILIES: dict[str, Callable[[random.Random], PageSample]] = {
    "count": count,
    "contents": contents,
    "colour": colour,
    "number": number,
    "which": which,
    "motion": motion,
    "count_in_chinese": count_in_chinese,
}

# Family and variation of every card, in the page's order.
CHOSEN = (
    ("count", 0),
    ("contents", 3),
    ("which", 6),
    ("motion", 3),
    ("count_in_chinese", 2),
    ("number", 0),
)


def page_sample(family: str, variation: int) -> PageSample:
    return FAMILIES[family](rng_for("evaluation", 0, f"page/{family}", variation))


def chosen_samples() -> list[PageSample]:
    """The cards, each with its number before the names of its files."""
    samples = [page_sample(*chosen) for chosen in CHOSEN]
    return [
        dataclasses.replace(sample, files={f"{i}-{name}": data for name, data in sample.files.items()})
        for i, sample in enumerate(samples, 1)
    ]


def agrees(answer: str, truth: str) -> bool:
    """Whether an answer says what the truth says: its numbers, else its things, colours and ways."""
    if normalise(answer) == normalise(truth):
        return True
    if numbers_in(truth):
        is_about_it = set(mentions(answer, SHAPES)) <= set(mentions(truth, SHAPES))
        return is_about_it and numbers_in(answer) == numbers_in(truth)
    told = [(mentions(truth, names), mentions(answer, names)) for names in (SHAPES, COLOURS, DIRECTIONS)]
    is_complete = all(sorted(map(str, true)) == sorted(map(str, said)) for true, said in told if true)
    return is_complete and any(true for true, _ in told)


def find(url: str, variations: int) -> None:
    """Print, family by family, the variations that the server answers right."""
    for family in FAMILIES:
        right = []
        for variation in range(variations):
            sample = page_sample(family, variation)
            if agrees(ask(url, sample), sample.answer):
                right.append(variation)
        print(f"{family:18s} {len(right)}/{variations}  {right}")


def ask(url: str, sample: PageSample) -> str:
    """What a server answers to a card, asked as the page asks."""
    media: list[dict[str, Any]] = []
    for name, data in sample.files.items():
        kind, mime = ("video_url", "video/mp4") if name.endswith(".mp4") else ("image_url", "image/png")
        media.append({"type": kind, kind: {"url": data_url(mime, data)}})
    content = [*media, {"type": "text", "text": sample.question}]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 60}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(json.load(response)["choices"][0]["message"]["content"] or "")


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    listed = []
    for sample in chosen_samples():
        for name, data in sample.files.items():
            (folder / name).write_bytes(data)
        listed.append({"question": sample.question, "answer": sample.answer, "files": list(sample.files)})
    (folder / "samples.json").write_text(json.dumps(listed, ensure_ascii=False, indent=1) + "\n")


def _kinds(rng: random.Random, number: int) -> list[Kind]:
    """Different shapes in different colours that show on one background."""
    colours = compatible_colours(rng)
    return list(zip(rng.sample(list(SHAPES), number), rng.sample(colours, number), strict=True))


def _things_to_count(rng: random.Random) -> tuple[str, int, list[Kind]]:
    """A shape, how many there are of it, and all things of the picture."""
    (shape, colour), *others = _kinds(rng, rng.choice((2, 3)))
    number = rng.randint(2, 6)
    return shape, number, [(shape, colour)] * number + others


def _one_scene(
    rng: random.Random, name: str, kinds: list[Kind], radii: tuple[float, float]
) -> dict[str, bytes]:
    return {name: _scene_png(rng, WIDE, kinds, radii)}


def _scene_png(
    rng: random.Random, size: tuple[int, int], kinds: list[Kind], radii: tuple[float, float]
) -> bytes:
    return _png(Scene(size, place_things(rng, kinds, size, radii)).render(rng, worn=False))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the samples of the chat page.")
    parser.add_argument("out", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--find", metavar="URL", help="a running server to ask instead")
    parser.add_argument("--variations", type=int, default=20, help="of each family, for --find")
    options = parser.parse_args()
    if options.find:
        find(options.find.rstrip("/"), options.variations)
    else:
        write(options.out)


if __name__ == "__main__":
    main()
