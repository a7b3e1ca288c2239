"""How rows of the study are run: at which scale, how often, and at what cost in operations.

plan = plan_of("mini")
bindings = plan.bindings(34, 20, train_steps=78_000, num_validation=1024)
operations = cost(plan, job).total
"""

from typing import Literal, NamedTuple, TypeAlias

from robust_keras.study import costs

TEST_EXAMPLES = 10_000
# With less, networks are at chance and intervals of differences wider than the paper's effects, so that nothing is
# told. 200 steps of adversarial training in miniature bring a WRN-10-1 to 25 to 29 % of 256 validation images, 25 steps
# leave it at the 10 % of chance. On 100 images, a difference that a fifth of them show is known to 9 points.
FEWEST_STEPS = 200
FEWEST_EXAMPLES = 100
FEWEST_VALIDATION_IMAGES = 64
# Of a run that a budget has shortened.
_VALIDATIONS = 6
# Of about a tenth of the width, and chosen so that larger networks stay larger.
_MINI_DEPTHS = {28: 10, 34: 16, 40: 22, 46: 28, 70: 34}
_MINI_WIDTHS = {10: 1, 15: 2, 16: 2, 20: 3}


class Passes(NamedTuple):
    """Passes with the input's gradient over an image in an evaluation, until it falls.

    Attributes:
        correct: of the baseline and the first attack, over each image that is right before any attack.
        standing: of the other attacks, over each that a PGD-40 leaves standing.
    """

    correct: int
    standing: int


Size: TypeAlias = tuple[int, int] | Literal["mini"] | None


class Plan(NamedTuple):
    """A scale of the study.

    Attributes:
        name: of the scale, and of the folder of its runs.
        overlay: gin files read after a row's own.
        evaluation: the gin file of the attacks, relative to the folder of the recipes.
        passes: of the evaluation.
        accuracy: (clean, under PGD-40), fractions as the baseline has them at this scale: what the cost of an
            evaluation is reckoned with before there is a network.
        num_examples: test examples that are evaluated, None for all 10,000.
        num_runs: models trained per configuration, with seeds 0, 1, ...
        num_baseline_runs: the same of configurations that others are compared with.
        evaluates_all: whether each model is evaluated, or of configurations that are no baseline only the one with the
            highest validation robust accuracy.
        size: (numerator, denominator) by which networks shrink, or 'mini'; None for the paper's.
        share: of the recipes' steps and of `num_examples`, which a budget has left.
        images: test examples that a budget has left after training, in place of that share; None before.
    """

    name: str
    overlay: tuple[str, ...]
    evaluation: str
    passes: Passes
    accuracy: tuple[float, float]
    num_examples: int | None
    num_runs: int
    num_baseline_runs: int
    evaluates_all: bool
    size: Size
    share: float = 1.0
    images: int | None = None

    @property
    def most_examples(self) -> int:
        """Test examples that are evaluated without a budget."""
        return self.num_examples or TEST_EXAMPLES

    @property
    def examples(self) -> int:
        """Test examples that are evaluated."""
        return self.images or int(self.share * self.most_examples)

    @property
    def evaluates_whole_set(self) -> bool:
        """Whether the test set is evaluated, whatever its size."""
        return self.num_examples is None and self.share == 1 and self.images is None

    @property
    def description(self) -> str:
        """What is run, for a title."""
        network = (
            "WRN-{}-{} for the paper's WRN-28-10".format(*self.network(28, 10)) if self.size else "the paper's networks"
        )
        steps = "its steps" if self.share == 1 else f"{100 * self.share:.1f} % of its steps"
        return f"{self.name} scale: {network}, {steps}, {self.examples:,} test images, {self.evaluation}"

    def steps(self, train_steps: int) -> int:
        """Steps at this scale of a recipe's."""
        return int(self.share * train_steps)

    def validations(self, validations: int) -> int:
        """Validations at this scale of a recipe's."""
        return validations if self.share == 1 else min(validations, _VALIDATIONS)

    def network(self, depth: int, width: int) -> tuple[int, int]:
        """(depth, width) at this scale of a network of the paper's."""
        if self.size is None:
            return depth, width
        if self.size == "mini":
            return _MINI_DEPTHS.get(depth, depth), _MINI_WIDTHS.get(width, width)
        numerator, denominator = self.size
        blocks = max(1, round((depth - 4) // 6 * numerator / denominator))
        return 6 * blocks + 4, max(1, round(width * numerator / denominator))

    def validation_images(self, num_validation: int) -> int:
        """Held-out images at this scale of a recipe's."""
        return max(int(self.share * num_validation), min(FEWEST_VALIDATION_IMAGES, num_validation))

    def bindings(self, depth: int, width: int, train_steps: int, num_validation: int) -> list[str]:
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


PLANS = {
    # Section 3.1: two models per setting, of which validation chooses one; section 3.2: ten of the baseline. AA+MT: 5 x
    # 100, 5 x 100 and 9 x 10 x 200 steps; PGD-40 beside them. Accuracies: Table 2, AT-XENT.
    "paper": Plan(
        "paper",
        (),
        "eval/aa_mt.gin",
        Passes(correct=40 + 500, standing=500 + 18_000),
        (0.85, 0.54),
        None,
        2,
        10,
        False,
        None,
    ),
    # 50, 50 and 9 x 50 steps. Accuracies: of three seeds of adversarial training, after all 600 steps.
    "mini": Plan(
        "mini",
        ("scales/mini.gin",),
        "eval/aa_mt_mini.gin",
        Passes(correct=40 + 50, standing=50 + 450),
        (0.34, 0.22),
        500,
        3,
        3,
        True,
        "mini",
    ),
}


def plan_of(scale: str, num_runs: int | None = None) -> Plan:
    """The plan of a scale, with `num_runs` models of every configuration, all evaluated, where that is not None.

    Raises:
        ValueError: for a scale that does not exist.
    """
    if scale not in PLANS:
        raise ValueError(f"Expected a scale out of {', '.join(PLANS)}. Received: {scale!r}")
    plan = PLANS[scale]
    if num_runs is not None:
        plan = plan._replace(num_runs=num_runs, num_baseline_runs=num_runs, evaluates_all=True)
    return plan


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
    """Floating-point operations of all runs of a job: of training with its validations, and of evaluation."""

    training: float
    evaluation: float

    @property
    def total(self) -> float:
        return self.training + self.evaluation


def forward_flops(plan: Plan, job: Job) -> float:
    """Operations of one image's forward pass in a job's network at the plan's size."""
    return costs.forward_flops(*plan.network(job.depth, job.width), num_classes=job.num_classes)


def step_flops(plan: Plan, job: Job) -> float:
    """Operations of one training step of a job at the plan's size of network."""
    return costs.training_flops(
        forward_flops(plan, job),
        batch_size=job.batch_size,
        num_steps=1,
        attack_steps=job.attack_steps,
        objective=job.objective,
        clean_prediction=job.clean_prediction,
    )


def cost(plan: Plan, job: Job, *, accuracy: tuple[float, float] = (1.0, 1.0)) -> Cost:
    """The `Cost` of a job at the plan's size of network and steps.

    Args:
        plan: a `Plan`.
        job: a `Job`.
        accuracy: (clean, under PGD-40) of its models, fractions: images that fall need no more of an evaluation. By
            default the most that it can be.
    """
    forward = forward_flops(plan, job)
    training = step_flops(plan, job) * plan.steps(job.train_steps)
    images = plan.validations(job.validations) * plan.validation_images(job.validation_images)
    validation = costs.attack_flops(forward, num_images=images, num_passes=job.validation_passes)
    evaluation = image_flops(plan, job, accuracy) * plan.examples
    return Cost((training + validation) * job.num_runs, evaluation * job.num_evaluated)


def image_flops(plan: Plan, job: Job, accuracy: tuple[float, float]) -> float:
    """Operations of the evaluation of a job's model, a test image: `accuracy` as in `cost`."""
    clean, robust = accuracy
    passes = plan.passes.correct * clean + plan.passes.standing * robust
    return costs.attack_flops(forward_flops(plan, job), num_images=1, num_passes=passes)
