"""The rendered book in a real browser: every page, at two widths, with the network off."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "build" / "html"
WIDTHS = {"desktop": 1280, "phone": 390}
PLAYER_PAGE = "notebooks/11_georeg_mnist"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def toc_pages() -> list[str]:
    """The table of contents, read here independently of the code that builds the book."""
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    return [toc["root"], *(page["file"] for part in toc["parts"] for page in part["chapters"])]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serve files without a log line for each."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    assert (HTML / "index.html").is_file(), "there is no built book; run: make book"
    handler = functools.partial(QuietHandler, directory=str(HTML))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    executable = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    assert executable, "no Chromium was found; install one or name it in CHROMIUM"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield chromium
        chromium.close()


@dataclass
class Visit:
    """An open page, and what went wrong while it loaded."""

    page: object
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)


@pytest.fixture
def visit(browser, address):
    """Open a page of the book at a width, with everything that is not the book cut off."""
    contexts = []

    def open_page(name: str, width: int) -> Visit:
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        result = Visit(page)

        def gate(route):
            if route.request.url.startswith(address):
                route.continue_()
            else:
                result.outside.append(route.request.url)
                route.abort()

        def console(message):
            if message.type == "error":
                result.errors.append(message.text)

        context.route("**/*", gate)
        page.on("console", console)
        page.on("pageerror", lambda error: result.errors.append(str(error)))
        response = page.goto(f"{address}/{name}.html", wait_until="load")
        assert response.ok, f"{name}: HTTP {response.status}"
        if page.locator(".math").count():
            page.wait_for_function("window.MathJax?.startup?.promise !== undefined")
            page.evaluate("MathJax.startup.promise")
        return result

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("name", toc_pages())
def test_page_is_sound(visit, name, width):
    seen = visit(name, width)
    page = seen.page

    assert page.locator("article h1").count() == 1
    assert page.title().strip()

    # Images may load lazily, so each is brought into view before it is judged.
    for image in page.locator("img").all():
        image.evaluate("image => { image.loading = 'eager'; }")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    broken = page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)")
    assert broken == []

    formulas = page.locator(".math").count()
    assert page.locator(".math:has(mjx-container)").count() == formulas
    assert page.locator("mjx-merror, .math:has([data-mjx-error])").count() == 0
    left_over = page.evaluate(
        r"""() => {
            const main = document.querySelector("article").cloneNode(true);
            const other = main.querySelectorAll("pre, code, script, style, mjx-container");
            other.forEach(element => element.remove());
            return main.textContent.match(/\\\(|\\\[|\$\$|\$[^\s$][^$\n]*\$/g) ?? [];
        }"""
    )
    assert left_over == []

    page.wait_for_timeout(100)  # late scripts get their say before the errors are read
    overflow = page.evaluate("document.scrollingElement.scrollWidth - window.innerWidth")
    assert overflow <= 1, f"{name} scrolls sideways by {overflow} px"
    assert seen.outside == []
    assert seen.errors == []


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_search_finds_a_word(visit, width):
    seen = visit("search", width)
    seen.page.goto(seen.page.url + "?q=displacement")
    seen.page.locator("#search-results li a").first.wait_for(timeout=10_000)
    assert seen.outside == []
    assert seen.errors == []


def test_front_address_leads_to_the_index_page(visit):
    page = visit("index", WIDTHS["desktop"]).page
    page.wait_for_url(f"**/{toc_pages()[0]}.html")


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_player_steps_through_its_frames(visit, width):
    seen = visit(PLAYER_PAGE, width)
    players = seen.page.locator(".reglib-player")
    assert players.count() >= 1
    for player in players.all():
        image, slider = player.locator("img"), player.locator("input[type=range]")
        player.scroll_into_view_if_needed()
        last = int(slider.get_attribute("max"))
        assert last >= 1

        def shown(image=image) -> tuple[str, str]:
            return image.get_attribute("src"), image.get_attribute("alt")

        frames = [shown()]
        for position in range(1, last + 1):
            slider.focus()
            slider.press("ArrowRight")
            assert slider.input_value() == str(position)
            frames.append(shown())
        assert len({label for _, label in frames}) == len(frames), "labels repeat"
        assert len({source for source, _ in frames}) > 1, "the picture never changes"

        player.get_by_label("Previous frame").click()
        assert shown() == frames[last - 1]
        player.get_by_label("Next frame").click()
        assert shown() == frames[last]

        box = image.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width + 1
    assert seen.errors == []
