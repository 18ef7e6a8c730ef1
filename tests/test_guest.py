"""A guest worker joins, works and leaves; nothing of it stays behind, whatever happens."""

import sys

import pytest

from helpers.classroom.guest import guest_worker
from helpers.cluster import open_cluster


def command_of(cluster):
    scheduler = cluster.client.scheduler.address
    command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler]
    return [*command, "--nthreads=1", "--no-nanny", "--no-dashboard"]


def test_a_guest_joins_works_and_leaves():
    with open_cluster(1) as cluster:
        with guest_worker(cluster, command_of(cluster)) as guest:
            assert cluster.workers[-1] == guest
            assert cluster.n_workers == 2
            future = cluster.client.submit(sum, [1, 2], workers=[guest])
            assert future.result() == 3
        assert cluster.n_workers == 1
        assert future.result() == 3  # it was handed over


def test_a_guest_ends_with_an_exception():
    with open_cluster(1) as cluster:
        with pytest.raises(KeyboardInterrupt), guest_worker(cluster, command_of(cluster)):
            raise KeyboardInterrupt
        cluster.client.submit(sum, [1, 2]).result()


def test_a_guest_that_does_not_come_is_one_sentence():
    with (
        open_cluster(1) as cluster,
        pytest.raises(RuntimeError, match="ended with status 3: check the command"),
        guest_worker(cluster, [sys.executable, "-c", "raise SystemExit(3)"]),
    ):
        pass


def test_a_joined_cluster_gets_no_guest(capsys):
    class Joined:
        joined = True

    with guest_worker(Joined(), ["no such program"]) as guest:
        assert guest is None
    assert "all workers of this cluster joined" in capsys.readouterr().out
