"""What all benchmarks share: medians of interleaved rounds, memory of many processes, the report.

Machines slow down and speed up over minutes. Therefore all sides of a case are measured in turn,
round after round, each time in a fresh process, and the medians are compared.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 0.05


@dataclass
class Case:
    """One line of the report; less is better.

    Attributes
    ----------
    name : str
    ours, limit : float
        Median of the course's own way, and of what cannot be undercut.
    peers : dict of str to float
        Medians of other ways to the same end.
    more : dict
        Further values, such as ``{"memory_MiB": 512.0}``.
    """

    name: str
    ours: float
    peers: dict
    limit: float | None
    more: dict = field(default_factory=dict)


def interleaved(sides, rounds):
    """Measure every side once in each round and return the medians.

    Parameters
    ----------
    sides : dict of str to callable
        Each callable measures once and returns a number.
    rounds : int

    Returns
    -------
    dict of str to float

    Examples
    --------
    >>> numbers = iter([1, 10, 2, 20, 9, 90])
    >>> interleaved({"a": lambda: next(numbers), "b": lambda: next(numbers)}, rounds=3)
    {'a': 2, 'b': 20}
    """
    seen = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            seen[name].append(measure())
    return {name: median(values) for name, values in seen.items()}


def quiet_environment():
    """This process's environment without what would change a measurement."""
    drop = ("DASK_", "PYTEST_", "COV_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    return environment | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def seconds_until_ready(program):
    """Start a fresh Python process and wait until it prints its first line.

    The start of Python and all imports count, as for a person who waits. What the process does
    afterwards, such as closing a cluster, does not count, but its end is awaited.

    Parameters
    ----------
    program : str
        Python code that prints one line when it is ready.

    Returns
    -------
    float
        Seconds.

    Raises
    ------
    RuntimeError
        The program ended without being ready, or failed afterwards.
    """
    # What a peer forgets to remove (Dask its scratch space) goes with the folder.
    with tempfile.TemporaryDirectory(prefix="mh-", ignore_cleanup_errors=True) as folder:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=quiet_environment() | {"TMPDIR": folder, "TEMP": folder, "TMP": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        _, errors = process.communicate(timeout=120)
    if process.returncode or not line:
        last = (errors.strip().splitlines() or ["it printed nothing"])[-1]
        raise RuntimeError(f"A measured program failed: {last}")
    return seconds


def bytes_of(process):
    """Memory of one process: its proportional share (PSS) where Linux tells it, else its RSS.

    Processes share pages, libraries above all. RSS counts a shared page once for each process,
    PSS divides it among them, so that only PSS may be added up.
    """
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # another system, or the process ended in this moment
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


class PeakMemory:
    """Largest memory of a process and all its descendants together, looked at every 50 ms.

    Parameters
    ----------
    pid : int

    Attributes
    ----------
    peak : int
        Bytes.

    Examples
    --------
    >>> with PeakMemory(os.getpid()) as memory:
    ...     pass
    >>> memory.peak > 0
    True
    """

    def __init__(self, pid):
        self.peak = 0
        self._process = psutil.Process(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._ended.set()
        self._thread.join()

    def _watch(self):
        while True:
            try:
                family = [self._process, *self._process.children(recursive=True)]
            except psutil.Error:
                return
            self.peak = max(self.peak, sum(map(bytes_of, family)))
            if self._ended.wait(SAMPLE_SECONDS):
                return


def significant(value, digits=4):
    """A number with so many significant digits: times reach from microseconds to minutes.

    Examples
    --------
    >>> significant(0.0000931234), significant(512.34)
    (9.312e-05, 512.3)
    """
    return float(f"{value:.{digits}g}")


def _plain(value, digits=3):
    """As text without an exponent, so that the numbers of a column can be compared by eye."""
    rounded = abs(significant(value, digits))
    before_point = math.floor(math.log10(rounded)) + 1 if rounded else 1
    return f"{value:.{max(0, digits - before_point)}f}"


def as_table(cases):
    """The cases as text in columns; a missing value is a dash."""
    peers = list(dict.fromkeys(name for case in cases for name in case.peers))
    more = list(dict.fromkeys(name for case in cases for name in case.more))
    rows = [["case", "ours (s)", *[f"{peer} (s)" for peer in peers], "limit (s)", *more]]
    for case in cases:
        values = [case.ours, *[case.peers.get(peer) for peer in peers], case.limit]
        values += [case.more.get(name) for name in more]
        rows.append([case.name, *["–" if v is None else _plain(v) for v in values]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def as_json(name, cases):
    """One line of JSON for programs that compare runs."""
    lines = []
    for case in cases:
        peers = {peer: significant(value) for peer, value in case.peers.items()}
        limit = None if case.limit is None else significant(case.limit)
        line = {"case": case.name, "ours": significant(case.ours), "peers": peers, "limit": limit}
        lines.append(line | {key: significant(value) for key, value in case.more.items()})
    return json.dumps({"benchmark": name, "unit": "s", "cases": lines})
