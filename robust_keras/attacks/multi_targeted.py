"""MultiTargeted: one wrong class after another."""

import functools

from robust_keras import losses, schedules
from robust_keras.attacks import step_rules, stepwise


@stepwise.attack
def multi_targeted(
    *, threat, num_steps=200, num_restarts=10, num_targets=9, step_rule=None, step_size=None, random_start=True
):
    """MultiTargeted (Gowal et al. 2019, https://arxiv.org/abs/1910.09338): PGD on the margin of each wrong class.

    The margin of class t is `z_t - z_y`. Of a run's `num_steps + 1` points, any misclassified one counts. Gowal et al.
    2020 do not say how they step: `step_rule` and `step_size` default to the optimiser of their released code's PGD.

    Args:
        threat: a `threats.Threat`.
        num_steps: gradient steps of a run, an int >= 1.
        num_restarts: random starts per target class, an int >= 1.
        num_targets: wrong classes of the highest clean logits to aim at; all of them where there are fewer.
        step_rule: a `StepRule`; `adam()` by default, `steepest()` for sign steps in Linf.
        step_size: in pixel units: a number, a fraction such as '2/255', or a function of the step; by default .1, .01
            from half of the steps, .0001 from three quarters.
        random_start: whether to start at random points of the ball.

    Raises:
        ValueError: for counts under 1, several restarts from one start, or a step size that is not positive.
    """
    if min(num_steps, num_restarts, num_targets) < 1:
        raise ValueError(
            "Expected num_steps, num_restarts and num_targets >= 1. "
            f"Received: {num_steps}, {num_restarts}, {num_targets}"
        )
    step_rules.check_restarts(num_restarts, random_start)
    step_rule = step_rule or step_rules.adam()
    if step_size is None:
        step_size = functools.partial(
            schedules.piecewise_constant, boundaries=(num_steps // 2, num_steps * 3 // 4), values=(0.1, 0.01, 0.0001)
        )
    step_size_fn = step_rules.step_size_fn(step_size)

    def num_targets_of(num_classes):
        return min(num_targets, num_classes - 1)

    def start(x, labels, clean_logits, seeds, run):
        return {
            # Every target once, then again: most examples that break do so before the second round.
            "target_classes": stepwise.target_class(clean_logits, labels, run % num_targets_of(clean_logits.shape[-1])),
            "x_adv": threat.random_start(x, seeds) if random_start else x,
            "rule": step_rule.init(x),
        }

    def step(logits_fn, x, labels, state, k):
        x_adv = state["x_adv"]
        logits, _, gradient = stepwise.value_and_gradient(
            logits_fn, x_adv, lambda logits: losses.targeted_margin(logits, labels, state["target_classes"])
        )
        direction, rule = step_rule.update(gradient, state["rule"], stepwise.expand(k, x), threat)
        moved = threat.project(x_adv + stepwise.expand(step_size_fn(k), x) * direction, x)
        return {**state, "x_adv": moved, "rule": rule}, x_adv, losses.is_wrong(logits, labels)

    def num_runs(num_classes):
        return num_restarts * num_targets_of(num_classes)

    # The first target is the strongest wrong class, whose margin is the margin.
    return stepwise.Search("multi-targeted", num_runs, num_steps + 1, start, step, losses.margin)
