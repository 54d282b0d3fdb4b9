"""Draw the strip at the top of each notebook, docs/pipeline.svg made small with the notebook's own parts in colour:
`python tools/strips.py` writes docs/strips/00.svg to 09.svg."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "strips"
HERE = {  # the parts that a notebook is about
    "00": ("prompt", "policy", "response", "reward model", "score", "value head", "reference", "advantages", "update"),
    "01": ("policy", "value head", "reference"),
    "02": ("reward model", "score"),
    "03": ("prompt", "response"),
    "04": ("response", "score", "value head", "reference", "advantages", "update"),
    "05": ("policy", "update", "loop"),
    "06": ("policy", "value head", "reference", "update", "loop"),
    "07": ("policy", "reward model", "score", "reference"),
    "08": ("score", "value head", "advantages"),
    "09": ("prompt", "policy", "response", "reward model", "score", "value head", "reference", "advantages", "update", "loop"),
}
GREY, BLUE, ORANGE, GREEN = ("#dddddd", "#333"), ("#b9d7ec", "#0072B2"), ("#f8d48a", "#b87c00"), ("#a5dccb", "#00795a")
BOXES = {  # name: (x, y, width, (ground, border) where the notebook is)
    "prompt": (20, 10, 90, GREY),
    "policy": (160, 10, 110, BLUE),
    "response": (310, 10, 110, GREY),
    "reward model": (460, 10, 140, ORANGE),
    "score": (640, 10, 90, ORANGE),
    "value head": (160, 62, 110, BLUE),
    "reference": (310, 62, 110, BLUE),
    "advantages": (460, 62, 140, GREEN),
    "update": (640, 62, 90, GREEN),
}
HEIGHT = 32
ARROWS = (
    *("M110 20H157", "M270 26H307", "M420 26H457", "M600 26H637"),
    *("M215 42V59", "M365 42V59", "M685 42V50H560V59", "M420 78H457", "M600 78H637", "M215 94V108H530V97"),
)
LOOP = "M685 94V120H136V33H157"


def alternative(notebook):
    """What the strip says, for those who cannot see it."""
    parts = [part for part in HERE[notebook] if part != "loop"]
    which = "the whole" if len(parts) == len(BOXES) else f"{', '.join(parts[:-1])} and {parts[-1]} of the"
    back = ", and the way from the update back to the policy" if "loop" in HERE[notebook] else ""
    return f"You are here, in notebook {notebook}: {which} pipeline{back}."


def markdown(notebook):
    """The line of the notebook's first cell that shows it."""
    return f"![{alternative(notebook)}](../docs/strips/{notebook}.svg)"


def strip(notebook):
    """The SVG, as text. It brings its own white ground, so that it reads in dark themes, too."""
    here = HERE[notebook]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 130" width="880" height="130" role="img" '
        f'aria-label="{alternative(notebook)}" font-family="Helvetica, Arial, sans-serif" font-size="15">',
        '<rect width="880" height="130" rx="6" fill="#fff"/>',
    ]
    for name, colour in (("a", "#777"), ("b", GREEN[1])):
        parts.append(
            f'<defs><marker id="{name}{notebook}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker></defs>'
        )
    for path, on in (*((path, False) for path in ARROWS), (LOOP, "loop" in here)):
        look = f'stroke="{GREEN[1]}" stroke-width="3"' if on else 'stroke="#777" stroke-width="1.4"'
        parts.append(f'<path d="{path}" fill="none" {look} marker-end="url(#{"b" if on else "a"}{notebook})"/>')
    for name, (x, y, width, (ground, border)) in BOXES.items():
        on = name in here
        look = f'fill="{ground}" stroke="{border}" stroke-width="2"' if on else 'fill="#fff" stroke="#aaa" stroke-width="1.2"'
        word = 'fill="#111" font-weight="bold"' if on else 'fill="#666"'
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{HEIGHT}" rx="6" {look}/>')
        parts.append(f'<text x="{x + width / 2:g}" y="{y + 21}" text-anchor="middle" {word}>{name}</text>')
    parts.append('<text x="805" y="42" text-anchor="middle" font-size="14" fill="#555">you are here</text>')
    parts.append(f'<text x="805" y="86" text-anchor="middle" font-size="40" font-weight="bold" fill="#222">{notebook}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    FOLDER.mkdir(exist_ok=True)
    for number in HERE:
        (FOLDER / f"{number}.svg").write_text(strip(number), encoding="utf-8")
        print(markdown(number))
