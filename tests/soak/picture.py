"""The soak's picture on a dark ground: python -m tests.soak.picture examples/soak/soak.png

A report draws its pictures as SVG, with rules for a dark page. Of the soak of the page the picture is kept alone: its
dark variant is made of its pixels. Curves keep their colours, and the ground shines through them as in the light.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.image
import numpy as np
from matplotlib.colors import to_rgb

from ds_moe_ep.report.plots.style import FAINT, GRID, GROUND, IN_THE_DARK, INK

GREYS = (INK, FAINT, GRID, GROUND)  # of what is written and ruled, dark to light
ALIKE = 0.02  # how far the channels of a grey may lie apart


def in_the_dark(pixels: np.ndarray) -> np.ndarray:
    """The picture [height, width, channels] of values to 1 with the report's dark ground and ink, same shape.

    A grey lies between the colours of ink and ground, by its lightness. Each colour of a curve has a channel of 0, so
    that the least channel of a pixel is the share of the ground in it.
    """
    colors = pixels[..., :3]
    lightness = colors.mean(-1)
    light = [float(np.mean(to_rgb(grey))) for grey in GREYS]
    dark = np.array([to_rgb(IN_THE_DARK[grey]) for grey in GREYS])
    greys = np.stack([np.interp(lightness, light, dark[:, channel]) for channel in range(3)], -1)
    ground = colors.min(-1, keepdims=True)
    curves = colors - ground + ground * np.array(to_rgb(IN_THE_DARK[GROUND]))
    is_grey = np.ptp(colors, axis=-1) <= ALIKE
    changed = np.where(is_grey[..., None], greys, curves).clip(0, 1)
    return np.concatenate((changed, pixels[..., 3:]), -1)


def dark_path(path: Path) -> Path:
    """The name of a picture's dark variant."""
    return path.with_stem(f"{path.stem}-dark")


def main() -> None:
    """Writes the dark variants of the pictures that are named, beside them."""
    for path in map(Path, sys.argv[1:]):
        matplotlib.image.imsave(
            dark_path(path), in_the_dark(matplotlib.image.imread(path)), metadata={"Software": None}
        )
        print(dark_path(path))


if __name__ == "__main__":
    main()
