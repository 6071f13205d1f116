"""The built documentation in a browser: links, widths, colours, requests, search."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest
from playwright.sync_api import Page, sync_playwright

from chromium import LAUNCH

SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"
WIDTHS = (390, 1280)

LINKS = "[...document.links].map(link => link.href)"
NAMES = "[...document.querySelectorAll('[id]')].map(element => element.id)"
# All that reaches beyond the window or its own box. Code and formulas may scroll inside theirs.
TOO_WIDE = """
const page = document.documentElement;
const inside = 'table, .table-wrapper, pre, div.math, img, svg';
[page, ...document.querySelectorAll('article').values().flatMap(
    article => article.querySelectorAll(inside).values())].filter(element => {
    const scrolls = element.matches('pre, div.math');
    return (element !== page && element.getBoundingClientRect().right > innerWidth + 1)
        || (!scrolls && element.clientWidth && element.scrollWidth > element.clientWidth + 1);
}).map(element => `${element.nodeName} ${element.textContent.trim().slice(0, 60)}`)
"""
BRIGHTNESS = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] / 255"


class Site:
    """All pages that links lead to from Sphinx's own, and all that the browser complains about."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.complaints: list[str] = []
        self.links: dict[str, set[str]] = {}
        self.names: dict[str, set[str]] = {}
        self.too_wide: list[str] = []
        self.wrong_colours: list[str] = []
        own = (address, "data:")
        page.on("request", lambda sent: sent.url.startswith(own) or self.complain(sent.url))
        page.on("response", lambda got: got.status >= 400 and self.complain(got.status, got.url))
        page.on("console", lambda said: said.type == "error" and self.complain(said.text))
        page.on("pageerror", self.complain)

    def complain(self, *what: Any) -> None:
        self.complaints.append(" ".join(map(str, (self.page.url, *what))))

    def crawl(self) -> None:
        waiting = {"index.html", "genindex.html", "py-modindex.html", "search.html"}
        while waiting:
            path = waiting.pop()
            self.page.goto(self.address + path)
            self.names[path] = set(self.page.evaluate(NAMES))
            self.links[path] = {
                link.removeprefix(self.address)
                for link in self.page.evaluate(LINKS)
                if link.startswith(self.address)
            }
            self.look_at(path)
            found = {urldefrag(link).url for link in self.links[path]}
            waiting |= {to for to in found if to.endswith(".html")} - set(self.links)

    def look_at(self, path: str) -> None:
        for width in WIDTHS:
            self.page.set_viewport_size({"width": width, "height": 900})
            for scheme in ("light", "dark"):
                self.page.emulate_media(color_scheme=scheme)
                found = self.page.evaluate(TOO_WIDE)
                self.too_wide += [f"{path}, {width} px, {scheme}: {what}" for what in found]
                if (self.page.evaluate(BRIGHTNESS) > 0.5) is not (scheme == "light"):
                    self.wrong_colours.append(f"{path}, {scheme}")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=SITE)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    assert (SITE / "index.html").exists(), "build the documentation first: nox -s docs"
    with serve() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(**LAUNCH)
        site = Site(browser.new_page(), address)
        site.crawl()
        yield site
        browser.close()


def test_links_lead_to_every_page(site: Site) -> None:
    built = {path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html")}
    assert set(site.links) == built


def test_pages_are_short() -> None:
    """Tables and code count, each piece of a line of code by itself, as it is marked up."""
    words = {}
    for path in SITE.rglob("*.html"):
        (article,) = re.findall(r"<article.*</article>", path.read_text("utf-8"), re.DOTALL)
        words[str(path.relative_to(SITE))] = len(re.sub(r"<[^>]*>", " ", article).split())
    assert {name: count for name, count in words.items() if count > 2000} == {}


def test_no_link_is_broken(site: Site) -> None:
    broken = []
    for path, links in site.links.items():
        for link in links:
            to, name = urldefrag(link)
            is_there = unquote(name) in {"", *site.names[to]} if to in site.names else False
            if not is_there and (to.endswith(".html") or not (SITE / to).is_file()):
                broken.append(f"{path} -> {link}")
    assert broken == []


def test_nothing_is_too_wide(site: Site) -> None:
    assert site.too_wide == []


def test_colours_follow_the_system(site: Site) -> None:
    assert site.wrong_colours == []


def test_search_finds(site: Site) -> None:
    site.page.goto(f"{site.address}search.html?q=ConvTranspose")
    site.page.wait_for_selector("#search-results li a", timeout=20_000)


def test_browser_has_no_complaint_and_asks_no_other_machine(site: Site) -> None:
    assert site.complaints == []
