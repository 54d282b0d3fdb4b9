"""Write the repository's address wherever it stands: `make address URL=https://github.com/me/my-fork`; without URL that of the git
remote `origin`. It stands in rlhf_helpers/config.py, in the badge and the first cell of every notebook, and in whatever names one of
these; the same command with the old address takes everything back."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = {".py", ".ipynb", ".md", ".toml", ".cff", ".yml", ".yaml", ".json", ".html", ".txt"}
ELSEWHERE = {".git", ".venv", "output", "runs", "build", ".pytest_cache"}
EXPECTED = "expected https://github.com/OWNER/NAME: Colab opens notebooks from there alone"


def checked(url):
    """The address https://github.com/owner/name of a URL as people and git write it. Raises ValueError for anything else."""
    found = re.fullmatch(
        r"(?:https://(?:[^/@]*@)?github\.com/|git@github\.com:|ssh://git@github\.com/)([\w.-]+)/([\w.-]+?)(?:\.git)?/?",
        url.strip(),
    )
    if not found:
        shown = re.sub(r"//[^/@]*@", "//...@", url)  # a password stays unsaid
        raise ValueError(f"{shown!r} is no address of a repository; {EXPECTED}")
    return f"https://github.com/{found[1]}/{found[2]}"


def origin(root):
    """What git calls origin. Raises ValueError where there is none."""
    done = subprocess.run(["git", "-C", str(root), "remote", "get-url", "origin"], capture_output=True, text=True)
    if done.returncode:
        raise ValueError("git knows no remote `origin`; expected one, or URL=https://github.com/me/my-fork")
    return done.stdout.strip()


def current(root):
    """The address that rlhf_helpers/config.py has."""
    text = (root / "rlhf_helpers" / "config.py").read_text(encoding="utf-8")
    return re.search(r'^REPOSITORY = "(.+?)"', text, re.MULTILINE)[1]


def rewrite(root, new):
    """Put the address `new` in place of the old one. Returns the files that changed, relative to `root`."""
    old, changes = current(root), {}
    paths = [address.removeprefix("https://github.com/") for address in (old, new)]
    swaps = [tuple(place + path for path in paths) for place in ("github.com/", "github/")]  # the second is Colab's
    swaps.append(tuple("/content/" + path.rpartition("/")[2] for path in paths))
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix in KINDS and path.is_file() and not ELSEWHERE & set(relative.parts):
            made = text = path.read_bytes().decode(
                "utf-8", errors="surrogateescape"
            )  # somebody's file may be in another encoding
            for before, after in swaps:
                made = re.sub(re.escape(before) + r"(?![\w-])", after, made)  # not the beginning of a longer name
            if made != text:
                changes[relative] = made
    for relative, text in changes.items():
        (root / relative).write_bytes(text.encode("utf-8", errors="surrogateescape"))
    return list(changes)


def main(arguments):
    try:
        new = checked(arguments[0] if arguments and arguments[0] else origin(ROOT))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    changed = rewrite(ROOT, new)
    print(f"{new}: {len(changed)} files changed" + "".join(f"\n  {path}" for path in changed))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
