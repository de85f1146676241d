"""Random histories of arrivals, aborts and starvation: the books are right, outputs ignore the company."""

from __future__ import annotations

from tests.conftest import Rand
from tests.engine.builders import make_scheduler


def test_any_history_leaves_no_blocks_and_every_request_its_own_output(rand: Rand):
    for _ in range(60):
        play_history(rand)


def play_history(rand: Rand) -> None:
    dice = rand.python
    vocab_size = dice.choice([40, 10_000])  # with 40 the end token turns up by chance
    world = make_scheduler(
        num_blocks=dice.randint(16, 40),
        vocab_size=vocab_size,
        block_size=4,
        max_model_len=64,
        max_num_seqs=dice.randint(1, 8),
        max_num_batched_tokens=dice.choice([1, 3, 8, 64]),
        enable_prefix_caching=dice.random() < 0.7,
    )
    prompts: dict[str, tuple[list[int], int]] = {}
    aborted: set[str] = set()
    for _ in range(dice.randint(20, 120)):
        action = dice.random()
        if action < 0.25:
            prompt = [dice.randrange(3, vocab_size) for _ in range(dice.randint(1, 50))]
            max_tokens = dice.randint(1, 20)
            request = world.add(prompt=prompt, max_tokens=max_tokens, priority=dice.choice([0, 0, 0, -1, 3]))
            prompts[request] = (prompt, max_tokens)
        elif action < 0.32 and prompts:
            request = dice.choice(list(prompts))
            aborted.add(request)
            world.abort(request)
        elif action < 0.36 and prompts:
            plan = world.plan()
            victim = dice.choice(list(prompts))
            aborted.add(victim)
            world.abort(victim)
            if plan:
                world.run(plan)
        else:
            world.step()
        world.recount()
    world.run_until_idle()
    world.assert_empty()
    for request, (prompt, max_tokens) in prompts.items():
        check_outputs(world, request, prompt, max_tokens, vocab_size, request in aborted, rand)


def check_outputs(world, request, prompt, max_tokens, vocab_size, was_aborted, rand) -> None:
    """Exactly one ending; the tokens of the same request alone, or their beginning if it was aborted."""
    endings = [output.finish_reason for output in world.outputs[request] if output.finish_reason]
    assert len(endings) == 1 and world.last(request).finish_reason, f"{request} of {rand} ended as {endings}"
    alone = make_scheduler(vocab_size=vocab_size)
    twin = alone.add(prompt=prompt, max_tokens=max_tokens)
    alone.run_until_idle()
    expected, actual = alone.tokens(twin), world.tokens(request)
    if was_aborted:
        expected = expected[: len(actual)]
    else:
        assert endings == [alone.last(twin).finish_reason]
    assert actual == expected, f"{request} of {rand} differs from the same request alone"
