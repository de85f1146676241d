"""One encoded video to the frames that the sampling rules name, decoded in order, one in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import av
import numpy as np
from PIL import Image

from api.media.images import check_size
from api.media.refusal import MediaRefusal
from api.media.sampling import VideoFacts

# Playlist formats (hls, concat, dash) are left out on purpose: they name other files and addresses.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,gif,ogg,flv,asf,h264,hevc,ivf"
_CODECS = (
    "h264,hevc,vp8,vp9,libvpx,libvpx-vp9,av1,libdav1d,mpeg4,msmpeg4,msmpeg4v2,mpeg2video,mpeg1video,"
    "mjpeg,gif,theora,prores,h263,flv,wmv1,wmv2,wmv3,vc1,ffv1,png,rawvideo"
)
_NEIGHBOURS = 10  # how far a frame that cannot be decoded may be from the one that replaces it


class Video:
    """An opened video; facts first, then the frames, once."""

    def __init__(self, file: BinaryIO, threads: int = 1) -> None:
        """Raises MediaRefusal when it is no video in a supported format, or its frames are too large."""
        self._file = file
        self._threads = threads
        self._container = self._open()
        try:
            self._check_first_stream()
        except BaseException:
            self.close()
            raise

    def facts(self) -> VideoFacts:
        """From the container; frames that it does not count are counted by reading all packets."""
        stream = self._container.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        duration = _duration(self._container, stream)
        num_frames = stream.frames or self._count_packets()
        if num_frames <= 0:
            raise MediaRefusal("has no frames")
        if duration <= 0 and rate <= 0:
            raise MediaRefusal("does not say how long it is or how many frames it shows per second")
        if rate <= 0:
            rate = num_frames / duration
        return VideoFacts(num_frames, rate, duration if duration > 0 else num_frames / rate)

    def frames(self, indices: list[int]) -> Iterator[Image.Image]:
        """RGB frames for ascending `indices`, upright; a lost frame is replaced by its nearest neighbour."""
        wanted = iter(indices)
        want = next(wanted, None)
        last: tuple[int, Any] | None = None
        for index, frame in self._decode():
            while want is not None and want <= index:
                use_last = last is not None and want - last[0] < index - want
                yield _to_image(self._near(last if use_last else (index, frame), want))
                want = next(wanted, None)
            if want is None:
                return
            last = (index, frame)
        while want is not None:
            yield _to_image(self._near(last, want))
            want = next(wanted, None)

    def close(self) -> None:
        self._container.close()

    def _open(self) -> Any:
        self._file.seek(0)
        options = {"format_whitelist": _FORMATS, "codec_whitelist": _CODECS, "protocol_whitelist": "none"}
        try:
            return av.open(self._file, options=options, buffer_size=1 << 20, metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError):
            raise MediaRefusal("is not a video in a supported format, or it is damaged") from None

    def _check_first_stream(self) -> None:
        if not self._container.streams.video:
            raise MediaRefusal("has no video stream")
        context = self._container.streams.video[0].codec_context
        if context is None:
            raise MediaRefusal("is encoded in a way that is not supported")
        if context.width and context.height:
            check_size(context.width, context.height)

    def _count_packets(self) -> int:
        count = 0
        try:
            for packet in self._container.demux(self._container.streams.video[0]):
                count += packet.size > 0
        except (av.FFmpegError, OSError):
            pass  # a damaged end; what was read so far counts
        self._container.close()
        self._container = self._open()
        return count

    def _decode(self) -> Iterator[tuple[int, Any]]:
        """Numbered frames in display order; a packet that cannot be decoded counts as one lost frame."""
        stream = self._container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = self._threads
        index = 0
        packets = self._container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except (av.FFmpegError, OSError):
                return  # cut short
            if packet is None:
                return
            try:
                decoded = packet.decode()
            except (av.FFmpegError, OSError):
                index += 1
                continue
            for frame in decoded:
                yield index, frame
                index += 1

    @staticmethod
    def _near(numbered: tuple[int, Any] | None, want: int) -> Any:
        if numbered is None:
            raise MediaRefusal("has no frame that can be decoded")
        if abs(numbered[0] - want) > _NEIGHBOURS:
            raise MediaRefusal(f"is damaged or cut short: frame {want} cannot be decoded")
        return numbered[1]


def _duration(container: Any, stream: Any) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else 0.0


def _to_image(frame: Any) -> Image.Image:
    check_size(frame.width, frame.height)
    try:
        pixels = frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, ValueError):
        raise MediaRefusal("has pixels in a format that is not supported") from None
    # The rotation that a phone notes in the file, counter-clockwise in degrees.
    turns = round(frame.rotation / 90) % 4
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels)
