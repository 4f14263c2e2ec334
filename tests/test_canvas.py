"""A picture measured in whole pixels."""

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from dtrak.pages.canvas import Canvas, default_style, fit


def saved(canvas, tmp_path):
    canvas.save(tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        return np.asarray(picture.convert("RGB"))


def test_images_and_rectangles_lie_where_they_are_put(tmp_path):
    canvas = Canvas(120, 90)
    pixels = torch.randint(256, (3, 4, 2), generator=torch.Generator().manual_seed(0))
    canvas.paste(30, 20, pixels.to(torch.uint8), 12)
    canvas.fill(80, 50, 10, 7, "#0d7268")
    picture = saved(canvas, tmp_path)
    assert picture.shape == (90, 120, 3)
    enlarged = pixels.movedim(0, -1).numpy().repeat(3, axis=0).repeat(3, axis=1)
    assert (picture[20:32, 30:36] == enlarged).all()
    assert (picture[50:57, 80:90] == [0x0D, 0x72, 0x68]).all()
    picture = picture.copy()
    picture[20:32, 30:36] = picture[50:57, 80:90] = 255
    assert (picture == 255).all()


def test_large_images_are_shrunk_to_fit(tmp_path):
    canvas = Canvas(60, 60)
    canvas.paste(10, 10, torch.zeros(1, 100, 50, dtype=torch.uint8), 40)
    dark = np.argwhere(saved(canvas, tmp_path)[..., 0] < 128)
    assert dark.min(0).tolist() == [10, 10]
    assert dark.max(0).tolist() == [49, 29]


@pytest.mark.parametrize("size, side", [((8, 8), 192), ((28, 20), 168), ((192, 3), 192)])
def test_fit_is_the_largest_multiple(size, side):
    assert fit(torch.zeros(1, *size), 192) == side
    assert fit(torch.zeros(1, 300, 2), 192) == 192


def test_style_is_the_default_within_and_the_users_after():
    with matplotlib.rc_context({"font.size": 40}):
        with default_style():
            assert matplotlib.rcParams["font.size"] == 10
        assert matplotlib.rcParams["font.size"] == 40
