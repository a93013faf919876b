#!/usr/bin/env python3
"""Prints every table of README.md and results/README.md, from results/scores.npz alone.

    python results/tables.py collect ROOT [--add] [--scores FILE]       first, from ROOT/runs
    python results/tables.py [--scores FILE]

A row is the mean over the seeds of a pre-training. 95 % intervals are by a bootstrap of 1,000
samples over patients, over the draws of the labels to learn from, and over seeds. The images of a
patient stay together, and a sample has the same patients and draws in all runs. Differences are
between runs of the same seed; seeds that only one of two rows has are ignored. The best of the
pixels is the best in each sample. With one seed, an interval does not cover other seeds, and with
two or three it is too narrow. A cell with fewer seeds than its row says so.

scores.npz has, for each test set, SET|images, SET|patients, SET|labels (T, F) and SET|located (T,),
the images in which something is to be located; and for each score SET|SCORE of N runs and
SET|SCORE|runs, their names, "pre-training:seed" (no seed: pixels, static maps). A score is one of

    uint16  (N, T, F) or (N, repeats, T, F), ranks, whose AUROC is that of the scores; 65535: NaN.
            F is 1 for a score of any finding. Adjacent images of one label have the same rank
    int16   (N, T), AUROC of pixels within an image, or a difference, times 32767; -32768: NaN
    float   (N,), the silhouette, which belongs to no image

To compare another method, put its run into ROOT/runs as NAME-SEED, evaluate it, and collect with
--add, which keeps the scores that are in the file.
"""

import argparse
import itertools
import json
import re
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402
from runs import exit_on_bad_input  # noqa: E402

LIMIT = 3_900_000                                          # bytes of scores.npz
PRETRAININGS = {                                           # folders of runs, and their rows
    "pixels, 4 x 4": "pixels, 4 x 4", "pixels, 8 x 8": "pixels, 8 x 8",
    "pixels, 16 x 16": "pixels, 16 x 16", "untrained": "untrained", "mae": "MAE",
    "crops": "structure and restoration, crops", "lesions": "structure and restoration, lesions",
    "structure": "structure loss only", "restoration": "restoration loss only",
    "category": "category loss only", "afire": "AFiRe"}
TUNING = {"mae-r50": "mask ratio .5", "mae-r75": "mask ratio .75", "mae-r90": "mask ratio .9",
          "mae-lr-low": "mask ratio .75, learning rate / 3",
          "mae": "mask ratio .75, learning rate x 3"}
AT_128_PIXELS = {"untrained-128": "untrained, 128 px", "mae-128": "MAE, 128 px",
                 "afire-128": "AFiRe, 128 px", "afire": "AFiRe, 64 px"}
FRACTIONS = ("1%", "10%", "100%")
PROBES = [f"probe {fraction}" for fraction in FRACTIONS]
CELLS = [f"{cells} {fraction}" for cells in ("mean token", "2 x 2", "probe")
         for fraction in FRACTIONS]
ANOMALIES = ["prototype", "restoration", "neighbours", "nearest", "levels", "components"]
GRAD_CAM = ["Grad-CAM, probe", "Grad-CAM minus normals, probe", "Grad-CAM, tuned",
            "Grad-CAM minus normals, tuned"]
TITLES = {"eval": "held-out patients", "published": "published split",
          "shifted": "reframed images", "locate/lesions": "AFiRe's lesions",
          "locate/ellipses": "ellipses", "phantoms/locate/findings": "phantoms", "boxes": "boxes"}


# ---- Runs to scores.npz --------------------------------------------------------------------------

def as_ranks(scores, labels):
    """Scores (..., T, F) of images with labels (T, F) bool -> uint16, which have the same AUROC.

    A repeat and finding with NaN becomes 65535. Neighbours in the order of the scores that are
    alike in their label become equal, as that changes no AUROC and takes less room.
    """
    if len(labels) >= 65535:
        raise afire.InputError(f"{len(labels)} test images are more than 16 bits can rank: "
                               "evaluate on at most 65534")
    if scores.shape[-1] != labels.shape[1]:
        labels = labels.any(1, keepdims=True)              # a score for any finding
    ranks = np.full(scores.shape, 65535, np.uint16)
    for *repeat, f in np.ndindex(*scores.shape[:-2], scores.shape[-1]):
        column = (*repeat, slice(None), f)
        if np.isnan(scores[column]).any():
            continue
        _, level = np.unique(scores[column], return_inverse=True)
        positive = np.bincount(level, labels[:, f]) > 0    # for each distinct score
        negative = np.bincount(level, ~labels[:, f]) > 0
        begins = positive & negative
        begins[1:] |= (positive[1:] != positive[:-1]) | (negative[1:] != negative[:-1])
        ranks[column] = begins.cumsum()[level]
    return ranks


def as_values(values, located):
    """Values (M,) of the located images, T bool -> (T,) int16, -32768 for NaN and other images."""
    integers = np.full(len(located), -32768, np.int16)
    integers[located] = np.where(np.isnan(values), -32768, np.nan_to_num(values * 32767).round())
    return integers


def load_arrays(file, *needed):
    """-> {name: array} of an .npz file, which must have the needed ones."""
    try:
        arrays = dict(np.load(file))
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise afire.InputError(f"{file} is cut off or no .npz file: remove it, and start the "
                               "script again that wrote it") from error
    missing = set(needed).difference(arrays)
    if missing:
        raise afire.InputError(f"{file} was written by another version, as it has no "
                               f"{' and no '.join(sorted(missing))}: remove it, and start the "
                               "script again that wrote it")
    return arrays


def scores_of_eval(file):
    """predictions.npz or probes.npz: -> images, {(network, score): ranks}."""
    arrays = load_arrays(file, "images", "patients", "labels")
    images = {key: arrays[key] for key in ("images", "patients", "labels")}
    images["located"] = np.zeros(len(images["images"]), bool)
    scores = {}
    for key, array in arrays.items():
        network, _, score = key.partition("/")
        cells, _, fraction = score.rpartition(" ")
        if score in ANOMALIES:
            by_image = afire.image_scores(array) if array.ndim == 3 else array
            network = network.replace("pixels", "pixels, 8 x 8")
            scores[network, score] = as_ranks(by_image[:, None], images["labels"])
        elif network == "pixels" and "x" in cells:
            network = f"pixels, {cells}"
            scores[network, f"probe {fraction}"] = as_ranks(array, images["labels"])
        elif "%" in score and cells != "linear":
            cells = {"4 x 4": "probe", "1 x 1": "mean token"}.get(cells, cells)
            scores[network, f"{cells} {fraction}"] = as_ranks(array, images["labels"])
    return images, scores


def scores_of_maps(arrays):
    """The arrays of a set in locate.npz or boxes.npz: -> images, {(network, score): array}."""
    images = {key: arrays[key] for key in ("images", "patients", "located")}
    images["labels"] = arrays["labels"][:, None]
    scores = {}
    for key, array in arrays.items():
        network, _, score = key.partition("/")
        network = network.replace("pixels", "pixels, 8 x 8")
        if score.endswith(("/own map", "/own minus others")):
            scores[network, score] = as_values(array, arrays["located"])
        elif score and "/" not in score and len(array) == len(images["images"]):
            scores[network, score] = as_ranks(array[:, None], images["labels"])
    return images, scores


def below(arrays, prefix):
    """The arrays whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): array for key, array in arrays.items()
            if key.startswith(prefix)}


def read_run(folder):
    """What a run's folder has: yields set, images, {(network, score): array}."""
    for part in "eval", "published", "shifted":
        files = [folder / part / "predictions.npz", folder / part / "probes.npz"]
        files += [folder / "finetune/predictions.npz"] if part == "eval" else []
        for file in files:
            if file.exists():
                yield part, *scores_of_eval(file)
    file = folder / "cohesion.json"
    if file.exists():
        yield "eval", {}, {(network, "cohesion"): np.array(value, np.float32)
                           for network, value in json.loads(file.read_text()).items()}
    file = folder / "locate/locate.npz"
    if file.exists():
        arrays = load_arrays(file)
        for part in dict.fromkeys(key.partition("/")[0] for key in arrays):
            yield f"locate/{part}", *scores_of_maps(below(arrays, f"{part}/"))
    file = folder / "boxes/boxes.npz"
    if file.exists():
        arrays = load_arrays(file, "images", "patients", "train/images", "train/views")
        train = below(arrays, "train/")
        nowhere = np.zeros(len(train["images"]), bool)
        views = train.pop("views")
        for view in ("", *np.unique(views[views != ""])):
            shown = (views == view) | (not view)
            yield f"classifier, {view or 'all'}", *scores_of_maps(
                {key: array[shown] for key, array in (train | {"located": nowhere}).items()})
        everywhere = np.ones(len(arrays["images"]), bool)
        boxes = {key: array for key, array in arrays.items() if not key.startswith("train/")}
        yield "boxes", *scores_of_maps(boxes | {"located": everywhere, "labels": everywhere})


def name_of(folder, network):
    """The row and the seed of a network in a run's folder, None if another run has it too."""
    name, _, seed = folder.rpartition("-")
    if folder in TUNING:
        name, seed = folder, "0"
    if not seed.isdecimal():
        raise afire.InputError(f"runs/{folder} has no seed in its name: rename it to NAME-SEED")
    name = name.replace("phantoms", "afire")
    if network == "checkpoint":
        return f"{name}:{seed}"
    if not name.startswith("afire"):
        return None
    if network == "random_init":
        return f"{name.replace('afire', 'untrained')}:{seed}"
    return f"{network}:" if name == "afire" else None


def read_runs(root):
    """All runs in root/runs: yields their folder, set, images, {(run, score): array}."""
    folders = sorted(path.parent for path in Path(root, "runs").glob("*/checkpoint.pth"))
    for folder in tqdm(folders, "collect", unit="run", delay=1):
        prefix = "phantoms/" * folder.name.startswith("phantoms")
        for part, images, results in read_run(folder):
            scores = {}
            for (network, score), array in results.items():
                run = name_of(folder.name, network)
                of_mae = run and run.partition(":")[0] in ("mae", "mae-128", *TUNING)
                meaningless = of_mae and score.startswith(("prototype", "restoration"))
                if run and not meaningless:                # MAE has another head and decoder
                    scores[run, score] = array
            yield folder, prefix + part, images, scores


def read_scores(file):
    """scores.npz: yields the file, a set, its images, {(run, score): array}."""
    arrays = load_arrays(file)
    if not any(key.endswith("|runs") for key in arrays):
        raise afire.InputError(f"{file} has no scores of runs: name a file that collect has made")
    parts = {}
    for key in arrays:
        part, name = key.split("|", 1)
        parts.setdefault(part, {})[name] = arrays[key]
    for part, by_name in parts.items():
        images = {name: by_name[name] for name in ("images", "patients", "labels", "located")}
        scores = {(run, name): array for name in by_name if f"{name}|runs" in by_name
                  for run, array in zip(by_name[f"{name}|runs"].tolist(), by_name[name])}
        yield file, part, images, scores


def collect(root, file, add=False):
    """Gathers the scores of all runs in root/runs, as far as they fit, into the file.

    With add, the scores in the file stay, except where root has newer ones.
    """
    sources = read_runs(root)
    if add:
        sources = itertools.chain(sources, read_scores(file))
    sets = {}
    scores = {}
    shapes = {}
    for source, part, images, results in sources:
        reference = sets.setdefault(part, images)
        for key in images:
            if not np.array_equal(images[key], reference[key]):
                raise afire.InputError(f"{source}: {part} has other {key} than the first run: "
                                       "evaluate all runs on the same data")
        for (run, score), array in results.items():
            scores.setdefault((part, score, run), array)
            if array.shape != shapes.setdefault((part, score), array.shape):
                raise afire.InputError(f"{source}: {score} of {part} has {len(array)} repeats, "
                                       "other runs have more or fewer: start its script again "
                                       "with the same --repeats")
    if not scores:
        raise afire.InputError(f"{root}/runs has no run with results: start results/all.sh first")

    def importance(key):
        _, score, run = key
        return (score.startswith("2 x 2"), score.startswith("mean token"), run.partition(":")[2])

    size = sum(len(zlib.compress(array.tobytes())) for images in sets.values()
               for array in images.values())
    left_out = set()
    stacks = {}
    for key in sorted(scores, key=importance):
        part, score, run = key
        size += 12 + len(zlib.compress(scores[key].tobytes()))
        if size > LIMIT:
            left_out.add(f"{part}, {score.rpartition(' ')[0]}")
        else:
            stacks.setdefault((part, score), {})[run] = scores[key]
    arrays = {f"{part}|{key}": array for part, images in sets.items()
              for key, array in images.items()}
    for (part, score), by_run in stacks.items():
        arrays[f"{part}|{score}"] = np.stack(list(by_run.values()))
        arrays[f"{part}|{score}|runs"] = np.array(list(by_run))
    np.savez_compressed(file, **arrays)
    print(f"in {file}: {Path(file).stat().st_size / 1e6:.1f} MB, the scores of "
          f"{len({run for _, _, run in scores})} networks, without maps and eval's own probe\n"
          f"left out for some runs, as they do not fit: {'; '.join(sorted(left_out)) or 'none'}")
    seeds = {}
    for _, _, run in scores:
        name, _, seed = run.partition(":")
        if seed and "128" not in name:
            seeds.setdefault(name, set()).add(seed)
    for name in seeds:
        if seeds[name].isdisjoint(seeds.get("afire", seeds[name])):
            print(f"{name} has no seed in common with AFiRe: tables will have no differences of it")


# ---- scores.npz to figures -----------------------------------------------------------------------

def sample_patients(patients, resamples=1000):
    """How often an image counts in each sample of the patients: (T,) -> (T, 1 + resamples).

    Column 0 counts every image once.
    """
    _, patient = np.unique(patients, return_inverse=True)
    n = patient.max() + 1
    random = np.random.default_rng(0)
    counts = [np.bincount(random.integers(n, size=n), minlength=n) for _ in range(resamples)]
    return np.stack([np.ones(n), *counts], 1).astype(np.float32)[patient]


def weighted_auroc(ranks, truth, weights):
    """AUROC by each column of weights: ranks (T,), truth (T,) bool, (T, R) -> (R,).

    Ties count half. NaN where a sample has no image with, or none without the finding.
    """
    kind = torch.from_numpy(2 * ranks.astype(np.int64) + truth)                # (T,)
    totals = torch.zeros(2 * (int(ranks.max()) + 1), weights.shape[1])
    totals.index_add_(0, kind, torch.from_numpy(weights))  # of the images that are alike
    negatives = totals[::2]                                                    # (ranks, R)
    positives = totals[1::2]
    negatives_below = negatives.cumsum(0) - negatives / 2
    pairs = (positives * negatives_below).sum(0, dtype=torch.float64)
    return (pairs / (positives.sum(0) * negatives.sum(0))).numpy()             # 0 / 0 is NaN


def figure_of(array, labels, located, weights):
    """The figure of a run's score by each column of weights (T, R): -> (R,).

    Ranks (repeats, T, F) or (T, F): AUROC of each finding, a mean over the repeats in which it is
    known, then over findings; F = 1 is a score for any finding. Column 0 has every repeat once, the
    others as many with replacement. Values (T,): their mean.
    """
    if array.ndim == 0:
        return np.full(weights.shape[1], float(array))
    if array.dtype == np.int16:
        weights = weights[located].astype(float)
        values = np.where(array[located] == -32768, np.nan, array[located] / 32767)
        total = weights.sum(0)
        return np.divide(values @ weights, total, out=np.full(len(total), np.nan), where=total > 0)
    if array.shape[-1] != labels.shape[1]:
        labels = labels.any(1, keepdims=True)
    repeats = array.reshape(-1, *array.shape[-2:])                             # (repeats, T, F)
    areas = np.full((*repeats.shape[::2], weights.shape[1]), np.nan)           # (repeats, F, R)
    for repeat, f in np.ndindex(areas.shape[:2]):
        ranks = repeats[repeat, :, f]
        if (ranks != 65535).all():
            areas[repeat, f] = weighted_auroc(ranks, labels[:, f], weights)
    drawn = np.random.default_rng(2).integers(len(areas), size=(len(areas), 1, weights.shape[1]))
    drawn[:, 0, 0] = np.arange(len(areas))
    areas = np.take_along_axis(areas, drawn, 0)
    return afire.nan_mean(afire.nan_mean(areas, 0), 0)


def read_figures(file):
    """scores.npz: -> {set: {score: {pre-training: {seed: (1 + samples,)}}}}."""
    sets = {}
    for _, part, images, scores in read_scores(file):
        weights = sample_patients(images["patients"])
        for (run, score), array in tqdm(scores.items(), f"samples of {part}", delay=1):
            name, _, seed = run.partition(":")
            by_name = sets.setdefault(part, {}).setdefault(score, {})
            by_name.setdefault(name, {})[seed] = figure_of(array, images["labels"],
                                                           images["located"], weights)
    return sets


def with_interval(by_seed):
    """{seed: (1 + R,)} -> the mean over seeds, and its 95 % interval over patients and seeds."""
    figures = np.stack(list(by_seed.values()))                                 # (seeds, 1 + R)
    n, samples = figures.shape
    seeds = np.random.default_rng(1).integers(n, size=(n, samples - 1))
    means = figures[:, 1:][seeds, np.arange(samples - 1)].mean(0)              # (R,)
    value = figures[:, 0].mean()
    means = means[~np.isnan(means)]                        # samples without any image of a kind
    if np.isnan(value) or not len(means):
        return value, np.nan, np.nan
    return value, *np.quantile(means, [0.025, 0.975])


def differences(by_seed, reference):
    """Differences of {seed: (1 + R,)}, by seed. What has no seed is compared with every seed."""
    if "" in reference:
        return {seed: figures - reference[""] for seed, figures in by_seed.items()}
    if "" in by_seed:
        return {seed: by_seed[""] - figures for seed, figures in reference.items()}
    return {seed: by_seed[seed] - reference[seed] for seed in by_seed if seed in reference}


def minus(rows, reference):
    """Rows {name: {column: by_seed}} minus a row, in the columns that both have."""
    return {name: {column: differences(by_seed, reference[column])
                   for column, by_seed in row.items() if by_seed and reference[column]}
            for name, row in rows.items()}


# ---- Tables --------------------------------------------------------------------------------------

def number_of_seeds(by_seed):
    """Pixels and static maps have none, and so has a cell without figures."""
    return len({*(by_seed or {})} - {""})


def fewer_seeds(by_seed, seeds):
    """What is said of a cell in a row of so many seeds."""
    number = number_of_seeds(by_seed)
    return f", {number} seed{'s' * (number > 1)}" if 0 < number < seeds else ""


def print_table(title, columns, rows):
    """rows {name: {column: {seed: figures} or None}}; columns and rows without any are left out.

    Differences are signed. A cell with fewer seeds than its row says how many.
    """
    shown = [column for column in columns if any(row.get(column) for row in rows.values())]
    rows = {name: row for name, row in rows.items() if any(row.get(column) for column in shown)}
    if not rows:
        return
    print(f"| {title} | " + " | ".join(shown) + " | seeds |\n" + "| --- " * (2 + len(shown)) + "|")
    form = "+.3f" if re.search("minus", title) else ".3f"
    for name, row in rows.items():
        cells = []
        seeds = max(number_of_seeds(by_seed) for by_seed in row.values())
        for column in shown:
            value, low, high = with_interval(row[column]) if row.get(column) else [np.nan] * 3
            cell = "–" if np.isnan(value) else f"{value:{form}}"
            if low < high:                                 # cohesion with one seed has no interval
                cell += f" ({low:{form}} to {high:{form}})"
            cells.append(cell + fewer_seeds(row.get(column), seeds))
        print(f"| {name} | " + " | ".join(cells) + f" | {seeds or '–'} |")
    print()


def rows_of(figures, names, columns):
    """The rows of a set's figures, {score: {name: {seed: figures}}}; columns {title: score}."""
    return {row: {title: figures.get(score, {}).get(name) for title, score in columns.items()}
            for name, row in names.items()}


def best_of_pixels(figures, score):
    """The highest of the pixels' figures in each sample, of this probe or of all anomaly scores."""
    scores = ANOMALIES if score in ANOMALIES else [score]
    found = [by_seed[""] for key in scores for name, by_seed in figures.get(key, {}).items()
             if name.startswith("pixels")]
    return {"": np.max(found, 0)} if found else None


def print_set(title, figures, names, columns, pixels=False):
    """A table of figures, of differences to AFiRe, and with pixels of those to the best of them."""
    rows = rows_of(figures, names, columns)
    print_table(title, columns, rows)

    if "AFiRe" in rows:
        others = {name: row for name, row in rows.items() if name != "AFiRe"}
        print_table(f"{title}, minus AFiRe", columns, minus(others, rows["AFiRe"]))
    if pixels:
        networks = {name: row for name, row in rows.items() if "pixels" not in name}
        best = {column: best_of_pixels(figures, score) for column, score in columns.items()}
        print_table(f"{title}, minus the best of the pixels", columns, minus(networks, best))


def in_percent(score):
    """The title of a score that ends in a fraction of the labels."""
    return re.sub(r" (\d+)%$", r", \1 %", score)


def best_detector(sets, name):
    """The anomaly score of a row that is best on held-out patients, None if it has none."""
    areas = {score: np.mean([figures[0] for figures in by_name[name].values()])
             for score, by_name in sets.get("eval", {}).items()
             if score in ANOMALIES and name in by_name}
    return max(areas, key=areas.get, default=None)


def print_overview(sets, names):
    """The table of README.md: means, and the anomaly score that is best on held-out patients."""
    titles = ["probe, held-out patients", "probe, published split", "probe, reframed images",
              "fine-tuned on 10 %, held out", "anomaly, held out/published/reframed",
              "Grad-CAM minus normals in ellipses", "cohesion", "seeds"]
    print("| pre-training | " + " | ".join(titles) + " |\n" + "| --- " * (1 + len(titles)) + "|")
    for name, row in names.items():
        best = best_detector(sets, name)
        parts = ("eval", "published", "shifted")
        columns = [[(part, score) for score in PROBES] for part in parts]
        columns += [[("eval", "finetune 10%")], [(part, best) for part in parts],
                    [("locate/ellipses", "Grad-CAM minus normals, tuned/own map")],
                    [("eval", "cohesion")]]
        columns = [[sets.get(part, {}).get(score, {}).get(name, {}) for part, score in column]
                   for column in columns]
        seeds = max(number_of_seeds(by_seed) for by_seed in columns[0])
        cells = []
        for column in columns:
            means = [f"{np.mean([figures[0] for figures in by_seed.values()]):.3f}" if by_seed
                     else "–" for by_seed in column]
            fewest = min(filter(None, column), key=number_of_seeds, default=None)
            cells.append("/".join(means).replace("0.", ".") + fewer_seeds(fewest, seeds)
                         if fewest else "–")
        if best:
            cells[4] = re.sub("(,|$)", rf" {best}\1", cells[4], count=1)
        if re.search(r"\d", "".join(cells)):
            print(f"| {row} | " + " | ".join(cells) + f" | {seeds or '–'} |")
    print()


def print_best_detectors(sets, names):
    """On every set, the best anomaly score of each row minus that of AFiRe."""
    rows = {}
    for name, row in names.items():
        best = best_detector(sets, name)
        rows[name] = f"{row}, {best}", {TITLES[part]: sets.get(part, {}).get(best, {}).get(name)
                                        for part in ("eval", "published", "shifted")}
    _, reference = rows.pop("afire")
    print_table("best anomaly score on held-out patients, minus AFiRe", list(reference),
                minus(dict(rows.values()), reference))


def print_tables(sets):
    """Every table; what has no scores yet is left out."""
    found = {name for part in sets.values() for by_name in part.values() for name in by_name}
    others = sorted(found - {*PRETRAININGS, *TUNING, *AT_128_PIXELS, "static"})
    names = PRETRAININGS | {name: name for name in others}
    networks = {name: row for name, row in names.items() if not name.startswith("pixels")}
    probes = {in_percent(score): score for score in PROBES}
    cells = {in_percent(score): score for score in CELLS}
    print_overview(sets, names)
    print_best_detectors(sets, names)
    for part in "eval", "published", "shifted":
        anomalies = {f"images by {score}": score for score in ANOMALIES}
        columns = probes | {"fine-tuned, 10 %": "finetune 10%"} | anomalies
        print_set(TITLES[part], sets.get(part, {}), names, columns, pixels=True)
        print_table(f"{TITLES[part]}, tokens in cells", cells,
                    rows_of(sets.get(part, {}), networks, cells))
        columns = probes | anomalies
        rows = rows_of(sets.get(part, {}), {"lesions": "structure and restoration",
                                            "crops": "crops"}, columns)
        crops = rows.pop("crops")
        print_table(f"{TITLES[part]}, lesions minus crops", columns, minus(rows, crops))
    print_table("held-out patients, cohesion", ["silhouette"],
                rows_of(sets.get("eval", {}), networks, {"silhouette": "cohesion"}))
    for part in "locate/lesions", "locate/ellipses", "phantoms/locate/findings", "boxes":
        figures = sets.get(part, {})
        columns = {"by the probe": "probe", "by the tuned classifier": "tuned"}
        columns |= {f"by {score}": score for score in ANOMALIES}
        if part != "boxes":                                # where every image has a finding
            print_set(f"{TITLES[part]}, images", figures, names, columns)
        for values in "own map", "own minus others":
            columns = {score: f"{score}/{values}" for score in [*GRAD_CAM, *ANOMALIES]}
            print_set(f"{TITLES[part]}, {values}", figures, names, columns)
        static = figures.get("nearness to the centre/own map", {}).get("static")
        columns = {score: f"{score}/own map" for score in [*GRAD_CAM, *ANOMALIES]}
        print_table(f"{TITLES[part]}, own map minus nearness to the centre", columns,
                    minus(rows_of(figures, names, columns), dict.fromkeys(columns, static)))
        columns = {score: f"{score}/own map" for score in ("nearness to the centre", "mean mask")}
        print_table(f"{TITLES[part]}, static maps", columns,
                    rows_of(figures, {"static": "AUROC in the masks"}, columns))
    views = [part for part in sets if part.startswith("classifier, ")]
    print_table("boxes, classifier of any finding", views,
                {row: {view: sets[view].get("probe", {}).get(name) for view in views}
                 for name, row in networks.items()})
    for part in "eval", "shifted":
        print_table(f"tuning of MAE, {TITLES[part]}", probes, {
            row: {column: {"0": by_seed["0"]} for column, by_seed in figures.items()
                  if by_seed and "0" in by_seed}
            for row, figures in rows_of(sets.get(part, {}), TUNING, probes).items()})
    for part in "eval", "published", "shifted":
        figures = sets.get(part, {})
        columns = cells | {f"images by {score}": score for score in ("prototype", "neighbours")}
        rows = rows_of(figures, AT_128_PIXELS, columns)
        if any(rows["AFiRe, 128 px"].values()):
            print_table(f"{TITLES[part]}, 128 px", columns, rows)
            for reference in "AFiRe, 128 px", "AFiRe, 64 px":
                others = {name: row for name, row in rows.items() if name != reference}
                print_table(f"{TITLES[part]}, 128 px, minus {reference}", columns,
                            minus(others, rows[reference]))


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", nargs="?", choices=["collect"], help="makes scores.npz")
    parser.add_argument("root", nargs="?", help="folder in which runs/ is, for collect")
    parser.add_argument("--add", action="store_true",
                        help="collect: keep the scores in the file that ROOT does not have")
    parser.add_argument("--scores", default=Path(__file__).with_name("scores.npz"), type=Path,
                        help="file (default: results/scores.npz)")
    options = parser.parse_args(argv)
    with exit_on_bad_input("tables.py"):
        if options.command:
            if not options.root:
                raise afire.InputError("collect needs the folder ROOT, in which runs/ is")
            collect(options.root, options.scores, options.add)
        else:
            print_tables(read_figures(options.scores))


if __name__ == "__main__":
    main()
