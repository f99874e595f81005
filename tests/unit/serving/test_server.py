"""The server as clients meet it: streams over a websocket, the videos API, and what it refuses."""

import io
import json
import socket
import threading
import time
from contextlib import ExitStack, suppress

import av
import cv2
import httpx
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from afd_scale.data.storage import Location
from afd_scale.data.validate import load_beside
from afd_scale.data.worlds.drop import ToyPrompt
from afd_scale.evaluation.video import read_mp4
from afd_scale.generation.generate import Clock
from afd_scale.serving import hall, seat, server
from afd_scale.serving.tape import Tape
from afd_scale.serving.viewer import AHEAD_CHUNKS, Limits, Patience
from tests.live_server import Watcher, live_server, studio_of, until
from tests.students import TOY, save_student
from tests.tools import call_tool

TOKEN = "correct-horse-battery"
TEXTS = [prompt.sentence for prompt in ToyPrompt.every()[:3]]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "student"
    save_student(folder, TOY)
    return folder


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """A studio; the tests below change how slow it is."""
    return studio_of(source, tmp_path_factory.mktemp("studio"))


def test_a_stream_may_begin_with_a_chunk_of_another_length(tmp_path):
    save_student(tmp_path / "student", TOY, chunk_frames=2, first_chunk_frames=1)
    studio = studio_of(tmp_path / "student", tmp_path / "studio")
    sampler, text = studio.sampler.config, studio.embed(TEXTS[0])
    assert (sampler.window_frames, sampler.sink_frames) == (5, 1), "it stays in the window"
    frames = studio.stream(lambda chunk: text, 0, 40, Clock(studio.device), lambda: None)
    assert [len(chunk) for chunk in frames] == [3, *[studio.chunk_frames] * 6, 1]
    assert studio.chunk_frames == 6


@pytest.fixture
def studio(made):
    made.seconds, made.chunks = 0.0, 0
    return made


@pytest.fixture
def serve(studio, tmp_path):
    def start(**options):
        return live_server(studio, tmp_path, **options)

    return start


def is_free(url):
    return httpx.get(f"{url}/v1/server").json()["is_free"]


def viewers(url):
    return httpx.get(f"{url}/v1/server").json()["viewers"]


def asked(url, files=None, **fields):
    form = {name: (None, str(value)) for name, value in fields.items()}
    return httpx.post(f"{url}/v1/videos", files=form | (files or {}))


def finished(url, answer):
    video = f"{url}/v1/videos/{answer.json()['id']}"
    until(lambda: httpx.get(video).json()["status"] in ("completed", "failed"))
    return httpx.get(video).json()


# -- streams ----------------------------------------------------------------------------------------------------------


def test_chunks_come_while_they_are_made(serve):
    with serve() as url, Watcher(url) as viewer:
        viewer.tell(start={"prompt": TEXTS[0], "seconds": 3, "seed": 5})
        assert viewer.hear_of("ended") == "it is whole"
        assert viewer.notes[0] == {"begun": {"seed": 5}}
        assert [chunk["chunk"] for chunk in viewer.chunks] == list(range(8))
        pictures = [
            cv2.imdecode(np.frombuffer(part, np.uint8), -1) for chunk in viewer.chunks for part in chunk["parts"]
        ]
        assert {picture.shape for picture in pictures} == {(16, 16)}
        assert (len(pictures), viewer.chunks[0]["type"]) == (24, "image/png")
        figures = viewer.chunks[-1]["figures"]
        assert figures["denoising"] > figures["with_decoding"] > 0
        assert figures["memory_bytes"] > 2**20
        viewer.tell(save=True)
        saved = viewer.hear()
        assert (saved["saved"], saved["type"]) == (3.0, "video/mp4")
        with av.open(io.BytesIO(saved["parts"][0])) as container:
            video = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert np.abs(video[..., 0].astype(int) - np.stack(pictures)).mean() < 12, "H.264 of the same frames"


def test_a_slow_viewer_is_waited_for(serve, studio):
    with serve() as url, Watcher(url) as viewer:
        viewer.tell(start={"prompt": TEXTS[0]})
        for shown in (0, 1, 2, 3):
            viewer.tell(shown=shown)
            until(lambda shown=shown: studio.chunks == shown + AHEAD_CHUNKS)
            time.sleep(0.1)
            assert studio.chunks == shown + AHEAD_CHUNKS


def test_a_prompt_changes_the_pictures_that_follow(serve):
    with serve() as url:
        videos = []
        for change in (False, True):
            with Watcher(url) as viewer:
                viewer.tell(start={"prompt": TEXTS[0], "seconds": 3, "seed": 5})
                while len(viewer.chunks) < AHEAD_CHUNKS:
                    viewer.hear()
                if change:
                    viewer.tell(prompt=TEXTS[1])
                viewer.tell(shown=AHEAD_CHUNKS)
                viewer.hear_of("ended")
                videos.append(viewer.chunks)
        same = [ours["parts"] == theirs["parts"] for ours, theirs in zip(*videos, strict=True)]
        assert same == [True] * AHEAD_CHUNKS + [False] * (8 - AHEAD_CHUNKS)
        assert [chunk["prompt"] for chunk in videos[1]] == [TEXTS[0]] * AHEAD_CHUNKS + [TEXTS[1]] * (8 - AHEAD_CHUNKS)


def test_a_viewer_who_leaves_frees_the_worker_before_the_next_pass(serve, studio):
    studio.seconds = 2.0  # a chunk has four
    with serve() as url:
        with Watcher(url) as viewer:
            viewer.tell(start={"prompt": TEXTS[0]})
            viewer.hear_of("place")
            until(lambda: not is_free(url))
        assert until(lambda: is_free(url)) < 5.0
        assert studio.chunks == 0
        with Watcher(url) as viewer:
            viewer.tell(start={"prompt": TEXTS[0]})
            until(lambda: not is_free(url))
            viewer.tell(stop=True)
            assert viewer.hear_of("ended") == "it was stopped"
            assert until(lambda: is_free(url)) < 5.0


def test_a_connection_that_breaks_without_a_word_frees_the_worker(serve, studio):
    studio.seconds = 2.0
    with serve() as url:
        viewer = Watcher(url)
        viewer.tell(start={"prompt": TEXTS[0]})
        until(lambda: not is_free(url))
        viewer.socket.socket.shutdown(socket.SHUT_RDWR)
        assert until(lambda: is_free(url)) < 5.0
        viewer.close()


def test_twenty_at_once_are_served_or_told_to_wait(serve, studio):
    """Eight may watch or wait; one of them is served."""
    studio.seconds = 1.0
    with serve() as url:
        viewers = [Watcher(url) for _ in range(20)]
        for viewer in viewers:
            with suppress(ConnectionClosed):  # one who is refused need not have asked
                viewer.tell(start={"prompt": TEXTS[0], "seconds": 0.5})
        refused = [note for viewer in viewers if "closed" in (note := viewer.hear())]
        assert len(refused) == 12
        assert {note["closed"] for note in refused} == {"8 watch or wait already, as many as may: try again later"}
        seated = [viewer for viewer in viewers if "closed" not in viewer.notes[0]]
        studio.seconds = 0.0
        places = sorted(viewer.hear_of("place") for viewer in seated)
        assert places == list(range(8))
        for viewer in seated:
            assert viewer.hear_of("ended") == "it is whole"
        for viewer in viewers:
            viewer.close()
        until(lambda: httpx.get(f"{url}/v1/server").json()["viewers"] == 0)
        with Watcher(url) as viewer:
            viewer.tell(start={"prompt": TEXTS[0], "seconds": 0.5})
            assert viewer.hear_of("ended") == "it is whole"


def test_the_silent_take_no_seats(serve, monkeypatch):
    monkeypatch.setattr(hall, "_MOST_STRANGERS", 3)
    with serve(limits=Limits(viewers=1)) as url, ExitStack() as open_ones:
        silent = [open_ones.enter_context(Watcher(url)) for _ in range(4)]
        assert silent[0].hear_of("closed") == "nothing was asked for in time", "the oldest goes for the next"
        assert viewers(url) == 0
        with Watcher(url) as viewer:
            viewer.tell(start={"prompt": TEXTS[0], "seconds": 0.5})
            assert viewer.hear_of("ended") == "it is whole"
        silent[3].tell(start={"prompt": TEXTS[0], "seconds": 0.5})
        assert silent[3].hear_of("ended") == "it is whole"


def test_silent_connections_keep_nobody_out(serve, monkeypatch):
    """Whether they never asked for anything, or not any more."""
    monkeypatch.setattr(server, "_MOST_CONNECTIONS", 8)
    monkeypatch.setattr(server, "_MOST_SILENT", 4)
    with serve() as url, ExitStack() as open_ones:
        port = int(url.rpartition(":")[2])
        for number in range(12):
            connection = open_ones.enter_context(socket.create_connection(("127.0.0.1", port)))
            if number % 2:
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert connection.recv(20).startswith(b"HTTP/1.1 200")
            connection.sendall(b"GET")
        assert httpx.get(f"{url}/healthz").status_code == 200


def test_the_silent_are_not_waited_for(serve, monkeypatch):
    monkeypatch.setattr(hall, "_HELLO_SECONDS", 0.1)
    with serve() as url, Watcher(url) as viewer:
        assert viewer.hear_of("closed") == "nothing was asked for in time"


def test_a_viewer_whose_stream_is_over_makes_room(serve):
    with serve(limits=Limits(viewers=2)) as url, Watcher(url) as first, Watcher(url) as second, Watcher(url) as third:
        for viewer in (second, first):
            viewer.tell(start={"prompt": TEXTS[0], "seconds": 0.5})
            assert viewer.hear_of("ended") == "it is whole"
        assert viewers(url) == 0
        third.tell(start={"prompt": TEXTS[0]})
        third.hear_of("chunk")
        assert second.hear_of("closed").startswith("the stream is over"), "it has been for the longest"
        first.tell(start={"prompt": TEXTS[1]})
        assert first.hear_of("place") == 1, "one who stays keeps the seat"
        with Watcher(url) as fourth:
            fourth.tell(start={"prompt": TEXTS[0]})
            assert fourth.hear_of("closed") == "2 watch or wait already, as many as may: try again later"


def test_a_full_line_is_said(serve, studio):
    studio.seconds = 2.0
    with serve(queue=1) as url, Watcher(url) as first, Watcher(url) as second, Watcher(url) as third:
        first.tell(start={"prompt": TEXTS[0]})
        first.hear_of("place")
        until(lambda: not is_free(url))
        second.tell(start={"prompt": TEXTS[0]})
        assert second.hear_of("place") == 1
        third.tell(start={"prompt": TEXTS[0]})
        assert third.hear_of("ended") == "1 wait already, as many as may: try again later"
        answer = asked(url, prompt=TEXTS[0])
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
        first.tell(start={"prompt": TEXTS[1]})  # a new one, behind the other
        assert second.hear_of("place") == 0


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ("no json", "Expecting value"),
        ("[]", "valid dictionary"),
        ('{"start": {"prompt": ""}}', "start.prompt"),
        ('{"start": {"prompt": "a", "seconds": 1e400}}', "start.seconds"),
        ('{"start": {"prompt": "a", "seconds": 1e308}}', "start.seconds (1e+308)"),
        ("[" * 20_000, "nested"),
        ('{"token": "\\ud800"}', "half a character"),
        ('{"start": {"prompt": "a", "seed": -1}}', "start.seed"),
        ('{"shown": -1}', "shown (-1)"),
        ('{"teach": true}', "teach (True) is not a known key"),
        (json.dumps({"prompt": "a" * 5000}), "prompt ("),
        (b"\x00\x01", "must be a text"),
    ],
)
def test_messages_that_are_none(serve, message, why):
    with serve() as url, Watcher(url) as viewer:
        viewer.socket.send(message)
        note = viewer.hear()
        assert why in note["closed"]
        assert "\n" not in note["closed"]
        with pytest.raises(ConnectionClosed):
            viewer.hear()
        assert is_free(url)


def test_a_message_that_is_too_large_ends_the_connection(serve):
    with serve() as url, Watcher(url) as viewer:
        viewer.socket.send("x" * 40_000)
        with pytest.raises(ConnectionClosed):
            viewer.hear()
        until(lambda: httpx.get(f"{url}/v1/server").json()["viewers"] == 0)


def test_a_prompt_that_cannot_be_had_is_said(serve):
    with serve() as url, Watcher(url) as viewer:
        viewer.tell(start={"prompt": "word " * 20})
        assert "at most 16 words" in viewer.hear_of("refused")
        viewer.hear_of("ended")
        viewer.tell(save=True)
        assert viewer.hear_of("refused") == "there is nothing to save yet"


def test_what_is_kept_of_a_stream_is_bounded(serve):
    with serve(limits=Limits(keep_seconds=1.0)) as url, Watcher(url) as viewer:
        viewer.tell(start={"prompt": TEXTS[0], "seconds": 3})
        viewer.hear_of("ended")
        viewer.tell(save=True)
        assert viewer.hear_of("saved") == 1.0


@pytest.fixture
def held(monkeypatch):
    """Mp4s are made when this is set, and of many bytes."""
    made = threading.Event()

    def mp4(pictures, fps):
        assert made.wait(20)
        return bytes(40 * 2**20)

    monkeypatch.setattr(seat, "mp4_of", mp4)
    yield made
    made.set()


def test_a_stream_goes_on_while_it_is_saved(serve, held):
    with serve() as url, Watcher(url) as viewer:
        viewer.tell(start={"prompt": TEXTS[0]})
        for shown in (1, 2):
            assert viewer.hear_of("chunk", shows=False) == shown - 1
        viewer.tell(save=True, shown=2)
        kept = sum(len(chunk["parts"]) for chunk in viewer.chunks)
        for number in range(2, 6):
            assert viewer.hear_of("chunk") == number
        viewer.tell(save=True)
        assert viewer.hear_of("refused") == "an mp4 is being saved already"
        viewer.tell(start={"prompt": TEXTS[1], "seconds": 0.5})
        assert viewer.hear_of("ended") == "it is whole"
        held.set()
        assert viewer.hear_of("saved") == round(kept / 8, 1), "what was there when it was asked for"


def test_a_large_mp4_holds_up_no_chunks(serve, studio, held):
    held.set()
    with serve() as url, Watcher(url) as viewer:
        viewer.tell(start={"prompt": TEXTS[0]})
        while len(viewer.chunks) < AHEAD_CHUNKS:
            viewer.hear()
        viewer.tell(save=True)
        time.sleep(0.3)  # the way to the viewer is full
        viewer.tell(shown=AHEAD_CHUNKS)
        until(lambda: studio.chunks == 2 * AHEAD_CHUNKS)
        time.sleep(0.3)  # the next one has its pictures
        heard = [viewer.hear()]
        while heard[-1].get("piece", 0) + 1 < heard[-1].get("pieces", 2):
            heard.append(viewer.hear())
        assert sum(len(piece["parts"][0]) for piece in heard if "saved" in piece) == 40 * 2**20
        assert AHEAD_CHUNKS in [message.get("chunk") for message in heard], "before the last piece"


def test_one_who_takes_nothing_loses_the_seat(serve, held):
    held.set()
    with serve(limits=Limits(patience=Patience(stall_seconds=0.3))) as url, Watcher(url) as viewer:
        viewer.tell(start={"prompt": TEXTS[0]})
        while not viewer.chunks:
            viewer.hear()
        viewer.tell(save=True)
        until(lambda: viewers(url) == 0)
        viewer.socket.socket.shutdown(socket.SHUT_RDWR)


def test_a_viewer_who_cannot_be_served_is_told(serve, monkeypatch, caplog):
    def fail(tape, frames):
        raise ValueError("no memory\nfor this")

    monkeypatch.setattr(Tape, "pictures", fail)
    with serve() as url, Watcher(url) as viewer:
        viewer.tell(start={"prompt": TEXTS[0]})
        assert viewer.hear_of("closed") == "the server failed: its log says why"
        with pytest.raises(ConnectionClosed) as closed:
            viewer.hear()
        assert closed.value.rcvd.code == 1011
        until(lambda: is_free(url) and viewers(url) == 0)
    assert "a viewer could not be served: ValueError: no memory for this" in caplog.messages


def test_what_was_not_sent_was_not_shown(serve, studio, monkeypatch):
    """Whatever the viewer says, no more is made than may be unsent."""
    sends, pictures = threading.Event(), Tape.pictures
    monkeypatch.setattr(Tape, "pictures", lambda tape, frames: sends.wait(20) and pictures(tape, frames))
    with serve() as url, Watcher(url) as viewer:
        viewer.tell(start={"prompt": TEXTS[0]})
        for made in (1, AHEAD_CHUNKS):
            until(lambda made=made: studio.chunks >= made)
            viewer.tell(shown=10**6)
        time.sleep(0.2)
        viewer.tell(shown=10**6)
        time.sleep(0.2)
        assert studio.chunks == AHEAD_CHUNKS
        sends.set()
        viewer.tell(stop=True)
        viewer.hear_of("ended", shows=False)


def test_a_stream_ends_when_nothing_is_shown(serve):
    with serve(limits=Limits(patience=Patience(stall_seconds=0.2))) as url, Watcher(url) as viewer:
        viewer.tell(start={"prompt": TEXTS[0]})
        assert viewer.hear_of("ended", shows=False) == "nothing was shown for 0.2 s"
        assert len(viewer.chunks) == AHEAD_CHUNKS


# -- the videos API ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asks", "says", "seconds"), [({}, (), "1.5"), ({"seconds": 3}, ("--window", "4"), "3")])
def test_a_video_is_the_one_that_the_generator_makes(serve, source, tmp_path, asks, says, seconds):
    says = (*says, "--seconds", seconds, "--prompt", TEXTS[0], "--seed", "7")
    done = call_tool("generate", source, *says, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    expected, fps = read_mp4(next((tmp_path / "out").glob("*.mp4")))
    with serve() as url:
        answer = asked(url, prompt=TEXTS[0], model="toy", seed=7, size="16x16", **asks)
        assert answer.json()["status"] in ("queued", "in_progress", "completed")
        video = finished(url, answer)
        assert (video["status"], video["progress"], video["seconds"], video["seed"]) == ("completed", 100, seconds, 7)
        content = httpx.get(f"{url}/v1/videos/{video['id']}/content")
        assert content.headers["content-type"] == "video/mp4"
        (tmp_path / "got.mp4").write_bytes(content.content)
        frames, rate = read_mp4(tmp_path / "got.mp4")
        assert rate == fps == 8
        assert frames.shape == expected.shape
        assert np.abs(frames.astype(int) - expected).mean() < 0.5, "x264 itself does not always repeat its bits"
        assert httpx.delete(f"{url}/v1/videos/{video['id']}").json()["deleted"]
        assert httpx.get(f"{url}/v1/videos/{video['id']}").status_code == 404
        assert not list(tmp_path.glob("video_*"))


def test_a_repeated_request_is_given_the_same_video(serve):
    with serve() as url:

        def ask(key, prompt):
            return httpx.post(f"{url}/v1/videos", json={"prompt": prompt}, headers={"Idempotency-Key": key})

        first, again, other = ask("a", TEXTS[0]), ask("a", TEXTS[0]), ask("b", TEXTS[0])
        assert first.json()["id"] == again.json()["id"] != other.json()["id"]
        assert ask("a", TEXTS[1]).json()["error"]["message"].startswith("idempotency-key (a) must be of one request")


@pytest.mark.parametrize(
    ("fields", "status", "why"),
    [
        ({}, 400, "prompt must be given"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": TEXTS[0], "model": "sora"}, 400, "model (sora) must be toy"),
        ({"prompt": TEXTS[0], "size": "1280x720"}, 400, "size (1280x720) must be 16x16"),
        ({"prompt": TEXTS[0], "seconds": "60"}, 400, "seconds (60) must be at most 5"),
        ({"prompt": TEXTS[0], "seconds": "nan"}, 400, "seconds (nan)"),
        ({"prompt": TEXTS[0], "seed": "-1"}, 400, "seed (-1)"),
        ({"prompt": TEXTS[0], "input_reference": "x"}, 400, "input_reference (x) is not a known key"),
        ({"prompt": "a" * 70_000}, 413, "body: it must have at most 65536 bytes"),
    ],
)  # fmt: skip
def test_requests_that_are_refused(serve, fields, status, why):
    with serve() as url:
        answer = asked(url, **fields) if fields else httpx.post(f"{url}/v1/videos", json={})
        assert answer.status_code == status
        message = answer.json()["error"]["message"]
        assert message.startswith(why)
        assert "\n" not in message
        assert is_free(url)


def test_a_body_has_a_bounded_size_whatever_it_says(serve):
    def endless():
        for _ in range(1000):
            yield b"x" * 1000

    with serve() as url:
        answer = httpx.post(f"{url}/v1/videos", content=endless(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        answer = asked(url, prompt=TEXTS[0], files={"input_reference": ("a.png", b"x", "image/png")})
        assert answer.status_code == 400
        assert httpx.post(f"{url}/v1/videos", content=b"x").status_code == 415


def test_a_client_who_goes_early_is_no_failure(serve, caplog):
    with serve() as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            head = "POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 99\r\n\r\n{{".encode())
            time.sleep(0.1)
        time.sleep(0.1)
        assert is_free(url)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_videos_that_cannot_be_made_say_why(serve):
    with serve() as url:
        video = finished(url, asked(url, prompt="word " * 20))
        assert (video["status"], video["error"]["code"]) == ("failed", "generation_failed")
        assert "at most 16 words" in video["error"]["message"]
        assert httpx.get(f"{url}/v1/videos/{video['id']}/content").status_code == 409
        assert httpx.get(f"{url}/v1/videos/video_0/content").status_code == 404


def test_finished_videos_are_kept_for_a_while(serve, tmp_path):
    with serve(keeps=2) as url:
        videos = [finished(url, asked(url, prompt=TEXTS[0]))["id"] for _ in range(4)]
        asked(url, prompt=TEXTS[0])
        assert [httpx.get(f"{url}/v1/videos/{video}").status_code for video in videos] == [404, 404, 200, 200]
        until(lambda: is_free(url))
        assert len(list(tmp_path.glob("video_*.mp4"))) == 3


def test_a_student_is_the_next_ones_teacher(serve, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    with serve() as url:
        done = call_tool(
            "make_shards", "--teacher", "http", "--url", f"{url}/v1", "--model", "toy", "--source", tmp_path / "paid",
            "--prompts", tmp_path / "prompts.txt", "--videos-per-prompt", "2", "--request", "seed={index}",
            "--size", "16x16", "--frames", "12", "--fps", "8", "--poll-seconds", "0.05", "--out", tmp_path / "shards",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "paid").glob("*.mp4"))) == 6
    facts, listed, _ = load_beside(Location(str(tmp_path / "shards"), tmp_path / "cache", "teacher"))
    assert facts.latent_shape == (4, 48, 4, 4)
    assert len(listed) == 3


# -- who is let in ----------------------------------------------------------------------------------------------------


def test_a_token_is_wanted_of_all(serve):
    with serve(token=TOKEN) as url:
        assert httpx.get(f"{url}/").status_code == 200
        assert httpx.get(f"{url}/healthz").json() == {"ok": True, "wants_token": True}
        for path in ("/v1/server", "/v1/videos/x", "/nothing"):
            for headers in ({}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": f"Basic {TOKEN}"}):
                answer = httpx.get(f"{url}{path}", headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "authentication_error")
        assert httpx.get(f"{url}/v1/server", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
        for told in ({}, {"token": "wrong"}):
            with Watcher(url) as viewer:
                viewer.tell(**told, start={"prompt": TEXTS[0]})
                assert viewer.hear_of("closed") == "token: this server wants another one"
        with Watcher(url) as viewer:
            viewer.tell(token=TOKEN, start={"prompt": TEXTS[0], "seconds": 0.5})
            assert viewer.hear_of("ended") == "it is whole"


def test_pages_of_others_may_not_ask(serve):
    with serve() as url:
        for origin in ("http://evil.com", "http://[", "null"):
            evil = {"Origin": origin}
            assert httpx.post(f"{url}/v1/videos", json={"prompt": TEXTS[0]}, headers=evil).status_code == 403
        assert httpx.get(f"{url}/", headers={"Host": "evil.com"}).status_code == 403
        stream = f"{url.replace('http', 'ws')}/v1/stream"
        with pytest.raises(InvalidStatus, match="403"), connect(stream, origin="http://evil.com"):
            pass


def test_the_page_needs_nothing_from_elsewhere(serve):
    with serve() as url:
        answer = httpx.get(url)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "://" not in answer.text
