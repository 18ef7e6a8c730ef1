"""One step of pipeline-parallel training on two ranks: eight micro-batches, then new parameters.

A network of eight layers 256-256 with rectifiers, four on each rank, mean squared error, float32,
a batch of 4096 rows in eight micro-batches, plain gradient descent; one BLAS thread a rank. Before
the first layer a learnt shift is added to the input: so the first stage too needs the gradient of
its layers' input, and both stages have the same work, as the theory of the bubble supposes.
Seconds of one step, the median of 30 after some that warm up, as rank 0 sees them. Less is better.

ours
    Two Dask workers, `run_schedule`.
torch
    torch.distributed.pipelining over gloo: same network, same data, same schedule.
limit
    The same computing without any exchange, both ranks at once, times (m + p - 1) / m: what a
    schedule with this bubble needs if messages are free.
bubble, theory
    The idle share of the ranks' time as measured, and (p - 1) / (m + p - 1).

Before it is timed, ours is checked: after five steps its parameters are those of one rank with the
whole batch, to 1e-5.
"""

from statistics import median

import numpy as np

from benchmarks.measure import Case, interleaved
from benchmarks.peers import launch
from benchmarks.peers.timing import (
    LEARNING_RATE,
    MICROBATCHES,
    PIPELINE_LAYERS,
    PIPELINE_WIDTH,
    median_step,
    pipeline_batch,
    report,
)
from helpers.cluster import open_cluster
from helpers.engine import spmd
from helpers.engine.mesh import Mesh
from helpers.nn.layers import linear, linear_grad_input, linear_grad_weights, relu, relu_grad
from helpers.parallel import schedules
from helpers.parallel.pipeline import run_schedule
from helpers.planner.pipeline import bubble, step_of

ROUNDS = 5
RANKS = 2
CHECKED_STEPS = 5
RECORDED_STEPS, WARM_UP = 30, 5
TOLERANCE = 1e-5
SCHEDULES = {"GPipe": "gpipe", "1F1B": "one_f_one_b"}


class Stage:
    """Some layers of the network, with the two methods that `run_schedule` calls.

    Parameters
    ----------
    number, ranks : int
        Which of how many equal parts of the network.

    Attributes
    ----------
    parameters, gradient : ndarray, float32, flat
        The gradient is that of all micro-batches since the last `update`.
    """

    def __init__(self, number, ranks):
        self.first, self.last = number == 0, number == ranks - 1
        layers = np.array_split(np.arange(PIPELINE_LAYERS), ranks)[number]
        self.parameters = np.concatenate([initial(layer) for layer in layers])
        self.gradient, self._part = np.zeros_like(self.parameters), np.empty_like(self.parameters)
        (self._shift, self._layers), (self._d_shift, self._added) = map(
            views, (self.parameters, self._part)
        )
        self.x, self.y = (np.split(part, MICROBATCHES) for part in pipeline_batch())
        # A micro-batch's memory is used again for the same one of the next step: until then what
        # it gave has long been received.
        self._outputs = [[np.empty_like(x) for _ in layers] for x in self.x]
        self._back = [np.empty_like(x) for x in self.x]
        self._shifted = [np.empty_like(x) for x in self.x] if self.first else None
        self._dz, self._inputs = np.empty_like(self.x[0]), {}

    def forward(self, microbatch, x):
        if self.first:
            x = np.add(self.x[microbatch], self._shift, out=self._shifted[microbatch])
        self._inputs[microbatch] = x
        for (w, b), out in zip(self._layers, self._outputs[microbatch], strict=True):
            x = relu(linear(x, w, b, out=out), out=out)
        return None if self.last else x

    def backward(self, microbatch, dy):
        outputs, dx = self._outputs[microbatch], self._back[microbatch]
        inputs = [self._inputs.pop(microbatch), *outputs[:-1]]
        if self.last:
            dy = np.subtract(outputs[-1], self.y[microbatch], out=dx)
            dy *= np.float32(2 / (dy.size * MICROBATCHES))
        for number in reversed(range(len(self._layers))):
            (w, _), (dw, db) = self._layers[number], self._added[number]
            dz = relu_grad(dy, outputs[number], out=self._dz)
            linear_grad_weights(dz, inputs[number], dw, db)
            dy = linear_grad_input(dz, w, dx)
        if self.first:
            np.sum(dy, axis=0, out=self._d_shift)
        self.gradient += self._part
        return dy

    def update(self):
        """Take a step, and forget the gradient."""
        self.gradient *= np.float32(LEARNING_RATE)
        self.parameters -= self.gradient
        self.gradient[:] = 0


def initial(layer):
    """The weights and biases of one layer, flat; before those of the first one the shift.

    They depend on nothing but the layer's number.
    """
    random, width = np.random.default_rng([1, layer]), PIPELINE_WIDTH
    w = random.standard_normal(width * width, np.float32) * np.float32((2 / width) ** 0.5)
    zeros = np.zeros(width, np.float32)
    return np.concatenate([zeros, w, zeros] if layer == 0 else [w, zeros])


def views(flat):
    """The shift (empty but in the first stage), and weights and biases of each layer, as views."""
    width, size = PIPELINE_WIDTH, PIPELINE_WIDTH**2 + PIPELINE_WIDTH
    shift, layers = np.split(flat, [flat.size % size])
    return shift, [
        (layer[: width * width].reshape(width, width), layer[width * width :])
        for layer in layers.reshape(-1, size)
    ]


def trainer(rank, plan, exchanging=True):
    """The stage of one rank, and a function that takes one step of training.

    Parameters
    ----------
    rank : Rank
    plan : list of list of Operation
    exchanging : bool
        False: each operation works on what is there, and nothing is sent.
    """
    stage = Stage(rank.index, rank.size)
    there = np.zeros((len(stage.x[0]), PIPELINE_WIDTH), np.float32)

    def step():
        if exchanging:
            run_schedule(rank.pipeline, plan, [stage])
        else:
            for operation in plan[rank.index]:
                getattr(stage, operation.kind)(operation.microbatch, there)
        stage.update()

    return stage, step


def program(rank, schedule, exchanging):
    """What each rank of ours does: check, then measure; returns median seconds of one step."""
    plan = schedules.plan(getattr(schedules, schedule), rank.size, MICROBATCHES)
    stage, step = trainer(rank, plan, exchanging)
    if exchanging:
        check(rank, stage, step)
    return median_step(step)


def recorded(rank, schedule):
    """Some steps that are recorded, to see how long the ranks are idle."""
    plan = schedules.plan(getattr(schedules, schedule), rank.size, MICROBATCHES)
    _, step = trainer(rank, plan)
    for _ in range(RECORDED_STEPS):
        step()


def check(rank, stage, step):
    """Take some steps, and compare the parameters with those of one rank with all layers.

    Raises
    ------
    RuntimeError
        They differ by more than 1e-5.
    """
    whole = Stage(0, 1)
    for _ in range(CHECKED_STEPS):
        step()
        for microbatch in range(MICROBATCHES):
            whole.forward(microbatch, None)
            whole.backward(microbatch, None)
        whole.update()
    size = stage.parameters.size  # two stages, of which the first has the shift too
    expected = whole.parameters[:size] if stage.first else whole.parameters[-size:]
    difference = np.abs(stage.parameters - expected).max()
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"After {CHECKED_STEPS} steps the parameters differ from those of one rank by "
            f"{difference:.2g}, so the step was not measured."
        )


def ours(schedule, exchanging):
    """Measure ours once, in this process, on two workers; report seconds and bubble."""
    with open_cluster(workers=RANKS) as cluster:
        where = cluster.client, Mesh(pipeline=RANKS)
        found = [spmd.run(*where, program, schedule, exchanging).results[0]]
        if exchanging:
            events = spmd.run(*where, recorded, schedule, record=True).events
            steps = [step_of(events, number) for number in range(WARM_UP, RECORDED_STEPS)]
            found.append(median(bubble(step, RANKS) for step in steps))
        report(found)


def _ours(schedule, exchanging):
    program = f"from benchmarks.pipeline_step import ours; ours({schedule!r}, {exchanging})"
    return launch.python(program)


def run(rounds=ROUNDS):
    """Measure the step under both schedules.

    Parameters
    ----------
    rounds : int

    Returns
    -------
    list of Case
        One for each schedule, with ``more["bubble"]`` and ``more["theory"]``.
    """
    with_torch = launch.present(["torch"])
    return [_case(name, schedule, rounds, with_torch) for name, schedule in SCHEDULES.items()]


def _case(name, schedule, rounds, with_torch):
    bubbles = []

    def measure_ours():
        seconds, idle = _ours(schedule, True)
        bubbles.append(idle)
        return seconds

    fill = (MICROBATCHES + RANKS - 1) / MICROBATCHES
    sides = {"ours": measure_ours, "limit": lambda: _ours(schedule, False)[0] * fill}
    if with_torch:
        sides["torch"] = lambda: launch.ranks("benchmarks.peers.pipeline_step", name)
    medians = interleaved(sides, rounds)
    theory = (RANKS - 1) / (MICROBATCHES + RANKS - 1)
    more = {"bubble": median(bubbles), "theory": theory}
    return Case(name, medians.pop("ours"), medians, medians.pop("limit"), more)
