"""Settings of all tests: what is skipped, in which environment they run, and the leak check."""

import gc
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT),) if path not in sys.path]

# Threads of libraries that are made once and then live as long as the process.
LASTING_THREADS = ("Dask-Offload", "TCP-Executor", "asyncio_", "Profile", "IO loop")
# Processes that Python's multiprocessing keeps for itself.
LASTING_PROCESSES = ("resource_tracker", "forkserver")
# Folders of pytest and of libraries, not ours.
LASTING_FOLDERS = ("pytest-of-", "pymp-", "matplotlib-", "joblib_", "torchinductor_")
SETTLE_SECONDS = 5


with warnings.catch_warnings():
    # The browser driver's trio registers a generator in a way that Hypothesis warns about.
    warnings.simplefilter("ignore")
    import hypothesis  # noqa: F401


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config):
    """All tests run as the kernels do: offline, and without the user's settings."""
    from tests.validation import clean_environment

    config.many_hands_folder = Path(tempfile.mkdtemp(prefix="mh-tests-"))
    os.environ.update(clean_environment(config.many_hands_folder))
    for name in [n for n in os.environ if n.startswith("DASK_")]:
        del os.environ[name]
    tempfile.tempdir = None  # read TMPDIR again
    sys.path.append(os.environ["PYTHONPATH"])
    import sitecustomize

    if not hasattr(sitecustomize, "is_here"):
        # This interpreter already has a module of this name; take ours by its path.
        from importlib.util import module_from_spec, spec_from_file_location

        path = Path(os.environ["PYTHONPATH"]) / "sitecustomize.py"
        spec = spec_from_file_location("sitecustomize_of_tests", path)
        sitecustomize = module_from_spec(spec)
        spec.loader.exec_module(sitecustomize)
    config.many_hands_guard = sitecustomize


def pytest_collection_finish(session):
    """What is loaded now stays: the leak check need not look through it twice a test."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    folder = getattr(config, "many_hands_folder", None)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--runslow"):
        return
    skip = pytest.mark.skip(reason="slow: give --runslow to run it")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def network_if_marked(request, monkeypatch):
    """Lift the guard against connections for tests that are marked `network`."""
    if request.node.get_closest_marker("network") is None:
        yield
        return
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(request.config.many_hands_guard, "allowed", True)
    yield


class Present:
    """What exists now: child processes, threads, listening ports, temporary files."""

    def __init__(self):
        gc.collect()
        children = psutil.Process().children(recursive=True)
        self.processes = {child.pid: text for child in children if (text := _described(child))}
        self.threads = {
            thread.ident: thread.name
            for thread in threading.enumerate()
            if not thread.daemon and not thread.name.startswith(LASTING_THREADS)
        }
        self.ports = _listening()
        names = [path.name for path in Path(tempfile.gettempdir()).iterdir()]
        self.files = {name: name for name in names if not name.startswith(LASTING_FOLDERS)}

    def new_since(self, before):
        """One line for each thing that did not exist before."""
        lines = []
        for kind in ("processes", "threads", "ports", "files"):
            now, then = getattr(self, kind), getattr(before, kind)
            lines += [f"{kind}: {now[key]}" for key in now if key not in then]
        return lines


def _described(process):
    try:
        command = " ".join(process.cmdline())
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
    except psutil.Error:
        return None
    return None if any(word in command for word in LASTING_PROCESSES) else command


def _listening():
    try:
        connections = psutil.Process().net_connections(kind="inet")
    except psutil.Error:
        return {}
    ports = [c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN]
    return {port: f"listening on port {port}" for port in ports}


def left_since(before, seconds=SETTLE_SECONDS):
    """What appeared since `before` and does not go away within some seconds."""
    end = time.monotonic() + seconds
    while True:
        lines = Present().new_since(before)
        if not lines or time.monotonic() > end:
            return lines
        time.sleep(0.05)


@pytest.fixture(autouse=True, scope="module")
def no_leak_of_module():
    """A fixture shared by a module must clean up too."""
    before = Present()
    yield
    lines = left_since(before)
    assert not lines, "left behind by the tests of this module: " + "; ".join(lines)


@pytest.fixture(autouse=True)
def no_leak(no_leak_of_module):
    """After each test: no new process, non-daemon thread, listening port or temporary file."""
    before = Present()
    gc.freeze()  # what tests loaded since the last one stays too
    yield
    lines = left_since(before)
    assert not lines, "left behind by this test: " + "; ".join(lines)


@pytest.fixture
def short_folder():
    """An empty folder with a short name: some systems limit the length of a socket's path."""
    folder = Path(tempfile.mkdtemp(prefix="nb-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
