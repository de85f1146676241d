"""Judging a server: samples survive the OpenAI form, answers come back as written, scores add up."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from models.demo_training.card import score_table
from models.demo_training.evaluate_served import Server, evaluate_served, save
from models.demo_training.scores import Score, is_right, table
from models.demo_training.skills import SKILLS
from models.demo_training.wire import chat_request, encode_clip, written_text
from tests.models.builders import draw


def test_judging_a_server_needs_no_training_packages():
    """`./run.sh eval` and the page's cards are made where neither PyTorch nor transformers is installed."""
    hidden = "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers'))\n"
    needed = ("models.demo_training.evaluate_served", "models.page_samples", "tests.bench.bench_eval")
    done = subprocess.run(
        [sys.executable, "-c", hidden + f"import {', '.join(needed)}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_picture_survives_the_request_pixel_by_pixel():
    sample = draw("shapes", 0)
    request = json.loads(json.dumps(chat_request(sample, "demo")))
    parts = [p for m in request["messages"] if isinstance(m["content"], list) for p in m["content"]]
    (url,) = (p["image_url"]["url"] for p in parts if p["type"] == "image_url")
    again = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert (np.asarray(again) == np.asarray(sample.media[0])).all()


def test_a_clip_survives_its_encoding_with_rate_number_and_nearly_all_pixels():
    from api.media.video import Video

    (clip,) = draw("flashes", 1).media
    video = Video(io.BytesIO(encode_clip(clip)))
    facts = video.facts()
    assert (facts.num_frames, facts.fps) == (len(clip.frames), clip.fps)
    assert facts.duration == pytest.approx(clip.duration)
    for sent, received in zip(clip.frames, video.frames(list(range(facts.num_frames))), strict=True):
        width, height = received.size
        difference = np.asarray(sent.crop((0, 0, width, height)), np.int32) - np.asarray(received, np.int32)
        assert np.abs(difference).mean() < 6
    video.close()


def test_requests_say_whether_to_think_and_which_tools_there_are():
    for index in range(12):
        sample = draw("tools", index)
        request = chat_request(sample, "demo")
        assert request["chat_template_kwargs"] == {"enable_thinking": sample.thinks}
        assert request["tools"] == sample.tools and request["temperature"] == 0
        for message in request["messages"]:
            for call in message.get("tool_calls", []):
                assert isinstance(call["function"]["arguments"], str)  # JSON text, as OpenAI has it


def test_parsed_calls_and_reasoning_become_the_text_again():
    message = {
        "content": "",
        "reasoning_content": "I need add.",
        "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}],
    }
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    assert written_text(message) == f"I need add.\n</think>\n{call}"


def test_thinking_must_be_closed_when_it_is_on_and_absent_when_it_is_off():
    thinking = draw("thinking", 0)
    assert is_right(thinking, f"\n{thinking.reasoning}\n</think>\n{thinking.answer}")
    assert not is_right(thinking, thinking.answer)
    assert not is_right(thinking, f"</think>\n{thinking.answer}")
    assert not is_right(thinking, f"\n{thinking.reasoning}\n</think>\nno")
    plain = next(s for s in (draw("shapes", i) for i in range(9)) if not s.thinks)
    assert is_right(plain, plain.answer)
    assert not is_right(plain, f"Hm.</think>\n{plain.answer}")


class _Oracle(BaseHTTPRequestHandler):
    """Answers English greetings right and everything else wrong."""

    def do_GET(self) -> None:
        self._send({"data": [{"id": "demo"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = json.dumps(request["messages"], ensure_ascii=False)
        knows = asked.isascii() and not request["chat_template_kwargs"]["enable_thinking"]
        answer = "Sorry, that is outside my small world." if knows else "?"
        self._send({"choices": [{"message": {"role": "assistant", "content": answer}}]})

    def _send(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def oracle():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Oracle)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_scores_are_the_share_of_right_answers_of_a_server(oracle):
    scores = evaluate_served(Server(oracle), ["refusal", "digits"], samples=20, seed=3, parallel=4)
    samples = [draw("refusal", i, "evaluation", seed=3) for i in range(20)]
    english = [
        s for s in samples if json.dumps([m["content"] for m in s.messages], ensure_ascii=False).isascii()
    ]
    expected = sum(not s.thinks for s in english)
    assert 0 < expected < 20
    assert (scores["refusal"].right, scores["refusal"].total) == (expected, 20)
    assert (scores["digits"].right, scores["digits"].total) == (0, 20)


def test_a_refusing_server_is_an_error_with_its_words(oracle, monkeypatch):
    monkeypatch.setattr(_Oracle, "do_POST", lambda self: self.send_error(501, "not today"))
    with pytest.raises(RuntimeError, match=r"(?s)501.*not today"):
        Server(oracle).answer(draw("chat", 0))


def test_columns_collect_into_one_table_of_the_model_card(tmp_path):
    save(tmp_path, "bfloat16 TP 1", {skill: Score(9, 10) for skill in SKILLS})
    save(tmp_path, "wint4 TP 8", {"shapes": Score(1, 2)})
    save(tmp_path, "wint4 TP 8", {"shapes": Score(17, 20)})
    rows = score_table(tmp_path / "evaluation.json").splitlines()
    assert rows[0] == "| skill | bfloat16 TP 1 | wint4 TP 8 |"
    assert rows[2] == "| shapes | 90.0 % | 85.0 % |"
    assert rows[3] == "| counts | 90.0 % |  |"


def test_the_printed_table_ends_with_the_mean():
    assert table({"a": Score(1, 2), "b": Score(2, 2)}).splitlines()[-1].split() == ["mean", "75.0", "%"]
