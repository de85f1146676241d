"""Decoding processes: a few long-lived ones, each with one job at a time, replaced when they fail.

Images and videos have processes of their own, so that a long video never keeps pictures waiting. A
process starts when it is first needed. What runs inside is api/media_worker.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from api.media.protocol import Decoded, DecodeJob, DecoderReady, Refused, frame_length, pack, unpack_reply
from engine.errors import ConfigError, RequestError
from engine.process import environment_for_child

logger = logging.getLogger(__name__)

WALL_SECONDS = {"image": 60.0, "video": 600.0}  # for one job, on a busy machine
_START_SECONDS = 60.0
_ABANDONED_SECONDS = 2.0  # a job nobody waits for may end by itself this long
_MEMORY = 4 << 30  # address space of one process
# What a process that died or talks nonsense looks like from here; a TimeoutError is an OSError.
_BROKEN = (EOFError, OSError, ValueError, msgspec.DecodeError, asyncio.TimeoutError)
_ROOT = Path(__file__).resolve().parents[2]
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "TZ", "SYSTEMROOT")


class DecoderPool:
    """`await start()`, then `await decode(job)` from any number of tasks, then `await close()`."""

    def __init__(self, model_folder: str, num_decoders: int = 0, max_waiting: int = 2048) -> None:
        """num_decoders of images; 0: half the cores. Videos get half as many more."""
        cores = os.cpu_count() or 2
        num_images = num_decoders or max(1, cores // 2)
        num_videos = max(1, num_images // 2)
        self._decoders = {
            "image": [_Decoder(model_folder, 1) for _ in range(num_images)],
            "video": [_Decoder(model_folder, max(1, cores // (2 * num_videos))) for _ in range(num_videos)],
        }
        self._idle: dict[str, asyncio.LifoQueue[_Decoder]] = {}
        for kind, decoders in self._decoders.items():
            self._idle[kind] = asyncio.LifoQueue()
            for decoder in reversed(decoders):  # last in, first out: the first one is used most
                self._idle[kind].put_nowait(decoder)
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._abandoned: set[asyncio.Task] = set()

    async def start(self) -> None:
        """Start one process, so that a missing font ends the server now. Raises ConfigError."""
        await self._decoders["image"][0].start()

    async def decode(self, job: DecodeJob) -> Decoded | Refused:
        """Raises RequestError 429 when too many jobs wait. A failed process is the job's fault: Refused."""
        if self._num_waiting >= self._max_waiting:
            raise RequestError("Too many images and videos wait to be decoded.", status=429, retry_after=1)
        self._num_waiting += 1
        try:
            decoder = await self._idle[job.kind].get()
        finally:
            self._num_waiting -= 1
        task = asyncio.create_task(self._run(decoder, job))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._abandon(task, job)
            raise

    async def close(self) -> None:
        for task in list(self._abandoned):
            task.cancel()
        await asyncio.gather(*self._abandoned, return_exceptions=True)
        await asyncio.gather(*(decoder.stop() for group in self._decoders.values() for decoder in group))

    async def _run(self, decoder: _Decoder, job: DecodeJob) -> Decoded | Refused:
        try:
            reply = await decoder.run(job)
            if not isinstance(reply, Decoded):
                _remove(job.output)
            return reply
        except BaseException:
            _remove(job.output)
            raise
        finally:
            self._idle[job.kind].put_nowait(decoder)

    def _abandon(self, task: asyncio.Task, job: DecodeJob) -> None:
        """Nobody waits for this job any more: let it end if that is soon, and drop what it wrote."""

        async def see_off() -> None:
            with suppress(asyncio.CancelledError, Exception):
                await asyncio.wait_for(task, _ABANDONED_SECONDS)
            _remove(job.output)

        watcher = asyncio.create_task(see_off())
        self._abandoned.add(watcher)
        watcher.add_done_callback(self._abandoned.discard)


class _Decoder:
    """One place for a process; the process may come and go."""

    def __init__(self, model_folder: str, threads: int) -> None:
        folder = os.path.abspath(model_folder) if model_folder else ""  # the process runs elsewhere
        self._command = [sys.executable, "-m", "api.media_worker", folder, str(threads), str(_MEMORY)]
        self._process: subprocess.Popen | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def start(self) -> None:
        """Raises ConfigError with the process' own sentence when it cannot work."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._spawn())
        try:
            reply = await asyncio.wait_for(self._receive(), _START_SECONDS)
        except _BROKEN:
            await self.stop()
            raise ConfigError("A media decoding process did not start; its words are above.") from None
        except BaseException:
            await self.stop()
            raise
        if not isinstance(reply, DecoderReady) or reply.error:
            await self.stop()
            raise ConfigError(getattr(reply, "error", "") or "A media decoding process answered wrongly.")

    async def run(self, job: DecodeJob) -> Decoded | Refused:
        try:
            if self._process is None or self._process.poll() is not None:
                await self.stop()
                await self.start()
            return await asyncio.wait_for(self._exchange(job), WALL_SECONDS[job.kind])
        except (asyncio.TimeoutError, TimeoutError):
            await self.stop()
            return Refused("took too long to decode; send a smaller or shorter one")
        except _BROKEN:
            status = await self.stop()
            logger.warning("a decoder of %ss ended with status %s and is replaced", job.kind, status)
            return Refused("could not be decoded; it is damaged or needs too much memory or time")
        except ConfigError as error:
            logger.error("%s", error)
            return Refused("cannot be decoded by this server at the moment", 503)
        except BaseException:
            await self.stop()  # cancelled in the middle of an exchange: the pipe is out of step
            raise

    async def stop(self) -> int | None:
        """End the process and wait for it; its exit status, None if there was none."""
        process, self._process = self._process, None
        if self._writer is not None:
            self._writer.close()
            self._reader = self._writer = None
        if process is None:
            return None
        process.kill()
        return await asyncio.to_thread(process.wait)

    def _spawn(self) -> socket.socket:
        """Start the process from this thread, since it dies with the thread that started it."""
        environment = environment_for_child(_PASSED_ON)
        environment |= {"PYTHONPATH": str(_ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        ours, theirs = socket.socketpair()
        with theirs:
            end = theirs.fileno()
            self._process = subprocess.Popen(self._command, stdin=end, stdout=end, env=environment, cwd=_ROOT)
        return ours

    async def _exchange(self, job: DecodeJob) -> Decoded | Refused:
        assert self._writer is not None
        self._writer.write(pack(job))
        await self._writer.drain()
        reply = await self._receive()
        if isinstance(reply, DecoderReady):
            raise ValueError("a second greeting")
        return reply

    async def _receive(self) -> Decoded | Refused | DecoderReady:
        """asyncio.IncompleteReadError, an EOFError, when the process ended."""
        assert self._reader is not None
        header = await self._reader.readexactly(4)
        return unpack_reply(await self._reader.readexactly(frame_length(header)))


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
