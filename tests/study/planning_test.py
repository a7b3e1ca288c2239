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


def test_the_protocols_are_the_papers():
    # Section 3.1: two models per setting, of which one is evaluated; section 3.2: ten of the baseline.
    assert (PAPER.num_runs, PAPER.num_baseline_runs, PAPER.evaluates_all, PAPER.examples) == (2, 10, False, 10_000)
    assert (MINI.num_runs, MINI.num_baseline_runs, MINI.evaluates_all, MINI.examples) == (3, 3, True, 500)


def test_larger_networks_stay_larger_in_miniature():
    assert MINI.network(28, 10) == (10, 1)
    sizes = [(28, 10), (28, 15), (28, 20), (34, 20), (40, 20), (46, 20)]
    parameters = [costs.num_parameters(*MINI.network(*size)) for size in sizes]
    assert parameters == sorted(set(parameters))
    assert PAPER.network(46, 15) == (46, 15)
    assert PAPER._replace(size=(1, 2)).network(28, 10) == (16, 5)


def test_what_fits_stays_as_it_is():
    assert planning.fit(MINI, [JOB], seconds=1e9, flops_per_second=1e15) is MINI
    assert MINI.bindings(28, 10, 600, 256) == ["DEPTH = 10", "WIDTH = 1"]
    assert PAPER.bindings(28, 10, 78_000, 1024) == []


@pytest.mark.parametrize("factor, size", [(0.2, (1, 2)), (0.01, (1, 4)), (2.5e-3, "mini"), (1e-4, "mini")])
def test_networks_shrink_before_steps(factor, size):
    whole = planning.cost(PAPER, JOB).total
    plan = planning.fit(PAPER, [JOB], seconds=1000 + 120, flops_per_second=factor * whole / 1000)
    assert plan.size == size
    assert planning.cost(plan, JOB).total <= factor * whole
    assert (plan.share < 1) == (factor == 1e-4)
    if plan.share < 1:  # It uses what there is: a little more would not fit.
        assert planning.cost(plan._replace(share=plan.share + 0.001), JOB).total > factor * whole


def test_different_networks_stay_different():
    jobs = [JOB, JOB._replace(depth=34)]
    halved = PAPER._replace(size=(1, 2))
    assert halved.network(28, 10) == halved.network(34, 10)
    whole = sum(planning.cost(PAPER, job).total for job in jobs)
    plan = planning.fit(PAPER, jobs, seconds=1000 + 240, flops_per_second=0.2 * whole / 1000)
    assert plan.size not in (None, (1, 2))
    assert plan.network(28, 10) != plan.network(34, 10)


def test_a_shortened_run_keeps_its_validations():
    bindings = dict(line.split(" = ") for line in MINI._replace(share=0.1).bindings(28, 10, 600, 256))
    assert bindings == {
        "DEPTH": "10",
        "WIDTH": "1",
        "TRAIN_STEPS": "60",
        "train.validate_every": "10",
        "train.checkpoint_every": "10",
        "training_data.num_validation": "64",
    }


def test_what_is_too_little():
    with pytest.raises(ValueError, match=r"Expected a budget of \d+ s or more. Received: 130 s") as refusal:
        planning.fit(PAPER, [JOB], seconds=130, flops_per_second=1e9)
    advised = int(str(refusal.value).split()[4])
    assert planning.fit(PAPER, [JOB], seconds=advised, flops_per_second=1e9).size == "mini"
