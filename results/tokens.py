#!/usr/bin/env python3
"""The paper's Figure 5 for a run: do the tokens of a position lie together, those of lesions apart?

    python results/tokens.py runs/afire [runs/mae ...] [--no-picture]        (needs scikit-learn)

RUN/cohesion.json: the silhouette, from -1 to 1, of the tokens of 24 normal films held out by their
position, trained and untrained. RUN/tokens.png, t-SNE. Top: these tokens, coloured by position.
Bottom: tokens of the same films with synthetic lesions, without the mean token of their position;
those under a lesion are red.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402
from lesions import load_run  # noqa: E402


def cohesion(tokens):
    """The silhouette of tokens (n, L, D) by position: -> float."""
    n, num_patches, _ = tokens.shape
    position = np.tile(np.arange(num_patches), n)                              # (n * L,)
    return float(silhouette_score(tokens.flatten(0, 1).numpy(), position))


@torch.no_grad()
def plot_tokens(file, models, films, patch_size):
    """Films (n, 1, S, S) in [0, 1]: a column for the untrained encoder, one for the trained."""
    lesioned, mask = afire.synthetic_lesion_mask(films, torch.Generator().manual_seed(0))
    abnormal = afire.abnormal_tokens(mask, patch_size).flatten().numpy()       # (n * L,)
    side = films.shape[3] // patch_size
    row, column = np.indices((side, side)).reshape(2, -1) / (side - 1)
    by_position = np.tile(np.stack([row, 1 - column, column], 1), (len(films), 1))
    by_class = np.where(abnormal[:, None], [0.8, 0.1, 0.1], [0.7, 0.7, 0.7])
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots(2, 2, subplot_kw={"xticks": [], "yticks": []})
    for axis, title, name in zip(axes.T, ("untrained", "trained"), ("random_init", "checkpoint")):
        encoder, _ = models[name]
        tokens = afire.features(encoder, films)                                # (n, L, D)
        without_position = afire.features(encoder, lesioned) - tokens.mean(0)
        for place, points, colours in ((axis[0], tokens, by_position),
                                       (axis[1], without_position, by_class)):
            flat = TSNE(random_state=0).fit_transform(points.flatten(0, 1).numpy())
            place.scatter(*flat.T, s=3, c=colours)
        axis[0].set_title(f"{title}, by position")
        axis[1].set_title(f"{title}, by class (red: under a lesion)")
    figure.savefig(file, dpi=90)


@torch.no_grad()
def evaluate(folder, with_picture):
    """Writes cohesion.json, then the picture, which takes longer."""
    models, run, data = load_run(folder)
    rows = data.normal(data.test)[:24]
    if len(rows) < 2:
        raise afire.InputError(f"{folder} has {len(rows)} normal films held out: two are needed")
    films = torch.from_numpy(data.images[rows]) / 255                          # (n, 1, S, S)
    report = {name: cohesion(afire.features(encoder.eval(), films))
              for name, (encoder, _) in models.items()}
    (folder / "cohesion.json").write_text(json.dumps(report, indent=2))
    print(f"{folder}: cohesion {report['checkpoint']:.3f}, untrained {report['random_init']:.3f}")
    if with_picture:
        plot_tokens(folder / "tokens.png", models, films, run.patch_size)


def main(argv=None):
    """Bad input ends in one sentence and status 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of afire.py pretrain")
    parser.add_argument("--no-picture", action="store_true", help="write cohesion.json only")
    options = parser.parse_args(argv)
    try:
        for folder in options.runs:
            evaluate(folder, not options.no_picture)
    except (afire.InputError, OSError) as error:
        print(f"tokens.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
