"""Cases of the sampler: greedy, and drawn with top-k and top-p."""

from __future__ import annotations

import torch

import cuda_ops
from tests.gpu.case import Answer, Case
from tests.gpu.machine import Machine


def sampling_case(machine: Machine, rows: int, vocab: int, *, is_greedy: bool, num_top: int = 0) -> Case:
    device = machine.device
    before = torch.randn(rows, vocab, device=device) * 3
    logits = before.clone()

    def floats(value: float) -> torch.Tensor:
        return torch.full((rows,), value, device=device)

    ints = torch.zeros(rows, dtype=torch.int32, device=device)
    starts, none = torch.zeros(rows + 1, dtype=torch.int32, device=device), torch.zeros(0, dtype=torch.int32)
    batch = cuda_ops.SamplingBatch(
        temperature=floats(0.0 if is_greedy else 0.8), top_k=ints if is_greedy else ints + 50,
        top_p=floats(1.0 if is_greedy else 0.9), min_p=floats(0.0), repetition=floats(1.0),
        presence=floats(0.0), frequency=floats(0.0), seeds=torch.arange(rows, device=device),
        counters=torch.zeros(rows, dtype=torch.int64, device=device), history=none.to(device),
        history_starts=starts, num_prompt_tokens=ints, banned=none.to(device), banned_starts=starts,
        allowed_bits=torch.full((-(-vocab // 32),), -1, dtype=torch.int32, device=device),
    )  # fmt: skip
    ids, logprobs = torch.empty_like(ints), floats(0.0)
    top_ids = torch.empty(rows, num_top, dtype=torch.int32, device=device)
    top_logprobs = torch.empty(rows, num_top, device=device)
    machine.lend_workspace(cuda_ops.sampling_workspace_bytes(rows, vocab))

    def answers() -> list[Answer]:
        own = before.double().log_softmax(-1)
        picked = ids.long().clamp(0, vocab - 1)[:, None]
        found = [Answer("logprobs", logprobs, own.gather(1, picked)[:, 0], 1e-5)]
        if is_greedy:
            found.append(Answer("token_ids", ids, before.argmax(-1), 0.0))
        else:
            kept = own.gather(1, picked)[:, 0] >= own.topk(50).values[:, -1]
            found.append(Answer("inside top-k", kept, torch.ones_like(kept), 0.0))
        return [*found, Answer("top_logprobs", top_logprobs, own.topk(num_top).values, 1e-5)]

    drawn = (before / 0.8).topk(min(50, vocab)).values
    peer = (lambda: before.argmax(-1)) if is_greedy else (lambda: torch.multinomial(drawn.softmax(-1), 1))
    return Case(
        f"sample_tokens {'greedy' if is_greedy else 'top-k, top-p'}", f"{rows} x {vocab}",
        lambda: cuda_ops.sample_tokens(logits, batch, ids, logprobs, top_ids, top_logprobs), answers,
        4 * rows * vocab, peers={"torch argmax" if is_greedy else "torch multinomial of 50": peer},
        is_warm=True,
    )  # fmt: skip
