import pytest

from robust_keras.study import costs, planning

JOB = planning.Job(
    depth=28,
    width=10,
    num_classes=10,
    batch_size=128,
    train_steps=78_000,
    attack_steps=10,
    objective="adversarial_training",
    clean_prediction=False,
    validations=78,
    validation_images=1024,
    validation_passes=40,
    num_runs=2,
    num_evaluated=1,
)
PAPER, MINI = planning.PLANS["paper"], planning.PLANS["mini"]


def test_cost_by_hand():
    forward = costs.forward_flops(28, 10)
    cost = planning.cost(PAPER, JOB)
    assert cost.training == 2 * forward * (78_000 * 128 * 23 + 2 * 78 * 1024 * 40)
    # AA+MT on 10,000 images: 5 x 100 + 5 x 100 + 9 x 10 x 200 steps, and PGD-40.
    assert cost.evaluation == forward * 2 * 10_000 * (500 + 500 + 18_000 + 40)
    assert cost.total == cost.training + cost.evaluation


def test_images_that_fall_cost_no_more():
    # PGD-40 and APGD-CE run on what is right, APGD-DLR and MultiTargeted on what a PGD leaves standing.
    forward = costs.forward_flops(28, 10)
    expected = 2 * forward * 10_000 * (0.9 * (40 + 500) + 0.5 * (500 + 18_000))
    assert planning.cost(PAPER, JOB, accuracy=(0.9, 0.5)).evaluation == pytest.approx(expected)
    # In miniature 50, 50 and 9 x 50 steps.
    small = planning.cost(MINI, JOB, accuracy=(0.4, 0.2)).evaluation
    assert small == pytest.approx(2 * costs.forward_flops(10, 1) * 500 * (0.4 * (40 + 50) + 0.2 * (50 + 450)))


def test_the_protocols_are_the_papers():
    # Section 3.1: two models per setting, of which one is evaluated; section 3.2: ten of the baseline.
    assert (PAPER.num_runs, PAPER.num_baseline_runs, PAPER.evaluates_all, PAPER.examples) == (2, 10, False, 10_000)
    assert (MINI.num_runs, MINI.num_baseline_runs, MINI.evaluates_all, MINI.examples) == (3, 3, True, 500)
    # Table 2, AT-XENT.
    assert PAPER.accuracy == pytest.approx((0.8485, 0.5387), abs=0.005)


def test_plans_by_name():
    assert planning.plan_of("mini") is MINI
    asked = planning.plan_of("paper", 4)
    assert (asked.num_runs, asked.num_baseline_runs, asked.evaluates_all) == (4, 4, True)
    with pytest.raises(ValueError, match="Expected a scale out of paper, mini. Received: 'tiny'"):
        planning.plan_of("tiny")


def test_larger_networks_stay_larger_in_miniature():
    assert MINI.network(28, 10) == (10, 1)
    sizes = [(28, 10), (28, 15), (28, 20), (34, 20), (40, 20), (46, 20)]
    parameters = [costs.num_parameters(*MINI.network(*size)) for size in sizes]
    assert parameters == sorted(set(parameters))
    assert PAPER.network(46, 15) == (46, 15)
    assert PAPER._replace(size=(1, 2)).network(28, 10) == (16, 5)


def test_a_scale_as_it_is_binds_its_networks_alone():
    assert MINI.bindings(28, 10, 600, 256) == ["DEPTH = 10", "WIDTH = 1"]
    assert PAPER.bindings(28, 10, 78_000, 1024) == []
    assert PAPER.evaluates_whole_set and not MINI.evaluates_whole_set


def test_a_shortened_run_keeps_its_validations():
    shortened = MINI._replace(share=0.1)
    bindings = dict(line.split(" = ") for line in shortened.bindings(28, 10, 600, 256))
    assert bindings == {
        "DEPTH": "10",
        "WIDTH": "1",
        "TRAIN_STEPS": "60",
        "train.validate_every": "10",
        "train.checkpoint_every": "10",
        "training_data.num_validation": "64",
    }
    assert shortened.validations(78) == 6 and MINI.validations(78) == 78


def test_test_images_follow_the_share_until_there_are_as_many_as_fit():
    shortened = MINI._replace(share=0.5)
    assert shortened.examples == 250
    assert shortened._replace(images=321).examples == 321
    assert not PAPER._replace(images=9_999).evaluates_whole_set
    assert "50.0 % of its steps, 321 test images" in shortened._replace(images=321).description
