"""The strips "you are here": drawn by the tool as it is, one a notebook, and each notebook shows its own."""

import xml.etree.ElementTree as ET

import pytest

from tests import test_notebooks as pages
from tools import strips

SVG = "{http://www.w3.org/2000/svg}"
NUMBERS = list(strips.HERE)


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_stored_is_what_the_tool_draws(number):
    assert (strips.FOLDER / f"{number}.svg").read_text(encoding="utf-8") == strips.strip(number)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_parts_of_a_notebook_are_in_colour_and_the_others_are_not(number):
    root = ET.fromstring(strips.strip(number))
    bold = [text.text for text in root.iter(f"{SVG}text") if text.text in strips.BOXES and text.get("font-weight") == "bold"]
    assert set(bold) == set(strips.HERE[number]) - {"loop"} and len(bold) >= 2
    grounds = {rect.get("fill") for rect in root.iter(f"{SVG}rect")}
    assert grounds == {"#fff"} | {strips.BOXES[part][3][0] for part in bold}
    assert number in root.get("aria-label")


def test_no_two_notebooks_look_alike():
    assert len({strips.HERE[number] for number in NUMBERS}) == len(NUMBERS)


def test_nothing_stands_outside_and_no_word_is_wider_than_its_box():
    for name, (x, y, width, _) in strips.BOXES.items():
        assert 0 <= x and x + width <= 750 and 0 <= y and y + strips.HEIGHT <= 130
        assert 9 * len(name) <= width  # bold letters of 15 px are about 9 wide


def test_its_parts_are_those_of_the_large_drawing():
    large = (strips.FOLDER.parent / "pipeline.svg").read_text(encoding="utf-8")
    assert [part for part in strips.BOXES if part not in large] == []


@pages.each_notebook
def test_each_notebook_shows_its_own_at_the_top(notebook):
    (_, first), *_ = pages.cells(notebook)
    assert first["source"].split("\n\n")[2] == strips.markdown(notebook.name[:2])
