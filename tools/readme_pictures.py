"""Take the README's pictures from the stored outputs of the notebooks: `python tools/readme_pictures.py`.

A picture is named by what stands in its cell, so that it is found again after the notebook has changed and been run."""

import base64
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURES = {  # file: (notebook, words in the source of the cell)
    "docs/token_heatmap.png": ("04_ppo_step_by_step", "plots.token_heatmap(tokenizer, rollout, best)"),
    "docs/training_curves.png": ("05_ppo_training_loop", "plots.LiveCurves(steps"),
}


def picture(notebook, words):
    """The first PNG that the cell with these words stored, as bytes."""
    cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    (cell,) = (cell for cell in cells if cell["cell_type"] == "code" and words in "".join(cell["source"]))
    (png, *_) = (output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {}))
    return base64.b64decode("".join(png))


if __name__ == "__main__":
    for file, place in PICTURES.items():
        (ROOT / file).parent.mkdir(exist_ok=True)
        (ROOT / file).write_bytes(picture(*place))
        print(file)
