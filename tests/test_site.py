"""The course as web pages: all of it is there, nothing is run, every link leads somewhere, and a page asks no other host."""

import io
import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
from bs4 import BeautifulSoup
from PIL import Image

from rlhf_helpers.config import REPOSITORY
from tests.test_browser import Browser, no_browser, wait_for
from tests.test_notebooks import NOTEBOOKS, images, markdown, outputs

make_site = pytest.importorskip(
    "tools.make_site", reason="no latex2mathml, ziamath, fonttools or brotli: pip install -e .[test]"
)

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = re.compile(r"(?:[a-z]+:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    make_site.build(folder)
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """{file relative to the site: its parsed HTML}"""
    return {file.relative_to(site).as_posix(): BeautifulSoup(file.read_bytes(), "html.parser") for file in site.rglob("*.html")}


def prose(page):
    """What is read on a page, without code, outputs, and formulas."""
    text = re.sub(r"<(pre|code|script|style|math)\b.*?</\1>", " ", str(page), flags=re.DOTALL)
    return unescape(re.sub("<.*?>", " ", text, flags=re.DOTALL))


def words(text):
    return " ".join(text.split())


# ---------------------------------------------------------------- what is there


def test_every_page_is_there_and_the_contents_lead_to_each(pages):
    expected = {f"notebooks/{notebook.stem}.html" for notebook in NOTEBOOKS}
    expected |= {
        "README.html",
        "GLOSSARY.html",
        "docs/experiments.html",
        "docs/larger.html",
        "docs/script.html",
        "docs/systems.html",
        "data/README.html",
        "benchmarks/README.html",
    }
    expected |= {"docs/inspector.html"} if (ROOT / "docs" / "inspector.html").exists() else set()
    assert pages.keys() == expected | {"index.html"}
    assert expected <= {unquote(link["href"]) for link in pages["index.html"].main.select("a[href]")}
    assert len(pages["index.html"].main.select("ul")) == len(NOTEBOOKS) + 1  # what each teaches, and the rest


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_stored_output_is_on_the_page(site, pages, notebook):
    page = pages[f"notebooks/{notebook.stem}.html"]
    text = words(page.get_text())
    pictures = {(site / "notebooks" / img["src"]).read_bytes() for img in page.select("img") if "data:" not in img["src"]}
    for i, output in outputs(notebook):
        html = "".join(output.get("data", {}).get("text/html", ""))
        found = images(output)
        if html:
            not_added = lambda tag: tag.name != "wbr"  # where a name may be broken on a phone
            every = lambda part: BeautifulSoup(part, "html.parser").find_all(not_added)
            tags = lambda part: [(tag.name, tag.get("id")) for tag in every(part)]
            own = tags(re.sub("^<style>[^<]*</style>", "", html))  # colours of code, which are the page's own
            assert any(tags(str(box))[1:] == own for box in page.select(".output_html")), f"cell {i}"
        elif found:
            assert set(found.values()) <= pictures, f"cell {i}"
        else:
            plain = output.get("text") or output.get("data", {}).get("text/plain", "")
            assert words(re.sub(r"\x1b\[[\d;]*m", "", "".join(plain))) in text, f"cell {i}"


def test_no_output_colours_the_page_around_it(pages):
    """IPython's `Code` brings rules such as `.output_html { background: #f8f8f8; }`, which whiten the boxes of all other outputs."""
    for name, page in pages.items():
        rules = [
            rule for style in page.select(".output_html style:not([scoped])") for rule in re.findall(r"[^{}]+(?={)", style.text)
        ]
        assert [rule for rule in rules if "inspector" not in rule and "@media" not in rule] == [], name


def test_the_stored_scripts_are_as_they_were_stored(site):
    """Such as the inspector's: one that went through a parser of HTML might come out another."""
    for notebook in NOTEBOOKS:
        page = (site / "notebooks" / f"{notebook.stem}.html").read_text(encoding="utf-8")
        for i, output in outputs(notebook):
            for script in re.findall(r"<script.*?</script>", "".join(output.get("data", {}).get("text/html", "")), re.DOTALL):
                assert script in page, f"{notebook.stem}, cell {i}"


def test_before_and_after_lead_through_all_pages(pages):
    name, seen = "index.html", []
    while name:
        seen.append(name)
        page = pages[name]
        follow = page.select_one("a[rel=next]")
        name = follow and str((Path("/") / Path(name).parent / unquote(follow["href"])).resolve())[1:]
    assert len(seen) == len(set(seen)) and set(seen) == pages.keys() - {"docs/inspector.html"}
    assert seen[1 : len(NOTEBOOKS) + 1] == [f"notebooks/{notebook.stem}.html" for notebook in NOTEBOOKS]


# ---------------------------------------------------------------- links and pictures


def test_every_link_leads_somewhere(site, pages):
    missing, seen = [], 0
    anchors = {name: {tag["id"] for tag in page.select("[id]")} for name, page in pages.items()}
    for name, page in pages.items():
        for link in page.select("a[href]"):
            url = urlsplit(link["href"])
            seen += 1
            if link["href"].startswith(REPOSITORY + "/"):
                _, _, place = url.path.removeprefix(urlsplit(REPOSITORY).path + "/").split("/", 2)
                if not (ROOT / unquote(place)).exists():
                    missing.append((name, link["href"]))
            elif not url.scheme:
                target = ((site / name).parent / unquote(url.path)).resolve() if url.path else site / name
                inside = target.relative_to(site.resolve()).as_posix()
                if not target.is_file() or (url.fragment and unquote(url.fragment) not in anchors[inside]):
                    missing.append((name, link["href"]))
    assert missing == [] and seen > 300


def test_no_anchor_stands_twice_on_a_page(pages):
    for name, page in pages.items():
        found = [tag["id"] for tag in page.select("[id]")]
        assert sorted(found) == sorted(set(found)), name


def test_no_picture_is_missing_and_each_has_its_words(site, pages):
    seen = 0
    for name, page in pages.items():
        for img in page.select("img"):
            seen += 1
            assert len(img["alt"].split()) >= 4, (name, img["src"][:80])
            assert img["src"].startswith("data:") or ((site / name).parent / unquote(img["src"])).is_file(), img["src"]
    assert seen > 25


def test_nothing_is_loaded_from_another_host(site, pages):
    for name, page in pages.items():
        for tag in page.find_all(True):
            asked = [tag.get(key) for key in ("src", "srcset", "data", "poster", "action") if tag.get(key)]
            asked += [tag["href"]] if tag.name in ("link", "image", "use", "base") and tag.get("href") else []
            assert not [url for url in asked if ELSEWHERE.match(url)], (name, str(tag)[:200])
        for sheet in page.select("style"):
            assert not re.search(r"@import|url\(", sheet.get_text()), name
    sheet = (site / "style.css").read_text(encoding="utf-8")
    assert re.findall(r"url\((?!data:)|@import", sheet) == []


# ---------------------------------------------------------------- formulas


def test_every_formula_became_mathml(pages):
    sources = {f"notebooks/{notebook.stem}.html": notebook for notebook in NOTEBOOKS} | {"GLOSSARY.html": ROOT / "GLOSSARY.md"}
    for name, source in sources.items():
        text = re.sub(r"```.*?```|`[^`\n]*`", " ", markdown(source), flags=re.DOTALL)
        formulas = re.findall(r"\$\$.+?\$\$|(?<![\\$])\$[^$]+\$", text, re.DOTALL)
        assert len(pages[name].select("math")) == len(formulas), name
    for name, page in pages.items():
        assert re.findall(r"\$\$|\\[a-zA-Z]+|\$\S*[_^]\S*\$", prose(page)) == [], name
        assert [str(math) for math in page.select("math") if "\\" in math.get_text() or "mathvariant" in str(math)] == []


@pytest.mark.parametrize(
    "tex, text",
    [
        (r"\beta \log \pi", "<mi>β</mi>_<mi>log</mi>_<mi>π</mi>"),
        (r"-\log(x)", '<mo form="prefix">−</mo><mi>log</mi>(<mi>x</mi>)'),
        (r"\arg\min_k x", "<mi>arg</mi>_<munder><mi>min</mi><mi>k</mi></munder>_<mi>x</mi>"),
        (r"\mathbb E \mathbb R \mathbb 1", "<mi>𝔼</mi><mi>ℝ</mi><mn>𝟙</mn>"),
        (r"\mathcal L \mathbf x", "<mi>ℒ</mi><mi>𝐱</mi>"),
        (
            r"x = -(-y), - z",
            '<mi>x</mi><mo>=</mo><mo form="prefix">−</mo>(<mo form="prefix">−</mo><mi>y</mi>)<mo>,</mo><mo form="prefix">−</mo><mi>z</mi>',
        ),
        (r"(x) - y", "(<mi>x</mi>)<mo>−</mo><mi>y</mi>"),
    ],
)
def test_names_keep_their_distance_and_letters_of_another_kind_are_characters(tex, text):
    math = make_site.mathml(tex, "block")
    math = re.sub(r"<mspace [^>]*>", "_", re.sub(r'<mo stretchy="false">(.)</mo>', r"\1", math))
    assert re.search("<mrow>(.*)</mrow>", math)[1] == text


def test_prose_wraps_and_columns_scroll():
    assert make_site.flow("one line\nand another") == make_site.flow("a  b " + "word " * 30) == "prose"
    assert make_site.flow("a  b\n1  2") == make_site.flow("def f():\n    " + "x" * 120) == "columns"


def test_columns_of_words_stand_on_the_left_and_names_may_break_after_an_underscore():
    frame = pd.DataFrame({"prompt": ["What is tea?", "And fog?"], "score_of_it": [0.5, 1.0]}, index=["seed_0", "seed_1"])
    table = make_site.readable_cells(frame.to_html())
    assert re.findall(r'<t[dh] class="text">(.*?)<', table) == ["prompt", "What is tea?", "And fog?"]
    assert "<th>score_<wbr>of_<wbr>it</th>" in table and "<th>seed_<wbr>0</th>" in table
    script = "<table><tr><td>a_b</td></tr></table><script>1</script>"
    assert make_site.readable_cells(script) == script


def test_the_font_has_every_symbol_of_the_formulas(pages):
    from fontTools.ttLib import TTFont

    symbols = set("".join(math.get_text() for page in pages.values() for math in page.select("math"))) - set(" \n")
    font = TTFont(io.BytesIO(make_site.font(symbols)))
    drawn = {"\u221a"} if any(page.select("msqrt, mroot") for page in pages.values()) else set()  # by the browser
    assert drawn and "MATH" in font and {ord(symbol) for symbol in symbols | drawn} <= font.getBestCmap().keys()


def test_a_norm_is_as_high_as_its_letters_and_no_line_begins_with_the_comma_after_a_formula():
    assert make_site.mathml(r"\|x\|", "inline").count('stretchy="false"') == 2
    page = make_site.Page("GLOSSARY.md", ["GLOSSARY.md"])
    assert re.search(r"<span class='whole'><math.*</math>,</span> and", page.markdown("$x$, and $y$ alone"))
    assert page.markdown("$x$ alone").count("whole") == 0


def test_a_line_ends_neither_in_an_option_nor_in_an_interval_nor_before_a_per_cent_sign():
    page = make_site.Page("GLOSSARY.md", ["GLOSSARY.md"])
    assert '<code>python <span class="whole">--ppo_epochs</span> 4</code>' in page.markdown("`python --ppo_epochs 4`")
    assert "97\u00a0% of" in page.markdown("97 % of")
    row = page.markdown("| a | b | c | d |\n|---|---|---|---|\n| +0.66 (+0.54 to +0.79) | 61% to 96% | 16 of 16 | x (a to b) |")
    assert re.findall('<td class="whole"[^>]*>(.*?)</td>', row) == ["+0.66 (+0.54 to +0.79)", "61% to 96%"]


def test_figures_are_shown_at_one_scale(site, pages):
    scales = {}
    for name, page in pages.items():
        for picture in page.select(".output_picture img[src$=png]"):
            with Image.open((site / name).parent / picture["src"]) as image:
                scales[picture["src"]] = image.width / int(picture["width"])
    assert len(scales) > 20 and max(scales.values()) - min(scales.values()) < 0.01


# ---------------------------------------------------------------- a course of one notebook


CELLS = [
    ("markdown", "# 00 · One\n\nAfter this notebook you can\n\n- see $x_1$;\n- stop.\n\n| a | b | c | d |\n|---|---|---|---|\n| now | | 1 GB | |"),
    ("code", "open('ran', 'w')", {"output_type": "stream", "name": "stdout", "text": "stored " * 30 + "<b>"}),
    ("code", "1", {"output_type": "display_data", "metadata": {"image/svg+xml": {"alt": "a small square of one colour"}},
                   "data": {"image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg'></svg>", "text/plain": "no"}}),
    ("markdown", "## 1 · A `part`: *it*\n\n[me](#1-·-A-part:-it), [data](../data), [file](../data/x.py), [words](../GLOSSARY.md#b-c)"
                 "\n\n[![A badge](https://elsewhere.org/badge.svg)](https://elsewhere.org)\n\n| `a\\|b` | $y$ |\n|---|---|\n| 1 | 2 |"),
]  # fmt: skip


@pytest.fixture
def small(tmp_path, monkeypatch):
    """(folder of a course of one notebook, function that builds its site and returns {file: text})"""
    root = tmp_path / "course"
    cells = [
        dict(
            cell_type=kind, source=source, metadata={}, **({"outputs": [*out], "execution_count": 1} if kind == "code" else {})
        )
        for kind, source, *out in CELLS
    ]
    files = {
        "notebooks/00_one.ipynb": json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=4)),
        "README.md": "# The course\n\n![A picture](p.svg)\n\nIts words. [Look](docs/inspector.html).\n",
        "p.svg": "<svg xmlns='http://www.w3.org/2000/svg'/>",
        "GLOSSARY.md": "# Words\n\n## B, c\n",
        "data/x.py": "",
        "docs/inspector.html": "<!doctype html><html><body class='a'><h1>Touch</h1></body></html>",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(make_site, "ROOT", root)
    monkeypatch.setattr(make_site, "font", lambda symbols: b"")

    def built():
        make_site.build(tmp_path / "site")
        kinds = (".html", ".css", ".svg")
        found = [file for file in (tmp_path / "site").rglob("*") if file.suffix in kinds]
        return {file.relative_to(tmp_path / "site").as_posix(): file.read_text(encoding="utf-8") for file in found}

    return root, built


def test_a_notebook_becomes_a_page_and_is_not_run(small, tmp_path):
    page = small[1]()["notebooks/00_one.html"]
    assert not list(tmp_path.rglob("ran")) and '<pre class="prose">stored stored' in page and "&lt;b&gt;" in page
    assert 'id="1-·-A-part:-it"' in page and 'href="#1-%C2%B7-A-part:-it"' in page
    assert f'href="{REPOSITORY}/tree/main/data"' in page and f'href="{REPOSITORY}/blob/main/data/x.py"' in page
    assert 'href="../GLOSSARY.html#b-c"' in page
    assert '<a href="https://elsewhere.org">A badge</a>' in page and "badge.svg" not in page
    assert "<code>a|b</code>" in page
    assert re.search(r'<a href="(00_one_files/\S+\.svg)"><img alt="a small square of one colour" src="\1"', page)


def test_what_is_new_is_linked_and_what_is_not_there_is_not(small):
    root, built = small
    site = built()
    assert 'href="docs/inspector.html"' in site["index.html"] and "Touch" in site["docs/inspector.html"]
    assert '<body class=\'a\'><p><a class="back" href="../index.html">The course</a></p>' in site["docs/inspector.html"]
    assert "Its words" in site["index.html"] and "docs/experiments" not in site["index.html"] and "p.svg" in site
    (root / "docs" / "inspector.html").unlink()
    (root / "README.md").write_text("# The course\n\nIts words.\n", encoding="utf-8")
    site = built()
    assert "docs/inspector.html" not in site and "inspector" not in site["index.html"] and "p.svg" not in site


def test_a_link_that_leads_nowhere_is_one_sentence_and_the_old_site_stays(small, capsys, tmp_path):
    root, built = small
    before = built()
    (root / "GLOSSARY.md").write_text("# Words\n\n[a](gone.md)\n", encoding="utf-8")
    assert make_site.main([str(tmp_path / "site")]) == 2
    assert capsys.readouterr().err == "error: GLOSSARY.md: the link 'gone.md' leads nowhere\n"
    assert (tmp_path / "site" / "GLOSSARY.html").read_text(encoding="utf-8") == before["GLOSSARY.html"]


def test_a_folder_that_is_no_site_is_left_alone(small, capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert make_site.main([str(tmp_path / "mine")]) == 2
    assert "mine" in capsys.readouterr().err and (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_it_needs_neither_pytorch_nor_jupyter_to_build():
    """A reader, or the workflow that publishes it, has neither."""
    code = "import sys, tools.make_site; print(sorted({'torch', 'transformers', 'jupyterlab', 'IPython'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- in a browser


LISTEN = """window.wrong = [];
addEventListener("error", event => wrong.push(event.message || "not loaded: " + (event.target.src || event.target.href)), true);
addEventListener("unhandledrejection", event => wrong.push(String(event.reason)));
for (const kind of ["error", "warn"]) { const say = console[kind]; console[kind] = (...all) => { wrong.push(all.join(" ")); say(...all); }; }"""

STATE = """(async () => { await document.fonts.ready; const page = document.documentElement;
    const cut = [...document.querySelectorAll("main *")].filter(element => {
        for (let box = element.parentElement; box && box !== document.body; box = box.parentElement)
            if (getComputedStyle(box).overflowX !== "visible") return false;
        return element.getBoundingClientRect().right > innerWidth + 1; });
    return { wrong, width: page.scrollWidth, window: innerWidth, cut: cut.map(element => element.outerHTML.slice(0, 200)),
             broken: [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.src.slice(0, 100)),
             wide: [...document.images].filter(image => image.getBoundingClientRect().width > innerWidth
                 && getComputedStyle(image.closest("p, .output_picture")).overflowX !== "auto").length,
             touched: [...document.querySelectorAll(".rlhf-inspector")].map(box => box.querySelectorAll("select").length),
             fonts: [...document.fonts].filter(font => font.status === "error").length }; })()"""


@pytest.mark.browser
@no_browser
@pytest.mark.parametrize("width", [1300, 400])
def test_on_the_screen_nothing_is_cut_missing_wrong_or_fetched(site, pages, tmp_path, width):
    (tmp_path / "profile").mkdir()
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Page.enable")
        browser.call("Page.addScriptToEvaluateOnNewDocument", source=LISTEN)
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        for name, page in pages.items():
            address = (site / name).as_uri()
            browser.call("Page.navigate", url=address)
            ready = f"document.readyState === 'complete' && location.href === {json.dumps(address)}"
            wait_for(lambda: browser.evaluate(ready), name, 30)
            state = browser.evaluate(STATE)
            assert (state["wrong"], state["broken"], state["cut"], state["wide"], state["fonts"]) == ([], [], [], 0, 0), name
            assert state["window"] == width and state["width"] <= width + 1, name
            assert state["touched"] == [n for n in state["touched"] if n >= 2], name  # its script ran
            assert len(state["touched"]) == len(page.select(".rlhf-inspector"))
        assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == [] and browser.requests
    finally:
        browser.close()


@pytest.mark.browser
@no_browser
def test_the_contents_of_a_page_are_at_the_side_where_there_is_room_and_dark_is_dark(site, tmp_path):
    (tmp_path / "profile").mkdir()
    browser = Browser(tmp_path / "profile")
    seen = "[...document.querySelectorAll('.side, .inside')].filter(e => e.offsetParent || e.getClientRects().length).map(e => e.className)"
    try:
        for width, where in ((1300, ["side"]), (400, ["inside"])):
            browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
            for scheme, dark in (("light", False), ("dark", True)):
                browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                browser.call("Page.navigate", url=(site / "index.html").as_uri())
                wait_for(
                    lambda: browser.evaluate("document.readyState === 'complete' && !!document.querySelector('main')"), "it", 30
                )
                assert browser.evaluate(seen) == where
                ground = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
                assert (max(ground) < 60) == dark
    finally:
        browser.close()
