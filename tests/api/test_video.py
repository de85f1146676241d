"""Which frames a video gives, what is written on them, and what happens when it is damaged."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from api.media.options import MediaOptions
from api.media.protocol import Decoded, Refused
from api.media.refusal import MediaRefusal
from api.media.sampling import VideoFacts, choose_frames, sample_by_count, sample_by_rate, timestamps
from api.media.timestamp import TimestampFont, format_timestamp
from api.media.video import Video
from engine.errors import ConfigError
from tests.api.media_builders import decode, encode_image, make_image, make_video
from tests.conftest import Rand

GREY = {"video_min_pixels": 3136, "video_max_pixels": 3136 * 4}


@pytest.mark.parametrize(
    "num_frames, target, mode, first",
    [
        (300, 20, "leading", [0, 15, 30, 45, 60, 75]),
        (300, 20, "middle", [7, 22, 37, 52, 67, 82]),
        (250, 20, "leading", [0, 12, 25, 37, 50, 62]),
        (250, 20, "middle", [5, 18, 30, 43, 55, 68]),
        (75, 16, "leading", [0, 4, 9, 14, 18, 23, 28, 32, 37, 42, 46, 51, 56, 60, 65, 70]),
        (75, 16, "middle", [1, 6, 11, 15, 20, 25, 29, 34, 39, 43, 48, 53, 57, 62, 67, 72]),
    ],
)
def test_target_sampling_follows_the_published_table(
    num_frames: int, target: int, mode: str, first: list[int]
) -> None:
    chosen = sample_by_count(num_frames, target, mode)  # type: ignore[arg-type]
    assert len(chosen) == target and chosen[: len(first)] == first


@pytest.mark.parametrize(
    "num_frames, fps, mode, first",
    [
        (300, 30, "leading", [0, 15, 30, 45]),
        (300, 30, "middle", [8, 22, 38, 52]),
        (250, 25, "leading", [0, 12, 25, 38, 50, 62]),
        (250, 25, "middle", [6, 19, 31, 44, 56, 69]),
    ],
)
def test_rate_sampling_follows_the_published_table(
    num_frames: int, fps: float, mode: str, first: list[int]
) -> None:
    chosen = sample_by_rate(VideoFacts(num_frames, fps, num_frames / fps), 2, mode)  # type: ignore[arg-type]
    assert len(chosen) == 20 and chosen[: len(first)] == first


def test_random_sampling_takes_one_frame_of_each_range_and_repeats_with_its_seed() -> None:
    chosen = sample_by_count(300, 20, "rand", seed=7)
    assert all(15 * index <= frame < 15 * (index + 1) for index, frame in enumerate(chosen))
    assert chosen == sample_by_count(300, 20, "rand", seed=7) != sample_by_count(300, 20, "rand", seed=8)


@pytest.mark.parametrize(
    "num_frames, fps, options, expected",
    [
        (75, 25, {}, 16),  # 6 frames at 2 per second: the lower bound
        (10, 25, {}, 10),  # fewer than the lower bound: all of them
        (300, 30, {}, 20),  # within the bounds: by rate
        (30_000, 30, {}, 180),  # 2000 frames: the upper bound
        (300, 30, {"video_target_frames": 33}, 33),
        (300, 30, {"video_fps": 5.0}, 50),
        (1, 30, {}, 1),
    ],
)
def test_the_number_of_frames(num_frames: int, fps: float, options: dict[str, float], expected: int) -> None:
    facts = VideoFacts(num_frames, fps, num_frames / fps)
    assert len(choose_frames(facts, MediaOptions(**options))) == expected  # type: ignore[arg-type]


def test_chosen_frames_are_in_order_and_inside_the_video(rand: Rand) -> None:
    for _ in range(300):
        num_frames, fps = rand.python.randint(1, 5000), rand.python.choice([1, 12.5, 24, 29.97, 30, 60])
        facts = VideoFacts(num_frames, fps, num_frames / fps * rand.python.choice([1, 1, 0.5, 3]))
        mode = rand.python.choice(["leading", "middle", "rand"])
        chosen = choose_frames(facts, MediaOptions(video_frames_sample=mode))
        assert 0 < len(chosen) <= 180 and chosen == sorted(chosen), (rand, facts)
        assert chosen[0] >= 0 and chosen[-1] < num_frames, (rand, facts)


@pytest.mark.parametrize(
    "seconds, written",
    [
        (0, "time: 00:00:00.00"),
        (61.25, "time: 00:01:01.25"),
        (3725.456, "time: 01:02:05.46"),
        (59.999, "time: 00:00:60.00"),
    ],
)
def test_timestamps_are_written_as_in_training(seconds: float, written: str) -> None:
    assert format_timestamp(seconds) == written


def test_a_timestamp_is_drawn_in_the_top_left_corner_only() -> None:
    frame = Image.new("RGB", (320, 240), (0, 0, 255))
    TimestampFont().draw(frame, 61.25)
    changed = np.any(np.asarray(frame) != (0, 0, 255), axis=-1)
    assert 20 < changed[:, : 320 * 2 // 3].any(axis=1).sum() < 40, "height of the text"
    assert changed[:40].any() and not changed[40:].any()
    colours = {tuple(colour) for colour in np.asarray(frame)[changed].tolist()}
    assert (0, 0, 0) in colours and (255, 255, 255) in colours


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (300, 5), (4000, 30)])
def test_a_timestamp_never_fails_for_the_size_of_the_frame(size: tuple[int, int]) -> None:
    TimestampFont().draw(Image.new("RGB", size), 1.5)


def test_the_checkpoints_font_wins_and_a_broken_one_stops_the_server(tmp_path: Path) -> None:
    packaged = TimestampFont(tmp_path).path
    own = tmp_path / "Roboto-Regular.ttf"
    own.write_bytes(packaged.read_bytes())
    assert TimestampFont(tmp_path).path == own
    own.write_bytes(b"no font")
    with pytest.raises(ConfigError, match="font"):
        TimestampFont(tmp_path)


@pytest.mark.parametrize(
    "container, codec",
    [("mp4", "mpeg4"), ("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9")],
)
def test_frames_are_the_ones_with_the_chosen_numbers(container: str, codec: str) -> None:
    video = Video(io.BytesIO(make_video(40, 10, container=container, codec=codec)))
    facts = video.facts()
    assert (facts.num_frames, round(facts.fps)) == (40, 10)
    assert facts.duration == pytest.approx(4.0, abs=0.11)
    wanted = [0, 3, 4, 4, 17, 39]
    levels = [np.asarray(frame).mean() for frame in video.frames(wanted)]
    video.close()
    for index, level in zip(wanted, levels, strict=True):
        assert abs(level - (16 + 2 * index)) < 1.5, f"frame {index} has level {level}"


def test_a_video_becomes_stamped_resized_frames(tmp_path: Path) -> None:
    reply, patches = decode(make_video(30, 10, (168, 112)), tmp_path, "video", video_min_pixels=3136)
    assert isinstance(reply, Decoded) and patches is not None
    frames, rows, columns = reply.grid
    assert (frames, rows, columns) == (16, 8, 12)
    assert reply.num_tokens == 16 * 8 * 12 // 8 and len(patches) == 16 * 8 * 12
    # The last window is far from the time: it shows the grey of the frame.
    chosen = sample_by_count(30, 16, "leading")
    levels = patches.reshape(16, 96, 588)[:, -4:].mean(axis=(1, 2))
    for index, level in zip(chosen, levels, strict=True):
        assert abs(level - (16 + 2 * index)) < 1.5, f"frame {index} has level {level}"
    # The first window holds the start of the time, in black and white.
    assert patches.reshape(16, 96, 588)[:, 0].max(axis=1).min() > 200


def test_an_odd_number_of_frames_ends_with_a_copy(tmp_path: Path) -> None:
    reply, patches = decode(make_video(7, 10), tmp_path, "video", **GREY)
    assert isinstance(reply, Decoded) and patches is not None
    assert reply.grid[0] == 8
    frames = patches.reshape(8, -1)
    assert (frames[7] == frames[6]).all() and (frames[6] != frames[5]).any()


def test_one_frame_is_a_video_of_two(tmp_path: Path) -> None:
    reply, _ = decode(make_video(1, 10), tmp_path, "video", **GREY)
    assert isinstance(reply, Decoded) and reply.grid[0] == 2


def test_an_animated_gif_is_a_video(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (60, 60), (255, 0, 0)), Image.new("RGB", (60, 60), (0, 0, 255))
    content = encode_image(red, "GIF", save_all=True, append_images=[blue, red, blue], duration=100)
    reply, _ = decode(content, tmp_path, "video", **GREY)
    assert isinstance(reply, Decoded) and reply.grid[0] == 4


def test_a_rotated_phone_video_is_shown_upright() -> None:
    video = Video(io.BytesIO(make_video(2, 10, (64, 48), rotation=90)))
    (frame,) = video.frames([0])
    video.close()
    assert frame.size == (48, 64)


def test_timestamps_use_the_duration() -> None:
    assert timestamps([0, 15, 30], VideoFacts(60, 30, 4.0)) == [0.0, 1.0, 2.0]


def cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


def make_empty_video() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        output.start_encoding()
    return buffer.getvalue()


def make_sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


BAD = {
    "empty": (b"", "not a video"),
    "text": (b"I am no video." * 100, "not a video"),
    "an image": (encode_image(make_image(64, 64)), "not a video"),
    "a playlist that names another file": (
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "not a video",
    ),
    "a list of files to join": (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a video"),
    "an mp4 without its index": (cut(make_video(30), 0.5), "not a video|damaged"),
    "no frames": (make_empty_video(), "not a video|no frames|no video"),
    "only sound": (make_sound(), "no video stream"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_video_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    content, reason = BAD[case]
    reply, _ = decode(content, tmp_path, "video")
    assert isinstance(reply, Refused), reply
    assert any(word in reply.message for word in reason.split("|")), reply.message
    assert str(tmp_path) not in reply.message


def test_a_video_that_is_cut_short_keeps_its_neighbours_or_says_so(tmp_path: Path) -> None:
    content = make_video(60, 10, container="matroska", codec="mpeg4")
    for share in (0.3, 0.6, 0.9, 0.99):
        reply, _ = decode(cut(content, share), tmp_path, "video", **GREY)
        assert isinstance(reply, Decoded | Refused)
    assert isinstance(decode(cut(content, 0.99), tmp_path, "video", **GREY)[0], Decoded)


def test_a_lost_frame_is_replaced_by_its_nearest_neighbour() -> None:
    video = Video(io.BytesIO(make_video(20, 10)))
    frames = list(video._decode())
    video.close()

    class Holes(Video):
        def __init__(self) -> None:
            pass

        def _decode(self):  # type: ignore[no-untyped-def]
            return iter([frame for frame in frames if frame[0] not in (5, 6, 7) and frame[0] < 15])

    levels = [np.asarray(frame).mean() for frame in Holes().frames([5, 6, 7, 19])]
    for level, source in zip(levels, (4, 8, 8, 14), strict=True):
        assert abs(level - (16 + 2 * source)) < 1.5, levels
    with pytest.raises(MediaRefusal, match="frame 30 cannot be decoded"):
        list(Holes().frames([30]))


def test_damaged_videos_are_answers_and_never_crashes(tmp_path: Path, rand: Rand) -> None:
    content = make_video(20, 10)
    for _ in range(25):
        damaged = bytearray(content)
        for _ in range(rand.python.randrange(1, 30)):
            damaged[rand.python.randrange(len(damaged))] = rand.python.randrange(256)
        reply, _ = decode(bytes(damaged), tmp_path, "video", **GREY)
        assert isinstance(reply, Decoded | Refused), rand


def test_a_video_beyond_the_context_is_refused_at_its_first_frame(tmp_path: Path) -> None:
    reply, _ = decode(make_video(30, 10), tmp_path, "video", max_tokens=100)
    assert isinstance(reply, Refused) and "tokens, but the context has room for 100" in reply.message


def test_the_same_video_has_the_same_hash_and_another_sampling_another(tmp_path: Path) -> None:
    content = make_video(40, 10)
    first, _ = decode(content, tmp_path, "video", **GREY)
    again, _ = decode(content, tmp_path, "video", **GREY)
    other, _ = decode(content, tmp_path, "video", video_frames_sample="middle", **GREY)
    assert isinstance(first, Decoded) and isinstance(again, Decoded) and isinstance(other, Decoded)
    assert first.content_hash == again.content_hash != other.content_hash
