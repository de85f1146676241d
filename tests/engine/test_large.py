"""The sizes that the server is made for: 128K prompts, 256 sequences, hundreds of media, 10,000 waiting."""

from __future__ import annotations

import time

from engine.config import ServerConfig
from engine.messages import AddRequest, MediaItem, RequestOutput, SamplingParams
from engine.scheduler import Scheduler
from tests.engine.builders import CLIENT, EOS
from tests.engine.fakes import RankMirror, chunks_of
from tests.engine.outputs import said_by

CONTEXT = 131_072
VOCAB_SIZE = 100_000


class LargeWorld:
    """Blocks of 64, steps of 8192, the context of the 424B model."""

    def __init__(self, num_blocks: int = 4096, **config) -> None:
        settings = {"max_num_batched_tokens": 8192, "max_model_len": CONTEXT, "max_waiting": 20_000, **config}
        self.scheduler = Scheduler(ServerConfig(**settings), num_blocks, [EOS], VOCAB_SIZE)
        self.ranks = RankMirror(num_blocks, 64, VOCAB_SIZE, check_slots=False)
        self.now = 1.0

    def add(self, request_id: str, prompt: list[int], max_tokens: int = 1, **changes) -> None:
        sampling = SamplingParams(max_tokens, ignore_eos=True)
        assert self.scheduler.add(CLIENT, AddRequest(request_id, prompt, sampling, **changes), self.now)

    def step(self) -> dict[int, int]:
        """Tokens by sequence number, of one step."""
        self.now += 1.0
        plan = self.scheduler.schedule(self.now)
        if plan is None:
            return {}
        self.scheduler.tidy()
        self.scheduler.apply(self.ranks.run(plan), self.now)
        return {chunk.seq_id: chunk.num_tokens for chunk in chunks_of(plan)}

    def run_until_idle(self) -> list[RequestOutput]:
        while self.step():
            pass
        self.scheduler.recount()
        assert self.scheduler.kv.pool.num_free == self.scheduler.kv.pool.num_blocks
        return said_by(self.scheduler)


def test_prompt_of_128k_tokens_is_chunked_cached_and_found_again():
    world = LargeWorld()
    prompt = [5 + i % 90_000 for i in range(CONTEXT - 8)]
    world.add("first", prompt, max_tokens=8)
    assert [world.step()[0] for _ in range(16)] == [8192] * 15 + [8192 - 8]
    (*_, last) = world.run_until_idle()
    assert last.finish_reason == "length"
    world.add("again", prompt, max_tokens=8)
    (first, *_) = world.run_until_idle()
    assert first.num_cached_tokens == 2047 * 64


def test_another_prompt_of_128k_tokens_takes_the_blocks_of_the_first():
    world = LargeWorld(num_blocks=2048)
    for start in (5, 1000):
        world.add(f"from {start}", [start + i % 90_000 for i in range(CONTEXT - 8)], max_tokens=2)
        world.run_until_idle()
    assert world.scheduler.kv.cache.num_evictions > 2000


def test_256_sequences_run_at_once():
    world = LargeWorld()
    for index in range(300):
        world.add(f"r{index}", [index + 5] * 64, max_tokens=40)
    world.step(), world.step(), world.step(), world.step()
    assert len(world.step()) == 256 and world.scheduler.num_waiting == 44
    outputs = world.run_until_idle()
    assert sum(output.finish_reason == "length" for output in outputs) == 300


def test_hundred_images_and_hundred_videos_in_one_prompt():
    world = LargeWorld(max_encoder_tokens_per_step=2000)
    images = [MediaItem("image", f"picture {i}", (1, 32, 32), 10 + i * 300, 256, "file") for i in range(100)]
    videos = [
        MediaItem("video", f"clip {i}", (8, 32, 32), 31_000 + i * 1000, 900, "file") for i in range(100)
    ]
    world.add("album", [7] * (CONTEXT - 8), media=[*images, *videos])
    begin = 0
    while step := world.step():
        end = begin + step[0]
        encoded = sum(256 for item in images if begin <= item.offset < end)
        encoded += sum(
            max(0, min(end, item.offset + 900) - max(begin, item.offset))
            for item in videos
        )  # fmt: skip
        assert encoded <= 2000, f"tokens {begin} to {end} need {encoded} tokens encoded"
        begin = end
    assert begin == CONTEXT - 8
    world.run_until_idle()


def test_steps_are_no_slower_with_ten_thousand_waiting():
    few, many = median_step(100), median_step(10_000)
    assert many < 3 * few + 100e-6, (
        f"a step takes {many * 1e6:.0f} us, {few * 1e6:.0f} with a hundred waiting"
    )


def median_step(num_waiting: int) -> float:
    """Processor seconds of a step in which four sequences decode and nobody who waits fits."""
    world, times = LargeWorld(num_blocks=70), []
    for index in range(4):
        world.add(f"running {index}", [index + 5] * 900, max_tokens=200)
    world.step()
    for index in range(num_waiting):
        world.add(f"waiting {index}", [index + 500] * 700, tenant=f"tenant {index % 500}")
    for _ in range(60):
        began = time.thread_time()
        world.step()
        times.append(time.thread_time() - began)
    assert (world.scheduler.num_running, world.scheduler.num_waiting) == (4, num_waiting)
    return sorted(times)[30]
