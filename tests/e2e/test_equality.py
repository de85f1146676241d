"""Design rule D5 through the public API: a request's tokens and log-probabilities are the same bits
alone or in company, for every way to cut its prompt into chunks, with steps that overlap and without."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.e2e.media import image_part, video_part
from tests.e2e.server import Server, running_server

pytestmark = pytest.mark.e2e

PROMPTS: list[list[object]] = [
    [{"type": "text", "text": "Count from one to nine."}],
    [image_part(), {"type": "text", "text": "Describe the picture."}],
    [image_part(1, 84, 112), image_part(2), video_part(), {"type": "text", "text": "What differs?"}],
]


def answers(server: Server, prompt: list[object]) -> list[tuple[str, float]]:
    """Tokens and log-probabilities of a seeded, sampled answer."""
    completion = server.client(timeout=240).chat.completions.create(
        model="octet",
        messages=[{"role": "user", "content": prompt}],  # type: ignore
        max_tokens=12,
        temperature=1.0,
        top_p=0.9,
        seed=7,
        logprobs=True,
        extra_body={"ignore_eos": True},
    )
    content = completion.choices[0].logprobs.content  # type: ignore[union-attr]
    return [(token.token, token.logprob) for token in content or []]


def in_company(server: Server, prompt: list[object], companions: int) -> list[tuple[str, float]]:
    """The same answer while `companions` other requests run."""
    others = [
        threading.Thread(
            target=answers, args=(server, [*PROMPTS[i % 3], {"type": "text", "text": f"Variant {i}"}])
        )
        for i in range(companions)
    ]
    for other in others:
        other.start()
    answer = answers(server, prompt)
    for other in others:
        other.join()
    return answer


@pytest.mark.parametrize("quantization", ["bfloat16", "wint4"])
def test_company_and_chunks_do_not_change_a_single_bit(tmp_path: Path, quantization: str) -> None:
    flags = ["--tp", "2", "--quant", quantization]
    with running_server(tmp_path, *flags) as server:
        alone = [answers(server, prompt) for prompt in PROMPTS]
        assert [in_company(server, prompt, 16) for prompt in PROMPTS] == alone
    flags += ["--max-num-batched-tokens", "19", "--max-num-seqs", "8", "--no-overlap"]
    with running_server(tmp_path, *flags) as server:
        assert [answers(server, prompt) for prompt in PROMPTS] == alone
