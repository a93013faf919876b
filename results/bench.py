#!/usr/bin/env python3
"""Measures the parts of a training step, and what a whole pre-training costs.

    python results/bench.py                    presets phantoms and paper: five minutes on a CPU
    python results/bench.py --preset paper --images 81117    or other options of `afire.py pretrain`

Without options, paper has batches of 8 images. The bare backbone is what no implementation can do
without: the networks forward and the student's backward, on tensors on the device. On a GPU, the
memory that a step needs is printed too.

Operations are those of matrix products and convolutions, a multiplication and an addition as two.
They are the same on every machine: the total in TFLOP, divided by the TFLOP/s that training reaches
on a GPU, which is less than its data sheet says, gives seconds.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402
from runs import exit_on_bad_input  # noqa: E402


def parts_of_a_step(trainer, file):
    """-> {name: function of a batch}; file: an image of 512 px."""
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

    return {"decode": lambda: [afire.read_image(file, size) for _ in range(n)],
            "texture centre": lambda: afire.texture_centre(normal),
            "lesion mask": lesion_mask,
            "bare backbone": backbone,
            "full step": lambda: trainer.step(pixels, centres_on_host, trainer.per_epoch)}


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


def operations(model, normal):
    """Operations of a training step for an image of normal (n, 1, S, S): -> forward, backward."""
    lesioned, mask = afire.synthetic_lesion_mask(normal)
    with sdpa_kernel(SDPBackend.MATH):                     # attention as products that are counted
        with FlopCounterMode(display=False) as forward:
            loss = model(normal, lesioned, mask)["loss"]
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops() / len(normal), backward.get_total_flops() / len(normal)


def bench(options, images):
    """Prints a table for the options of a pre-training on so many normal images."""
    device = afire.get_device(options.device)
    n = options.batch_size
    if options.img_size % options.patch_size or images < n:
        raise afire.InputError("--img-size must be a multiple of --patch-size, and --images at "
                               "least --batch-size")
    trainer = afire.Trainer(options, device, per_epoch=images // n)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "image.png")
        Image.fromarray(afire.phantoms(1, 512)[0][0, 0]).save(file)
        parts = parts_of_a_step(trainer, file)
        medians = measure(parts, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    print(f"\n{options.arch}, {options.img_size} px, batches of {n}, on {name}")
    for part, seconds in medians.items():
        print(f"{part:16} {1e3 * seconds / n:9.3f} ms an image {n / seconds:9.1f} images/s")
    step = medians["full step"]
    print(f"full step / bare backbone: {step / medians['bare backbone']:.3f}")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        parts["full step"]()
        print(f"memory of a step: {torch.cuda.max_memory_allocated(device) / 2 ** 30:.1f} GiB")
    normal = afire.to_device(afire.phantoms(1, options.img_size)[0], device) / 255
    forward, backward = operations(trainer.model, normal)
    print(f"operations: {forward / 1e9:.3f} GFLOP an image forward, {backward / 1e9:.3f} backward")
    steps = options.epochs * trainer.per_epoch
    total = steps * n * (forward + backward)
    print(f"{options.epochs} epochs of {images:,} images: {steps:,} steps, "
          f"{total / 1e12:,.1f} TFLOP, {steps * step / 3600:,.1f} hours here")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False,
        epilog="All other arguments are options of afire.py pretrain.")
    parser.add_argument("--images", type=afire.number(int, 1), default=10_000,
                        help="number of normal images (default: 10000)")
    ours, others = parser.parse_known_args(argv)
    settings = [others] if others else [["--preset", "phantoms"],
                                        ["--preset", "paper", "--batch-size", "8"]]
    with exit_on_bad_input("bench.py"):
        for arguments in settings:
            options = afire.parse_arguments(["pretrain", "--data", "none", *arguments])
            bench(options, ours.images)


if __name__ == "__main__":
    main()
