"""Random points of the ball: what an attack that knows nothing of the classifier finds."""

from robust_keras import losses, noise, threats
from robust_keras.attacks import stepwise


@stepwise.attack
def random_noise(*, threat: threats.Threat, num_draws: int = 10) -> stepwise.Search:
    """Points drawn uniformly from the ball and clipped to [0, 1], each by itself: 'random-noise'.

    Args:
        threat: a `threats.Threat`.
        num_draws: of each example, an int >= 1.

    Raises:
        ValueError: for num_draws under 1.
    """
    stepwise.check_counts(num_draws=num_draws)

    def start(x, labels, clean_logits, seeds, run):
        return {"seeds": seeds}

    def step(logits_fn, x, labels, state, k):
        x_adv = threat.random_start(x, noise.fold_in(state["seeds"], k))
        return state, x_adv, losses.is_wrong(logits_fn(x_adv), labels)

    return stepwise.Search("random-noise", lambda num_classes: 1, num_draws, start, step)
