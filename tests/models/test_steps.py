"""What makes a training step: Muon, the bf16 copy that computes, helpers, and what patches teach."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="training needs torch: OCTET_EXTRAS=compare")
pytest.importorskip("transformers", reason="training needs transformers: OCTET_EXTRAS=compare")

from api.media.timestamp import TimestampFont, format_timestamp  # noqa: E402
from models.demo_training import fonts  # noqa: E402
from models.demo_training.checkpoint import Progress, trained_parameters  # noqa: E402
from models.demo_training.collate import collate  # noqa: E402
from models.demo_training.config import mini_model  # noqa: E402
from models.demo_training.encode import Encoder  # noqa: E402
from models.demo_training.feed import make_step  # noqa: E402
from models.demo_training.forward import Normaliser, answer_losses, to_device  # noqa: E402
from models.demo_training.helper import Board  # noqa: E402
from models.demo_training.labels import (  # noqa: E402
    COLUMNS,
    NUM_COLUMNS,
    UNKNOWN,
    letter_labels,
    patch_labels,
    seat_labels,
)
from models.demo_training.low_precision import LowPrecision  # noqa: E402
from models.demo_training.model import build_model  # noqa: E402
from models.demo_training.optimizer import MuonAdam, orthogonal  # noqa: E402
from models.demo_training.regions import Region, describe, stamp_regions  # noqa: E402
from models.demo_training.skills.reading import letter_regions, render_text  # noqa: E402
from models.demo_training.train import Settings, Trainer  # noqa: E402
from models.demo_training.tutor import HEADS  # noqa: E402
from models.demo_training.whitening import whitening  # noqa: E402
from tests.checks import assert_close, assert_same_bits  # noqa: E402
from tests.models.builders import draw, pictures_of  # noqa: E402

pytestmark = pytest.mark.compare
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
PYTHON_HERE = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 16, 40), (2, 40, 16)])
def test_the_orthogonal_matrix_keeps_directions_and_evens_out_their_sizes(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, sizes, right = torch.linalg.svd(matrices, full_matrices=False)
    evened = left.mT @ orthogonal(matrices) @ right.mT
    found = evened.diagonal(dim1=1, dim2=2)
    big = sizes / sizes.amax(-1, keepdim=True) > 0.2
    assert ((found > 0.6) & (found < 1.25))[big].all(), f"{found[big].min()} .. {found[big].max()}"
    assert_close((evened - torch.diag_embed(found)).numpy(), np.zeros(evened.shape), 0.06, "mixed directions")


def test_a_step_of_the_optimizer_goes_downhill_for_every_kind_of_parameter():
    """On a bowl: each parameter's loss is its squared distance from ones."""
    parameters = {
        "mlp.weight": torch.nn.Parameter(torch.zeros(8, 6)),
        "experts.down_proj": torch.nn.Parameter(torch.zeros(2, 6, 4)),
        "attn.qkv.weight": torch.nn.Parameter(torch.zeros(12, 4)),
        "embed_tokens.weight": torch.nn.Parameter(torch.zeros(5, 4)),
        "norm.weight": torch.nn.Parameter(torch.zeros(4)),
    }
    optimizer = MuonAdam(parameters, rate=0.1)
    before = dict.fromkeys(parameters, 1.0)
    for _ in range(5):
        sum((p - 1).square().sum() for p in parameters.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        distances = {name: float((p.detach() - 1).square().mean()) for name, p in parameters.items()}
        assert all(distances[name] < before[name] for name in parameters), (before, distances)
        before = distances


def test_gradients_of_the_bf16_copy_are_those_of_the_model_to_rounding(tokenizer_folder):
    model, normalise = build_model(mini_model(), seed=3), Normaliser(CPU)
    batch = to_device(collate([Encoder(tokenizer_folder).encode(draw("shapes", i)) for i in range(4)]), CPU)
    computing = LowPrecision(model, torch.bfloat16)
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(1.5)  # the copy must follow
    computing.refresh()
    answer_losses(computing.copy, normalise, batch)[0].mean().backward()
    computing.collect()
    rounded = {name: p.grad for name, p in trained_parameters(model).items() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    answer_losses(model, normalise, batch)[0].mean().backward()
    for name in ("model.language_model.embed_tokens.weight", "model.vision_tower.blocks.0.attn.qkv.weight"):
        exact = dict(model.named_parameters())[name].grad
        alike = torch.nn.functional.cosine_similarity(exact.flatten(), rounded[name].flatten(), dim=0)
        assert alike > 0.98, f"{name}: {alike}"
    assert all(copied.grad is None for copied in computing.copy.parameters())


def test_a_helper_sees_the_trainers_weights_and_its_gradient_weighs_by_its_answers(tmp_path):
    mine, theirs = ([torch.nn.Parameter(torch.full((2, 3), v)), torch.nn.Parameter(torch.full((4,), v))]
                    for v in (1.0, 2.0))  # fmt: skip
    trainer = Board(tmp_path / "board", mine, create=True)
    helper = Board(tmp_path / "board", theirs)
    trainer.publish(Progress(seed=0, step=7, samples=99, seconds=1.5))
    progress = Progress(seed=0)
    helper.adopt(progress)
    assert (progress.step, progress.samples, progress.seconds) == (7, 99, 1.5)
    for own, copied in zip(mine, theirs, strict=True):
        assert_same_bits(copied.detach().numpy(), own.detach().numpy(), "weights")
        own.grad, copied.grad = torch.full_like(own, 4.0), torch.full_like(own, 8.0)
    assert trainer.add_to(10) == 10, "nothing is offered yet"
    helper.offer(30)
    assert trainer.add_to(10) == 40
    assert_close(mine[1].grad.numpy(), np.full(4, 7.0, np.float32), 1e-6, "a quarter of 4, three of 8")
    assert trainer.add_to(10) == 10, "an offer is taken once"


def told(labels: np.ndarray, column: str) -> np.ndarray:
    """[R] of the labels [R, NUM_COLUMNS]."""
    return labels[:, [c.name for c in COLUMNS].index(column)]


def test_patches_are_told_what_covers_them_in_the_order_of_the_windows():
    image = describe(Image.new("RGB", (84, 56)), [Region("star", "red", 0.5, 0.0, 0.8, 0.5)])
    labels = patch_labels(image, rows=4, columns=6)
    covered = np.flatnonzero(told(labels, "colour"))
    assert covered.tolist() == [5, 7, 8, 10], "row 0 and 1 of columns 3 and 4, windows of 2 x 2 together"
    for column in ("form, left half", "form, right half"):
        assert np.flatnonzero(told(labels, column)).tolist() == covered.tolist(), column
    assert set(told(labels, "x of the middle")[covered]) == {7}, "0.65 of twelve"
    assert (np.delete(told(labels, "x of the middle"), covered) == UNKNOWN).all()
    assert (patch_labels(Image.new("RGB", (84, 56)), 4, 6) == UNKNOWN).all()


def test_a_patch_of_two_letters_is_told_both_and_their_places_in_the_word():
    halves = [Region("n", None, 0.25, 0.0, 0.375, 0.25, 0), Region("o", None, 0.375, 0.0, 0.5, 0.25, 1)]
    image = describe(Image.new("RGB", (56, 56)), halves)
    patch = patch_labels(image, rows=4, columns=4)[1]
    left, right = patch[:2]
    assert left not in (0, UNKNOWN) and right not in (0, UNKNOWN, left)
    assert patch[3:5].tolist() == [0, 1]


def test_things_are_told_how_many_share_their_shape_colour_and_both():
    boxes = [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5)]
    kinds = [("star", "red"), ("star", "red"), ("star", "blue")]
    regions = [Region(*kind, x, y, x + 0.5, y + 0.5) for kind, (x, y) in zip(kinds, boxes, strict=True)]
    labels = patch_labels(describe(Image.new("RGB", (56, 56)), regions), rows=4, columns=4)
    names = ("things of its shape", "things of its colour", "things of its kind", "things")
    counts = np.stack([told(labels, name) for name in names], axis=1)
    assert counts[[0, 4, 8]].tolist() == [[2, 1, 1, 2], [2, 1, 1, 2], [2, 0, 0, 2]], "one less than the count"
    middles = np.flatnonzero(told(labels, "whether its middle") == 1)
    assert middles.tolist() == [3, 7, 11], "the last patch of each window"
    assert told(labels, "number within its kind")[middles].tolist() == [0, 1, 0]
    assert told(labels, "number")[middles].tolist() == [0, 1, 2], "in reading order"
    assert told(labels, "number from the left")[middles].tolist() == [0, 2, 0], (
        "things above each other share it"
    )


def test_a_moving_thing_is_told_its_way_in_every_frame_worn_or_clean():
    column = [c.name for c in COLUMNS].index("motion")
    for index in range(6):
        (clip,) = draw("motion", index).media
        ways = {m for f in clip.frames for m in patch_labels(f, 4, 4)[:, column]} - {UNKNOWN}
        assert len(ways) == 1, ways
        assert COLUMNS[column].known_to == "resampler", "it takes two frames"


def test_a_thing_that_flashes_is_told_which_flash_it_is():
    for index in range(6):
        sample = draw("flashes", index)
        (clip,) = sample.media
        turns = [set(told(patch_labels(f, 4, 4), "turn").tolist()) - {UNKNOWN} for f in clip.frames]
        seen = [turn for of_frame in turns for turn in of_frame]
        assert all(len(of_frame) < 2 for of_frame in turns) and seen == sorted(seen)
        assert sample.checker(str(len(set(seen)))), f"{index}: {turns}"


def test_the_digits_of_the_time_are_told_where_the_server_writes_them():
    written, em = format_timestamp(73.5), 16
    font = TimestampFont()._sized(em)
    *_, before_last, last = stamp_regions((168, 10 * em), written)
    assert (before_last.form, last.form, last.order) == ("5", "0", 3)
    edges = np.array([font.getlength(written[:-1]), font.getlength(written)])
    assert_close(np.array([last.left, last.right]) * 168, edges, 2.0, "pixels")
    assert [r.form for r in stamp_regions((84, 84), written)] == [None], "too small to read, so not told"


def test_tokens_are_told_which_picture_of_their_sample_they_belong_to_and_where_they_are():
    grids = np.array([(1, 4, 4), (1, 4, 8), (4, 4, 4)])
    shown = np.full((4 + 8 + 8, 8, NUM_COLUMNS), UNKNOWN, np.uint8)
    x, y, picture, pair, thing_x, *_ = seat_labels(grids, np.array([12, 0, 8]), shown).T
    assert picture.tolist() == [0] * 4 + [1] * 8 + [0] * 8, "the clip is its own sample's first"
    assert pair.tolist() == [UNKNOWN] * 12 + [0] * 4 + [1] * 4
    assert x[4:8].tolist() == [1, 4, 7, 10] and y[4:12].tolist() == [3] * 4 + [9] * 4
    assert (thing_x == UNKNOWN).all()


@pytest.mark.parametrize("degrees", [0.0, 7.0, -7.0])
def test_letters_are_told_where_their_ink_is(degrees):
    """Every box holds ink, and there is none that no box covers."""
    word, face = "Will", fonts.FACES[0]
    stamp = render_text(word, face, 40, (0, 0, 0), degrees)
    regions = letter_regions(word, stamp, (10, 20), (200, 100))
    assert [(r.form, r.order) for r in regions] == list(zip(word, range(4), strict=True))
    ink = np.asarray(stamp)[..., 3]
    for region in regions:
        left, right = region.left * 200 - 10, region.right * 200 - 10
        top, bottom = region.top * 100 - 20, region.bottom * 100 - 20
        inside = ink[max(0, round(top)) : round(bottom), max(0, round(left)) : round(right)]
        assert inside.max() > 200, region
    outside = ink.copy()
    for region in regions:
        columns = slice(max(0, round(region.left * 200 - 12)), round(region.right * 200 - 8))
        outside[max(0, round(region.top * 100 - 22)) : round(region.bottom * 100 - 18), columns] = 0
    assert outside.max() < 60, "ink that no box covers"


def test_a_token_is_told_its_letters_by_their_places_in_the_word():
    """A token of four letters, the second to the fifth of a word, beside one that shows a thing."""
    image = describe(Image.new("RGB", (56, 28)), [
        *(Region(c, None, 0.125 * i, 0.0, 0.125 * (i + 1), 1.0, 1 + i) for i, c in enumerate("tory")),
        Region("star", "red", 0.5, 0.0, 1.0, 1.0),
    ])  # fmt: skip
    patches = patch_labels(image, rows=2, columns=4)
    forms = {c: told(patches, "form, left half" if i % 2 == 0 else "form, right half")[i // 2]
             for i, c in enumerate("tory")}  # fmt: skip
    shown = np.concatenate([patches.reshape(2, 4, -1)] * 2, axis=1)
    letters, thing = letter_labels(shown)
    assert letters.tolist() == [1, forms["r"], forms["t"], forms["o"]], "y would have the place of t"
    assert (thing == UNKNOWN).all()


def test_every_drawn_picture_says_what_it_shows():
    for skill in ("shapes", "counts", "positions", "sizes", "digits", "words", "pictures"):
        for index in range(5):
            assert all(p.info.get("regions") is not None for p in pictures_of(draw(skill, index))), skill


def test_evened_out_components_are_all_equally_loud():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4000, 12, generator=generator) * torch.linspace(30, 1, 12)
    outputs = pixels @ whitening(pixels, 6).T
    assert_close(outputs.square().mean(0).numpy(), np.ones(6, np.float32), 0.05, "second moments")


def test_the_seeing_stage_lowers_its_loss_and_leaves_the_decoder_alone(tmp_path, tokenizer_folder):
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    settings = Settings(tmp_path, model="mini", samples=99, samples_per_step=8, learning_rate=0.02,
                        warmup_steps=1, stage="seeing", report_every=1e9)  # fmt: skip
    trainer = Trainer(settings)
    decoder = trainer.model.model.language_model.layers[0].self_attn.q_proj.weight.detach().clone()
    batches, losses = make_step(trainer.feed_settings, Encoder(tokenizer_folder), 0), []
    trainer.reporter.add_seeing = lambda loss: losses.append(float(loss.detach()))  # type: ignore[method-assign]
    for _ in range(8):
        trainer.step(batches)
    assert losses[-1] < 0.8 * losses[0], losses
    after = trainer.model.model.language_model.layers[0].self_attn.q_proj.weight
    assert_same_bits(after.detach().numpy(), decoder.numpy(), "query weights")
    assert trainer.tutor.scores()["colour"] > 0


def test_a_step_of_the_whole_also_teaches_where_tokens_are(tmp_path, tokenizer_folder):
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    settings = Settings(tmp_path, model="mini", samples=99, samples_per_step=4, learning_rate=0.02,
                        warmup_steps=1, only=("pictures",))  # fmt: skip
    trainer = Trainer(settings)
    batches = make_step(trainer.feed_settings, Encoder(tokenizer_folder), 0)
    shares = []
    for _ in range(10):
        trainer.step(batches)
        shares.append(trainer.tutor.scores()["which picture"])
    assert shares[-1] > max(0.5, shares[0]), shares


def test_new_heads_learn_first_and_the_model_waits_for_them(tmp_path, tokenizer_folder):
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    settings = Settings(tmp_path, model="mini", samples=99, samples_per_step=4, warmup_steps=1, heads_first=2,
                        only=("pictures",))  # fmt: skip
    trainer = Trainer(settings)
    batches = make_step(trainer.feed_settings, Encoder(tokenizer_folder), 0)
    moved = []
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in trained_parameters(trainer.model).items()}
        trainer.step(batches)
        after = trained_parameters(trainer.model)
        moved.append({name for name, weight in before.items() if not torch.equal(weight, after[name])})
    heads = {name for name in after if name.split(".")[0] in HEADS}
    assert moved[0] and moved[0] <= heads and moved[1] <= heads, moved[0] - heads
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in moved[2]


def test_a_helper_whose_trainer_is_gone_ends(tmp_path, tokenizer_folder):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer").symlink_to(tokenizer_folder)
    (tmp_path / "board").mkdir()
    Board(tmp_path / "board" / "0", build_model(mini_model(), seed=0).parameters(), create=True)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-m", "models.demo_training.helper", str(tmp_path / "board" / "0"), "0"]
    options = ["--out", str(tmp_path / "run"), "--model", "mini", "--samples", "9"]
    subprocess.run([*command, str(gone.pid), *options], cwd=ROOT, env=PYTHON_HERE, check=True, timeout=120)
    assert not (tmp_path / "board").exists(), "a helper clears up what its trainer could not"
