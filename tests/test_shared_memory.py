"""Memory that ranks share: it ends with the run, and where there is none everything still works."""

import errno
import mmap
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from helpers.engine import memory, ranks
from helpers.engine.collectives import all_reduce, barrier
from tests.test_transport import results_of, run_between, two_ends
from tests.validation import ROOT, clean_environment

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm and /proc are Linux's")


# ---------------------------------------------------------------- a piece of memory


def named_memory():
    """What stands in the folders where named shared memory would."""
    folders = [Path("/dev/shm"), Path(os.environ.get("TMPDIR", "/tmp"))]
    return {str(path) for folder in folders for path in folder.glob("*")}


@pytest.fixture(params=["memfd", "temporary file"])
def kind(request, monkeypatch):
    if request.param == "temporary file":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    elif not hasattr(os, "memfd_create"):
        pytest.skip("this system has no memfd_create")
    return request.param


def test_memory_is_shared_and_has_no_name(kind):
    before = named_memory()
    fd, first = memory.create(1000)
    try:
        second = memory.attach(fd, 1000)
        first[7] = 42
        assert second[7] == 42 and second[8] == 0
        assert named_memory() == before
    finally:
        os.close(fd)
    assert second[7] == 42  # the mapping outlives the descriptor


def test_memory_that_is_not_there_is_refused_and_never_promised(kind, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(memory, "usable_memory", lambda: 999)
    with pytest.raises(OSError, match="not enough memory") as caught:
        memory.create(1000)
    assert caught.value.errno == errno.ENOSPC
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_a_call_that_reserves_memory_zeros_are_written(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    fd, array = memory.create(3 * 2**20 + 5)
    try:
        assert os.fstat(fd).st_blocks * 512 >= array.nbytes  # all of it is really there
        assert not array.any() and array.nbytes == 3 * 2**20 + 5
    finally:
        os.close(fd)


@LINUX
def test_all_bytes_are_really_there_so_that_touching_them_cannot_kill(kind):
    fd, array = memory.create(2**20)
    try:
        assert os.fstat(fd).st_blocks * 512 >= array.nbytes
    finally:
        os.close(fd)


# ---------------------------------------------------------------- in a run


def test_without_room_for_shared_memory_the_results_are_the_same(monkeypatch):
    def program(rank):
        mine = rank.zeros(100_003)
        mine += np.random.default_rng(rank.index).normal(size=mine.size)
        total = all_reduce(rank.data, mine)
        sent = rank.data.exchange(mine, 1 - rank.index, 1 - rank.index)
        shared = rank.endpoint.whereabouts(mine) is not None
        return shared, total.tobytes(), sent.tobytes()

    with two_ends() as ends:
        with_room = results_of(run_between(ends, program))
    monkeypatch.setattr(memory, "usable_memory", lambda: 0)
    with two_ends() as ends:
        without = results_of(run_between(ends, program))
    assert [shared for shared, *_ in with_room + without] == [True, True, False, False]
    assert [found[1:] for found in without] == [found[1:] for found in with_room]


def test_where_only_one_rank_finds_room_both_take_the_other_way(monkeypatch):
    def program(rank):
        mine = np.full(50_000, rank.index + 1.0)
        if rank.index == 0:
            mine = rank.zeros(50_000) + mine
        barrier(rank.data)
        if rank.index == 0:
            monkeypatch.setattr(memory, "usable_memory", lambda: 0)
        barrier(rank.data)
        return float(all_reduce(rank.data, mine).sum())

    with two_ends() as ends:
        assert results_of(run_between(ends, program)) == [150_000.0] * 2


def mapped():
    """Bytes of shared segments that this process has mapped."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "many-hands" in line:
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            total += last - first
    return total


@LINUX
def test_memory_that_a_program_gives_up_is_free_at_once_on_its_own_side():
    def program(rank):
        before = mapped()
        barrier(rank.data)
        for _ in range(5):
            array = rank.zeros(100_000)
            del array
        barrier(rank.data)  # both ranks are threads of this process: what one holds, both see
        assert mapped() == before
        return True

    with two_ends() as ends:
        assert results_of(run_between(ends, program)) == [True, True]
    assert mapped() == 0


@LINUX
def test_memory_that_peers_gave_up_is_not_held_until_nothing_is_free(monkeypatch):
    """A program that takes new arrays in every step: the others let go of the old ones."""
    nbytes, most = 2**20, 4 * 2**20
    monkeypatch.setattr(ranks, "LITTLE_HELD", 0)
    monkeypatch.setattr(ranks, "usable_memory", lambda: int(most / ranks.MOST_HELD))

    def program(rank):
        highest = 0
        for _ in range(20):
            array = rank.zeros(nbytes, np.uint8)
            all_reduce(rank.data, array, out=array)
            del array
            barrier(rank.data)
            highest = max(highest, mapped())
            barrier(rank.data)
        return highest

    with two_ends() as ends:  # both hold some of the other's
        assert max(results_of(run_between(ends, program))) <= 2 * (most + 2 * nbytes)


def test_a_segment_that_is_given_back_meanwhile_is_an_error_and_not_another_file():
    with two_ends() as ends:
        array = ends[1].share(1000)
        number, _ = ends[1].whereabouts(array)
        assert ends[0].attach(1, number).nbytes == 1000
        del array
        with pytest.raises(Exception, match="rank 1 no longer has a piece of shared memory"):
            ends[0].attach(1, number)


def test_a_peers_descriptor_is_not_inherited_by_programs_that_are_started(monkeypatch):
    seen, real = [], mmap.mmap

    def note(fd, *args):
        seen.append(os.get_inheritable(fd))
        return real(fd, *args)

    with two_ends() as ends:
        array = ends[1].share(1000)
        monkeypatch.setattr(mmap, "mmap", note)
        ends[0].attach(1, ends[1].whereabouts(array)[0])
    assert seen == [False]


# ---------------------------------------------------------------- a whole cluster, as a program

CLUSTER = """
    import os, signal, sys, tempfile, threading, time
    from pathlib import Path
    import numpy as np
    from helpers.cluster import open_cluster
    from helpers.engine import spmd
    from helpers.engine.collectives import all_reduce
    from helpers.engine.mesh import Mesh

    def held():
        links = []
        for name in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{name}"))
            except OSError:
                pass
        maps = Path("/proc/self/maps").read_text()
        return sum("memfd:many-hands" in x for x in links), maps.count("memfd:many-hands")

    def step(rank, length=1_000_000):
        array = rank.zeros(length)
        array += rank.index + 1
        total = all_reduce(rank.data, array, out=array)
        big = np.full(length, rank.index + 1.0)
        again = all_reduce(rank.data, big)
        other = rank.data.exchange(big, 1 - rank.index, 1 - rank.index)
        return float(total.min()), float(total.max()), float(again.sum()) / length, float(other[-1])

    def right(results):
        assert results == [(3.0, 3.0, 3.0, 2.0), (3.0, 3.0, 3.0, 1.0)], results
"""

ENDINGS = """
    def raising(rank):
        step(rank)
        if rank.index:
            raise ValueError("on purpose")
        rank.data.receive(1)

    def killed(rank):
        array = rank.zeros(1_000_000)
        if rank.index:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        while True:
            all_reduce(rank.data, array, out=array)

    def shared():
        # Those of Dask's own queues are left out: a worker that is started anew has new ones.
        return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}

    if __name__ == "__main__":
        with open_cluster(workers=2) as cluster:
            before = shared()
            for program in (step, raising, killed, step):
                try:
                    right(spmd.run(cluster.client, Mesh(data=2), program).results)
                    assert program is step
                except spmd.RankError:
                    assert program is not step
                assert shared() <= before, shared() - before
                end = time.monotonic() + 5
                while set(cluster.client.run(held).values()) != {(0, 0)}:
                    assert time.monotonic() < end, cluster.client.run(held)
                    time.sleep(0.02)
            right(spmd.run(cluster.client, Mesh(data=2), step).results)
        print("ok")
"""


def run_program(folder, text, *arguments, before=()):
    """A program that is run in a process of its own."""
    path = folder / "program.py"
    path.write_text(textwrap.dedent(text))
    environment = clean_environment(folder / "run")
    environment["PYTHONPATH"] += os.pathsep + str(ROOT)
    return subprocess.run(
        [*before, sys.executable, str(path), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        timeout=60,
    )


@LINUX
@pytest.mark.slow
def test_no_segment_outlives_a_run_however_it_ends(short_folder):
    """A normal end, an error, a SIGKILL; and Python's resource tracker has nothing to say."""
    run = run_program(short_folder, CLUSTER + ENDINGS)
    assert (run.stdout, run.returncode) == ("ok\n", 0), run.stderr
    assert "tracker" not in run.stderr and "leaked" not in run.stderr
    assert not run.stderr.strip()


SMALL = """
    def without_memfd():
        del os.memfd_create

    def fill(folder):
        with open(f"{folder}/full", "wb") as file:
            try:
                while True:
                    file.write(bytes(2**16))
                    file.flush()
            except OSError:
                pass

    def room(folder):
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize

    if __name__ == "__main__":
        small = os.environ["SMALL"]
        assert Path(small).is_mount() and room(small) < 2**26 + 1, (small, room(small))
        with open_cluster(workers=2) as cluster:
            pids = cluster.client.run(os.getpid)
            if "temporary" in sys.argv:
                cluster.client.run(without_memfd)
                # Python looks once for a folder that has room.
                assert set(cluster.client.run(tempfile.gettempdir).values()) == {small}
            if "full" in sys.argv:
                fill(small)
                assert room(small) < 2**16
            # Each rank shares 4 * 24 MB, and sends through windows: more than 64 MB in any case.
            def large(rank):
                arrays = [rank.zeros(3_000_000) for _ in range(4)]
                for array in arrays:
                    array += rank.index + 1.0
                    all_reduce(rank.data, array, out=array)
                near = sum(rank.endpoint.whereabouts(array) is not None for array in arrays)
                assert all(float(array.sum()) == 9_000_000 for array in arrays)
                return near, step(rank, 3_000_000)
            results = spmd.run(cluster.client, Mesh(data=2), large).results
            right([found for _, found in results])
            assert cluster.client.run(os.getpid) == pids, "no worker died"
            if "full" in sys.argv:
                os.unlink(f"{small}/full")
        print(*[near for near, _ in results])
"""


def mounts_work():
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["small", "full"])
@pytest.mark.parametrize("kind", ["memfd", "temporary"])
def test_little_or_no_room_where_memory_is_shared_is_not_deadly(short_folder, kind, full):
    """A container's /dev/shm of 64 MB; and the folder for temporary files where they are used."""
    if not mounts_work():
        pytest.skip("a file system can be mounted only by root, in a mount namespace of its own")
    small = "/dev/shm" if kind == "memfd" else str(short_folder / "run" / "t")
    Path(small).mkdir(parents=True, exist_ok=True)
    script = 'mount -t tmpfs -o size=64m tmpfs "$SMALL" && exec "$@"'
    words = ["unshare", "-m", "env", f"SMALL={small}", "sh", "-c", script, "sh"]
    run = run_program(short_folder, CLUSTER + SMALL, kind, "full" * full, before=words)
    assert run.returncode == 0, run.stderr
    near = [int(word) for word in run.stdout.split()]
    if kind == "memfd":
        assert near == [4, 4], "memory without a name does not count against /dev/shm"
    elif full:
        assert near == [0, 0]
    else:
        assert 1 <= sum(near) <= 2, "64 MB hold two pieces of 24 MB, and the windows"
