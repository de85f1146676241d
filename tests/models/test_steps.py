"""What makes a training step: Muon, the bf16 copy that computes, and gradients from helpers."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch: OCTET_EXTRAS=compare")
pytest.importorskip("transformers", reason="training needs transformers: OCTET_EXTRAS=compare")

from models.demo_training.checkpoint import Progress, trained_parameters  # noqa: E402
from models.demo_training.collate import collate  # noqa: E402
from models.demo_training.config import mini_model  # noqa: E402
from models.demo_training.encode import Encoder  # noqa: E402
from models.demo_training.forward import Normaliser, answer_losses, to_device  # noqa: E402
from models.demo_training.helper import Board  # noqa: E402
from models.demo_training.low_precision import LowPrecision  # noqa: E402
from models.demo_training.model import build_model  # noqa: E402
from models.demo_training.optimizer import MuonAdam, orthogonal  # noqa: E402
from tests.checks import assert_close, assert_same_bits  # noqa: E402
from tests.models.builders import draw  # noqa: E402

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
    for name in ("model.language_model.embed_tokens.weight", "model.vision_tower.patch_embed.proj.weight"):
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
