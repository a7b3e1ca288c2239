"""`.keras` files, looked at before Keras loads them."""

from robust_keras import foreign_files


def check(path: str) -> None:
    """Refuses what is no regular file; a link to one may be typed.

    Raises:
        ValueError: naming what it is.
    """
    foreign_files.check_regular(path, follow=True)
