"""The page in a browser."""

import io
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed

from afd_scale.evaluation.video import read_mp4
from afd_scale.serving import seat
from afd_scale.serving.viewer import Limits
from tests.live_server import Watcher, live_server, studio_of, until

CHROMIUM = Path("/usr/bin/chromium")
BASE = Path(__file__).parents[3] / "configs" / "toy" / "base"
TOKEN = "correct-horse-battery"
FALLS = "a bright large ball moves rightward quickly under strong gravity over a clay floor"
FLOATS = "a bright large ball moves rightward quickly under no gravity over a rubber floor"

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: it drives the browser")
if not CHROMIUM.exists():
    pytest.skip(f"there is no {CHROMIUM}: the page needs a browser", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return studio_of(BASE, tmp_path_factory.mktemp("studio"), sink=1)  # without it a ball fades


@pytest.fixture
def url(studio, tmp_path) -> Iterator[str]:
    studio.seconds = 0.0
    with live_server(studio, tmp_path) as url:
        yield url


@pytest.fixture
def page(browser):
    """A tab; what goes wrong in it fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.expected_errors = 0
    yield page
    context.close()
    assert len(errors) == page.expected_errors, errors


def comes(page, condition):
    """Wait for it; playwright's own way needs `eval`, which the page's policy forbids."""
    until(lambda: page.evaluate(condition), 40)


def opened(page, url):
    page.goto(url)
    comes(page, "server !== null")


def begin(page, prompt, **fields):
    page.fill("#prompt", prompt)
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.click("#start")
    comes(page, "shownFrames > 0")


def picture(page) -> np.ndarray:
    """(H, W) of what the canvas shows."""
    data = page.evaluate("Array.from(pen.getImageData(0, 0, canvas.width, canvas.height).data)")
    return np.array(data, np.uint8).reshape(page.evaluate("canvas.height"), -1, 4)[..., 0]


def is_free(url):
    return httpx.get(f"{url}/v1/server").json()["is_free"]


def test_a_stream_is_seen_and_a_new_prompt_with_it(page, url):
    opened(page, url)
    assert page.inner_text("#name") == "toy"
    begin(page, FALLS, seconds=5, seed=3)
    assert picture(page).max() > 100, "a bright ball"
    comes(page, "!running")
    fell = picture(page)
    assert page.inner_text("#say") == "It has ended: it is whole."
    begin(page, FALLS, seconds=5, seed=3)
    page.fill("#prompt", FLOATS)
    page.click("#change")
    comes(page, "!running")
    assert page.inner_text("#now") == FLOATS
    assert np.abs(picture(page).astype(int) - fell).max() > 50, "the same seed, another end"
    comes(page, "part('denoising').textContent.includes('frames/s')")
    assert float(page.inner_text("#rate").split()[0]) == pytest.approx(8, rel=0.5)


def test_frames_are_shown_as_crisp_pixels(page, url):
    opened(page, url)
    begin(page, FALLS, seconds=0.7)
    shown = np.array(Image.open(io.BytesIO(page.locator("#canvas").screenshot())).convert("L"))
    times = shown.shape[0] // 16
    assert times > 10
    first = shown[times // 2 :: times, times // 2 :: times][:16, :16].repeat(times, 0).repeat(times, 1)
    assert np.abs(first.astype(int) - shown[: 16 * times, : 16 * times]).mean() < 1


@pytest.mark.parametrize("goes_on", [False, True])
def test_what_was_seen_is_saved(page, url, monkeypatch, goes_on):
    monkeypatch.setattr(seat, "_PIECE_BYTES", 200)
    opened(page, url)
    begin(page, FALLS, seed=3, **({} if goes_on else {"seconds": 1.5}))
    comes(page, "shownFrames > 8" if goes_on else "!running")
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "toy-3.mp4"
    frames, fps = read_mp4(download.value.path())
    assert (fps, frames[0].max() > 100) == (8, True)
    assert len(frames) > 8 if goes_on else len(frames) == 12
    assert page.evaluate("running") is goes_on
    if goes_on:
        comes(page, f"shownFrames > {len(frames) + 8}")


def test_a_tab_whose_stream_is_over_makes_room(browser, studio, tmp_path):
    context = browser.new_context()
    first, second = context.new_page(), context.new_page()
    with live_server(studio, tmp_path, limits=Limits(viewers=1)) as url:
        for page in (first, second):
            opened(page, url)
            begin(page, FALLS, seconds=0.4)
            comes(page, "!running")
        comes(first, "part('say').textContent.startsWith('the stream is over, and somebody else has come')")
        assert first.is_disabled("#save")
        assert second.is_enabled("#save")
        begin(first, FLOATS, seconds=0.4)  # frames of before may be counted still
        comes(first, "part('say').textContent === 'It has ended: it is whole.'")
    context.close()


def test_stop_ends_it_and_another_may_begin(page, url):
    opened(page, url)
    begin(page, FALLS)
    assert not is_free(url)
    page.click("#stop")
    assert until(lambda: is_free(url)) < 5.0
    comes(page, "!running")
    assert page.inner_text("#say") == "It has ended: it was stopped."
    begin(page, FLOATS, seconds=0.4)
    comes(page, "!running")


def test_a_closed_tab_frees_the_worker(browser, url):
    context = browser.new_context()
    page = context.new_page()
    opened(page, url)
    begin(page, FALLS)
    assert not is_free(url)
    context.close()
    assert until(lambda: is_free(url)) < 5.0
    assert httpx.get(f"{url}/v1/server").json()["viewers"] == 0


def test_of_twenty_at_once_a_tab_is_served_told_to_wait_or_to_try_later(browser, url):
    context = browser.new_context()
    served, waits, refused = (context.new_page() for _ in range(3))
    with ExitStack() as others:

        def join(clients):
            for _ in range(clients):
                viewer = others.enter_context(Watcher(url))
                viewer.tell(start={"prompt": FALLS})

        opened(served, url)
        begin(served, FALLS)
        join(6)
        until(lambda: httpx.get(f"{url}/v1/server").json()["waiting"] == 6)
        opened(waits, url)
        waits.click("#start")
        comes(waits, "part('say').textContent.startsWith('Number 7 in the line')")
        opened(refused, url)
        refused.click("#start")
        comes(refused, "part('say').textContent === '8 watch or wait already, as many as may: try again later'")
        assert served.evaluate("running")
        with suppress(ConnectionClosed):
            join(11)
        assert httpx.get(f"{url}/v1/server").json()["viewers"] == 8
    comes(waits, "part('say').textContent.startsWith('Number 1 in the line')")
    served.close()
    comes(waits, "shownFrames > 0")
    context.close()
    until(lambda: is_free(url))


def test_what_is_refused_is_said(page, url):
    opened(page, url)
    begin(page, FALLS)
    page.fill("#prompt", "word " * 20)
    page.click("#change")
    comes(page, "part('say').classList.contains('bad')")
    assert "at most 16 words" in page.inner_text("#say")
    assert page.inner_text("#now") == FALLS, "it goes on"
    page.click("#stop")


def test_a_token_is_asked_for(page, studio, tmp_path):
    with live_server(studio, tmp_path, token=TOKEN) as url:
        page.expected_errors = 1  # the 401 of the wrong one
        page.goto(url)
        comes(page, "part('facts').textContent === 'This server wants a token.'")
        page.fill("#token", "wrong-wrong-wrong-wrong")
        page.press("#token", "Tab")
        comes(page, "part('facts').textContent.startsWith('token')")
        page.fill("#token", TOKEN)
        page.press("#token", "Tab")
        comes(page, "server !== null")
        begin(page, FALLS, seconds=0.4)
        comes(page, "!running")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_nothing_is_cut_off(browser, url, scheme, size):
    context = browser.new_context(color_scheme=scheme, viewport={"width": size[0], "height": size[1]})
    page = context.new_page()
    opened(page, url)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    colours = [page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")]
    ground, ink = (sum(map(int, colour[4:-1].split(","))) for colour in colours)
    assert (ground > ink) is (scheme == "light")
    context.close()
