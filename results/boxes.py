#!/usr/bin/env python3
"""Do anomaly maps, and Grad-CAM of a classifier, point at what radiologists drew boxes around?

    python results/boxes.py --ckpt runs/afire --data nih/images --labels labels.csv \\
        --boxes boxes.csv [--out FOLDER]

boxes.csv has the columns image (a path below --data), finding, x, y, w, h, in pixels of the image
before it is resized, of PNG or JPEG files. Prints a table and writes boxes.json and boxes.png.
"""

import argparse
import csv
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402
from finetune import finetune  # noqa: E402


def read_boxes(file, data, folder):
    """Masks of the pixels that the boxes of an image touch: -> {name: mask (S, S) bool}.

    data: Radiographs of the folder, of which those in train or test count. Images that their boxes
    fill are left out: nothing to locate.
    """
    size = data.images.shape[-1]
    with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
        boxes = list(csv.DictReader(stream))
    if not boxes or not {"image", "finding", "x", "y", "w", "h"} <= boxes[0].keys():
        raise afire.InputError(f"{file} needs the columns image, finding, x, y, w, h, and a box")
    names = {data.names[row] for row in data.used()}
    present = [box for box in boxes if box["image"] in names]
    print(f"{file}: {len(boxes)} boxes, {len(boxes) - len(present)} of them in no image of the set")
    if not present:
        raise afire.InputError(f"{file} has no box in an image of {folder}: its column image needs "
                               "paths below that folder")
    masks = {}
    for box in present:
        name = box["image"]
        with Image.open(Path(folder, name)) as image:
            width, height = ImageOps.exif_transpose(image).size
        try:
            x, y, w, h = [float(box[column]) for column in ("x", "y", "w", "h")]
        except (TypeError, ValueError) as error:
            raise afire.InputError(f"{file}: {name} needs numbers as x, y, w, h") from error
        # Boxes of a scaled image are rounded, hence half a pixel.
        if not (0 <= x < x + w <= width + 0.5 and 0 <= y < y + h <= height + 0.5):
            raise afire.InputError(
                f"{file}: a box of {w:g} x {h:g} pixels at ({x:g}, {y:g}) does not fit in {name}, "
                f"which is {width} x {height}: scale the boxes to the images")
        mask = masks.setdefault(name, np.zeros((size, size), bool))
        mask[math.floor(y * size / height):math.ceil((y + h) * size / height),
             math.floor(x * size / width):math.ceil((x + w) * size / width)] = True
    return {name: mask for name, mask in masks.items() if not mask.all()}


def grad_cam(encoder, weight, images):
    """Token-wise Grad-CAM on the last block [P], not yet clamped: (B, 1, S, S) -> (B, side, side).

    It explains the score mean token @ weight, weight (D,).
    """
    outputs = []

    def keep(blocks, inputs, output):
        outputs.append(output.requires_grad_())

    with torch.enable_grad(), encoder.blocks.register_forward_hook(keep):
        scores = afire.features(encoder, images).mean(1) @ weight              # (B,)
        gradient = torch.autograd.grad(scores.sum(), outputs)[0][:, 1:]        # (B, L, D)
    activation = outputs[0][:, 1:].detach()                                    # (B, L, D)
    cam = (activation * gradient.mean(1, keepdim=True)).sum(2, keepdim=True)   # (B, L, 1)
    return afire.unpatchify(cam, 1).squeeze(1)


def maps_of_network(encoder, model, data, normals, rows, device, steps=100):
    """All maps of images[rows]: -> {score: (T, side, side)}. Grad-CAM learns from data.train."""
    def cams_of(network, weight):
        def in_batches(part):
            return afire.in_batches(lambda images: grad_cam(network, weight, images),
                                    data.images, part, device)

        # Tokens differ more by position than by finding: the normal images' mean is subtracted [D].
        return (in_batches(rows) - in_batches(normals).mean(0)).clamp_min(0).cpu().numpy()

    maps = afire.anomaly_maps(data.images, rows, device, encoder, model, normals)
    x = afire.in_batches(lambda images: afire.features(encoder, images).mean(1), data.images,
                         data.train, device).cpu()
    any_finding = dataclasses.replace(data, labels=data.labels.any(1, keepdims=True),
                                      findings=["any"])
    weight, _ = afire.linear_probe(x, torch.from_numpy(any_finding.labels[data.train]))    # (D, 1)
    maps["Grad-CAM, probe"] = cams_of(encoder, weight[:, 0].to(device))
    tuned, layer = finetune(encoder, any_finding, data.train, steps, device)
    maps["Grad-CAM, tuned"] = cams_of(tuned, layer.weight[0])
    return maps


def best_dice(scores, truth):
    """Dice at the threshold where it is highest: scores (n,), truth (n,) bool -> float."""
    _, rank = np.unique(-scores, return_inverse=True)      # 0 is the highest score
    predicted = np.bincount(rank).cumsum()                 # positives at each threshold
    true_positives = np.bincount(rank, truth).cumsum()
    return float((2 * true_positives / (predicted + truth.sum())).max())


def localisation(grids, masks, patients, resamples=1000):
    """How well maps (T, side, side) locate masks (T, S, S): -> {measure: mean and interval}.

    AUROC over the pixels of an image, Dice at the image's best threshold, and the pointing game:
    is the maximum in a box? Means over images; the bootstrap is over patients (T,).
    """
    grids = torch.from_numpy(grids).unsqueeze(1)                               # (T, 1, side, side)
    maps = F.interpolate(grids, masks.shape[1:], mode="bilinear").numpy()      # (T, 1, S, S)
    values = {"AUROC": [], "Dice": [], "pointing": []}
    for scores, mask in zip(maps.reshape(len(maps), -1), masks.reshape(len(masks), -1)):
        values["AUROC"].append(afire.auroc(scores, mask))
        values["Dice"].append(best_dice(scores, mask))
        values["pointing"].append(mask[scores.argmax()])
    _, person = np.unique(patients, return_inverse=True)
    images_of = np.bincount(person)
    drawn = np.random.default_rng(0).integers(len(images_of), size=(resamples, len(images_of)))
    report = {}
    for measure, by_image in values.items():
        means = np.bincount(person, by_image)[drawn].sum(1) / images_of[drawn].sum(1)
        report[measure] = {"mean": float(np.mean(by_image)),
                           "ci95": np.quantile(means, [0.025, 0.975]).tolist()}
    return report


def plot_boxes(file, images, masks, maps):
    """Images (n, S, S) with masks (n, S, S) outlined in white, beside their maps."""
    outside = F.max_pool2d(torch.from_numpy(~masks).float(), 3, stride=1, padding=1).numpy() > 0
    afire.plot_images(file, {"image": np.where(masks & outside, 255, images), **maps})
    Image.open(file).convert("RGB").save(file)


def evaluate(options):
    """Tests on images with a box, of patients that neither pre-training nor the probe has seen."""
    device = afire.get_device("auto")
    path = afire.find_checkpoint(options.ckpt)
    models, run, trained_on = afire.load_models(path)
    size = models["checkpoint"][0].sizes[0]
    data = afire.load_radiographs(options.data, size, labels=options.labels,
                                  levels=run.levels if run else "file")
    masks = read_boxes(options.boxes, data, options.data)
    patients = np.array(data.patients)
    used = data.used()
    boxed = used[np.isin(np.array(data.names)[used], list(masks))]
    seen = used[np.isin(np.array(data.hashes)[used], trained_on)]
    data.train = data.train[~np.isin(patients[data.train], patients[boxed])]
    data.test = boxed[~np.isin(patients[boxed], patients[seen])]               # (T,)
    normals = afire.normal_references(data)
    abnormal = data.labels[data.train].any(1)
    print(f"testing on {len(data.test)} images of {len(set(patients[data.test]))} patients; "
          f"{len(boxed) - len(data.test)} left out, as pre-training has seen these patients")
    if not len(data.test) or len(normals) < 2 or not abnormal.any():
        raise afire.InputError(f"{len(data.test)} images to test on, {len(normals)} normal and "
                               f"{abnormal.sum()} other images to learn from: all are needed")

    truth = np.stack([masks[data.names[row]] for row in data.test])            # (T, S, S)
    out = Path(options.out or afire.results_folder(path, run) / "boxes")
    out.mkdir(parents=True, exist_ok=True)
    report = {}
    print(f"{'mean (95 % interval)':31}{'AUROC':24}{'Dice':24}pointing game")
    for name, (encoder, model) in models.items():
        (model or encoder).to(device).eval().requires_grad_(False)
        maps = maps_of_network(encoder, model, data, normals, data.test, device)
        report[name] = {}
        for score, grids in maps.items():
            report[name][score] = localisation(grids, truth, patients[data.test])
            cells = ["{:.3f} ({:.3f} to {:.3f})  ".format(metric["mean"], *metric["ci95"])
                     for metric in report[name][score].values()]
            print(f"{score:17}{name:14}{''.join(cells)}")
        if name == "checkpoint":
            plot_boxes(out / "boxes.png", data.images[data.test[:5], 0], truth[:5],
                       {score: grids[:5] for score, grids in maps.items()})
    (out / "boxes.json").write_text(json.dumps(report, indent=2))
    print(f"in {out}: boxes.json, boxes.png")


def main(argv=None):
    """Bad input ends in one sentence and status 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", default="runs/afire", help="folder of a run, or an encoder")
    parser.add_argument("--data", required=True, help="folder of radiographs")
    parser.add_argument("--labels", help="CSV, as for afire.py")
    parser.add_argument("--boxes", required=True, help="CSV: image, finding, x, y, w, h")
    parser.add_argument("--out", help="folder for the results; else boxes in the run's folder")
    try:
        evaluate(parser.parse_args(argv))
    except (afire.InputError, OSError) as error:
        print(f"boxes.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
