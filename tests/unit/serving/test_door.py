"""Who is let in."""

import pytest

from afd_scale.config import ConfigError
from afd_scale.serving.door import Door, is_loopback, read_token

TOKEN = "correct-horse-battery"


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("::1", True), ("[::1]", True), ("0.0.0.0", False),
     ("::", False), ("10.0.0.1", False), ("localhost.evil.com", False), ("", False), ("127.0.0.1.evil.com", False)],
)  # fmt: skip
def test_addresses_of_this_machine(host, is_ours):
    assert is_loopback(host) is is_ours


def test_another_address_needs_a_token():
    Door.at("127.0.0.1", None)
    Door.at("0.0.0.0", TOKEN)
    with pytest.raises(ConfigError, match=r"^host \(0\.0\.0\.0\) must come with token_file or token_env"):
        Door.at("0.0.0.0", None)


def test_a_token_is_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(f" {TOKEN}\n")
    monkeypatch.setenv("SERVE", TOKEN)
    assert read_token(file, None) == read_token(None, "SERVE") == TOKEN
    assert read_token(None, None) is None


@pytest.mark.parametrize(
    ("content", "why"),
    [("", "must hold a token"), ("s3cret", "must hold a token"), ("two words are no token", "must hold a token"),
     (TOKEN + "\nand another", "must hold a token"), ("ü" * 20, "must hold a token"), (None, "must be readable")],
    ids=["empty", "few signs", "blanks", "two lines", "letters of others", "no file"],
)  # fmt: skip
def test_what_is_no_token(tmp_path, content, why):
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=why) as error:
        read_token(file, None)
    assert not content or content not in str(error.value)


def test_a_token_has_one_place(tmp_path, monkeypatch):
    monkeypatch.delenv("SERVE", raising=False)
    with pytest.raises(ConfigError, match=r"^token_env \(SERVE\) must hold a token"):
        read_token(None, "SERVE")
    with pytest.raises(ConfigError, match="there is one token"):
        read_token(tmp_path / "token", "SERVE")


def test_only_the_right_token_is_known():
    door = Door(TOKEN)
    assert door.knows(TOKEN)
    assert not any(map(door.knows, (None, "", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "ü" * 20)))
    assert Door().knows(None)


@pytest.mark.parametrize(
    ("door", "headers", "why"),
    [
        (Door(), {"host": "127.0.0.1:8000"}, None),
        (Door(), {"host": "localhost:8000", "origin": "http://localhost:8000"}, None),
        (Door(), {"host": "[::1]:8000"}, None),
        (Door(), {"host": "rebound.evil.com:8000"}, "host"),
        (Door(), {}, "host"),
        (Door(), {"host": "127.0.0.1:8000", "origin": "http://evil.com"}, "origin"),
        (Door(), {"host": "127.0.0.1:8000", "origin": "null"}, "origin"),
        (Door(TOKEN), {"host": "gpu.example.com", "origin": "https://gpu.example.com"}, None),
        (Door(TOKEN), {"host": "gpu.example.com", "origin": "https://evil.com"}, "origin"),
        (Door(), {"host": "127.0.0.1:8000", "origin": "http://["}, "origin"),
        (Door(), {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000@evil.com"}, "origin"),
        (Door(), {"host": "["}, "host"),
        (Door(), {"host": "[::1"}, "host"),
        (Door(), {"host": "127.0.0.1@evil.com"}, "host"),
        (Door(), {"host": "127.0.0.1:8000:8000"}, "host"),
    ],
)
def test_pages_of_others_are_refused(door, headers, why):
    refusal = door.refusal(headers)
    assert refusal is None if why is None else refusal.startswith(f"{why} (")
