"""A teacher behind HTTP, against a real server: nothing is asked twice, whatever goes wrong."""

import json
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip, Reject
from afd_scale.data.teachers.exchange import Endpoint, Exchange
from afd_scale.data.teachers.http import HttpTeacher
from afd_scale.data.teachers.journal import ASKED, ASKING, Journal
from tests.distributed.processes import forking, run
from tests.video_server import VideoServer
from tests.videos import moving_bar, write_video

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

TOOL = Path(__file__).parents[3] / "tools" / "make_shards.py"
KEY = "sk-very-secret"


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_video(tmp_path_factory.mktemp("video") / "a.mp4", moving_bar(16, 32, 32)).read_bytes()


@pytest.fixture
def serve(video: bytes) -> Iterator[Callable[..., VideoServer]]:
    servers: list[VideoServer] = []

    def start(**settings: Any) -> VideoServer:
        servers.append(VideoServer(video, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def teacher(server: VideoServer | str, folder: Path, prompts: int = 4, **settings: Any) -> HttpTeacher:
    table = folder / "prompts.txt"
    table.write_text("".join(f"bar {number}\n" for number in range(prompts)))
    videos_per_prompt = settings.pop("videos_per_prompt", 1)
    fast = {"poll_seconds": 0.02, "backoff_seconds": 0.02, "attempts": 4}
    url = server if isinstance(server, str) else server.url
    endpoint = Endpoint(url, "m", **{**fast, **settings})
    return HttpTeacher(endpoint, table, folder / "kept", videos_per_prompt=videos_per_prompt, key=KEY)


def reasons(found: HttpTeacher) -> list[str]:
    return [clip.reason for clip in found.clips() if isinstance(clip, Reject)]


def videos(found: HttpTeacher) -> list[str]:
    return [clip.prompt for clip in found.clips() if isinstance(clip, Clip)]


def test_every_video_is_asked_for_once_and_kept(
    serve: Callable[..., VideoServer], tmp_path: Path, video: bytes
) -> None:
    server = serve(polls=2)
    found = teacher(server, tmp_path, videos_per_prompt=2, concurrency=3, request={"seed": "{index}", "seconds": "8"})
    seen: list[tuple[int, int]] = []
    found.collect(lambda done, total: seen.append((done, total)))
    clips = found.clips()
    assert [(clip.prompt, clip.index) for clip in clips if isinstance(clip, Clip)] == [
        (f"bar {number}", index) for number in range(4) for index in range(2)
    ]
    assert set(server.created.values()) == {2}
    assert 1 < server.most_at_once <= 3
    assert seen[-1] == (8, 8)
    for clip in clips:
        assert (tmp_path / "kept" / clip.video).read_bytes() == video
    assert sum('name="seed"\r\n\r\n1\r\n' in body for body in server.bodies) == 4
    found.collect()
    assert sum(server.created.values()) == 8, "nothing is left to ask for"
    listed = (tmp_path / "kept" / "videos.jsonl").read_text().splitlines()
    assert len(listed) == 8


@pytest.mark.parametrize("lists", [True, False])
def test_what_goes_wrong_is_tried_again_and_nothing_is_paid_twice(
    serve: Callable[..., VideoServer], tmp_path: Path, lists: bool
) -> None:
    server = serve(lists=lists)
    server.told = {"bar 0": ["429", "500"], "bar 1": ["drop"], "bar 2": ["vanish"], "bar 3": ["503", "429"]}
    found = teacher(server, tmp_path)
    found.collect()
    assert set(server.created.values()) == {1}
    if lists:  # the server says what it accepted
        assert videos(found) == [f"bar {number}" for number in range(4)]
        return
    assert videos(found) == ["bar 0", "bar 3"]
    assert len(reasons(found)) == 2
    assert all("may have been paid for" in reason for reason in reasons(found))
    found.collect()
    assert sum(server.created.values()) == 3, "bar 1 was never accepted, and nobody can know"
    again = teacher(server, tmp_path, ask_again=True)
    again.collect()
    assert videos(again) == [f"bar {number}" for number in range(4)]


def test_bad_answers_about_one_video(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server = serve()
    server.told = {"bar 0": ["400"]}
    server.outcome = {"bar 1": "failed", "bar 2": "html", "bar 3": "cut", "bar 4": "expired"}
    found = teacher(server, tmp_path, prompts=5)
    found.collect()
    assert videos(found) == ["bar 3"]
    assert [reason.partition(":")[0] for reason in reasons(found)] == [
        "the teacher refused the prompt", "the teacher made no video",
        "the teacher's file cannot be used, it must be a readable video",
        "the server must still have the teacher's video",
    ]  # fmt: skip
    asked = len(server.bodies)
    server.outcome["bar 4"] = ""
    found.collect()
    assert len(server.bodies) == asked, "a refusal is final, and what was accepted is looked for again"
    assert videos(found) == ["bar 3", "bar 4"]
    again = teacher(server, tmp_path, prompts=5, ask_again=True)
    server.outcome = {"bar 2": "html"}
    again.collect()
    assert videos(again) == ["bar 0", "bar 1", "bar 3", "bar 4"]
    assert server.created == Counter({"bar 0": 1, "bar 1": 2, "bar 2": 2, "bar 3": 1, "bar 4": 1})
    assert len(set(server.repeats)) == 7, "a video that is asked for anew has a key of its own"


@pytest.mark.parametrize("fault", ["vanish", "accepted 500", "slow"])
def test_accepted_and_not_answered_is_found_in_the_list(
    serve: Callable[..., VideoServer], tmp_path: Path, fault: str
) -> None:
    server = serve()
    server.page = 1
    server.shows = lambda prompt: f" {prompt.upper()}"
    server.told = {f"bar {number}": [fault] for number in (1, 2)}
    found = teacher(server, tmp_path, prompts=4, exchange_seconds=0.3)
    found.collect()
    assert set(server.created.values()) == {1}
    assert len(videos(found)) == 4


def test_a_list_that_shows_other_prompts_is_not_believed(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server = serve()
    server.shows = lambda prompt: prompt if prompt == "bar 0" else "a video"  # it improves some
    server.told = {"bar 2": ["vanish"]}
    found = teacher(server, tmp_path, prompts=3, concurrency=1)
    found.collect()
    assert set(server.created.values()) == {1}
    assert videos(found) == ["bar 0", "bar 1"]
    server = serve()  # and of a first request there is nothing to compare with
    server.shows = lambda prompt: "a video"
    server.told = {"bar 0": ["vanish"]}
    (tmp_path / "first").mkdir()
    found = teacher(server, tmp_path / "first", prompts=1)
    found.collect()
    assert server.created["bar 0"] == 1
    assert "may have been paid for" in reasons(found)[0]


def test_two_videos_of_a_prompt_are_not_taken_for_each_other(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server = serve()
    server.told = {"bar 0": ["", "vanish"]}
    found = teacher(server, tmp_path, prompts=1, videos_per_prompt=2, concurrency=1)
    found.collect()
    assert server.created["bar 0"] == 2
    ids = {json.loads(line).get("id") for line in (tmp_path / "kept" / "journal.jsonl").read_text().splitlines()}
    assert len(ids - {None}) == 2


def test_an_earlier_jobs_video_of_the_prompt_is_not_taken(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server = serve()
    server.add_earlier("video_0", "bar 0", 7200)
    server.add_earlier("video_00", "bar 1", 7200)
    server.told = {"bar 0": ["vanish"], "bar 1": ["drop"]}
    found = teacher(server, tmp_path, prompts=2)
    found.collect()
    assert videos(found) == ["bar 0"], "and of the other nobody can tell"
    assert "may have been paid for" in reasons(found)[0]
    assert server.created == Counter({"bar 0": 1})


def test_prompts_that_differ_in_case_alone_each_get_their_own(
    serve: Callable[..., VideoServer], tmp_path: Path
) -> None:
    server = serve()
    found = teacher(server, tmp_path, concurrency=2)
    found.prompts.write_text("bar 0\nBar 0\nBAR 0\n")
    server.told = {"bar 0": ["vanish"], "Bar 0": ["vanish"], "BAR 0": ["vanish"]}
    found.collect()
    assert len(videos(found)) == 3
    assert set(server.created.values()) == {1}
    ids = {json.loads(line).get("id") for line in (tmp_path / "kept" / "journal.jsonl").read_text().splitlines()}
    assert len(ids - {None}) == 3


def test_a_video_that_cannot_be_polled_is_not_paid_for_again(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server = serve()
    server.outcome = {"bar 0": "no poll"}
    found = teacher(server, tmp_path, prompts=1)
    found.collect()
    assert reasons(found)[0].startswith("the server must still have the teacher's video: it answers 400")
    server.outcome = {}
    teacher(server, tmp_path, prompts=1, ask_again=True).collect()
    assert videos(found) == ["bar 0"]
    assert server.created["bar 0"] == 1


def test_what_was_cut_without_a_word_is_downloaded_again(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server = serve()
    server.outcome = {"bar 0": "cut unseen"}
    found = teacher(server, tmp_path, prompts=1)
    found.collect()
    assert (tmp_path / "kept" / f"{found.clips()[0].video}").read_bytes() == server.video
    (tmp_path / "kept" / found.clips()[0].video).unlink()
    found.collect()
    assert (tmp_path / "kept" / f"{found.clips()[0].video}").read_bytes() == server.video, "and what was deleted"
    assert server.created["bar 0"] == 1


def test_attempts_are_further_and_further_apart(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server = serve()
    server.told = {"bar 0": ["503", "503", "503"]}
    teacher(server, tmp_path, prompts=1, backoff_seconds=0.2).collect()
    gaps = [b - a for a, b in pairwise(server.create_times)]
    assert all(gap > least for gap, least in zip(gaps, (0.1, 0.2, 0.4), strict=True))
    server.told, server.create_times = {"bar 1": ["429"]}, []
    teacher(server, tmp_path, prompts=2).collect()
    assert server.create_times[1] - server.create_times[0] > 0.2, "the server said so"


def test_a_late_video_stops_the_job_and_is_not_asked_for_again(
    serve: Callable[..., VideoServer], tmp_path: Path
) -> None:
    server = serve(polls=5)
    with pytest.raises(ConfigError, match=r"timeout_seconds \(0\.05\) must be longer: 1 videos are asked for"):
        teacher(server, tmp_path, prompts=1, timeout_seconds=0.05).collect()
    teacher(server, tmp_path, prompts=1).collect()
    assert server.created["bar 0"] == 1


def test_another_model_or_prompt_needs_another_folder(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server = serve()
    teacher(server, tmp_path, prompts=1).collect()
    with pytest.raises(ConfigError, match=r"must be of the same prompts, model and request: .* name another folder"):
        teacher(server, tmp_path, prompts=1, request={"seconds": "5"}).collect()
    teacher(server, tmp_path, prompts=1, concurrency=2, budget=9.0, price=1.0).collect()
    assert server.created["bar 0"] == 1


def test_two_jobs_do_not_fill_one_folder(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    found = teacher(serve(), tmp_path, prompts=1)
    (tmp_path / "kept").mkdir()
    with FileLock(tmp_path / "kept" / ".lock"), pytest.raises(ConfigError, match="one process at a time"):
        found.collect()


def test_the_key_does_not_leak_where_a_text_is_cut(tmp_path: Path) -> None:
    exchange = Exchange(Endpoint("http://127.0.0.1:9/v1", "m"), KEY)
    for blanks in range(280, 302):
        assert "sk-" not in exchange.text("x" * blanks + KEY)


def test_full_disk_leaves_a_journal_that_reads(
    serve: Callable[..., VideoServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write(("a", 0), ASKING)
    before = (tmp_path / "journal.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(ConfigError, match="must have room"):
            journal.write(("a", 0), ASKED, id="x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "journal.jsonl").read_bytes() == before
    journal.write(("a", 0), ASKED, id="x")
    assert Journal(tmp_path / "journal.jsonl").last(("a", 0))["id"] == "x"
    found = teacher(server, tmp_path, prompts=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"source \(.*\) must have room"):
            found.collect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "kept").glob(".*.partial"))
    found.collect()
    assert server.created["bar 0"] == 1
    assert videos(found) == ["bar 0"]


def test_a_journal_that_was_damaged(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"journal \(.*journal\.jsonl:1\) must be a line that was written here"):
        Journal(tmp_path / "journal.jsonl")


@pytest.mark.parametrize(
    ("fault", "message"),
    [("401", "it answers 401"), ("html", "no video object"), ("html as json", "no video object")],
)
def test_an_endpoint_that_cannot_be_used_stops_the_job(
    serve: Callable[..., VideoServer], tmp_path: Path, fault: str, message: str
) -> None:
    server = serve()
    server.told = {"bar 0": [fault]}
    found = teacher(server, tmp_path, concurrency=1)
    with pytest.raises(ConfigError, match=message) as caught:
        found.collect()
    assert "\n" not in str(caught.value)
    assert len(server.bodies) == 1
    found.collect()
    assert len(videos(found)) == 4


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"url \(http://127\.0\.0\.1:9/v1\) must answer: 4 attempts failed"):
        teacher("http://127.0.0.1:9/v1", tmp_path).collect()


def test_the_budget_is_never_passed_and_a_higher_one_goes_on(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server = serve()
    with pytest.raises(ConfigError, match=r"budget \(1\) must be higher for more videos: 2 at 0\.5 were asked for"):
        teacher(server, tmp_path, price=0.5, budget=1.0).collect()
    assert sum(server.created.values()) == 2
    found = teacher(server, tmp_path, price=0.5, budget=2.0)
    assert len(videos(found)) == 2, "what was paid for is kept"
    found.collect()
    assert len(videos(found)) == 4


def test_requests_keep_their_distance(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server = serve()
    teacher(server, tmp_path, requests_per_minute=600).collect()
    times = server.create_times
    assert min(b - a for a, b in pairwise(times)) > 0.05


def test_the_key_is_sent_and_written_nowhere(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server = serve()
    server.told = {"bar 0": ["400"], "bar 1": ["401"]}
    with pytest.raises(ConfigError) as caught:
        teacher(server, tmp_path, concurrency=1).collect()
    assert server.keys == {f"Bearer {KEY}"}
    assert KEY not in str(caught.value)
    for path in (tmp_path / "kept").iterdir():
        assert KEY.encode() not in path.read_bytes(), path.name


COLLECT = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background of a shell does not have
from tests.unit.data.test_http_teacher import teacher
found = teacher(sys.argv[1], Path(sys.argv[2]), prompts=12, poll_seconds=0.1)
print("begin", flush=True)
found.collect()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_at_any_moment_it_asks_for_nothing_twice(
    serve: Callable[..., VideoServer], tmp_path: Path, how: signal.Signals
) -> None:
    server, moments, stopped = serve(polls=8), random.Random(int(how)), 0
    for _ in range(3):
        before = sum(server.created.values())
        with forking("-c", COLLECT, server.url, tmp_path) as (process, printed):
            assert printed.readline() == b"begin\n"
            deadline = time.monotonic() + 30
            while sum(server.created.values()) == before and before < 12 and time.monotonic() < deadline:
                time.sleep(0.005)  # importing the client takes its time
            time.sleep(moments.uniform(0.0, 0.3))
            process.send_signal(how)
            stopped += process.wait(20) != 0
    assert stopped >= 2, "a slow machine may have come to the end once"
    found = teacher(server, tmp_path, prompts=12)
    found.collect()
    assert len(videos(found)) == 12
    assert dict(server.created) == {f"bar {number}": 1 for number in range(12)}


def test_a_line_that_a_crash_cut_is_no_line(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server = serve()
    found = teacher(server, tmp_path)
    found.collect()
    journal = tmp_path / "kept" / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"prompt_id": "')
    found.collect()
    assert len(videos(found)) == 4
    Journal(journal).write(("more", 0), ASKING)
    lines = journal.read_bytes().splitlines()
    assert lines[:-1] == whole.splitlines()
    assert json.loads(lines[-1])["prompt_id"] == "more"


def test_from_the_endpoint_to_shards(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server = serve()
    server.outcome = {"bar 2": "failed"}
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"bar {n}"}) + "\n" for n in (0, 1, 2, 1)))
    command = [sys.executable, str(TOOL), "--teacher", "http", "--url", server.url, "--model", "m"]
    command += ["--poll-seconds", "0.02"]
    command += ["--source", str(tmp_path / "kept"), "--prompts", str(tmp_path / "prompts.jsonl"), "--codec", "identity"]
    command += ["--size", "16x16", "--frames", "12", "--fps", "8", "--out", str(tmp_path / "out")]
    done = run(*command, OPENAI_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert "2 clips of http:m" in done.stdout
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 2
    assert server.keys == {f"Bearer {KEY}"}
    assert KEY not in done.stdout + done.stderr
