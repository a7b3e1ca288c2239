"""Gradient attacks on any callable that returns logits.

    linf = threat(norm="Linf", epsilon="8/255")
    seeds = noise.example_seeds(run_seed=0, step=0, indices=tf.range(len(x)))
    x_adv = pgd(model, x, labels, threat=linf, loss_fn=cross_entropy, num_steps=10, step_size="2/255", seeds=seeds)

An attack is a loss, which it ascends, a step rule, a start and the threat model's projection.
"""

from collections.abc import Callable

import tensorflow as tf

from robust_keras import losses, noise, threats
from robust_keras.attacks import step_rules, stepwise


def pgd(
    logits_fn: Callable,
    x: tf.Tensor,
    targets: tf.Tensor,
    *,
    threat: threats.Threat,
    loss_fn: Callable,
    num_steps: int,
    seeds: tf.Tensor,
    step_size: float | str | Callable | dict | None = None,
    step_rule: step_rules.StepRule | step_rules.ByNorm | None = None,
    num_restarts: int = 1,
    random_start: bool = True,
) -> tf.Tensor:
    """Projected gradient ascent of a loss inside a threat model (Madry et al. 2017; the paper's equation 2).

    x_0 = a random point of the ball (or x itself); x_{k+1} = project(x_k + step_size * direction(gradient)). The last
    iterate is returned. Of several restarts, an example keeps the one that is misclassified, and among equals the one
    of the highest loss.

    Args:
        logits_fn: images `[batch, ...]` to logits `[batch, num_classes]`.
        x: float32 images `[batch, ...]` in [0, 1].
        targets: what to move away from, as losses take it: labels, or class probabilities.
        threat: a `threats.Threat`.
        loss_fn: `(logits, targets) -> [batch]`, ascended.
        num_steps: gradient steps, an int >= 1.
        seeds: int32 `[batch, 2]`, one per example.
        step_size: in pixel units: a number, a fraction such as '2/255', a function of the step (int32 scalar), or one
            of these by norm. By default .1, .01 from half of the steps, .0001 from three quarters, for `by_norm`.
        step_rule: a `StepRule` or `step_rules.by_norm()`; by default the steepest direction of the norm for a given
            `step_size` (in L1 spread over some pixels), else `by_norm()`.
        num_restarts: independent starts, an int >= 1.
        random_start: whether to start at a random point of the ball.

    Returns:
        float32 images like `x`, inside the ball and [0, 1]; no gradient flows through them.

    Raises:
        ValueError: for images or targets that are none, num_steps or num_restarts under 1, several restarts from one
            and the same start, or a step size that is not positive.
    """
    rule, step_size_fn = _steps(threat, num_steps, step_size, step_rule, num_restarts, random_start)
    x, targets = threats.check_images(x, threat), losses.as_targets(targets)

    def run(restart):
        def step(k, x_adv, state):
            gradient = stepwise.value_and_gradient(logits_fn, x_adv, lambda logits: loss_fn(logits, targets))[2]
            direction, state = rule.update(threats.inwards(gradient, x_adv, threat), state, k, threat)
            return k + 1, threat.project(x_adv + step_size_fn(k) * direction, x), state

        x_adv = threat.random_start(x, noise.fold_in(seeds, restart)) if random_start else x
        start = (tf.constant(0), x_adv, rule.init(x))
        return tf.while_loop(lambda k, *_: k < num_steps, step, start, maximum_iterations=num_steps)[1]

    best = run(0) if num_restarts == 1 else _best_of(run, num_restarts, logits_fn, x, targets, loss_fn)
    return tf.stop_gradient(best)


def _steps(threat, num_steps, step_size, step_rule, num_restarts, random_start, **_):
    """The rule and the sizes of steps that settings of `pgd` mean, which it checks."""
    stepwise.check_counts(num_steps=num_steps, num_restarts=num_restarts)
    step_rules.check_restarts(num_restarts, random_start)
    return step_rules.resolve(step_rule, step_size, threat=threat, num_steps=num_steps)


vars(pgd)["check"] = _steps  # For `attack.as_attack`, before any work.


def _best_of(run, num_restarts, logits_fn, x, targets, loss_fn):
    """Of `run(0)`, `run(1)`, ... each example's misclassified one, and among equals that of the highest loss."""
    labels = losses.as_labels(targets)

    def restart(r, best, best_broken, best_loss):
        x_adv = run(r)
        logits = logits_fn(x_adv)
        broken, loss = losses.is_wrong(logits, labels), losses.nan_is_lowest(loss_fn(logits, targets))
        better = (broken & ~best_broken) | (tf.equal(broken, best_broken) & (loss > best_loss))
        best = stepwise.choose(better, x_adv, best)
        return r + 1, best, broken | best_broken, tf.where(better, loss, best_loss)

    nothing = (tf.constant(0), x, tf.zeros_like(labels, tf.bool), tf.fill(tf.shape(labels), -float("inf")))
    return tf.while_loop(lambda r, *_: r < num_restarts, restart, nothing, maximum_iterations=num_restarts)[1]
