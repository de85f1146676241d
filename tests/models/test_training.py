"""Training: fast paths equal transformers' own, runs repeat and resume, the export holds what was trained."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch: OCTET_EXTRAS=compare")
pytest.importorskip("transformers", reason="training needs transformers: OCTET_EXTRAS=compare")

from safetensors.torch import load_file  # noqa: E402

from api.tokenizer import load_tokenizer  # noqa: E402
from engine.model_config import (  # noqa: E402
    check_tensor_parallel,
    parse_model_config,
    read_model_config,
)
from models.demo_training import fake_quant, train  # noqa: E402
from models.demo_training.balance import LoadBalancer  # noqa: E402
from models.demo_training.checkpoint import named_weights  # noqa: E402
from models.demo_training.collate import collate  # noqa: E402
from models.demo_training.config import demo_model, mini_model  # noqa: E402
from models.demo_training.encode import Encoder  # noqa: E402
from models.demo_training.evaluate import evaluate  # noqa: E402
from models.demo_training.export import export, to_paddle  # noqa: E402
from models.demo_training.feed import Feed, FeedSettings, make_step  # noqa: E402
from models.demo_training.forward import (  # noqa: E402
    Normaliser,
    answer_losses,
    media_features,
    target_states,
    to_device,
)
from models.demo_training.generate import greedy  # noqa: E402
from models.demo_training.model import Model, build_model, hugging_face_config  # noqa: E402
from models.demo_training.sample import rng_for  # noqa: E402
from models.demo_training.skills import LESSONS  # noqa: E402
from models.demo_training.train import Settings, Trainer  # noqa: E402
from models.demo_training.tutor import HEADS  # noqa: E402
from models.tiny_config import paddle_config  # noqa: E402
from models.tiny_weights import write_weights  # noqa: E402
from tests.checks import assert_close, assert_same_bits  # noqa: E402
from tests.models.builders import draw  # noqa: E402
from workers.checkpoint import Checkpoint  # noqa: E402

pytestmark = pytest.mark.compare
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def encoder(tokenizer_folder) -> Encoder:
    return Encoder(tokenizer_folder)


@pytest.fixture
def model() -> Model:
    """Random enough that every path matters: correction biases differ and select."""
    model = build_model(mini_model(), seed=1).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "e_score_correction_bias" in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).reshape(parameter.shape))
    return model


def _settings(folder, tokenizer_folder, **changes) -> Settings:
    folder.mkdir(exist_ok=True)
    if not (folder / "tokenizer").exists():
        (folder / "tokenizer").symlink_to(tokenizer_folder)
    base = Settings(folder, model="mini", samples=16, samples_per_step=4, max_tokens=512, max_patches=2048)
    return replace(base, warmup_steps=1, quantise_from=0.7, only=("shapes", "chat", "moment"), **changes)


def test_losses_equal_those_of_transformers_own_forward(encoder, model):
    """Its experts, attention, positions and loss; pictures only, because for clips its positions differ."""
    example = encoder.encode(next(s for s in (draw("pictures", i) for i in range(9)) if len(s.media) == 3))
    plain = Model(hugging_face_config(mini_model())).eval()
    plain.load_state_dict(model.state_dict(), strict=False)  # without the head for patches
    plain.config.text_config._experts_implementation = "eager"
    micro = collate([example])
    batch = to_device(micro, CPU)
    labels = batch.token_ids.masked_fill(torch.as_tensor(micro.answers) == 0, -100)
    with torch.no_grad():
        theirs = plain(
            input_ids=batch.token_ids,
            mm_token_type_ids=(batch.token_ids == model.config.image_token_id).int(),
            moe_mm_token_type_ids=batch.token_types,
            pixel_values=Normaliser(CPU)(torch.as_tensor(micro.patches)),
            image_grid_thw=batch.media.grids,
            labels=labels,
        )
        sums, counts, _ = answer_losses(model, Normaliser(CPU), batch)
    assert_close((sums / counts).numpy(), theirs.loss.reshape(1).numpy(), 2e-5, "loss")


def test_a_sample_has_the_same_loss_alone_and_among_others(encoder, model):
    examples = [
        encoder.encode(draw(skill, 2)) for skill in ("shapes", "chat", "motion", "pictures", "flashes")
    ]
    with torch.no_grad():
        together, _, _ = answer_losses(model, Normaliser(CPU), to_device(collate(examples), CPU))
        alone = [answer_losses(model, Normaliser(CPU), to_device(collate([e]), CPU))[0] for e in examples]
    assert_close(together.numpy(), torch.cat(alone).numpy(), 2e-4, "summed losses")


@pytest.mark.parametrize("name", ["small scene", "crowd", "several", "word", "last steps", "errands"])
def test_answers_of_a_lesson_have_the_loss_that_each_has_in_a_sample_of_its_own(encoder, model, name):
    drawn = (LESSONS[name](rng_for("training", 0, name, i)) for i in range(20))
    lesson = next(s for s in drawn if s.others or name == "errands")
    apart = [replace(lesson, others=()), *lesson.others]
    with torch.no_grad():
        together, _, _ = answer_losses(model, Normaliser(CPU), _batch([encoder.encode(lesson)]))
        alone = [answer_losses(model, Normaliser(CPU), _batch([encoder.encode(s)]))[0] for s in apart]
    assert_close(together.numpy(), torch.cat(alone).numpy(), 2e-4, "summed losses")


def _batch(examples):
    return to_device(collate(examples), CPU)


def test_vision_of_pictures_and_clips_in_one_call_equals_transformers(encoder, model):
    plain = Model(hugging_face_config(mini_model())).eval()
    plain.load_state_dict(model.state_dict(), strict=False)  # without the head for patches
    micro = collate([encoder.encode(draw(skill, 0)) for skill in ("shapes", "moment", "pictures", "motion")])
    grids, batch = torch.as_tensor(micro.grids).long(), to_device(micro, CPU)
    with torch.no_grad():
        pixels = Normaliser(CPU)(torch.as_tensor(micro.patches))
        seen = plain.model.vision_tower(pixels, grids).last_hidden_state
        expected = plain.model.resampler_model(seen, grids)
        actual = media_features(model, Normaliser(CPU), batch.media)
    assert_close(actual.numpy(), expected.numpy(), 2e-5, "features")


def test_greedy_with_cache_and_padding_equals_the_likeliest_token_of_the_whole(encoder, model):
    prompts = [encoder.encode(draw(s, 4), with_target=False) for s in ("shapes", "chat", "flashes", "tools")]
    answers = greedy(model, Normaliser(CPU), prompts, 4, encoder.tokenizer.end_token_ids)
    for prompt, answer in zip(prompts, answers, strict=True):
        token_ids, row = prompt.token_ids, prompt.positions
        for step, token in enumerate(answer):
            token_ids, row = np.append(token_ids, np.int32(token)), _continued(row)
            example = replace(
                prompt,
                skills=("chat",),
                token_ids=token_ids,
                positions=row,
                branches=np.zeros(len(token_ids), np.uint8),
                sought=np.zeros(len(token_ids), np.uint16),
                answers=(np.arange(len(token_ids)) == len(token_ids) - 1).astype(np.uint8),
                token_types=(token_ids >= mini_model().media.patch).astype(np.uint8),
            )
            with torch.no_grad():
                states = target_states(model, Normaliser(CPU), to_device(collate([example]), CPU))
                logits = model.lm_head(states[-1])[: mini_model().media.patch]
            assert token == int(logits.argmax()), f"token {step} of {answer}"


def _continued(positions: np.ndarray) -> np.ndarray:
    return np.append(positions, np.full((3, 1), positions.max() + 1, np.int32), axis=1)


def test_steps_depend_on_seed_and_number_and_not_on_how_many_workers_make_them(tokenizer_folder, encoder):
    settings = FeedSettings(tokenizer_folder, 5, 4, 512, 2048, ("shapes", "chat", "motion"))
    with Feed(settings, workers=2, first_step=3) as feed:
        for step in (3, 4, 5):
            received, expected = feed.next_step(), make_step(settings, encoder, step)
            assert len(received) == len(expected)
            for a, b in zip(received, expected, strict=True):
                assert_same_bits(a.token_ids, b.token_ids, f"step {step}")
                assert_same_bits(a.patches, b.patches, f"step {step}")


def test_a_dead_worker_is_an_error_and_not_a_silent_wait(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"broken")
    with (
        Feed(FeedSettings(tmp_path, 0, 4, 512, 2048), workers=1) as feed,
        pytest.raises(RuntimeError, match="died"),
    ):
        feed.next_step()


def test_a_run_that_stops_and_goes_on_ends_where_an_unbroken_one_does(tmp_path, tokenizer_folder):
    whole = Trainer(_settings(tmp_path / "whole", tokenizer_folder))
    whole.run()
    broken = Trainer(_settings(tmp_path / "broken", tokenizer_folder))
    with Feed(broken.feed_settings, workers=1) as feed:
        for _ in range(2):
            broken.step(feed.next_step())
    broken.save()
    resumed = Trainer(_settings(tmp_path / "broken", tokenizer_folder))
    assert resumed.progress.samples == 8
    resumed.run()
    for name, weight in named_weights(whole.model).items():
        assert_same_bits(named_weights(resumed.model)[name].numpy(), weight.numpy(), name)


def test_training_writes_what_it_does_and_finishes(tmp_path, tokenizer_folder):
    trainer = Trainer(_settings(tmp_path, tokenizer_folder))
    before = named_weights(trainer.model)
    before = {name: weight.clone() for name, weight in before.items()}
    trainer.run()
    assert trainer.is_done and trainer.progress.samples == 16
    moved = {n for n, w in named_weights(trainer.model).items() if not torch.equal(w, before[n])}
    # An expert may see no token in four steps; nothing reads the vision positions behind the last layer; the
    # patch embedding stays as it is made.
    at_rest = ("experts", "correction", "vision_moe", "patch_embed")
    assert before.keys() - moved <= {n for n in before if any(part in n for part in at_rest)}
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4 and last["done"] == 1.0 and set(last["loss"]) <= {"shapes", "chat", "moment"}


def test_the_learning_rate_rises_by_steps_and_falls_over_the_run(tmp_path):
    settings = Settings(tmp_path, learning_rate=1.0, warmup_steps=100)
    assert train.learning_rate(settings, 0, 0.0) == pytest.approx(0.01)
    assert train.learning_rate(settings, 99, 0.0) == pytest.approx(1.0)
    rates = [train.learning_rate(settings, 1000, done / 10) for done in range(11)]
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(train.FINAL_RATE)


def test_new_heads_have_a_rate_of_their_own_and_the_rest_warms_up_behind_them(tmp_path):
    settings = Settings(tmp_path, learning_rate=0.001, warmup_steps=10, heads_first=5)
    rates = [train.learning_rate(settings, step, 0.0) for step in (0, 4, 5, 14, 15)]
    assert rates == pytest.approx([train.HEADS_RATE, train.HEADS_RATE, 0.0001, 0.001, 0.001])


def test_idle_experts_gain_bias_and_busy_ones_lose_it(encoder):
    model = build_model(mini_model(), seed=2)
    balancer = LoadBalancer(model, speed=0.01)
    router = model.model.language_model.layers[1].mlp.text_moe.gate
    with torch.no_grad():
        router.moe_statics.e_score_correction_bias.copy_(torch.tensor([[2.0, 1.0, -1.0, -2.0]]))
    batch = to_device(collate([encoder.encode(draw("chat", i)) for i in range(3)]), CPU)
    before = router.moe_statics.e_score_correction_bias.clone()
    with torch.no_grad():
        target_states(model, Normaliser(CPU), batch)
    balancer.update()
    (share,) = (s for name, s in balancer.shares.items() if "text_moe" in name)
    assert share.tolist() == [0.5, 0.5, 0.0, 0.0]
    change = (router.moe_statics.e_score_correction_bias - before)[0]
    assert (change[:2] < 0).all() and (change[2:] > 0).all()


def test_padding_is_no_load(encoder):
    model = build_model(mini_model(), seed=2)
    balancer = LoadBalancer(model)
    micro = collate([encoder.encode(draw(s, 1)) for s in ("chat", "tools", "shapes")])
    with torch.no_grad():
        target_states(model, Normaliser(CPU), to_device(micro, CPU))
    loads = {name.split(".")[-2]: load.sum() for name, load in balancer._loads.items()}
    bearing = int((micro.answers > 0).sum())
    assert loads == {"text_moe": 2 * bearing, "vision_moe": 0}, "the last layer goes on at answers only"


def test_quantised_weights_are_steps_of_their_group_and_come_back(model):
    weight = model.model.language_model.layers[1].mlp.text_moe.experts.down_proj
    before = weight.detach().clone()
    with fake_quant.quantised(model, "wint4", ranks=2):
        inside = weight.detach().clone()
    assert torch.equal(weight, before)
    groups = inside.reshape(-1, 32)  # 64 inputs on two ranks
    for index in range(0, len(groups), 97):
        assert len(groups[index].abs().unique()) <= 8, f"group {index} has more than 15 levels"
    assert 0.03 < ((inside - before).norm() / before.norm()).item() < 0.2


def test_the_export_holds_the_trained_weights_under_published_names(tmp_path, tokenizer_folder):
    trainer = Trainer(_settings(tmp_path / "run", tokenizer_folder, samples_per_step=8))
    trainer.run()
    export(tmp_path / "run", tmp_path / "out", mini_model())  # reads itself back
    stored = load_file(tmp_path / "out" / "model.safetensors")
    write_weights(tmp_path / "names.safetensors", mini_model(), "paddle", seed=0)
    expected = load_file(tmp_path / "names.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in stored.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }
    qkv = stored["ernie.layers.1.self_attn.qkv_proj.weight"].T
    key = trainer.model.model.language_model.layers[1].self_attn.k_proj.weight
    assert torch.equal(qkv[64:128], key.detach().bfloat16())
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "tokenizer.model",
        "added_tokens.json",
        "chat_template.jinja",
        "README.md",
    } <= files
    assert {"preprocessor_config.json", "generation_config.json", "tokenizer_config.json"} <= files


def test_a_run_can_start_from_exported_weights(tmp_path, tokenizer_folder):
    trainer = Trainer(_settings(tmp_path / "run", tokenizer_folder))
    trainer.save()
    export(tmp_path / "run", tmp_path / "out", mini_model())
    settings = _settings(tmp_path / "next", tokenizer_folder, seed=9, init_from=str(tmp_path / "out"))
    started = named_weights(Trainer(settings).model)
    own = (tmp_path / "out" / "tokenizer.model").read_bytes()
    assert (settings.out / "tokenizer" / "tokenizer.model").read_bytes() == own
    for name, weight in named_weights(trainer.model).items():
        if name.split(".")[0] in HEADS:
            continue  # only training has them
        expected = weight if ".gate." in name else weight.bfloat16().float()
        assert_same_bits(started[name].numpy(), expected.numpy(), name)


def test_the_server_reads_an_export(tmp_path, tokenizer_folder):
    trainer = Trainer(_settings(tmp_path / "run", tokenizer_folder))
    trainer.save()
    export(tmp_path / "run", tmp_path / "out", mini_model())
    model = read_model_config(tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out", model)  # every tensor there, none unknown
    assert (checkpoint.scheme, checkpoint.model.tie_word_embeddings) == ("A", True)
    checkpoint.close()
    markers = load_tokenizer(tmp_path / "out").markers
    assert markers["<|IMAGE_PLACEHOLDER|>"] == model.image_patch_id
    assert markers["<|VIDEO_END|>"] == model.video_end_id
    assert set(model.eos_token_ids) == {markers["</s>"], markers["<|end_of_sentence|>"]}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_number_of_ranks_divides_the_demo_model_with_its_wint4_groups(ranks):
    sizes = demo_model()
    check_tensor_parallel(parse_model_config(paddle_config(sizes)), ranks)
    assert all(width // ranks % 32 == 0 for width in sizes.expert_widths) and sizes.hidden_size % 64 == 0


def test_an_unknown_tensor_is_not_exported_silently(model):
    tensors = named_weights(model)
    del tensors["model.language_model.layers.1.mlp.vision_moe.gate.weight"]
    with pytest.raises(KeyError, match="vision_moe"):
        to_paddle(tensors, mini_model())


def test_evaluation_counts_right_answers_of_fresh_samples(encoder, model):
    judged = []
    scores = evaluate(
        model, encoder, ("shapes", "digits"), 3, lambda s, text, right: judged.append((s.skill, right))
    )
    assert {skill: score.total for skill, score in scores.items()} == {"shapes": 3, "digits": 3}
    assert sum(right for _, right in judged) == sum(score.right for score in scores.values())


def test_the_commands_of_the_readme_are_understood():
    folder = Path(train.__file__).parent
    text = (folder / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"python -m models\.demo_training\.(\w+)(.*?)(?:`|$)", text, re.MULTILINE)
    assert {name for name, _ in commands} >= {"train", "evaluate", "export", "evaluate_served", "config"}
    for name, arguments in commands:
        assert (folder / f"{name}.py").is_file(), name
        if name == "train":
            train.parse(shlex.split(arguments, comments=True))
