"""Build the course as web pages, to be read without running anything: `make site`, or `python tools/make_site.py [FOLDER]`
(build/site without a name).

Nothing is run: the outputs are those that the notebooks store. nbconvert renders cells, pygments colours code, and formulas
become MathML, which browsers draw by themselves; so a page asks no other host for anything. A page lies where its source lies in
the repository, which keeps links between pages; a link to a file that is no page goes to the repository's address."""

import argparse
import base64
import io
import re
import shutil
import sys
import unicodedata
from functools import cached_property
from html import escape, unescape
from importlib.metadata import distribution
from itertools import cycle
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from urllib.parse import quote, unquote
from xml.etree import ElementTree

import latex2mathml.converter
import nbformat
from fontTools import subset, ttLib
from jinja2 import Environment, FileSystemLoader
from nbconvert import HTMLExporter
from nbconvert.filters import html2text
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from rlhf_helpers.config import REPOSITORY

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = Path(__file__).resolve().parent / "site_template"
OTHERS = {  # pages besides the notebooks: (name in the bar, what the contents page says of them)
    "GLOSSARY.md": ("Glossary", "one name for one thing"),
    "docs/experiments.md": ("Experiments", "every run, what was tried and dropped, and what has not been made"),
    "docs/inspector.html": ("Inspector", "two recorded runs, token by token, to be touched"),
    "docs/script.md": ("Script", "the main job: its files, how it goes on, several processes"),
    "docs/systems.md": ("Systems", "sizes and versions, and what was run where"),
    "docs/larger.md": ("Larger than one card", "the base model in slices over several cards: memory, and where this ends"),
    "data/README.md": ("Data", "the preference pairs, and the rule that made them"),
    "benchmarks/README.md": ("Benchmarks", "seconds and memory, and how they were measured"),
    "README.md": ("README", "what the project is, how it is run, and which cell answers which question"),
}
MATHML = "{http://www.w3.org/1998/Math/MathML}"
ElementTree.register_namespace("", MATHML.strip("{}"))


# ---------------------------------------------------------------- formulas


def mathml(tex, display):
    """A formula as MathML. latex2mathml 3.81 leaves to the browser what browsers no longer do, or do not do as TeX does: letters of
    another kind (`mathvariant`), names such as log and max, with wide spaces or none around them, signs that are no operations,
    bars, and `\\arg`."""
    math = ElementTree.fromstring(latex2mathml.converter.convert(tex, display=display))
    math.set("alttext", " ".join(tex.split()))
    for element in list(math.iter()):
        if element.get("mathvariant", "normal") != "normal":
            element.text = "".join(letter(plain, element.attrib["mathvariant"]) for plain in element.text)
            del element.attrib["mathvariant"]
        if element.tag == MATHML + "mo" and element.text == "|" and "form" not in element.attrib:
            element.attrib.update(lspace="0", rspace="0")
        if element.tag == MATHML + "mo" and element.text == "\u2016":  # of a norm: as high as its letters
            element.attrib.update(stretchy="false", lspace="0", rspace="0")
        if name := function(element):
            word = element[0] if len(element) else element
            word.tag, word.text = MATHML + "mi", name
            if display == "block" and element.tag == MATHML + "msub" and name in ("max", "min"):
                element.tag = MATHML + "munder"
    for parent in list(math.iter(MATHML + "mrow")):
        row = []
        for child in parent:
            last = next((element for element in reversed(row) if element.tag != MATHML + "mspace"), None)
            if child.text in ("\u2212", "+") and (
                last is None or last.tag == MATHML + "mo" and last.text not in (")", "]", "|", "}")
            ):
                child.set("form", "prefix")  # a sign
            beside_word = row and (function(row[-1]) or function(child))
            if beside_word and {row[-1].tag, child.tag}.isdisjoint((MATHML + "mo", MATHML + "mspace")):
                row.append(ElementTree.Element(MATHML + "mspace", width="0.17em"))
            row.append(child)
        parent[:] = row
    return ElementTree.tostring(math, encoding="unicode")


def function(element):
    """The name, if an element is one, such as log, alone or with an index; else None."""
    element = element[0] if element.tag in (MATHML + "msub", MATHML + "munder") else element
    name = (element.text or "").removeprefix("\\")
    return name if element.tag in (MATHML + "mi", MATHML + "mo") and re.fullmatch("[A-Za-z]{2,}", name) else None


def letter(plain, variant):
    """The character of its own that Unicode has for a letter of this kind: double-struck, script, bold."""
    name = re.sub("LATIN |GREEK |LETTER ", "", unicodedata.name(plain))
    kind = variant.upper().replace("BOLD-", "BOLD ")
    for whole in (f"{kind} {name}", f"MATHEMATICAL {kind} {name}"):
        try:
            return unicodedata.lookup(whole)
        except KeyError:
            pass
    return plain


def font(symbols):
    """STIX Two Math (SIL Open Font License 1.1), which the package ziamath brings, with no more than these symbols, the slanted
    letters that browsers put for names and the sign that they draw for a root, as WOFF2: about 40 kB. Without a font for mathematics an index stands on the line."""
    made, letters = io.BytesIO(), [*range(0x1D434, 0x1D468), *range(0x1D6E2, 0x1D71C), 0x210E, 0x221A, *range(0x20, 0x7F)]
    options = subset.Options(layout_features=["ssty", "mark", "ccmp"], hinting=False)
    whole = ttLib.TTFont(distribution("ziamath").locate_file("ziamath/fonts/STIXTwoMath-Regular.ttf"))
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=letters + [ord(symbol) for symbol in symbols])
    subsetter.subset(whole)
    whole.flavor = "woff2"
    whole.save(made)
    return made.getvalue()


# ---------------------------------------------------------------- Markdown


class Renderer(IPythonRenderer):
    """nbconvert's, with formulas as MathML, anchors as the source's readers have them, links from page to page, and tables in a box
    that scrolls."""

    def __init__(self, page):
        super().__init__(escape=False)
        self.page = page

    def inline_math(self, body, display="inline"):
        math = mathml(body, display)
        self.page.symbols.update(unescape(re.sub("<.*?>", "", math)))
        return math

    def block_math(self, body):
        return f'<span class="formula" tabindex="0">{self.inline_math(body, "block")}</span>'

    def heading(self, text, level, **_):
        plain = html2text(f"<h>{text}</h>").strip()
        if self.page.is_notebook:  # as JupyterLab does
            anchor = plain.replace(" ", "-")
        else:  # as GitHub does
            anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        self.page.headings.append((level, plain, anchor))
        return f'<h{level} id="{escape(anchor)}">{text}<a class="anchor" href="#{quote(anchor)}" aria-label="link to here">#</a></h{level}>\n'

    def text(self, text):
        """A per cent sign stays on the line of its number."""
        return super().text(re.sub(r"(?<=\d) (?=%)", "\u00a0", text))

    def codespan(self, text):
        """A line may end between words, and not at a hyphen within one."""
        whole = r'<span class="whole">\1</span>'
        return re.sub(r"(?<![^\s>])(?=[^\s<]*-)([^\s<>]{2,36})(?![^\s<])", whole, super().codespan(text))

    def link(self, text, url, title=None):
        return super().link(text, self.page.address(url), title)

    def image(self, text, url, title=None):
        """A picture of another host, such as a badge, is not fetched: its words stand there."""
        return text if re.match(r"https?:", url) else super().image(text, self.page.picture(url), title)

    def inline_html(self, html):
        target = lambda m: f'{m[1]}="{self.page.picture(m[2]) if m[1] == "src" else self.page.address(m[2])}"'
        return re.sub(r'\b(href|src)="([^"]*)"', target, html)

    def block_html(self, html):
        return self.inline_html(html) + "\n"

    def table(self, text):
        """In a box that scrolls. Where cells are sentences, a phone shows a row as lines, each with the name of its column."""
        plain = lambda html: re.sub("<.*?>", "", html)
        names = cycle([plain(name) for name in re.findall(r"<th\b[^>]*>(.*?)</th>", text, re.DOTALL)] or [""])
        longest = max(map(len, map(plain, re.findall(r"<td\b[^>]*>(.*?)</td>", text, re.DOTALL))), default=0)
        text = re.sub("<td", lambda _: f'<td data-name="{escape(next(names))}"', text.replace(r"\|", "|"))  # a bar within code
        rows = [list(map(plain, re.findall(r"<td\b[^>]*>(.*?)</td>", row, re.DOTALL))) for row in text.split("</tr>")]
        of_words = [row for row in rows if sum(bool(re.search(r"\d", cell)) for cell in row) < len(row) / 2]
        kind = "lines" if longest > 40 or any(sum(map(len, row)) > 70 for row in of_words) else "numbers"
        return f'<div class="scroll" tabindex="0"><table class="{kind}">\n{readable_cells(text)}</table></div>\n'


class Exporter(HTMLExporter):
    """Notebooks to HTML; Markdown by `Renderer`."""

    def __init__(self, page):
        self.page = page
        super().__init__(
            extra_template_basedirs=[str(TEMPLATES.parent)],
            template_name=TEMPLATES.name,
            exclude_input_prompt=True,
            exclude_output_prompt=True,
            config={"ExtractOutputPreprocessor": {"enabled": True}, "CoalesceStreamsPreprocessor": {"enabled": True}},
        )
        self.register_filter("markdown2html", self.page.markdown)
        self.register_filter("flow", flow)
        self.register_filter("without_colours", without_colours)
        self.register_filter("readable_cells", readable_cells)

    def default_filters(self):
        yield from (pair for pair in super().default_filters() if pair[0] != "markdown2html")


def flow(text):
    """Whether an output is prose, whose lines wrap, or has columns (or code), which scroll: two spaces in a row tell those, but in
    lines longer than code has."""
    return "prose" if "  " not in text or max(map(len, text.splitlines())) > 130 else "columns"


def without_colours(html):
    """An output of IPython's `Code` without its own colours, which hold for the whole page, and for a light ground alone."""
    return re.sub(r'<style>[^<]*</style>(?=<div class="highlight">)', "", html)


def pixels(png):
    """The width that a PNG says it has."""
    return int.from_bytes(png[16:20], "big")


def readable_cells(html):
    """Cells of a table that hold a date, an interval, or a number with one, are not broken into lines, long texts may be, and names
    after an underscore."""
    if "<script" in html:
        return html
    html = re.sub(r"<td\b(?=[^>]*>(?:[+−-]?\d[^<\s]* (?:\(|to )[^<]{1,25}|\d{4}-\d\d-\d\d)</td>)", '<td class="whole"', html)
    html = re.sub(r'(<table[^>]*class="dataframe".*?</table>)', lambda m: left_texts(m[1]), html, flags=re.DOTALL)
    cell = r"(<t[dh]\b[^>]*>(?:<code>)?)([^<]*_[^<]*)(?=<)"
    return re.sub(cell, lambda m: m[1] + re.sub(r"(?<=\w)_(?=\w)", "_<wbr>", m[2]), html)


def left_texts(table):
    """A table of pandas in which columns of words stand on the left, their heads included."""
    rows = [re.split(r"(?=<t[dh]\b)", row) for row in re.split(r"(?=<tr\b)", table)]
    columns = list(zip(*(row[1:] for row in rows if sum(cell.startswith("<td") for cell in row) > 0)))
    of_words = lambda cell: bool(re.match(r"<td[^>]*>[^<\d]*[A-Za-z]{2}[^<]*</td>", cell))
    wordy = [place for place, cells in enumerate(columns, 1) if sum(map(of_words, cells)) > len(cells) / 2]
    for row in rows:
        for place in (place for place in wordy if len(row) == len(columns) + 1):
            row[place] = re.sub(r"^<t([dh])(?=>)", r'<t\1 class="text"', row[place])
    return "".join("".join(row) for row in rows)


# ---------------------------------------------------------------- pages


class Page:
    """One page. `source` is where it comes from in the repository, with slashes; `sources` are those of all pages."""

    def __init__(self, source, sources):
        self.source, self.sources = source, sources
        self.headings = []  # (level, text, anchor)
        self.symbols = set()  # characters of its formulas
        self.pictures = set()  # files of the repository that it shows
        self.is_notebook = source.endswith(".ipynb")

    @property
    def target(self):
        return str(PurePosixPath(self.source).with_suffix(".html"))

    @cached_property
    def text(self):
        return (ROOT / self.source).read_text(encoding="utf-8")

    @cached_property
    def title(self):
        """Its first heading."""
        text = nbformat.reads(self.text, as_version=4).cells[0].source if self.is_notebook else self.text
        return re.search(r"^# (.+)", text, re.MULTILINE)[1].replace("`", "")

    def inside(self, url):
        """The place in the repository that a relative link leads to. Raises ValueError where there is none."""
        place = normpath(str(PurePosixPath(self.source).parent / unquote(url)))
        if place.startswith("..") or not (ROOT / place).exists():
            raise ValueError(f"{self.source}: the link {url!r} leads nowhere")
        return place

    def to(self, target):
        """A page's or file's address, seen from this page."""
        return quote(relpath(target, str(PurePosixPath(self.source).parent)))

    def address(self, url):
        """What a link of the source becomes on the page."""
        path, mark, anchor = url.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return url
        place = self.inside(path)
        for source in (place, f"{place}/README.md"):
            if source in self.sources:
                return self.to(Page(source, self.sources).target) + mark + anchor
        return f"{REPOSITORY}/{'tree' if (ROOT / place).is_dir() else 'blob'}/main/{quote(place)}{mark}{anchor}"

    def picture(self, url):
        """The address of a picture, which is copied."""
        if not url.startswith("data:"):
            self.pictures.add(self.inside(url))
        return url

    def markdown(self, text):
        """As HTML. No line begins with the comma after a formula."""
        html = MarkdownWithMath(renderer=Renderer(self)).render(text)
        return re.sub(
            r'(<math(?![^>]*display="block")[^>]*>(?:(?!</math>).)*</math>[,.;:?!)]+)', r"<span class='whole'>\1</span>", html
        )

    def body(self):
        """(HTML, {file beside the page: bytes}). Raises ValueError for a link that leads nowhere."""
        if not self.is_notebook:
            return self.markdown(self.text), {}
        resources = {
            "unique_key": PurePosixPath(self.source).stem,
            "output_files_dir": f"{PurePosixPath(self.source).stem}_files",
        }
        html, resources = Exporter(self).from_notebook_node(nbformat.reads(self.text, as_version=4), resources)
        for name, content in resources["outputs"].items():
            if name.endswith(".png"):  # its letters are as large as those of its neighbours, whatever its width
                html = html.replace(f'src="{quote(name)}"', f'src="{quote(name)}" width="{pixels(content) // 1.5:.0f}"')
        return html, resources["outputs"]


def contents(notebooks, others):
    """The contents page as Markdown: what the README says first, what each notebook teaches by its own first cell, and the rest."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = next((part for part in readme.split("\n\n")[1:] if re.match(r"\w", part)), "")
    parts = [
        re.search("^# .+", readme, re.MULTILINE)[0],
        first,
        "Here is the course to be read: every notebook with the outputs of a full run on two cores. To run it yourself, see the [README](README.md).",
        "## The notebooks",
    ]
    for page in notebooks:
        cell = nbformat.reads(page.text, as_version=4).cells[0].source
        time, _, memory, _ = re.findall(r"^\|(.+)\|$", cell, re.MULTILINE)[-1].split("|")
        aims = re.search(r"After this notebook you can.*\n\n((?:- .*\n(?:  .*\n)*)+)", cell)
        parts += [
            f"### [{page.title}]({page.source})",
            f"*{time.strip()}; {memory.strip()}.* Afterwards you can",
            aims[1] if aims else "",
        ]
    parts += [
        "## To look up",
        "\n".join(f"- [{OTHERS[page.source][0]}]({page.source}): {OTHERS[page.source][1]}." for page in others),
    ]
    return "\n\n".join(parts)


def build(folder):
    """Write the site into a folder, which is made anew. Returns the pages' files, relative to it. Raises ValueError, before anything
    is changed, for a link that leads nowhere and a folder that holds something else."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "style.css").exists():
        raise ValueError(f"{folder} holds something else; expected a folder that is new, empty, or such a site")
    sources = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]
    notebooks = [Page(source, sources) for source in sources]
    others = [Page(source, sources) for source in OTHERS if (ROOT / source).exists()]
    sources += [page.source for page in others]  # the same list, which all pages hold
    start = Page("index.md", sources)
    start.text = contents(notebooks, others)
    ready = [page for page in others if page.source.endswith(".html")]
    order = [start, *notebooks, *(page for page in others if page not in ready)]
    template = Environment(loader=FileSystemLoader(TEMPLATES), trim_blocks=True).get_template("page.html")

    made = {}
    for place, page in enumerate(order):
        body, beside = page.body()
        near = lambda other: (escape(other.title), page.to(other.target))
        made[page.target] = template.render(
            body=body,
            title=escape(page.title),
            course=escape(start.title),
            top=page.to(".") + "/",
            shelf=[(OTHERS[other.source][0], page.to(other.target)) for other in others],
            headings=[(level, escape(text), quote(anchor)) for level, text, anchor in page.headings if level in (2, 3)],
            before=near(order[place - 1]) if place else None,
            after=near(order[place + 1]) if place + 1 < len(order) else None,
            source=None if page is start else (page.source, f"{REPOSITORY}/blob/main/{page.source}"),
            repository=REPOSITORY,
        ).encode()  # fmt: skip
        made |= {normpath(str(PurePosixPath(page.source).parent / name)): content for name, content in beside.items()}
        made |= {picture: (ROOT / picture).read_bytes() for picture in page.pictures}
    sheet = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    for page in ready:
        narrow = (
            f"<style>{' '.join(re.findall('^[.]rlhf-inspector .*', sheet, re.MULTILINE))} .back {{ color: inherit; }}</style>"
        )
        back = f'<p><a class="back" href="{page.to(start.target)}">{escape(start.title)}</a></p>'
        made[page.target] = re.sub("<body.*?>", lambda body: body[0] + back + narrow, page.text, count=1).encode()
    made["style.css"] = style(set().union(*(page.symbols for page in order))).encode()
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return [page.target for page in order + ready]


def style(symbols):
    """The style sheet, with the font of the formulas and the colours of code for a light and a dark ground."""
    sheet = (TEMPLATES / "style.css").read_text(encoding="utf-8").replace("FONT", base64.b64encode(font(symbols)).decode())
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    return f"{sheet}\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "site", help="where the site is built")
    folder = parser.parse_args(arguments).folder
    try:
        pages = build(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(pages)} pages in {folder}; begin with {folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
