#!/usr/bin/env python3
"""Fine-tunes a run's encoder, trained and untrained, with 1, 10 and 100 % of the labels.

    python results/finetune.py runs/afire [runs/mae ...] [--steps 100] [--fractions 10%] ...

The images and the subsets of the labels are those of `afire.py eval` on the run's own data. Every
fit starts at the ridge probe of `afire.py eval`. A probe's output s is near 0 or 1, the label; the
linear layer starts as the logit 4 s - 2, whose sigmoid has the value and the slope of s at 1/2.

Prints the AUROC on the images held out; RUN/finetune/predictions.npz has all scores, which
tables.py shows beside those of RUN/eval.
"""

import argparse
import copy
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402
from runs import exit_on_bad_input, load_run  # noqa: E402

REPEATS = {"1%": 5, "10%": 5, "100%": 1}                   # as in afire.learn_from_few


def score_images(encoder, layer, images):
    """A layer on tokens averaged in cells, as many as it has inputs for: -> logits (B, F)."""
    cells = math.isqrt(layer.in_features // encoder.config["embed_dim"])
    return layer(afire.average_in_cells(afire.features(encoder, images), cells))


def score_rows(encoder, layer, data, rows, device):
    """-> logits (n, F) of images[rows], as an array."""
    return afire.in_batches(lambda images: score_images(encoder, layer, images), data.images,
                            rows, device).cpu().numpy()


def probe(encoder, data, rows, device, cells=4):
    """The ridge probe on tokens averaged in cells, learned from rows: -> nn.Linear of logits."""
    x = afire.in_batches(
        lambda images: afire.average_in_cells(afire.features(encoder, images), cells),
        data.images, rows, device).cpu()                                       # (n, D * cells ** 2)
    weight, bias = afire.linear_probe(x, torch.from_numpy(data.labels[rows]))
    layer = nn.Linear(*weight.shape).requires_grad_(False)
    layer.weight.copy_(4 * weight.T)
    layer.bias.copy_(4 * bias - 2)
    return layer.to(device)


def finetune(encoder, data, rows, steps, device, cells=4, bar=None, batch_size=32):
    """Fine-tunes a copy's blocks and the probe on rows [P; D: recipe]: -> copy, nn.Linear.

    bar: a tqdm, which counts the steps.
    """
    random = np.random.default_rng(0)
    encoder = copy.deepcopy(encoder)
    layer = probe(encoder, data, rows, device, cells)
    trained = [*encoder.blocks.requires_grad_().parameters(),
               *layer.requires_grad_().parameters()]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.05)
    peak = 0.128 / encoder.config["embed_dim"]             # 1e-3 for 128 channels, less for more
    for step in range(steps):
        batch = random.choice(rows, batch_size)
        truth = afire.to_device(data.labels[batch], device).float()            # (b, F)
        images = afire.to_device(data.images[batch], device) / 255
        loss = F.binary_cross_entropy_with_logits(score_images(encoder, layer, images), truth)
        warmup = min(1, (step + 1) / 10)
        optimizer.param_groups[0]["lr"] = warmup * afire.cosine(peak, 0.0, step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if bar is not None:
            bar.update()
    return encoder.requires_grad_(False), layer.requires_grad_(False)


def scores_of_network(encoder, data, options, device, bar):
    """Scores of data.test after fine-tuning with few labels: -> {"1%": (repeats, T, F)}.

    Of options, steps, fractions and repeats are used; bar: as of finetune, for all fits of a run.
    """
    wanted = iter([fraction in options.fractions and repeat < options.repeats
                   for fraction, repeats in REPEATS.items() for repeat in range(repeats)])

    def learn(rows):
        if not next(wanted):
            return np.full((len(data.test), len(data.findings)), math.nan)
        tuned, layer = finetune(encoder, data, rows, options.steps, device, bar=bar)
        scores = score_rows(tuned, layer, data, data.test, device)             # (T, F)
        if bar.n == options.steps:                         # the first fit
            fits = bar.total // bar.n
            minutes = fits * bar.format_dict["elapsed"] / 60
            bar.write(f"{fits} fits of {options.steps} steps take about {minutes:.1f} minutes")
        return scores

    scores = afire.learn_from_few(learn, data.labels, data.train)
    return {fraction: scores[fraction][:options.repeats] for fraction in options.fractions}


def finetune_run(folder, options):
    """-> the arrays of predictions.npz, with the keys of `afire.py eval`."""
    models, _, data = load_run(folder)
    if not data.findings or not len(data.train) or not len(data.test):
        raise afire.InputError(f"{folder} has {len(data.findings)} findings, {len(data.train)} "
                               f"images to train on and {len(data.test)} to test on: all are "
                               "needed, so pre-train with --labels")
    arrays = {"images": np.array(data.names)[data.test],
              "patients": np.array(data.patients)[data.test],
              "findings": np.array(data.findings), "labels": data.labels[data.test]}
    device = afire.get_device("auto")
    fits = sum(min(REPEATS[fraction], options.repeats) for fraction in options.fractions)
    with tqdm(total=len(models) * fits * options.steps, desc="fine-tune", unit="step",
              mininterval=1) as bar:
        for name, (encoder, _) in models.items():
            encoder.to(device).eval().requires_grad_(False)
            for fraction, scores in scores_of_network(encoder, data, options, device, bar).items():
                arrays[f"{name}/finetune {fraction}"] = scores
    return arrays


def macro_auroc(scores, labels):
    """Mean over repeats, then over findings: scores (repeats, T, F), labels (T, F) bool."""
    return afire.nan_mean(afire.auroc_by_finding(scores, labels))


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of afire.py pretrain")
    parser.add_argument("--steps", type=afire.number(int, 1), default=100,
                        help="of a fit (default: 100)")
    parser.add_argument("--fractions", nargs="+", choices=REPEATS, default=list(REPEATS),
                        help="of the labels (default: all of them)")
    parser.add_argument("--repeats", type=afire.number(int, 1, 5), default=5,
                        help="fits with 1 and with 10 %% of the labels, on other subsets "
                        "(default: 5)")
    options = parser.parse_args(argv)
    with exit_on_bad_input("finetune.py"):
        for folder in options.runs:
            arrays = finetune_run(folder, options)
            out = folder / "finetune"
            out.mkdir(exist_ok=True)
            np.savez_compressed(out / "predictions.npz", **arrays)
            print(f"{'AUROC after fine-tuning':36}{'trained':>9}{'untrained':>11}")
            for fraction in options.fractions:
                trained, untrained = [macro_auroc(arrays[f"{name}/finetune {fraction}"],
                                                  arrays["labels"])
                                      for name in ("checkpoint", "random_init")]
                print(f"{fraction + ' of the labels':36}{trained:9.3f}{untrained:11.3f}")
            print(f"in {out}: predictions.npz of {len(arrays['images'])} images")


if __name__ == "__main__":
    main()
