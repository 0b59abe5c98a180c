"""The page in a real browser: Debian's Chromium, or whichever is installed. Without one these tests skip themselves."""

from __future__ import annotations

import base64
import contextlib
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from engine import EngineOptions, build_engine
from server.access import Keys
from server.app import AppSettings, create_app
from server.bridge import Bridge
from server.chat import ChatService
from server.images import ImageReader
from server.prompt import PromptRenderer
from tests.fakes import FakeEngine, Script, Template, byte_tokenizer, script
from tests.server.test_images import WITH_IMAGES, file, processor

sync_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
DEMO = Path(__file__).parents[2] / "engine" / "demo" / "checkpoint"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
LONG = script(*["word " * 10] * 50, step_seconds=0.02)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM)
        yield running
        running.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A new window of an empty browser; at the end nothing may have been said on its console."""
    context = browser.new_context(viewport={"width": 1100, "height": 760})
    opened = context.new_page()
    opened.set_default_timeout(15_000)
    logged: list[str] = []
    opened.on("console", lambda message: logged.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: logged.append(str(error)))
    opened.expected = []  # what the browser itself logs of answers that a test provokes
    yield opened
    context.close()
    assert not [line for line in logged if not any(part in line for part in opened.expected)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def listening(app: Any, port: int) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", lifespan="off"))
    server.config.timeout_graceful_shutdown = 0
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def site(prompts: PromptRenderer) -> Iterator[Callable[..., str]]:
    """site(script, ..., keys=…) -> address of a server that says so"""
    with contextlib.ExitStack() as stack:

        def build(*scripts: Script, **settings: Any) -> str:
            bridge = stack.enter_context(Bridge(FakeEngine(scripts)))
            app = create_app(ChatService(bridge, prompts, ["demo"]), AppSettings(drain_seconds=0, **settings))
            return stack.enter_context(listening(app, free_port()))

        yield build


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def said(page: Any, text: str) -> None:
    """The reply is there and says so."""
    page.locator(".prose", has_text=text).last.wait_for()


def finished(page: Any) -> None:
    page.get_by_role("button", name="Retry").last.wait_for()


def sound(page: Any) -> None:
    """No fault that axe calls serious or worse."""
    found = axe.Axe().run(page).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")] == []


def test_the_demo_model_denoises_before_ones_eyes(page: Any) -> None:
    engine = build_engine(EngineOptions(model=str(DEMO), progress=False))
    prompts = PromptRenderer.from_folder(DEMO)
    with Bridge(engine) as bridge:
        app = create_app(ChatService(bridge, prompts, ["easel-demo"]), AppSettings(drain_seconds=0))
        with listening(app, free_port()) as address:
            page.goto(address)
            page.get_by_role("button", name="What is 17 + 25?").click()
            finished(page)
            assert "42" in page.locator(".prose").inner_text()
            assert "tokens per forward" in page.locator(".facts").inner_text()
            ask(page, "Write a story about Mia and a fox.")
            page.get_by_role("button", name="Replay").nth(1).click()  # there once the reply is
            slider = page.get_by_label("Step", exact=True)
            noise = page.locator(".canvas .noise").count()
            slider.fill(slider.get_attribute("max"))
            assert page.locator(".canvas .noise").count() < noise


def test_send_watch_replay_and_reload(page: Any, site: Callable[..., str]) -> None:
    page.goto(site(script("Hello **you**", "\n\n```python\nx = 1\n```\n", steps=20, step_seconds=0.15)))
    ask(page, "Hi")
    page.locator(".denoising .noise").first.wait_for()  # the canvas is seen while it is noise
    before = page.locator(".canvas .known").count()
    page.locator(".canvas .known").nth(before).wait_for()  # and there is ever more text on it
    finished(page)
    assert page.locator(".prose strong").inner_text() == "you"
    assert page.locator(".prose .hljs-number").inner_text() == "1"
    page.reload()
    page.locator(".prose strong").wait_for()
    page.get_by_role("button", name="Replay").click()  # the steps have outlived the page
    slider = page.get_by_label("Step", exact=True)
    assert page.locator(".canvas .noise").count() > 0
    slider.focus()
    page.keyboard.press("End")
    assert slider.get_attribute("aria-valuetext") == "Canvas 2, step 20"
    assert page.locator(".canvas .noise").count() == 0
    sound(page)


def test_stop_edit_and_retry(page: Any, site: Callable[..., str]) -> None:
    page.goto(site(LONG, script("second"), script("third")))
    ask(page, "Go on forever")
    page.locator(".prose").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    page.get_by_role("button", name="Retry").click()
    said(page, "second")
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit message").fill("Something else")
    page.get_by_role("button", name="Send again").click()
    said(page, "third")
    assert page.locator("article").count() == 2
    page.get_by_role("button", name="New conversation").first.click()
    assert page.locator("article").count() == 0
    page.get_by_role("button", name="Go on forever", exact=True).click()
    assert page.locator(".bubble").inner_text() == "Something else"


def test_a_server_that_goes_away_and_comes_back(page: Any, prompts: PromptRenderer) -> None:
    page.expected = ["ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET"]
    port = free_port()
    with Bridge(FakeEngine([script("one"), script("two")])) as bridge:
        app = create_app(ChatService(bridge, prompts, ["demo"]), AppSettings(drain_seconds=0))
        with listening(app, port) as address:
            page.goto(address)
            ask(page, "Hi")
            finished(page)
        ask(page, "Are you there?")
        page.locator("article .fault").wait_for()
        page.locator(".banner").wait_for()
        with listening(app, port):
            page.locator(".banner").wait_for(state="detached")
            page.get_by_role("button", name="Retry").last.click()
            said(page, "two")
            assert page.locator("article .fault").count() == 0


def test_thoughts_are_folded_calls_are_shown_and_html_is_text(page: Any, site: Callable[..., str]) -> None:
    thought = script("<|channel>thought\nhm<channel|>See <img src=x onerror=alert(1)> [a](javascript:alert(1))")
    call = script('<|tool_call>call:look{place:<|"|>Paris<|"|>}<tool_call|>', stop_id=50)
    page.goto(site(thought, call, script("hm<channel|>Sunny")))
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tools").fill('[{"type": "function", "function": {"name": "look"}}]')
    page.get_by_label("Think before answering").check()
    sound(page)
    page.get_by_role("button", name="Done").click()
    ask(page, "Weather?")
    finished(page)
    assert not page.get_by_text("hm", exact=True).is_visible()
    page.get_by_text("Thinking").click()
    assert page.get_by_text("hm", exact=True).is_visible()
    assert "<img src=x" in page.locator(".prose").inner_text()
    assert page.locator(".prose img").count() == 0
    assert page.locator(".prose a[href^=javascript]").count() == 0
    ask(page, "And now?")
    page.get_by_label("Result of look").fill("sun")
    page.get_by_role("button", name="Give result").click()
    said(page, "Sunny")


def test_images_are_attached_where_the_model_takes_them(page: Any, site: Callable[..., str]) -> None:
    page.goto(site(script("x")))
    page.get_by_text("demo", exact=True).wait_for()
    assert page.get_by_label("Attach images").count() == 0
    prompts = PromptRenderer(byte_tokenizer(), Template(WITH_IMAGES))
    engine = FakeEngine([script("A red square."), script("Still red.")], image_tokens=70)
    with Bridge(engine) as bridge:
        service = ChatService(bridge, prompts, ["demo"], ImageReader(processor()))
        with listening(create_app(service, AppSettings(drain_seconds=0)), free_port()) as address:
            page.goto(address)
            page.get_by_label("Attach images").set_input_files(
                [
                    {"name": "red.png", "mimeType": "image/png", "buffer": base64.b64decode(file(1500, 1000))},
                    {"name": "not.png", "mimeType": "image/png", "buffer": b"hello"},
                ]
            )
            page.get_by_text("not.png is not an image").wait_for()
            page.get_by_role("button", name="Remove image 1").wait_for()
            sound(page)
            ask(page, "What is it?")
            said(page, "A red square.")
            page.reload()
            assert page.get_by_alt_text("Image 1").evaluate("each => each.naturalWidth") == 1225
            page.get_by_role("button", name="Edit").click()
            page.get_by_label("Edit message").fill("And now?")
            page.get_by_role("button", name="Send again").click()
            said(page, "Still red.")
            sound(page)
    first, second = engine.requests
    assert first.images[0].number == second.images[0].number
    assert (first.images[0].columns, first.images[0].rows) == (30, 18)


def test_two_tabs_keep_each_others_conversations(page: Any, site: Callable[..., str]) -> None:
    page.goto(site(script("one"), script("two")))
    other = page.context.new_page()
    other.goto(page.url)
    for window, text in ((page, "First"), (other, "Second")):
        window.get_by_role("button", name="New conversation").first.click()
        ask(window, text)
        finished(window)
    for window in (page, other):
        window.reload()
        window.get_by_role("button", name="First", exact=True).wait_for()
        window.get_by_role("button", name="Second", exact=True).wait_for()


def test_a_key_is_asked_for(page: Any, site: Callable[..., str]) -> None:
    page.expected = ["401"]
    page.goto(site(script("welcome"), keys=Keys(["secret"])))
    page.get_by_label("This server wants an API key").fill("secret")
    page.get_by_role("button", name="Use it").click()
    page.locator(".banner").wait_for(state="detached")
    ask(page, "Hi")
    said(page, "welcome")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off(page: Any, site: Callable[..., str], scheme: str) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.goto(site(script("Hello " + "x" * 50)))
    ask(page, "Hi")
    finished(page)
    page.get_by_role("button", name="Replay").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    sound(page)
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("link", name="Server statistics").click()
    page.get_by_text("Seconds to first text").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    sound(page)
