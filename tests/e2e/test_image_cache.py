"""A picture that was shown before is not encoded again, and no answer changes by a single bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.media import image_part
from tests.e2e.server import Server, running_server

pytestmark = pytest.mark.e2e

QUESTIONS = ["What is it?", "Which colours are there?", "What is it?"]


def ask(server: Server, *parts: dict[str, object]) -> list[tuple[str, float]]:
    """Tokens and log-probabilities of a greedy answer."""
    completion = server.client(timeout=240).chat.completions.create(
        model="octet",
        messages=[{"role": "user", "content": list(parts)}],  # type: ignore[list-item, misc]
        max_tokens=8,
        temperature=0,
        logprobs=True,
        extra_body={"ignore_eos": True},
    )
    content = completion.choices[0].logprobs.content or []  # type: ignore[union-attr]
    return [(token.token, token.logprob) for token in content]


def converse(server: Server) -> tuple[list[list[tuple[str, float]]], float, float]:
    """The same pictures behind ever different words: the answers, then patches encoded and patches saved."""
    answers = [
        ask(server, {"type": "text", "text": f"Look. {question}"}, image_part(1, 224, 196), image_part(2))
        for question in QUESTIONS
    ]
    return answers, server.metric("octet:encoded_patches_total"), server.metric("octet:cached_patches_total")


@pytest.mark.parametrize("prefix_caching", ["--enable-prefix-caching", "--no-enable-prefix-caching"])
def test_answers_are_the_same_bits_with_and_without_the_image_cache(
    tmp_path: Path, prefix_caching: str
) -> None:
    with running_server(tmp_path, "--tp", "2", prefix_caching) as server:
        answers, encoded, saved = converse(server)
        assert server.metric("octet:kv_blocks_used") == 0
    with running_server(tmp_path, "--tp", "2", prefix_caching, "--image-cache", "0") as server:
        plain_answers, plain_encoded, plain_saved = converse(server)
    assert answers == plain_answers
    assert saved > 0 and encoded < plain_encoded, (encoded, saved, plain_encoded)
    if prefix_caching.startswith("--no"):
        assert plain_encoded == 3 * encoded, "without any cache each request encodes each picture"
        assert encoded + saved == plain_encoded + plain_saved
