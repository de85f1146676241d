"""What makes a training step: Muon, the bf16 copy that computes, helpers, and what patches teach."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="training needs torch: OCTET_EXTRAS=compare")
pytest.importorskip("transformers", reason="training needs transformers: OCTET_EXTRAS=compare")

from models.demo_training import teach_tower  # noqa: E402
from models.demo_training.checkpoint import Progress, trained_parameters  # noqa: E402
from models.demo_training.collate import collate  # noqa: E402
from models.demo_training.config import mini_model  # noqa: E402
from models.demo_training.encode import Encoder  # noqa: E402
from models.demo_training.forward import Normaliser, answer_losses, to_device  # noqa: E402
from models.demo_training.helper import Board  # noqa: E402
from models.demo_training.low_precision import LowPrecision  # noqa: E402
from models.demo_training.model import build_model  # noqa: E402
from models.demo_training.optimizer import MuonAdam, orthogonal  # noqa: E402
from models.demo_training.regions import UNKNOWN, Region, describe, patch_labels  # noqa: E402
from models.demo_training.skills.reading import letter_regions  # noqa: E402
from models.demo_training.train import Settings, Trainer  # noqa: E402
from models.demo_training.whitening import whitening  # noqa: E402
from tests.checks import assert_close, assert_same_bits  # noqa: E402
from tests.models.builders import draw, pictures_of  # noqa: E402

pytestmark = pytest.mark.compare
CPU = torch.device("cpu")


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


def test_patches_are_told_what_covers_them_in_the_order_of_the_windows():
    image = describe(Image.new("RGB", (84, 56)), [Region("star", "red", 0.5, 0.0, 0.8, 0.5)])
    forms, colours = patch_labels(image, rows=4, columns=6).T
    covered = np.flatnonzero(forms)
    assert covered.tolist() == [5, 7, 8, 10], "row 0 and 1 of columns 3 and 4, windows of 2 x 2 together"
    assert len(set(forms[covered])) == len(set(colours[covered])) == 1
    assert (patch_labels(Image.new("RGB", (84, 56)), 4, 6) == UNKNOWN).all()


def test_letters_lie_side_by_side_across_the_text():
    regions = letter_regions("Will", (10, 20), (40, 14), (100, 56))
    assert [r.form for r in regions] == list("Will")
    assert (regions[0].left, regions[-1].right) == (0.1, 0.5)
    assert all(a.right == b.left for a, b in pairwise(regions))
    assert regions[0].right - regions[0].left > 2 * (regions[1].right - regions[1].left)


def test_every_drawn_picture_says_what_it_shows():
    for skill in ("shapes", "counts", "positions", "sizes", "digits", "words", "pictures"):
        for index in range(5):
            assert all(p.info.get("regions") is not None for p in pictures_of(draw(skill, index))), skill


def test_evened_out_components_are_all_equally_loud():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4000, 12, generator=generator) * torch.linspace(30, 1, 12)
    outputs = pixels @ whitening(pixels, 6).T
    assert_close(outputs.square().mean(0).numpy(), np.ones(6, np.float32), 0.05, "second moments")


def test_teaching_the_tower_lowers_its_loss_and_leaves_the_decoder_alone(tmp_path, tokenizer_folder):
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    trainer = Trainer(Settings(tmp_path, model="mini", samples=1, learning_rate=0.02))
    decoder = trainer.model.model.language_model.layers[0].self_attn.q_proj.weight.detach().clone()
    losses = [teach_tower.teach_step(trainer, 1.0, seed=0, step=0) for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0], losses
    after = trainer.model.model.language_model.layers[0].self_attn.q_proj.weight
    assert_same_bits(after.detach().numpy(), decoder.numpy(), "query weights")
