"""Runs notebooks of colab/ from top to bottom and stores their outputs in them:

    launch/demo.sh && python -m tools.run_notebooks colab/*.ipynb

They show the models of runs/demo, and train what is missing there.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def main(paths: list[str]) -> None:
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        folder = {"metadata": {"path": str(ROOT)}}
        NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False, resources=folder).execute()
        nbformat.write(notebook, path)
        print(f"ran {path}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
