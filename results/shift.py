#!/usr/bin/env python3
"""Makes a test set of reframed images: those held out, zoomed by up to 20 %, moved by up to 6 %.

    python results/shift.py --data chest_xray/train --labels people.csv --out shifted
    python afire.py eval --ckpt runs/afire --data shifted --labels shifted/labels.csv \\
        --out runs/afire/shifted

The images to train on are linked as they are; those held out are read as squares of 256 px, without
their masks. Patients and X-ray machines differ: does a model that was chosen on the images held out
still work where the chest is framed in another way?
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torchvision.transforms.v2.functional as TF
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402
from runs import exit_on_bad_input  # noqa: E402


def move(image, random):
    """A square image, zoomed and moved; what comes in from outside repeats the border."""
    side = image.height
    cropped = round(side / random.uniform(1, 1.2))
    y, x = random.uniform(-0.06, 0.06, 2)
    margin = side // 10
    top = margin + round((side - cropped) / 2 + y * side)
    left = margin + round((side - cropped) / 2 + x * side)
    padded = TF.pad(image, margin, padding_mode="edge")
    return TF.resized_crop(padded, top, left, cropped, cropped, [side, side])


def reframe(options):
    """Writes the folder options.out, which must be new."""
    out = Path(options.out)
    if out.exists():
        raise afire.InputError(f"{out} exists: name a new folder as --out")
    data = afire.load_radiographs(options.data, 64, labels=options.labels)
    if not len(data.test):
        raise afire.InputError(f"{options.labels} holds no image out: nothing to reframe")
    out.mkdir(parents=True)
    random = np.random.default_rng(0)
    rows = []
    used = data.used()
    for split, members in ("train", data.train), ("test", data.test):
        for row in members:
            source = Path(options.data, data.names[row]).absolute()
            number = np.searchsorted(used, row)            # unusable and equal files do not count
            name = f"{number}.png" if split == "test" else f"{number}{source.suffix}"
            if split == "test":
                move(Image.fromarray(afire.read_image(source, 256)), random).save(out / name)
            else:
                (out / name).symlink_to(source)
            rows.append([name, data.findings_of(row), data.patients[row], split])
    with open(out / "labels.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["image", "findings", "patient", "split"], *rows])
    print(f"in {out}: {len(data.test)} reframed images to test on, {len(data.train)} as they are")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of radiographs")
    parser.add_argument("--labels", required=True, help="CSV, as for afire.py")
    parser.add_argument("--out", required=True, help="new folder for the images and labels.csv")
    options = parser.parse_args(argv)
    with exit_on_bad_input("shift.py"):
        reframe(options)


if __name__ == "__main__":
    main()
