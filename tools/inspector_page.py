"""Make docs/inspector.html, a page to touch without installation: `python tools/inspector_page.py` (a quarter of an hour on two cores).

Two runs with the same seed and prompts: the profile's, and one that is paid for warm words, without a price on KL. Both are recorded on four
held-out prompts and stand side by side; the page needs nothing but itself. `--layout` takes the runs that are there, and lays the inspectors
that notebooks have stored out anew, too, from the numbers in them. `--picture` takes docs/inspector.png from the page that is there, by headless Chromium."""

import argparse
import html
import json
import math
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from rlhf_helpers.config import CPU, project_root
from rlhf_helpers.course import inspector
from rlhf_helpers.course.variants import reward_named
from rlhf_helpers.data import load_prompts
from rlhf_helpers.models import load_policy
from rlhf_helpers.trainer import PPOTrainer

HERE = Path(__file__).resolve().parent
RUNS = {
    "Paid by the reward model, with a price on KL": (
        "The profile's settings for two cores: a nat of KL costs 0.05 of a deviation of the scores. A budget of 9 nats a response, mean of four steps of training, would end the run.",
        "model",
        {},
        32,
        4,
    ),
    "Paid for warm words, without a price": (
        "The score is how many different warm words an answer has, whatever was asked, in deviations of the training data's; no price, no budget, 48 steps "
        "(notebook 07, section 3).",
        "warm_words",
        dict(init_kl_coef=0.0, kl_budget=math.inf),
        48,
        6,
    ),
}
TOP = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>RLHF with PPO: look inside two runs</title>
<style>body{font:16px/1.55 system-ui,sans-serif;max-width:1240px;margin:24px auto;padding:0 16px;color:#111;background:#fff}
@media (prefers-color-scheme:dark){body{color:#eee;background:#121212}}h1{font-size:1.6em}h2{font-size:1.1em;margin:.6em 0 .4em}p{max-width:80ch}</style></head><body>
<h1>Look inside two runs of PPO</h1>
<p>A language model of 135 million weights, in 4 bits, learns by PPO, twice: from a reward model that likes whole, warm answers, and from a mere count of warm words, which are soon all it says. Every few steps it was asked the same four
prompts with the same random numbers. Choose a number to see as colour, point at a token (or click into the text and use the arrow keys), and move the slider from
<em>before training</em> to the end: the other run goes along, to the nearest step that was recorded, and both have one scale of colours. An answer is one draw, so its score jumps from step to step. The course explains each number: <em>RLHF with PPO, in notebooks</em>.</p>
"""


def recorded(reward, settings, steps, every):
    """The frames of one run on four held-out prompts."""
    policy, tokenizer = load_policy(CPU, seed=0)
    trainer = PPOTrainer(CPU.ppo_config(**settings, seed=0), policy, tokenizer=tokenizer)
    score, root = reward_named(reward, 0), project_root()
    recorder = inspector.Recorder(trainer, load_prompts(root / CPU.heldout_prompts)[:4], score, every, likeliest=True)
    trainer.train(load_prompts(root / CPU.prompts), score, steps=steps, on_step=recorder)
    return recorder.frames


def laid_out_anew(page):
    """A page of the inspector as `inspector.page` makes it today, from the frames that it holds."""
    held = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    return inspector.page(held["frames"], held["signal"])


def lay_out(notebook):
    """Lay the inspectors in a notebook's stored outputs out anew."""
    about = json.loads(notebook.read_text(encoding="utf-8"))
    for data in (output.get("data", {}) for cell in about["cells"] for output in cell.get("outputs", [])):
        if 'class="rlhf-inspector"' in (page := "".join(data.get("text/html", ""))):
            data["text/html"] = laid_out_anew(page).splitlines(keepends=True)
    notebook.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(file):
    """The frames of the runs that a page holds, by their titles."""
    held = r'<h2>(.*?)</h2>.*?<script type="application/json">(.*?)</script>'
    found = re.findall(held, file.read_text(encoding="utf-8"), re.DOTALL)
    return {html.unescape(title): json.loads(data)["frames"] for title, data in found}


def picture(page, file, words=(" simple", " laughter")):
    """A screenshot of the page's two runs, with all numbers of one word of each answer, as if it were pointed at."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("no Chromium here (Debian: apt install chromium)")
    point = f"""document.body.replaceChildren(document.querySelector('.rlhf-inspector').parentNode.parentNode);
        document.querySelectorAll('.text').forEach((text, n) => {{
            const tokens = [...text.children], found = tokens.find(token => token.textContent === {json.dumps(words)}[n]);
            (found || tokens[6]).dispatchEvent(new MouseEvent('mouseenter'))}})"""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(
            page.read_text(encoding="utf-8").replace("</body>", f"<script>{point}</script></body>"), encoding="utf-8"
        )
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1.5"]
        size = ["--window-size=1260,850", f"--user-data-dir={folder}/profile"]
        subprocess.run([chromium, *flags, *size, f"--screenshot={file}", copy.as_uri()], check=True, stderr=subprocess.DEVNULL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", action="store_true", help="only the screenshot")
    parser.add_argument("--layout", action="store_true", help="lay out the runs that the page holds anew, without making them")
    docs, options = HERE.parent / "docs", parser.parse_args()
    if options.picture:
        return picture(docs / "inspector.html", docs / "inspector.png")
    if options.layout:
        for notebook in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
            lay_out(notebook)
    file = docs / "inspector.html"
    runs = read(file) if options.layout else {}
    for title, (_, *how) in RUNS.items():
        if title not in runs:
            runs[title] = recorded(*how)
            print(title, "recorded", flush=True)
    runs = {title: runs[title] for title in RUNS}
    about = "".join(f"<p><b>{title}.</b> {words}</p>\n" for title, (words, *_) in RUNS.items())
    text = f"{TOP}{about}{inspector.side_by_side(runs)}\n</body></html>\n"
    file.write_text(text, encoding="utf-8")
    picture(file, docs / "inspector.png")
    print(f"docs/inspector.html: {len(text.encode()) // 1000} kB")


if __name__ == "__main__":
    main()
