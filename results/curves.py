#!/usr/bin/env python3
"""Plots the curves of pre-training, finished or not, from log.jsonl and config.json.

    python results/curves.py runs/afire [runs/mae ...] [--out FILE]

The three losses, before they are weighted, the learning rate and the gradient's norm, a colour a
run. Dashed lines say what a loss is worth: L_stru is log K if every token gives all K clusters the
same probability; L_cate is log 2 if tokens under lesions are not told apart from normal ones;
L_rest is the variance of the normalised images (over all pixels, mean over channels) if each
channel's mean is predicted everywhere. The variance needs the images that the run was trained on;
it says nothing about an MAE, whose loss is of patches that are normalised one by one.
"""

import argparse
import inspect
import json
import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402
from runs import exit_on_bad_input  # noqa: E402

PANELS = {"structure": "L_stru", "category": "L_cate", "restoration": "L_rest",
          "lr": "learning rate", "gradient_norm": "norm of the gradient"}
LINES = {"structure": "log K: all clusters alike", "category": "log 2: lesions not told apart",
         "restoration": "variance: mean grey everywhere"}


def read_log(folder):
    """A list of records, one an epoch."""
    file = folder / "log.jsonl"
    if not file.is_file():
        raise afire.InputError(f"there is no {file}: name the folder of a run that has finished an "
                               "epoch")
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if all({"epoch", *PANELS} <= record.keys() for record in records) and records:
            return records
    except (AttributeError, ValueError):
        pass
    raise afire.InputError(f"{file} is empty, cut off or no log of afire.py: the run writes it "
                           "anew after its next epoch; or leave this run out")


def pixel_variance(images, rows):
    """Variance of the normalised pixels of images[rows], mean over the channels."""
    def moments(x):
        pixels = afire.normalise(x).flatten(2)                                 # (b, 3, S * S)
        return torch.stack([pixels.mean(2), pixels.var(2, correction=0)], 1)   # (b, 2, 3)

    mean, within = afire.in_batches(moments, images, rows, torch.device("cpu")).double().unbind(1)
    between = mean.var(0, correction=0)                                        # of images, (3,)
    return float((within.mean(0) + between).mean())


def training_variance(folder, config):
    """pixel_variance of the images that the run was trained on; InputError if not at hand."""
    trained_on = afire.read_checkpoint(folder).get("images")
    data = afire.load_radiographs(config["data"], config["img_size"], labels=config["labels"],
                                  levels=config["levels"], all_normal=not config["labels"])
    normals = data.normal(data.train)
    if [data.hashes[row] for row in normals] != trained_on:
        raise afire.InputError("the normal images to train on are others than those of the run")
    return pixel_variance(data.images, normals)


def reference_lines(folder):
    """What the losses are where nothing is learned: -> {loss: value}."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        architecture = afire.ARCHITECTURES[config["arch"]]
        config = {name: config[name] for name in ("data", "img_size", "labels", "levels")}
    except (KeyError, TypeError, ValueError) as error:
        raise afire.InputError(f"{file} is cut off or of no run of afire.py: the command that "
                               "started the run writes it anew") from error
    default = inspect.signature(afire.AFiRe).parameters["out_dim"].default
    clusters = architecture.get("out_dim", default)
    lines = {"structure": math.log(clusters), "category": math.log(2)}
    try:
        lines["restoration"] = training_variance(folder, config)
    except (afire.InputError, OSError) as error:
        print(f"{folder}: the variance is left out of L_rest: {error}")
    return lines


def plot_curves(file, logs, lines):
    """logs {run: records}, lines {run: {loss: value}}: a panel for each metric, as RGB PNG."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for panel, (metric, title) in zip(panels, PANELS.items()):
        panel.set_title(title)
        panel.set_xlabel("epoch")
        for run, records in logs.items():
            panel.plot([record["epoch"] for record in records],
                       [record[metric] for record in records], marker=".", label=run)
        values = {of_run[metric] for of_run in lines.values() if metric in of_run}
        for value in sorted(values):                       # runs with the same value share a line
            panel.axhline(value, color="black", linestyle="--", linewidth=1)
            panel.annotate(f"{LINES[metric]}, {value:.2f}", (1, value), (-4, -4), fontsize=8,
                           xycoords=("axes fraction", "data"), textcoords="offset points",
                           horizontalalignment="right", verticalalignment="top")
        panel.set_ylim(bottom=0)
    panels[5].axis("off")
    panels[5].legend(*panels[0].get_legend_handles_labels(), loc="center")
    figure.savefig(file, format="png", dpi=100)
    Image.open(file).convert("RGB").save(file, format="png")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of afire.py pretrain")
    parser.add_argument("--out", help="the picture; default: curves.png in the first run's folder")
    options = parser.parse_args(argv)
    out = options.out or options.runs[0] / "curves.png"
    with exit_on_bad_input("curves.py"):
        logs = {str(folder): read_log(folder) for folder in options.runs}
        lines = {str(folder): reference_lines(folder) for folder in options.runs}
        plot_curves(out, logs, lines)
        print(f"in {out}: {len(logs)} runs")


if __name__ == "__main__":
    main()
