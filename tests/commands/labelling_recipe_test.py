"""The recipe of pseudo-labelled sets: its numbers are the paper's, and every binding changes something."""

import pytest

from robust_keras.commands import configuration
from robust_keras.pseudo_labelling import duplicates, record_sets
from robust_keras.study import rows
from robust_keras.training import objectives

LABELLING = "pseudo_label.gin"


def labelling(*params):
    """What `pseudo_label.py` runs: `label_pool` as configured, and arguments of `train` for its classifier."""
    configuration.parse([LABELLING], params)
    train = configuration.resolve(configuration.train, is_last=False)
    return configuration.resolve(configuration.label_pool), train.recipe


def test_the_papers_pseudo_labelled_sets():
    # Gowal et al. 2020, section 4.3.1 and Table 4; of the classifier the paper says that it is a standard one.
    label_pool, train = labelling()
    assert label_pool.sets.sizes == (200_000, 500_000, 1_000_000) and label_pool.recipe.test_set == "cifar10"
    assert label_pool.recipe.scoring.near_duplicate == duplicates.THRESHOLD
    assert train.attack is None and train.objective.func is objectives.standard_training
    assert train.validation.best_by == "clean" and train.data.keywords["extra_data"] is None
    assert [train.model.keywords[name] for name in ("depth", "width")] == [28, 10]
    header = (configuration.gin_directory() / LABELLING).read_text().split("\n\n")[0]
    assert f"--gin_file=gin/{LABELLING}" in header


def test_the_names_of_the_sets_are_what_the_recipes_train_on():
    names = {record_sets.set_name(size) for size in labelling()[0].sets.sizes}
    found = [row for row in rows.read() if row.table == 4 and "regenerated" in row.row]
    bound = {binding for row in found for binding in row.bindings}
    assert bound == {f"EXTRA_DATA = 'tfrecord:80mti/{name}/*.tfrecord'" for name in names}


def test_changing_a_binding_changes_the_labelling():
    assert labelling("POOL = 'images:here'")[0].recipe.pool == "images:here"
    assert labelling("TEST_SET = 'mnist'")[0].recipe.test_set == "mnist"
    label_pool, train = labelling("DATASET = 'cifar100'")
    assert label_pool.recipe.test_set == train.data.keywords["dataset"] == "cifar100"
    with pytest.raises(ValueError, match="label_pool.size"):
        labelling("label_pool.size = (10,)")
