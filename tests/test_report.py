"""The report as a file: nothing in it comes from elsewhere, nothing that users name is markup, no figure stays open"""
import html
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from lps.study.figures import map_2d, plot_embedding, plot_rank_k, plot_similarity
from lps.study.report import html_report

EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><script src=http://a.b/c.js></script>",
    "{{ 7*7 }}",
    "{% raw %}",
    "a$b$c",
    "$\\frac{",
    "${x}$",
    "&lt;b&gt;",
    "'",
    "two\nlines",
    "Ünïcode 0/5",
]


@pytest.fixture(autouse=True)
def no_figures_left():
    plt.close("all")
    yield
    plt.close("all")


def embeddings(n_tasks, n_models=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    e = torch.randn(n_tasks, 16, generator=g).repeat_interleave(n_models, 0) + 0.3 * torch.randn(
        n_tasks * n_models, 16, generator=g
    )
    return F.normalize(e, dim=1), torch.arange(n_tasks).repeat_interleave(n_models)


class Page(HTMLParser):
    "Tags with their attributes, checked to be closed in order"
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.data = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"): self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.data.append(data)

    def all(self, tag): return [a for t, a in self.tags if t == tag]


def evil_report(path):
    e, y = embeddings(len(EVIL))
    table = pd.DataFrame({EVIL[0]: EVIL, "n": range(len(EVIL))}, index=pd.Index(EVIL, name=EVIL[1]))
    wide = pd.DataFrame([[1.0, 2.0]], columns=pd.MultiIndex.from_tuples([(EVIL[0], "a"), (EVIL[2], "b")]))
    return html_report(
        path,
        EVIL[0],
        [(h, [h, (table, h), wide]) for h in EVIL]
        + [
            (
                "Figures",
                [
                    (plot_similarity(e @ e.T, y, EVIL, EVIL[0]), EVIL[1]),
                    plot_embedding(e, y, EVIL, EVIL[5]),
                    plot_embedding(e[:8], y[:8], EVIL[6:8], EVIL[7]),
                    plot_rank_k({n: np.arange(5) for n in EVIL}, {EVIL[6]: np.arange(5)}, EVIL[6]),
                ],
            )
        ],
    )


def test_names_are_never_markup(tmp_path):
    page = Page(evil_report(tmp_path/"r.html").read_text())
    assert not page.open
    assert {t for t, _ in page.tags} <= set(
        "html head meta link title style body main h1 h2 nav a section p figure figcaption div table thead tbody tr th"
        " td img footer".split()
    )
    assert not [k for _, a in page.tags for k in a if k.startswith("on")]
    assert page.all("img")[0]["alt"] == EVIL[1] and page.all("img")[1]["alt"] == EVIL[5]
    text = "".join(page.data)
    for name in EVIL: assert name.replace("\n", r"\n") in text


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    text = evil_report(tmp_path/"r.html").read_text()
    page = Page(text)
    links = [a[k] for _, a in page.tags for k in ("src", "href", "srcset", "action") if k in a]
    assert links and all(u.startswith(("data:", "#")) for u in links)
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert all(u[1:] in ids for u in links if u.startswith("#"))
    assert not re.search(r"url\(|@import|https?:", re.sub(r"base64,[^\"]*", "", text).replace(html.escape(EVIL[2]), ""))
    assert {"default-src 'none'; img-src data:; style-src 'unsafe-inline'"} == {
        m["content"] for m in page.all("meta") if m.get("http-equiv")
    }
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_figures_are_closed_or_kept(tmp_path):
    e, y = embeddings(3)
    kept = plot_similarity(e @ e.T, y)
    html_report(tmp_path/"r.html", "t", [("a", [kept])], close=False)
    assert plt.get_fignums() == [kept.figure.number]
    html_report(tmp_path/"r.html", "t", iter([("a", iter([kept, (kept.figure, "again")]))]))
    assert plt.get_fignums() == []


def test_a_report_that_fails_leaves_the_old_one(tmp_path):
    path = html_report(tmp_path/"r.html", "first", [("a", ["text"])])
    before = path.read_bytes()
    with pytest.raises(TypeError, match="set cannot be part of a report"):
        html_report(path, "second", [("a", ["text", {1}])])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["r.html"]


@pytest.mark.parametrize("n_tasks", [2, 8, 9, 50, 120])
def test_any_number_of_tasks(n_tasks, tmp_path):
    "Labels do not overlap, figures and file stay of a size to mail"
    e, y = embeddings(n_tasks, 2)
    names = [f"class number {2*t} / class number {2*t + 1}" for t in range(n_tasks)]
    axes = [plot_similarity(e @ e.T, y, names, "toy"), plot_embedding(e, y, names, "toy")]
    for ax in axes:
        w, h = ax.figure.get_size_inches()
        assert w <= 10 and h <= 10
    axes[0].figure.canvas.draw()
    tops = [t.get_window_extent() for t in axes[0].get_yticklabels()]
    assert all(abs(a.y0 - b.y0) >= 0.8*a.height for a, b in zip(tops, tops[1:]))
    path = html_report(tmp_path/"r.html", "t", [("a", axes)])
    assert path.stat().st_size < 2_000_000
    assert all(0 < int(i["width"]) < 1100 for i in Page(path.read_text()).all("img"))


@pytest.mark.parametrize("n", [1, 2, 3, 11, 12, 13, 40])
def test_a_map_of_any_number_of_models(n, recwarn):
    e, _ = embeddings(n, 1)
    xy, _ = map_2d(e)
    assert xy.shape == (n, 2) and np.isfinite(xy).all()
    assert np.isfinite(map_2d(torch.ones(n, 3))[0]).all() and np.isfinite(map_2d(torch.zeros(n, 1))[0]).all()
    assert not len(recwarn)


def test_a_band_is_the_spread_over_splits():
    shares = np.array([[.1, .4, .9], [.2, .6, 1], [.3, .8, .95]])
    runs = pd.concat(
        {
            "fc": pd.DataFrame(shares / 2, columns=["rank-1", "rank-2", "rank-3"]),
            "lps": pd.DataFrame(shares, columns=["rank-1", "rank-2", "rank-3"]),
        },
        names=["method", "split"],
    ).assign(mAP=0.5)
    for curves in ({"LPS": shares}, runs):
        ax = plot_rank_k(curves, {"random": np.array([.1, .2, .3, .4])})
        assert (
            np.allclose(ax.lines[0].get_xydata(), [[1, 20], [2, 60], [3, 95]]) and ax.lines[-1].get_label() == "random"
        )
        band = ax.collections[0].get_paths()[0].vertices[:, 1]
        assert np.isclose(band.max(), 100) and np.isclose(band.min(), 10)
    assert "LPS" in ax.lines[0].get_label()
    assert not plot_rank_k({"LPS": shares[:1]}).collections


def test_table_cells(tmp_path):
    columns = dict(f=[0.5, None], i=[1, 2], s=["x", None], p=[80.74, 5.0], lr=[1e-4, 1e-3])
    page = html_report(tmp_path/"r.html", "t", [("a", [pd.DataFrame(columns, index=["a", "b"])])]).read_text()
    cells = re.findall("<td>(.*?)</td>", page)
    assert cells == ["a", "0.500", "1", "x", "80.7", "0.0001", "b", "", "2", "", "5.0", "0.001"]
    assert re.findall("<th>(.*?)</th>", page) == ["", "f", "i", "s", "p", "lr"]
    assert re.search('<table[^>]*class="([^"]*)"', page)[1].split() == ["dataframe", "n2", "n3", "n5", "n6"]
    look = "{ text-align: right; white-space: nowrap; }"
    for i in range(1, 7): assert f".n{i} :is(th, td):nth-child({i}) {look}" in page


def test_long_cells_and_equal_columns_are_kept(tmp_path):
    df = pd.DataFrame([["x"*300, 1.25, 2.25]], columns=["a", "b", "b"])
    page = html_report(tmp_path/"r.html", "t", [("a", [df, df.iloc[:0]])]).read_text()
    assert "x"*300 in page and ">1.250<" in page and ">2.2<" in page and page.count("<table") == 2


def test_control_characters_are_shown(tmp_path):
    "In headings, text, captions, cells, columns, the title and the text for those who do not see a figure"
    bad = "red\x1b[31m\x07\u202e"
    ax = plot_rank_k({bad: np.arange(5)}, title=bad)
    table = pd.DataFrame({bad: [bad]}, index=pd.Index([bad], name=bad))
    page = html_report(tmp_path/"r.html", bad, [(bad, [bad + "\nline two", (table, bad), ax])]).read_text()
    for character in "\x1b\x07\u202e": assert character not in page
    assert page.count(r"red\x1b[31m\x07\u202e") >= 9 and "\nline two" in page
