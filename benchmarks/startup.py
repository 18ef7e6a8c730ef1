"""How long a reader waits at first: the import, the first cluster, the first figure.

Every number is the time from the start of a fresh Python process. Less is better.

import
    Ours: ``open_cluster`` is imported. Peers: ``Client`` and ``LocalCluster`` of plain Dask; the
    process pool loky of joblib. Limit: Python starts and imports nothing.
cluster
    Import, and a cluster of two worker processes of which each has answered a task. Peers: a
    LocalCluster of plain Dask; loky with two processes; Ray where it is installed. Limit: Python
    starts two more Pythons, and all three import distributed: no cluster of Dask workers can be
    ready before that.
first_figure
    Import, and a speed-up curve drawn as PNG. Peer: the same two lines in plain matplotlib.
    Limit: matplotlib's renderer alone writes an empty picture.
"""

from importlib.util import find_spec

from benchmarks.measure import Case, interleaved, seconds_until_ready

ROUNDS = 5

OURS_IMPORT = "from helpers.cluster import open_cluster; print('ready', flush=True)"
DASK_IMPORT = "from distributed import Client, LocalCluster; print('ready', flush=True)"
LOKY_IMPORT = "from joblib.externals import loky; print('ready', flush=True)"
BARE = "print('ready', flush=True)"

ASK_ALL = """
import os
tasks = [client.submit(os.getpid, workers=[w], pure=False) for w in workers]
assert len(set(client.gather(tasks))) == 2
print("ready", flush=True)
"""
OURS_CLUSTER = f"""
from helpers.cluster import open_cluster
cluster = open_cluster(workers=2)
client, workers = cluster.client, cluster.workers
{ASK_ALL}
cluster.close()
"""
DASK_CLUSTER = f"""
from distributed import Client, LocalCluster
cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0")
client = Client(cluster)
client.wait_for_workers(2)
workers = list(client.scheduler_info()["workers"])
{ASK_ALL}
client.close()
cluster.close()
"""
LOKY_CLUSTER = """
import time
from joblib.externals.loky import get_reusable_executor
executor = get_reusable_executor(max_workers=2)
list(executor.map(time.sleep, [0.01, 0.01]))
print("ready", flush=True)
executor.shutdown()
"""
RAY_CLUSTER = """
import os, ray, time
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
nap = ray.remote(time.sleep)
ray.get([nap.remote(0.01), nap.remote(0.01)])
print("ready", flush=True)
ray.shutdown()
"""
THREE_IMPORTS = """
import subprocess, sys
command = [sys.executable, "-c", "import distributed; print(1)"]
others = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
import distributed
assert all(other.stdout.readline() for other in others)
print("ready", flush=True)
for other in others:
    other.communicate()
"""

OURS_FIGURE = """
import matplotlib
matplotlib.use("agg")
from helpers.classroom.plots import plot_speedup, png
axes = plot_speedup({1: 4.0, 2: 2.1}, {1: 4.0, 2: 2.0, 4: 1.0})
assert png(axes.figure)[1:4] == b"PNG"
print("ready", flush=True)
"""
PLAIN_FIGURE = """
import io
import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
axes = plt.figure(figsize=(6, 3.6)).subplots()
axes.plot([1, 2, 4], [1, 2, 4], "s--", label="predicted")
axes.plot([1, 2], [1, 1.9], "o-", label="measured")
axes.set(xlabel="workers", ylabel="speed-up (times)")
axes.legend()
picture = io.BytesIO()
axes.figure.savefig(picture, format="png", dpi=96, bbox_inches="tight")
assert picture.getvalue()[1:4] == b"PNG"
print("ready", flush=True)
"""
EMPTY_FIGURE = """
import io
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
picture = io.BytesIO()
FigureCanvasAgg(Figure(figsize=(6, 3.6))).print_png(picture)
assert picture.getvalue()[1:4] == b"PNG"
print("ready", flush=True)
"""

PROGRAMS = {
    "import": (OURS_IMPORT, {"dask": DASK_IMPORT, "loky": LOKY_IMPORT}, BARE),
    "cluster": (OURS_CLUSTER, {"dask": DASK_CLUSTER, "loky": LOKY_CLUSTER}, THREE_IMPORTS),
    "first_figure": (OURS_FIGURE, {"matplotlib": PLAIN_FIGURE}, EMPTY_FIGURE),
}
if find_spec("ray"):
    PROGRAMS["cluster"][1]["ray"] = RAY_CLUSTER


def run(rounds=ROUNDS, programs=None):
    """Measure all cases.

    Parameters
    ----------
    rounds : int
    programs : dict, optional
        Name of a case: (ours, {peer: program}, limit).

    Returns
    -------
    list of Case
    """
    cases = []
    for name, (ours, peers, limit) in (programs or PROGRAMS).items():
        sides = {"ours": ours, **peers, "limit": limit}
        measures = {
            side: lambda program=program: seconds_until_ready(program)
            for side, program in sides.items()
        }
        medians = interleaved(measures, rounds)
        cases.append(Case(name, medians.pop("ours"), medians, medians.pop("limit")))
    return cases
