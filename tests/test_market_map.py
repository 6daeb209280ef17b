"""The market map in a browser: clicks, fingers and keys, names that are no markup, many models, and no WebGL"""
import re

import numpy as np
import pandas as pd
import pytest

from lps.index.map import LIMIT, SEVERAL, MapSettings, model_map

EVIL = [
    "</script><script>window.hit = 1</script>",
    '"><img src=x onerror="window.hit = 1">',
    "<a href='javascript:window.hit = 1'>press</a> &lt;b&gt; ${1}",
]
LIT = "lit => document.getElementById('map').data[0].selectedpoints?.join() === lit.join()"
PATIENCE = 180_000  # milliseconds on a busy machine
SIZES = {1200: dict(width=1200, height=900), 390: dict(width=390, height=844)}


def unit_rows(x): return x/np.linalg.norm(x, axis=1, keepdims=True)


def nearest(embedding, i, k=10) -> list[int]:
    "Numbers of the k models with the largest cosine to model i"
    cosine = unit_rows(embedding)@unit_rows(embedding)[i]
    cosine[i] = -2
    cosine[np.isnan(cosine)] = -2
    return np.argsort(-cosine)[:k].tolist()


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    "Sixty models, of which the last three have names that try to be markup, by two methods; the file of their map"
    rng = np.random.default_rng(0)
    names = [f"model{i:02d}" for i in range(57)] + EVIL
    tasks = np.arange(60)//10
    facts = dict(class_0=np.array(EVIL)[tasks % 3], class_1="dog", val_accuracy=rng.random(60), architecture="resnet20")
    first, second = rng.normal(size=(6, 8))[tasks] + .3*rng.normal(size=(60, 8)), rng.normal(size=(60, 4))
    second[7] = np.nan
    manifest, embeddings = pd.DataFrame(dict(file=names, task=tasks) | facts), {"first": first, "<i>second": second}
    path = tmp_path_factory.mktemp("map")/"map.html"
    return manifest, embeddings, model_map(manifest, embeddings, path, MapSettings(EVIL[0]))


@pytest.fixture
def show(browser):
    "Opens a page at a width; it must have neither errors nor requests to elsewhere when the test is over"
    contexts, errors = [], []
    def note_message(message):
        if message.type == "error": errors.append(message.text)
    def open_page(path, width=1200, script=None):
        context = browser.new_context(viewport=SIZES[width], has_touch=width == 390, is_mobile=width == 390)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        tab = context.new_page()
        tab.on("console", note_message)
        tab.on("pageerror", lambda e: errors.append(str(e)))
        tab.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else errors.append(r.url))
        if script: tab.add_init_script(script)
        tab.goto(path.as_uri())
        tab.wait_for_selector("body[data-ready]")
        return tab
    yield open_page
    for context in contexts: context.close()
    assert not errors


def place_of(tab, i) -> tuple[float, float]:
    "Where plotly has drawn a model, in pixels of the window"
    tab.locator("#map").scroll_into_view_if_needed()
    box = tab.locator("#map .scatterlayer .point").nth(i).bounding_box()
    return box["x"] + box["width"]/2, box["y"] + box["height"]/2


def loneliest(tab) -> int:
    "The model that is farthest from any other on the map, which a click cannot miss"
    xy = np.array(tab.evaluate("[method().x, method().y]"))
    apart = np.linalg.norm(xy[:, :, None] - xy[:, None], axis=0) + 9*np.eye(xy.shape[1])
    return int(apart.min(1).argmax())


def listed(tab) -> list[str]:
    return tab.locator("#neighbours button > span:nth-of-type(1)").all_text_contents()


@pytest.mark.parametrize("width", SIZES)
def test_a_click_shows_the_nearest_models_and_a_leaf_its_task(show, market, width):
    manifest, embeddings, path = market
    tab, names = show(path, width), manifest.file.tolist()
    press = tab.mouse.click if width == 1200 else tab.touchscreen.tap
    alone = loneliest(tab)
    press(*place_of(tab, alone))
    assert tab.text_content("#chosen") == names[alone]
    wanted = nearest(embeddings["first"], alone)
    assert listed(tab) == [names[j] for j in wanted]
    assert tab.locator("#above circle").count() == 11
    ring = tab.locator("#above .chosen").bounding_box()
    assert np.allclose(place_of(tab, alone), [ring["x"] + ring["width"]/2, ring["y"] + ring["height"]/2], atol=1.5)
    tab.locator("#neighbours button").nth(2).click()
    assert tab.inner_text("#chosen") == names[wanted[2]]
    tab.get_by_label("<i>second").check()
    assert listed(tab) == [names[j] for j in nearest(embeddings["<i>second"], wanted[2])]
    tab.wait_for_function("document.getElementById('map').data[0].x[7] === null")
    assert "1 model that it cannot embed left out" in tab.inner_text("#how")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    leaf = tab.locator("#tree .scatterlayer .trace").nth(1).locator(".point").nth(2)
    leaf.click(force=True)
    pressed = tab.locator("#legend [aria-pressed=true]")
    pressed.wait_for()
    assert tab.locator("#tree .ytick").nth(2).text_content().removesuffix("…") in pressed.inner_text()


def focused(tab) -> str:
    "Id, or text, of what has the focus; it must be seen that it has it"
    seen = "(e => getComputedStyle(e).outlineStyle !== 'none' || e.matches('h2'))(document.activeElement)"
    assert tab.evaluate(seen)
    return tab.evaluate("document.activeElement.id || document.activeElement.parentElement.innerText.trim()")


def tab_to(tab, wanted):
    "Press Tab until something has the focus"
    for _ in range(60):
        tab.keyboard.press("Tab")
        if wanted(focused(tab)): return
    raise AssertionError("60 presses of Tab did not lead there")


def test_everything_can_be_done_by_keyboard(show, market):
    manifest, embeddings, path = market
    tab, names = show(path), manifest.file.tolist()
    keys = tab.keyboard
    tab_to(tab, lambda what: what == "first")
    keys.press("ArrowRight")
    assert focused(tab) == "<i>second" and "<i>second" in tab.inner_text("#how")
    tab_to(tab, lambda what: what == "search")
    keys.type("MODEL4")
    assert tab.inner_text("#count") == "10 models found, the first 8 listed"
    tab.wait_for_function(LIT, arg=list(range(40, 50)))
    keys.press("ArrowDown")
    keys.press("ArrowDown")
    keys.press("Enter")
    wanted = [names[j] for j in nearest(embeddings["<i>second"], 41)]
    assert focused(tab) == "chosen" and tab.inner_text("#chosen") == "model41" and listed(tab) == wanted
    assert tab.text_content("#said") == f"model41 chosen. Nearest by <i>second: {', '.join(wanted[:3])}."
    assert tab.input_value("#search") == "" and tab.locator("#found button").count() == 0
    keys.press("Tab")
    assert focused(tab).startswith(wanted[0])
    keys.press("ArrowDown")
    keys.press("Enter")
    assert tab.inner_text("#chosen") == wanted[1]
    tab_to(tab, lambda what: what.startswith("1 · "))
    keys.press("Space")
    assert tab.locator("#legend [aria-pressed=true]").count() == 1
    tab.wait_for_function(LIT, arg=list(range(10, 20)))
    keys.press("Space")
    tab.wait_for_function("!document.getElementById('map').data[0].selectedpoints")


def test_names_are_text(show, market):
    tab = show(market[2])
    for i, name in zip(range(57, 60), EVIL):
        tab.fill("#search", name)
        tab.keyboard.press("Enter")
        assert tab.text_content("#chosen") == name
        tab.evaluate("i => Plotly.Fx.hover('map', [{curveNumber: 0, pointNumber: i}])", i)
        tab.wait_for_function("name => document.querySelector('.hoverlayer')?.textContent.includes(name)", arg=name)
    assert tab.title() == tab.text_content("h1") == EVIL[0]
    assert tab.locator("img, main a, main i").count() == 0 and tab.locator("script").count() == 3
    assert tab.evaluate("window.hit") is None


def test_markup_that_got_through_would_be_no_script(browser, market):
    "The page's policy refuses what is not its own script, and images from anywhere"
    tab, refused = browser.new_page(), []
    tab.set_default_timeout(PATIENCE)
    tab.on("console", lambda message: refused.append(message.text))
    tab.goto(market[2].as_uri())
    tab.evaluate("""() => {
        const made = document.createElement('div')
        made.innerHTML = '<img src="http://a.invalid/x.png"><button onclick="window.hit = 1">x</button>'
        document.body.append(made)
        made.querySelector('button').click()
    }""")
    tab.wait_for_timeout(100)
    assert tab.evaluate("window.hit") is None and len(refused) >= 2
    tab.close()


def test_a_market_beyond_the_limit_is_sampled_and_responds(show, tmp_path):
    n = LIMIT + 1
    embedding, tasks = np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32), np.arange(n) % 100
    manifest = pd.DataFrame(dict(file=[f"model{i}" for i in range(n)], task=tasks))
    tab = show(model_map(manifest, {"first": embedding}, tmp_path/"many.html"))
    assert "20,000 models of 100 tasks" in tab.inner_text("header p")
    assert "A random sample: 20,000 of 20,001 models" in tab.inner_text("header p")
    assert tab.evaluate("document.getElementById('map').data[0].type") == "scattergl"
    assert tab.locator("#map .no-webgl").count() == 0
    tab.fill("#search", "model12345")
    tab.keyboard.press("Enter")
    kept = set(tab.evaluate("data.names"))
    assert len(kept) == LIMIT and kept < set(manifest.file)
    assert tab.inner_text("#chosen") == "model12345" and tab.locator("#above circle").count() == 11
    assert listed(tab) == [name for name in manifest.file[nearest(embedding, 12345, 11)] if name in kept][:10]
    assert tab.locator("#legend button").count() == 57 and "44 smaller ones" in tab.inner_text("#legend li:last-child")


def test_without_webgl_and_without_facts(show, tmp_path):
    "SVG in place of WebGL; where no task is known there is no tree"
    embedding = np.random.default_rng(0).normal(size=(SEVERAL + 1, 3))
    manifest = pd.DataFrame(dict(file=[f"model{i}" for i in range(len(embedding))]))
    none = "HTMLCanvasElement.prototype.getContext = () => null"
    tab = show(model_map(manifest, {"first": embedding}, tmp_path/"plain.html"), script=none)
    tab.mouse.click(*place_of(tab, 3))
    assert re.fullmatch(r"model\d+", tab.inner_text("#chosen")) and len(listed(tab)) == 10
    assert not tab.locator("#tree-section").is_visible() and not tab.locator("#methods").is_visible()
