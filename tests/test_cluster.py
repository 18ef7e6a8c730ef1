"""The cluster: opening, joining, resizing, refusing, and leaving nothing behind."""

import contextlib
import glob
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import cloudpickle
import dask
import numpy as np
import psutil
import pytest
from distributed import Client, Security

from helpers.cluster import open_cluster, usable_cores, usable_memory
from helpers.datasets import load_flights
from helpers.parallel.tasks import run_tasks
from tests.validation import NOTEBOOKS, clean_environment, kernel_client, leftovers, read

REPOSITORY = Path(__file__).resolve().parents[1]


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # other machines lack this module


def where_am_i():
    from distributed import get_worker

    time.sleep(0.01)
    return get_worker().address


@contextlib.contextmanager
def cluster_of_others(folder, settings, *options):
    """A scheduler and three workers that share no folder and no module with the reader."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | settings
    environment["DASK_LOGGING__DISTRIBUTED"] = "critical"
    environment["DASK_TEMPORARY_DIRECTORY"] = str(folder)
    file = folder / "scheduler.json"
    processes = []

    def start(program, *more):
        forget = f"import sys; sys.path[:] = [p for p in sys.path if p != {str(REPOSITORY)!r}]"
        code = f"{forget}; from distributed.cli.dask_{program} import main; main()"
        command = [sys.executable, "-P", "-c", code, "--scheduler-file", file, "--no-dashboard"]
        command = [str(word) for word in (*command, *options, *more)]
        processes.append(subprocess.Popen(command, env=environment, cwd=folder))

    try:
        start("scheduler", "--host", "127.0.0.1", "--port", "0")
        for number in range(3):
            (folder / str(number)).mkdir()
            start(
                "worker", "--nthreads", 1, "--no-nanny", "--local-directory", folder / str(number)
            )
        wait_until(lambda: file.exists() and file.stat().st_size > 100, 30)
        address = json.loads(file.read_text())["address"]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(3, timeout=30)
        yield address
    finally:
        for process in processes:
            process.kill()
            process.wait(20)


@pytest.fixture
def scheduler_of_others(tmp_path, monkeypatch):
    with cluster_of_others(tmp_path, {}) as address:
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", address)
        yield address


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_workers_work_and_everything_ends():
    before = set(glob.glob(f"{tempfile.gettempdir()}/many-hands-*"))
    with open_cluster(workers=2) as cluster:
        used = cluster.client.gather(cluster.client.map(lambda _: where_am_i(), range(20)))
        assert set(used) == set(cluster.workers)
        assert cluster.n_workers == 2
        assert not cluster.joined
        assert repr(cluster) == "<Cluster: 2 workers on this machine, one thread each>"
    assert repr(cluster) == "<Cluster: closed>"
    cluster.close()  # a second time does no harm
    assert set(glob.glob(f"{tempfile.gettempdir()}/many-hands-*")) == before
    left = [" ".join(p.cmdline()) for p in psutil.Process().children() if p.status() != "zombie"]
    assert not [words for words in left if "fork" in words or "shutil" in words]


def test_scale_keeps_results_and_changes_processes():
    with open_cluster(workers=1) as cluster:
        kept = cluster.client.submit(np.arange, 5)
        kept.result()
        for number in (3, 1, 2):
            cluster.scale(number)
            assert cluster.n_workers == number
            assert len(set(cluster.client.run(os.getpid).values())) == number
        assert kept.result().tolist() == [0, 1, 2, 3, 4]


def test_blas_has_one_thread_also_when_the_environment_asks_for_more(monkeypatch):
    from threadpoolctl import threadpool_info

    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    for name in names:
        monkeypatch.setenv(name, "2")

    def variables():
        return {os.environ[name] for name in names}

    def threads():
        import numpy  # noqa: F401
        import scipy.linalg  # noqa: F401 (loaded after the worker was set up)

        return [pool["num_threads"] for pool in threadpool_info()]

    with open_cluster(workers=1) as cluster:
        found = cluster.client.submit(threads).result()
        assert found and set(found) == {1}
        assert cluster.client.submit(variables).result() == {"1"}


@pytest.mark.parametrize("workers", [0, -1, 1.5, 2.0, True, "2", float("nan"), [2]])
def test_impossible_numbers_get_one_sentence(workers):
    with pytest.raises(ValueError, match=r"workers must be a whole number from 1 to \d+, not"):
        open_cluster(workers)


def test_ten_thousand_workers_are_refused_at_once():
    begin = time.monotonic()
    with pytest.raises(ValueError, match="10,000 workers are too many: this machine has"):
        open_cluster(10_000)
    assert time.monotonic() - begin < 1


def test_more_workers_than_memory_allows(monkeypatch):
    monkeypatch.setattr("helpers.cluster.usable_memory", lambda: 500 * 2**20)
    monkeypatch.setattr("helpers.cluster.usable_cores", lambda: 64)
    with pytest.raises(ValueError, match="0.5 GiB of free memory.*ask for 1 to 3"):
        open_cluster(8)


def test_numpy_integers_are_whole_numbers():
    with open_cluster(np.int64(1)) as cluster:
        assert cluster.n_workers == 1


def test_nobody_answers(monkeypatch):
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:9")
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="No Dask scheduler answers at tcp://127.0.0.1:9"):
        open_cluster(2)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("address", ["nonsense", "tcp://", "ftp://127.0.0.1:1"])
def test_wrong_addresses_get_one_sentence(monkeypatch, address):
    monkeypatch.setattr("helpers.cluster.CONNECT_SECONDS", 1)
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", address)
    with pytest.raises(RuntimeError, match="No Dask scheduler answers"):
        open_cluster(2)


def test_joined_cluster_uses_some_of_its_workers(scheduler_of_others):
    def months_here():
        import helpers.datasets as datasets

        return str(datasets.__file__), len(datasets.load_flights(month=2))

    with open_cluster(workers=2) as cluster:
        client = cluster.client
        assert cluster.joined and cluster.n_workers == 2 and cluster.max_workers == 3
        assert set(client.gather(client.map(lambda _: where_am_i(), range(30)))) == set(
            cluster.workers
        )
        file, rows = client.submit(months_here).result()
        assert len(client.submit(load_flights, month=2).result()) == rows  # as notebooks do
        assert rows == 24_951
        assert not file.startswith(str(REPOSITORY)), "the worker read the reader's folder"
        cluster.scale(3)
        everybody = client.gather(client.map(lambda _: where_am_i(), range(60), pure=False))
        assert len(set(everybody)) == 3
        with pytest.raises(ValueError, match="the cluster that was joined has 3 workers"):
            cluster.scale(4)
        folder = Path(file).parents[1]
        assert folder.exists()
    wait_until(lambda: not folder.exists(), 5)  # nothing of ours stays with them
    with open_cluster() as cluster:
        assert cluster.n_workers == 3


def test_tasks_stay_with_the_workers_in_use_also_when_others_are_idle(scheduler_of_others):
    def here(_):
        time.sleep(0.2)  # long enough for an idle worker to steal a task, if it may
        return where_am_i()

    with open_cluster(workers=1) as cluster:
        client = cluster.client
        assert set(client.gather(client.map(here, range(12)))) == set(cluster.workers)
        parts = [dask.delayed(here)(number) for number in range(6)]
        assert set(dask.compute(*parts)) == set(cluster.workers)
        assert set(client.who_has(client.scatter([1, 2, 3])).values()) == {tuple(cluster.workers)}


def test_joined_tasks_go_on_when_the_workers_in_use_die(scheduler_of_others):
    with open_cluster(workers=1) as cluster:
        chosen = cluster.workers[0]
        client = cluster.client
        running = client.submit(lambda: time.sleep(1) or where_am_i(), pure=False)
        wait_until(lambda: client.processing()[chosen], 20)
        os.kill(client.run(os.getpid)[chosen], signal.SIGKILL)
        wait_until(lambda: chosen not in client.scheduler_info()["workers"], 20)
        assert client.submit(lambda: where_am_i(), pure=False).result(timeout=30) != chosen
        assert running.result(timeout=30) != chosen


def test_a_search_stays_with_the_workers_in_use_and_gives_up_one_that_hangs(scheduler_of_others):
    def where(item, shared):
        time.sleep(60 if item == "hang" else 0.02)
        return where_am_i(), shared.sum()

    with open_cluster(workers=2) as cluster:
        X = np.arange(1000)
        done = [d.value for d in run_tasks(cluster.client, where, range(20), X)]
        assert {worker for worker, _ in done} == set(cluster.workers)
        assert {total for _, total in done} == {X.sum()} and len(done) == 20
        # Its workers have no nanny: one that hangs is left alone, and the other does the rest.
        items = ["hang", *range(8)]
        done = list(run_tasks(cluster.client, where, items, X, limit=0.4, retries=0))
        assert [d.number for d in done if d.error] == [0] and len(done) == 9


def test_a_cluster_with_tls_is_joined_by_dasks_own_configuration(tmp_path, monkeypatch):
    security = Security.temporary()
    tls = {"ca-file": "tls_ca_file"}
    for role in ("client", "scheduler", "worker"):
        tls |= {f"{role}.cert": f"tls_{role}_cert", f"{role}.key": f"tls_{role}_key"}
    settings, variables = {}, {}
    for name, attribute in tls.items():
        file = tmp_path / f"{attribute}.pem"
        file.write_text(getattr(security, attribute))
        settings[f"distributed.comm.tls.{name}"] = str(file)
        variable = f"DASK_DISTRIBUTED__COMM__TLS__{name}".upper()
        variables[variable.replace(".", "__").replace("-", "_")] = str(file)
    with (
        dask.config.set(settings),
        cluster_of_others(tmp_path, variables, "--protocol", "tls") as address,
    ):
        assert address.startswith("tls://")
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", address)
        with open_cluster(workers=2) as cluster:
            assert cluster.client.submit(sum, [1, 2]).result() == 3
            assert all(worker.startswith("tls://") for worker in cluster.workers)
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tls://127.0.0.1:9")
    monkeypatch.setattr("helpers.cluster.CONNECT_SECONDS", 1)
    with pytest.raises(RuntimeError, match="No Dask scheduler answers"):
        open_cluster(2)  # and here the reader has no certificate at all


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_on_a_cluster_of_others(path, scheduler_of_others, tmp_path):
    environment = clean_environment(tmp_path / "run")
    environment["DASK_SCHEDULER_ADDRESS"] = scheduler_of_others
    notebook = read(path)
    kernel_client(notebook, tmp_path / "run").execute(env=environment)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert leftovers(environment) == []
    wait_until(lambda: not list(tmp_path.rglob("many-hands-*")), 20)


def test_a_killed_reader_leaves_nothing_with_the_others(scheduler_of_others):
    program = """
        import os, signal
        from helpers.cluster import open_cluster
        cluster = open_cluster()
        print(*cluster.client.run(lambda: __import__("helpers").__file__).values(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    files = subprocess.run(command, capture_output=True, text=True, env=environment).stdout.split()
    assert len(files) == 3
    wait_until(lambda: not any(Path(file).exists() for file in files), 20)


def test_a_dead_worker_is_replaced():
    with open_cluster(workers=2) as cluster:
        pids = set(cluster.client.run(os.getpid).values())
        os.kill(min(pids), signal.SIGKILL)
        assert cluster.client.submit(lambda: 6, pure=False).result(timeout=20) == 6
        wait_until(lambda: cluster.n_workers == 2, 20)


def test_taken_ports_do_not_matter():
    import socket

    with socket.socket() as scheduler, socket.socket() as dashboard:
        for taken, port in ((scheduler, 8786), (dashboard, 8787)):
            try:
                taken.bind(("127.0.0.1", port))
                taken.listen()
            except OSError:
                pass  # somebody else holds it, which is what the test wants
        with open_cluster(workers=1) as first, open_cluster(workers=1) as second:
            assert first.client.scheduler.address != second.client.scheduler.address
            assert first.dashboard_link != second.dashboard_link


def test_dashboard_behind_a_hub(monkeypatch):
    with open_cluster(workers=1) as cluster:
        link = cluster.dashboard_link
        assert link.startswith("http://127.0.0.1:") and link.endswith("/status")
        port = link.split(":")[2].split("/")[0]
        monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ada/")
        assert cluster.dashboard_link == f"/user/ada/proxy/{port}/status"


def run_and_signal(what, number):
    """Run a program that opens a cluster, send it a signal in the middle; what is left?"""
    program = textwrap.dedent(
        f"""
        import glob, psutil, signal, time
        from helpers.cluster import open_cluster
        if __name__ == "__main__":
            # Who starts the tests in the background has told all processes to ignore it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            cluster = open_cluster(2)
            pids = [p.pid for p in psutil.Process().children(recursive=True)]
            print(cluster._local.workers[0].local_directory, *pids, flush=True)
            {what}
        """
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    try:
        folder, *pids = process.stdout.readline().split()
        if number:
            process.send_signal(number)
        process.wait(20)
    finally:
        process.kill()
        process.communicate()
    top = next(p for p in Path(folder).parents if p.name.startswith("many-hands-"))
    wait_until(lambda: not top.exists(), 10)
    wait_until(lambda: not any(psutil.pid_exists(int(pid)) for pid in pids), 10)
    return process.returncode


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(
    ("what", "number"),
    [
        ("cluster.client.submit(time.sleep, 60).result()", signal.SIGINT),
        ("cluster.client.submit(time.sleep, 60).result()", signal.SIGTERM),
        ("cluster.client.submit(time.sleep, 60).result()", signal.SIGKILL),
        ("raise RuntimeError('in the middle')", None),
        ("pass", None),
    ],
)
def test_whatever_happens_nothing_is_left(what, number):
    code = run_and_signal(what, number)
    assert (code == 0) == (what == "pass")


def test_interrupt_while_starting_leaves_nothing(monkeypatch):
    def interrupted(self, workers):
        raise KeyboardInterrupt

    before = {p.pid for p in psutil.Process().children(recursive=True)}
    folders = set(glob.glob(f"{tempfile.gettempdir()}/many-hands-*"))
    monkeypatch.setattr("helpers.cluster._LocalCluster._wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_cluster(2)
    after = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    assert not [p for p in after if "resource_tracker" not in " ".join(p.cmdline())]
    assert set(glob.glob(f"{tempfile.gettempdir()}/many-hands-*")) == folders


def control_group(tmp_path, **files):
    """A made-up control group, two levels deep; names are level__file."""
    (tmp_path / "fs/outer/inner").mkdir(parents=True)
    (tmp_path / "membership").write_text("0::/outer/inner\n")
    for name, text in files.items():
        level, file = name.split("__")
        folder = {"outer": "outer", "inner": "outer/inner"}[level]
        (tmp_path / "fs" / folder / file.replace("_", ".", 1)).write_text(text)
    return tmp_path / "fs", tmp_path / "membership"


def test_cores_count_the_quota_of_every_level(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    files = control_group(tmp_path, outer__cpu_max="350000 100000", inner__cpu_max="max 100000")
    assert usable_cores(*files) == 3
    (files[0] / "outer/inner/cpu.max").write_text("50000 100000")
    assert usable_cores(*files) == 1


def test_cores_of_version_1(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    folder = tmp_path / "fs/cpu,cpuacct/box"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("200000")
    (folder / "cpu.cfs_period_us").write_text("100000")
    (tmp_path / "membership").write_text("4:cpu,cpuacct:/box\n1:name=systemd:/box\n")
    assert usable_cores(tmp_path / "fs", tmp_path / "membership") == 2
    (folder / "cpu.cfs_quota_us").write_text("-1")
    assert usable_cores(tmp_path / "fs", tmp_path / "membership") == 8


def test_cores_count_affinity(monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
    assert usable_cores(tmp_path, tmp_path / "absent") == 1


def test_memory_counts_the_tightest_group_and_gives_back_the_cache(tmp_path):
    files = control_group(
        tmp_path,
        outer__memory_max=str(3 * 2**20),
        outer__memory_current=str(2 * 2**20),
        outer__memory_stat=f"anon 5\ninactive_file {2**19}\n",
        inner__memory_max="max",
        inner__memory_current="77",
    )
    assert usable_memory(*files) == 3 * 2**20 - 2 * 2**20 + 2**19
    (files[0] / "outer/memory.current").write_text(str(2**30))
    assert usable_memory(*files) == 0


def test_results_and_data_on_a_worker_that_leaves_are_moved():
    with open_cluster(workers=2) as cluster:
        client, homes = cluster.client, cluster.workers
        data = [client.scatter(k, workers=[home], hash=False) for k, home in enumerate(homes)]
        results = [client.submit(pow, piece, 2, pure=False) for piece in data]
        assert set(client.who_has(data).values()) == {(home,) for home in homes}
        client.gather(results)
        cluster.scale(1)
        assert client.gather(data) == [0, 1] and client.gather(results) == [0, 1]
        assert set(client.who_has(data).values()) == {(homes[0],)}


def test_workers_keep_freed_memory_for_the_next_array():
    """Else each larger array is mapped anew, page by page (see `_KeepingNanny`)."""
    with open_cluster(workers=1) as cluster:
        for name, nbytes in {"TRIM": 2**22, "MMAP": 2**20}.items():
            found = cluster.client.run(os.environ.get, f"MALLOC_{name}_THRESHOLD_")
            assert list(found.values()) == [str(nbytes)]


def test_workers_look_at_themselves_less_often_than_dask_has_them_do():
    """Else a fortieth of every core is lost to it (see `CALM`)."""

    def every(dask_worker):
        calls = dask_worker.periodic_callbacks
        return {name: calls[name].callback_time for name in ("profile", "tick", "monitor")}

    before = dask.config.get("distributed.admin.tick.interval")
    with open_cluster(workers=1) as cluster:
        expected = {"profile": 1000, "tick": 500, "monitor": 2000}
        assert list(cluster.client.run(every).values()) == [expected]
    assert dask.config.get("distributed.admin.tick.interval") == before
