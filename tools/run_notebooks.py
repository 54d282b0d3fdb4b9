"""Run notebooks from fresh kernels and store their outputs: `python tools/run_notebooks.py [notebooks/04*.ipynb ...]`.

The stored outputs are those of a full run (RLHF_FAST is unset). Metadata that differs from run to run is left out, tags stay.
A notebook that fails is left as it was. Prints minutes, and the peak memory of the kernel, for the headers and the README."""

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from rlhf_helpers import progress

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
PEAK = "from rlhf_helpers.machine import peak_megabytes; print(round(peak_megabytes()))"


def run(path):
    notebook = nbformat.read(path, as_version=4)
    probe = nbformat.v4.new_code_cell(PEAK)
    notebook.cells.append(probe)
    started = time.time()
    client = NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}},
                            record_timing=False, coalesce_streams=True)  # fmt: skip
    with progress.bar(sum(cell.cell_type == "code" for cell in notebook.cells), path.stem, "cells") as done:
        client.on_cell_executed = lambda **_: done.update()
        client.execute()
    notebook.cells.pop()
    peak = probe.outputs[0]["text"].strip()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}  # fmt: skip
    for cell in notebook.cells:
        cell.metadata = {name: value for name, value in cell.metadata.items() if name in ("tags", "jupyter")}
    nbformat.write(notebook, path)
    stderr = [i for i, cell in enumerate(notebook.cells) for out in cell.get("outputs", []) if out.get("name") == "stderr"]
    print(f"{path.name}: {(time.time() - started) / 60:.1f} min, peak {peak} MB, {path.stat().st_size // 1000} kB"
          + (f", stderr in cells {stderr}" if stderr else ""), flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="all, if none is named")
    paths = parser.parse_args().notebooks
    os.environ.pop("RLHF_FAST", None)
    failed = 0
    for path in sorted(paths) or sorted(FOLDER.glob("0*.ipynb")):
        try:
            run(path)
        except CellExecutionError as error:
            failed += 1
            print(f"{path.name}: FAILED, left as it was\n{error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
