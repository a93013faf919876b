#!/usr/bin/env python3
"""Does Grad-CAM of a classifier that learned from image labels alone point at known lesions?

    python results/locate.py runs/afire [runs/mae ...]

The abstract's third claim, where the truth is known. A classifier learns "lesion or none" from the
normal images to train on, as they are and with lesions. Those held out are tested, also as they are
and with lesions. Two generators:

    lesions     AFiRe's own, which the encoder has trained with
    ellipses    another one: a soft-edged bright ellipse in each image, at random
    findings    not synthetic: the findings of a set that has masks, for instance the phantoms

The classifier is a probe on the mean token, or an encoder fine-tuned from it; both give the AUROC
of images with lesions. Maps are compared with the lesions' masks as in boxes.py: own map, own minus
others, static priors. "minus normals" is Grad-CAM minus its mean over normal images. Beside
Grad-CAM stand the anomaly scores, which have learned from normal images only, and the neighbours of
plain pixels. RUN/locate/locate.npz has the values of every image.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402
from boxes import grad_cams, learn_classifiers, localise, static_priors  # noqa: E402
from finetune import score_rows  # noqa: E402
from runs import exit_on_bad_input, load_run  # noqa: E402


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


def add_ellipses(images, seed=0):
    """A soft-edged ellipse in each image, lighter by 25 to 75 levels: as of add_lesions.

    Image i depends on (seed, i) alone. The ellipse lies inside the image, and its mask has all
    pixels that it changes by at least half a level, before they are clipped at white.
    """
    size = images.shape[3]
    axis = (2 * np.arange(size) + 1) / size - 1            # centres of the pixels, -1 to 1
    lesioned = np.empty_like(images)
    masks = np.zeros((len(images), size, size), bool)
    for i, image in enumerate(images):
        random = np.random.default_rng((seed, i))
        width, height = random.uniform(0.1, 0.35, 2)       # half axes
        angle = random.uniform(0, np.pi)
        room = 1 - 1.25 * max(width, height)               # with the soft edge
        x, y = random.uniform(-room, room, 2)
        right = axis - x
        down = axis[:, None] - y
        along = right * np.cos(angle) + down * np.sin(angle)
        across = down * np.cos(angle) - right * np.sin(angle)
        shape = afire.ellipse(along, across, width, height, 0.25 * width)      # (S, S), 0 to 1
        added = random.uniform(25, 75) * shape
        lesioned[i] = (image + added).clip(0, 255).round()
        masks[i] = added >= 0.5
    return lesioned, masks


def with_lesions(data, add):
    """Normal images of data as they are, then with lesions: -> Radiographs with masks of test."""
    train = data.normal(data.train)
    test = data.normal(data.test)
    rows = np.concatenate([train, test])
    n = len(rows)
    plain = np.array(data.images[rows])
    lesioned, masks = add(plain)
    names = [data.names[row] for row in rows]
    held_out = np.arange(len(train), n)
    return dataclasses.replace(
        data, names=names + [f"{name} with lesions" for name in names],
        images=np.concatenate([plain, lesioned]), labels=np.arange(2 * n)[:, None] >= n,
        findings=["lesion"], patients=[data.patients[row] for row in rows] * 2, hashes=[""] * 2 * n,
        train=np.concatenate([np.arange(len(train)), n + np.arange(len(train))]),
        test=np.concatenate([held_out, n + held_out]),
        masks={n + i: masks[i] for i in held_out})


def sets_of(data):
    """-> {set: Radiographs with one finding, to test the classifier on}."""
    sets = {"lesions": with_lesions(data, add_lesions),
            "ellipses": with_lesions(data, add_ellipses)}
    if data.masks:
        any_finding = data.labels.any(1, keepdims=True)
        sets["findings"] = dataclasses.replace(data, labels=any_finding, findings=["any"])
    return sets


def maps_of_network(encoder, model, data, normals, device, steps, bar):
    """-> scores {score: (T,)} and maps {score: (T, side, side)} of data.test."""
    maps = afire.anomaly_maps(data.images, data.test, device, encoder, model, normals)
    scores = {score: afire.image_scores(grids) for score, grids in maps.items()}
    if not model:                                          # pixels: no Grad-CAM
        return scores, maps
    classifiers = learn_classifiers(encoder, data, device, steps, bar)
    for name, (network, layer) in classifiers.items():
        scores[name] = score_rows(network, layer, data, data.test, device)[:, 0]
    return scores, maps | grad_cams(classifiers, data, normals, device)


def score_set(data, models, patch_size, device, steps, bar):
    """-> the arrays of one set in locate.npz.

    The values of maps are of the M test images whose mask can be located, in "located" (T,) bool.
    """
    patients = np.array(data.patients)[data.test]                              # (T,)
    masks = {row: mask for row, mask in data.masks.items() if mask.any() and not mask.all()}
    located = data.labels[data.test, 0] & np.isin(data.test, list(masks))
    truth = np.stack([masks[row] for row in data.test[located]])               # (M, S, S)
    normals = afire.normal_references(data)
    arrays = {"images": np.array(data.names)[data.test], "patients": patients,
              "labels": data.labels[data.test, 0], "located": located}
    arrays |= {f"static/{prior}/own map": values
               for prior, values in static_priors(truth, patients[located]).items()}
    networks = {**models, "pixels": (afire.PatchMeans(patch_size), None)}
    for name, (encoder, model) in networks.items():
        scores, maps = maps_of_network(encoder, model, data, normals, device, steps, bar)
        arrays |= {f"{name}/{score}": values for score, values in scores.items()}
        for score, grids in maps.items():
            columns = localise(grids[located], truth, patients[located])
            for column in "own map", "own minus others":
                arrays[f"{name}/{score}/{column}"] = columns[column]           # (M,)
    return arrays


def print_set(name, arrays):
    """AUROC of images by each score, and the means of the values of each map."""
    print(f"{name}: {arrays['located'].sum()} of {len(arrays['labels'])} images have a mask\n"
          f"{'AUROC':44}{'images':>8}{'own map':>9}{'own minus others':>18}")
    rows = dict.fromkeys(key.removesuffix("/own map") for key in arrays
                         if "/" in key and not key.endswith("minus others"))
    for row in rows:
        cells = [f"{row:44}", f"{'-':>8}", f"{'-':>9}", f"{'-':>18}"]
        if row in arrays:
            cells[1] = f"{afire.auroc(arrays[row], arrays['labels']):8.3f}"
        if f"{row}/own map" in arrays:
            cells[2] = f"{arrays[f'{row}/own map'].mean():9.3f}"
        if f"{row}/own minus others" in arrays:
            cells[3] = f"{arrays[f'{row}/own minus others'].mean():+18.3f}"
        print("".join(cells))


def score_run(folder, options):
    """-> {set: the arrays of score_set}, which are printed."""
    models, run, data = load_run(folder)
    numbers = [len(data.normal(rows)) for rows in (data.train, data.test)]
    patients = {data.patients[row] for row in data.normal(data.test)}
    if min(*numbers, len(patients)) < 2:
        raise afire.InputError(f"{folder} has {numbers[0]} normal images in train and {numbers[1]} "
                               f"of {len(patients)} patients in test: two of each are needed, so "
                               "pre-train with a table whose split holds some out")
    if options.trained_only:
        models.pop("random_init")
    device = afire.get_device("auto")
    for _, model in models.values():
        model.to(device).eval().requires_grad_(False)
    sets = sets_of(data)
    results = {}
    with tqdm(total=len(sets) * len(models) * options.steps, desc="fine-tune", unit="step",
              mininterval=1) as bar:
        for name, images in sets.items():
            results[name] = score_set(images, models, run.patch_size, device, options.steps, bar)
    for name, arrays in results.items():
        print_set(f"{folder}, {name}", arrays)
    return results


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of afire.py pretrain")
    parser.add_argument("--steps", type=afire.number(int, 1), default=100,
                        help="of fine-tuning (default: 100)")
    parser.add_argument("--trained-only", action="store_true", help="not the untrained encoder too")
    options = parser.parse_args(argv)
    with exit_on_bad_input("locate.py"):
        for folder in options.runs:
            results = score_run(folder, options)
            out = folder / "locate"
            out.mkdir(exist_ok=True)
            np.savez_compressed(out / "locate.npz", **{
                f"{name}/{key}": values for name, arrays in results.items()
                for key, values in arrays.items()})
            print(f"in {out}: locate.npz")


if __name__ == "__main__":
    main()
