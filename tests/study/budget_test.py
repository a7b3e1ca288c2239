"""What fits into a budget, by arithmetic on invented timings."""

import json
import re

import pytest

from robust_keras import storage
from robust_keras.study import budget, costs, planning

AT = planning.Job(28, 10, 10, 64, 600, 10, "adversarial_training", False, 6, 256, 40, 3, 3)
AVERAGED = AT._replace(validation_passes=80)
JOBS = {"at": AT, "at-tau=0.995": AVERAGED}
LARGE = planning.Job(28, 10, 10, 128, 78_000, 10, "adversarial_training", False, 78, 1024, 40, 2, 1)
PAPER, MINI = planning.PLANS["paper"], planning.PLANS["mini"]
FORWARD = costs.forward_flops(10, 1)
# 60 s to start, 1 s for a step, 30 s to start an evaluation, and a WRN-10-1 takes 1 ms for a pass over an image.
SLOW = budget.Timings(60.0, 1.0, 30.0, 2 * FORWARD / 1e-3)


def fit(plan, jobs, seconds, measure, *, flops_per_second=1e18):
    return budget.fit(
        plan, jobs, seconds=seconds, left=lambda: seconds, flops_per_second=flops_per_second, measure=measure
    )


def all_take(timings):
    return lambda plan: dict.fromkeys(JOBS, timings)


def by_operations(flops_per_second, jobs):
    """Timings of a device with nothing but throughput."""

    def measure(plan):
        return {
            name: budget.Timings(0.0, planning.step_flops(plan, job) / flops_per_second, 0.0, flops_per_second)
            for name, job in jobs.items()
        }

    return measure


@pytest.mark.parametrize("text, seconds", [("12m", 720), ("90s", 90), ("1.5h", 5400), ("2d", 172_800)])
def test_budgets(text, seconds):
    assert budget.parse(text) == seconds


@pytest.mark.parametrize("text", ["3 hours", "0m", "h", "12", "-3h"])
def test_what_is_no_budget(text):
    with pytest.raises(ValueError, match=f"Expected a budget such as 90m or 3h. Received: '{text}'"):
        budget.parse(text)


def test_seconds_by_hand():
    # 60 to start, 600 steps, six validations of two batches of 128, each over 80 passes of 1 ms an image.
    assert budget.training_seconds(MINI, AVERAGED, SLOW) == pytest.approx(60 + 600 + 6 * 2 * 128 * 80 * 1e-3)
    # 30 to start; 500 images, of which .34 have 90 passes and .22 have 500 more.
    expected = 30 + 500 * (0.34 * 90 + 0.22 * 500) * 1e-3
    assert budget.evaluation_seconds(MINI, AT, SLOW) == pytest.approx(expected)
    assert budget.evaluation_seconds(MINI, AT, SLOW, (1.0, 0.5)) == pytest.approx(30 + 500 * (90 + 250) * 1e-3)
    total = 3 * sum(budget.training_seconds(MINI, job, SLOW) for job in JOBS.values()) + 6 * expected
    assert budget.total_seconds(MINI, JOBS, dict.fromkeys(JOBS, SLOW)) == pytest.approx(total)


def test_what_fits_stays_as_it_is():
    total = budget.total_seconds(MINI, JOBS, dict.fromkeys(JOBS, SLOW))
    fitted = fit(MINI, JOBS, total + 1, all_take(SLOW))
    assert fitted.plan == MINI and fitted.seconds == pytest.approx(total)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.35])
def test_a_shortened_plan_uses_what_there_is(share):
    seconds = budget.total_seconds(MINI._replace(share=share), JOBS, dict.fromkeys(JOBS, SLOW))
    fitted = fit(MINI, JOBS, seconds, all_take(SLOW))
    assert fitted.plan.share == pytest.approx(share, abs=0.002)
    assert fitted.seconds <= seconds
    more = fitted.plan._replace(share=fitted.plan.share + 0.001)
    assert budget.total_seconds(more, JOBS, fitted.timings) > seconds


@pytest.mark.parametrize("factor, size", [(0.2, (1, 2)), (0.02, (1, 4)), (2.5e-3, "mini"), (6e-5, "mini")])
def test_networks_shrink_before_steps(factor, size):
    jobs = {"at": LARGE}
    whole = planning.cost(PAPER, LARGE, accuracy=PAPER.accuracy).total
    fitted = fit(PAPER, jobs, 1000.0, by_operations(factor * whole / 1000, jobs))
    assert fitted.plan.size == size and (fitted.plan.share < 1) == (factor == 6e-5)
    assert fitted.seconds <= 1000


def test_sizes_that_cannot_fit_are_not_measured():
    jobs, measured = {"at": LARGE}, []
    whole = planning.cost(PAPER, LARGE, accuracy=PAPER.accuracy).total
    speed = 0.02 * whole / 1000

    def measure(plan):
        measured.append(plan.size)
        return by_operations(speed, jobs)(plan)

    fit(PAPER, jobs, 1000.0, measure, flops_per_second=speed)
    assert measured == [(1, 4)]


def test_a_size_that_only_seems_to_fit_is_passed_over():
    jobs = {"at": LARGE}
    whole = planning.cost(PAPER, LARGE, accuracy=PAPER.accuracy).total
    speed = 0.2 * whole / 1000

    def measure(plan):  # What operations do not tell takes all of it, but for the smallest networks.
        timings = by_operations(speed, jobs)(plan)["at"]
        return {"at": timings if plan.size == "mini" else timings._replace(starting=500.0)}

    assert fit(PAPER, jobs, 1000.0, measure, flops_per_second=speed).plan.size == "mini"


def test_what_measuring_took_is_gone():
    clock = [1000.0]
    total = budget.total_seconds(MINI, JOBS, dict.fromkeys(JOBS, SLOW))

    def measure(plan):
        clock[0] -= 300
        return dict.fromkeys(JOBS, SLOW)

    clock[0] = total + 1
    fitted = budget.fit(MINI, JOBS, seconds=total + 1, left=lambda: clock[0], flops_per_second=1e18, measure=measure)
    assert fitted.plan.share < 1 and fitted.seconds <= total - 299


def test_different_networks_stay_different():
    jobs = {"small": LARGE, "large": LARGE._replace(depth=34)}
    halved = PAPER._replace(size=(1, 2))
    assert halved.network(28, 10) == halved.network(34, 10)
    whole = sum(planning.cost(PAPER, job, accuracy=PAPER.accuracy).total for job in jobs.values())
    plan = fit(PAPER, jobs, 1000.0, by_operations(0.2 * whole / 1000, jobs)).plan
    assert plan.size not in (None, (1, 2))
    assert plan.network(28, 10) != plan.network(34, 10)


def test_nothing_is_planned_that_tells_nothing():
    # As `--budget=12m` once did: 25 steps, and 21 images.
    with pytest.raises(
        ValueError, match=r"^Expected a budget of \d+m or more, for 6 models of 200 steps, .* 167 images"
    ):
        fit(MINI, JOBS, 720.0, all_take(SLOW))


@pytest.mark.parametrize("jobs", [JOBS, {"at": AT._replace(train_steps=300), "long": AT._replace(train_steps=3000)}])
def test_the_shortest_run_is_long_enough(jobs):
    smallest = None
    for seconds in range(10_000, 0, -20):
        try:
            smallest = fit(MINI, jobs, float(seconds), lambda plan: dict.fromkeys(jobs, SLOW)).plan
        except ValueError:
            break
    assert smallest.share < 1
    shortest = min(job.train_steps for job in jobs.values())
    assert 200 <= smallest.steps(shortest) <= 210
    assert smallest.examples >= 100


def test_what_is_advised_is_enough():
    with pytest.raises(ValueError) as refusal:
        fit(MINI, JOBS, 720.0, all_take(SLOW))
    advised = budget.parse(re.search(r"\d+m", str(refusal.value))[0])
    # Also where everything takes 8 % longer the next time.
    slower = budget.Timings(*(value * 1.08 for value in SLOW[:3]), SLOW[3] / 1.08)
    assert fit(MINI, JOBS, advised, all_take(slower)).plan.steps(600) >= 200


def test_who_asks_for_few_steps_gets_them():
    jobs = {"at": AT._replace(train_steps=50)}
    fitted = fit(MINI, jobs, 2000.0, lambda plan: {"at": SLOW})
    assert fitted.plan.share == 1 and fitted.plan.steps(50) == 50


def test_test_images_are_as_many_as_fit():
    fitted = budget.Fitted(MINI._replace(share=0.4), dict.fromkeys(JOBS, SLOW), 0.0)
    models = [budget.Model("at", 0.5, 0.2), budget.Model("at-tau=0.995", 0.3, 0.3)]
    # 2 x 30 s to start, and an image takes .5 * 90 + .2 * 500 and .3 * 90 + .3 * 500 ms.
    an_image = (0.5 * 90 + 0.2 * 500 + 0.3 * 90 + 0.3 * 500) * 1e-3
    assert budget.num_images(fitted, JOBS, models, left=60 + 300.5 * an_image) == 300
    assert budget.num_images(fitted, JOBS, models, left=1e6) == 500
    assert budget.num_images(fitted, JOBS, models, left=-50.0) == 100
    assert budget.num_images(fitted, JOBS, [], left=10.0) == 500


def test_networks_at_chance_are_told():
    # 85 validation images, of which one in twenty guessers of ten classes gets 15.4 % or more.
    plan = MINI._replace(share=1 / 3)
    assert plan.validation_images(256) == 85
    guessing, learned = budget.Model("at", 0.153, 0.1), budget.Model("at-tau=0.995", 0.155, 0.1)
    assert budget.all_at_chance(plan, JOBS, [guessing, guessing])
    assert not budget.all_at_chance(plan, JOBS, [guessing, learned])
    assert budget.all_at_chance(plan, JOBS, [])  # Every run diverged.


def test_a_plan_is_kept(tmp_path):
    path = str(tmp_path / "plan.json")
    assert budget.read(path, MINI, JOBS) is None
    timings = {"at": SLOW, "at-tau=0.995": SLOW._replace(step=1.5)}
    fitted = budget.Fitted(PAPER._replace(size=(1, 2), share=0.5, images=123), timings, 99.0)
    budget.write(path, fitted, JOBS)
    assert budget.read(path, PAPER, JOBS) == fitted


def test_a_plan_of_an_older_version_is_read(tmp_path):
    # As version 93191f6 wrote it.
    jobs = {"trades": planning.Job(28, 10, 10, 64, 600, 10, "trades", True, 6, 256, 40, 3, 3)}
    kept = {"size": "mini", "share": 0.311, "flops_per_second": 1e11, "jobs": {"trades": jobs["trades"]._asdict()}}
    (tmp_path / "plan.json").write_text(json.dumps(kept) + "\n")
    fitted = budget.read(str(tmp_path / "plan.json"), MINI, jobs)
    assert fitted.plan == MINI._replace(share=0.311) and fitted.timings == {}


def test_a_plan_for_something_else_is_refused(tmp_path):
    path = str(tmp_path / "plan.json")
    budget.write(path, budget.Fitted(MINI, {}, 0.0), {"at": AT})
    with pytest.raises(
        ValueError, match="Expected what .*plan.json was made for, at, or another workdir. Received: mart"
    ):
        budget.read(path, MINI, {"mart": AT})
    with pytest.raises(ValueError, match="of another, with at.train_steps = 600, not 300$"):
        budget.read(path, MINI, {"at": AT._replace(train_steps=300)})
    for text, said in (
        ("{", "JSON in"),
        ("[]", "a JSON object"),
        ("{}", "what a budget"),
        ('{"jobs": 3}', "what a budget"),
    ):
        storage.write_text(path, text)
        with pytest.raises(ValueError, match=rf"^Expected {said}.*plan\.json"):
            budget.read(path, MINI, {"at": AT})
