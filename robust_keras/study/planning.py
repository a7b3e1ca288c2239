"""How rows of the study are run: at which scale, how often, at what cost, and how a budget shrinks them.

plan = PLANS["mini"]
bindings = plan.bindings(34, 20, train_steps=78_000, num_validation=1024)
plan = fit(plan, jobs, seconds=3600, flops_per_second=5e10)
"""

import math
from typing import NamedTuple

from robust_keras.study import costs

TEST_EXAMPLES = 10_000
_FEWEST_STEPS = 20
_FEWEST_EXAMPLES = 20
# Of a run that a budget has shortened.
_VALIDATIONS = 6
# Of a model's training and evaluation, to load data and to compile.
_START_UP_SECONDS = 60
_FEWEST_VALIDATION_IMAGES = 64
# Of about a tenth of the width, and chosen so that larger networks stay larger.
_MINI_DEPTHS = {28: 10, 34: 16, 40: 22, 46: 28, 70: 34}
_MINI_WIDTHS = {10: 1, 15: 2, 16: 2, 20: 3}


class Plan(NamedTuple):
    """A scale of the study.

    Attributes:
        name: of the scale, and of the folder of its runs.
        overlay: gin files read after a row's own.
        evaluation: the gin file of the attacks, relative to the folder of the recipes.
        passes: of the evaluation, (with the input's gradient) over each example at most.
        num_examples: test examples that are evaluated, None for all 10,000.
        num_runs: models trained per configuration, with seeds 0, 1, ...
        num_baseline_runs: the same of configurations that others are compared with.
        evaluates_all: whether each model is evaluated, or of configurations that are no baseline only the one with the
            highest validation robust accuracy.
        size: (numerator, denominator) by which networks shrink, or 'mini'; None for the paper's.
        share: of the recipes' steps and of `num_examples`, which a budget has left.
    """

    name: str
    overlay: tuple
    evaluation: str
    passes: int
    num_examples: int | None
    num_runs: int
    num_baseline_runs: int
    evaluates_all: bool
    size: tuple | str | None
    share: float = 1.0

    @property
    def examples(self):
        """Test examples that are evaluated."""
        return int(self.share * (self.num_examples or TEST_EXAMPLES))

    def steps(self, train_steps):
        """Steps at this scale of a recipe's."""
        return int(self.share * train_steps)

    def network(self, depth, width):
        """(depth, width) at this scale of a network of the paper's."""
        if self.size is None:
            return depth, width
        if self.size == "mini":
            return _MINI_DEPTHS.get(depth, depth), _MINI_WIDTHS.get(width, width)
        numerator, denominator = self.size
        blocks = max(1, round((depth - 4) // 6 * numerator / denominator))
        return 6 * blocks + 4, max(1, round(width * numerator / denominator))

    def validation_images(self, num_validation):
        """Held-out images at this scale of a recipe's."""
        return max(int(self.share * num_validation), min(_FEWEST_VALIDATION_IMAGES, num_validation))

    def bindings(self, depth, width, train_steps, num_validation):
        """gin bindings of this scale, beyond the overlay's, for a recipe's network, steps and held-out images."""
        bindings = []
        if self.size is not None:
            bindings += [f"{name} = {value}" for name, value in zip(("DEPTH", "WIDTH"), self.network(depth, width))]
        if self.share < 1:
            steps = self.steps(train_steps)
            every = -(-steps // _VALIDATIONS)
            bindings += [
                f"TRAIN_STEPS = {steps}",
                f"train.validate_every = {every}",
                f"train.checkpoint_every = {every}",
                f"training_data.num_validation = {self.validation_images(num_validation)}",
            ]
        return bindings


# AA+MT: 5 x 100, 5 x 100 and 9 x 10 x 200 steps; PGD-40 beside them. The mini one: 50, 50 and 9 x 50.
PLANS = {
    # Section 3.1: two models per setting, of which validation chooses one; section 3.2: ten of the baseline.
    "paper": Plan("paper", (), "eval/aa_mt.gin", 500 + 500 + 18_000 + 40, None, 2, 10, False, None),
    "mini": Plan("mini", ("scales/mini.gin",), "eval/aa_mt_mini.gin", 50 + 50 + 450 + 40, 500, 3, 3, True, "mini"),
}


class Job(NamedTuple):
    """A configuration that is trained and evaluated, as its cost depends on it.

    Attributes:
        depth: of the paper's network.
        width: of it.
        num_classes: of the data.
        batch_size: images per step.
        train_steps: of a run at this scale.
        attack_steps: of the inner attack, 0 without one.
        objective: its name.
        clean_prediction: whether the attack moves away from the prediction on the clean images.
        validations: of a run at this scale.
        validation_images: of each.
        validation_passes: with the input's gradient, over each image.
        num_runs: models trained.
        num_evaluated: models evaluated.
    """

    depth: int
    width: int
    num_classes: int
    batch_size: int
    train_steps: int
    attack_steps: int
    objective: str
    clean_prediction: bool
    validations: int
    validation_images: int
    validation_passes: int
    num_runs: int
    num_evaluated: int


class Cost(NamedTuple):
    """Floating-point operations of all runs of a job: of training with its validations, and of evaluation, which is an
    upper bound, since images that fall need no more."""

    training: float
    evaluation: float

    @property
    def total(self):
        return self.training + self.evaluation


def step_flops(plan, job):
    """Operations of one training step of a job at the plan's size of network."""
    return costs.training_flops(
        costs.forward_flops(*plan.network(job.depth, job.width), num_classes=job.num_classes),
        batch_size=job.batch_size,
        num_steps=1,
        attack_steps=job.attack_steps,
        objective=job.objective,
        clean_prediction=job.clean_prediction,
    )


def cost(plan, job):
    """The `Cost` of a job at the plan's size of network and steps."""
    forward = costs.forward_flops(*plan.network(job.depth, job.width), num_classes=job.num_classes)
    training = step_flops(plan, job) * plan.steps(job.train_steps)
    validations = job.validations if plan.share == 1 else min(job.validations, _VALIDATIONS)
    images = validations * plan.validation_images(job.validation_images)
    validation = costs.attack_flops(forward, num_images=images, num_passes=job.validation_passes)
    evaluation = costs.attack_flops(forward, num_images=plan.examples, num_passes=plan.passes)
    return Cost((training + validation) * job.num_runs, evaluation * job.num_evaluated)


def fit(plan, jobs, *, seconds, flops_per_second):
    """The plan, shrunk until all `jobs` fit.

    Networks shrink first, to a half, a quarter and then the miniature's, skipping sizes at which two of them would be
    the same; then steps, held-out images and test examples do, by one factor. Batches, ratios, radii and schedules
    (which are fractions of the steps) stay.

    Args:
        plan: a `Plan`.
        jobs: the `Job`s that are still to be run.
        seconds: the budget.
        flops_per_second: of the device.

    Returns:
        A `Plan`; the same one where it fits.

    Raises:
        ValueError: where not even the smallest fits.
    """
    starting = _START_UP_SECONDS * sum(job.num_runs for job in jobs)
    budget = (seconds - starting) * flops_per_second

    def total(plan):
        return sum(cost(plan, job).total for job in jobs)

    if not jobs or total(plan) <= budget:
        return plan
    networks = {(job.depth, job.width) for job in jobs}
    for size in () if plan.size == "mini" else ((1, 2), (1, 4), "mini"):
        plan = plan._replace(size=size)
        distinct = len({plan.network(*network) for network in networks}) == len(networks)
        if distinct and total(plan) <= budget:
            return plan
    fewest = max(_FEWEST_STEPS / max(job.train_steps for job in jobs), _FEWEST_EXAMPLES / plan.examples)
    for thousandths in range(999, math.ceil(1000 * fewest) - 1, -1):
        shrunken = plan._replace(share=thousandths / 1000)
        if total(shrunken) <= budget:
            return shrunken
    needed = starting + total(plan._replace(share=math.ceil(1000 * fewest) / 1000)) / flops_per_second
    raise ValueError(f"Expected a budget of {math.ceil(needed)} s or more. Received: {seconds:.0f} s")
