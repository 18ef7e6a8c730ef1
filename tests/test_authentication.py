"""Only the ranks of a run take part in it: strangers are refused unread, and TLS hides the rest."""

import os
import pickle
import random
import socket
import ssl
import struct
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import cloudpickle
import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster
from distributed.security import Security as DaskSecurity

from helpers.cluster import open_cluster
from helpers.engine import handshake, spmd, transport, workers
from helpers.engine.channels import Label
from helpers.engine.collectives import all_reduce
from helpers.engine.handshake import CHANNEL, NONCE, SEGMENT, Request
from helpers.engine.mesh import Mesh
from helpers.engine.transport import Endpoint
from tests.test_cluster import wait_until
from tests.test_transport import (
    SECRET,
    add_up,
    connected,
    read_to_the_end,
    results_of,
    run_between,
    two_ends,
)

cloudpickle.register_pickle_by_value(sys.modules[__name__])

OTHER_SECRET = b"known to the ranks of another..."
FIELDS = handshake._FIELDS
LENGTH = NONCE + FIELDS.size + 32
"""Bytes of a dialler's message."""


class Bomb:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def message(secret, nonce, name, request=None, mine=b"D" * NONCE):
    """What a dialler with this secret sends."""
    request = request or Request(CHANNEL, 1, 0)
    packed = FIELDS.pack(*request)
    return mine + packed + handshake._proof(secret, b"dial", nonce, mine, packed, name=name)


# What a stranger sends when it has got the nonce.
STRANGERS = {
    "leaves": lambda nonce, end, path: None,
    "says nothing": lambda nonce, end, path: b"",
    "says too little": lambda nonce, end, path: b"x" * (LENGTH - 1),
    "sends zeros": lambda nonce, end, path: bytes(LENGTH),
    "sends garbage": lambda nonce, end, path: random.Random(1).randbytes(100_000),
    "names a huge length": lambda nonce, end, path: struct.pack("<Q", 2**63) * 20,
    "sends the header of an array": lambda nonce, end, path: struct.pack("<BIQ", 0, 9, 2**40) * 20,
    "sends a pickle": lambda nonce, end, path: pickle.dumps(Bomb(path)).ljust(LENGTH, b"."),
    "has no secret": lambda nonce, end, path: message(b"", nonce, end.process),
    "has another run's secret": lambda nonce, end, path: message(OTHER_SECRET, nonce, end.process),
    "calls another end": lambda nonce, end, path: message(SECRET, nonce, "another end's name"),
    "proves another nonce": lambda nonce, end, path: message(SECRET, bytes(NONCE), end.process),
    "echoes": lambda nonce, end, path: (nonce * 9)[:LENGTH],
    "gives the nonce as the proof": lambda nonce, end, path: (
        nonce + FIELDS.pack(CHANNEL, 1, 0, 0, 0) + nonce
    ),
    "proves it as a listener would": lambda nonce, end, path: (
        nonce + FIELDS.pack(CHANNEL, 1, 0, 0, 0) + handshake._proof(SECRET, b"listen", nonce, nonce)
    ),
    "asks for memory": lambda nonce, end, path: message(
        b"", nonce, end.process, Request(SEGMENT, segment=1)
    ),
}


@pytest.fixture(scope="module")
def client():
    with open_cluster(workers=2) as cluster:
        spmd.run(cluster.client, Mesh(data=2), add_up)
        yield cluster.client


@contextmanager
def a_run_that_goes_on(ends):
    """Two ranks that exchange arrays until the block ends; then both must be right."""
    over, busy, found = threading.Event(), threading.Event(), []

    def program(rank):
        rank.zeros(100)  # a segment that a stranger may ask for
        total = 0.0
        while True:
            mine = np.array([rank.index + 1.0, float(over.is_set())])
            total, last = all_reduce(rank.data, mine, algorithm="ring")
            busy.set()
            if last:
                return float(total)
            time.sleep(0.001)

    thread = threading.Thread(target=lambda: found.extend(run_between(ends, program)))
    thread.start()
    try:
        assert busy.wait(10)
        yield
    finally:
        over.set()
        thread.join()
    assert results_of(found) == [3.0, 3.0]


def refusing(monkeypatch):
    """Notes every request that is read, and every one that is granted."""
    read, granted = [], []
    real = Request

    def note(*fields):
        read.append(real(*fields))
        return read[-1]

    monkeypatch.setattr(handshake, "Request", note)
    for name in ("_take_in", "_hand_over"):
        method = getattr(Endpoint, name)

        def spy(end, sock, request, method=method):
            granted.append(request)
            return method(end, sock, request)

        monkeypatch.setattr(Endpoint, name, spy)
    return read, granted


# ---------------------------------------------------------------- strangers that call


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_is_refused_unread_and_the_run_goes_on(name, unix, monkeypatch, tmp_path):
    monkeypatch.setattr(handshake, "SECONDS", 0.3)
    read, granted = refusing(monkeypatch)
    labels = []
    real = Label.unpack
    with two_ends(only_tcp=not unix) as ends, a_run_that_goes_on(ends):
        monkeypatch.setattr(Label, "unpack", lambda text: labels.append(text) or real(text))
        wait_until(lambda: len(labels) >= 2, 5)
        before = len(read), len(granted)
        for end in ends:
            with connected(end.address, unix) as sock:
                nonce = sock.recv(NONCE, socket.MSG_WAITALL)
                assert len(nonce) == NONCE
                sent = STRANGERS[name](nonce, end, tmp_path / "made")
                if sent is None:
                    continue
                with suppress(OSError):  # who hangs up does not wait until all was sent
                    sock.sendall(sent)
                begin = time.monotonic()
                assert read_to_the_end(sock) == b"", "a stranger is told nothing but the nonce"
                assert time.monotonic() - begin < 2
        wait_until(lambda: not any(end._guests for end in ends), 2)
        assert (len(read), len(granted)) == before
        # All that was read are the labels of the ranks' own exchange.
        assert {label.split(b"\n")[0] for label in labels} == {
            b"all_reduce sum ring (data) of float64 [2]"
        }
    assert not (tmp_path / "made").exists()


def test_a_message_with_the_secret_and_the_name_is_let_in(monkeypatch):
    """The same message as the strangers', so that the tests above fail for the right reason."""
    read, granted = refusing(monkeypatch)
    with two_ends(only_tcp=True) as ends, connected(ends[0].address) as sock:
        nonce = sock.recv(NONCE, socket.MSG_WAITALL)
        sock.sendall(message(SECRET, nonce, ends[0].process, Request(SEGMENT, segment=1)))
        proof = handshake._proof(SECRET, b"listen", b"D" * NONCE, nonce)
        assert read_to_the_end(sock) == proof
        assert (read, granted) == ([Request(SEGMENT, segment=1)], [1])


def test_one_byte_at_a_time_does_not_hold_a_place_for_long(monkeypatch):
    monkeypatch.setattr(handshake, "SECONDS", 0.5)
    with two_ends(only_tcp=True) as ends, connected(ends[0].address) as sock:
        sock.settimeout(0.05)
        begin, read = time.monotonic(), b"."
        while read:
            with suppress(OSError):
                sock.send(b"x")
            try:
                read = sock.recv(100)
            except TimeoutError:
                continue
            except ConnectionResetError:
                break
        assert 0.4 < time.monotonic() - begin < 1.5


# ---------------------------------------------------------------- recordings


@contextmanager
def recorded(tcp, change=lambda data: data):
    """A relay in front of a listener, which notes what goes in both directions.

    Yields
    ------
    place : tuple of (str, int)
        Where it listens.
    calls : list of [bytearray, bytearray]
        For each connection: from the dialler, and from the listener.
    """
    calls, socks = [], []
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source, sink, note):
        with suppress(OSError):
            while data := source.recv(65536):
                note += data
                sink.sendall(data)
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def accept():
        while True:
            try:
                near, _ = server.accept()
            except OSError:
                return
            far = socket.create_connection(tcp)
            calls.append([bytearray(), bytearray()])
            socks.extend((near, far))
            for pair in ((near, far, calls[-1][0]), (far, near, calls[-1][1])):
                threads.append(threading.Thread(target=pump, args=pair))
                threads[-1].start()

    threads = [threading.Thread(target=accept)]
    threads[0].start()
    try:
        yield server.getsockname(), calls
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        threads[0].join()
        for sock in socks:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in threads[1:]:
            thread.join()
        for sock in socks:
            sock.close()


@contextmanager
def two_ends_with_a_relay(**options):
    """Two ends; what rank 0 sends to rank 1 goes through a relay that records it."""
    with two_ends(only_tcp=True, **options) as ends, recorded(ends[1].address.tcp) as relay:
        place, calls = relay
        ends[0].table = [ends[0].address, replace(ends[1].address, tcp=place)]
        yield ends, calls


def test_what_was_recorded_of_a_rank_opens_nothing_when_it_is_sent_again(monkeypatch):
    with two_ends_with_a_relay() as (ends, calls):
        assert results_of(run_between(ends, add_up)) == [3.0, 3.0]
        (from_dialler, _) = calls[0]
        recording = bytes(from_dialler)
        assert len(recording) > LENGTH, "the proof, and the first messages after it"
        read, granted = refusing(monkeypatch)
        for end in ends:  # the secret is still the same
            with connected(end.address) as sock:
                sock.recv(NONCE, socket.MSG_WAITALL)
                sock.sendall(recording)
                assert read_to_the_end(sock) == b""
        assert read == granted == []


def test_the_secret_never_crosses_the_connection():
    with two_ends_with_a_relay() as (ends, calls):
        results_of(run_between(ends, add_up))
        assert calls and all(SECRET[:8] not in data for call in calls for data in call)


# ---------------------------------------------------------------- strangers that are called


def impostor(act):
    """A listener in the place of rank 1, and what rank 0 says of it.

    ``act(sock, end)`` gets the call that rank 0's end makes.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        with two_ends(only_tcp=True) as ends:
            here = replace(ends[1].address, tcp=server.getsockname())
            ends[0].table = [ends[0].address, here]
            ends[0].patience = 0.5

            def serve():
                with server.accept()[0] as sock, suppress(OSError):
                    sock.settimeout(5)
                    act(sock, ends[0])

            thread = threading.Thread(target=serve)
            thread.start()
            end = time.monotonic() + ends[0].patience
            try:
                sock = ends[0]._dial_once(
                    here.process, socket.AF_INET, here.tcp, Request(CHANNEL, 0, 1), end
                )
                sock.close()
            finally:
                thread.join()


def echo(sock, end):
    sock.sendall(b"L" * NONCE)
    got = sock.recv(LENGTH, socket.MSG_WAITALL)
    sock.sendall(got[-32:])
    sock.recv(1)


def lead_back(sock, end):
    """Use the end that calls to answer its own call: the reflection attack."""
    with connected(end.address) as back:
        sock.sendall(back.recv(NONCE, socket.MSG_WAITALL))
        back.sendall(sock.recv(LENGTH, socket.MSG_WAITALL))
        sock.sendall(back.recv(32, socket.MSG_WAITALL))


IMPOSTORS = {
    "says nothing": lambda sock, end: sock.recv(1),
    "leaves": lambda sock, end: None,
    "sends garbage": lambda sock, end: sock.sendall(random.Random(2).randbytes(10_000)),
    "sends back the proof": echo,
    "knows another secret": lambda sock, end: (
        sock.setblocking(False),
        handshake.answer(sock, OTHER_SECRET, end.table[1].process),
    ),
    "leads the call back": lead_back,
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_an_impostor_in_the_place_of_a_rank_is_found_out(name):
    begin = time.monotonic()
    with pytest.raises((handshake.Refused, handshake.Closed, ConnectionError)):
        impostor(IMPOSTORS[name])
    assert time.monotonic() - begin < 2


def test_the_right_listener_is_accepted_in_the_same_place():
    impostor(
        lambda sock, end: (
            sock.setblocking(False),
            handshake.answer(sock, SECRET, end.table[1].process),
        )
    )


# ---------------------------------------------------------------- the secret of a run on Dask


@pytest.fixture
def opened(monkeypatch):
    """The addresses at which the ends of Dask's workers listen, as soon as they do.

    ``opened.change`` may give the ranks others in their place.
    """

    class Opened:
        addresses = ()

        def change(self, address):
            return address

    found, real = Opened(), spmd.ask_workers

    def ask(client, workers, act, *args, **options):
        answers = real(client, workers, act, *args, **options)
        if act is spmd.open_run:
            found.addresses = list(answers.values())
            answers = {worker: found.change(a) for worker, a in answers.items()}
        return answers

    monkeypatch.setattr(spmd, "ask_workers", ask)
    return found


def test_every_run_has_a_secret_of_its_own_which_ends_with_it(client):
    def program(rank):
        add_up(rank)
        return rank.endpoint.security.secret

    def kept(dask_worker=None):
        return dask_worker.extensions.get(workers.NAME)

    runs = [spmd.run(client, Mesh(data=2), program).results for _ in range(3)]
    assert all(first == second and len(first) == 32 for first, second in runs)
    assert len({first for first, _ in runs}) == 3
    assert list(client.run(kept).values()) == [{}, {}]


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_a_stranger_at_the_workers_doors_changes_nothing(client, opened, unix):
    def program(rank):
        end, steps = time.monotonic() + 1.0, 0
        while True:
            steps += 1
            total = all_reduce(rank.data, np.array([1.0, time.monotonic() > end]))
            assert total[0] == 2
            if total[1]:
                return steps

    def knock():
        wait_until(lambda: opened.addresses, 5)
        for address in opened.addresses:
            for data in (bytes(LENGTH), message(OTHER_SECRET, bytes(NONCE), address.process)):
                with connected(address, unix) as sock:
                    sock.recv(NONCE, socket.MSG_WAITALL)
                    sock.sendall(data)
                    refused.append(read_to_the_end(sock))

    refused = []
    stranger = threading.Thread(target=knock)
    stranger.start()
    transport = None if unix else "tcp"
    first, second = spmd.run(client, Mesh(data=2), program, transport=transport).results
    stranger.join()
    assert first == second > 10
    assert refused == [b""] * 4


def test_two_runs_at_once_do_not_let_each_other_in(client, opened):
    """A rank that dials with its own run's secret into another run."""

    def wait(rank):
        for _ in range(15):
            add_up(rank)
            time.sleep(0.1)
        return "undisturbed"

    def intrude(rank, address):
        try:
            rank.endpoint._dial_tcp(address, Request(CHANNEL, rank.index, 0))
        except transport.PeerLost as error:
            return str(error)
        return "let in"

    found = []

    def beside():
        found.append(spmd.run(client, Mesh(data=2), wait, transport="tcp").results)

    thread = threading.Thread(target=beside)
    thread.start()
    wait_until(lambda: opened.addresses, 5)
    address = opened.addresses[0]
    answers = spmd.run(client, Mesh(data=2), intrude, address, patience=0.5).results
    thread.join()
    assert all("does not answer" in answer for answer in answers)
    assert found == [["undisturbed"] * 2]


# ---------------------------------------------------------------- TLS

PATTERN = b"a pattern of known bytes" * 10


@pytest.fixture(scope="module")
def certificates():
    return DaskSecurity.temporary()


@pytest.fixture(scope="module")
def tls_client(certificates, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("dask"))
    with (
        dask.config.set(temporary_directory=folder),
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=None,
            security=certificates,
            protocol="tls",
            silence_logs=50,
        ) as cluster,
        Client(cluster, set_as_default=False, security=certificates) as client,
    ):
        yield client


def contexts_of(security):
    return (
        security.get_connection_args("worker")["ssl_context"],
        security.get_listen_args("worker")["ssl_context"],
    )


def tell_the_pattern(rank):
    """The ranks send each other the pattern, small and large, by every kind of message."""
    small = np.frombuffer(PATTERN, np.uint8)
    large = np.tile(small, 2_000)
    add_up(rank)
    other = 1 - rank.index
    received = [rank.data.exchange(array, other, other) for array in (small, large)]
    return [PATTERN in array.tobytes() for array in received], rank.endpoint.security.secret


@contextmanager
def wire_tapped(opened):
    """Relays before all TCP listeners of the next run, and what they record."""
    from contextlib import ExitStack

    calls = []
    with ExitStack() as stack:

        def change(address):
            place, found = stack.enter_context(recorded(address.tcp))
            calls.append(found)
            return replace(address, tcp=place)

        opened.change = change
        yield calls


def run_tapped(client, opened):
    with wire_tapped(opened) as calls:
        results = spmd.run(client, Mesh(data=2), tell_the_pattern, transport="tcp").results
    wire = [bytes(data) for found in calls for call in found for data in call]
    assert [seen for seen, _ in results] == [[True, True]] * 2
    assert sum(map(len, wire)) > 2 * 2_000 * len(PATTERN), "the relays saw all"
    return wire, {secret for _, secret in results}


def test_without_tls_the_ranks_bytes_are_seen_on_the_wire(client, opened):
    wire, _ = run_tapped(client, opened)
    assert any(PATTERN in data for data in wire)
    assert any(b"all_reduce" in data for data in wire)


def test_where_dask_uses_tls_nothing_of_the_ranks_is_seen_on_the_wire(tls_client, opened):
    wire, secrets = run_tapped(tls_client, opened)
    for hidden in (PATTERN[:24], b"all_reduce", b"a message", b"float64", *secrets):
        assert not any(hidden in data for data in wire)


def test_a_client_without_tls_is_refused_where_dask_uses_it(certificates, monkeypatch):
    monkeypatch.setattr(handshake, "SECONDS", 0.5)
    contexts = contexts_of(certificates)
    with two_ends(only_tcp=True, contexts=contexts) as ends, a_run_that_goes_on(ends):
        for sent in (b"", bytes(LENGTH), message(SECRET, bytes(NONCE), ends[0].process)):
            with connected(ends[0].address) as sock:
                sock.sendall(sent)
                answer = read_to_the_end(sock)
                assert len(answer) < NONCE, "at most TLS's own word for a refusal"
        # Its own listener would take a rank that dials plainly for a stranger, too.
        plain = Endpoint(transport.Security(SECRET), patience=0.4)
        with pytest.raises(transport.PeerLost):
            plain._dial_tcp(ends[0].address, Request(CHANNEL, 1, 0))


def test_a_client_with_the_secret_but_no_certificate_is_refused(certificates):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with two_ends(only_tcp=True, contexts=contexts_of(certificates)) as ends:
        stranger = Endpoint(transport.Security(SECRET, context), patience=0.4)
        with pytest.raises(transport.PeerLost, match="does not answer"):
            stranger._dial_tcp(ends[0].address, Request(CHANNEL, 1, 0))
        assert not ends[0]._incoming


def test_certificates_of_another_cluster_are_refused(certificates):
    others = contexts_of(DaskSecurity.temporary())
    with two_ends(only_tcp=True, contexts=contexts_of(certificates)) as ends:
        stranger = Endpoint(transport.Security(SECRET, *others), patience=0.4)
        with pytest.raises(transport.PeerLost, match="CERTIFICATE_VERIFY_FAILED"):
            stranger._dial_tcp(ends[0].address, Request(CHANNEL, 1, 0))
        assert not ends[0]._incoming


def test_a_stranger_that_begins_tls_and_stops_is_dropped_and_holds_nothing_up(certificates):
    with (
        two_ends(only_tcp=True, contexts=contexts_of(certificates)) as ends,
        connected(ends[0].address) as sock,
    ):
        sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00")  # the beginning of a greeting
        wait_until(lambda: ends[0]._guests, 5)
        assert results_of(run_between(ends, add_up)) == [3.0, 3.0]
        begin = time.monotonic()
        ends[0].close()
        assert time.monotonic() - begin < 1


@pytest.mark.parametrize("size", [2, 4])
def test_large_arrays_cross_tls_whole_in_both_directions(tls_client, size):
    def program(rank):
        mine = np.arange(500_003.0) * (rank.index + 1)
        total = all_reduce(rank.data, mine, algorithm="ring")
        work = rank.background(all_reduce, rank.data, mine)
        kinds = {
            type(channel._sock).__name__
            for channel in rank._channels.values()
            if hasattr(channel, "_sock")
        }
        return float(total[-1]), float(work.wait()[-1]), kinds

    expected = 500_002.0 * sum(range(1, size + 1))
    results = spmd.run(tls_client, Mesh(data=size), program, transport="tcp").results
    assert {result[:2] for result in map(tuple, results)} == {(expected, expected)}
    assert {"SSLSocket"} == set().union(*(kinds for *_, kinds in results))
