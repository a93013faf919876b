#!/usr/bin/env python3
"""Are synthetic lesions found in the normal images held out? Writes predictions.npz for tables.py.

    python results/lesions.py runs/afire [runs/mae ...]

Each image is scored as it is and with lesions by seed 0, against normal images to train on. A
lesion's pixels are those of its mask. Results lie in the run's folder lesions.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402


@contextlib.contextmanager
def exit_on_bad_input(script):
    """Within it, bad input ends the script in one sentence and status 2."""
    try:
        yield
    except afire.InputError as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{script}: cannot use {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def load_run(folder):
    """-> models as of afire.load_models, options, Radiographs without tests on trained patients."""
    models, run, trained_on = afire.load_models(folder)
    if run is None:
        raise afire.InputError(f"{folder} is an encoder alone: name the folder of a run, as "
                               "`afire.py pretrain` leaves it")
    data = afire.load_radiographs(run.data, run.img_size, labels=run.labels, levels=run.levels,
                                  all_normal=not run.labels)
    missing = set(run.images).difference(data.hashes)
    if missing:
        raise afire.InputError(f"{len(missing)} of the {len(run.images)} images that {folder} was "
                               f"pre-trained on are not in {run.data}: start this script in the "
                               "folder where the run was started")
    data.test = afire.without_pretrained(data, np.isin(data.hashes, trained_on))
    return models, run, data


def add_lesions(images, seed=0):
    """AFiRe's lesions: images (n, 1, S, S) uint8 -> lesioned (n, 1, S, S), masks (n, S, S) bool."""
    lesioned = []
    masks = []
    for i in range(0, len(images), 64):
        part = torch.from_numpy(images[i:i + 64]) / 255
        generator = torch.Generator().manual_seed(seed)
        x, mask = afire.synthetic_lesion_mask(part, generator, offset=i)
        lesioned.append((255 * x).round().byte().numpy())
        masks.append(mask[:, 0].numpy() > 0)
    return np.concatenate(lesioned), np.concatenate(masks)


def score_run(folder):
    """-> the arrays of predictions.npz, of 2 T images: T as they are, then with lesions."""
    models, _, data = load_run(folder)
    test = data.normal(data.test)                                              # (T,)
    normals = afire.normal_references(data)                                    # (N,)
    if min(len(test), len(normals)) < 2:
        raise afire.InputError(f"{folder} has {len(test)} normal images held out and "
                               f"{len(normals)} to compare with: two of each are needed, by a "
                               "table whose split holds some out")
    lesioned, masks = add_lesions(data.images[test])
    images = np.concatenate([data.images[normals], data.images[test], lesioned])
    masks = np.concatenate([np.zeros_like(masks), masks])
    n = len(normals)
    rows = np.arange(n, len(images))                                           # (2 T,)
    patients = np.tile(np.array(data.patients)[test], 2)
    arrays = {"images": rows, "patients": patients, "findings": np.array(["lesion"]),
              "labels": masks.any((1, 2))[:, None], "measured": np.ones(len(rows), bool),
              "masks": masks}
    device = afire.get_device("auto")
    with tqdm(total=2 * (2 * n + len(rows)), desc="lesions", unit="image", mininterval=1) as bar:
        for name, (encoder, model) in models.items():
            model.to(device).eval().requires_grad_(False)
            maps = afire.anomaly_maps(images, rows, device, encoder, model, np.arange(n), bar)
            arrays |= {f"{name}/{score}": grids for score, grids in maps.items()}
    return arrays


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of afire.py pretrain")
    options = parser.parse_args(argv)
    with exit_on_bad_input("lesions.py"):
        for folder in options.runs:
            arrays = score_run(folder)
            out = folder / "lesions"
            out.mkdir(exist_ok=True)
            np.savez_compressed(out / "predictions.npz", **arrays)
            print(f"in {out}: predictions.npz of {len(arrays['images'])} images")


if __name__ == "__main__":
    main()
