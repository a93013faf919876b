#!/usr/bin/env python3
"""The paper's Figure 5 for a run: t-SNE of the tokens, by position and by class.

    python results/tokens.py --ckpt runs/afire --out tokens.png        (needs scikit-learn)

Top: tokens of 24 normal films held out, coloured by position. Bottom: tokens of the same films with
synthetic lesions, without the mean token of their position; those under a lesion are red.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402
from lesions import load_run  # noqa: E402


@torch.no_grad()
def plot_tokens(file, folder):
    """Writes the figure: a column for the untrained encoder, one for the trained."""
    models, run, data = load_run(folder)
    films = data.test[~data.labels[data.test].any(1)][:24]
    x = torch.from_numpy(data.images[films]) / 255
    lesioned, mask = afire.synthetic_lesion_mask(x, torch.Generator().manual_seed(0))
    abnormal = afire.abnormal_tokens(mask, run.patch_size).flatten().numpy()   # (24 * L,)
    side = run.img_size // run.patch_size
    row, column = np.indices((side, side)).reshape(2, -1) / (side - 1)
    by_position = np.tile(np.stack([row, 1 - column, column], 1), (len(films), 1))
    by_class = np.where(abnormal[:, None], [0.8, 0.1, 0.1], [0.7, 0.7, 0.7])
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots(2, 2, subplot_kw={"xticks": [], "yticks": []})
    for axis, title, name in zip(axes.T, ("untrained", "trained"), ("random_init", "checkpoint")):
        encoder = models[name][0].eval()
        tokens = afire.features(encoder, x)                                    # (24, L, D)
        without_position = afire.features(encoder, lesioned) - tokens.mean(0)
        for place, points, colours in ((axis[0], tokens, by_position),
                                       (axis[1], without_position, by_class)):
            flat = TSNE(random_state=0).fit_transform(points.flatten(0, 1).numpy())
            place.scatter(*flat.T, s=3, c=colours)
        axis[0].set_title(f"{title}, by position")
        axis[1].set_title(f"{title}, by class (red: under a lesion)")
    figure.savefig(file, dpi=90)


def main(argv=None):
    """Bad input ends in one sentence and status 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", default="runs/afire", help="folder of a run")
    parser.add_argument("--out", default="tokens.png", help="the picture")
    options = parser.parse_args(argv)
    try:
        plot_tokens(options.out, options.ckpt)
    except (afire.InputError, OSError) as error:
        print(f"tokens.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
