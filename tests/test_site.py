"""The built site, as files and in a browser: no dead link, no console error, all pictures, a working search"""
import functools
import http.server
import json
import re
import runpy
import subprocess
import sys
import threading
from collections import namedtuple
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from conftest import ROOT, copy_of_repo

BLANK_IMAGES = """[...document.images].filter(i => !(i.complete && i.naturalWidth))
                                 .map(i => document.title + ': ' + i.src.slice(0, 80))"""
Page = namedtuple("Page", "links ids images undescribed")
NOTEBOOKS = [p for p in sorted(ROOT.glob("nbs/**/*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    "Build the site as `make docs` does, from a copy of the repository"
    copy = copy_of_repo(tmp_path_factory.mktemp("site")/"lps")
    run = subprocess.run([sys.executable, "scripts/docs.py", "site"], cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return copy/"_docs"


class Reader(HTMLParser):
    "Collect the links, anchors and pictures of a page"

    def __init__(self):
        super().__init__()
        self.page = Page(set(), set(), [], [])

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("id"): self.page.ids.add(attrs["id"])
        if tag in ("a", "link") and attrs.get("href"): self.page.links.add(attrs["href"])
        if tag in ("img", "script") and attrs.get("src"): self.page.links.add(attrs["src"])
        if tag == "img": self.page.images.append(attrs.get("src", ""))
        if tag == "img" and not attrs.get("alt"): self.page.undescribed.append(attrs.get("src", "")[:60])


@pytest.fixture(scope="session")
def pages(site) -> dict[str, Page]:
    found = {}
    for path in site.rglob("*.html"):
        reader = Reader()
        reader.feed(path.read_text(encoding="utf-8"))
        found[path.relative_to(site).as_posix()] = reader.page
    return found


def test_one_page_for_every_notebook_and_module(pages):
    wanted = {p.relative_to(ROOT/"nbs").with_suffix(".html").as_posix() for p in NOTEBOOKS}
    docs = runpy.run_path(str(ROOT/"scripts/docs.py"))
    wanted |= {f"api/{name}.html" for name in docs["api_names"]()}
    assert wanted <= set(pages)


def test_no_dead_local_link(site, pages):
    dead = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(urljoin(f"http://site/{name}", link))
            if parts.netloc != "site" or parts.scheme != "http": continue
            target = unquote(parts.path).lstrip("/")
            if not target or target.endswith("/"): target += "index.html"
            if target in pages: known = parts.fragment in ("", *pages[target].ids)
            else: known = (site/target).is_file() and not parts.fragment
            if not known: dead.append(f"{name}: {link}")
    assert not dead


def test_pages_load_nothing_from_elsewhere(site, pages):
    for name, page in pages.items():
        assert not [link for link in page.images if link.startswith(("http:", "https:", "//"))], name
    for style in site.rglob("*.css"):
        assert "@import url(http" not in style.read_text(encoding="utf-8", errors="replace"), style.name


def test_api_page_shows_shapes(site):
    text = (site/"api/align.html").read_text(encoding="utf-8")
    assert "align_layer" in text and "(P, Q, k, k)" in text


def test_api_entries_have_an_example_and_a_link_to_their_notebook(site):
    text = (site/"api/align.html").read_text(encoding="utf-8")
    for name in ("frobenius_scores", "align_layer"):
        entry = text[text.index(f'data-anchor-id="{name}"'):]
        example, link = entry.index("<pre><code>"), entry.index('href="../01_align.html"')
        assert name in entry[example:link]


@pytest.fixture(scope="session")
def served(site) -> str:
    "Serve the site; return its address"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


WIDTHS = 1280, 390  # of screens
BOXES = """() => [...document.querySelectorAll('main :is(table, figure, img, pre, .cell-output-display)')]
    .filter(box => box.getClientRects().length)
    .filter(box => box.scrollWidth > box.clientWidth + 1 && box.tagName != 'IMG' ||
                   box.getBoundingClientRect().right > box.closest('main').getBoundingClientRect().right + 1)
    .map(box => `${box.tagName}.${box.className} ${box.scrollWidth}`)"""  # that scroll sideways or stick out
FORMULAS = """() => [...document.querySelectorAll('main math')].filter(m => m.checkVisibility()).filter(m => {
    const end = m.closest('main').getBoundingClientRect().right + 1
    if (m.textContent.includes('\\\\')) return true
    return [...m.querySelectorAll('*')].some(k => k.getBoundingClientRect().right > end)
}).map(m => m.textContent)"""  # that are cut, or hold a command that was not typeset
BROKEN_WORDS = """() => {
    const broken = new Set(), range = document.createRange()
    for (const cell of document.querySelectorAll('main table:not(.tight) :is(td, th)')) {
        if (!cell.checkVisibility()) continue
        const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT)
        while (walker.nextNode()) for (const word of walker.currentNode.data.matchAll(/[A-Za-z]{2,12}/g)) {
            range.setStart(walker.currentNode, word.index)
            range.setEnd(walker.currentNode, word.index + word[0].length)
            if (new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1) broken.add(word[0])
        }
    }
    return [...broken]
}"""  # in tables; `tight` ones have too many columns for a narrow screen
IS_DARK = "wanted => document.documentElement.classList.contains('quarto-dark') == wanted"
CONTRAST = """least => {
    const parse = text => {
        const numbers = text.match(/[\\d.]+/g).map(Number)
        return text.startsWith('color(') ? numbers.map((v, i) => i < 3 ? 255*v : v) : numbers
    }
    const over = (top, below) => {
        const a = top.length > 3 ? top[3] : 1
        return [0, 1, 2].map(i => top[i]*a + below[i]*(1 - a))
    }
    const grounds = new Map([[null, [255, 255, 255]]])
    const ground = node => {
        if (!grounds.has(node))
            grounds.set(node, over(parse(getComputedStyle(node).backgroundColor), ground(node.parentElement)))
        return grounds.get(node)
    }
    const luminance = rgb => {
        const [r, g, b] = rgb.map(v => v/255 <= .03928 ? v/255/12.92 : ((v/255 + .055)/1.055)**2.4)
        return .2126*r + .7152*g + .0722*b
    }
    const low = new Set()
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
    while (walker.nextNode()) {
        const box = walker.currentNode.parentElement
        if (!walker.currentNode.data.trim() || !box.checkVisibility({visibilityProperty: true})) continue
        if (box.closest('script, style, iframe, svg')) continue
        const below = ground(box)
        const [a, b] = [luminance(below), luminance(over(parse(getComputedStyle(box).color), below))]
        const ratio = (Math.max(a, b) + .05)/(Math.min(a, b) + .05)
        if (ratio < least) low.add(`${box.tagName}.${box.className} ${ratio.toFixed(1)}`)
    }
    return [...low]
}"""
LEAST = 4.5  # contrast of text with its background, as WCAG 2.2 AA asks
SCHEMES = "light", "dark"
Visits = namedtuple("Visits", "errors blank wide boxes formulas words")


@pytest.fixture(scope="session")
def visits(browser, served, pages) -> Visits:
    "Visit all pages in a browser, on a wide and on a narrow screen; return its complaints"
    found, tab = Visits([], [], [], [], [], []), browser.new_page()
    def note_message(message):
        if message.type == "error": found.errors.append(f"{tab.url}: {message.text}")
    def note_failure(request):
        if request.failure == "net::ERR_ABORTED": return
        found.errors.append(f"{tab.url}: {request.url}: {request.failure}")
    tab.on("console", note_message)
    tab.on("pageerror", lambda e: found.errors.append(f"{tab.url}: {e}"))
    tab.on("requestfailed", note_failure)
    for name in pages:
        tab.goto(f"{served}/{name}", wait_until="load")
        found.blank.extend(tab.evaluate(BLANK_IMAGES))
        for width in WIDTHS:
            tab.set_viewport_size({"width": width, "height": 800})
            if tab.evaluate("document.documentElement.scrollWidth") > width: found.wide.append((name, width))
            for kind, script in dict(boxes=BOXES, formulas=FORMULAS, words=BROKEN_WORDS).items():
                getattr(found, kind).extend(f"{name} at {width}: {text}" for text in tab.evaluate(script))
    tab.close()
    return found


def test_every_page_loads_without_a_console_error(visits): assert not visits.errors and not visits.blank


def test_stored_pictures_are_on_the_pages(pages):
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        outputs = chain.from_iterable(c.get("outputs", []) for c in cells)
        drawn = sum("image/png" in out.get("data", {}) for out in outputs)
        page = pages[path.relative_to(ROOT/"nbs").with_suffix(".html").as_posix()]
        assert len(page.images) >= drawn, path.name


def test_every_picture_has_alternative_text(pages):
    assert not {name: page.undescribed for name, page in pages.items() if page.undescribed}


def pictures_of(path: Path) -> dict[str, str]:
    "Return the alternative text of each cell with a picture in a notebook, empty if it has none"
    from lps.study.registry import EXPERIMENTS
    found = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if not any("image/png" in out.get("data", {}) for out in cell.get("outputs", [])): continue
        source = "".join(cell["source"])
        alt = re.search(r'^#\| fig-alt: "(.+)"$', source, flags=re.M)
        is_result = path.parent.name == "experiments" and "show_results(" in source  # docs.py describes these
        found[cell["id"]] = alt[1] if alt else EXPERIMENTS[path.stem].see if is_result else ""
    return found


def test_every_stored_picture_is_described_by_more_than_the_text_around_it():
    n_pictures, bad = 0, []
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = " ".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        for cell, alt in pictures_of(path).items():
            n_pictures += 1
            if len(alt.split()) < 7 or alt in prose: bad.append(f"{path.stem} {cell}: {alt}")
    assert n_pictures > 80 and not bad


def test_every_figure_of_the_results_has_a_caption(site):
    text = (site/"results.html").read_text(encoding="utf-8")
    main = text[text.index("<main"):text.index("</main>")]
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", main, flags=re.S)
    assert len(captions) == main.count("<img ") and all(map(str.strip, captions))


def test_every_experiment_shows_figures(pages):
    assert not [name for name, page in pages.items() if name.startswith("experiments/") and not page.images]


def test_no_page_is_wider_than_the_screen(visits): assert not visits.wide


def test_no_table_figure_or_output_scrolls_sideways(visits): assert not visits.boxes


def test_no_formula_is_cut(visits): assert not visits.formulas


def test_no_word_of_a_table_is_broken(visits): assert not visits.words


PAGES_OF_EACH_KIND = [
    "index", "results", "commands", "modelset500", "promises", "01_align", "tutorials/quickstart", "index/05_map",
    "methods/03_signatures", "experiments/leaderboard", "experiments/table1", "api/align", "images/market-map",
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_is_readable_in_light_and_dark(browser, served, scheme):
    tab = browser.new_page(color_scheme=scheme, reduced_motion="reduce")
    faint = []
    for name in PAGES_OF_EACH_KIND:
        tab.goto(f"{served}/{name}.html", wait_until="load")
        if "images/" not in name: tab.wait_for_function(IS_DARK, arg=scheme == "dark")
        ground = tab.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.split('(')[1])")
        assert (ground < 128) == (scheme == "dark"), f"{name} has no {scheme} colours"
        faint += [f"{name}: {text}" for text in tab.evaluate(CONTRAST, LEAST)]
    tab.close()
    assert not faint


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_keyboard_reaches_links_in_order_and_shows_where_it_is(browser, served, scheme):
    tab = browser.new_page(color_scheme=scheme)
    tab.goto(f"{served}/results.html", wait_until="load")
    tops = []
    for _ in range(12):
        tab.keyboard.press("Tab")
        where, style, width, top = tab.evaluate("""() => {
            const node = document.activeElement, look = getComputedStyle(node)
            return [node.outerHTML.slice(0, 80), look.outlineStyle, parseFloat(look.outlineWidth),
                    node.closest('header') ? 0 : 1]
        }""")
        assert style == "solid" and width >= 2, where
        tops.append(top)
    assert tops == sorted(tops), "the header's links come first"
    tab.close()


def test_folds_open_with_the_keyboard(browser, served):
    tab = browser.new_page()
    tab.goto(f"{served}/results.html", wait_until="load")
    tab.locator("main details > summary").first.focus()
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.querySelector('main details').open")
    tab.close()


def test_search_finds_align_layer(browser, served):
    tab = browser.new_page()
    tab.goto(served)
    tab.keyboard.press("/")
    tab.keyboard.type("align_layer")
    hit = tab.locator(".search-result").first.filter(has_text="align_layer")  # earlier results are for fewer letters
    hit.wait_for(timeout=10_000)
    hit.click()
    tab.wait_for_load_state()
    assert tab.url != f"{served}/" and "align_layer" in tab.inner_text("main")
    tab.close()
