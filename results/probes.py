#!/usr/bin/env python3
"""Does an encoder show more than the pixels of the image do, with few labels and as a detector?

    python results/probes.py runs/afire [runs/mae ...]
    python results/probes.py runs/afire --data chest_xray --labels published.csv --into published

Ridge regression on the tokens averaged in 1, 2 x 2 and 4 x 4 cells, trained and untrained, and on
means of 4 x 4, 8 x 8 and 16 x 16 blocks of the same images. The penalty is one of 1 to 10,000 and
is chosen for each subset of the labels by its leave-one-out errors; the subsets are those of
`afire.py eval`. Three anomaly scores of the 8 x 8 block means, by the same normal images as in
`afire.py eval`:

    nearest     mean distance to the five nearest normal images
    levels      standardised by block, mean of the highest quarter of the blocks
    components  Mahalanobis distance in the 32 first principal components

RUN/eval/probes.npz, or RUN/INTO/probes.npz, has the score of every test image. Prints AUROC, and
its differences to the best of the pixels and to the first run; tables.py adds intervals.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402
from runs import exit_on_bad_input, load_run  # noqa: E402

PENALTIES = (1, 10, 100, 1000, 10000)
CELLS = (1, 2, 4)                                          # on a side, of the grid of tokens
BLOCKS = (4, 8, 16)                                        # on a side, of the image


def ridge_with_chosen_penalty(x, y, penalties=PENALTIES):
    """Ridge regression on standardised x, by the penalty of the smallest leave-one-out errors.

    x (n, D), y (n, F) bool -> weight (D, F), bias (F,), penalty.
    """
    n, dim = x.shape
    mean = x.mean(0)
    std = x.std(0, correction=0)
    std = torch.where(std > 0, std, 1)
    z = (x - mean) / std
    y = y.to(x.dtype)
    targets = y - y.mean(0)
    # z = U V^T with orthogonal columns in U, whose squared lengths are the eigenvalues.
    if n < dim:
        eigenvalues, vectors = torch.linalg.eigh(z @ z.T)
        kept = eigenvalues > 1e-6 * eigenvalues[-1]
        eigenvalues = eigenvalues[kept]
        u = vectors[:, kept] * eigenvalues.sqrt()                              # (n, r)
        v = z.T @ vectors[:, kept] / eigenvalues.sqrt()                        # (D, r)
    else:
        eigenvalues, v = torch.linalg.eigh(z.T @ z)
        eigenvalues = eigenvalues.clamp_min(0)
        u = z @ v
    projected = u.T @ targets                                                  # (r, F)
    errors = []
    for penalty in penalties:
        fitted = u @ (projected / (eigenvalues + penalty).unsqueeze(1))        # (n, F)
        leverage = 1 / n + (u ** 2 / (eigenvalues + penalty)).sum(1, keepdim=True)
        errors.append(((targets - fitted) / (1 - leverage)).square().mean())
    penalty = penalties[torch.stack(errors).argmin()]
    weight = v @ (projected / (eigenvalues + penalty).unsqueeze(1)) / std.unsqueeze(1)
    return weight, y.mean(0) - mean @ weight, penalty


def probe_scores(x, data):
    """Test scores of ridge regression with few labels: -> {"1%": (repeats, T, F)}.

    x (n, D): features of data.used().
    """
    used = data.used()

    def features_of(rows):
        return x[np.searchsorted(used, rows)].float()

    def learn(rows):
        truth = torch.from_numpy(data.labels[rows])
        weight, bias, _ = ridge_with_chosen_penalty(features_of(rows), truth)
        return (features_of(data.test) @ weight + bias).numpy()                # (T, F)

    return afire.learn_from_few(learn, data.labels, data.train)


@torch.no_grad()
def pooled_tokens(encoder, images, rows, device, bar):
    """Features of images[rows], computed once: -> {cells: (n, D * cells ** 2), half precision}."""
    parts = {cells: [] for cells in CELLS}
    for batch in np.array_split(rows, 1 + len(rows) // 64):
        tokens = afire.features(encoder, afire.to_device(images[batch], device) / 255)
        for cells in CELLS:
            parts[cells].append(afire.average_in_cells(tokens, cells).half().cpu())
        bar.update(len(batch))
    return {cells: torch.cat(part) for cells, part in parts.items()}


def block_means(images, blocks):
    """Means of blocks x blocks parts of images (n, 1, S, S) uint8: -> (n, blocks ** 2)."""
    return F.adaptive_avg_pool2d(torch.from_numpy(images).float(), blocks).flatten(1)


def pixel_anomaly_scores(x, references, components=32):
    """How abnormal block means (T, D) are by those of normal images (N, D): -> {score: (T,)}."""
    mean = references.mean(0)
    std = references.std(0, correction=0) + 1e-6
    _, singular, vectors = torch.linalg.svd(references - mean, full_matrices=False)
    kept = min(components, int((singular > 1e-3).sum()))
    deviation = singular[:kept] / len(references) ** 0.5   # of a component, from 0
    distance = ((x - mean) @ vectors[:kept].T / deviation).square().sum(1).sqrt()
    nearest = afire.neighbour_score(x.unsqueeze(1), references.unsqueeze(1))   # (T, 1)
    return {"nearest": nearest[:, 0].numpy(),
            "levels": afire.image_scores(((x - mean) / std).numpy()),
            "components": distance.numpy()}


def scores_of_pixels(data):
    """-> {"16 x 16 1%": (repeats, T, F), ..., "nearest": (T,), ...}."""
    scores = {}
    for blocks in BLOCKS:
        means = block_means(data.images[data.used()], blocks)
        for fraction, results in probe_scores(means, data).items():
            scores[f"{blocks} x {blocks} {fraction}"] = results
    normals = afire.normal_references(data)
    return scores | pixel_anomaly_scores(block_means(data.images[data.test], 8),
                                         block_means(data.images[normals], 8))


def score_run(folder, options):
    """-> the arrays of probes.npz."""
    if options.data:
        path = afire.find_checkpoint(folder)
        models, run, trained_on = afire.load_models(path)
        size = models["checkpoint"][0].config["img_size"]
        data = afire.load_radiographs(options.data, size, labels=options.labels,
                                      levels=afire.grey_levels(None, run, path)[0])
        data.test = afire.without_pretrained(data, np.isin(data.hashes, trained_on))
    else:
        models, _, data = load_run(folder)
    normals = afire.normal_references(data)
    if not data.findings or min(len(data.test), len(normals)) < 2:
        raise afire.InputError(f"{folder}: {len(data.findings)} findings, {len(normals)} normal "
                               f"images in train and {len(data.test)} images in test are too few: "
                               "give --data and --labels with more")
    arrays = {"images": np.array(data.names)[data.test],
              "patients": np.array(data.patients)[data.test],
              "findings": np.array(data.findings), "labels": data.labels[data.test]}
    if options.trained_only:
        models.pop("random_init")
    device = afire.get_device("auto")
    with tqdm(total=len(models) * len(data.used()), desc="features", unit="image",
              mininterval=1) as bar:
        for name, (encoder, _) in models.items():
            encoder.to(device).eval()
            pooled = pooled_tokens(encoder, data.images, data.used(), device, bar)
            for cells, x in pooled.items():
                for fraction, scores in probe_scores(x, data).items():
                    arrays[f"{name}/{cells} x {cells} {fraction}"] = scores
    return arrays | {f"pixels/{name}": scores for name, scores in scores_of_pixels(data).items()}


def areas_of(arrays):
    """AUROC of every array of scores, a mean over repeats and findings: -> {name: float}."""
    labels = arrays["labels"]
    areas = {}
    for name, scores in arrays.items():
        if "%" in name:
            areas[name] = float(afire.nan_mean(afire.auroc_by_finding(scores, labels)))
        elif name.startswith("pixels/"):
            areas[name] = afire.auroc(scores, labels.any(1))
    return areas


def print_areas(title, areas, first):
    """A line for each AUROC, with its differences to the best of the pixels and to the first run.

    areas, first: as of areas_of, of this run and of the first.
    """
    print(f"{title}\n{'AUROC':31}{'':9}{'- best pixels':>15}{'- first run':>13}")
    for name, area in areas.items():
        fraction = name.rpartition(" ")[2]
        pixels = [value for key, value in areas.items()
                  if key.startswith("pixels/") and ("%" in key) == ("%" in name)
                  and (key.endswith(f" {fraction}") or "%" not in name)]
        print(f"{name:31}{area:9.3f}{area - max(pixels):+15.3f}"
              f"{area - first.get(name, np.nan):+13.3f}")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of afire.py pretrain")
    parser.add_argument("--data", help="folder of another test set, by default the run's own data")
    parser.add_argument("--labels", help="its table, as for afire.py")
    parser.add_argument("--into", default="eval", help="subfolder of the run (default: eval)")
    parser.add_argument("--trained-only", action="store_true", help="not the untrained encoder too")
    options = parser.parse_args(argv)
    with exit_on_bad_input("probes.py"):
        if bool(options.data) != bool(options.labels):
            raise afire.InputError("another test set needs both --data and --labels")
        first = {}
        for folder in options.runs:
            arrays = score_run(folder, options)
            areas = areas_of(arrays)
            first = first or areas
            print_areas(folder, areas, first)
            out = folder / options.into
            out.mkdir(exist_ok=True)
            np.savez_compressed(out / "probes.npz", **arrays)
            print(f"in {out}: probes.npz of {len(arrays['images'])} images")


if __name__ == "__main__":
    main()
