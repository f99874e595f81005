"""The judge behind HTTP, against a server on this machine that fails as it is told."""

import pickle
import re
import socket
import time

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from afd_scale.config import ConfigError, RunConfig
from afd_scale.config.judges import HttpJudgeConfig
from afd_scale.config.section import first_problem
from afd_scale.models import http_judge
from afd_scale.models.build import build_network, check_files
from afd_scale.models.http_judge import HttpJudge
from afd_scale.mp4 import mp4_bytes
from afd_scale.types import JudgeError, UnreachableJudgeError, Videos
from tests.judge_server import JudgeServer, score
from tests.networks import make_prompts


@pytest.fixture
def server():
    server = JudgeServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(http_judge, "backoff_seconds", lambda failures: 0.01)


def judge(server, **fields):
    url = server if isinstance(server, str) else server.url
    return HttpJudge(HttpJudgeConfig(url=url, **{"timeout_seconds": 20, "retries": 1, **fields}))


def clips(videos=5, fps=8.0):
    """Videos whose latents are their pixels, each of its own brightness and prompt."""
    generator = torch.Generator().manual_seed(0)
    brightness = torch.linspace(0.2, 2, videos).view(videos, 1, 1, 1, 1)
    pixels = torch.rand(videos, 3, 1, 16, 20, generator=generator) * brightness - 1
    return Videos(make_prompts(torch.zeros(videos, 1, 1)), pixels, fps, decode=lambda x: x)


def test_scores_come_back_in_the_order_of_the_videos(server):
    videos = clips()
    logits = judge(server, videos_per_request=2)(videos)
    assert sorted(len(asked["videos"]) for asked in server.asked) == [1, 2, 2]
    assert server.most_at_once > 1
    assert server.keys == {None}
    asked = {video["prompt"]: video for request in server.asked for video in request["videos"]}
    assert [asked[text]["fps"] for text in videos.prompts.texts] == [8.0] * 5
    expected = torch.tensor([score(asked[text]) for text in videos.prompts.texts])
    assert torch.equal(logits, expected)
    assert logits.dtype == torch.float32
    assert len(set(logits.tolist())) == 5


def test_what_is_sent_is_the_video_and_always_the_same(server):
    one = judge(server)
    assert torch.equal(one(clips()), one(clips()))
    whole, again = server.asked[0], server.asked[2]
    assert {str(request) for request in (whole, again)} <= {str(request) for request in server.asked}
    frames = np.full((3, 16, 20, 1), 128, np.uint8)
    assert mp4_bytes(frames, 8) == mp4_bytes(frames, 8)


@pytest.mark.parametrize("fault", ["500", "503", "429", "drop", "cut", "hang", "drip"])
def test_what_may_pass_is_tried_again(server, fault):
    server.told = {0: fault}
    late = fault in ("hang", "drip")
    logits = judge(server, timeout_seconds=2 if late else 20, videos_per_request=5)(clips())
    assert len(logits) == 5
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("fault", "said"), [("500", "it answered 500"), ("hang", "timed out"), ("drip", "timed out"), ("drop", "closed")]
)
def test_and_then_it_is_out_of_reach(server, fault, said):
    server.told = dict.fromkeys(range(9), fault)
    seconds, began = (0.3 if said == "timed out" else 20), time.monotonic()
    with pytest.raises(UnreachableJudgeError) as error:
        judge(server, timeout_seconds=seconds, retries=2, videos_per_request=5)(clips())
    assert len(server.asked) == 3
    assert time.monotonic() - began < 10
    said_first = f"the judge at {server.url} gave no answer: attempt 3 of 3, each of {seconds} s, ended with"
    line = str(error.value)
    assert line.startswith(said_first)
    assert said in line
    assert "\n" not in line
    assert str(pickle.loads(pickle.dumps(error.value))) == line


def test_nobody_there_is_out_of_reach():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/"
    with pytest.raises(UnreachableJudgeError, match=r"attempt 2 of 2.*refused"):
        judge(url)(clips())


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("html", 'must answer {"scores": [...]}: it answered \'<html><body> Welcome to the cluster, dear user'),
        ("nan", "must answer finite numbers: a score is nan"),
        ("words", "must answer finite numbers: a score is good"),
        ("short", "must answer a score for each video: 4 for 5"),
        ("404", "it answered 404"),
        ("400", "it answered 400"),
    ],
)
def test_nonsense_is_an_error_at_once(server, fault, said):
    server.told = {0: fault}
    with pytest.raises(JudgeError) as error:
        judge(server, videos_per_request=5)(clips())
    assert type(error.value) is JudgeError
    line = str(error.value)
    assert line.startswith(f"the judge at {server.url} {said}")
    assert len(line) < len(server.url) + 150
    assert len(server.asked) == 1


@pytest.mark.parametrize("text", ["", "[1]", '{"scores": {}}', '{"scores": [1e999]}', '{"scores": [true]}', "[" * 99999,
                                  '{"scores": [1e39]}', '{"scores": [null]}', "\xff"])  # fmt: skip
def test_no_answer_passes_that_is_no_list_of_numbers(text):
    with pytest.raises(JudgeError, match="must answer"):
        judge("http://scorer/")._read_scores(text.encode("latin-1"), 1)


def test_the_failure_is_that_of_the_request_that_failed(server):
    """One request is told 500 and waits for its next attempt; another one is answered nonsense."""
    server.told = dict.fromkeys(range(9), "500") | {1: "html"}
    with pytest.raises(JudgeError) as error:
        judge(server, videos_per_request=1, retries=5)(clips(2))
    assert type(error.value) is JudgeError


def test_the_key_is_sent_and_said_nowhere(server, tmp_path):
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    judge(server, key_file=key)(clips())
    assert server.keys == {"Bearer s3cret"}
    judge(server, key_file=key)
    server.told = dict.fromkeys(range(99), "500")
    with pytest.raises(UnreachableJudgeError) as error:
        judge(server, key_file=key)(clips())
    assert "s3cret" not in str(error.value)
    server.told = dict.fromkeys(range(99), "echo")  # what it was sent, behind words to where such answers are cut
    with pytest.raises(JudgeError) as error:
        judge(server, key_file=key)(clips())
    assert "s3c" not in str(error.value)
    for content in ("", "a\nb"):
        key.write_text(content)
        with pytest.raises(ConfigError, match=r"^key_file \(.*\) must hold one line"):
            check_files(run(key_file=key))
    with pytest.raises(ConfigError, match=r"^key_file \(.*\) must be a file"):
        check_files(run(key_file=tmp_path / "absent"))


def run(**judge):
    return RunConfig.model_validate({"method": {"name": "afd", "discriminator": None, "judges": {"http": {
        "name": "http", "url": "http://scorer/", **judge}}}})  # fmt: skip


def test_the_section_makes_the_network():
    config = run(retries=3)
    (role,) = [role for role in config.cast if role.name == "http"]
    assert isinstance(build_network(config, role.network, None), HttpJudge)
    assert not role.changes


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"optimizer": {"learning_rate": 1}}, "method.judges.http.optimizer must be null"),
        ({"warmup_steps": 3}, r"method.judges.http.warmup_steps \(3\) must be left out of a fixed judge"),
        ({"augment": ["shift"]}, r"augment \(\('shift',\)\) must be left out of a fixed judge"),
        ({"r1_weight": 0.1}, r"r1_weight \(0.1\) must be left out"),
        ({"url": "scorer:80/score"}, r"url \(scorer:80/score\) must be one such as"),
        ({"url": "http://me:word@scorer/"}, r"url \(of http\) must hold no user"),
        ({"url": "http://me:wo/rd@scorer/"}, r"url \(of http\) must hold no user"),
        ({"url": "http://scorer:abc/"}, r"url \(http://scorer:abc/\) must be one such as"),
        ({"url": "http://scorer/a b"}, r"url \(http://scorer/a b\) must be one such as"),
        ({"url": "http://scörer/"}, r"url \(http://scörer/\) must be one such as"),
        ({"timeout": 3}, r"method.judges.http.timeout \(3\) is not a known key"),
        ({"timeout_seconds": 3600}, r"engine.timeout_minutes \(60\) must be more than the 360.5 that"),
    ],
)
def test_what_does_not_fit_is_refused(fields, rule):
    with pytest.raises(ValidationError) as error:
        run(**fields)
    line = first_problem(error.value)
    assert re.search(rule, line), line
    assert "me:word" not in line
