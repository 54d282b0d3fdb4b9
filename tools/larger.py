"""Memory of a model larger than one card, by part and number of cards, computed: the table of docs/larger.md.

    python tools/larger.py            prints it
    python tools/larger.py --write    writes it into docs/larger.md, between its marks

Gigabytes on each card, in NF4, for the settings of `memory.memory_by_part`: 16 responses a card in minibatches of 4, 50 + 50 tokens."""

import re
import sys

from rlhf_helpers.config import project_root
from rlhf_helpers.memory import LARGE, WHILE_SAMPLING, WHILE_UPDATING, memory_by_part, peak

CARDS = (1, 2, 4, 8)
COLUMNS = {  # what stands together in one column
    "base": ("linear layers", "embeddings, head, norms"),
    "put together": ("put together", "one layer unpacked"),
    "LoRA, head, Adam": ("LoRA and Adam", "value head"),
    "sampling": WHILE_SAMPLING,
    "learning": WHILE_UPDATING,
}
MARKS = re.compile(r"(?<=<!-- memory -->\n).*?(?=<!-- end -->)", re.DOTALL)


def table():
    """Markdown, a row for each model and number of cards."""
    rows = [["model", "cards", *COLUMNS, "peak"], ["---"] * (len(COLUMNS) + 3)]
    for name, config in LARGE.items():
        for cards in CARDS:
            parts = memory_by_part(config, cards=cards)
            sizes = [sum(parts.get(part, 0) for part in column) for column in COLUMNS.values()]
            rows.append([name, str(cards), *(f"{size / 1e9:.2f}" for size in (*sizes, peak(parts)))])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        page = project_root() / "docs" / "larger.md"
        page.write_text(MARKS.sub(lambda _: table(), page.read_text(encoding="utf-8")), encoding="utf-8")
    print(table(), end="")
