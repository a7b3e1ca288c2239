"""Views of images in memory and on disk: what NumPy would copy."""

import numpy as np
import pytest

from robust_keras.data.readers import mapped, views

_IMAGES = np.random.RandomState(0).randint(0, 256, (13, 7, 6, 3)).astype(np.uint8)
_CHOSEN = np.array([12, 0, 5, 5, 3, 7])


@pytest.fixture(params=["in memory", "on disk"])
def images(request, tmp_path):
    if request.param == "in memory":
        return _IMAGES
    (tmp_path / "file").write_bytes(_IMAGES.tobytes())
    return mapped.MappedImages([mapped.Part(str(tmp_path / "file"), 0, 13)], _IMAGES.shape[1:])


def assert_is_view(view, expected):
    assert view.shape == expected.shape and view.dtype == np.uint8 and len(view) == len(expected)
    for index in (slice(None), slice(1, 4), slice(4, 99), np.array([3, 0, 3]), np.array([], np.int64), 2):
        found = view[index]
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, expected[index])
    np.testing.assert_array_equal(np.asarray(view), expected)
    np.testing.assert_array_equal(np.asarray(view, np.float32), expected.astype(np.float32))


def test_selected(images):
    assert_is_view(views.Selected(images, _CHOSEN), _IMAGES[_CHOSEN])


def test_selected_of_selected_looks_once(images):
    view = views.Selected(views.Selected(images, _CHOSEN), np.array([5, 1, 1, 2]))
    assert_is_view(view, _IMAGES[[7, 0, 0, 5]])
    assert view._images is images


def test_middle(images):
    # One row of seven is left out above, two below.
    assert_is_view(views.middle(images, 4), _IMAGES[:, 1:5, 1:5])
    assert_is_view(views.middle(views.Selected(images, _CHOSEN), 1), _IMAGES[_CHOSEN, 3:4, 2:3])
    assert_is_view(views.Selected(views.middle(images, 4), _CHOSEN), _IMAGES[_CHOSEN, 1:5, 1:5])


def test_the_middle_of_what_has_the_size_is_itself(images):
    square = views.middle(images, 6)
    assert views.middle(square, 6) is square and views.middle(images, None) is images
