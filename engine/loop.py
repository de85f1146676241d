"""The step loop: schedule, send, publish the step before, await the oldest result, apply; and again.

With overlap two steps are on their way: while the ranks compute one, the next one waits at their door, so
they never wait for us. It is planned as late as the times of earlier steps allow, so that a request that
comes meanwhile need not wait for one step more. Without overlap the ranks wait while we apply and schedule.
Outputs are published while they compute, either way. Requests of the api processes come in between steps and
during them. Nothing here decides anything: who runs is scheduler.py's choice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass

from engine.errors import EngineError, RequestError
from engine.gateway import ApiGateway
from engine.media_files import MediaFiles
from engine.messages import AbortRequest, AddRequest, Ping, Pong, RequestObserved, StepPlan, ToEngine
from engine.metrics import Metrics
from engine.outbox import Client, Outbox
from engine.scheduler import Scheduler
from engine.worker_group import WorkerGroup

_FRESH = 1.0  # seconds: a step that ended this recently proves that the ranks live
_PING_PATIENCE = 5.0  # seconds a ping waits for the step in flight
_LEAD = 0.002, 0.15  # a step is planned so many seconds, and this share of a step, before the ranks need it
_REPORT_INTERVAL = 10.0  # seconds between lines in the log while busy

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Sent:
    """A step that the ranks were given and have not answered."""

    plan: StepPlan
    sent: float  # monotonic seconds
    num_tokens: int
    expected_seconds: float  # of computing; 0.0: nobody knows


class StepLoop:
    """Drives the scheduler and the ranks until `stop`, or until the ranks fail."""

    def __init__(
        self,
        scheduler: Scheduler,
        group: WorkerGroup,
        gateway: ApiGateway,
        metrics: Metrics,
        media: MediaFiles,
        overlap: bool = False,
    ) -> None:
        """`overlap`: give the ranks a second step while they compute the first."""
        self._scheduler, self._group, self._gateway = scheduler, group, gateway
        self._metrics, self._media = metrics, media
        self._most_flights = 2 if overlap else 1
        self._flights: deque[Sent] = deque()  # the oldest first
        self._last_sent = self._last_done = 0  # numbers of steps
        self._work = asyncio.Event()  # there may be something to do
        self._is_stopping = False
        self._pings: list[tuple[Client, int]] = []  # answered by the next step that ends
        self._last_step_end = 0.0
        self._report = ThroughputReport(scheduler)

    async def run(self) -> None:
        """Returns after `stop`. Raises EngineError when the ranks failed, once every request knows."""
        try:
            while not self._is_stopping:
                await self._turn()
            while self._flights:
                await self._finish_step()
        except EngineError as error:
            self._scheduler.fail_all(f"The engine failed: {error}.", 503)
            raise
        finally:
            self._flights.clear()
            self._scheduler.fail_all("The server is shutting down.", 503)
            self._publish()

    def stop(self) -> None:
        """Leave after the steps in flight; requests that are still open end with an error."""
        self._is_stopping = True
        self.wake()

    def wake(self) -> None:
        """There may be something to do."""
        self._work.set()

    async def _turn(self) -> None:
        """Send a step if there is one, then wait: for the oldest step if no more may be sent, or for work."""
        if self._group.failure:
            raise self._group.failure
        if self._flights and await self._is_over_early():
            await self._finish_step()
            return
        now = time.monotonic()
        plan = self._scheduler.schedule(now) or self._probe()
        if plan:
            self._send(plan, now)
        self._publish()
        if plan:
            self._scheduler.tidy()
            if plan.has_work and len(self._flights) < self._most_flights:
                return
        if self._flights:
            await self._finish_step()
        else:
            self._work.clear()
            await self._work.wait()

    async def _is_over_early(self) -> bool:
        """With a step under way, wait until it is time to plan the next one; True when it ended before."""
        flight = self._flights[0]
        began = max(flight.sent, self._last_step_end)
        lead = _LEAD[0] + _LEAD[1] * flight.expected_seconds
        seconds = began + flight.expected_seconds - lead - time.monotonic()
        if seconds <= 0.0:
            return False
        self._publish()
        return await self._group.has_result(seconds)

    def _probe(self) -> StepPlan | None:
        """A step in flight proves as much as a probe."""
        return self._scheduler.probe() if self._pings and not self._flights else None

    def _send(self, plan: StepPlan, now: float) -> None:
        self._group.send(plan)
        pacing = self._scheduler.pacing
        num_prompt_tokens = sum(chunk.num_tokens for chunk in plan.chunks)
        expected = pacing.decode_seconds + num_prompt_tokens * pacing.token_seconds
        self._flights.append(Sent(plan, now, self._scheduler.num_tokens_in_step, expected))
        self._last_sent = plan.step

    async def _finish_step(self) -> None:
        """Wait for the oldest step in flight and apply it."""
        result = await self._group.result()
        flight = self._flights.popleft()
        begin = max(flight.sent, self._last_step_end)  # the ranks had the step before to do first
        end = self._last_step_end = time.monotonic()
        self._scheduler.apply(result, end)
        self._last_done = result.step
        if flight.plan.has_work:
            self._metrics.observe_step(end - begin, flight.num_tokens, result)
            self._report.count(flight.num_tokens, result.num_tokens, end)
        self._answer_pings()

    def _publish(self) -> None:
        """Hand out everything the scheduler has said; no step is waiting for this."""
        outbox = self._scheduler.take_outbox()
        for step in outbox.steps():
            self._gateway.publish(step)
        self._metrics.observe_outbox(outbox)
        self._let_media_go(outbox)

    def _let_media_go(self, outbox: Outbox) -> None:
        """Steps that were sent before a request ended may still read its files."""
        for sequence in outbox.finished:
            if sequence.media:
                self._media.release(sequence.media, self._last_sent)
        self._media.sweep(self._last_done)

    # ------------------------------------------------------------------ what the api processes say

    def on_request(self, client: Client, message: ToEngine) -> None:
        if isinstance(message, AddRequest):
            self._add(client, message)
        elif isinstance(message, AbortRequest):
            self._scheduler.abort(message.request_id)
        elif isinstance(message, Ping):
            self._on_ping(client, message.ping_id)
        elif isinstance(message, RequestObserved):
            self._metrics.observe_http(message)
        self.wake()

    def on_client_left(self, client: Client) -> None:
        """Nobody reads the outputs any more: stop making them."""
        if num_aborted := self._scheduler.abort_client(client):
            log.warning("%s left; %d requests are aborted", client.decode(errors="replace"), num_aborted)
        self.wake()

    def _add(self, client: Client, request: AddRequest) -> None:
        try:
            self._media.hold(request.media)
        except RequestError as error:
            self._media.refuse(request.media)
            self._scheduler.refuse(client, request, error.message, error.status)
            return
        if not self._scheduler.add(client, request, time.monotonic()):
            self._media.release(request.media)

    # ------------------------------------------------------------------ health

    def _on_ping(self, client: Client, ping_id: int) -> None:
        """A step that just ended is proof enough; else the next one answers, a probe if there is none."""
        if time.monotonic() - self._last_step_end < _FRESH:
            self._gateway.answer(client, Pong(ping_id, True, "serving"))
            return
        self._pings.append((client, ping_id))
        asyncio.get_running_loop().call_later(_PING_PATIENCE, self._answer_late, client, ping_id)

    def _answer_pings(self) -> None:
        pings, self._pings = self._pings, []
        for client, ping_id in pings:
            self._gateway.answer(client, Pong(ping_id, True, "serving"))

    def _answer_late(self, client: Client, ping_id: int) -> None:
        """A long step is healthy as long as every rank beats."""
        if (client, ping_id) in self._pings:
            self._pings.remove((client, ping_id))
            silence = self._group.describe_silence()
            self._gateway.answer(client, Pong(ping_id, not silence, silence or "a long step is running"))


class ThroughputReport:
    """A line in the log every ten seconds in which something was computed."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._since = 0.0
        self._num_computed = self._num_sampled = 0

    def count(self, num_computed: int, num_sampled: int, now: float) -> None:
        self._num_computed += num_computed
        self._num_sampled += num_sampled
        if now - self._since >= _REPORT_INTERVAL:
            self._write(now)

    def _write(self, now: float) -> None:
        elapsed, pool = now - self._since, self._scheduler.kv.pool
        if elapsed < 2 * _REPORT_INTERVAL:  # else it was idle in between and the rates would mislead
            log.info(
                "%d running, %d waiting, %.1f tokens/s generated, %.1f computed, %d %% of KV blocks in use",
                self._scheduler.num_running,
                self._scheduler.num_waiting,
                self._num_sampled / elapsed,
                self._num_computed / elapsed,
                100 * (pool.num_blocks - pool.num_free) // pool.num_blocks,
            )
        self._since, self._num_computed, self._num_sampled = now, 0, 0
