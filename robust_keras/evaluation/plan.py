"""What an evaluation runs: attacks in order, perhaps a baseline before them, and the threat model of all."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from robust_keras import threats
from robust_keras.attacks.attack import Attack, as_attack
from robust_keras.evaluation.examples import Examples

# What networks can be searched in.
DTYPES = ("float32", "bfloat16")


class Plan(NamedTuple):
    """What runs.

    Attributes:
        attacks: records in order, the baseline first where there is one.
        has_baseline: whether the first one is a baseline, whose verdicts do not count.
        threat: what adversarial images must obey.
        individual: whether each attack runs on every correctly classified example.
        seed: of the attacks' noise.
    """

    attacks: tuple[Attack, ...]
    has_baseline: bool
    threat: threats.Threat
    individual: bool = False
    seed: int = 0

    @property
    def first(self) -> int:
        """The position of the first attack that counts."""
        return int(self.has_baseline)

    def size(self, examples: Examples) -> tuple[int, int]:
        """Of the verdicts: the numbers of attacks and of examples."""
        return len(self.attacks), len(examples.labels)

    def identity(self, examples: Examples, model: Any) -> dict[str, Any]:
        """What verdicts depend on, as JSON can hold it.

        Args:
            examples: those under attack.
            model: what tells the model from others; None where that is not known.
        """
        where = [self.threat.norm, self.threat.epsilon, self.has_baseline, self.individual, self.seed]
        attacks = [where, *([attack.name, attack.parameters] for attack in self.attacks)]
        known = {} if model is None else {"model": model}
        return {"images": examples.digest(), "attacks": attacks, **known}


def make(
    attacks: Sequence[Attack | Callable],
    baseline: Attack | Callable | None,
    threat: threats.Threat,
    *,
    search_dtype: str = "float32",
    **options: Any,
) -> Plan:
    """The `Plan` of attacks as `attacks.attack.as_attack` takes them.

    With `search_dtype='bfloat16'`, each search runs on the network in bfloat16, and then again in float32: all of its
    runs on the examples that any search broke in bfloat16 alone, and its first run on whatever stands.

    Args:
        attacks: those that count.
        baseline: one that does not; None for none.
        threat: a `threats.Threat`.
        search_dtype: what networks are searched in, 'float32' or 'bfloat16'.
        **options: see `Plan`.

    Raises:
        ValueError: for an attack that is none, has bad settings or is bound to another threat model, and for a type
            that is not searched in, or that no attack is searched in.
    """
    given = [*([] if baseline is None else [baseline]), *attacks]
    plan = Plan(tuple(map(as_attack, given)), baseline is not None, threat, **options)
    for attack in plan.attacks:
        bound = attack.threat
        if bound is not None and (bound.norm, bound.epsilon) != (threat.norm, threat.epsilon):
            raise ValueError(
                f"Expected attacks on the threat model {threat.norm} {threat.epsilon_fraction}. "
                f"Received: {attack.name} on {bound.norm} {bound.epsilon_fraction}"
            )
    if search_dtype not in DTYPES:
        raise ValueError(f"Expected search_dtype out of {', '.join(DTYPES)}. Received: {search_dtype!r}")
    if search_dtype == "float32" or any("search_dtype" in attack.parameters for attack in plan.attacks):
        return plan
    if plan.individual:
        raise ValueError("Expected search_dtype = 'float32' where attacks run individually. Received: 'bfloat16'")
    before, searched = plan.attacks[: plan.first], plan.attacks[plan.first :]
    if not any(attack.search for attack in searched):
        names = ", ".join(attack.name for attack in searched)
        raise ValueError(f"Expected AutoAttack or MultiTargeted with search_dtype = 'bfloat16'. Received: {names}")
    low = [_in(attack, search_dtype) if attack.search else attack for attack in searched]
    again = [_in(attack, "float32") for attack in searched if attack.search]
    return plan._replace(attacks=(*before, *low, *again))


def is_low(attack: Attack) -> bool:
    """Whether an attack searches on the network in bfloat16."""
    return attack.parameters.get("search_dtype") == "bfloat16"


def is_again(attack: Attack) -> bool:
    """Whether an attack searches in float32 after it did in bfloat16."""
    return attack.parameters.get("search_dtype") == "float32"


def _in(attack, dtype):
    return attack._replace(parameters={**attack.parameters, "search_dtype": dtype})
