"""MultiTargeted: one wrong class after another."""

import functools
from collections.abc import Callable

from robust_keras import losses, threats
from robust_keras.attacks import step_rules, stepwise


@stepwise.attack
def multi_targeted(
    *,
    threat: threats.Threat,
    num_steps: int = 200,
    num_restarts: int = 10,
    num_targets: int = 9,
    step_rule: step_rules.StepRule | step_rules.ByNorm | None = None,
    step_size: float | str | Callable | dict | None = None,
    random_start: bool = True,
) -> stepwise.Search:
    """MultiTargeted (Gowal et al. 2019, https://arxiv.org/abs/1910.09338): PGD on the margin of each wrong class.

    The margin of class t is `z_t - z_y`. Of a run's `num_steps + 1` points, any misclassified one counts. Gowal et al.
    2020 say neither how it steps nor how many classes it aims at: that is this project's choice.

    Args:
        threat: a `threats.Threat`.
        num_steps: gradient steps of a run, an int >= 1.
        num_restarts: random starts per target class, an int >= 1.
        num_targets: wrong classes of the highest clean logits to aim at; all of them where there are fewer.
        step_rule: a `StepRule` or, by default, `step_rules.by_norm()`: in Linf Adam, as in the paper's released code of
            PGD. For a given `step_size` alone: Adam in Linf, elsewhere steps of that length.
        step_size: as of `pgd.pgd`; by default .1, .01 from half of the steps, .0001 from three quarters, for steps of
            `step_rules.by_norm`.
        random_start: whether to start at random points of the ball.

    Raises:
        ValueError: for counts under 1, several restarts from one start, or a step size that is not positive.
    """
    stepwise.check_counts(num_steps=num_steps, num_restarts=num_restarts, num_targets=num_targets)
    step_rules.check_restarts(num_restarts, random_start)
    steps = step_rules.resolve(step_rule, step_size, threat=threat, num_steps=num_steps, default=step_rules.adam)

    def num_targets_of(num_classes):
        return min(num_targets, num_classes - 1)

    def start(x, labels, clean_logits, seeds, run):
        # Every target once, then again: most examples that break do so before the second round.
        target_classes = stepwise.target_class(clean_logits, labels, run % num_targets_of(clean_logits.shape[-1]))
        x_adv = threat.random_start(x, seeds) if random_start else x
        return {"target_classes": target_classes, "x_adv": x_adv, "rule": steps[0].init(x)}

    return stepwise.Search(
        name="multi-targeted",
        num_runs=lambda num_classes: num_restarts * num_targets_of(num_classes),
        num_steps=num_steps + 1,
        start=start,
        step=functools.partial(_step, threat, *steps),
        loss_fn=losses.margin,  # The first target is the strongest wrong class.
    )


def _step(threat, step_rule, step_size_fn, logits_fn, x, labels, state, k):
    x_adv = state["x_adv"]
    logits, _, gradient = stepwise.value_and_gradient(
        logits_fn, x_adv, lambda logits: losses.targeted_margin(logits, labels, state["target_classes"])
    )
    gradient = threats.inwards(gradient, x_adv, threat)
    direction, rule_state = step_rule.update(gradient, state["rule"], stepwise.expand(k, x), threat)
    moved = threat.project(x_adv + stepwise.expand(step_size_fn(k), x) * direction, x)
    return {**state, "x_adv": moved, "rule": rule_state}, x_adv, losses.is_wrong(logits, labels)
