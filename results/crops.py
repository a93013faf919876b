#!/usr/bin/env python3
"""Pre-trains AFiRe with crops in the place of lesions: is it worth it that lesions do not move x?

    python results/crops.py pretrain --out runs/crops ...

The other options are those of `afire.py pretrain`; resume such a run with this script. A crop has
no lesion mask: no token is abnormal, and L_cate is 0. Compare such a run with one of lesions
without L_cate, by `afire.py pretrain --category-weight 0`.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402


def crop(images, generator=None, centre=None, offset=0):
    """A square of 0.5 to 0.85 of the side, turned by up to 10 degrees, resized to the image [D].

    The arguments are those of synthetic_lesion_mask; centre is not used. Returns crops and mask,
    shaped like images (B, 1, S, S). The mask is empty: no token is abnormal, and L_cate is 0.
    """
    uniform = torch.rand(offset + len(images), 4, generator=generator)[offset:]
    side, angle, x, y = uniform.to(images.device).unbind(1)                    # all (B,)
    side = 0.5 + 0.35 * side
    angle = math.radians(10) * (2 * angle - 1)
    cos = side * angle.cos()
    sin = side * angle.sin()
    room = 1 - cos - sin.abs()                             # keeps the corners inside the image
    x = room * (2 * x - 1)
    y = room * (2 * y - 1)
    affine = torch.stack([cos, -sin, x, sin, cos, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, images.shape, align_corners=False)            # (B, S, S, 2)
    crops = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return crops, torch.zeros_like(images)


def main(argv=None):
    """afire.main with crops in the place of lesions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="other options: python afire.py pretrain --help")
    parser.add_argument("command", choices=["pretrain"])
    _, others = parser.parse_known_args(argv)
    afire_pretrain = afire.pretrain

    def pretrain(options):
        options.method = "crops"
        afire.synthetic_lesion_mask = crop
        afire_pretrain(options)

    afire.pretrain = pretrain
    afire.main(["pretrain", *others])


if __name__ == "__main__":
    main()
