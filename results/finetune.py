#!/usr/bin/env python3
"""Fine-tunes a run's encoder, trained and untrained, with 1, 10 and 100 % of the labels.

    python results/finetune.py runs/afire [runs/mae ...] [--steps 100]

The images are those of `afire.py eval` on the run's own data. Prints the AUROC on the images held
out; RUN/finetune/predictions.npz has all scores, which tables.py shows beside those of RUN/eval.
"""

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402
from lesions import load_run  # noqa: E402


def finetune(encoder, data, rows, steps, device, batch_size=32):
    """Fine-tunes a copy's blocks, with a linear layer, on rows [P; D: recipe]: -> copy, layer."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    encoder = copy.deepcopy(encoder)
    dim = encoder.pos_embed.shape[2]
    layer = nn.Linear(dim, len(data.findings)).to(device)
    trained = [*encoder.blocks.requires_grad_().parameters(), *layer.parameters()]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.05)
    peak = 0.128 / dim                                     # 1e-3 for 128 channels, less for more
    for step in range(steps):
        batch = random.choice(rows, batch_size)
        truth = afire.to_device(data.labels[batch], device).float()            # (b, F)
        images = afire.to_device(data.images[batch], device) / 255
        scores = layer(afire.features(encoder, images).mean(1))                # (b, F)
        loss = F.binary_cross_entropy_with_logits(scores, truth)
        warmup = min(1, (step + 1) / 10)
        optimizer.param_groups[0]["lr"] = warmup * afire.cosine(peak, 0.0, step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.requires_grad_(False), layer.requires_grad_(False)


def scores_of_network(encoder, data, steps, device):
    """Scores of data.test after fine-tuning with few labels: -> {"1%": (draws, T, F)}."""
    def learn(rows):
        tuned, layer = finetune(encoder, data, rows, steps, device)
        scores = afire.in_batches(lambda images: layer(afire.features(tuned, images).mean(1)),
                                  data.images, data.test, device)
        return scores.cpu().numpy()                                            # (T, F)

    return afire.learn_from_few(learn, data.labels, data.train)


def finetune_run(folder, steps):
    """-> the arrays of predictions.npz, with the keys of `afire.py eval`."""
    models, _, data = load_run(folder)
    if not data.findings or not len(data.train) or not len(data.test):
        raise afire.InputError(f"{folder} has {len(data.findings)} findings, {len(data.train)} "
                               f"images to train on and {len(data.test)} to test on: all are "
                               "needed")
    arrays = {"images": np.array(data.names)[data.test],
              "patients": np.array(data.patients)[data.test],
              "findings": np.array(data.findings), "labels": data.labels[data.test]}
    device = afire.get_device("auto")
    for name, (encoder, _) in models.items():
        encoder.to(device).eval().requires_grad_(False)
        for fraction, scores in scores_of_network(encoder, data, steps, device).items():
            arrays[f"{name}/finetune {fraction}"] = scores
    return arrays


def macro_auroc(scores, labels):
    """Mean over draws, then over findings: scores (draws, T, F), labels (T, F) bool -> float."""
    return afire.nan_mean(afire.auroc_by_finding(scores, labels))


def main(argv=None):
    """Bad input ends in one sentence and status 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of afire.py pretrain")
    parser.add_argument("--steps", type=int, default=100, help="of fine-tuning (100)")
    options = parser.parse_args(argv)
    try:
        for folder in options.runs:
            out = folder / "finetune"
            arrays = finetune_run(folder, options.steps)
            out.mkdir(exist_ok=True)
            np.savez_compressed(out / "predictions.npz", **arrays)
            print(f"{'AUROC after fine-tuning':36}{'trained':>9}{'untrained':>11}")
            for fraction in "1%", "10%", "100%":
                trained, untrained = [macro_auroc(arrays[f"{name}/finetune {fraction}"],
                                                  arrays["labels"])
                                      for name in ("checkpoint", "random_init")]
                print(f"{fraction + ' of the labels':36}{trained:9.3f}{untrained:11.3f}")
            print(f"in {out}: predictions.npz of {len(arrays['images'])} images")
    except (afire.InputError, OSError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
