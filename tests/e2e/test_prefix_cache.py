"""A prompt asked twice is computed once, pictures included, and its answer stays the same to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.media import image_part
from tests.e2e.server import Server, running_server

pytestmark = pytest.mark.e2e

STORY = "Once upon a time there was a small model on a large machine. " * 12
PROMPTS: list[list[object]] = [
    [{"type": "text", "text": STORY}],
    [image_part(1, 224, 196), {"type": "text", "text": STORY}],
    [{"type": "text", "text": STORY}, image_part(1, 224, 196), {"type": "text", "text": "What is it?"}],
]


def ask(server: Server, prompt: list[object], *turns: str) -> tuple[list[tuple[str, float]], int, str]:
    """Tokens with log-probabilities, the number of cached prompt tokens, and the text."""
    messages: list[dict[str, object]] = [{"role": "user", "content": prompt}]
    for answer, question in zip(turns[::2], turns[1::2], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    completion = server.client(timeout=240).chat.completions.create(
        model="octet",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=12,
        temperature=0,
        logprobs=True,
        extra_body={"ignore_eos": True},
    )
    content = completion.choices[0].logprobs.content or []  # type: ignore[union-attr]
    usage = completion.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    cached = usage.prompt_tokens_details.cached_tokens or 0
    text = completion.choices[0].message.content or ""
    return [(token.token, token.logprob) for token in content], cached, text


def test_answers_are_the_same_bits_with_and_without_the_prefix_cache(tmp_path: Path) -> None:
    with running_server(tmp_path, "--tp", "2") as server:
        first = [ask(server, prompt) for prompt in PROMPTS]
        again = [ask(server, prompt) for prompt in PROMPTS]
        patches = server.metric("octet:encoded_patches_total")
        next_turn = ask(server, PROMPTS[1], first[1][2], "And then?")
        assert server.metric("octet:encoded_patches_total") == patches, "the picture was encoded again"
        assert server.metric("octet:kv_blocks_used") == 0
    assert all(cached >= 64 for _, cached, _ in again), [cached for _, cached, _ in again]
    assert next_turn[1] >= again[1][1]
    with running_server(tmp_path, "--tp", "2", "--no-enable-prefix-caching") as server:
        without = [ask(server, prompt) for prompt in PROMPTS]
        assert all(ask(server, prompt)[1] == 0 for prompt in PROMPTS)
        plain_turn = ask(server, PROMPTS[1], first[1][2], "And then?")
    assert [one[0] for one in first] == [one[0] for one in again] == [one[0] for one in without]
    assert next_turn[0] == plain_turn[0]
