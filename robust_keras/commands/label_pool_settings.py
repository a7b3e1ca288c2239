"""The settings of the labelling of a pool as gin binds them, `label_pool.sizes` and so on, which become records."""

from collections.abc import Callable
from typing import NamedTuple

from robust_keras.pseudo_labelling import pseudo_labels, recipes

_SCORING, _LAYOUT, _SETS = recipes.Scoring(), recipes.Layout(), recipes.Sets._field_defaults


class ConfiguredLabelling(NamedTuple):
    """The labelling of a pool that only wants its classifier and its folder.

    Attributes:
        recipe: a `recipes.Recipe`.
        sets: a `recipes.Sets`.
        layout: a `recipes.Layout`.
    """

    recipe: recipes.Recipe
    sets: recipes.Sets
    layout: recipes.Layout

    def __call__(
        self, *, classifier: Callable, workdir: str, share: recipes.Share, data_dir: str | None = None
    ) -> list[str]:
        """See `pseudo_labels.label_pool`."""
        return pseudo_labels.label_pool(
            classifier=classifier, workdir=workdir, share=share, data_dir=data_dir, **self._asdict()
        )


def label_pool(
    *,
    pool: str,
    test_set: str,
    sizes: tuple,
    near_duplicate: float = _SCORING.near_duplicate,
    licence: str | None = _SETS["licence"],
    allow_chance: bool = _SETS["allow_chance"],
    batch_size: int = _SCORING.batch_size,
    chunk_size: int = _SCORING.chunk_size,
    progress: bool = _LAYOUT.progress,
    cache_dir: str | None = _LAYOUT.cache_dir,
    strategy: str = _LAYOUT.strategy,
    tpu: str | None = _LAYOUT.tpu,
) -> ConfiguredLabelling:
    """The labelling that these settings are; `pseudo_labelling.records` says what each means."""
    scoring = recipes.Scoring(near_duplicate, batch_size, chunk_size)
    return ConfiguredLabelling(
        recipe=recipes.Recipe(pool, test_set, scoring),
        sets=recipes.Sets(sizes, licence, allow_chance),
        layout=recipes.Layout(strategy, tpu, cache_dir, progress),
    )
