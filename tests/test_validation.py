"""The guards of the tests themselves: each must be able to fail."""

import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tests.conftest import Present, left_since
from tests.validation import clean_environment, leftovers, processes_of, refused

OUTSIDE = "192.0.2.1"  # reserved for documentation: nobody has it


def run_python(program, environment):
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )


def test_a_connection_to_another_machine_is_refused_here():
    with socket.socket() as outside, pytest.raises(OSError, match="without a network"):
        outside.connect((OUTSIDE, 80))


def test_a_question_to_a_name_server_is_refused_here():
    with pytest.raises(socket.gaierror, match=r"without a network: example\.org"):
        socket.getaddrinfo("example.org", 443)


@pytest.mark.parametrize(
    "program",
    [
        f"import socket; socket.socket().connect(('{OUTSIDE}', 80))",
        f"import socket; socket.create_connection(('{OUTSIDE}', 80))",
        "import socket; socket.gethostbyname('example.org')",
        "import urllib.request; urllib.request.urlopen('http://example.org')",
        "import socket\ns = socket.socket(type=socket.SOCK_DGRAM)\n"
        f"s.sendto(b'x', ('{OUTSIDE}', 53))",
        "import asyncio\nasyncio.run(asyncio.open_connection('2001:db8::1', 80))",
    ],
)
def test_a_process_started_by_a_test_is_offline_and_its_attempt_is_noted(program, tmp_path):
    environment = clean_environment(tmp_path)
    done = run_python(program, environment)
    assert done.returncode != 0
    assert "without a network" in done.stderr
    assert len(refused(environment)) >= 1


def test_a_process_that_hides_the_refusal_is_found_out(tmp_path):
    environment = clean_environment(tmp_path)
    program = f"import socket; socket.socket().connect_ex(('{OUTSIDE}', 80))"
    run_python(f"try:\n    {program}\nexcept OSError: pass", environment)
    assert refused(environment) == [f"socket.connect {OUTSIDE}"]


def test_this_machine_may_be_reached(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket; socket.create_connection(('localhost', {port})).close()"
        done = run_python(program, clean_environment(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "fails"), [("helpers.cluster", True), ("numpy.linalg", False)])
def test_a_warning_is_an_error_only_when_it_comes_from_helpers(name, fails, tmp_path):
    program = (
        "import warnings\n"
        f"warnings.warn_explicit('old', DeprecationWarning, 'file.py', 1, module={name!r})\n"
    )
    done = run_python(program, clean_environment(tmp_path))
    assert (done.returncode != 0) is fails


def test_a_warning_of_helpers_is_an_error_on_workers(tmp_path):
    # The module is made on the worker, so that it is the worker's own filter that counts.
    program = """
import sys
from distributed import Client, LocalCluster

def warn():
    import types
    module = types.ModuleType("helpers.made_up")
    exec("import warnings\\ndef act(): warnings.warn('old', stacklevel=1)", module.__dict__)
    module.act()

if __name__ == "__main__":
    with LocalCluster(1, threads_per_worker=1, dashboard_address=None) as local:
        with Client(local) as client:
            print(type(client.submit(warn).exception()).__name__)
"""
    script = tmp_path / "script.py"
    script.write_text(program)
    environment = clean_environment(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "UserWarning", done.stderr


def test_the_users_settings_do_not_reach_a_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://192.0.2.1:8786")
    monkeypatch.setenv("JUPYTER_PATH", "/somewhere")
    environment = clean_environment(tmp_path)
    assert "DASK_SCHEDULER_ADDRESS" not in environment
    assert "JUPYTER_PATH" not in environment
    assert Path(environment["IPYTHONDIR"]).parent == tmp_path


def test_the_leak_check_sees_a_process():
    before = Present()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert any("time.sleep" in line for line in left_since(before, seconds=0.3))
    finally:
        child.kill()
        child.wait()
    assert left_since(before) == []


def test_the_leak_check_sees_a_thread():
    before = Present()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="forgotten")
    thread.start()
    assert left_since(before, seconds=0.1) == ["threads: forgotten"]
    stop.set()
    thread.join()


def test_the_leak_check_sees_a_port_and_a_folder():
    before = Present()
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryDirectory() as folder:
        port = server.getsockname()[1]
        lines = left_since(before, seconds=0.1)
    assert lines == [f"ports: listening on port {port}", f"files: {Path(folder).name}"]


def test_leftovers_finds_a_process_whose_parent_is_gone(tmp_path):
    environment = clean_environment(tmp_path)
    program = (
        "import subprocess, sys, os; subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(60)'], start_new_session=True); os._exit(0)"
    )
    run_python_quietly = [sys.executable, "-c", program]
    subprocess.run(run_python_quietly, env=environment, stdout=subprocess.DEVNULL, check=True)
    try:
        assert any("time.sleep" in line for line in leftovers(environment, seconds=0.2))
    finally:
        for process in processes_of(environment):
            process.kill()
    assert leftovers(environment) == []
