"""Seconds and peak memory of each notebook under nbval, all processes together.

The time is that of the command which the tests use: pytest starts, the kernel starts, every cell
runs and is compared. The memory is the largest sum over pytest, the kernel and all workers; pages
that they share count once (PSS) where Linux tells it. Limit: an empty notebook, in the same run.
There are no peers: no other course runs this notebook.
"""

import subprocess
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_notebook

from benchmarks.measure import ROOT, Case, PeakMemory, interleaved
from helpers.classroom.store import clean
from tests.validation import NOTEBOOKS, clean_environment, nbval_command

ROUNDS = 3


def measure(notebook):
    """Run a notebook under nbval once.

    Parameters
    ----------
    notebook : Path

    Returns
    -------
    seconds : float
    memory : float
        Peak, in MiB.

    Raises
    ------
    RuntimeError
        The notebook does not pass, so that its time means nothing.
    """
    with tempfile.TemporaryDirectory(prefix="mh-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        command = nbval_command(notebook, folder / "pytest.ini")
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=clean_environment(folder),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with PeakMemory(process.pid) as memory:
            status = process.wait(timeout=600)
        seconds = time.perf_counter() - start
    if status not in (0, 5):  # 5: the empty notebook has no cell to compare
        raise RuntimeError(
            f"{notebook.name} does not pass under nbval, so it was not measured: "
            f"run python -m pytest {(ROOT / 'tests').name}/test_notebooks.py and repair it first."
        )
    return seconds, memory.peak / 2**20


def run(rounds=ROUNDS, notebooks=None):
    """Measure the notebooks.

    Parameters
    ----------
    rounds : int
    notebooks : list of Path, optional
        Default: all of the course.

    Returns
    -------
    list of Case
        With ``more["memory_MiB"]``.
    """
    notebooks = NOTEBOOKS if notebooks is None else notebooks
    peaks = {}

    def side(notebook):
        def measure_once():
            seconds, memory = measure(notebook)
            peaks[notebook.stem] = max(memory, peaks.get(notebook.stem, 0))
            return seconds

        return measure_once

    with tempfile.TemporaryDirectory(prefix="mh-") as name:
        empty = Path(name) / "empty.ipynb"
        nbformat.write(clean(new_notebook()), empty)
        sides = {path.stem: side(path) for path in [empty, *notebooks]}
        seconds = interleaved(sides, rounds)
    limit = seconds["empty"]
    return [
        Case(path.stem, seconds[path.stem], {}, limit, {"memory_MiB": peaks[path.stem]})
        for path in notebooks
    ]
