"""Take the README's pictures of the page: a reply replayed in light, a canvas being denoised in dark, and a phone.

python -m tests.bench.screenshots        # with what `make test` installs, and Chromium
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from engine import EngineOptions, build_engine
from server.app import AppSettings, create_app
from server.bridge import Bridge
from server.chat import ChatService
from server.prompt import PromptRenderer
from tests.server.test_page_in_browser import CHROMIUM, DEMO, ask, finished, free_port, listening

FOLDER = Path(__file__).parents[2] / "server" / "web" / "screenshots"
STORY = "Write a story about Mia and a fox."
WIDE, PHONE = (1100, 720), (390, 780)
SEEN = 4  # steps of the story's first canvas


def opened(browser: Browser, address: str, size: tuple[int, int], scheme: Any) -> Page:
    """The page after a first answer."""
    page = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme).new_page()
    page.goto(address)
    page.get_by_role("button", name="What is 17 + 25?").click()
    finished(page)
    return page


def replayed(page: Page, file: str) -> None:
    """A story, and its first canvas after some steps."""
    ask(page, STORY)
    page.get_by_role("button", name="Replay").nth(1).click()  # there once the reply is
    page.get_by_label("Step", exact=True).fill(str(SEEN - 1))
    page.mouse.move(0, 300)
    page.screenshot(path=FOLDER / file)


def main() -> None:
    engine = build_engine(EngineOptions(model=str(DEMO), progress=False))
    step, pause = engine.step, [0.0]

    def slowly() -> Any:
        time.sleep(pause[0])
        return step()

    engine.step = slowly  # type: ignore[method-assign]
    with Bridge(engine) as bridge, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        app = create_app(ChatService(bridge, PromptRenderer.from_folder(DEMO), ["easel-demo"]), AppSettings())
        with listening(app, free_port()) as address:
            replayed(opened(browser, address, WIDE, "light"), "light.png")
            replayed(opened(browser, address, PHONE, "light"), "phone.png")
            page = opened(browser, address, WIDE, "dark")
            pause[0] = 1.0  # a picture takes a while
            ask(page, STORY)
            page.get_by_text(f"step {SEEN}").wait_for()
            page.mouse.move(0, 300)
            page.screenshot(path=FOLDER / "dark.png")
            pause[0] = 0.0
        browser.close()


if __name__ == "__main__":
    main()
