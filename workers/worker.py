"""The process of one rank: handshake with the engine, then plan after plan until told to stop.

    -> RankHello -> (load) -> RankLoaded <- StartServing -> RankReady
    <- StepPlan -> (runner.py) -> StepResult from rank 0 ...   <- StopServing

Whatever goes wrong is sent as RankFailed and ends the process with exit code 1; the engine decides what
that means for the others. How a step is computed is in runner.py.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections import deque
from pathlib import Path

import zmq

import cuda_ops
from engine.channels import Codec, RunDirectory, open_socket
from engine.config import ServerConfig, read_config
from engine.errors import EngineError, OctetError
from engine.messages import (
    FromWorker,
    RankFailed,
    RankHello,
    RankLoaded,
    RankReady,
    StartServing,
    StepPlan,
    StopServing,
    ToWorker,
)
from engine.model_config import ModelConfig, read_model_config
from engine.status_page import Heart, Phase, StatusPage
from workers.cores import stay_on_own_cores, threads_per_rank
from workers.device import open_device
from workers.device.base import Device
from workers.gpu_memory import StepLimits
from workers.kv_cache import blocks_that_fit
from workers.loader import load_weights
from workers.model.weights import ModelWeights, resident_bytes
from workers.parallel import share_of
from workers.pulse import PatientGroup, Pulse
from workers.quant import activation_dtype, kv_cache_dtype
from workers.runner import Runner
from workers.running_step import RunningStep
from workers.swap import host_blocks_that_fit
from workers.tiling import tile_decoder
from workers.vocabulary import count_token_ids

_ENGINE_TIMEOUT = 60.0  # seconds until the engine has subscribed to our results
_START_ALLOWANCE = 300.0  # for importing the framework and loading the compiled ops, on a busy machine
_LOAD_ALLOWANCE = 60.0  # between two signs of progress while loading
_COLLECTIVE_TIMEOUT = 600.0  # a rank may encode a very large image while the others wait
_POLL_MS = 1000
_GPU_POLL = 20e-6  # seconds between looks at a GPU
_LAST_WORD_MS = 2000  # how long a closing socket may take to deliver RankFailed

log = logging.getLogger(__name__)


class EngineLink:
    """The two sockets to the engine. Every receive is polled, so the rank beats while it waits."""

    def __init__(self, run: RunDirectory, rank: int, pulse: Pulse) -> None:
        self._pulse = pulse
        self._context = zmq.Context()
        self._plans = open_socket(self._context, zmq.PULL, run.plan_address(rank), bind=False)
        self._results = open_socket(self._context, zmq.XPUB, run.results_address, bind=False)
        self._incoming: Codec[ToWorker] = Codec(ToWorker)
        self._outgoing: Codec[FromWorker] = Codec(FromWorker)

    def wait_for_engine(self, timeout: float) -> None:
        """Return once the engine has subscribed: what is published before that is lost."""
        deadline = time.monotonic() + timeout
        while not self._results.poll(_POLL_MS):
            self._pulse.beat()
            if time.monotonic() > deadline:
                raise EngineError(f"the engine did not subscribe to this rank within {timeout:.0f} s")
        self._results.recv()

    def send(self, message: FromWorker) -> None:
        self._results.send(self._outgoing.encode(message))

    def has_message(self) -> bool:
        return bool(self._plans.poll(0))

    def receive(self) -> ToWorker:
        """The next message, however long it takes."""
        while not self._plans.poll(_POLL_MS):
            self._pulse.beat()
        return self._incoming.decode(self._plans.recv())

    def close(self) -> None:
        """Deliver what was sent, then close."""
        self._results.setsockopt(zmq.LINGER, _LAST_WORD_MS)
        self._plans.close()
        self._results.close()
        self._context.term()


class Worker:
    """One rank from its first message to its last."""

    def __init__(self, run: RunDirectory, rank: int) -> None:
        self._run = run
        self._rank = rank
        self._config: ServerConfig = read_config(run.config)
        world = self._config.tensor_parallel_size
        self._pulse = Pulse(Heart(StatusPage(run.status_page, world), rank, os.getpid()))
        self._link = EngineLink(run, rank, self._pulse)
        self._step = -1  # of the last plan

    def serve(self) -> int:
        """Returns the exit code."""
        try:
            self._link.wait_for_engine(_ENGINE_TIMEOUT)
            self._link.send(RankHello(self._rank, os.getpid()))
            self._run_plans(self._start())
            return 0
        except Exception as error:
            log.error("failed at step %d: %s", self._step, _sentence(error))  # the engine logs the traceback
            self._link.send(RankFailed(self._rank, self._step, _sentence(error), traceback.format_exc()))
            return 1
        finally:
            self._pulse.beat(phase=Phase.LEAVING)
            self._pulse.close()
            self._link.close()

    def _start(self) -> Runner:
        """Load, tell how many blocks fit, and allocate what the engine decides."""
        began = time.monotonic()
        config, world = self._config, self._config.tensor_parallel_size
        self._pulse.beat(_START_ALLOWANCE, phase=Phase.STARTING)
        model = read_model_config(config.model, config.config_overrides)
        share = share_of(model, self._rank, world)
        device = open_device(config, self._rank, self._open_group)
        self._take_cores(device)
        dtype = activation_dtype(config, model)
        kv_dtype = kv_cache_dtype(config, dtype)
        weights, weight_bytes = self._load(model, device)
        num_blocks = blocks_that_fit(config, model, share, kv_dtype)
        seconds = time.monotonic() - began
        num_host_blocks = host_blocks_that_fit(config, model, share, kv_dtype)
        self._link.send(
            RankLoaded(self._rank, num_blocks, weight_bytes, seconds, device.name, num_host_blocks)
        )

        start = self._link.receive()
        if not isinstance(start, StartServing):
            raise EngineError(f"expected StartServing, got {type(start).__name__}")
        runner = Runner(
            model,
            weights,
            device,
            dtype,
            self._run.media,
            num_blocks=start.num_blocks,
            block_size=config.block_size,
            kv_dtype=kv_dtype,
            num_token_ids=count_token_ids(Path(config.tokenizer or config.model)),
            image_cache=config.image_cache,
            num_host_blocks=start.num_host_blocks,
            kv_canary=config.kv_canary,
            vocabulary_file=self._run.vocabulary,
            limits=StepLimits.of(config),
            on_progress=self._pulse.beat,
        )
        self._pulse.beat(phase=Phase.READY)
        self._link.send(RankReady(self._rank))
        return runner

    def _run_plans(self, runner: Runner) -> None:
        running: deque[RunningStep] = deque()  # issued, not answered; a CPU has done a step when it is issued
        while True:
            self._answer(running)
            message = self._link.receive()
            if isinstance(message, StopServing):
                return
            if not isinstance(message, StepPlan):
                raise EngineError(f"expected a StepPlan, got {type(message).__name__}")
            self._step = message.step
            self._pulse.beat(phase=Phase.RUNNING, step=message.step)
            running.append(runner.launch(message))

    def _answer(self, running: deque[RunningStep]) -> None:
        """Send results as they are ready, until there are no more or another plan is here.

        Nothing beats meanwhile: a GPU that takes longer than its work may (Runner) is stuck.
        """
        while running:
            if running[0].is_done():
                result = running.popleft().result()
                if self._rank == 0:
                    self._link.send(result)
                if not running:
                    self._pulse.beat(phase=Phase.READY)
            elif self._link.has_message():
                return
            else:
                time.sleep(_GPU_POLL)

    def _open_group(self) -> PatientGroup | None:
        world = self._config.tensor_parallel_size
        if world == 1:
            return None
        path = str(self._run.collective)
        group = cuda_ops.SharedMemoryGroup(path, self._rank, world, _COLLECTIVE_TIMEOUT)
        return PatientGroup(group, self._pulse, _COLLECTIVE_TIMEOUT)

    def _take_cores(self, device: Device) -> None:
        """Before the ops start threads: those stay where the one stays that starts them."""
        if not device.is_gpu and (cores := stay_on_own_cores(self._config, self._rank)):
            log.info("on cores %s", ", ".join(map(str, sorted(cores))))
        cuda_ops.set_num_threads(threads_per_rank(self._config))

    def _load(self, model: ModelConfig, device: Device) -> tuple[ModelWeights, int]:
        """The rank's weights and how many bytes they take; progress goes to the status page."""

        def on_progress(bytes_loaded: int, bytes_total: int) -> None:
            self._pulse.beat(_LOAD_ALLOWANCE, bytes_loaded=bytes_loaded, bytes_total=bytes_total)

        self._pulse.beat(_LOAD_ALLOWANCE, phase=Phase.LOADING)
        weights = load_weights(self._config, model, device, self._rank, device.world, on_progress)
        if device.is_gpu:
            tile_decoder(weights.decoder, device, lambda: self._pulse.beat(_LOAD_ALLOWANCE))
        self._pulse.beat(_LOAD_ALLOWANCE)
        return weights, resident_bytes(weights)


def _sentence(error: Exception) -> str:
    """For the operator: our own errors are sentences already."""
    return str(error) if isinstance(error, OctetError) else f"{type(error).__name__}: {error}"
