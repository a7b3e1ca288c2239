"""Every row that can be run: its configuration parses, uses all its bindings, takes a step, and is not its baseline's."""

import functools
import inspect

import first_steps
import pytest

from robust_keras.commands import configuration, train_settings
from robust_keras.data import training_batches
from robust_keras.study import costs, rows
from robust_keras.training.weight_averaging import averaging_decay

ROWS = rows.read()
RUNNABLE = [row for row in ROWS if row.runnable]
COMPARED = [row for row in RUNNABLE if row.baseline]
# Small where size makes no difference between rows.
SMALL = ("BATCH_SIZE = 16", "STATISTICS_GROUP_SIZE = 16", "training/pgd.num_steps = 1", "DEPTH = 10", "WIDTH = 1")
# What a row of a table changes, out of the keys of `first_step`.
CHANGES = {
    1: {"loss"},
    2: {"loss"},
    3: {"loss"},
    4: {"extra_data"},
    5: {"loss", "averages"},
    6: {"parameters"},
    7: {"averages"},
    8: {"loss"},
    9: {"batch"},
    10: {"rates"},
}


@functools.lru_cache(None)
def resolved(row, *params):
    configuration.parse(row.files, [*row.bindings, *params])
    recipe = configuration.resolve(configuration.train).recipe
    assert not configuration.unused_bindings()
    return recipe


@functools.lru_cache(None)
def first_batch(with_extra, labelled_fraction, group_size):
    """Made once for all configurations with these settings, the only ones in which their batches differ."""
    share = {} if labelled_fraction is None else {"labelled_fraction": labelled_fraction}
    data = first_steps.training_data(with_extra)
    return next(
        iter(training_batches.batches(data, batch_size=16, group_size=group_size, seed=0, num_steps=1, **share))
    )


def described(value):
    """A function with its settings, to compare: equal ones that were configured apart are not equal themselves."""
    if isinstance(value, functools.partial):
        return value.func.__qualname__, described(value.args), described(value.keywords)
    if isinstance(value, dict):
        return tuple((name, described(each)) for name, each in sorted(value.items()))
    if isinstance(value, (tuple, list)):
        return tuple(map(described, value))
    return value.__qualname__ if callable(value) else value


LOSSES = {}


def first_loss(recipe, data, batch, rate):
    """Computed once for all configurations that agree in what it is a function of."""
    key = described((recipe.model, recipe.objective, recipe.attack, float(rate(0)), id(batch)))
    if key not in LOSSES:
        LOSSES[key] = first_steps.loss(recipe, data, batch, rate)
    return LOSSES[key]


@functools.lru_cache(None)
def first_step(name):
    """What the program, the schedule and the data of a configuration come to."""
    row = next(row for row in RUNNABLE if rows.run_name(row) == name)
    paper = resolved(row)
    train = resolved(row, *SMALL)
    data = first_steps.training_data(paper.data.keywords["extra_data"] is not None)
    bound = train.batches.keywords
    batch = first_batch(data.extra is not None, *(bound.get(name) for name in ("labelled_fraction", "group_size")))
    rate = functools.partial(train.optimizer.learning_rate, num_steps=paper.train_steps)
    tau = train.averaging and train.averaging.tau
    return {
        "loss": first_loss(train, data, batch, rate),
        "parameters": costs.num_parameters(*(paper.model.keywords[key] for key in ("depth", "width"))),
        "averages": None if tau is None else [float(averaging_decay(step, tau=tau)) for step in (0, 100, 10_000)],
        "rates": [float(rate(int(paper.train_steps * share))) for share in (0.0, 0.3, 0.6, 0.9)],
        "batch": hash(batch["image"].numpy().tobytes()),
        "extra_data": paper.data.keywords["extra_data"],
    }


@pytest.mark.parametrize("name", sorted({rows.run_name(row) for row in RUNNABLE}))
def test_every_configuration_takes_a_step(name):
    assert first_step(name)["loss"] > 0


@pytest.mark.parametrize("row", COMPARED, ids=lambda row: f"{row.table}-{row.row}-{row.setting}")
def test_a_row_differs_from_its_baseline_as_it_says(row):
    own, baseline = (first_step(rows.run_name(each)) for each in (row, rows.baseline_of(ROWS, row)))
    differing = {key for key in own if own[key] != baseline[key]}
    assert CHANGES[row.table] <= differing
    if row.table in (3, 7, 8, 10):  # One thing at a time.
        assert differing == CHANGES[row.table] or (row.table == 3 and row.files[0].startswith("trades"))


def test_the_training_radius_leaves_evaluation_alone():
    (row,) = rows.select(ROWS, table=3, row="AT eps=9.6/255", setting="cifar10")
    train = resolved(row)
    assert train.attack.attack_fn.keywords["threat"].epsilon == pytest.approx(9.6 / 255)
    assert train.validation.correct_fn.keywords["attack"].keywords["threat"].epsilon == 8 / 255


def test_every_argument_of_train_that_rows_bind_exists():
    arguments = inspect.signature(train_settings.train).parameters
    for row in RUNNABLE:
        for binding in row.bindings:
            name = binding.split(" = ")[0]
            assert not name.startswith("train.") or name.removeprefix("train.") in arguments


def test_batches_differ_in_nothing_else_between_configurations():
    known = {"batch_size", "group_size", "labelled_fraction", "augmentation"}
    for row in RUNNABLE:
        assert resolved(row).batches.keywords.keys() <= known


@pytest.mark.parametrize("row", RUNNABLE, ids=lambda row: f"{row.table}-{row.row}-{row.setting}")
def test_the_paper_scale_trains_the_papers_network(row):
    model = resolved(row).model.keywords
    named = next((part for part in (row.row, row.row.split("(")[-1]) if part.startswith("WRN-")), None)
    if named:
        depth, width = named.rstrip(")").split(",")[0].split("-")[1:3]
        assert (model["depth"], model["width"]) == (int(depth), int(width))
    elif row.table != 5:
        assert (model["depth"], model["width"]) == (28, 10)
    assert model["statistics_group_size"] == (32 if row.setting == "80mti" else 4)
