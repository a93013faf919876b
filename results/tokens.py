#!/usr/bin/env python3
"""The paper's Figure 5 for a run: do the tokens of a position lie together, those of lesions apart?

    python results/tokens.py runs/afire [runs/mae ...] [--no-picture]        (needs scikit-learn)

RUN/cohesion.json: the silhouette, from -1 to 1, of the tokens of 24 normal images held out by their
position, trained and untrained. RUN/tokens.png, t-SNE. Top: these tokens, coloured by position.
Bottom: tokens of the same images with synthetic lesions, without the mean token of their position;
those under a lesion are red. Right: a key for the colours.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402
from runs import exit_on_bad_input, load_run  # noqa: E402

RED = [0.8, 0.1, 0.1]
GREY = [0.7, 0.7, 0.7]


def cohesion(tokens):
    """The silhouette of tokens (n, L, D) by position: -> float."""
    n, num_patches, _ = tokens.shape
    position = np.tile(np.arange(num_patches), n)                              # (n * L,)
    return float(silhouette_score(tokens.flatten(0, 1).numpy(), position))


def colours_of_positions(side):
    """More red from top to bottom, from green on the left to blue on the right: (side, side, 3)."""
    row, column = np.indices((side, side)) / max(side - 1, 1)
    return np.stack([row, 1 - column, column], 2)


@torch.no_grad()
def plot_tokens(file, models, images, patch_size):
    """Images (n, 1, S, S) in [0, 1]: columns for the untrained encoder, the trained and the key."""
    lesioned, mask = afire.synthetic_lesion_mask(images, torch.Generator().manual_seed(0))
    abnormal = afire.abnormal_tokens(mask, patch_size).flatten().numpy()       # (n * L,)
    key = colours_of_positions(images.shape[3] // patch_size)
    by_position = np.tile(key.reshape(-1, 3), (len(images), 1))                # (n * L, 3)
    by_class = np.where(abnormal[:, None], RED, GREY)
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(2, 3, width_ratios=[3, 3, 1],
                           subplot_kw={"xticks": [], "yticks": []})
    with tqdm(total=4, desc="t-SNE", unit="panel") as bar:
        for column, title, name in zip(axes.T, ("untrained", "trained"),
                                       ("random_init", "checkpoint")):
            encoder, _ = models[name]
            tokens = afire.features(encoder, images)                           # (n, L, D)
            without_position = afire.features(encoder, lesioned) - tokens.mean(0)
            for axis, points, colours in ((column[0], tokens, by_position),
                                          (column[1], without_position, by_class)):
                flat = TSNE(random_state=0).fit_transform(points.flatten(0, 1).numpy())
                axis.scatter(*flat.T, s=3, c=colours)
                bar.update()
            column[0].set_title(f"{title}, by position")
            column[1].set_title(f"{title}, by class")
    axes[0, 2].imshow(key)
    axes[0, 2].set_title("position\nin the image")
    axes[1, 2].axis("off")
    for colour, label in (RED, "under a lesion"), (GREY, "elsewhere"):
        axes[1, 2].scatter([], [], s=20, color=colour, label=label)
    axes[1, 2].legend(loc="center")
    figure.savefig(file, dpi=90)


@torch.no_grad()
def evaluate(folder, with_picture):
    """Writes cohesion.json, then the picture, which takes longer."""
    models, run, data = load_run(folder)
    rows = data.normal(data.test)[:24]
    if len(rows) < 2:
        raise afire.InputError(f"{folder} has {len(rows)} normal images held out: two are needed, "
                               "by a table whose split holds some out")
    images = torch.from_numpy(data.images[rows]) / 255                         # (n, 1, S, S)
    report = {name: cohesion(afire.features(encoder.eval(), images))
              for name, (encoder, _) in models.items()}
    (folder / "cohesion.json").write_text(json.dumps(report, indent=2))
    print(f"{folder}: cohesion {report['checkpoint']:.3f}, untrained {report['random_init']:.3f}")
    if with_picture:
        plot_tokens(folder / "tokens.png", models, images, run.patch_size)
        print(f"in {folder}: tokens.png")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of afire.py pretrain")
    parser.add_argument("--no-picture", action="store_true", help="write cohesion.json only")
    options = parser.parse_args(argv)
    with exit_on_bad_input("tokens.py"):
        for folder in options.runs:
            evaluate(folder, not options.no_picture)


if __name__ == "__main__":
    main()
