#!/usr/bin/env python3
"""Do anomaly maps, and Grad-CAM of a classifier, point at what radiologists drew boxes around?

    python results/boxes.py --ckpt runs/afire --data nih/images --labels labels.csv [--out FOLDER]

labels.csv is a table as of data/make_table.py, with masks. The classifier of any finding or none, a
probe on the mean token or an encoder that is fine-tuned from it, learns from the labels of the
images in train alone. The probe's AUROC is by cross-validation over the patients in train, overall
and within each view if the table has a column view.

A map is compared with the mask of its image by the AUROC of pixels, mean over the images in test
that have a mask (95 % interval by a bootstrap over patients). As findings are more frequent at some
places, a static map that is the same for all patients is above .5 too. Hence three columns:

    own map           AUROC of the image's own map
    mean map          AUROC of the mean map of the other patients
    own minus others  AUROC of the own map, minus the mean of those of the other patients' maps

and two rows: the distance to the image's centre, and the mean mask of the other patients.
"Grad-CAM minus normals" is Grad-CAM minus its mean over normal images, as tokens differ more by
position than by finding. Writes boxes.npz, which has these values for each image, and boxes.png.
"""

import argparse
import csv
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402
from finetune import finetune, probe, score_rows  # noqa: E402
from runs import exit_on_bad_input  # noqa: E402

CELLS = 1                  # Grad-CAM weighs channels alike at all positions, so the probe does too
FOLDS = 3


def grad_cam(encoder, weight, images):
    """Token-wise Grad-CAM on the last block [P], not yet clamped: (B, 1, S, S) -> (B, side, side).

    It explains the score average_in_cells(tokens, cells) @ weight, weight (D * cells ** 2,).
    """
    cells = round((len(weight) / encoder.config["embed_dim"]) ** 0.5)
    outputs = []

    def keep(blocks, inputs, output):
        outputs.append(output.requires_grad_())

    with torch.enable_grad(), encoder.blocks.register_forward_hook(keep):
        cell_means = afire.average_in_cells(afire.features(encoder, images), cells)
        scores = cell_means @ weight                                           # (B,)
        gradient = torch.autograd.grad(scores.sum(), outputs)[0][:, 1:]        # (B, L, D)
    activation = outputs[0][:, 1:].detach()                                    # (B, L, D)
    cam = (activation * gradient.mean(1, keepdim=True)).sum(2, keepdim=True)   # (B, L, 1)
    return afire.unpatchify(cam, 1).squeeze(1)


def cross_validated(encoder, data, device):
    """Scores of data.train by probes that have learned from other patients: -> (n,)."""
    _, patient = np.unique(np.array(data.patients)[data.train], return_inverse=True)   # (n,)
    fold = np.random.default_rng(0).permutation(patient.max() + 1)[patient] % FOLDS
    scores = np.zeros(len(fold))
    for i in range(FOLDS):
        layer = probe(encoder, data, data.train[fold != i], device, CELLS)
        scores[fold == i] = score_rows(encoder, layer, data, data.train[fold == i], device)[:, 0]
    return scores


def learn_classifiers(encoder, data, device, steps, bar=None):
    """A probe and a fine-tuned classifier of data.train: -> {name: (encoder, linear layer)}.

    bar: as of finetune.
    """
    return {"probe": (encoder, probe(encoder, data, data.train, device, CELLS)),
            "tuned": finetune(encoder, data, data.train, steps, device, CELLS, bar)}


def grad_cams(classifiers, data, normals, device):
    """Of classifiers of one finding: -> {score: maps (T, side, side) of data.test}.

    classifiers: as by learn_classifiers; normals: rows of normal images.
    """
    maps = {}
    for name, (network, layer) in classifiers.items():
        plain, of_normals = [afire.in_batches(
            lambda images: grad_cam(network, layer.weight[0], images), data.images, rows,
            device).cpu().numpy() for rows in (data.test, normals)]
        maps[f"Grad-CAM, {name}"] = plain.clip(0)
        maps[f"Grad-CAM minus normals, {name}"] = (plain - of_normals.mean(0)).clip(0)
    return maps


def areas(maps, masks):
    """AUROC of the pixels of each map in each mask: (N, S, S), (T, S, S) bool -> (N, T)."""
    inside = masks.reshape(len(masks), -1).astype(float)                       # (T, pixels)
    n = inside.sum(1)                                                          # (T,)
    ranks = []
    for pixels in maps.reshape(len(maps), -1):
        _, level, counts = np.unique(pixels, return_inverse=True, return_counts=True)
        mean_rank = counts.cumsum() - (counts - 1) / 2     # of equal pixels; the lowest rank is 1
        ranks.append(mean_rank[level])
    pairs = np.stack(ranks) @ inside.T - n * (n + 1) / 2   # a pixel inside above one outside
    return pairs / (n * (inside.shape[1] - n))


def mean_of_others(maps, patients):
    """For each image, the mean map of the other patients: (T, S, S), (T,) -> (T, S, S)."""
    other = patients[:, None] != patients                                      # (T, T)
    return np.tensordot(other.astype(float), maps, 1) / other.sum(1).reshape(-1, 1, 1)


def localise(grids, masks, patients):
    """How well maps (T, side, side) locate masks (T, S, S) bool: -> {column: (T,)}."""
    maps = F.interpolate(torch.from_numpy(grids).unsqueeze(1), masks.shape[1:], mode="bilinear")
    maps = maps.squeeze(1).numpy()                                             # (T, S, S)
    area = areas(maps, masks)                                                  # (T maps, T masks)
    other = patients[:, None] != patients
    of_others = (area * other).sum(0) / other.sum(0)                           # (T,)
    mean_map = areas(mean_of_others(maps, patients), masks).diagonal()
    return {"own map": area.diagonal(), "mean map": mean_map,
            "own minus others": area.diagonal() - of_others}


def static_priors(masks, patients):
    """AUROC of maps that do not depend on the image: masks (T, S, S) bool -> {prior: (T,)}."""
    place = np.arange(masks.shape[1]) - (masks.shape[1] - 1) / 2
    nearness = -np.hypot(place[:, None], place)                                # (S, S)
    mean_mask = mean_of_others(masks.astype(float), patients)
    return {"nearness to the centre": areas(nearness[None], masks)[0],
            "mean mask": areas(mean_mask, masks).diagonal()}


def with_interval(values, patients, resamples=1000):
    """The mean of values (T,) and its 95 % interval, by a bootstrap over patients: -> (3,)."""
    _, patient = np.unique(patients, return_inverse=True)
    images = np.bincount(patient)
    sums = np.bincount(patient, values)
    sample = np.random.default_rng(0).integers(len(images), size=(resamples, len(images)))
    means = sums[sample].sum(1) / images[sample].sum(1)
    return np.array([values.mean(), *np.quantile(means, [0.025, 0.975])])


def views_of(file, names):
    """The column view of a table for these names, empty where it has none: -> (n,)."""
    with open(file, newline="", encoding="utf-8-sig") as stream:
        views = {row["image"]: row.get("view", "") for row in csv.DictReader(stream)}
    return np.array([views[name] for name in names])


def print_classifier(title, scores, truth, views):
    """AUROC of scores (n,) of images with truth (n,) bool, overall and within each view."""
    parts = {"overall": np.full(len(views), True)}
    parts |= {view: views == view for view in np.unique(views) if view}
    cells = [f"{name} {afire.auroc(scores[part], truth[part]):.3f}" for name, part in parts.items()]
    print(f"{title:42}{'  '.join(cells)}")


def print_rows(rows, patients):
    """A line for each map, rows {map: {column: (T,)}}: means and intervals over patients (T,)."""
    titles = [f"{column:27}" for column in ("own map", "mean map", "own minus others")]
    print(f"{'AUROC of pixels, mean of images':42}{''.join(titles)}")
    for row, columns in rows.items():
        cells = []
        for column, values in columns.items():
            form = "+.3f" if column == "own minus others" else ".3f"
            mean, low, high = with_interval(values, patients)
            cells.append(f"{f'{mean:{form}} ({low:{form}} to {high:{form}})':27}")
        print(f"{row:42}{''.join(cells)}".rstrip())


def read_images(options, levels, size, trained_on):
    """-> Radiographs whose test images have a mask, rows of normal images, masks (T, S, S) bool."""
    data = afire.load_radiographs(options.data, size, labels=options.labels, levels=levels)
    useful = [row for row, mask in data.masks.items() if mask.any() and not mask.all()]
    data.test = data.test[np.isin(data.test, useful)]
    print(f"{len(useful)} images in test have a mask; left out: {len(data.masks) - len(useful)} "
          "images whose mask is empty or full")
    data.test = afire.without_pretrained(data, np.isin(data.hashes, trained_on))
    normals = afire.normal_references(data)
    patients = len({data.patients[row] for row in data.test})
    abnormal = data.labels[data.train].any(1).sum()
    if patients < 2 or min(len(normals), abnormal) < FOLDS:
        raise afire.InputError(f"{options.labels} has masks of {patients} new patients in test, "
                               f"{len(normals)} normal and {abnormal} other images in train: at "
                               f"least 2 patients and {FOLDS} images of each kind are needed; "
                               "python data/make_table.py nih --help says how to get masks")
    return data, normals, np.stack([data.masks[row] for row in data.test])


def evaluate(options):
    """Prints the tables of a checkpoint, and writes boxes.npz and boxes.png."""
    device = afire.get_device("auto")
    path = afire.find_checkpoint(options.ckpt)
    models, run, trained_on = afire.load_models(path)
    levels, _ = afire.grey_levels(None, run, path)
    config = models["checkpoint"][0].config
    data, normals, masks = read_images(options, levels, config["img_size"], trained_on)
    names = np.array(data.names)
    patients = np.array(data.patients)
    any_finding = dataclasses.replace(data, labels=data.labels.any(1, keepdims=True),
                                      findings=["any"])
    truth = any_finding.labels[data.train, 0]                                  # (n,)
    views = views_of(options.labels, names[data.train])
    arrays = {"images": names[data.test], "patients": patients[data.test],
              "train/images": names[data.train], "train/patients": patients[data.train],
              "train/labels": truth, "train/views": views}
    rows = {f"static/{prior}": {"own map": values}
            for prior, values in static_priors(masks, patients[data.test]).items()}
    pixels = afire.PatchMeans(config["patch_size"])
    maps = afire.anomaly_maps(data.images, data.test, device, pixels, None, normals)
    rows["pixels/neighbours"] = localise(maps["neighbours"], masks, patients[data.test])
    shown = {}
    print(f"AUROC of the probe for any finding, on {FOLDS} folds of the patients of train")
    with tqdm(total=len(models) * options.steps, desc="fine-tune", unit="step",
              mininterval=1) as bar:
        for name, (encoder, model) in models.items():
            (model or encoder).to(device).eval().requires_grad_(False)
            scores = cross_validated(encoder, any_finding, device)
            print_classifier(f"{name}/probe", scores, truth, views)
            arrays[f"train/{name}/probe"] = scores
            maps = afire.anomaly_maps(data.images, data.test, device, encoder, model, normals)
            classifiers = learn_classifiers(encoder, any_finding, device, options.steps, bar)
            maps |= grad_cams(classifiers, any_finding, normals, device)
            rows |= {f"{name}/{score}": localise(grids, masks, patients[data.test])
                     for score, grids in maps.items()}
            if name == "checkpoint":
                shown = {score.replace(" minus", "\nminus"): grids[:5]
                         for score, grids in maps.items() if not score.startswith("Grad-CAM, ")}
    print_rows(rows, patients[data.test])
    arrays |= {f"{row}/{column}": values for row, columns in rows.items()
               for column, values in columns.items()}
    out = Path(options.out or afire.results_folder(path, run, "boxes"))
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "boxes.npz", **arrays)
    captions = [f"{names[row][-36:]}\n{data.findings_of(row)}" for row in data.test[:5]]
    afire.plot_images(out / "boxes.png", {"image": data.images[data.test[:5], 0]}, shown, captions,
                      masks[:5])
    print(f"in {out}: boxes.npz (the values of each image), boxes.png")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", default="runs/afire", help="folder of a run, or an encoder")
    parser.add_argument("--data", required=True, help="folder of radiographs")
    parser.add_argument("--labels", required=True, help="CSV, as for afire.py, with masks")
    parser.add_argument("--steps", type=afire.number(int, 1), default=100,
                        help="of fine-tuning (default: 100)")
    parser.add_argument("--out", help="folder for the results; default: boxes in the run's folder")
    options = parser.parse_args(argv)
    with exit_on_bad_input("boxes.py"):
        evaluate(options)


if __name__ == "__main__":
    main()
