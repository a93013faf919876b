#!/usr/bin/env python3
"""Are synthetic lesions found on the normal films held out? Writes predictions.npz for tables.py.

    python results/lesions.py runs/afire [runs/mae ...]

Each film is scored as it is and with lesions drawn by seed 0, against normal films to train on. A
lesion's pixels are those of its mask. Results lie in the run's folder lesions.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402


def load_run(folder):
    """-> models as of afire.load_models, options, Radiographs without tests on trained images."""
    models, run, trained_on = afire.load_models(folder)
    if run is None:
        raise afire.InputError(f"{folder} is not the folder of a run of afire.py")
    data = afire.load_radiographs(run.data, run.img_size, labels=run.labels, levels=run.levels)
    seen = np.isin(data.hashes, trained_on)                                    # (n,)
    data.test = data.test[~seen[data.test]]
    return models, run, data


def score_run(folder):
    """-> the arrays of predictions.npz, of 2 T images: T films, then the same with lesions."""
    models, _, data = load_run(folder)
    test = data.normal(data.test)                                              # (T,)
    normals = afire.normal_references(data)                                    # (N,)
    if min(len(test), len(normals)) < 2:
        raise afire.InputError(f"{folder} has {len(test)} normal films to test on and "
                               f"{len(normals)} to compare with: two of each are needed")
    lesioned = []
    masks = []
    for i in range(0, len(test), 64):
        films = torch.from_numpy(data.images[test[i:i + 64]]) / 255
        generator = torch.Generator().manual_seed(0)
        images, mask = afire.synthetic_lesion_mask(films, generator, offset=i)
        lesioned.append((255 * images).round().byte().numpy())
        masks.append(mask[:, 0].numpy() > 0)
    images = np.concatenate([data.images[normals], data.images[test], *lesioned])
    masks = np.concatenate([np.zeros((len(test), *images.shape[2:]), bool), *masks])
    n = len(normals)
    rows = np.arange(n, len(images))                                           # (2 T,)
    patients = np.tile(np.array(data.patients)[test], 2)
    arrays = {"images": rows, "patients": patients, "findings": np.array(["lesion"]),
              "labels": masks.any((1, 2))[:, None], "masks": masks}
    device = afire.get_device("auto")
    for name, (encoder, model) in models.items():
        model.to(device).eval().requires_grad_(False)
        maps = afire.anomaly_maps(images, rows, device, encoder, model, np.arange(n))
        arrays |= {f"{name}/{score}": grids for score, grids in maps.items()}
    return arrays


def main(argv=None):
    """Bad input ends in one sentence and status 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of afire.py pretrain")
    try:
        for folder in parser.parse_args(argv).runs:
            out = folder / "lesions"
            arrays = score_run(folder)
            out.mkdir(exist_ok=True)
            np.savez_compressed(out / "predictions.npz", **arrays)
            print(f"in {out}: predictions.npz of {len(arrays['images'])} images")
    except (afire.InputError, OSError) as error:
        print(f"lesions.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
