"""One search at several radii, compiled once: each radius is a run of its own.

attack = at_radii(functools.partial(apgd, num_steps=40), threat=linf, shares=(0.5, 1.0, 2.0))
"""

import functools
from collections.abc import Callable, Sequence

import tensorflow as tf

from robust_keras import threats
from robust_keras.attacks import stepwise
from robust_keras.attacks.attack import Attack, as_attack


def at_radii(given: Callable, *, threat: threats.Threat, shares: Sequence[float], random_start: bool = True) -> Attack:
    """An attack whose run r is that of a search within the share `shares[r]` of a threat model's radius.

    Args:
        given: a search of one run, such as `apgd`, but for its `threat`, which may be a `threats.part_of` one.
        threat: a `threats.Threat`.
        shares: of its radius; they may exceed 1.
        random_start: whether runs start as those of `given` do, not at the images themselves.

    Returns:
        The record of a search of as many runs as there are shares.

    Raises:
        ValueError: see `attack.as_attack`; for an attack that is no search.
    """

    def search_of(threat):
        search = as_attack(functools.partial(given, threat=threat)).search
        if search is None:
            raise ValueError(f"Expected a search, such as apgd. Received: {given!r}")
        return search

    def part(x, share):
        return search_of(threats.part_of(threat, stepwise.expand(share, x)))

    def start(x, labels, clean_logits, seeds, run):
        share = tf.gather(tf.constant(shares, tf.float32), run)
        begun = part(x, share if random_start else tf.zeros_like(share))
        return {"share": share, "of_part": begun.start(x, labels, clean_logits, seeds, tf.zeros_like(run))}

    def step(logits_fn, x, labels, state, k):
        following, x_adv, broken = part(x, state["share"]).step(logits_fn, x, labels, state["of_part"], k)
        return {"share": state["share"], "of_part": following}, x_adv, broken

    whole = search_of(threat)
    search = stepwise.Search(whole.name, lambda num_classes: len(shares), whole.num_steps, start, step, whole.loss_fn)
    return Attack(whole.name, threat, {}, given, search, whole.loss_fn)
