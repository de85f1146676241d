"""What questions are taught to look for: which tokens seek, which show it, and what they bring back."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="training needs torch: OCTET_EXTRAS=compare")
pytest.importorskip("transformers", reason="training needs transformers: OCTET_EXTRAS=compare")

from models.demo_training.collate import collate  # noqa: E402
from models.demo_training.config import demo_model  # noqa: E402
from models.demo_training.encode import Encoder  # noqa: E402
from models.demo_training.feed import make_step  # noqa: E402
from models.demo_training.labels import COLUMNS, NUM_COLUMNS, SEATS, UNKNOWN, patch_labels  # noqa: E402
from models.demo_training.looking import FOUND, found_labels, kind_id, seekers  # noqa: E402
from models.demo_training.regions import Region, describe  # noqa: E402
from models.demo_training.sample import Sample, picture, user  # noqa: E402
from models.demo_training.train import Settings, Trainer  # noqa: E402
from models.demo_training.tutor import looked  # noqa: E402
from tests.checks import assert_close  # noqa: E402

RED_RING, BLUE_RING, RED_STAR = ("ring", "red"), ("ring", "blue"), ("star", "red")
PLACES = [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)]


def scene(*kinds) -> Image.Image:
    """Four quarters of a picture of 2 x 2 tokens, each with one of the kinds."""
    regions = [Region(*kind, x, y, x + 0.5, y + 0.5) for kind, (x, y) in zip(kinds, PLACES, strict=False)]
    return describe(Image.new("RGB", (168, 168)), regions)


def shown_by(*kinds) -> np.ndarray:
    """[4, 8, NUM_COLUMNS] of a picture of four tokens."""
    labels = patch_labels(scene(*kinds), 4, 4).reshape(4, 4, NUM_COLUMNS)
    return np.concatenate([labels, labels], axis=1)


def seeking(kind, shown: np.ndarray):
    """Of one row of four media tokens and one behind them that seeks."""
    sought = np.array([[0, 0, 0, 0, kind_id(kind)]], np.uint16)
    return seekers(sought, np.array([[True] * 4 + [False]]), shown)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (RED_RING, [0]),
        (("ring", None), [0, 1]),
        ((None, "red"), [0, 2]),
        (("ring", "green"), None),
        (("heart", None), None),
    ],
)
def test_tokens_that_show_the_form_and_the_colour_are_wanted(kind, expected):
    found = seeking(kind, shown_by(RED_RING, BLUE_RING, RED_STAR))
    assert [np.flatnonzero(row).tolist() for row in found.wanted] == ([] if expected is None else [expected])


def test_only_the_two_looking_heads_are_judged_and_by_what_is_wanted():
    attention = torch.full((1, 8, 5, 5), 0.0)
    attention[0, :, 4] = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    attention[0, 1, 4] = torch.tensor([0.25, 0.5, 0.25, 0.0, 0.0])
    attention[0, 4, 4] = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.9])
    shares = looked(attention, seeking(("ring", None), shown_by(RED_RING, BLUE_RING)))
    assert_close(shares.numpy(), np.array([[0.75, 0.1]], np.float32), 1e-6, "looked")


def test_what_all_wanted_tokens_have_in_common_is_to_be_found_and_nothing_else():
    shown = shown_by(RED_RING, BLUE_RING, RED_STAR)
    seats = np.full((4, len(SEATS)), 2, np.uint8)
    is_media = np.array([[True] * 4 + [False]])
    (found,) = found_labels(seeking(("ring", None), shown), is_media, shown, seats)
    told = dict(zip([column.name for column in FOUND], found.tolist(), strict=True))
    assert told["which picture"] == 2
    assert told["things of its shape"] == 1, "two, counted from one"
    assert told["colour"] == UNKNOWN and told["things of its kind"] == 0
    assert told["form, left half"] not in (0, UNKNOWN)
    assert told["x of the middle"] == UNKNOWN and told["y of the middle"] != UNKNOWN


def test_the_end_of_a_question_and_the_start_of_its_answer_seek(tokenizer_folder):
    encoder = Encoder(tokenizer_folder)
    prompt = [user(picture(scene(RED_RING)), "Where is the red ring?")]
    plain = encoder.encode(Sample("positions", prompt, "At the top.", lambda _: True, sought=RED_RING))
    seek = np.flatnonzero(plain.sought)
    assert seek.tolist() == [plain.num_prompt - 2, plain.num_prompt - 1, plain.num_prompt]
    assert set(plain.sought[seek]) == {kind_id(RED_RING)}
    thinking = Sample("positions", prompt, "At the top.", lambda _: True, "It is.", sought=RED_RING)
    assert not encoder.encode(thinking).sought.any(), "it looks while it thinks"
    batch = collate([plain])
    is_media = batch.token_ids == demo_model().media.patch
    shown = np.zeros((int(is_media.sum()), 8, NUM_COLUMNS), np.uint8)
    assert len(seekers(batch.sought, is_media, shown).rows) == 0, "nothing is shown, so nobody is taught"


def test_all_columns_that_are_found_are_taught_to_media_tokens_first():
    assert {column.name for column in FOUND} <= {column.name for column in (*COLUMNS, *SEATS)}


def test_steps_teach_the_heads_to_look(tmp_path, tokenizer_folder):
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    settings = Settings(tmp_path, model="mini", samples=99, samples_per_step=6, learning_rate=0.02,
                        warmup_steps=1, only=("places",))  # fmt: skip
    trainer = Trainer(settings)
    losses = []
    keep = trainer.tutor._looking_loss
    trainer.tutor._looking_loss = lambda *a: losses.append(keep(*a)) or losses[-1]  # type: ignore[method-assign]
    batches = make_step(trainer.feed_settings, Encoder(tokenizer_folder), 0)
    for _ in range(12):
        trainer.step(batches)
    first, last = (
        sum(float(x.detach()) for x in part) for part in (losses[: len(batches)], losses[-len(batches) :])
    )
    assert last < 0.8 * first, (first, last)
