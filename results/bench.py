#!/usr/bin/env python3
"""Measures the parts of a training step, and what a whole recipe costs on this machine.

    python results/bench.py                    presets phantoms and paper: five minutes on a CPU
    python results/bench.py --preset paper     or other options of `afire.py pretrain`

Without options, paper has batches of 8 images. The bare backbone is what no implementation can do
without: the networks forward and the student's backward, on tensors on the device. On a GPU, the
memory that a step needs is printed too.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402


def parts_of_a_step(trainer, film):
    """-> {name: function of a batch}; film: the path of an image of 512 px."""
    options = trainer.options
    device = trainer.device
    model = trainer.model
    size = options.img_size
    n = options.batch_size
    pixels = afire.phantoms(8, size)[0][np.arange(n) % 8]                      # (n, 1, S, S)
    normal = afire.to_device(pixels, device) / 255
    centres = afire.texture_centre(normal)                                     # (n, 2)
    centres_on_host = centres.cpu().numpy()
    x = afire.normalise(normal)

    def lesion_mask():
        return afire.synthetic_lesion_mask(normal, torch.Generator().manual_seed(0), centres)[1]

    abnormal = afire.abnormal_tokens(lesion_mask(), options.patch_size)        # (n, L)

    def backbone():
        trainer.optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=trainer.bf16):
            with torch.no_grad():
                model.teacher["head"](model.teacher["encoder"](x)[:, 1:])
            tokens = model.student["encoder"](x)
            logits = model.student["head"](tokens[:, 1:])
            restored = model.decoder(tokens, abnormal)
        (logits.float().mean() + restored.float().mean()).backward()

    return {"decode": lambda: [afire.read_image(film, size) for _ in range(n)],
            "texture centre": lambda: afire.texture_centre(normal),
            "lesion mask": lesion_mask,
            "bare backbone": backbone,
            "full step": lambda: trainer.step(pixels, centres_on_host, 10, 10)}


def measure(parts, device, rounds=9):
    """The median of each part's seconds, without two rounds to warm up: -> {name: seconds}."""
    seconds = {name: [] for name in parts}
    for _ in range(rounds):                                # in turn, so that drift hits them alike
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            torch.zeros(1, device=device).item()           # waits for the device
            seconds[name].append(time.perf_counter() - started)
    return {name: np.median(times[2:]) for name, times in seconds.items()}


def bench(options):
    """Prints a table for the options of a pre-training."""
    device = afire.get_device(options.device)
    trainer = afire.Trainer(options, device)
    n = options.batch_size
    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder, "film.png")
        Image.fromarray(afire.phantoms(1, 512)[0][0, 0]).save(film)
        parts = parts_of_a_step(trainer, film)
        medians = measure(parts, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    print(f"\n{options.arch}, {options.img_size} px, batches of {n}, on {name}")
    for part, seconds in medians.items():
        print(f"{part:16} {1e3 * seconds / n:9.3f} ms an image {n / seconds:9.1f} images/s")
    step = medians["full step"]
    print(f"full step / bare backbone: {step / medians['bare backbone']:.3f}")
    hours = options.epochs * 10_000 * step / n / 3600
    print(f"{options.epochs} epochs take {hours:.1f} hours for each 10,000 normal images")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        parts["full step"]()
        print(f"memory of a step: {torch.cuda.max_memory_allocated(device) / 2 ** 30:.1f} GiB")


def main(argv=None):
    """Bad input ends in one sentence and status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False,
        epilog="All other arguments are options of afire.py pretrain.")
    _, given = parser.parse_known_args(argv)
    settings = [given] if given else [["--preset", "phantoms"],
                                      ["--preset", "paper", "--batch-size", "8"]]
    try:
        for arguments in settings:
            bench(afire.parse_arguments(["pretrain", "--data", "none", *arguments]))
    except (afire.InputError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
