"""The ways between ranks: every transport, what they do when things run out, and their wire format.

`two_ends` makes the ends of two processes in this one. Everything between them is as between two
processes: sockets, shared memory, the proof of the secret. So a test can look at both sides.
"""

import errno
import gc
import os
import socket
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, suppress

import cloudpickle
import numpy as np
import pytest

from helpers.cluster import open_cluster
from helpers.engine import handshake, spmd, transport
from helpers.engine.channels import Label
from helpers.engine.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    barrier,
    broadcast,
    reduce,
    reduce_scatter,
)
from helpers.engine.errors import CommunicationError, Unanswered
from helpers.engine.handshake import CHANNEL, Request
from helpers.engine.hosts import Plan, run_ranks
from helpers.engine.mesh import Mesh
from helpers.engine.ports import Port
from helpers.engine.spmd import RankError
from helpers.engine.transport import Endpoint, Security
from tests.test_cluster import wait_until

cloudpickle.register_pickle_by_value(sys.modules[__name__])

SECRET = b"known to the ranks of this run. "


@contextmanager
def two_ends(only_tcp=False, secrets=(SECRET, SECRET), contexts=(), redirect=lambda table: table):
    """The ends of two processes; rank 0 is on the first of them, rank 1 on the other."""
    ends = [Endpoint(Security(secret, *contexts), only_tcp=only_tcp) for secret in secrets]
    try:
        table = redirect([end.listen() for end in ends])
        for end in ends:
            end.table = table
        yield ends
    finally:
        for end in ends:
            end.end("the test is over")
            end.close()


def run_between(ends, program, patience=6.0):
    """What became of rank 0 on the first end and rank 1 on the other."""
    outcomes = [None, None]

    def host(rank):
        plan = Plan(Mesh(data=2), patience)
        (outcomes[rank],) = run_ranks(ends[rank], plan, [rank], program, {rank: ()})

    threads = [threading.Thread(target=host, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def results_of(outcomes):
    assert [(o.kind, o.message) for o in outcomes if o.kind != "result"] == []
    return [outcome.value for outcome in outcomes]


def add_up(rank):
    return float(all_reduce(rank.data, np.full(3, rank.index + 1.0))[0])


def connected(address, unix=False):
    """A stranger's connection."""
    sock = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
    sock.settimeout(10)
    sock.connect(address.unix if unix else address.tcp)
    return sock


def read_to_the_end(sock):
    """All that comes until the other end hangs up."""
    read = b""
    while True:
        try:
            more = sock.recv(4096)
        except ConnectionResetError:
            more = b""
        if not more:
            return read
        read += more


@pytest.fixture(scope="module")
def client():
    with open_cluster(workers=2) as cluster:
        yield cluster.client


# ---------------------------------------------------------------- all transports, all exchanges


def all_exchanges(rank, length):
    """The bytes of every exchange's result, by name; values whose sums are not exact."""
    group, draw = rank.data, np.random.default_rng(rank.index)
    mine = draw.normal(size=length) * 10.0 ** draw.integers(-8, 8, length)
    found = {}
    for algorithm in (None, "naive", "tree", "ring", "halving"):
        found[f"all_reduce {algorithm}"] = all_reduce(group, mine, algorithm=algorithm)
    for operation in ("product", "max", "min"):
        found[f"all_reduce {operation}"] = all_reduce(group, mine, operation=operation)
    shared = rank.empty(length)
    shared[:] = mine
    found["all_reduce in place"] = all_reduce(group, shared, out=shared)
    work = rank.background(all_reduce, group, mine.astype(np.float32))
    found["broadcast"] = broadcast(group, mine if group.rank == 1 else None, root=1)
    found["all_gather"] = all_gather(group, mine[: rank.index * 7 + 1])
    found["all_reduce behind"] = work.wait()
    found["all_gather alike"] = all_gather(group, mine, alike=True)
    # Each rank has its own part of these; joined they are the same everywhere.
    for algorithm in (None, "ring"):
        part = reduce_scatter(group, mine, algorithm=algorithm)
        found[f"reduce_scatter {algorithm}"] = all_gather(group, part)
    total = reduce(group, mine, root=2 % group.size)
    found["reduce"] = broadcast(group, total, root=2 % group.size)
    parts = all_to_all(group, [mine[: to + 1] for to in range(group.size)])
    found["all_to_all"] = all_gather(group, np.concatenate(parts))
    barrier(group)
    return {name: array.tobytes() for name, array in found.items()}


@pytest.mark.parametrize("transport", [None, "tcp"])
@pytest.mark.parametrize("length", [5, 3_000, 70_003])
def test_four_ranks_on_two_workers_agree_to_the_last_bit_in_every_run(client, length, transport):
    def program(rank):
        return os.getpid(), all_exchanges(rank, length)

    first, second = (
        spmd.run(client, Mesh(data=4), program, transport=transport).results for _ in range(2)
    )
    pids = [pid for pid, _ in first]
    assert pids[0] == pids[1] != pids[2] == pids[3]  # threads of one process, and two processes
    for _, found in (*first, *second):
        assert found == first[0][1]


@pytest.mark.parametrize("only_tcp", [False, True], ids=["shared memory", "tcp"])
def test_no_array_is_ever_moved_over_tcp_between_near_ranks_and_always_between_far_ones(only_tcp):
    with two_ends(only_tcp) as ends:

        def program(rank):
            rank.data.exchange(np.ones(100_000), 1 - rank.index, 1 - rank.index)
            kinds = {channel._sock.family for channel in rank._channels.values()}
            windows = [channel._window is not None for channel in rank._channels.values()]
            return rank.data.near, kinds, windows

        for near, kinds, windows in results_of(run_between(ends, program)):
            assert near is not only_tcp
            assert kinds == {socket.AF_INET if only_tcp else socket.AF_UNIX}
            assert windows == [not only_tcp]


def test_what_a_rank_sent_through_shared_memory_can_be_received_when_it_has_ended():
    def program(rank):
        if rank.index:
            wait_until(lambda: not ends[0].ports, 5)  # the sender has ended and closed its channels
            return float(rank.data.receive(0).sum())
        rank.data.send(np.ones(100_000), 1)

    with two_ends() as ends:
        assert results_of(run_between(ends, program)) == [None, 100_000.0]


# ---------------------------------------------------------------- what is left over is found


@pytest.mark.parametrize("where", ["threads", "processes", "tcp"])
@pytest.mark.parametrize("length", [3, 30_000])
def test_a_message_that_nobody_receives_is_an_error(client, where, length):
    length = min(length, 3) if where == "tcp" else length  # a longer one waits for its receiver

    def program(rank):
        if rank.index == 0:
            rank.data.send(np.ones(length), 1, what="a letter")

    where, transport = (None if where == "threads" else client), ("tcp" if where == "tcp" else None)
    sentence = "rank 1 of 2: it ended without receiving what rank 0 sent in a letter"
    with pytest.raises(RankError, match=sentence):
        spmd.run(where, Mesh(data=2), program, transport=transport)


def test_after_a_failed_exchange_the_rest_of_its_message_is_not_taken_for_another(client):
    def program(rank):
        if rank.index == 0:
            rank.data.send(np.arange(9.0), 1)
            return rank.data.receive(1)
        with suppress(CommunicationError):
            rank.data.receive(0, out=np.empty(4))
        rank.data.receive(0)

    for where in (None, client):
        sentence = "receive from rank 0: impossible after a message: receive from rank 0 has failed"
        with pytest.raises(RankError, match=sentence):
            spmd.run(where, Mesh(data=2), program, patience=3)


# ---------------------------------------------------------------- the wire format


@pytest.mark.parametrize(
    "dtype",
    [
        np.dtype([("day", "i1"), ("delay", "f8", (2,))], align=True),
        np.dtype([("a", [("b", "<i2"), ("c", "u1")]), ("d", "U3")], align=True),
        np.dtype([("name\nof two lines", "f4")]),
        np.dtype([(f"a column with a long name, number {k}", "f4") for k in range(3_000)]),
        np.dtype("V5"),
        np.dtype(">c8"),
        np.dtype("M8[25us]"),
    ],
    ids="gaps nested newline thousands void swapped dates".split(),
)
@pytest.mark.parametrize("only_tcp", [False, True], ids=["shared memory", "tcp"])
def test_arrays_of_every_dtype_cross_as_they_are(dtype, only_tcp):
    sent = np.frombuffer(np.random.default_rng(3).bytes(dtype.itemsize * 5), dtype)

    def program(rank):
        if rank.index:
            return rank.data.receive(0), rank.data.receive(0)
        rank.data.send(sent, 1)
        rank.data.send(np.array(7.0), 1)

    with two_ends(only_tcp) as ends:
        _, (received, after) = results_of(run_between(ends, program))
    assert received.dtype == dtype
    assert received.tobytes() == sent.tobytes()
    assert after == 7.0  # and the stream is where it should be


def test_a_label_is_text_and_never_a_program():
    for text in (b"x\n__import__('os')\n3", b"x\n[__import__('os')]\n3", b"x\n|O\n3\n4"):
        with pytest.raises((TypeError, ValueError, SyntaxError)):
            Label.unpack(text)


# ---------------------------------------------------------------- waiting


def test_a_bell_rung_at_the_worst_moment_does_not_keep_a_port_awake():
    """`ring` sets a flag and then sends a byte. A thread that looks in between clears the flag, and
    the byte comes without one."""

    class Counted:
        def __init__(self, poll):
            self.register, self.unregister, self.real = poll.register, poll.unregister, poll.poll

        def poll(self, milliseconds):
            looks.append(milliseconds)
            return self.real(milliseconds)

    def nothing():
        while True:
            yield None

    looks = []
    port = Port(0, 0, 0.3, lambda: None)
    try:
        port._rope.send(b"!")
        port._poll = Counted(port._poll)
        with pytest.raises(Unanswered):
            port.complete("wait", nothing())
    finally:
        port.close()
    assert 1 <= len(looks) <= 3


def test_patience_begins_when_all_ranks_have_begun():
    begun = [float("inf")]
    port = Port(0, 0, 0.2, lambda: None, started=lambda: begun[0])

    def nothing():
        while True:
            yield None

    def begin():
        begun[0] = time.monotonic()
        port.ring()

    threading.Timer(0.6, begin).start()
    start = time.monotonic()
    try:
        with pytest.raises(Unanswered):
            port.complete("wait", nothing())
    finally:
        port.close()
    assert 0.75 < time.monotonic() - start < 2


@pytest.mark.parametrize("only_tcp", [False, True], ids=["unix", "tcp"])
def test_a_call_to_a_process_that_is_silent_ends_with_the_run(only_tcp):
    """A stopped process still has its calls taken by the system, and never answers them."""
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind(f"\0many-hands-test-{os.getpid()}")
        unix.listen()

        def redirect(table):
            other = transport.Address(
                "other",
                table[1].host,
                table[1].unix and unix.getsockname().decode(),
                tcp.getsockname(),
                0.0,
            )
            return [table[0], other]

        with two_ends(only_tcp, redirect=redirect) as (end, _):
            threading.Timer(0.5, end.end, ["so it is"]).start()
            start = time.monotonic()
            (outcome,) = run_ranks(end, Plan(Mesh(data=2)), [0], add_up, {0: ()})
            assert outcome.kind == "ended" and "so it is" in outcome.message
            assert time.monotonic() - start < 1.5


def test_a_full_queue_of_a_unix_socket_is_waited_for():
    """The system then refuses a connection at once with "try again"."""
    with socket.socket(socket.AF_UNIX) as listener:
        name = f"\0many-hands-test-{os.getpid()}"
        listener.bind(name)
        listener.listen(0)
        waiting = [socket.socket(socket.AF_UNIX)]
        waiting[0].setblocking(False)
        waiting[0].connect(name)
        end = Endpoint(Security(SECRET))
        there = transport.Address("other", "", name, ("", 0), 0.0)
        try:
            late = socket.socket(socket.AF_UNIX)
            waiting.append(late)
            late.setblocking(False)
            assert late.connect_ex(name) == errno.EAGAIN  # it is full

            def serve():
                for _ in range(2):
                    accepted, _ = listener.accept()
                    waiting.append(accepted)
                waiting[-1].setblocking(False)
                handshake.answer(waiting[-1], SECRET, "other")

            thread = threading.Timer(0.3, serve)
            thread.start()
            waiting.append(end._dial_unix(there, Request(CHANNEL)))
            thread.join()
        finally:
            end.close()
            for sock in waiting:
                sock.close()


def test_an_end_that_took_a_slow_caller_for_a_stranger_is_called_again(monkeypatch):
    with two_ends(only_tcp=True) as ends:
        real, calls = handshake.answer, []

        def impatient(*args):
            calls.append(args)
            if len(calls) == 1:
                raise handshake.Refused("too slow")
            return real(*args)

        monkeypatch.setattr(handshake, "answer", impatient)
        assert results_of(run_between(ends, add_up)) == [3.0, 3.0]
        assert len(calls) == 3


def test_a_message_is_not_missed_when_its_sender_ends_while_it_is_at_the_door(monkeypatch):
    with two_ends() as ends:
        real = Endpoint._take_in

        def slowly(end, sock, request):
            ends[1].finish([0])  # the news that rank 0 has ended overtakes its connection
            time.sleep(0.3)
            real(end, sock, request)

        monkeypatch.setattr(Endpoint, "_take_in", slowly)

        def program(rank):
            if rank.index == 1:
                return float(rank.data.receive(0)[0])
            rank.data.send(np.ones(1), 1)

        assert results_of(run_between(ends, program)) == [None, 1.0]


# ---------------------------------------------------------------- when things run out


def test_a_listener_survives_that_no_descriptor_is_free(monkeypatch):
    with two_ends(only_tcp=True) as ends:
        real, failures = socket.socket.accept, []

        def accept(listener):
            if len(failures) < 3 and listener in ends[1]._listeners:
                failures.append(listener)
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(listener)

        monkeypatch.setattr(socket.socket, "accept", accept)
        first = connected(ends[1].address)  # wakes the one who already waits in the real accept
        assert results_of(run_between(ends, add_up)) == [3.0, 3.0]
        first.close()
        assert len(failures) == 3


def test_strangers_in_great_number_push_each_other_out_and_nobody_else(monkeypatch):
    monkeypatch.setattr(transport, "MOST_GUESTS", 20)
    strangers = []
    with two_ends(only_tcp=True) as ends:
        before = threading.active_count()

        def program(rank):
            if rank.index == 0:
                strangers.extend(connected(ends[1].address) for _ in range(100))
            return add_up(rank)

        try:
            assert results_of(run_between(ends, program)) == [3.0, 3.0]
            assert len(ends[1]._guests) <= 20
            assert threading.active_count() <= before + 25
            assert read_to_the_end(strangers[0])[handshake.NONCE :] == b""
        finally:
            for sock in strangers:
                sock.close()


def test_closing_does_not_wait_for_strangers():
    with two_ends(only_tcp=True) as ends:
        strangers = [connected(ends[0].address) for _ in range(5)]
        wait_until(lambda: len(ends[0]._guests) == 5, 5)
        start = time.monotonic()
        ends[0].close()
        assert time.monotonic() - start < 1
        for sock in strangers:
            sock.close()
    assert not [t for t in threading.enumerate() if t.name == "many-hands-listener"]


def test_no_descriptor_is_left_by_runs_that_end_in_any_way():
    def fail(rank):
        add_up(rank)
        if rank.index:
            raise ValueError("on purpose")
        rank.data.receive(1)

    def cross(rank):
        all_reduce(rank.data, rank.zeros(100_000))
        rank.background(all_reduce, rank.data, np.ones(100_000))
        after, before = (rank.index + 1) % rank.size, (rank.index - 1) % rank.size
        rank.data.exchange(np.ones(100_000), after, before)
        return add_up(rank)

    def once():
        for program in (cross, fail):
            for only_tcp in (False, True):
                with two_ends(only_tcp) as ends:
                    outcomes = run_between(ends, program)
                assert (outcomes[1].kind == "result") is (program is cross)
            with pytest.raises(RankError) if program is fail else nullcontext():
                spmd.run(None, Mesh(data=3), program)

    once()
    gc.collect()
    gc.disable()  # what only the garbage collector finds is held for too long
    try:
        before = sorted(os.listdir("/proc/self/fd"))
        for _ in range(3):
            once()
        assert sorted(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()


# ---------------------------------------------------------------- what is posted


TRANSPORTS = {"process": (None, None), "shared": (2, None), "tcp": (2, "tcp")}


def post_both_ways(rank, count, size, room=None):
    """Both ranks post all before either receives; then a collective on the same channels."""
    group, other = rank.data, 1 - rank.data.rank
    for number in range(count):
        group.post(np.full(size, number + 10.0 * group.rank), other, f"number {number}", room)
    found = [float(group.receive(other, what=f"number {n}").sum()) for n in range(count)]
    return (
        found,
        float(all_reduce(group, np.ones(3))[0]),
        [float(x[0]) for x in all_gathered(group)],
    )


def all_gathered(group):
    return all_gather(group, np.full((1, 2), float(group.rank)))


@pytest.mark.parametrize("how", TRANSPORTS)
@pytest.mark.parametrize("size", [3, 300_000])
@pytest.mark.parametrize("room", [None, 8_000_000])
def test_what_is_posted_both_ways_arrives_in_order(client, how, size, room):
    workers, kind = TRANSPORTS[how]
    given_to = post_both_ways, 6, size, room
    client = client if workers else None
    results = spmd.run(client, Mesh(data=2), *given_to, transport=kind).results
    for rank, (found, total, gathered) in enumerate(results):
        assert found == [size * (number + 10.0 * (1 - rank)) for number in range(6)]
        assert total == 2 and gathered == [0.0, 1.0]


@pytest.mark.parametrize("how", TRANSPORTS)
def test_a_program_that_ends_after_posting_has_sent_all(client, how):
    workers, kind = TRANSPORTS[how]

    def program(rank):
        if rank.index == 0:
            for number in range(4):
                rank.data.post(np.full(400_000, float(number)), 1)
            return None
        time.sleep(0.3)
        return [float(rank.data.receive(0)[-1]) for _ in range(4)]

    client = client if workers else None
    run = spmd.run(client, Mesh(data=2), program, transport=kind)
    assert run.results[1] == [0.0, 1.0, 2.0, 3.0]


def test_a_meeting_waits_for_what_was_posted_to_that_rank(client):
    """The second all-reduce takes the quick way, which must not overtake a posted message."""

    def program(rank):
        shared, group = rank.zeros(1000), rank.data
        shared[:] = rank.index + 1
        totals = [float(all_reduce(group, shared)[0])]
        if rank.index == 0:
            group.post(np.full(500_000, 7.0), 1, "late")
        else:
            time.sleep(0.2)
            totals.append(float(group.receive(0, what="late")[-1]))
        totals.append(float(all_reduce(group, shared)[0]))
        return totals

    assert spmd.run(client, Mesh(data=2), program).results == [[3.0, 3.0], [3.0, 7.0, 3.0]]


def test_what_is_posted_and_not_received_fails_the_run(client):
    def program(rank):
        if rank.index == 0:
            rank.data.post(np.ones(3), 1, "a letter")

    with pytest.raises(RankError, match="a letter"):
        spmd.run(client, Mesh(data=2), program)


def test_posting_to_a_rank_that_has_gone_fails(client):
    def program(rank):
        if rank.index == 0:
            time.sleep(0.3)
            for _ in range(8):
                rank.data.post(np.ones(500_000), 1, "too late")

    with pytest.raises(RankError):
        spmd.run(client, Mesh(data=2), program, patience=2)
