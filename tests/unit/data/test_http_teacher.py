"""A teacher behind HTTP, against a real server of each protocol: nothing is asked twice, whatever goes wrong."""

import hashlib
import json
import random
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from afd_scale.codecs.codec import VideoForm
from afd_scale.config import ConfigError
from afd_scale.data.clips import Clip, Reject
from afd_scale.data.teachers.exchange import Endpoint, Exchange
from afd_scale.data.teachers.faults import Fault, fault_of
from afd_scale.data.teachers.http import HttpTeacher
from afd_scale.data.teachers.journal import ASKED, ASKING, Journal
from afd_scale.data.teachers.prompts import prompt_id_of
from afd_scale.data.teachers.protocols import NO_LINK, PROTOCOLS, Look, said_in
from afd_scale.data.teachers.stub import Stub, answer
from afd_scale.data.video import read_video
from afd_scale.data.worlds.drop import ToyPrompt, render_clips
from tests.distributed.processes import forking, run
from tests.tools import call_tool
from tests.video_server import SPOKEN, VideoServer
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
    endpoint = Endpoint(url, SPOKEN[settings.get("protocol", "openai")][0], **{**fast, **settings})
    return HttpTeacher(endpoint, table, folder / "kept", videos_per_prompt=videos_per_prompt, key=KEY)


def reasons(found: HttpTeacher) -> list[str]:
    return [clip.reason for clip in found.clips() if isinstance(clip, Reject)]


def videos(found: HttpTeacher) -> list[str]:
    return [clip.prompt for clip in found.clips() if isinstance(clip, Clip)]


every_protocol = pytest.mark.parametrize("protocol", list(SPOKEN))


@every_protocol
def test_every_video_is_asked_for_once_and_kept(
    serve: Callable[..., VideoServer], tmp_path: Path, video: bytes, protocol: str
) -> None:
    server = serve(polls=2, protocol=protocol)
    request = {"seed": "{index}", "seconds": "8"}
    found = teacher(server, tmp_path, videos_per_prompt=2, concurrency=3, request=request, protocol=protocol)
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
    assert sum(bool(re.search(r'name="seed"\r\n\r\n1\r\n|"seed": ?1\b', body)) for body in server.bodies) == 4
    assert server.keys == {PROTOCOLS[protocol].key_header[1] + KEY}
    assert server.paths == {*SPOKEN[protocol][2], server.dialect.content}
    found.collect()
    assert sum(server.created.values()) == 8, "nothing is left to ask for"
    listed = (tmp_path / "kept" / "videos.jsonl").read_text().splitlines()
    assert len(listed) == 8


@every_protocol
def test_what_goes_wrong_is_tried_again_and_nothing_is_paid_twice(
    serve: Callable[..., VideoServer], tmp_path: Path, protocol: str
) -> None:
    server = serve(protocol=protocol)
    server.told = {"bar 0": ["429", "503"], "bar 1": ["drop"], "bar 2": ["vanish"], "bar 3": ["accepted 500"]}
    server.told["bar 4"] = ["slow"]
    found = teacher(server, tmp_path, prompts=6, protocol=protocol, exchange_seconds=0.5)
    found.collect()
    assert videos(found) == ["bar 0", "bar 5"]
    assert len(reasons(found)) == 4
    assert all("may have been paid for" in reason for reason in reasons(found))
    found.collect()
    assert set(server.created.values()) == {1}, "bar 1 was never accepted, and nobody can know"
    assert sum(server.created.values()) == 5
    again = teacher(server, tmp_path, prompts=6, protocol=protocol, ask_again=True)
    again.collect()
    assert videos(again) == [f"bar {number}" for number in range(6)]
    assert len(set(server.repeats)) == 6, "a server that honours keys pays for none again"


@every_protocol
def test_bad_answers_about_one_video(serve: Callable[..., VideoServer], tmp_path: Path, protocol: str) -> None:
    server = serve(protocol=protocol)
    server.told = {"bar 0": ["400"], "bar 6": [(403, {"error": {"code": "InputTextSensitiveContentDetected"}})]}
    server.outcome = {"bar 1": "failed", "bar 2": "html", "bar 3": "cut", "bar 4": "expired", "bar 5": "state expired"}
    found = teacher(server, tmp_path, prompts=8, protocol=protocol)
    found.collect()
    assert videos(found) == ["bar 3", "bar 7"]
    assert [reason.partition(":")[0] for reason in reasons(found)] == [
        "the teacher refused the prompt",
        "the teacher refused the prompt" if protocol == "fal" else "the teacher made no video",
        "the server must give the teacher's video",
        "the server must give the teacher's video", "the teacher made no video", "the teacher refused the prompt",
    ]  # fmt: skip
    assert "against the rules" in reasons(found)[1]
    assert "its file cannot be used, it must be a readable video" in reasons(found)[2]
    assert "Request has expired" in reasons(found)[3]
    assert "expired" in reasons(found)[4]
    assert "InputTextSensitiveContentDetected" in reasons(found)[5]
    asked = len(server.bodies)
    server.outcome["bar 4"] = ""
    found.collect()
    assert len(server.bodies) == asked, "a refusal is final, and what was accepted is looked for again"
    assert videos(found) == ["bar 3", "bar 4", "bar 7"]
    again = teacher(server, tmp_path, prompts=8, protocol=protocol, ask_again=True)
    server.outcome = {"bar 2": "html"}
    again.collect()
    assert videos(again) == [f"bar {number}" for number in (0, 1, 3, 4, 5, 6, 7)]
    assert dict(server.created) == {f"bar {number}": 2 if number in (1, 2, 5) else 1 for number in range(8)}
    assert len(set(server.repeats)) == 11, "a video that is asked for anew has a key of its own"


def test_a_link_that_does_not_answer_for_a_while_is_not_paid_for_again(
    serve: Callable[..., VideoServer], tmp_path: Path
) -> None:
    server = serve()
    server.outcome = {"bar 0": "down"}
    for again in (False, True):
        found = teacher(server, tmp_path, prompts=2, ask_again=again)
        found.collect()
        assert videos(found) == ["bar 1"]
    server.outcome = {}
    found.collect()
    assert videos(found) == ["bar 0", "bar 1"]
    assert set(server.created.values()) == {1}


def test_whatever_goes_wrong_behind_a_request_is_lost_and_not_asked_again(
    serve: Callable[..., VideoServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()

    def fail(self: Any, answer: Any) -> str:
        raise ZeroDivisionError("nobody thought of it")

    monkeypatch.setattr(type(PROTOCOLS["openai"]), "id_of", fail)
    found = teacher(server, tmp_path, prompts=1)
    with pytest.raises(ConfigError, match="must answer: nobody thought of it"):
        found.collect()
    assert set(server.created.values()) == {1}
    assert "it may have been paid for" in reasons(found)[0]


@pytest.mark.parametrize("protocol", [name for name in SPOKEN if name != "openai"])
def test_a_finished_video_that_is_nowhere_and_a_key_that_goes_nowhere_else(
    serve: Callable[..., VideoServer], tmp_path: Path, protocol: str
) -> None:
    server = serve(protocol=protocol)
    server.outcome = {"bar 1": "nothing"}
    server.elsewhere = server.origin.replace("127.0.0.1", "localhost")  # another host, as far as a key is concerned
    found = teacher(server, tmp_path, prompts=3, protocol=protocol)
    found.collect()
    assert videos(found) == ["bar 0", "bar 2"]
    assert ["no link to a video is there" in reason for reason in reasons(found)] == [True]
    assert server.keys_elsewhere == {None}
    server.elsewhere = "http://127.0.0.1:9"  # where nobody answers
    again = teacher(server, tmp_path, prompts=4, protocol=protocol, attempts=2)
    again.collect()
    assert videos(again) == ["bar 0", "bar 2"], "and the job did not stop for it"


def test_a_redirect_to_a_dead_link_is_that_videos_alone(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server = serve()
    server.elsewhere = server.origin.replace("127.0.0.1", "localhost")
    server.outcome = {"bar 0": "moved"}
    found = teacher(server, tmp_path, prompts=2)
    found.collect()
    assert videos(found) == ["bar 1"]
    assert "it answers 403: AccessDenied Request has expired" in reasons(found)[0]
    assert server.keys_elsewhere == {None}


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (402, {"error": {"code": 402, "message": "insufficient credits"}}),
        (400, {"error": {"code": "billing_hard_limit_reached", "message": "Billing hard limit has been reached"}}),
        (429, {"error": {"code": "insufficient_quota", "message": "You exceeded your current quota"}}),
        (403, {"detail": "User is locked. Reason: Exhausted balance. Top up your balance."}),
        (403, {"error": {"code": "AccountOverdueError", "message": "has an overdue balance"}}),
        (400, {"error": {"code": 400, "message": "API key not valid.", "status": "INVALID_ARGUMENT"}}),
        (404, {"error": {"message": "no such model"}}),
    ],
)
def test_an_account_at_fault_leaves_prompts_unasked(
    serve: Callable[..., VideoServer], tmp_path: Path, status: int, said: Any
) -> None:
    server = serve()
    server.told = {"bar 1": [(status, said)]}
    found = teacher(server, tmp_path, concurrency=1, price=1.0, budget=4.0)
    with pytest.raises(
        ConfigError,
        match=f"must make videos by protocol openai with this key, account and model m: it answers {status}: ",
    ) as caught:
        found.collect()
    assert "\n" not in str(caught.value)
    assert len(server.bodies) == 2
    found.collect()
    assert len(videos(found)) == 4, "after a top-up the same command goes on, in the same budget"


@pytest.mark.parametrize(
    ("status", "said", "fault"),
    [
        (422, [{"msg": "flagged by a content checker", "type": "content_policy_violation"}], Fault.PROMPT),
        (429, {"error": {"message": "You exceeded your current quota, check your billing details. See /rate-limits"}},
         Fault.BUSY),
        (429, {"error": {"message": "Rate limit reached for requests. Add a payment method to raise it."}}, Fault.BUSY),
        (429, {"detail": "throttled: 6 requests per minute while you have less than $5.0 in credit"}, Fault.BUSY),
        (429, {"error": {"code": "rpm_quota_exceeded"}}, Fault.BUSY),
        (429, {"code": 1102, "message": "Account balance not enough"}, Fault.ACCOUNT),
        (429, {"error": {"code": "billing_not_active"}}, Fault.ACCOUNT),
        (402, {"detail": "top up, please"}, Fault.ACCOUNT),
        (400, {"error": {"code": "billing_hard_limit_reached"}}, Fault.ACCOUNT),
        (400, {"errors": ["insufficient_credits"]}, Fault.ACCOUNT),
        (400, {"error": {"message": "The model sora-2 does not exist: model_not_found"}}, Fault.ACCOUNT),
        (400, {"error": {"message": "Invalid size"}}, Fault.PROMPT),
        (403, {"error": {"message": "Permission denied", "details": [{"reason": "API_KEY_SERVICE_BLOCKED"}]}},
         Fault.ACCOUNT),
        (403, {"error": {"message": "Request is prohibited by organization's policy: no permission"}}, Fault.ACCOUNT),
        (403, {"error": {"message": "violates the policies"}}, Fault.PROMPT),
        (422, {"error": "Repeated flagged prompts may get your account suspended"}, Fault.PROMPT),
        (500, {"error": {"message": "insufficient balance"}}, Fault.ACCOUNT),
        (500, {"error": "the load balancer failed"}, Fault.UNCLEAR),
        (501, {}, Fault.ACCOUNT),
        (307, {}, Fault.ACCOUNT),
        (403, {"error": {"code": "moderation_blocked"}}, Fault.PROMPT),
        (403, {"error": "forbidden"}, Fault.ACCOUNT),
        (403, {"error": "your account was suspended after a violation of the policy"}, Fault.ACCOUNT),
        (400, "a man pays by credit card", Fault.PROMPT),
        (402, {"error": "see our policy"}, Fault.ACCOUNT),
        (503, {"error": "no balance"}, Fault.ACCOUNT),
        (503, {"error": "overloaded"}, Fault.BUSY),
        (502, {}, Fault.UNCLEAR),
        (409, {}, Fault.UNCLEAR),
    ],
)  # fmt: skip
def test_whose_fault_it_is(status: int, said: Any, fault: Fault) -> None:
    assert fault_of(status, said_in(said)) is fault


def test_words_of_the_prompt_are_not_the_servers(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server, prompt = serve(), "her balance, her credits and her billing"
    server.told = {prompt: [(400, {"error": {"message": f"cannot make '{prompt}'"}})]}
    found = teacher(server, tmp_path)
    found.prompts.write_text(f"{prompt}\nbar 0\n")
    found.collect()
    assert videos(found) == ["bar 0"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"status": "failed", "error": "content policy: violence"}, "failed, content policy: violence"),
        ({"status": "failed", "error": {"code": "moderation_blocked"}}, "failed, moderation_blocked"),
        ({"status": "failed", "message": "no luck"}, "failed, no luck"),
        ({"status": "canceled", "error": None}, "canceled"),
        ({"status": "Rejected"}, "Rejected"),
        ({"status": "half done"}, "half done"),
        ({"status": "EXPIRED", "error": []}, "EXPIRED"),
        ({"status": "timeout", "error": {"code": 1, "details": [{"reason": "TOO_SLOW"}]}}, "timeout, 1, TOO_SLOW"),
        ({"status": None, "error": {"message": "it broke"}}, "failed, it broke"),
        ({"status": 5, "failure_reason": "output_moderation"}, "5, output_moderation"),
        ({"status": "error", "errors": [{"msg": "a"}, "b"]}, "error, a; b"),
    ],
)
def test_a_state_that_is_not_known_to_run_ends_with_its_name_and_reason(
    serve: Callable[..., VideoServer], tmp_path: Path, answer: Any, reason: str
) -> None:
    server = serve()
    server.outcome = {"bar 0": (200, answer)}
    found = teacher(server, tmp_path, prompts=1)
    found.collect()
    assert reasons(found) == [f"the teacher made no video: {reason}"]


def test_a_video_that_ends_because_the_account_is_empty_stops_the_job(
    serve: Callable[..., VideoServer], tmp_path: Path
) -> None:
    server = serve()
    server.outcome = {"bar 0": (200, {"status": "failed", "error": {"message": "Insufficient balance"}})}
    found = teacher(server, tmp_path, prompts=2, concurrency=1)
    with pytest.raises(ConfigError, match="Insufficient balance"):
        found.collect()
    assert len(server.bodies) == 1
    server.outcome = {}
    found.collect()
    assert len(videos(found)) == 2
    server.outcome = {"bar 0": (200, {"status": "failed", "error": "it broke; your credits were refunded"})}
    (tmp_path / "other").mkdir()
    found = teacher(server, tmp_path / "other", prompts=1)
    found.collect()
    assert "refunded" in reasons(found)[0]


def test_one_video_that_a_server_cannot_tell_of_does_not_stop_the_rest(
    serve: Callable[..., VideoServer], tmp_path: Path
) -> None:
    server, another = serve(), {"id": "video_4", "status": "completed"}
    server.outcome = {"bar 0": (500, {}), "bar 1": (200, []), "bar 2": (200, another)}
    server.outcome |= {"bar 3": (200, {"error": "busy"}), "bar 4": "json", "bar 5": "empty"}
    found = teacher(server, tmp_path, prompts=7, concurrency=1, attempts=2)
    found.collect()
    assert videos(found) == ["bar 6"]
    assert all("2 attempts failed" in reason for reason in reasons(found))
    assert "the state of another video, video_4" in reasons(found)[2]
    assert "busy" in reasons(found)[3]


@pytest.mark.parametrize(
    ("protocol", "shown"),
    [
        ("openai", {"seconds": "5", "size": "1280x720", "seed": "7", "own": "true"}),
        ("ark", {"duration": 5, "resolution": "720p", "ratio": "16:9", "seed": 7, "own": True}),
        ("fal", {"duration": 5, "resolution": "720p", "aspect_ratio": "16:9", "seed": 7, "own": True}),
        ("replicate", {"duration": 5, "resolution": "720p", "aspect_ratio": "16:9", "seed": 7, "own": True}),
        ("google", {"durationSeconds": 5, "resolution": "720p", "aspectRatio": "16:9", "seed": 7, "own": True}),
    ],
)
def test_fields_have_the_names_of_each_api(protocol: str, shown: dict[str, Any]) -> None:
    fields = {"seconds": 5, "size": "1280x720", "seed": 7, "own": True}
    request = PROTOCOLS[protocol].create("bar", "a/b", fields)
    body: Any = request.form or request.json
    assert shown.items() <= {**body, **body.get("input", {}), **body.get("parameters", {})}.items()


RESULT = "fal-ai/veo3/requests/7"
LINK = "https://x/a.mp4"


@pytest.mark.parametrize(
    ("protocol", "answer", "look"),
    [
        ("openai", {"status": "Queued"}, Look()),
        ("openai", {"status": "In-Progress"}, Look()),
        ("openai", {"status": "completed", "url": LINK}, Look("videos/7/content")),
        ("ark", {"status": "running", "content": None}, Look()),
        ("ark", {"status": "cancelled"}, Look(end="cancelled")),
        ("ark", {"status": "succeeded", "content": {"video_url": LINK}}, Look(LINK)),
        ("ark", {"status": "succeeded"}, Look(end="succeeded", said=NO_LINK)),
        ("fal", {"status": "COMPLETED", "logs": [{"message": "x"}]}, Look(LINK)),
        ("fal", {"status": "COMPLETED", "error": "no runner", "error_type": "request_timeout"},
         Look(end="COMPLETED", said="no runner, request_timeout")),
        ("replicate", {"status": "starting", "output": None}, Look()),
        ("replicate", {"status": "aborted", "error": None}, Look(end="aborted")),
        ("replicate", {"status": "succeeded", "output": [LINK]}, Look(LINK)),
        ("replicate", {"status": "succeeded", "output": {"frame": "https://x/a.png", "video": LINK}}, Look(LINK)),
        ("google", {"name": "7", "done": False}, Look()),
        ("google", {"name": "7", "done": True}, Look(end="done", said=NO_LINK)),
        ("google", {"name": "7", "done": True, "error": {"code": 3, "message": "no", "details": [{"reason": "R"}]}},
         Look(end="failed", said="3, no, R")),
    ],
)  # fmt: skip
def test_what_answers_say(protocol: str, answer: dict[str, Any], look: Look) -> None:
    answers = {RESULT: {"videos": [{"url": LINK}, {"url": "https://x/b.mp4"}], "request_id": "another"}}
    assert PROTOCOLS[protocol].look("7", "fal-ai/veo3/fast", lambda path: answers.get(path, answer)) == look


@every_protocol
def test_an_answer_that_says_nothing_is_no_state(protocol: str) -> None:
    with pytest.raises(KeyError):
        PROTOCOLS[protocol].look("7", "m", lambda path: {"detail": "hello"})


def test_a_video_of_another_request_is_not_taken(
    serve: Callable[..., VideoServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    monkeypatch.setattr(server.dialect, "created", lambda number, path: {"id": "video_1"})
    found = teacher(server, tmp_path, prompts=2, concurrency=1)
    found.collect()
    assert videos(found) == ["bar 0"]
    assert "it names another's, video_1" in reasons(found)[0]


def test_a_journal_from_before_there_were_protocols_goes_on(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server = serve()
    found = teacher(server, tmp_path, prompts=1, request={"seconds": "5"})
    found.collect()
    entry = json.loads((tmp_path / "kept" / "journal.jsonl").read_text().splitlines()[0])
    asks = json.dumps(["bar 0", "m", {"seconds": "5"}], sort_keys=True).encode()
    assert entry["asks"] == hashlib.blake2b(asks, digest_size=8).hexdigest()
    assert "protocol" not in found.provenance


@every_protocol
def test_a_dry_run_asks_for_nothing(serve: Callable[..., VideoServer], tmp_path: Path, protocol: str) -> None:
    server = serve(protocol=protocol)
    (tmp_path / "prompts.txt").write_text("bar 0\nbar 1\n")
    command = f"{TOOL} --teacher http --protocol {protocol} --url {server.url} --model {SPOKEN[protocol][0]}"
    command += f" --source {tmp_path / 'kept'} --prompts {tmp_path / 'prompts.txt'} --out {tmp_path / 'out'}"
    done = run(sys.executable, *command.split(), "--price", "0.25", "--dry-run", **{PROTOCOLS[protocol].key: KEY})
    assert done.returncode == 0, done.stderr
    request, end = json.JSONDecoder().raw_decode(done.stdout)
    assert request["url"] == f"{server.url}/{SPOKEN[protocol][1]}"
    assert "bar 0" in json.dumps(request)
    assert "2 videos at 0.25: 0.5; 0 are asked for already" in done.stdout[end:]
    assert KEY not in done.stdout
    assert not server.bodies
    assert not (tmp_path / "kept").exists()


def test_a_video_that_cannot_be_polled_is_not_paid_for_again(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    server = serve()
    server.outcome = {"bar 0": "no poll"}
    found = teacher(server, tmp_path, prompts=1)
    found.collect()
    assert reasons(found)[0].startswith("the server must give the teacher's video: it answers 400")
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
    with pytest.raises(
        ConfigError, match=r"must be of the same prompts, protocol, model and request: .* name another folder"
    ):
        teacher(server, tmp_path, prompts=1, request={"seconds": "5"}).collect()
    with pytest.raises(ConfigError, match=r"must be of the same prompts, protocol, model and request"):
        teacher(server, tmp_path, prompts=1, protocol="ark").collect()
    teacher(server, tmp_path, prompts=1, concurrency=2, budget=9.0, price=1.0).collect()
    assert server.created["bar 0"] == 1


def test_two_jobs_do_not_fill_one_folder(serve: Callable[..., VideoServer], tmp_path: Path) -> None:
    found = teacher(serve(), tmp_path, prompts=1)
    (tmp_path / "kept").mkdir()
    with FileLock(tmp_path / "kept" / ".lock"), pytest.raises(ConfigError, match="one process at a time"):
        found.collect()


def test_the_key_does_not_leak_where_a_text_is_cut(tmp_path: Path) -> None:
    exchange = Exchange(Endpoint("http://127.0.0.1:9/v1", "m"), KEY, "http://127.0.0.1:9/v1")
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
    [
        ("401", "it answers 401"),
        ("html", "names no video: Welcome;"),
        ("html as json", "names no video: Welcome;"),
        ((200, {"error": {"message": "insufficient credits"}}), "names no video: insufficient credits"),
    ],
)
def test_an_endpoint_that_cannot_be_used_stops_the_job(
    serve: Callable[..., VideoServer], tmp_path: Path, fault: Any, message: str
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


@pytest.mark.parametrize(
    "said", [b"", b"[" * 200_000, b'{"error":' * 900 + b"1" + b"}" * 900, {"task_id": "1", "message": "success"}]
)
def test_a_success_that_names_no_video_may_have_been_paid_for(
    serve: Callable[..., VideoServer], tmp_path: Path, said: Any
) -> None:
    server = serve()
    server.told = {"bar 0": [(202, said)]}
    found = teacher(server, tmp_path, prompts=2, concurrency=1)
    with pytest.raises(ConfigError, match="with this key, account and model m: it answers 202 and names no video"):
        found.collect()
    found.collect()
    assert videos(found) == ["bar 1"]
    assert "may have been paid for" in reasons(found)[0]


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
more = dict(price=0.1, budget=1.2, protocol=sys.argv[3])
found = teacher(sys.argv[1], Path(sys.argv[2]), prompts=12, poll_seconds=0.1, **more)
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
        with forking("-c", COLLECT, server.url, tmp_path, "openai") as (process, printed):
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
    assert max(server.created.values()) == 1
    lost = reasons(found)
    assert len(videos(found)) == 12 - len(lost)
    assert len(lost) <= (12 if how == signal.SIGKILL else 0), "only a kill leaves what nobody answered"
    assert all("may have been paid for" in reason for reason in lost)


class HeldStub(Stub):
    """The videos that are asked for after the first `finishes` are on their way."""

    finishes = 1 << 30

    def __init__(self, protocol: str):
        self.ids: list[str] = []
        super().__init__(protocol, seconds=0.0)

    def _id(self, asked: dict[str, Any]) -> str:
        self.ids.append(super()._id(asked))
        return self.ids[-1]

    def get(self, request: BaseHTTPRequestHandler) -> None:
        held = [video_id for video_id in self.ids[self.finishes :] if video_id in request.path]
        if held:
            answer(request, *self.dialect.look(request.path.removeprefix("/v1/"), held[0], False, ""))
        else:
            super().get(request)


@every_protocol
def test_killed_three_times_it_makes_the_same_dataset_for_the_same_money(tmp_path: Path, protocol: str) -> None:
    """At three moments of its life, while no request is unanswered: such a video is lost, as the next test shows."""
    (tmp_path / "prompts.txt").write_text("".join(f"a ball on hill {number}\n" for number in range(20)))

    def command(name: str, budget: float) -> list[str]:
        return (f"--teacher http --protocol {protocol} --url {stub.url} --model a/b --source {tmp_path / name} "
                f"--out {tmp_path / name / 'out'} --prompts {tmp_path / 'prompts.txt'} --price 0.07 --budget {budget} "
                "--size 16x16 --frames 12 --fps 8 --poll-seconds 0.02 --backoff-seconds 0.02").split()  # fmt: skip

    def files(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (*(tmp_path / name / "out").iterdir(),
                                                          *(tmp_path / name).glob("*.mp4"))}  # fmt: skip

    with closing(HeldStub(protocol)) as stub:
        done = call_tool("make_shards", *command("whole", 1.40))
        assert done.returncode == 0, done.stderr
        journal = tmp_path / "killed" / "journal.jsonl"
        for finished in (1, 7, 14):
            stub.finishes = 20 + finished
            with forking(str(TOOL), *command("killed", 1.40)) as (process, _):
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline:  # until four are asked for that do not finish
                    lines = map(json.loads, journal.read_text().splitlines() if journal.exists() else ())
                    if len({line["prompt_id"] for line in lines if line["state"] == "asked"}) == finished + 4:
                        break
                    time.sleep(0.01)
                process.kill()
                assert process.wait(20) == -signal.SIGKILL
            assert len(stub.asked) == stub.finishes + 4, "it was at work"
        stub.finishes = 1 << 30
        done = call_tool("make_shards", *command("killed", 1.40))
        assert done.returncode == 0, done.stderr
        assert Counter(stub.asked[:20]) == Counter(stub.asked[20:]), "each collection asks once for each prompt"
        assert len(set(stub.asked)) == 20
        assert files("killed") == files("whole")
        assert len({content for name, content in files("whole").items() if name.endswith(".mp4")}) == 20
        done = call_tool("make_shards", *command("poorer", 1.39))
        assert done.returncode == 2
        assert "budget (1.39) must be higher for more videos: 19 at 0.07 were asked for" in done.stderr
        assert len(stub.asked) == 20 + 20 + 19


def test_a_kill_in_the_middle_of_a_request_loses_that_video_until_it_is_asked_for_again(
    serve: Callable[..., VideoServer], tmp_path: Path
) -> None:
    server = serve()
    server.told = {"bar 0": ["slow"]}
    with forking("-c", COLLECT, server.url, tmp_path, "openai") as (process, _):
        deadline = time.monotonic() + 30
        kept = tmp_path / "kept" / "journal.jsonl"
        while time.monotonic() < deadline:  # until the server has the one and has answered the other
            if server.created["bar 0"] and Journal(kept).last((prompt_id_of("bar 1"), 0)).get("state") == "have":
                break
            time.sleep(0.01)
        process.kill()
        process.wait(20)
    found = teacher(server, tmp_path, prompts=2)
    found.collect()
    assert videos(found) == ["bar 1"]
    assert "it may have been paid for; --ask-again asks once more" in reasons(found)[0]
    assert server.created["bar 0"] == 1
    paid = Journal(kept).paid
    assert paid >= sum(server.created.values()), "what is lost counts as paid for, also what the kill kept from leaving"
    with pytest.raises(ConfigError, match=r"budget \(.*\) must be higher"):
        teacher(server, tmp_path, prompts=2, price=1.0, budget=paid, ask_again=True).collect()
    teacher(server, tmp_path, prompts=2, price=1.0, budget=paid + 1, ask_again=True).collect()
    assert videos(found) == ["bar 0", "bar 1"]
    assert (server.created["bar 0"], server.created["bar 1"]) == (2, 1)


@pytest.mark.parametrize("protocol", ["openai", "google"])  # the others: where collections are killed, above
def test_a_rehearsal_makes_a_dataset_that_says_so(
    tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROTOCOLS[protocol].key, KEY)
    sentence = ToyPrompt.every()[0].sentence
    (tmp_path / "prompts.txt").write_text(f"a cat on the moon\n{sentence}\n")
    command = (f"--teacher http --protocol {protocol} --source {tmp_path / 'paid'} --out {tmp_path / 'out'} --prompts "
               f"{tmp_path / 'prompts.txt'} --size 16x16 --frames 49 --fps 8 --request seconds=6 "
               "--videos-per-prompt 2").split()  # fmt: skip
    done = call_tool("make_shards", *command, "--url", "stub", "--poll-seconds", "0.5")
    assert done.returncode == 0, done.stderr
    assert "4 clips of stub:stub" in done.stdout
    facts = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert facts["provenance"]["source"]["url"] == "stub"
    clip = read_video(tmp_path / "paid" / f"{prompt_id_of(sentence)}-0.mp4", VideoForm(12, 8.0, 128, 128))
    seed = int.from_bytes(hashlib.blake2b(f"{sentence}\nNone".encode(), digest_size=4).digest())
    shown = render_clips(ToyPrompt.every()[:1], seed=seed)[0].repeat(8, axis=1).repeat(8, axis=2)
    assert np.abs(clip.astype(int).mean(-1) - shown).mean() < 3, "a prompt of the toy world is rendered as it says"
    for url in ("http://127.0.0.1:9/v1", "stub"):
        other = call_tool("make_shards", *command, "--url", url, "--model", "another", "--attempts", "1")
        assert other.returncode == 2
        assert "must be of a rehearsal" in other.stderr or url == "stub"
        assert "name another folder" in other.stderr


def test_a_stub_knows_what_an_earlier_one_was_asked_for(tmp_path: Path) -> None:
    with closing(Stub("ark")) as earlier:
        found = teacher(earlier.url, tmp_path, prompts=1, protocol="ark", timeout_seconds=0.01)
        with pytest.raises(ConfigError, match="must be longer"):
            found.collect()
    with closing(Stub("ark")) as later:
        found = teacher(later.url, tmp_path, prompts=1, protocol="ark")
        found.collect()
        assert not later.asked
    assert videos(found) == ["bar 0"]


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
