#!/usr/bin/env python3
"""Makes Markdown tables of AUROC from the predictions.npz that `afire.py eval` writes.

    python results/tables.py AFiRe=runs/a0/eval
    python results/tables.py AFiRe=runs/a0/eval,runs/a1/eval Crops=runs/c0/eval,runs/c1/eval

With --without REGEX, images whose names match are left out.
Each name has one run per seed, with the same seeds in the same order. The first table shows one run
(95 % interval by a bootstrap over patients), or means over several runs (lowest to highest). The
second one shows the mean difference to the first name's run with the same seed (95 % interval; all
runs see the patients that are drawn). The row "untrained" is of the first name's architecture.
Beside a folder called eval, finetune/predictions.npz and cohesion.json, by finetune.py and
tokens.py, are read too. Cohesion, a silhouette, has no interval.
"""

import argparse
import json
import re
import sys
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402

COLUMNS = {"linear 1%": "probe, 1 %", "linear 10%": "probe, 10 %", "linear 100%": "probe, 100 %",
           "finetune 1%": "fine-tuned, 1 %", "finetune 10%": "fine-tuned, 10 %",
           "finetune 100%": "fine-tuned, 100 %", "prototype": "images by prototype",
           "restoration": "images by restoration", "neighbours": "images by neighbours",
           "pixels": "pixels by the best score", "cohesion": "cohesion"}


def require_same_images(arrays, reference, name, reference_name):
    """Refuses to compare predictions of other test images."""
    for key in "images", "patients", "findings", "labels":
        if not np.array_equal(arrays[key], reference[key]):
            raise afire.InputError(f"{name} has other {key} than {reference_name}: evaluate both "
                                   "on the same data")


def read_run(folder, without=None):
    """The arrays of an evaluation, without images that match the regular expression."""
    run = dict(np.load(folder / "predictions.npz"))
    tuned = folder.with_name("finetune") / "predictions.npz"
    if folder.name == "eval" and tuned.exists():
        arrays = np.load(tuned)
        require_same_images(arrays, run, tuned, folder)
        run |= arrays
    if without:
        kept = [not re.search(without, str(name)) for name in run["images"]]
        if not any(kept):
            raise afire.InputError(f"--without {without} leaves no image: choose another")
        for key, array in run.items():
            if key != "findings":
                run[key] = array[:, kept] if "%" in key else array[kept]
    file = folder.with_name("cohesion.json")
    if folder.name == "eval" and file.exists():
        for network, cohesion in json.loads(file.read_text()).items():
            run[f"{network}/cohesion"] = np.array(cohesion)
    return run


def read_runs(arguments, without=None):
    """["name=folder,folder", ...] -> {name: [arrays, ...]}, all of the same test images."""
    runs = {}
    for argument in arguments:
        name, _, folders = argument.partition("=")
        if not folders or name in (*runs, "untrained"):
            raise afire.InputError(f"{argument}: write NAME=RUN,RUN, and use a name only once")
        runs[name] = [read_run(Path(folder), without) for folder in folders.split(",")]
        first = next(iter(runs.values()))
        if len(runs[name]) != len(first):
            raise afire.InputError(f"{name} has {len(runs[name])} runs, but the first name has "
                                   f"{len(first)}: give every name one run per seed")
        for run, folder in zip(runs[name], folders.split(",")):
            require_same_images(run, first[0], folder, "the first run")
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
    """The metrics in all COLUMNS, NaN where the run lacks one: -> (columns, R)."""
    labels = run["labels"]                                                     # (T, F)
    areas = {}
    pixels = []
    for key in COLUMNS:
        scores = run.get(f"{network}/{key}", np.array(np.nan))
        if scores.ndim == 0:                                                   # no bootstrap
            areas[key] = np.full(len(draws), np.nan)
            areas[key][0] = scores
        elif "%" in key:                                                       # (draws, T, F)
            by_finding = [[auroc(draw[:, f], labels[:, f], draws) for f in range(labels.shape[1])]
                          for draw in scores]
            areas[key] = afire.nan_mean(afire.nan_mean(by_finding, 0), 0)
        else:                                                                  # (T, side, side)
            areas[key] = auroc(afire.image_scores(scores), labels.any(1), draws)
            pixels.append(scores)
    if "masks" in run and pixels:
        pixels = [afire.pixel_scores(maps, run["masks"]) for maps in pixels]
        best = np.argmax([auroc(*scores_and_truth, draws[:1]) for scores_and_truth in pixels])
        areas["pixels"] = auroc(*pixels[best], draws)
    return np.stack(list(areas.values()))


def with_interval(areas):
    """Each column's value and the ends of its 95 % interval: (columns, R) -> (columns, 3)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)    # of columns without a bootstrap
        ends = np.nanquantile(areas[:, 1:], [0.025, 0.975], axis=1)
    return np.stack([areas[:, 0], *ends], 1)


def print_table(rows, form):
    """rows {name: (columns, 3)}: value, low, high. Columns without any value are left out."""
    shown = ~np.isnan([row[:, 0] for row in rows.values()]).all(0)
    print("| | " + " | ".join(np.array(list(COLUMNS.values()))[shown]) + " |")
    print("| --- " * (1 + shown.sum()) + "|")
    for name, row in rows.items():
        cells = []
        for value, low, high in row[shown]:
            ends = "" if np.isnan(low) else f" ({low:{form}} to {high:{form}})"
            cells.append("-" if np.isnan(value) else f"{value:{form}}{ends}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def main(argv=None):
    """Bad input ends in one sentence and status 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN,RUN", help="folders of eval")
    parser.add_argument("--without", metavar="REGEX", help="leave out images of such names")
    options = parser.parse_args(argv)
    try:
        runs = read_runs(options.runs, options.without)
    except (afire.InputError, OSError, re.error) as error:
        print(f"tables.py: {error}", file=sys.stderr)
        sys.exit(2)
    first = next(iter(runs))
    draws = draw_images(runs[first][0]["patients"])
    areas = {name: np.stack([columns_of(run, "checkpoint", draws) for run in runs[name]])
             for name in runs}                                                 # (seeds, columns, R)
    areas["untrained"] = np.stack([columns_of(run, "random_init", draws) for run in runs[first]])
    seeds = len(runs[first])
    if seeds == 1:
        print("One run (95 % interval):\n")
        print_table({name: with_interval(array[0]) for name, array in areas.items()}, ".3f")
    else:
        print(f"Mean of {seeds} runs (lowest to highest):\n")
        values = {name: array[:, :, 0] for name, array in areas.items()}       # (seeds, columns)
        print_table({name: np.stack([value.mean(0), value.min(0), value.max(0)], 1)
                     for name, value in values.items()}, ".3f")
    print(f"\nDifferences to {first} (95 % interval):\n")
    print_table({name: with_interval((areas[name] - areas[first]).mean(0))
                 for name in list(areas)[1:]}, "+.3f")


if __name__ == "__main__":
    main()
