#!/usr/bin/env python3
"""Makes Markdown tables of AUROC from the predictions.npz that `afire.py eval` writes.

    python results/tables.py AFiRe=runs/a0/eval,runs/a1/eval Crops=runs/c0/eval,runs/c1/eval

With --without REGEX, images whose names match are left out.
Each name has one run per seed, with the same seeds in the same order. The first table shows means
over runs (lowest to highest), the second one the mean difference to the first name's run with the
same seed (95 % interval by a bootstrap over patients; all runs see the patients that are drawn).
The row "untrained" is of the first name's architecture. Cohesion, a silhouette, is taken from the
metrics.json beside predictions.npz, without an interval.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402

COLUMNS = {"linear 1%": "probe, 1 %", "linear 10%": "probe, 10 %", "linear 100%": "probe, 100 %",
           "finetune 10%": "fine-tuned, 10 %", "prototype": "images by prototype",
           "restoration": "images by restoration", "neighbours": "images by neighbours",
           "pixels": "pixels by the best score", "cohesion": "cohesion"}


def read_run(file, without):
    """predictions.npz without the images that match the regular expression, and cohesion."""
    run = dict(np.load(file))
    if without:
        kept = [not re.search(without, str(name)) for name in run["images"]]
        for key, array in run.items():
            if key != "findings":
                run[key] = array[:, kept] if "%" in key else array[kept]
    metrics = file.with_name("metrics.json")
    if metrics.exists():
        for network, report in json.loads(metrics.read_text()).items():
            run[f"{network}/cohesion"] = np.array(report["cohesion"], float)
    return run


def read_runs(arguments, without=None):
    """["name=folder,folder", ...] -> {name: [predictions, ...]}, all of the same test images."""
    runs = {}
    for argument in arguments:
        name, _, folders = argument.partition("=")
        if not folders or name in (*runs, "untrained"):
            raise afire.InputError(f"{argument}: write NAME=RUN,RUN, and use a name only once")
        files = [Path(folder, "predictions.npz") for folder in folders.split(",")]
        runs[name] = [read_run(file, without) for file in files]
        first = next(iter(runs.values()))
        if len(runs[name]) != len(first):
            raise afire.InputError(f"{name} has {len(runs[name])} runs, but the first name has "
                                   f"{len(first)}: give every name one run per seed")
        for key in "images", "patients", "findings", "labels":
            if not all(np.array_equal(run[key], first[0][key]) for run in runs[name]):
                raise afire.InputError(f"the test part of {argument} has other {key} than the "
                                       "first run: evaluate all runs on the same data")
    return runs


def draw_images(patients, resamples=200):
    """How often each image is drawn: (1 + resamples, T). Row 0 draws all images once."""
    _, person = np.unique(patients, return_inverse=True)
    n = person.max() + 1
    random = np.random.default_rng(0)
    draws = [np.bincount(random.integers(n, size=n), minlength=n)[person] for _ in range(resamples)]
    return np.stack([np.ones_like(person), *draws])


def auroc(scores, truth, draws):
    """AUROC of each draw: scores and truth (T,) or (T, pixels), draws (R, T) -> (R,)."""
    areas = np.full(len(draws), np.nan)
    if np.isnan(scores).any():
        return areas
    _, rank = np.unique(scores.ravel(), return_inverse=True)
    for i, counts in enumerate(draws):
        weight = counts.repeat(scores.size // len(scores))
        positive = np.bincount(rank, weight * truth.ravel())
        negative = np.bincount(rank, weight * ~truth.ravel())
        below = negative.cumsum() - negative / 2                       # ties count half
        if positive.any() and negative.any():
            areas[i] = (positive * below).sum() / positive.sum() / negative.sum()
    return areas


def columns_of(run, network, draws):
    """AUROC in all COLUMNS, NaN where the run lacks one: -> (columns, R)."""
    labels = run["labels"]                                                     # (T, F)
    abnormal = labels.any(1)
    areas = {}
    pixels = []
    for key in COLUMNS:
        scores = run.get(f"{network}/{key}")
        if scores is None or scores.ndim == 0:
            areas[key] = np.full(len(draws), np.nan)
            areas[key][0] = np.nan if scores is None else scores               # no bootstrap
        elif "%" in key:                                                       # (draws, T, F)
            by_finding = [[auroc(draw[:, f], labels[:, f], draws) for f in range(labels.shape[1])]
                          for draw in scores]
            areas[key] = afire.nan_mean(afire.nan_mean(by_finding, 0), 0)
        else:                                                                  # (T, side, side)
            areas[key] = auroc(afire.image_scores(scores), abnormal, draws)
            pixels.append(torch.from_numpy(scores).unsqueeze(1))
    if "masks" in run and pixels:                          # as afire.evaluate_maps does it
        masks = run["masks"]
        step = max(1, masks.shape[1] // 56)
        truth = masks[:, step // 2::step, step // 2::step]                     # (T, 56, 56)
        pixels = [F.interpolate(grid, truth.shape[1:], mode="bilinear").numpy() for grid in pixels]
        best = np.argmax([auroc(scores, truth, draws[:1]) for scores in pixels])
        areas["pixels"] = auroc(pixels[best], truth, draws)
    return np.stack(list(areas.values()))


def print_table(rows, form):
    """rows {name: (columns, 3)}: value, low, high. Columns that are NaN in all rows are omitted."""
    shown = ~np.isnan(np.stack(list(rows.values()))).all((0, 2))
    print("| | " + " | ".join(np.array(list(COLUMNS.values()))[shown]) + " |")
    print("| --- " * (1 + shown.sum()) + "|")
    for name, row in rows.items():
        cells = ["-" if np.isnan(cell).any() else form.format(*cell) for cell in row[shown]]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main(argv=None):
    """Bad input ends in one sentence and status 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN,RUN", help="folders of eval")
    parser.add_argument("--without", metavar="REGEX", help="leave out images of such names")
    options = parser.parse_args(argv)
    try:
        runs = read_runs(options.runs, options.without)
    except (afire.InputError, OSError) as error:
        print(f"tables.py: {error}", file=sys.stderr)
        sys.exit(2)
    first = next(iter(runs))
    draws = draw_images(runs[first][0]["patients"])
    areas = {name: np.stack([columns_of(run, "checkpoint", draws) for run in runs[name]])
             for name in runs}                                                 # (seeds, columns, R)
    areas["untrained"] = np.stack([columns_of(run, "random_init", draws) for run in runs[first]])
    values = {name: array[:, :, 0] for name, array in areas.items()}           # (seeds, columns)
    print_table({name: np.stack([value.mean(0), value.min(0), value.max(0)], 1)
                 for name, value in values.items()}, "{:.3f} ({:.3f} to {:.3f})")
    print(f"\nDifferences to {first}:\n")
    differences = {}
    for name in list(areas)[1:]:
        gain = (areas[name] - areas[first]).mean(0)                            # (columns, R)
        interval = np.quantile(gain[:, 1:], [0.025, 0.975], axis=1)
        differences[name] = np.stack([gain[:, 0], *interval], 1)
    print_table(differences, "{:+.3f} ({:+.3f} to {:+.3f})")


if __name__ == "__main__":
    main()
