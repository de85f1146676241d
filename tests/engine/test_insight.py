"""What an operator can look up: the last steps, the blocks, metrics under the reference server's names."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request

from prometheus_client import generate_latest

from engine.debug_pages import debug_pages, describe_blocks, describe_steps
from engine.gauges import watch
from engine.messages import MediaItem
from engine.metrics import Metrics
from engine.metrics_server import MetricsServer
from tests.engine.builders import CLIENT, make_request, make_scheduler
from tests.engine.processes import free_ports, make_server_config


def test_steps_tell_who_ran_and_why_others_waited():
    world = make_scheduler(num_blocks=8, block_size=4, max_num_batched_tokens=64)
    running = world.add(prompt=[3] * 14, max_tokens=6)
    world.step()
    large, small = world.add(prompt=[4] * 24), world.add(prompt=[5] * 4, max_tokens=2)
    world.step()
    page = describe_steps(world.scheduler, world.now + 1.0)
    newest = page["steps"][0]
    assert newest["ran"] == [{"request": small, "tokens": 4}, {"request": running, "tokens": 1}]
    assert newest["passed_over"] == [{"request": large, "waits_for": "blocks"}]
    assert (newest["num_tokens"], newest["num_running"], newest["num_waiting"]) == (5, 2, 1)
    assert newest["seconds_ago"] == 1.0
    assert [one["request"] for one in page["waiting"]] == [large]


def test_steps_tell_what_there_was_no_more_of():
    world = make_scheduler(max_num_seqs=1, max_num_batched_tokens=8)
    world.add(prompt_len=20)
    world.add(prompt_len=4)
    world.step()
    assert world.scheduler.log.records[-1].full == "tokens"
    world.step()
    assert world.scheduler.log.records[-1].full == "sequences"


def test_steps_name_the_preempted():
    world = make_scheduler(num_blocks=4, block_size=4)
    _, young = world.add(prompt=[3] * 6, max_tokens=9), world.add(prompt=[4] * 6, max_tokens=9)
    while not world.sequence(young).num_preemptions:
        world.step()
    assert world.scheduler.log.records[-1].preempted == [young]


def test_only_the_last_steps_are_kept():
    world = make_scheduler(num_blocks=512, max_model_len=2000, block_size=4)
    world.add(max_tokens=700, sampling={"ignore_eos": True})
    world.run_until_idle()
    steps = describe_steps(world.scheduler, world.now)["steps"]
    assert len(steps) == 512 and steps[0]["step"] - steps[-1]["step"] == 511


def test_blocks_are_counted_by_holder_and_proven():
    world = make_scheduler(num_blocks=16, block_size=4)
    first = world.add(prompt=[3] * 9, max_tokens=9)
    world.step()
    second = world.add(prompt=[3] * 9, max_tokens=9)
    world.step()
    page = describe_blocks(world.scheduler)
    assert (page["consistent"], page["num_used"], page["num_cached"]) == (True, 4, 2)
    assert [(one["request"], one["blocks"], one["alone"]) for one in page["holders"]] == [
        (first, 3, 1),
        (second, 3, 1),
    ]
    world.sequence(first).block_ids.pop()
    page = describe_blocks(world.scheduler)
    assert not page["consistent"] and first in page["error"]


def test_metrics_are_served_under_the_reference_names_with_the_model_as_label():
    world, metrics = make_scheduler(), Metrics()
    watch(metrics, world.scheduler, make_server_config(display_name="ernie"), 64)
    for number in range(2):
        request = make_request(f"q{number}", prompt=[5, 6, 7, 8, 9, 10, 11, 12], max_tokens=3)
        world.scheduler.add(CLIENT, request, world.now)
        while plan := world.scheduler.schedule(world.now):
            world.scheduler.apply(world.ranks.run(plan), world.now)
        metrics.observe_outbox(world.scheduler.take_outbox())
    text = generate_latest(metrics.registry).decode()
    for line in (
        'fastdeploy:request_success_total{model_name="ernie"} 2.0',
        'fastdeploy:generation_tokens_total{model_name="ernie"} 6.0',
        'fastdeploy:prefix_cache_token_num_total{model_name="ernie"} 4.0',
        'fastdeploy:hit_token_rate{model_name="ernie"} 0.25',
        'fastdeploy:time_to_first_token_seconds_bucket{le="2560.0",model_name="ernie"} 2.0',
        'fastdeploy:time_to_first_token_seconds_count{model_name="ernie"} 2.0',
        'fastdeploy:batch_size{model_name="ernie"} 0.0',
        'fastdeploy:requests_number_total{model_name="ernie"} 2.0',
        'fastdeploy:hit_req_rate{model_name="ernie"} 0.5',
        'fastdeploy:available_gpu_resource{model_name="ernie"} 1.0',
        'fastdeploy:num_requests_preempted{model_name="ernie"} 0.0',
        'fastdeploy:prefix_cpu_cache_token_num_total{model_name="ernie"} 0.0',
        "octet:num_tenants 0.0",
        "octet:prefix_cache_hit_tokens_total 4.0",
        "octet:prefix_cache_hit_requests_total 1.0",
    ):
        assert line in text.splitlines(), f"{line} is not in\n{text}"


def test_preemptions_are_counted_by_reason():
    world, metrics = make_scheduler(num_blocks=4, block_size=4), Metrics()
    world.add(prompt=[3] * 6, max_tokens=9), world.add(prompt=[4] * 6, max_tokens=9)
    while plan := world.scheduler.schedule(world.now):
        world.scheduler.apply(world.ranks.run(plan), world.now)
    metrics.observe_outbox(world.scheduler.take_outbox())
    assert 'octet:preemptions_total{reason="older"} 1.0' in generate_latest(metrics.registry).decode()


def test_debug_pages_are_made_in_the_engines_thread_and_served_as_json():
    world = make_scheduler()
    world.add()
    world.step()

    async def look() -> list[tuple[int, str]]:
        (port,) = free_ports(1)
        server = MetricsServer(Metrics(), "127.0.0.1", port)
        early = await asyncio.to_thread(_get, port, "/debug/blocks")
        server.show(debug_pages(world.scheduler))
        pages = ("/debug/blocks", "/debug/steps", "/debug/nothing", "/metrics")
        answers = [await asyncio.to_thread(_get, port, path) for path in pages]
        await asyncio.to_thread(server.close)
        return [early, *answers]

    early, blocks, steps, nothing, metrics = asyncio.run(look())
    assert early[0] == nothing[0] == 404
    assert json.loads(blocks[1])["consistent"] is True
    assert json.loads(steps[1])["steps"][0]["ran"] == [{"request": "r0", "tokens": 4}]
    assert json.loads(nothing[1])["pages"] == ["/debug/blocks", "/debug/steps"]
    assert metrics[0] == 200 and "octet:requests_total" in metrics[1]


def _get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_last_output_tells_where_the_time_went():
    world = make_scheduler(max_num_batched_tokens=8)
    request = world.add(prompt=[3] * 16, max_tokens=4, arrival=98.0)
    world.run_until_idle()
    timings = world.last(request).timings
    assert (timings.queue_seconds, timings.prefill_seconds, timings.decode_seconds) == (3.0, 1.0, 3.0)
    assert [output.timings for output in world.outputs[request][:-1]] == [None] * 3


def test_time_without_blocks_and_in_the_encoder_is_told_apart():
    world = make_scheduler(num_blocks=4, block_size=4, max_num_batched_tokens=4)
    world.ranks.encode_seconds = 0.25
    image = MediaItem("image", "a", (1, 2, 4), 4, 2, "file")
    old = world.add(prompt=[3] * 6, max_tokens=9)
    young = world.add(prompt=[4] * 6, max_tokens=9, media=[image])
    world.run_until_idle()
    assert world.last(old).timings.preempted_seconds == world.last(old).timings.encode_seconds == 0.0
    assert world.last(young).timings.preempted_seconds > 0.0
    assert world.last(young).timings.encode_seconds >= 0.25
