"""The study on other data than digits: rates tuned without GC, and the comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from benchmarks.paper.cells import BASE
from benchmarks.paper.grids import ADAM_RATIOS, DECAY, SGD_RATIOS, WEIGHT_DECAYS, Study
from benchmarks.paper.labels import as_file_name
from benchmarks.paper.network import Network
from benchmarks.paper.other_networks import Perceptron, Recurrent, Transformer
from benchmarks.paper.tasks import Task
from benchmarks.paper.training import Grid, Learner

__all__ = [
    "INDIAN_PINES",
    "KINDS",
    "MNIST",
    "MNIST_SETTINGS",
    "TUNED",
    "TUNING",
    "Setting",
    "middle_rates",
]

Setting = tuple[Task, Learner, str]

PAIRS = 10
NORMS = ("batch norm", "group norm")
CLASSES_OF_PINES = 13
DECOUPLED_DECAY = 0.01  # of AdamW

MNIST_TASKS = (
    Task("MNIST, all images", data="MNIST", checkpoints=2),
    Task("MNIST, 20 images a class", 20, data="MNIST", checkpoints=2),
)
PINES = Task(
    "Indian Pines, 40 pixels a class",
    40,
    classes=tuple(range(CLASSES_OF_PINES)),
    data="Indian Pines",
    checkpoints=2,
)
LONGER = Task("MNIST, all images, 720 steps", data="MNIST", steps=720, checkpoints=2)
SEQUENCES = Task("MNIST, all images", data="MNIST", steps=300, checkpoints=2)
LONGER_SEQUENCES = Task("MNIST, all images, 1200 steps", data="MNIST", steps=1200, checkpoints=2)
DIABETES = Task("diabetes", classes=(), data="diabetes", steps=300, checkpoints=2)

BATCH_NORM, GROUP_NORM = (Network(norm, stem_stride=4) for norm in NORMS)
MNIST_SETTINGS = [*product(MNIST_TASKS, (BATCH_NORM, GROUP_NORM))]
PINES_SETTINGS = [
    (PINES, Network(norm, width=8, inputs=200, classes=CLASSES_OF_PINES, stem_stride=2))
    for norm in NORMS
]

# Rates that were tried without GC: more of them where the highest was the best.
RATES_OF_IMAGES = {"SGDM": (0.05, 0.1, 0.2, 0.4, 0.8), "Adam": (0.0025, 0.005, 0.01, 0.02, 0.04)}
HIGHER: dict[Setting, Sequence[float]] = {
    (*MNIST_SETTINGS[2], "SGDM"): (1.6,),
    (*MNIST_SETTINGS[2], "Adam"): (0.08, 0.16),
    (*PINES_SETTINGS[0], "Adam"): (0.08, 0.16),
    (*PINES_SETTINGS[1], "Adam"): (0.08,),
}
TRIED: dict[Setting, Sequence[float]] = {
    **{
        (*on, name): (*rates, *HIGHER.get((*on, name), ()))
        for on in (*MNIST_SETTINGS, *PINES_SETTINGS)
        for name, rates in RATES_OF_IMAGES.items()
    },
    (SEQUENCES, Transformer(), "AdamW"): (0.0025, 0.005, 0.01, 0.02, 0.04),
    (SEQUENCES, Recurrent(), "Adam"): (0.0025, 0.005, 0.01, 0.02, 0.04),
    (DIABETES, Perceptron(), "SGDM"): (0.000625, 0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04),
    (DIABETES, Perceptron(), "Adam"): (0.001, 0.0025, 0.005, 0.01, 0.02),
    (LONGER, BATCH_NORM, "SGDM"): (0.1, 0.2, 0.4, 0.8),
    (LONGER, GROUP_NORM, "SGDM"): (0.05, 0.1, 0.2),
    (LONGER_SEQUENCES, Transformer(), "AdamW"): (0.0025, 0.005, 0.01, 0.02),
}
# The best of them, by mean accuracy over seeds of their own, in the same order.
BEST = (
    *(0.4, 0.02),  # MNIST, all images: batch norm
    *(0.1, 0.005),  # group norm
    *(0.8, 0.08),  # MNIST, 20 images a class: batch norm
    *(0.1, 0.005),  # group norm
    *(0.4, 0.08),  # Indian Pines: batch norm
    *(0.4, 0.04),  # group norm
    0.005,  # transformer
    0.02,  # GRU
    *(0.00125, 0.0025),  # perceptron
    *(0.4, 0.1),  # MNIST, 720 steps: batch norm, group norm
    0.01,  # transformer, 1200 steps
)
TUNED: dict[Setting, float] = dict(zip(TRIED, BEST, strict=True))


def _cell(optimizer: str, rate: float) -> tuple[float, float]:
    return rate, DECOUPLED_DECAY if optimizer == "AdamW" else DECAY


def _tuning() -> Study:
    """All rates of a task and network in one program."""
    programs: dict[tuple[Task, Learner], tuple[Grid, ...]] = {}
    for (task, network, optimizer), rates in TRIED.items():
        cells = tuple(_cell(optimizer, rate) for rate in rates)
        grid = Grid(task, network, optimizer, cells, (BASE,))
        programs[task, network] = (*programs.get((task, network), ()), grid)
    found = tuple(programs.values())
    return Study("tuning", "Learning rates, tuned without GC", found, seeds=2, first_seed=1000)


def _kinds() -> Study:
    """One comparison an optimizer, at rates tuned without GC, on two seeds."""
    programs: dict[tuple[Task, Learner], tuple[Grid, ...]] = {}
    for (task, network, optimizer), rate in TUNED.items():
        arms = (BASE, "gradient") if optimizer == "SGDM" else (BASE, "gradient", "update")
        grid = Grid(task, network, optimizer, (_cell(optimizer, rate),), arms)
        programs[task, network] = (*programs.get((task, network), ()), grid)
    return Study("kinds", "At rates tuned without GC", tuple(programs.values()), seeds=PAIRS)


def _both_tables(name: str, settings: Sequence[tuple[Task, Network]]) -> Study:
    """Take the columns in the middle, which `KINDS` has, and the others."""
    middle = (grids for grids in KINDS.programs if (grids[0].task, grids[0].network) in settings)
    others = (_other_columns(task, network) for task, network in settings)
    return Study(as_file_name(name), name, (*middle, *others), seeds=PAIRS)


def _other_columns(task: Task, network: Network) -> tuple[Grid, ...]:
    sgd, adam = (TUNED[task, network, name] for name in ("SGDM", "Adam"))
    decays = [(sgd, decay) for decay in WEIGHT_DECAYS if decay != DECAY]
    rates = [(sgd * ratio, DECAY) for ratio in SGD_RATIOS if ratio != 1]
    of_adam = [(adam * ratio, DECAY) for ratio in ADAM_RATIOS if ratio != 1]
    return (
        Grid(task, network, "SGDM", (*decays, *rates)),
        Grid(task, network, "Adam", tuple(of_adam)),
    )


def middle_rates() -> dict[tuple[str, str], dict[str, float]]:
    """Give the rates that stand for the paper's middle ones, by the names of task and network."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for (task, network, optimizer), rate in TUNED.items():
        found.setdefault((task.name, network.name), {})[optimizer] = rate
    return found


TUNING, KINDS = _tuning(), _kinds()
MNIST = _both_tables("MNIST", MNIST_SETTINGS)
INDIAN_PINES = _both_tables("Indian Pines", PINES_SETTINGS)
