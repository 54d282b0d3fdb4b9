"""The notebooks as pages: what is stored in them, how they are built, and that their links lead somewhere. Nothing is run."""

import ast
import base64
import json
import re
from pathlib import Path
from statistics import median
from urllib.parse import unquote

import pytest

from rlhf_helpers.config import REPOSITORY
from rlhf_helpers.course import exercises
from tools import inspector_page, readme_pictures

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [
    *NOTEBOOKS,
    *sorted((ROOT / "docs").glob("*.md")),
    *(
        ROOT / page
        for page in ("README.md", "CONTRIBUTING.md", "GLOSSARY.md", "data/README.md", "benchmarks/README.md", "tests/README.md")
    ),
]
ABSOLUTE = re.compile(r"(?<![\w./~])/(?:home|root|tmp|work|mnt|var|Users)/|\b[A-Z]:\\+[A-Z]")
TOKEN = re.compile(r"\b(?:hf_\w{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16})")

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def cells(notebook, kind=None):
    """[(number, cell)] of a notebook, with every source as one string."""
    found = enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"])
    return [(i, cell | {"source": "".join(cell["source"])}) for i, cell in found if kind in (None, cell["cell_type"])]


def outputs(notebook):
    """[(number of the cell, output)] of all code cells."""
    return [(i, output) for i, cell in cells(notebook, "code") for output in cell["outputs"]]


def markdown(page):
    """All prose of a page."""
    if page.suffix == ".md":
        return page.read_text(encoding="utf-8")
    return "\n\n".join(cell["source"] for _, cell in cells(page, "markdown"))


def without_code(text):
    """Markdown without code and formulas, fenced or in a line."""
    return re.sub(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$", " ", text, flags=re.DOTALL)


def images(output):
    """{media type: bytes} of the pictures in an output."""
    data = output.get("data", {})
    return {kind: base64.b64decode("".join(data[kind])) for kind in data if kind in ("image/png", "image/jpeg")}


# ---------------------------------------------------------------- what is stored


@each_notebook
def test_cells_were_run_once_in_order(notebook):
    counts = {i: cell["execution_count"] for i, cell in cells(notebook, "code")}
    assert counts == {i: n for n, i in enumerate(counts, 1)}


@each_notebook
def test_every_code_cell_can_be_read_as_python(notebook):
    """An edit by hand could break one, and its stored output would still look right."""
    for number, cell in cells(notebook, "code"):
        compile(cell["source"], f"{notebook.name}, cell {number}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@each_notebook
def test_nothing_failed_but_where_failing_is_the_lesson(notebook):
    lessons = {i for i, cell in cells(notebook) if "raises-exception" in cell["metadata"].get("tags", [])}
    assert {i for i, output in outputs(notebook) if output["output_type"] == "error"} <= lessons


@each_notebook
def test_nothing_was_written_to_stderr(notebook):
    assert [i for i, output in outputs(notebook) if output.get("name") == "stderr"] == []


@each_notebook
def test_no_path_of_the_author_s_machine_and_no_token_is_stored(notebook):
    text = [(i, cell["source"]) for i, cell in cells(notebook)]
    for i, output in outputs(notebook):
        data = {kind: content for kind, content in output.get("data", {}).items() if not kind.startswith("image/")}
        text.append((i, json.dumps([output.get("text"), output.get("traceback"), data], ensure_ascii=False)))
    assert [(i, found[0]) for i, part in text for found in (ABSOLUTE.search(part), TOKEN.search(part)) if found] == []


def test_what_counts_as_a_path_or_a_token():
    for text in ("/home/me/x", "in '/tmp/a'", "file:/root/x", r"C:\Users\me", r"D:\\Data"):
        assert ABSOLUTE.search(text), text
    for text in ("https://a.org/home/x", "output/tmp/x", r"$r_T:\text{a}$", "~/work/x", "/content/rlhf-ppo-notebooks"):
        assert not ABSOLUTE.search(text), text
    assert TOKEN.search("hf_" + "a" * 34) and not TOKEN.search("hf_hub_download")


@each_notebook
def test_most_code_cells_show_something(notebook):
    shown = [bool(cell["outputs"]) for _, cell in cells(notebook, "code")]
    assert sum(shown) / len(shown) >= 0.7


@each_notebook
def test_every_stored_picture_is_small_and_has_a_text_for_those_who_cannot_see_it(notebook):
    for i, output in outputs(notebook):
        for kind, content in images(output).items():
            assert len(content) < 150_000, f"cell {i}: {len(content)} bytes"
            assert len(output["metadata"].get(kind, {}).get("alt", "").split()) >= 5, f"cell {i}: no alternative text"
        drawn = re.findall(r"<(?:img|svg)\b[^>]*>", "".join(output.get("data", {}).get("text/html", "")))
        assert [tag for tag in drawn if not re.search(r'(?:alt|aria-label)="[^"]+', tag)] == [], f"cell {i}"
    assert [name for name, _ in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", markdown(notebook)) if not name] == []


def test_notebooks_are_small():
    sizes = {notebook.name: notebook.stat().st_size for notebook in NOTEBOOKS}
    assert max(sizes.values()) < 1e6 and sum(sizes.values()) < 5e6, sizes


# ---------------------------------------------------------------- how a page is built


@each_notebook
def test_the_first_cell_has_the_title_the_badge_and_the_price(notebook):
    (_, first), *_ = cells(notebook)
    colab = REPOSITORY.replace("https://github.com/", "https://colab.research.google.com/github/")
    badge = f"(https://colab.research.google.com/assets/colab-badge.svg)]({colab}/blob/main/notebooks/{notebook.name})"
    assert first["source"].startswith(f"# {notebook.name[:2]} · ") and badge in first["source"]
    names, _, values = re.findall(r"^\|(.+)\|$", first["source"], re.MULTILINE)
    price = {name.strip(): value.strip() for name, value in zip(names.split("|"), values.split("|"))}
    assert re.search(r"minute", price["time on two CPU cores"]) and re.search(r"\d GB", price["memory"])
    assert price["on a GPU"] and price["must have run before"]
    assert re.search(r"[Aa]fter this notebook you can", first["source"])


@each_notebook
def test_the_cell_for_colab_fetches_this_repository(notebook):
    colab = next(cell["source"] for _, cell in cells(notebook, "code"))
    assert '"google.colab" in sys.modules' in colab and f'"{REPOSITORY}"' in colab


@each_notebook
def test_code_cells_are_short_and_stand_between_prose(notebook):
    lines = {i: len(cell["source"].splitlines()) for i, cell in cells(notebook, "code")}
    assert median(lines.values()) <= 8
    assert {i: n for i, n in lines.items() if n > 25} == {}
    assert [line for _, cell in cells(notebook, "code") for line in cell["source"].splitlines() if len(line) > 128] == []
    kinds = [cell["cell_type"] for _, cell in cells(notebook)]
    assert [i for i in range(2, len(kinds)) if kinds[i - 2 : i + 1] == ["code"] * 3] == []


def prose_words(text):
    """Words of paragraphs and lists. Headings, tables, formulas and folded solutions are left out; code or mathematics within a
    sentence is a word."""
    text = re.sub(r"<details>.*?</details>|```.*?```|\$\$.*?\$\$|^(?:#|\|).*?$", " ", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"\$[^$]*\$|`[^`]*`", "code", text))
    return len(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text))


@each_notebook
def test_there_are_5_to_12_words_of_prose_for_each_line_of_code(notebook):
    """But for the beginning, which has no model to show, and more to explain."""
    lines = sum(len(cell["source"].splitlines()) for _, cell in cells(notebook, "code"))
    assert 5 <= prose_words(markdown(notebook)) / lines <= (14 if notebook.name.startswith("00") else 12)


def exercise_cells(notebook):
    """[(number, cell)] of the code cells that check an exercise."""
    return [(i, cell) for i, cell in cells(notebook, "code") if re.search(r"\bexercises\.check_\w+\(", cell["source"])]


@each_notebook
def test_there_are_2_to_4_exercises_with_a_folded_solution_after_each(notebook):
    found = exercise_cells(notebook)
    assert 2 <= len(found) <= 4
    after = dict(cells(notebook))
    for i, cell in found:
        (name,) = re.findall(r"\bexercises\.(check_\w+)\(", cell["source"])
        assert callable(getattr(exercises, name)), name
        assert after[i + 1]["source"].startswith("<details><summary>Solution</summary>"), f"cell {i}"
    headings = re.findall(r"^### Exercise (\d)", markdown(notebook), re.MULTILINE)
    assert headings == [str(n) for n in range(1, len(found) + 1)]


@each_notebook
def test_each_exercise_says_how_long_it_takes_and_how_hard_it_is(notebook):
    for exercise in re.split(r"^### Exercise ", markdown(notebook), flags=re.MULTILINE)[1:]:
        assert re.search(r"\(\d+ minutes, (?:easy|medium|hard)\)", exercise.split("<details>")[0]), exercise[:60]


@each_notebook
def test_two_or_three_guesses_are_recorded_and_each_is_set_beside_what_came_out(notebook):
    """More in a notebook that has more to ask. A guess is left open on the stored page, and its cell comes before the result. Where
    a result waits for the end of the page, the guess has a name of its own."""
    asked, told = {}, {}
    for i, cell in cells(notebook, "code"):
        for name in re.findall(r"^(\w*guess) = \.\.\.", cell["source"], re.MULTILINE):
            asked.setdefault(name, []).append(i)
        for name in re.findall(
            r"^ *(?:guesses\.(?:number|choice)|capstone\.tell_taste)\((\w*guess)\b", cell["source"], re.MULTILINE
        ):
            told.setdefault(name, []).append(i)
    assert asked.keys() == told.keys() and 2 <= sum(map(len, asked.values())) <= 5
    for name in asked:  # asked, told, asked, told, each in a cell of its own
        assert len(asked[name]) == len(told[name])
        both = [i for pair in zip(asked[name], told[name]) for i in pair]
        assert both == sorted(set(both)), name


@each_notebook
def test_a_prediction_is_asked_for(notebook):
    assert len(re.findall(r"\*\*Predict", markdown(notebook))) >= 3


@each_notebook
def test_the_last_cell_is_a_recap_and_says_what_comes_next(notebook):
    *_, (_, last) = cells(notebook)
    assert re.search(r"^## Recap", last["source"], re.MULTILINE) and "**Next:**" in last["source"]


# ---------------------------------------------------------------- links


def headings(text):
    """The headings of a page as they are read: without the marks of links, code and emphasis."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = re.findall(r"^#{1,6} +(.+?)\s*$", text, re.MULTILINE)
    return [re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", lambda mark: mark[1] or "", line) for line in lines]


def anchors(page):
    """What may stand after `#`: on a notebook's page a heading with hyphens for spaces; on GitHub's Markdown pages in small
    letters, too, and without punctuation."""
    if page.suffix == ".ipynb":
        return {heading.replace(" ", "-") for heading in headings(markdown(page))}
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(markdown(page))}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    missing, text = [], without_code(markdown(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"""\b(?:href|src)=["']([^"']+)""", text):
        if re.match(r"https?://|attachment:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


def test_how_an_anchor_is_made(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# The `GAE` of *it*: [a](b)\n```\n# not this\n```\n## 2 · KL\n", encoding="utf-8")
    assert anchors(page) == {"the-gae-of-it-a", "2--kl"}
    notebook = page.with_suffix(".ipynb")
    cell = {"cell_type": "markdown", "source": ["# A\n", "## 2 · KL: `x`"]}
    notebook.write_text(json.dumps({"cells": [cell]}), encoding="utf-8")
    assert anchors(notebook) == {"A", "2-·-KL:-x"}


@each_notebook
def test_it_leads_on_to_the_next_notebook(notebook):
    later = [other.name for other in NOTEBOOKS if other.name > notebook.name]
    assert not later or f"]({later[0]})" in cells(notebook)[-1][1]["source"]


@each_notebook
def test_stored_inspectors_are_those_of_today(notebook):
    """`python tools/inspector_page.py --layout` lays them out anew."""
    stored = ["".join(output.get("data", {}).get("text/html", "")) for _, output in outputs(notebook)]
    for page in (page for page in stored if 'class="rlhf-inspector"' in page):
        assert inspector_page.laid_out_anew(page) == page


# ---------------------------------------------------------------- the README


def test_the_pictures_of_the_readme_are_those_that_the_notebooks_stored():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]{20,}\]\(([^)]+)\)", readme)
    assert sorted(shown) == sorted(
        [*readme_pictures.PICTURES, "docs/inspector.png"]
    )  # the last: tools/inspector_page.py --picture
    stored = [png for notebook in NOTEBOOKS for _, output in outputs(notebook) for png in images(output).values()]
    assert [file for file in readme_pictures.PICTURES if (ROOT / file).read_bytes() not in stored] == []


def test_before_and_after_in_the_readme_is_the_middle_one():
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    (prompt, before, after) = re.findall(
        r"^\| median \| (.+?) \| (.+?) \(reward.*?\) \| (.+?) \(reward.*?\) \|$", page, re.MULTILINE
    )[0]
    shown = re.findall(r"^> (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert shown == [prompt, f"before: {before}", f"after: {after}"]


# ---------------------------------------------------------------- CONTRIBUTING


def test_the_table_of_modules_names_every_module_once():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Tests")[0]
    named = [name for row in re.findall(r"^\| (.+?) \|", table, re.MULTILINE)[1:] for name in re.findall(r"`([\w.]+)`", row)]
    package = ROOT / "rlhf_helpers"
    modules = [
        ".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("*.py") if path.stem != "__init__"
    ]
    assert sorted(named) == sorted(modules)


PACKAGE = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "rlhf_helpers").rglob("*.py"))]


@each_notebook
def test_code_that_a_page_shows_is_the_package_s(notebook):
    """`inspect.getsource` in a cell: after a change the stored output would show what is there no more."""
    sources = [
        i for i, cell in cells(notebook, "code") if "getsource" in cell["source"] or re.match(r"source\(", cell["source"])
    ]
    shown = [
        (i, "".join(out["data"]["text/plain"]))
        for i, out in outputs(notebook)
        if i in sources and "text/html" in out.get("data", {})
    ]
    for number, text in shown:
        for part in re.split(r"\n\n+(?=def |class |@)", text.strip("\n")):
            assert any(part.strip("\n") in module for module in PACKAGE), f"cell {number}: {part[:60]}"
