"""Tests of afire.py, in the order of the file; those of data/ and results/ stand there.

A test compares with something written independently: a plain loop from the equation in float64,
timm, scikit-learn, OpenCV, Pillow, or a property that must hold whatever the input.
"""

import argparse
import ast
import contextlib
import copy
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics
import sklearn.neighbors
import sklearn.pipeline
import sklearn.preprocessing
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.testing import assert_close

import afire

ROOT = Path(afire.__file__).resolve().parent


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@functools.cache
def phantom_images(n, size):
    return torch.from_numpy(afire.phantoms(n, size)[0]).float() / 255


def tiny_model(**options):
    torch.manual_seed(0)
    return afire.AFiRe(**{**dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2,
                                 out_dim=16, head_dim=32, bottleneck_dim=16, decoder_dim=32,
                                 decoder_depth=1, decoder_heads=2), **options})


def tiny_batch():
    images = phantom_images(160, 32)[:6]
    return images, *afire.synthetic_lesion_mask(images, seeded())


TYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


@torch.no_grad()
def randomise(module):
    """Also what starts as zeros or ones: biases, norms and positions."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return module


def timm_vit(**options):
    return randomise(timm.models.VisionTransformer(num_classes=0, **options)).eval()


def refusal(capsys, arguments):
    """The command ends with status 2: -> the sentence that it prints, in a line of its own."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        afire.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(autouse=True, scope="session")
def working_folder(tmp_path_factory):
    """Runs and caches of the tests lie in a temporary folder."""
    os.chdir(tmp_path_factory.mktemp("work"))


# ---- Synthetic lesion mask -----------------------------------------------------------------------

def odd_images(height, width, seed):
    """(8, 1, H, W): a phantom, noise, blobs, one bright pixel, constants."""
    random = np.random.default_rng(seed)
    phantom = cv2.resize(phantom_images(4, 64)[seed % 4, 0].numpy(), (width, height))
    noise = random.random((height, width))
    blobs = cv2.GaussianBlur(random.random((height, width)), (0, 0), width / 12)
    blobs = (blobs - blobs.min()) / np.ptp(blobs)
    pixel = np.zeros((height, width))
    pixel[random.integers(height), random.integers(width)] = 1
    flat = [np.full((height, width), grey) for grey in (0, 0.3, 0.95, 1)]
    return torch.from_numpy(np.stack([phantom, noise, blobs, pixel, *flat])).float().unsqueeze(1)


def largest_by_opencv(image):
    """(H, W) in 0..255 -> (H, W) bool: the largest region above Otsu's threshold."""
    bright = cv2.threshold(np.uint8(image), 0, 1, cv2.THRESH_OTSU)[1]
    _, labels, stats, _ = cv2.connectedComponentsWithStats(bright, connectivity=8)
    return labels == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()


@pytest.mark.parametrize("seed", range(10))
def test_largest_bright_region_is_opencvs_even_of_noise_and_spirals(seed):
    noise = torch.rand(1, 64, 97, generator=seeded(seed)) < 0.3 + 0.02 * seed
    turn = torch.linspace(0, 28, 4000)[seed * 50:]
    spiral = torch.zeros(1, 64, 97)
    spiral[0, (32 + turn * turn.sin()).long(), (48 + turn * turn.cos()).long()] = 1
    images = (torch.cat([odd_images(64, 97, seed)[:3, 0], noise, spiral]) * 255).round().long()
    images = torch.cat([images, images[4:]])
    images[5, :40, 80:] = 255                              # more pixels than the spiral, less wide
    found = afire.largest_region(images > afire.otsu_threshold(images).view(-1, 1, 1))
    assert np.array_equal(found, [largest_by_opencv(image) for image in images])


def test_texture_centre_is_within_4_pixels_of_opencvs():
    blobs = torch.stack([odd_images(224, 224, seed)[2] for seed in range(20)])
    images = torch.cat([blobs, (blobs > 0.6).float(), phantom_images(12, 224)])
    for ours, image in zip(afire.texture_centre(images).tolist(), images[:, 0], strict=True):
        points = np.argwhere(largest_by_opencv((image * 255).round()))
        assert math.dist(ours, cv2.minEnclosingCircle(points.astype(np.float32))[0]) <= 4
    default = afire.synthetic_lesion_mask(images, seeded())
    assert_close(afire.synthetic_lesion_mask(images, seeded(), afire.texture_centre(images)),
                 default)


def test_there_are_one_to_four_lesions_anywhere_and_overlaps_add_up():
    images = torch.full((600, 1, 112, 112), 0.3)
    masks = afire.synthetic_lesion_mask(images, seeded(), torch.full((600, 2), 56))[1][:, 0]
    regions = [cv2.connectedComponents(np.uint8(mask > 0))[0] - 1 for mask in masks.numpy()]
    assert set(regions) == {1, 2, 3, 4}
    peak = masks.amax((1, 2))
    assert (peak > 0.95 * 0.15).all() and (peak < 4 * 0.15).all() and (peak > 1.2 * 0.15).sum() > 30
    reached = (masks > 0).any(0)
    assert all(edge.any() for edge in (reached[0], reached[-1], reached[:, 0], reached[:, -1]))


@pytest.mark.parametrize("shape", [(224, 224), (224, 112), (64, 64)])
def test_lesions_have_16_to_128_pixels_at_224_and_lie_inside(monkeypatch, shape):
    """Draws of 0 put one lesion of the least size into a corner; the highest draws put four of the
    largest into the opposite corner, where their sum is limited to 1."""
    for draw, side, peak in (0, 16, 0.5), (1 - 2 ** -24, 128, 1):
        monkeypatch.setattr(torch, "rand", lambda size, **_: torch.full(size, draw))
        mask = afire.synthetic_lesion_mask(torch.ones(2, 1, *shape))[1][1, 0]
        assert peak - 0.03 < mask.max() <= peak
        for axis, length in enumerate(shape):
            covered = (mask > 0).any(1 - axis).tolist()
            n = round(side * length / 224)
            assert covered == [i >= length - n if draw else i < n for i in range(length)]


def test_a_lesion_equals_one_made_by_opencv():
    images = (0.2 + 0.8 * phantom_images(12, 224)).repeat(16, 1, 1, 1)  # lifted: no lesion is faint
    centres = torch.tensor([0, 100, 223])[torch.randint(3, (192, 2), generator=seeded())]
    masks = afire.synthetic_lesion_mask(images, seeded(), centres.float())[1].squeeze(1).numpy()
    u, v = np.meshgrid(np.linspace(-1, 1, 60), np.linspace(-1, 1, 60))
    window = np.exp(-(u * u + v * v) / 0.5)
    window = 0.5 * (window - window.min()) / (window.max() - window.min())
    sides = []
    for image, mask, centre in zip(images[:, 0].numpy(), masks, centres.tolist()):
        y, x = (min(max(place - 30, 0), 224 - 60) for place in centre)
        top, left = np.argwhere(mask).min(0)
        bottom, right = np.argwhere(mask).max(0) + 1
        side = (int(right - left), int(bottom - top))
        lesion = mask[top:bottom, left:right]
        error = cv2.resize(window * image[y:y + 60, x:x + 60], side) - lesion
        if np.abs(error)[lesion > 0].max() < 1e-4:                     # it is alone
            sides.append(side)
    assert 42 <= len(sides) <= 56, "a quarter of 192 images has one lesion, the others have more"
    assert 60 < np.mean(sides) < 84


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 99), st.integers(4, 99), st.integers(0, 999), st.sampled_from(TYPES),
       st.sampled_from([0, 1e-3, 1]), st.booleans())
def test_lesions_brighten_up_to_235_only(height, width, seed, dtype, scale, half):
    images = (scale * odd_images(height, width, seed)).to(dtype)
    before = images.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        lesioned, mask = afire.synthetic_lesion_mask(images, seeded(seed))
    assert_close(mask, afire.synthetic_lesion_mask(images, seeded(seed))[1])
    assert torch.equal(images, before) and lesioned.shape == mask.shape == images.shape
    assert ((mask == 0) | ((mask >= 1 / 255) & (mask <= 1))).all()
    x = images.double().numpy()
    limited = np.minimum(x + mask.double().numpy(), 235 / 255)
    np.testing.assert_allclose(lesioned, np.maximum(x, limited), atol=1e-6)
    assert torch.equal(lesioned[mask == 0].to(dtype), images[mask == 0])


# ---- Vision Transformer --------------------------------------------------------------------------

@pytest.mark.parametrize("module", [afire.ViT(40, 8, 3, 24, 1, 1),
                                    afire.Decoder(40, 8, 3, 12, 24, 1, 1)])
def test_positions_are_those_of_mae(module):
    """Half the channels tell the column, half the row: first the sines, then the cosines."""
    expected = [[function(place / 10000 ** (i / 6)) for place in (column, row)
                 for function in (math.sin, math.cos) for i in range(6)]
                for row, column in np.ndindex(5, 5)]
    assert_close(module.pos_embed[0], torch.tensor([[0.0] * 24, *expected]), atol=1e-6, rtol=0)


def test_weights_start_as_they_should_and_biases_at_zero():
    model = tiny_model(embed_dim=64, decoder_dim=64, head_dim=64, bottleneck_dim=64)
    for module in (*model.student["encoder"].modules(), *model.decoder.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = math.sqrt(6 / (module.weight.shape[0] + module.weight[0].numel()))
            assert 0.99 * bound < module.weight.abs().max() <= bound and not module.bias.any()
    head = model.student["head"]
    assert 0.97 < head.last_layers.std() < 1.03 and 0.017 < head.mlp[2].weight.std() < 0.023
    assert not any(layer.bias.any() for layer in head.mlp[::2])


@torch.no_grad()
def test_vit_computes_what_timm_computes():
    size = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4)
    ours = randomise(afire.ViT(**size))
    theirs = timm.models.VisionTransformer(num_classes=0, **size).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert ours.blocks[0].attn.qkv is not ours.blocks[1].attn.qkv
    images = torch.randn(6, 3, 32, 32)
    assert_close(ours(images), theirs.forward_features(images), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_decoder_is_timms_blocks_between_two_linear_layers():
    decoder = randomise(afire.Decoder(32, 8, 2, 24, embed_dim=32, depth=2, num_heads=4))
    vit = timm.models.VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=4,
                                        norm_layer=nn.LayerNorm).eval()        # eps of 1e-5
    vit.blocks.load_state_dict(decoder.blocks.state_dict())
    assert decoder.blocks[0].attn.qkv is not decoder.blocks[1].attn.qkv
    tokens, masked = torch.randn(2, 17, 24), torch.rand(2, 16) < 0.5
    x = F.linear(tokens, decoder.embedding.weight, decoder.embedding.bias)
    for i, j in masked.nonzero():                                      # every one has its own
        x[i, 1 + j] = decoder.mask_token[0, j]
    x = decoder.norm(vit.blocks(x + decoder.pos_embed))[:, 1:]
    patches = F.linear(x, decoder.image_pred.weight, decoder.image_pred.bias)
    assert_close(afire.patchify(decoder(tokens, masked), 8), patches, atol=1e-5, rtol=1e-4)


# ---- Projection head and prototypes --------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])
def test_head_gives_the_cosines_of_its_mlp_and_each_position_s_rows_in_full_precision(half):
    head = randomise(afire.AnatomyHead(12, 9, 7, hidden_dim=20, bottleneck_dim=5))
    tokens = torch.randn(3, 9, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        cosines = head(tokens)
        z = head.mlp[0](tokens)
        for layer in head.mlp[2], head.mlp[4]:
            z = layer(F.gelu(z))
    expected = F.cosine_similarity(z.double().unsqueeze(2), head.last_layers.double(), dim=3)
    assert (cosines - expected).abs().max() < 1e-5


@pytest.mark.parametrize("shape, options", [
    ((16, 16), {}), ((1, 5), {}), ((9, 1), {}), ((30, 8), {"epsilon": 0.2, "iterations": 5})])
def test_sinkhorn_equals_its_original_form(shape, options):
    """As published: in probabilities, columns to 1 / K and rows to 1 / L in turn."""
    scores = torch.rand(shape, generator=seeded()) - 0.5
    c = np.exp(scores.double().numpy() / options.get("epsilon", 0.05))
    for _ in range(options.get("iterations", 3)):
        c /= c.sum(0, keepdims=True) * c.shape[1]
        c /= c.sum(1, keepdims=True) * c.shape[0]
    np.testing.assert_allclose(afire.sinkhorn(scores, **options), c * c.shape[0], atol=2e-5)
    for huge in (1e6 * scores, (1e5 * scores).half(), (1e3 * scores).bfloat16()):
        assert_close(afire.sinkhorn(huge, **options).sum(1), torch.ones(shape[0]))


def test_prototypes_copy_the_first_mean_then_run():
    first, second = torch.randn(2, 4, 6, 5, requires_grad=True)
    ours = afire.SpatialPrototypes(6, 5)
    ours.update(first)
    assert not ours.prototypes.requires_grad
    assert_close(ours.prototypes, first.mean(0).detach())
    ours.update(second)
    expected = (0.75 * first.mean(0) + 0.25 * second.mean(0)).detach()
    assert_close(ours.prototypes, expected)
    assert_close(ours.assignment(), afire.sinkhorn(expected))


# ---- Losses --------------------------------------------------------------------------------------

def naive_structure(logits, assignment, normal, _):
    q = np.exp(logits / 0.1)
    losses = [-assignment[j] @ np.log(q[i, j] / q[i, j].sum()) for i, j in np.argwhere(normal)]
    return sum(losses) / max(len(losses), 1)


def naive_category(logits, prototypes, normal, abnormal):
    """At each position the prototype picks a normal token out of it and the mean abnormal one."""
    losses = []
    for j, p in enumerate(prototypes):
        cosines = [q @ p / math.sqrt((q @ q) * (p @ p)) for q in logits[:, j]]
        likeness = np.exp(np.array(cosines) / 0.1)
        others = likeness[abnormal[:, j]]
        if len(others):
            chosen = likeness[normal[:, j]]
            losses += [*-np.log(chosen / (chosen + others.mean()))]
    return sum(losses) / max(len(losses), 1)


LOSSES = {
    "structure": (lambda x, c, n, a: afire.structure_consistency_loss(x, c, n), naive_structure),
    "category": (afire.category_consistency_loss, naive_category),
    "restoration": (lambda x, y, n, a: afire.restoration_loss(x, y),
                    lambda x, y, *_: ((x - y) ** 2).mean())}


def loss_input(name, batch=5, share=0.4, length=6, k=4, seed=1):
    """Student logits (B, L, K), what they are compared with, N and A; a fifth is in neither."""
    draws = seeded(seed)
    logits, other = torch.rand(2, batch, length, k, generator=draws) * 2 - 1
    other = {"structure": other[0].softmax(1), "category": other[0], "restoration": other}[name]
    abnormal, seen = torch.rand(2, batch, length, generator=draws)
    return logits, other, (abnormal >= share) & (seen > 0.2), (abnormal < share) & (seen > 0.2)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("batch, share", [(5, 0.4), (1, 0.4), (4, 0), (4, 1), (12, 0.1)])
def test_loss_and_gradient_equal_a_naive_loop_and_its_differences(name, batch, share):
    loss, naive = LOSSES[name]
    logits, *others = loss_input(name, batch, share)
    value = loss(logits.requires_grad_(), *others)
    value.backward()
    x, *others = (tensor.detach().numpy() for tensor in (logits.double(), *others))
    assert value.item() == pytest.approx(naive(x, *others), abs=1e-5)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-5
        slope = (naive(x + step, *others) - naive(x - step, *others)) / 2e-5
        assert logits.grad[index].item() == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 7), st.integers(0, 999),
       st.sampled_from(TYPES), st.sampled_from([0, 1e-8, 1, 3e4]), st.sampled_from([0, 0.5, 1]))
def test_loss_is_finite_and_computed_in_full(name, batch, length, k, seed, dtype, scale, share):
    logits, *others = loss_input(name, batch, share, length, k, seed)
    logits = (scale * logits).to(dtype).requires_grad_()
    value = LOSSES[name][0](logits, *others)
    value.backward()
    assert value.isfinite() and value >= 0 and logits.grad.isfinite().all()
    assert_close(value, LOSSES[name][0](logits.float(), *others))


# ---- AFiRe ---------------------------------------------------------------------------------------

@torch.no_grad()
def test_forward_equals_its_parts():
    model = tiny_model(weights=(2.0, 3.0, 5.0))
    randomise(model.student)
    normal, lesioned, mask = tiny_batch()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    x = (normal - mean) / std                                          # ImageNet's
    abnormal = F.max_pool2d(mask, 8).flatten(1) > 0
    model(normal.flip(3), lesioned, mask)                              # the first update
    model.prototypes.momentum = 0.6
    logits = model.teacher["head"](model.teacher["encoder"](x)[:, 1:])
    prototypes = 0.6 * model.prototypes.prototypes + 0.4 * logits.mean(0)
    tokens = model.student["encoder"]((lesioned - mean) / std)
    logits = model.student["head"](tokens[:, 1:])
    structure = afire.structure_consistency_loss(logits, afire.sinkhorn(prototypes), ~abnormal)
    category = afire.category_consistency_loss(logits, prototypes, ~abnormal, abnormal)
    restoration = afire.restoration_loss(model.decoder(tokens, abnormal), x)
    assert_close(model(normal, lesioned, mask), {
        "loss": 2 * structure + 3 * category + 5 * restoration, "structure": structure,
        "category": category, "restoration": restoration})
    assert (tiny_model().weights, tiny_model().prototypes.momentum) == ((1, 1, 1), 0.75)


def test_student_and_decoder_learn_by_gradients_and_teacher_and_prototypes_do_not():
    model = tiny_model()
    assert equal(model.teacher.state_dict(), model.student.state_dict()), "at the start"
    model(*tiny_batch())["loss"].backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    names = {n for n, _ in model.named_parameters() if "teacher" not in n and "pos_embed" not in n}
    assert trained.keys() == names and all(gradient.any() for gradient in trained.values())
    model.update_teacher(0.9)
    assert not any(p.requires_grad for p in model.teacher.parameters()), "no graph grows"
    prototypes = model.prototypes.prototypes.clone()
    model.eval()(*(images.flip(3) for images in tiny_batch()))
    assert torch.equal(model.prototypes.prototypes, prototypes), "they stay in eval mode"


@pytest.mark.parametrize("name, call", [
    ("synthetic_lesion_mask", lambda lesions: lesions(torch.rand(6, 1, 32, 32))[0]),
    ("AFiRe", lambda method: method(32, 8, 32, 1, 2)(*torch.rand(3, 6, 1, 32, 32))["loss"])])
def test_a_component_runs_with_the_definitions_alone_that_it_names(name, call):
    tree = ast.parse(Path(afire.__file__).read_text(encoding="utf-8"))
    definitions = {node.name: node for node in tree.body if hasattr(node, "name")}
    needed = [name]
    for found in needed:
        used = {node.id for node in ast.walk(definitions[found]) if isinstance(node, ast.Name)}
        needed += (used & definitions.keys()).difference(needed)
    space = {"math": math, "torch": torch, "nn": nn, "F": F}
    exec("\n".join(ast.unparse(definitions[found]) for found in needed), space)
    results = []
    for component in space[name], getattr(afire, name):
        torch.manual_seed(0)
        results.append(call(component))
    assert torch.equal(*results) and results[0].isfinite().all()


# ---- Options and pre-training --------------------------------------------------------------------

CPU = torch.device("cpu")


def options_of(command):
    return afire.parse_arguments(command.split())


def write_images(folder, images, names):
    for name, image in zip(names, images):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)


HEADER = "image,findings,patient,split"


def table(file, *lines, header=HEADER):
    file.write_text("\n".join([header, *lines]), "utf-8", "surrogateescape")
    return file


def read_rows(file):
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def pretraining(data, out):
    """A small pre-training as a command, with the table in the folder if there is one."""
    labels = f"--labels {data}/labels.csv" if Path(data, "labels.csv").exists() else ""
    return (f"pretrain --data {data} {labels} --out {out} --preset small --img-size 32 --epochs 5 "
            "--batch-size 8 --device cpu").split()


@pytest.fixture(scope="session")
def radiographs(tmp_path_factory):
    """72 phantoms, a third held out, most abnormal ones with a mask, a broken file; labels.csv."""
    folder = tmp_path_factory.mktemp("radiographs")
    images, labels, masks, findings = afire.phantoms(72, 64)
    names = [f"{'train' if i % 3 else 'test'}/{'SICK' if sick else 'NORMAL'}/{i}.png"
             for i, sick in enumerate(labels.any(1))]
    write_images(folder, images[:, 0], names)
    masked = [i for i in np.flatnonzero(labels.any(1)) if i % 9]
    write_images(folder, masks[masked].any(1), [f"masks/{i}.png" for i in masked])
    lines = ["train/NORMAL/broken.png,,,train,"]
    for i, name in enumerate(names):
        present = "|".join(sorted(np.array(findings)[labels[i]]))
        mask = f"{folder if i % 2 else '.'}/masks/{i}.png" if i in masked else ""
        lines.append(f"{name},{present},,{name.split('/')[0]},{mask}")
    (folder / "train/NORMAL/broken.png").write_bytes(b"no image at all")
    table(folder / "labels.csv", *lines, header=f"{HEADER},mask")
    return folder


@pytest.fixture(scope="session")
def run(radiographs, tmp_path_factory):
    """The folder of a pre-training."""
    out = tmp_path_factory.mktemp("runs") / "run"
    afire.main(pretraining(radiographs, out))
    return out


def load_run(folder):
    """-> its checkpoint, the records of its log."""
    log = (folder / "log.jsonl").read_text().splitlines()
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    return checkpoint, [json.loads(line) for line in log]


def equal(a, b):
    """Bit for bit, through dictionaries and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def recording_trainer(options, rank=0, per_epoch=3):
    """-> a Trainer for images of 32 px on the CPU, a list of the inputs that its model gets."""
    options = options_of(f"pretrain --img-size 32 --device cpu {options}")
    trainer = afire.Trainer(options, CPU, per_epoch, rank)
    inputs = []
    trainer.model.register_forward_pre_hook(lambda model, arguments: inputs.append(arguments))
    return trainer, inputs


def pixels_and_centres(n):
    pixels = afire.phantoms(n, 32)[0]
    return pixels, afire.texture_centre(torch.from_numpy(pixels) / 255).numpy()


RECIPE = ("arch", "img_size", "patch_size", "levels", "epochs", "batch_size", "lr", "warmup_epochs",
          "teacher_momentum", "structure_weight", "category_weight", "restoration_weight")


def test_presets_and_architectures_are_these_and_what_is_typed_overrides_them():
    for preset, values in {
            "paper": ("vit_base", 224, 16, "file", 400, 64, 5e-4, 10, 0.996, 1, 1, 1),
            "small": ("vit_micro", 64, 8, "equal", 38, 32, 8e-3, 3, 0.99, 1, 1, 1),
            "phantoms": ("vit_micro", 64, 8, "file", 18, 16, 16e-3, 2, 0.97, 0.2, 0.2, 1)}.items():
        recipe = dict(zip(RECIPE, values, strict=True), preset=preset)
        options = options_of(f"pretrain --data x --preset {preset}")
        assert vars(options).items() >= recipe.items()
        options = options_of(f"pretrain --epochs 5 --preset {preset} --levels equal --lr 1")
        assert vars(options).items() >= {**recipe, "epochs": 5, "levels": "equal", "lr": 1}.items()
    micro = dict(embed_dim=128, depth=4, num_heads=2, out_dim=64, head_dim=128, bottleneck_dim=128,
                 decoder_dim=64, decoder_depth=2, decoder_heads=2)
    assert afire.ARCHITECTURES == {"vit_micro": micro,
                                   "vit_small": dict(embed_dim=384, depth=12, num_heads=6),
                                   "vit_base": dict(embed_dim=768, depth=12, num_heads=12)}


@pytest.mark.parametrize("gpu, command, preset", [
    (False, "", "phantoms"), (True, "", "phantoms"), (False, "--data x", "small"),
    (True, "--data x", "paper"), (True, "--data x --device cpu", "small"),
    (True, "--data x --preset small", "small")])
def test_the_preset_suits_data_and_device(monkeypatch, gpu, command, preset):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert options_of(f"pretrain {command}").preset == preset


def test_options_weigh_the_losses_and_initial_weights_depend_on_the_seed_alone():
    states = []
    for seed in 1, 2, 1:
        torch.rand(seed)
        model = afire.build_model(options_of(f"pretrain --seed {seed} --structure-weight 2 "
                                             "--category-weight 3 --restoration-weight 5"))
        assert model.weights == (2, 3, 5)
        states.append(model.state_dict())
    assert equal(states[0], states[2])
    for name in "student.encoder.blocks.0.attn.qkv.weight", "decoder.mask_token":
        assert not torch.equal(states[0][name], states[1][name])


def test_training_steps_equal_the_recipe_written_out():
    """The recipe [R]: schedules, AdamW, clipping, freezing, prototypes, teacher."""
    trainer, inputs = recording_trainer("--epochs 4 --batch-size 6 --lr 0.3 "
                                        "--restoration-weight 40 --seed 3")
    trainer.options.warmup_epochs = 1
    model = afire.build_model(trainer.options).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.optim.AdamW([p for p in trained if p.ndim > 1])
    biases_and_norms = torch.optim.AdamW([p for p in trained if p.ndim == 1], weight_decay=0)
    pixels, centres = pixels_and_centres(6)
    for step in range(7):                                              # of 12, 3 an epoch
        metrics = trainer.step(pixels, centres, step)
        assert not metrics.requires_grad
        normal, lesioned, mask = inputs[step]
        assert torch.equal(normal, torch.from_numpy(pixels) / 255)
        model.prototypes.momentum = 0.0 if step < 3 else 0.75
        losses = model(normal, lesioned, mask)
        model.zero_grad()
        losses["loss"].backward()
        if step < 3:
            model.student["head"].last_layers.grad = None
        norms = [float(nn.utils.clip_grad_norm_(p, 3)) for p in trained if p.grad is not None]
        assert min(norms) < 3 < max(norms), "some are clipped, others are not"
        peak = 0.3 * 6 / 256
        after_warmup = 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * (step - 3) / 9)) / 2
        weights.param_groups[0]["weight_decay"] = (
            0.4 - 0.36 * (1 + math.cos(math.pi * step / 12)) / 2)
        for optimizer in weights, biases_and_norms:
            optimizer.param_groups[0]["lr"] = peak * (step + 1) / 3 if step < 3 else after_warmup
            optimizer.step()
        momentum = 1 - 0.03 * (1 + math.cos(math.pi * step / 12)) / 2
        for name, average in model.teacher.named_parameters():
            average.data = momentum * average + (1 - momentum) * model.student.get_parameter(name)
        assert metrics[:4].tolist() == pytest.approx([x.item() for x in losses.values()], rel=1e-3)
        assert float(metrics[4]) == pytest.approx(math.hypot(*norms), rel=1e-3)
    for name, value in model.state_dict().items():
        if "qkv.bias" not in name:             # the gradient of the keys' bias is rounding alone
            assert_close(trainer.model.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_lesions_depend_on_seed_and_step_and_place_in_the_batch_alone():
    pixels, centres = pixels_and_centres(4)

    def drawn(seed, step, rank=0, rows=slice(0, 4)):
        trainer, inputs = recording_trainer(f"--batch-size 4 --seed {seed}", rank)
        trainer.step(pixels[rows], centres[rows], step)
        return inputs[0][2]

    whole = drawn(0, 0)
    assert torch.equal(drawn(0, 0), whole)
    shards = [drawn(0, 0, rank, slice(2 * rank, 2 * rank + 2)) for rank in (0, 1)]
    assert_close(torch.cat(shards), whole)
    masks = [whole, drawn(0, 1), drawn(1, 0), drawn(1, 1), drawn(2, 0)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


def test_pretrain_leaves_what_it_should(run, radiographs):
    checkpoint, log = load_run(run)
    files = {"checkpoint.pth", "encoder.pth", "table.csv", "config.json", "log.jsonl",
             "restoration.png"}
    assert {file.name for file in run.iterdir()} - {"eval"} == files
    assert (run / "table.csv").read_bytes() == (radiographs / "labels.csv").read_bytes()
    images = {hashlib.sha256(file.read_bytes()).hexdigest()[:16]
              for file in radiographs.glob("train/NORMAL/[0-9]*.png")}
    assert set(checkpoint["images"]) == images and len(checkpoint["images"]) == len(images)
    images = torch.randn(1, 3, 32, 32)
    tokens = [afire.load_encoder(run / name)(images) for name in ("checkpoint.pth", "encoder.pth")]
    assert torch.equal(*tokens)


def test_every_epoch_takes_other_images_each_once_and_logs_the_means_of_its_steps(
        radiographs, tmp_path, monkeypatch):
    def record(trainer, images, centres, *arguments):
        assert np.array_equal(centres, afire.texture_centre(torch.from_numpy(images) / 255))
        taken.append({image.tobytes() for image in images})
        values.append(step(trainer, images, centres, *arguments))
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return values[-1]

    taken, values, rates = [], [], []
    step = afire.Trainer.step
    monkeypatch.setattr(afire.Trainer, "step", record)
    afire.main(pretraining(radiographs, tmp_path))
    epochs = [first | second for first, second in zip(taken[::2], taken[1::2], strict=True)]
    assert [len(images) for images in epochs] == 5 * [16], "two steps of 8"
    checkpoint, log = load_run(tmp_path)
    assert len(set.union(*epochs)) == len(checkpoint["images"]) > 16
    means = torch.stack(values).view(5, 2, 5).mean(1).tolist()
    for epoch, (record, mean) in enumerate(zip(log, means, strict=True)):
        names = ("loss", "structure", "category", "restoration", "gradient_norm")
        assert record == pytest.approx({"epoch": epoch + 1, "lr": rates[2 * epoch + 1],
                                        **dict(zip(names, mean))}, rel=1e-5)


def test_ctrl_c_says_that_a_pre_training_resumes(monkeypatch, capsys):
    for command, function in ("pretrain", "pretrain"), ("eval", "evaluate"):
        monkeypatch.setattr(afire, function, Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(SystemExit) as stopped:
            afire.main([command])
        printed = capsys.readouterr().out
        assert stopped.value.code == 130 and "stopped" in printed
        assert ("resumes" in printed) == (command == "pretrain")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   RuntimeError("inline_container.cc: unexpected pos 64 vs 0")])
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, error):
    def write_until_full(state, stream):
        stream.write(b"half of it")
        raise error

    path = tmp_path / "checkpoint.pth"
    afire.save_checkpoint({"epoch": 2}, path)
    monkeypatch.setattr(torch, "save", write_until_full)
    with pytest.raises(afire.InputError, match=f"cannot write {path}: .*{error.args[-1]}"):
        afire.save_checkpoint({"epoch": 3}, path)
    assert torch.load(path) == {"epoch": 2} and os.listdir(tmp_path) == ["checkpoint.pth"]


def interrupt(command, epoch):
    """Runs a pre-training up to the checkpoint of this epoch."""
    def stop(state, path, save=afire.save_checkpoint):
        save(state, path)
        if state.get("epoch") == epoch:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(afire, "save_checkpoint", stop)
        afire.main(command)


def test_a_moved_run_resumes_bit_for_bit_but_not_with_other_options_or_images(
        run, radiographs, tmp_path, capsys):
    interrupt(pretraining(radiographs, tmp_path / "first"), 3)
    moved_run = (tmp_path / "first").rename(tmp_path / "run")
    moved_set = shutil.copytree(radiographs, tmp_path / "set")
    command = pretraining(moved_set, moved_run)
    for change, before in {"--arch vit_small": "arch vit_micro", "--seed 7": "seed 0",
                           "--lr 1": "lr 0.008", "--epochs 9": "epochs 5",
                           "--levels file": "levels equal"}.items():
        sentence = refusal(capsys, [*command, *change.split()])
        assert f"was started with {before}: repeat" in sentence
    labels = moved_set / "labels.csv"
    content = labels.read_text()
    labels.write_text(re.sub(r"^train/NORMAL/[0-9].*\n", "", content, count=1, flags=re.M))
    assert "was started with other images" in refusal(capsys, command)
    labels.write_text(content + "\n")
    afire.main(command)
    assert (moved_run / "table.csv").read_text() == content, "as at the start"
    resumed, unbroken = load_run(moved_run), load_run(run)
    for name in "data", "labels", "out":
        resumed[0]["config"][name] = unbroken[0]["config"][name]
    assert equal(resumed, unbroken)


@pytest.mark.parametrize("key", ["model", "images", "history", "lr", "prototypes.prototypes"])
def test_a_run_that_lacks_something_is_refused(run, radiographs, tmp_path, capsys, key):
    checkpoint = load_run(run)[0]
    for part in checkpoint, checkpoint["config"], checkpoint["model"]:
        part.pop(key, None)
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    sentence = refusal(capsys, pretraining(radiographs, tmp_path))
    assert "another version" in sentence and f"{tmp_path}/encoder.pth" in sentence


def test_a_gradient_that_is_not_finite_stops_the_run(radiographs, tmp_path, monkeypatch, capsys):
    """The loss alone does not tell: it stays finite here."""
    def poison(*arguments):
        metrics = step(*arguments)
        metrics[4] = math.inf if arguments[3] == 3 else metrics[4]
        return metrics

    step = afire.Trainer.step
    monkeypatch.setattr(afire.Trainer, "step", poison)
    assert "finite" in refusal(capsys, pretraining(radiographs, tmp_path))
    assert load_run(tmp_path)[0]["epoch"] == 1, "the bad epoch is not saved"


def test_two_processes_train_as_one_and_only_the_first_decodes(run, radiographs, tmp_path):
    """L_cate contrasts tokens of both processes' images. The cache is a new one."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, afire\ndecode, evaluate = afire.decode, afire.evaluate\n"
        "note = lambda what: open(what + os.environ['RANK'], 'a').write('x')\n"
        "afire.decode = lambda *a: (note('decode'), decode(*a))[1]\n"
        "afire.evaluate = lambda *a: (note('eval'), evaluate(*a))\n"
        f"afire.main({pretraining(radiographs, 'run')})\n"
        "afire.main(['eval', '--ckpt', 'run', '--device', 'cpu'])\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", script], cwd=tmp_path, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("AUROC") == done.stdout.count(
        "on 21 normal images (excluded: 27 with findings, 24 held out)") == 1
    calls = {file.name: len(file.read_text()) for file in tmp_path.glob("*[01]")}
    assert calls["decode0"] > 72 and calls["decode1"] <= 1, "it decodes what it names as broken"
    assert calls["eval0"] == 1 and "eval1" not in calls
    together, log = load_run(tmp_path / "run")
    alone, log_alone = load_run(run)
    for ours, theirs in zip(log, log_alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    prototypes = [run["model"]["prototypes.prototypes"] for run in (together, alone)]
    assert_close(*prototypes, rtol=0, atol=1e-5)


def test_init_starts_the_encoders_and_hands_on_what_was_trained_on(run, radiographs, tmp_path):
    """Also at another image size. The images of the earlier run stay known, though they are not
    among the new ones."""
    command = [*pretraining(radiographs / "test/NORMAL", tmp_path), "--img-size", "48",
               "--init", str(run / "checkpoint.pth"), "--lr", "0"]
    interrupt(command, 1)
    afire.main(command)
    before = load_run(run)[0]
    after = load_run(tmp_path)[0]
    assert set(after["earlier_images"]) == set(before["images"])
    assert set(afire.load_models(tmp_path)[2]) == {*before["images"], *after["images"]}
    expected = afire.load_encoder(run / "encoder.pth", 48).state_dict()
    for network, (name, value) in itertools.product(("student", "teacher"), expected.items()):
        assert_close(after["model"][f"{network}.encoder.{name}"], value, rtol=1e-4, atol=1e-5)


# ---- Devices: on a GPU where there is one --------------------------------------------------------

def test_a_process_takes_its_own_gpu_and_one_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "zeros", lambda _, device: Mock(device=torch.device(device)))
    for gpu, names in (True, ("auto", "cuda")), (False, ("cuda",)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert {str(afire.get_device(name)) for name in names} == {"cuda:3"}
    assert str(afire.get_device("auto")) == "cpu"
    monkeypatch.setattr(torch, "zeros", Mock(side_effect=AssertionError("not compiled with CUDA")))
    with pytest.raises(afire.InputError, match="cuda:1 is not available"):
        afire.get_device("cuda:1")


@pytest.mark.parametrize("native", [False, True])
def test_a_gpu_trains_in_bf16_where_that_is_native(monkeypatch, native):
    def is_supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)
    options = options_of("pretrain --img-size 32")
    assert afire.Trainer(options, torch.device("cuda"), 3).bf16 == native
    trainer, _ = recording_trainer("--batch-size 4")
    assert not trainer.bf16, "a CPU trains in float32"
    trainer.bf16 = native
    computed = []
    head = trainer.model.student["head"].mlp[0]
    head.register_forward_hook(lambda module, arguments, output: computed.append(output.dtype))
    trainer.step(*pixels_and_centres(4), 0)
    assert computed == [torch.bfloat16 if native else torch.float32]


@pytest.mark.parametrize("device, dtype", [
    ("cpu", torch.bfloat16), ("cpu", torch.float16), ("cuda", torch.float32),
    ("cuda", torch.bfloat16), ("cuda", torch.float16)])
def test_losses_and_gradients_are_those_of_the_cpu_in_float32(device, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    images, *lesions = tiny_batch()
    expected = tiny_model()
    expected_losses = expected(images, *lesions)
    expected_losses["loss"].backward()
    batch = images.to(device)
    centre = afire.texture_centre(images)
    assert_close(afire.texture_centre(batch).cpu(), centre, atol=0.5, rtol=0)
    drawn = afire.synthetic_lesion_mask(batch, seeded(), centre.to(device))
    assert_close([x.cpu() for x in drawn], lesions, atol=1e-5, rtol=0)
    model = tiny_model().to(device)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        losses = model(batch, *[x.to(device) for x in lesions])
    losses["loss"].backward()
    losses = {name: loss.cpu() for name, loss in losses.items()}
    assert_close(losses, expected_losses, rtol=0.03, atol=0)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for name, parameter in expected.named_parameters():
        if parameter.grad is not None:
            error = model.get_parameter(name).grad.cpu() - parameter.grad
            assert error.norm() <= tolerance * (parameter.grad.norm() + 0.01), name


# ---- Evaluation ----------------------------------------------------------------------------------

@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
def test_auroc_is_scikit_learns_with_many_ties(levels):
    random = np.random.default_rng(0)
    scores = random.integers(0, levels, 99) / 7
    labels = random.random(99) < 0.3
    area = sklearn.metrics.roc_auc_score(labels, scores)
    assert afire.auroc(scores, labels) == pytest.approx(area, abs=1e-12)
    for one_class in np.zeros(99, bool), np.ones(99, bool):
        assert math.isnan(afire.auroc(scores, one_class))
    assert math.isnan(afire.auroc(np.where(np.arange(99) == 7, np.nan, scores), labels))


@pytest.mark.parametrize("side, dim, n", [(3, 5, 3), (4, 5, 4), (8, 5, 4), (14, 5, 4), (6, 1, 6)])
def test_tokens_are_averaged_in_4_x_4_cells_unless_they_are_few_or_numbers(side, dim, n):
    tokens = torch.randn(2, side * side, dim)
    expected = torch.zeros(2, dim, n, n)
    for y, x in np.ndindex(n, n):
        inside = [row * side + column
                  for row in range(y * side // n, math.ceil((y + 1) * side / n))
                  for column in range(x * side // n, math.ceil((x + 1) * side / n))]
        expected[:, :, y, x] = tokens[:, inside].mean(1)
    assert_close(afire.average_in_cells(tokens), expected.flatten(1))


def ridge(penalty):
    return sklearn.pipeline.make_pipeline(sklearn.preprocessing.StandardScaler(),
                                          sklearn.linear_model.Ridge(alpha=penalty))


@pytest.mark.parametrize("penalty", [1.0, 100.0])
@pytest.mark.parametrize("n", [2, 39, 40, 41, 200])
def test_linear_probe_is_scikit_learns_ridge_in_both_forms(n, penalty):
    random = np.random.default_rng(0)
    x = random.normal(5, random.uniform(0.1, 30, 40), (n + 100, 40))
    y = x / x.std(0) @ random.normal(size=(40, 3)) + random.normal(0, 3, (n + 100, 3)) > 3
    x[:, 7] = 9                                            # one feature is constant
    weight, bias = afire.linear_probe(torch.from_numpy(x[:n]), torch.from_numpy(y[:n]), penalty)
    expected = ridge(penalty).fit(x[:n], y[:n]).predict(x[n:])
    np.testing.assert_allclose(x[n:] @ weight.numpy() + bias.numpy(), expected, atol=2e-5)


def test_learn_from_few_counts_labels_and_takes_training_rows_only():
    labels = np.random.default_rng(0).random((500, 3)) < 0.5
    labels[:, 1:] = [False, True]
    train = np.arange(100, 190)
    drawn = []
    scores = afire.learn_from_few(lambda rows: drawn.append(rows) or np.zeros((7, 3)), labels,
                                  train)
    assert {share: draws.shape for share, draws in scores.items()} == {
        "1%": (5, 7, 3), "10%": (5, 7, 3), "100%": (1, 7, 3)}
    assert [len(set(rows)) for rows in drawn] == 5 * [2] + 5 * [9] + [90]
    assert set(np.concatenate(drawn)) == set(train) and not np.array_equal(*drawn[5:7])
    assert np.isnan(scores["100%"][0, :, 1:]).all(), "of one class nothing can be learned"


def drawn_set(n=80, size=48):
    """Radiographs of noise, whose label is whether one of two patches, not both, is bright."""
    random = np.random.default_rng(0)
    images = random.integers(60, 90, (n, 1, size, size), np.uint8)
    bright = random.random((n, 2)) < 0.5
    images[bright[:, 0], :, :8, :8] += 120
    images[bright[:, 1], :, 16:24, 16:24] += 120
    names = [f"{i}" for i in range(n)]
    return afire.Radiographs(names, images, bright.sum(1, keepdims=True) == 1, ["one"], names,
                             names, np.arange(n // 2), np.arange(n // 2, n), {})


def test_the_probe_learns_from_training_images_alone():
    data = drawn_set()
    encoder = afire.ViT(48, 8, 3, 32, 1, 2).requires_grad_(False)
    measured = afire.masks_of_test(data)
    arrays = afire.evaluate_network(encoder, None, data, *measured, data.train[:9], CPU)[1]
    assert arrays["linear 10%"].shape == (5, 40, 1) and arrays["neighbours"].shape == (40, 6, 6)
    x = afire.average_in_cells(afire.features(encoder, torch.from_numpy(data.images) / 255))
    x = x.half().double().numpy()                          # as they are kept
    model = ridge(x.shape[1] / 2).fit(x[data.train], data.labels[data.train])
    expected = model.predict(x[data.test])
    np.testing.assert_allclose(arrays["linear 100%"][0].ravel(), expected.ravel(), atol=1e-3)


@torch.no_grad()
def test_restoration_error_is_of_tokens_restored_without_their_own():
    model = tiny_model().eval()
    randomise(model.teacher)                               # the student's encoder counts
    images = phantom_images(160, 32)[:3]
    x = afire.normalise(images)
    tokens = model.student["encoder"](x)
    expected = torch.zeros(3, 4, 4)
    for dy, dx in np.ndindex(2, 2):
        hidden = torch.zeros(4, 4, dtype=torch.bool)
        hidden[dy::2, dx::2] = True
        error = (model.decoder(tokens, hidden.flatten().expand(3, -1)) - x) ** 2
        expected += hidden * F.avg_pool2d(error.mean(1), 8)
    assert_close(afire.restoration_error(model, images), expected.flatten(1))


@pytest.fixture(scope="module")
def scored():
    """160 phantoms, a model, its tokens of them, and a function: anomaly maps of the last 80."""
    pixels = afire.phantoms(160, 32)[0]
    images = torch.from_numpy(pixels) / 255
    model = tiny_model().eval().requires_grad_(False)
    randomise(model.student)                               # the teacher's encoder and head count
    model.prototypes.prototypes.normal_()
    encoder = model.teacher["encoder"]
    maps = functools.partial(afire.anomaly_maps, pixels, np.arange(80, 160), CPU, encoder)
    return argparse.Namespace(images=images, model=model, maps=maps,
                              tokens=afire.features(encoder, images))


def test_neighbours_are_scikit_learns(scored):
    maps = scored.maps(normals=np.arange(80))
    assert [*maps] == ["neighbours"], "the others need more than an encoder"
    for j in range(16):
        tree = sklearn.neighbors.NearestNeighbors(n_neighbors=5).fit(scored.tokens[:80, j])
        distance = tree.kneighbors(scored.tokens[80:, j])[0].mean(1)
        np.testing.assert_allclose(maps["neighbours"][:, j // 4, j % 4], distance, rtol=1e-3)
    twice = scored.maps(normals=np.array([3, 3]))["neighbours"]        # fewer than five
    distance = (scored.tokens[80:] - scored.tokens[3]).norm(dim=2).view(-1, 4, 4)
    np.testing.assert_allclose(twice, distance, rtol=1e-3)


@pytest.mark.parametrize("normals", [0, 80])
def test_prototypes_are_the_mean_of_normal_images_or_the_model_s_own(scored, normals):
    model, tokens = scored.model, scored.tokens
    head = model.teacher["head"]
    prototypes = head(tokens[:80]).mean(0) if normals else model.prototypes.prototypes
    logits = head(tokens[80:])
    cosine = (logits * prototypes).sum(2) / logits.norm(dim=2) / prototypes.norm(dim=1)
    maps = scored.maps(model, np.arange(normals))
    assert_close(torch.from_numpy(maps["prototype"]), (1 - cosine).view(-1, 4, 4))
    assert [*maps] == SCORES[:3 if normals else 2]


def test_restoration_is_compared_with_that_of_normal_images(scored):
    error = afire.restoration_error(scored.model, scored.images).view(-1, 4, 4).numpy()
    maps = scored.maps(scored.model)
    np.testing.assert_allclose(maps["restoration"], error[80:], rtol=1e-4, atol=1e-6)
    expected = (error[80:] - error[:80].mean(0)) / error[:80].std(0)
    maps = scored.maps(scored.model, np.arange(80))
    np.testing.assert_allclose(maps["restoration"], expected, rtol=1e-3, atol=1e-4)
    assert np.isfinite(scored.maps(scored.model, np.array([3, 3]))["restoration"]).all()


def test_maps_and_masks_are_compared_on_56_x_56_pixels():
    maps = np.random.default_rng(0).random((2, 4, 4)).astype(np.float32)
    masks = np.zeros((2, 224, 224), bool)
    masks[1, 57:111, 29:] = True
    scores, labels = afire.pixel_scores(maps, masks)
    large = cv2.resize(maps[1], (56, 56), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(scores[1], large.ravel(), atol=1e-5)
    small = cv2.resize(np.float32(masks[1]), (56, 56), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(labels[1], small.ravel() > 0.5)


def test_references_are_normal_training_images_anywhere_in_the_set():
    data = drawn_set(2000, size=8)
    references = afire.normal_references(data, 100)
    assert len(set(references)) == 100 and not data.labels[references].any()
    assert max(references) < 1000 and 400 < np.mean(references) < 600


def test_the_teacher_is_evaluated_beside_the_initial_weights(run):
    models, options, hashes = afire.load_models(run / "checkpoint.pth")
    checkpoint = load_run(run)[0]
    assert hashes == checkpoint["images"]
    assert equal(models["checkpoint"][0].state_dict(), {
        key.removeprefix("teacher.encoder."): value for key, value in checkpoint["model"].items()
        if key.startswith("teacher.encoder.")})
    untrained = afire.build_model(options)
    assert equal(models["random_init"][1].state_dict(), untrained.state_dict())
    models, options, _ = afire.load_models(run / "encoder.pth")
    again = afire.load_models(run / "encoder.pth")[0]
    assert options is None and models["checkpoint"][1] is None
    assert equal(models["random_init"][0].state_dict(), again["random_init"][0].state_dict())


def test_grey_levels_of_an_encoder_are_those_of_the_pre_training_beside_it(tmp_path):
    equal = '{"levels": "equal"}'
    run = argparse.Namespace(levels="file")
    for of_run, config, levels in (None, "", "file"), (None, equal, "equal"), (run, equal, "file"):
        (tmp_path / "config.json").write_text(config)
        assert afire.grey_levels(None, of_run, tmp_path / "encoder.pth")[0] == levels


def test_results_lie_beside_the_file_that_a_link_leads_to(tmp_path):
    file = tmp_path / "run/file.pth"
    (tmp_path / "link.pth").symlink_to(file)
    for path in file, tmp_path / "link.pth":
        of_run = afire.results_folder(path, argparse.Namespace(), "eval")
        assert of_run.resolve() == file.with_name("eval")
        assert afire.results_folder(path, None, "eval").resolve() == file.with_name("eval-file.pth")


@pytest.fixture(scope="module")
def evaluation(run, radiographs):
    """An eval of the run: its folder, what it draws, the arrays of predictions.npz, and the rows
    of the table in their order."""
    pictures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(afire, "plot_images", lambda file, *arguments, plot=afire.plot_images: (
            pictures.append(arguments), plot(file, *arguments)))
        afire.main(["eval", "--ckpt", str(run), "--device", "cpu"])
    assert {file.name for file in run.glob("eval/*")} == {
        "metrics.json", "predictions.npz", "scores.csv", "maps.npz", "anomaly.png"}
    arrays = np.load(run / "eval/predictions.npz")
    table = {row["image"]: row for row in read_rows(radiographs / "labels.csv")}
    return argparse.Namespace(folder=run / "eval", picture=pictures[0], arrays=arrays,
                              rows=[table[name] for name in arrays["images"]])


SCORES = ["prototype", "restoration", "neighbours"]


def sklearn_auroc(scores, labels):
    """None where it is undefined."""
    if labels.all() or not labels.any() or np.isnan(scores).any():
        return None
    return sklearn.metrics.roc_auc_score(labels, scores)


def mean_of_defined(values):
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def score_of_images(maps):
    tokens = np.sort(maps.reshape(len(maps), -1))
    return tokens[:, -(tokens.shape[1] // 4):].mean(1)


def test_metrics_are_scikit_learns_of_the_predictions(evaluation):
    report = json.loads((evaluation.folder / "metrics.json").read_text(),
                        parse_constant=pytest.fail)
    arrays = evaluation.arrays
    labels, masks = arrays["labels"], arrays["masks"]
    assert [*report] == ["checkpoint", "random_init", "pixels"]
    for name, network in report.items():
        assert [*network["linear"]] == ["1%", "10%", "100%"]
        for fraction, metrics in network["linear"].items():
            areas = {finding: mean_of_defined([sklearn_auroc(draw[:, f], labels[:, f])
                                               for draw in arrays[f"{name}/linear {fraction}"]])
                     for f, finding in enumerate(arrays["findings"])}
            assert metrics["per_finding"] == pytest.approx(areas, abs=1e-6)
            assert metrics["macro_auroc"] == pytest.approx(mean_of_defined(areas.values()))
        assert [*network["anomaly"]] == SCORES[2 if name == "pixels" else 0:]
        for score, metrics in network["anomaly"].items():
            maps = arrays[f"{name}/{score}"]
            large = [cv2.resize(grid, (32, 32), interpolation=cv2.INTER_LINEAR)
                     for grid in maps[arrays["measured"]]]
            assert metrics == pytest.approx({
                "image_auroc": sklearn_auroc(score_of_images(maps), labels.any(1)),
                "pixel_auroc": sklearn_auroc(np.ravel(large), masks.ravel())}, abs=1e-6)


def test_eval_measures_what_the_table_says(evaluation, radiographs):
    arrays, rows = evaluation.arrays, evaluation.rows
    assert len(rows) == 24 and {row["split"] for row in rows} == {"test"}
    assert arrays["patients"].tolist() == arrays["images"].tolist()
    assert ["|".join(arrays["findings"][labels]) for labels in arrays["labels"]] == [
        row["findings"] for row in rows]
    measured = [bool(row["mask"]) or not row["findings"] for row in rows]
    assert arrays["measured"].tolist() == measured and not all(measured)
    for row, mask in zip(itertools.compress(rows, measured), arrays["masks"], strict=True):
        files = radiographs / row["mask"], radiographs / row["image"]
        expected = afire.read_mask(*files, 32) if row["mask"] else np.zeros((32, 32), bool)
        assert np.array_equal(mask, expected)


def test_the_column_pixels_is_of_the_means_of_patches(evaluation, radiographs):
    train = [row for row in read_rows(radiographs / "labels.csv")
             if row["split"] == "train" and "broken" not in row["image"]]
    rows = train + evaluation.rows
    images = [afire.read_image(radiographs / row["image"], 32, "equal") / 255 for row in rows]
    x = np.array([cv2.resize(image, (4, 4), interpolation=cv2.INTER_AREA) for image in images])
    imagenet = (0.485, 0.229), (0.456, 0.224), (0.406, 0.225)
    x = np.mean([(x - mean) / std for mean, std in imagenet], 0).reshape(72, 16)
    y = np.array([[name in row["findings"] for name in evaluation.arrays["findings"]]
                  for row in train])
    half = x.astype(np.float16).astype(float)
    expected = ridge(16 / 2).fit(half[:48], y).predict(half[48:])
    np.testing.assert_allclose(evaluation.arrays["pixels/linear 100%"][0], expected, atol=5e-3)
    for j, maps in enumerate(evaluation.arrays["pixels/neighbours"].reshape(24, 16).T):
        tree = sklearn.neighbors.NearestNeighbors(n_neighbors=5).fit(x[:48][~y.any(1)][:, [j]])
        distance = tree.kneighbors(x[48:, [j]])[0].mean(1)
        np.testing.assert_allclose(maps, distance, rtol=1e-2, atol=1e-3)


def test_scores_maps_and_the_picture_show_the_most_abnormal_first(evaluation, radiographs):
    rows = read_rows(evaluation.folder / "scores.csv")
    maps = np.load(evaluation.folder / "maps.npz")
    images = evaluation.arrays["images"].tolist()
    order = [images.index(row["image"]) for row in rows]
    assert sorted(order) == list(range(24))
    assert maps["images"].tolist() == [row["image"] for row in rows]
    findings = [evaluation.rows[i]["findings"] for i in order]
    assert [row["findings"] for row in rows] == findings and "|" in "".join(findings)
    columns, grids, captions, masks = evaluation.picture
    for score in SCORES:
        expected = evaluation.arrays[f"checkpoint/{score}"][order]
        np.testing.assert_array_equal(maps[score], expected.astype(np.float16))
        np.testing.assert_array_equal(grids[score], expected[:5])
        np.testing.assert_allclose([float(row[score]) for row in rows], score_of_images(expected),
                                   atol=1e-4)
    values = [float(row["prototype"]) for row in rows]
    assert values == sorted(values, reverse=True) and len(set(values)) > 20
    for i, row in enumerate(rows[:5]):
        image = afire.read_image(radiographs / row["image"], 32, "equal")      # as in pre-training
        np.testing.assert_array_equal(columns["image"][i], image)
        *texts, value = captions[i].split("\n")
        assert texts == [row["image"], findings[i] or "no known finding"]
        assert float(value.split()[1]) == pytest.approx(values[i], abs=1e-3)
        assert (masks[i] is not None) == bool(evaluation.rows[order[i]]["mask"])


def test_one_s_own_images_are_scored_without_findings(run, radiographs, tmp_path, capsys):
    """With the grey levels that are asked for; what was pre-trained on is marked."""
    others = shutil.ignore_patterns("SICK", "masks", "broken.png", "labels.csv")
    folder = shutil.copytree(radiographs, tmp_path / "films", ignore=others)
    (tmp_path / "metrics.json").touch()                    # of an earlier evaluation
    afire.main(["eval", "--ckpt", str(run), "--data", str(folder), "--out", str(tmp_path),
                "--levels", "file", "--device", "cpu"])
    assert_printed(capsys, "grey levels: file (--levels)", "no findings are known")
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"films", "scores.csv", "maps.npz", "anomaly.png"}
    rows = read_rows(tmp_path / "scores.csv")
    assert [*rows[0]] == ["image", "findings", "pretrained_on", "prototype", "restoration"]
    marks = {row["image"]: row["pretrained_on"] for row in rows}
    assert marks == {file.relative_to(folder).as_posix(): "yes" if "train" in file.parts else "no"
                     for file in folder.glob("*/*/*")}


def test_people_of_the_pre_training_are_not_tested_on(run, radiographs, tmp_path, capsys):
    """Another table calls some images of the pre-training test images."""
    rows = [row for row in read_rows(radiographs / "labels.csv") if "broken" not in row["image"]]
    lines, trained, tested = [], set(), {}
    for i, row in enumerate(np.random.default_rng(0).permutation(rows)):
        name = row["image"]
        part = ("train", "test")[i // 3 % 2]
        patient = str(i // 3) if i % 12 < 9 else ""        # three images of each, or unknown
        lines.append(f"{name},{row['findings']},{patient},{part}")
        if name.startswith("train/NORMAL"):
            trained.add(patient or name)
        if part == "test":
            tested[name] = patient or name
    labels = table(tmp_path / "t.csv", *lines)
    afire.main(["eval", "--ckpt", str(run), "--data", str(radiographs), "--labels", str(labels),
                "--out", str(tmp_path), "--device", "cpu"])
    unknown = {name for name in tested if tested[name] not in trained}
    assert {row["image"] for row in read_rows(tmp_path / "scores.csv")} == unknown
    seen = sum(name.startswith("train/NORMAL") for name in tested)
    others = len(tested) - len(unknown) - seen
    assert seen > 0 and others > 0
    assert_printed(capsys, f"{seen} test images left out", f"and {others} others",
                   "no abnormal image in test has a mask")


def test_a_run_is_not_evaluated_on_its_own_data_if_they_have_changed(run, tmp_path, capsys):
    checkpoint = load_run(run)[0]
    checkpoint["images"][:2] = "changed", "gone"
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    sentence = refusal(capsys, ["eval", "--ckpt", tmp_path, "--device", "cpu"])
    assert f"2 of the {len(checkpoint['images'])} images" in sentence and "--data" in sentence


def printed_table(text):
    """-> {title of a row: its three columns, None for a dash}."""
    rows = re.findall(r"^(.+?) +([\d.]+|-) +([\d.]+|-) +([\d.]+|-)$", text, re.MULTILINE)
    return {title: [None if area == "-" else float(area) for area in areas]
            for title, *areas in rows}


@pytest.mark.parametrize("image, pixel, note", [
    (0.5, 0.625, ""), (0.5, math.nan, "abnormal pixels: undefined, as no abnormal image .* mask"),
    (math.nan, math.nan, "abnormal images and pixels: undefined, as no image .* abnormal")])
def test_the_table_says_what_is_undefined(capsys, image, pixel, note):
    networks = {}
    for name, area in ("checkpoint", 0.25), ("random_init", 0.125), ("pixels", 0):
        findings = {"a": area, "b": math.nan, "c": math.nan}
        networks[name] = {
            "linear": {"10%": {"macro_auroc": area, "per_finding": findings}},
            "anomaly": {"x": {"image_auroc": image + area, "pixel_auroc": pixel + area},
                        "neighbours": {"image_auroc": image, "pixel_auroc": pixel}}}
    del networks["pixels"]["anomaly"]["x"]
    afire.print_table(networks)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["AUROC", "trained", "untrained", "pixels"]
    assert re.search(r"^10%: .* 1 of 3 findings", printed, re.M) and re.search(note, printed)
    assert ("undefined" in printed) == bool(note) and "nan" not in printed
    expected = {"linear probe, 10% of the labels": [0.25, 0.125, 0]}
    for level, area in ("image", image), ("pixel", pixel):
        if not math.isnan(area):
            expected[f"abnormal {level}s by x"] = [area + 0.25, area + 0.125, None]
            expected[f"abnormal {level}s by neighbours"] = 3 * [area]
    assert printed_table(printed) == expected


def test_training_beats_no_training(tmp_path, monkeypatch, capsys):
    """End to end, on 1,000 small phantoms: losses, the probe, anomalies by image and by pixel."""
    images, labels, masks, findings = afire.phantoms(1000, 32)
    names = [f"{i}" for i in range(1000)]
    masks = {row: masks[row].any(0) for row in np.flatnonzero(labels.any(1))}
    phantoms = afire.Radiographs(names, images, labels, findings, names, names, np.arange(700),
                                 np.arange(700, 1000), masks)
    monkeypatch.setattr(afire, "phantom_radiographs", lambda size: copy.copy(phantoms))
    afire.main(f"pretrain --out {tmp_path} --epochs 8 --lr 0.03 --img-size 32 --device cpu".split())
    log = load_run(tmp_path)[1]
    assert log[-1]["structure"] < 0.75 * log[0]["structure"]
    assert log[-1]["restoration"] < 0.4 * log[0]["restoration"]
    assert log[-1]["category"] < 0.94 * math.log(2), "below chance"
    afire.main(["eval", "--ckpt", str(tmp_path), "--device", "cpu"])
    best = [[network["linear"]["10%"]["macro_auroc"],
             *[max(score[level] for score in network["anomaly"].values())
               for level in ("image_auroc", "pixel_auroc")]]
            for network in json.loads((tmp_path / "eval/metrics.json").read_text()).values()]
    gains = np.subtract(best[0], best[1])
    assert (gains > [0.02, 0.05, 0.05]).all(), gains
    row = printed_table(capsys.readouterr().out)["linear probe, 10% of the labels"]
    assert row == pytest.approx([areas[0] for areas in best], abs=5.1e-4)


# ---- Checkpoints ---------------------------------------------------------------------------------

WIDE = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
HUGE = {"img_size": 32, "patch_size": 16, "embed_dim": 1280, "depth": 1, "num_heads": 16}


def checkpoint_of(kind):
    """-> a file's content in this layout, the encoder that it must give as a function."""
    if kind == "run":
        model = tiny_model(**WIDE)
        randomise(model.teacher)
        return {"model": model.state_dict(), "epoch": 3}, model.teacher["encoder"]
    vit = timm_vit(**(HUGE if kind == "huge" else WIDE))
    state = vit.state_dict()
    other = {key: torch.zeros_like(value) for key, value in state.items()}

    def prefixed(prefix, weights, head):
        return {prefix + key: value for key, value in weights.items()} | {head: torch.ones(9, 9)}

    content = {
        "huge": state, "timm": {**state, "head.weight": torch.zeros(9, 128)},
        "mae": {"model": {**state, "mask_token": torch.zeros(1, 1, 64),
                          "decoder_pred.weight": torch.zeros(9, 64)}},
        "release": {"student": prefixed("module.encoder.", other, "module.head.0.weight_v"),
                    "teacher": prefixed("module.encoder.", state, "module.head.0.weight_v")},
        "dino": {"student": prefixed("module.backbone.", other, "module.head.last_layer.weight_g"),
                 "teacher": prefixed("backbone.", state, "head.last_layer.weight_g"),
                 "args": argparse.Namespace(arch="vit_small")}}
    state_dict = prefixed(kind, state, "text.blocks.0.weight")
    return content.get(kind, {"state_dict": state_dict}), vit.forward_features


@pytest.mark.parametrize("kind", ["run", "release", "timm", "mae", "dino", "huge", "_orig_mod.",
                                  "model.", "module.base_encoder."])
def test_load_encoder_reads_every_layout(tmp_path, kind):
    content, expected = checkpoint_of(kind)
    torch.save(content, tmp_path / "file.pth")
    images = torch.randn(2, 3, 32, 32)
    tokens = afire.load_encoder(tmp_path / "file.pth")(images)
    assert_close(tokens, expected(images), atol=1e-4, rtol=1e-4)


def test_positions_are_interpolated_as_timm_does(tmp_path):
    state = timm_vit(**WIDE).state_dict()
    torch.save(state, tmp_path / "vit.pth")
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(
        state["pos_embed"], [6, 6], num_prefix_tokens=1)
    larger = timm_vit(**{**WIDE, "img_size": 48})
    larger.load_state_dict(state)
    images = torch.randn(2, 3, 48, 48)
    assert_close(afire.load_encoder(tmp_path / "vit.pth", 48)(images),
                 larger.forward_features(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options, changes, message", [
    ({"init_values": 0.1}, {}, "ls1.gamma"), ({"reg_tokens": 4}, {}, "reg_token"),
    ({"qk_norm": True}, {}, "q_norm"), ({"pre_norm": True}, {}, "norm_pre"),
    ({"in_chans": 1}, {}, "1 channels"), ({}, {"norm.weight": None}, "norm.weight"),
    ({}, {"pos_embed": None}, "pos_embed"),
    ({}, {"patch_embed.proj.weight": None}, "patch_embed.proj.weight"),
    ({}, {"b.patch_embed.proj.weight": torch.zeros(1)}, r"several encoders, .* b\."),
    ({}, {"blocks.1.mlp.fc1.weight": torch.zeros(3, 3)}, "fc1"),
    ({}, {"pos_embed": torch.zeros(1, 6, 128)}, "vit.pth")])
def test_an_encoder_that_is_another_is_refused_by_name(tmp_path, options, changes, message):
    state = {**timm_vit(**WIDE, **options).state_dict(), **changes}
    state = {key: value for key, value in state.items() if value is not None}
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(afire.InputError, match=message):
        afire.load_models(tmp_path / "vit.pth")


def test_eval_takes_any_encoder_and_names_what_is_left_out(tmp_path, radiographs, capsys):
    torch.save(checkpoint_of("dino")[0], tmp_path / "vit.pth")
    afire.main(["eval", "--ckpt", f"{tmp_path}/vit.pth", "--data", str(radiographs), "--labels",
                f"{radiographs}/labels.csv", "--device", "cpu"])
    unmasked = [row for row in read_rows(radiographs / "labels.csv")
                if row["split"] == "test" and row["findings"] and not row["mask"]]
    assert_printed(capsys, "does not record its training images", "prototype and restoration",
                   f"{len(unmasked)} abnormal test images have no mask: not counted")
    report = json.loads((tmp_path / "eval-vit.pth/metrics.json").read_text())
    assert set(report["checkpoint"]["anomaly"]) == {"neighbours"}
    assert report["checkpoint"]["linear"] != report["random_init"]["linear"]


class Trap:
    """Unpickled carelessly, it makes the folder `sprung`."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("save", [torch.save, lambda state, file: file.write_bytes(
    pickle.dumps(state, protocol=2))], ids=["torch", "pickle"])
def test_no_code_in_a_checkpoint_is_run(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save({"model": Trap()}, tmp_path / "file.pth")
    with pytest.raises(afire.InputError, match="more than tensors"):
        afire.load_encoder("file.pth")
    assert not Path("sprung").exists()


# ---- Data ----------------------------------------------------------------------------------------

GREY = np.random.default_rng(0).integers(0, 256, (24, 24), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (24, 24, 3), np.uint8)
DEEP = np.random.default_rng(2).integers(900, 3000, (24, 24), np.uint16)
PALETTE = Image.fromarray(COLOUR).quantize(16)
LUMA = [0.299, 0.587, 0.114]
LOW, HIGH = np.percentile(DEEP, [0.5, 99.5])


def film(seed=0, size=48):
    """A drawn chest that is not symmetric: (size, size) uint8."""
    return afire.phantoms(seed + 1, size)[0][seed, 0]


@pytest.mark.parametrize("name, image, expected, tolerance", [
    ("grey.png", GREY, GREY, 0), ("grey.jpg", GREY, GREY, 40),
    ("bits.png", GREY > 99, 255 * (GREY > 99), 0), ("rgb.png", COLOUR, COLOUR @ LUMA, 1),
    ("rgba.png", np.dstack([COLOUR, GREY]), COLOUR @ LUMA, 1),
    ("palette.png", PALETTE, np.asarray(PALETTE.convert("RGB")) @ LUMA, 1),
    ("deep.png", DEEP, 255 * np.clip((DEEP - LOW) / (HIGH - LOW), 0, 1), 1),
    ("wide.png", np.tile(np.linspace(0, 255, 120), (40, 1)).astype(np.uint8),
     np.linspace(0, 255, 24), 6)])                                     # resized, not cropped
def test_any_kind_of_file_becomes_a_grey_square(tmp_path, name, image, expected, tolerance):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(tmp_path / name)
    pixels = afire.read_image(tmp_path / name, 24)
    assert pixels.shape == (24, 24) and pixels.dtype == np.uint8 and pixels.flags.writeable
    assert np.abs(pixels.astype(float) - expected).max() <= tolerance
    equalised = ImageOps.equalize(Image.fromarray(pixels))
    stream = io.BytesIO((tmp_path / name).read_bytes())
    assert np.array_equal(afire.read_image(stream, 24, "equal"), equalised)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_tag_says(tmp_path, orientation):
    tag = Image.Exif()
    tag[0x0112] = orientation
    Image.fromarray(film(1, 96)).save(tmp_path / "a.jpg", exif=tag, quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        expected = ImageOps.exif_transpose(image).resize((48, 48), Image.Resampling.BILINEAR)
    pixels = afire.read_image(tmp_path / "a.jpg", 48)
    assert np.abs(pixels - np.asarray(expected, float)).max() <= 3


def test_colours_of_16_bits_are_refused(tmp_path):
    cv2.imwrite(f"{tmp_path}/deep.png", np.dstack(3 * [DEEP]))
    with pytest.raises(ValueError, match="16 bits in colour"):
        afire.read_image(tmp_path / "deep.png", 24)


def load(folder, labels=None, size=8, **options):
    """A set, its cache beside it."""
    return afire.load_radiographs(folder, size, labels=labels, cache=f"{folder}.cache", **options)


def write_films(folder, *names):
    write_images(folder, [film(i, 24) for i in range(len(names))], names)


def findings_of(data):
    """-> {name: findings} of what is used, which is either to train on or held out."""
    used = [*data.train, *data.test]
    assert len(set(used)) == len(used)
    assert len(data.images) == len(data.labels) == len(data.patients) == len(data.names)
    return {data.names[row]: set(np.array(data.findings)[data.labels[row]]) for row in used}


def names(data, rows):
    return {data.names[row] for row in rows}


def assert_printed(capsys, *sentences):
    printed = capsys.readouterr().out
    assert [sentence for sentence in sentences if sentence not in printed] == []


def test_a_table_says_everything(tmp_path, capsys):
    folder = tmp_path / "set"
    write_films(folder, *[f"{name}.png" for name in "abcdefg"], "NORMAL/train/h.png", ".i.png")
    labels = table(tmp_path / "t.csv", "a.png,,1,train,x", "b.png,mass|nodule,1,train,y",
                   "c.png,mass,3,test,x", "e.png,,,test,y", "f.png,,5,,x", "",
                   "NORMAL/train/h.png,Mass,,test,y", header=f"\ufeff{HEADER},fold")
    labels.write_bytes(labels.read_bytes().replace(b"\n", b"\r\n"))
    data = load(folder, labels)
    assert findings_of(data) == {"a.png": set(), "b.png": {"mass", "nodule"}, "c.png": {"mass"},
                                 "e.png": set(), "NORMAL/train/h.png": {"Mass"}}
    assert names(data, data.test) == {"c.png", "e.png", "NORMAL/train/h.png"}
    patients = dict(zip(data.names, data.patients))
    assert [patients[name] for name in ("a.png", "b.png", "c.png", "e.png")] == [
        "1", "1", "3", "e.png"]
    assert_printed(
        capsys, f"{labels}: 5 images; left out: 1 rows without a split, 2 files without a row\n",
        f"{folder}: 5 images of 4 patients, 2 without findings; 2 to train on, 3 held out; "
        "findings: Mass, mass, nodule\n", "patient unknown for 2 images")


@pytest.mark.parametrize("lines, header, message", [
    (["a.png,,train"], "image,findings,split", ", line 1: .*columns image, findings, patient"),
    (["a.png,,1,train,"], f"{HEADER},split", ", line 1: .*once each"), ([], "", ", line 1: "),
    (["a.png,,1,train", "b.png,,1,val"], HEADER, ", line 3: .*as split"),
    (["a.png,,1,train", "", "a.png,,1,train"], HEADER, ", line 4: "),
    (["a.png,train,1"], "image,split,patient,findings", ", line 2: it needs 4 cells"),
    ([",,1,train"], HEADER, ", line 2: "), (["a.png,,1,train,x"], HEADER, ", line 2: "),
    (["b.png,,,train", "a.png,\"Mass,,train", "c.png,,,train"], HEADER, ", after line 2: .*quote"),
    (["b.png,,,train", "a.png,\udcff,,train"], HEADER, ", line 3: not UTF-8"),
    *[([f"a.png,{findings},1,train"], HEADER, ", line 2: '.*' is no finding") for findings in (
        "No Finding", "healthy", "Mass|NORMAL", "\"Mass, b\"", "Mass;b", "Mass|", " Mass")],
    (["a.png,,1,train", "c.png,,7,train", "b.png,,1,test", "d.png,,7,test"], HEADER,
     ": 2 patients are in train and in test, the first is 1"),
    (["a.png,,1,"], HEADER, ": no row has train or test as split"),
    (["a.png,,1,train", "x.png,,2,train", "y.png,,2,"], HEADER, ": 2 rows .*, the first is x.png")])
def test_a_table_that_cannot_be_trusted_is_refused(tmp_path, lines, header, message):
    write_films(tmp_path, "a.png", "b.png", "c.png", "d.png")
    file = table(tmp_path / "t.csv", *lines, header=header)
    remedy = f": python data/make_table.py table {file} --data {tmp_path} > labels.csv"
    with pytest.raises(afire.InputError, match=f"^{file}{message}.*{re.escape(remedy)}$"):
        load(tmp_path, file)


@pytest.mark.parametrize("name, command", [
    ("NORMAL/b.png", "folders {}"), ("Masks.PNG", "folders {}"),
    ("b.dcm", "dicom {} --images PNG_FOLDER"), ("x/B.DICOM", "dicom {} --images PNG_FOLDER")])
def test_a_folder_in_which_not_all_may_be_normal_is_refused(tmp_path, name, command):
    write_films(tmp_path, "a.png", "x/y/c.tif", ".ipynb_checkpoints/1.png", "@eaDir/1.png/T.jpg",
                "$RECYCLE.BIN/x.png", "__MACOSX/1.png", ".mask.png", "run/eval/anomaly.png")
    (tmp_path / "run/checkpoint.pth").touch()
    assert findings_of(load(tmp_path)) == {"a.png": set()}, "nothing else is an image, or seen"
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(tmp_path / "x/y/c.tif", tmp_path / name)
    remedy = f"python data/make_table.py {command.format(tmp_path)} > labels.csv"
    with pytest.raises(afire.InputError, match=f"has {name}: .*--all-normal.*{re.escape(remedy)}"):
        load(tmp_path)


def test_links_that_lead_back_and_masks_of_equal_files_do_no_harm(tmp_path, capsys):
    write_films(tmp_path, "a.png", "masks/b.png")
    (tmp_path / "x").symlink_to(".")
    (tmp_path / "y").symlink_to(".")
    assert sorted(afire.find_files(tmp_path, ".png")) == ["a.png", "masks/b.png"]
    shutil.copy(tmp_path / "a.png", tmp_path / "c.png")
    Image.new("L", (24, 24), 255).save(tmp_path / "masks/b.png")
    labels = table(tmp_path / "t.csv", "a.png,mass,,test,", "c.png,mass,,test,masks/b.png",
                   header="image,findings,patient,split,mask")
    data = load(tmp_path, labels)
    assert [mask.all() for mask in data.masks.values()] == [True], "the first has no mask itself"
    assert "0 files without a row" in capsys.readouterr().out


def test_what_cannot_be_used_is_one_line_and_what_is_mended_is_used(films, capsys):
    Image.new("L", (9, 9), 3).save(films / "0.png")
    (films / "2.png").write_bytes((films / "2.png").read_bytes()[:99])
    (films / "3.png").unlink()
    (films / "3.png").symlink_to("nowhere.png")
    shutil.copy(films / "1.png", films / "4.png")
    skipped = {"0.png": "blank", "2.png": "unreadable, OSError",
               "3.png": "unreadable, FileNotFoundError", "4.png": "equal to 1.png"}
    for i, (name, reason) in enumerate(skipped.items()):
        data = load(films)
        assert names(data, data.train) == {"1.png", "5.png", *[*skipped][:i]}
        assert_printed(capsys, f"skipped: {4 - i} files, ", f"the first is {name} ({reason}); ")
        (films / name).unlink()
        write_images(films, [film(9 + i, 24)], [name])


def test_names_in_any_bytes_do_no_harm(tmp_path):
    folder = tmp_path / "set"
    images = [os.fsdecode(b"film \xff\xe9.png"), "R\u00f6ntgen \u80ba.png", "a\nnewline.png"]
    write_films(folder, *images)
    assert set(findings_of(load(folder))) == set(images)
    labels = table(tmp_path / "t.csv", *[f"\"{name}\",mass,,train" for name in images[1:]])
    assert set(findings_of(load(folder, labels))) == set(images[1:])


# ---- Data: the cache -----------------------------------------------------------------------------

@pytest.fixture
def films(tmp_path):
    """A folder of six films; its cache lies beside it."""
    write_films(tmp_path / "set", *[f"{i}.png" for i in range(6)])
    return tmp_path / "set"


def caches(folder):
    return sorted(file.suffix for file in Path(f"{folder}.cache").iterdir())


def assert_right(folder, data):
    """Images and hashes are those of the files."""
    assert len(findings_of(data)) == len(data.names) == len(list(folder.iterdir()))
    for name, image, content_hash in zip(data.names, data.images, data.hashes, strict=True):
        assert np.array_equal(image[0], afire.read_image(folder / name, 8))
        content = (folder / name).read_bytes()
        assert content_hash == hashlib.sha256(content).hexdigest()[:16]


def test_only_what_is_new_is_decoded(films, monkeypatch):
    decode = Mock(wraps=afire.decode)
    monkeypatch.setattr(afire, "decode", decode)
    for calls in 6, 6:
        assert_right(films, load(films))
        assert decode.call_count == calls, "a second start decodes nothing"
    for seed in 9, 10:                                     # two files of the same size
        Image.fromarray(film(seed, 24)).save(films / "0.png", compress_level=0)
        os.utime(films / "0.png", (seed, seed))
        assert_right(films, load(films))
    for levels, size in ("file", 32), ("equal", 8), ("equal", 32):
        image = load(films, size=size, levels=levels).images[0, 0]
        assert np.array_equal(image, afire.read_image(films / "0.png", size, levels))


def test_neither_a_kill_nor_a_full_disk_nor_a_second_process_harms_the_cache(films, monkeypatch):
    def load_within(stream, fsync=os.fsync):
        assert caches(films) == [".partial"], "a kill leaves no cache"
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            patch.setattr(os, "fsync", fsync)
            assert_right(films, load(films))
        fsync(stream)

    monkeypatch.setattr(os, "fsync", load_within)
    assert_right(films, load(films))
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(afire.InputError, match="cannot write .*set.cache/.*: No space left"):
        load(films, size=16)
    assert caches(films) == [".images"]


# ---- Data: masks ---------------------------------------------------------------------------------

def test_a_mask_is_true_where_most_of_it_is_white(tmp_path):
    """Image and mask are compared as a viewer shows them, here turned."""
    mask = np.random.default_rng(0).random((40, 24)) < 0.5
    tag = Image.Exif()
    for name, orientation, turns in ("film.png", 6, 1), ("mask.png", 3, 2):
        tag[0x0112] = orientation
        Image.fromarray(255 * np.uint8(np.rot90(mask, turns))).save(tmp_path / name, exif=tag)
    found = afire.read_mask(tmp_path / "mask.png", tmp_path / "film.png", 8)
    expected = [[mask[5 * y:5 * y + 5, 3 * x:3 * x + 3].mean() > 0.5 for x in range(8)]
                for y in range(8)]
    assert found.dtype == bool and np.array_equal(found, expected)


@pytest.mark.parametrize("findings, mask, message", [
    ("mass", None, "mask .*white.png of .*film.png .*No such file"),
    ("mass", np.ones((24, 20)), r"white.png of .*film.png .*\(20, 24\) pixels.*\(24, 24\)"),
    ("mass", np.ones((24, 24)) / 255, "white.png of .*film.png .*levels up to 1, .*white"),
    ("", np.ones((24, 24)), "t.csv: film.png has no finding, but its mask is white")])
def test_a_mask_that_cannot_be_right_is_refused(tmp_path, findings, mask, message):
    write_films(tmp_path / "set", "film.png")
    file = tmp_path / "set/white.png"
    if mask is not None:
        Image.fromarray(np.uint8(255 * mask)).save(file)
    labels = table(tmp_path / "t.csv", f"film.png,{findings},,test,white.png",
                   header=f"{HEADER},mask")
    with pytest.raises(afire.InputError, match=message):
        load(tmp_path / "set", labels)
    Image.new("L", (24, 24)).save(file)
    assert not next(iter(load(tmp_path / "set", labels).masks.values())).any()
    labels.write_text(labels.read_text().replace("test,white", "train,nowhere"))
    assert load(tmp_path / "set", labels).masks == {}, "those of training images are not read"


# ---- Data: any folder, any table -----------------------------------------------------------------

FOLDERS = st.sampled_from(["NORMAL", "Mass", "train", "TEST", "masks", ".hidden", "@eaDir"])
FILES = st.sampled_from(["a.png", "b.PNG", "c.jpg", "lung_Mask.png", ".d.png", "e.txt", "f.dcm"])
PATHS = st.tuples(st.lists(FOLDERS, max_size=2), FILES).map(lambda x: "/".join([*x[0], x[1]]))
TREES = st.one_of(*[st.dictionaries(paths, st.integers(-2, 6), min_size=1, max_size=14)
                    for paths in (PATHS, st.from_regex(r"[a-d]\.(png|JPG)", fullmatch=True))])
ROWS = st.tuples(st.integers(0, 13), st.sampled_from(["", "Mass", "Mass|Nodule"]),
                 st.sampled_from(["", "1", "2", "3"]), st.sampled_from(["", "train", "test"]))


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(TREES, st.booleans(), st.none() | st.lists(ROWS, max_size=14))
def test_nobody_and_no_content_is_in_both_parts_and_the_counts_add_up(files, all_normal, rows):
    """files: {path: content}, of which -1 is broken, -2 blank; rows of the table, by number of the
    file."""
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()) as out:
        folder = Path(place, "set")
        pixels_of = {}
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((2, 2), 9, np.uint8)
            pixels[0, 0] += 30 * (content + 2)
            pixels_of[name] = pixels
            Image.fromarray(pixels).save(folder / name, "png")
            if content == -1:
                (folder / name).write_bytes(b"broken")
        seen = [name for name in files if not re.search(r"(^|/)[.@]", name)]
        images = {name for name in seen if name.lower().endswith(("png", "jpg"))}
        labels = None
        if rows is None:
            doubtful = any("/" in name or "mask" in name.lower() for name in images)
            refused = not all_normal and (doubtful or any(name.endswith("dcm") for name in seen))
            known = {name: ("", name, "train") for name in images}
        else:
            known = {list(files)[i % len(files)]: row for i, *row in rows}
            labels = table(Path(place, "t.csv"), *[f"{name},{','.join(row)}"
                                                   for name, row in known.items()])
            people = [{patient for _, patient, split in known.values() if split == part} - {""}
                      for part in ("train", "test")]
            refused = bool(people[0] & people[1])
        try:
            data = load(folder, labels, 2, all_normal=all_normal)
        except afire.InputError as error:
            data = None
            print(error)
    printed = out.getvalue()
    read = {name: row for name, row in known.items() if row[2]}
    usable = {name for name in read if files[name] >= 0}
    assert bool(data) == (not refused and bool(usable)), printed
    if data:
        findings = findings_of(data)
        skipped = re.search(r"^skipped: (\d+) files", printed, re.M)
        assert len(findings) + int(skipped[1] if skipped else 0) == len(read)
        assert len(findings) == len({files[name] for name in usable})
        assert len({data.hashes[row] for row in (*data.train, *data.test)}) == len(findings)
        patients = np.array(data.patients)
        assert not set(patients[data.train]) & set(patients[data.test])
        for name, found in findings.items():
            image = data.images[data.names.index(name), 0]
            assert np.array_equal(image, pixels_of[name]), "no row is displaced"
            equal = [other for other in usable if files[other] == files[name]]
            of_all = "|".join(read[other][0] for other in equal).split("|")
            assert name == min(equal) and found == set(of_all) - {""}
            assert read[name][2] == ("test" if name in names(data, data.test) else "train")


# ---- Phantoms ------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [32, 65, 224])
def test_phantoms_have_masks_exactly_where_labels_say_and_depend_on_seed_and_index_alone(size):
    images, labels, masks, findings = afire.phantoms(24, size)
    assert set(findings) == {"nodule", "effusion", "cardiomegaly"}
    assert images.shape == (24, 1, size, size) and images.dtype == np.uint8
    assert labels.shape == (24, 3) and masks.shape == (24, 3, size, size)
    assert labels.dtype == masks.dtype == bool and np.array_equal(masks.any((2, 3)), labels)
    assert labels.any(0).all() and 6 < labels.any(1).sum() < 18 and images.std((2, 3)).min() > 20
    assert np.array_equal(afire.phantoms(2, size)[0], images[:2])
    images = np.concatenate([images, afire.phantoms(4, size, seed=3)[0]])
    assert len(np.unique(images.reshape(28, -1), axis=0)) == 28


def test_without_data_a_fifth_of_2500_phantoms_is_held_out():
    data = afire.load_radiographs(None, 32)
    images, labels, masks, findings = afire.phantoms(100, 32)
    assert np.array_equal(data.images[:100], images) and np.array_equal(data.labels[:100], labels)
    assert data.findings == findings and [*data.masks] == [*np.flatnonzero(data.labels.any(1))]
    for row in np.flatnonzero(labels.any(1)):
        assert np.array_equal(data.masks[row], masks[row].any(0))
    assert sorted([*data.train, *data.test]) == list(range(2500)) and len(data.test) == 500
    assert len(set(data.hashes)) == len(set(data.patients)) == 2500


# ---- Figures -------------------------------------------------------------------------------------

@pytest.fixture
def draw(monkeypatch, tmp_path):
    """-> a function that draws images of 16 px by plot_images: -> the axes, and the colours that a
    viewer sees in the middle of each pixel."""
    def seen(*arguments):
        afire.plot_images(tmp_path / "a.png", *arguments)
        picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"), float)
        grid = figures[0].axes[0].get_gridspec()
        axes = figures[0].axes[:grid.nrows * grid.ncols]   # without the scales
        axes = np.reshape(axes, (grid.nrows, grid.ncols))
        points = np.indices((16, 16)).reshape(2, -1).T[:, ::-1] + 0.5
        colours = {}
        for place in np.ndindex(axes.shape):
            x, y = np.int64(axes[place].transData.transform(points)).T
            colours[place] = picture[len(picture) - 1 - y, x].reshape(16, 16, 3)
        return axes, colours

    figures = []
    savefig = afire.Figure.savefig
    monkeypatch.setattr(afire.Figure, "savefig", lambda figure, *arguments, **options: (
        figures.append(figure), savefig(figure, *arguments, **options)))
    return seen


def test_a_picture_shows_images_in_grey_under_their_titles(draw):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16), np.uint8)
    images[0] //= 3
    axes, colours = draw({"image": images, "half": images // 2 + 64})
    assert [axis.get_title() for axis in axes[0]] == ["image", "half"]
    grey = (images - images.min()) * (255 / np.ptp(images))            # a scale for each column
    for row, column in colours:
        assert np.abs(colours[row, column] - grey[row][..., None]).max() < 6


def test_a_map_colours_its_image_where_it_is_high_and_a_mask_is_outlined(draw):
    images = np.full((2, 16, 16), 100, np.uint8)
    images[:, 8:] = 200
    maps = np.zeros((2, 4, 4), np.float32)
    maps[0, :2] = -3                                       # below the median
    maps[0, 3, 0] = 1
    mask = np.zeros((16, 16), bool)
    mask[2:7, 9:14] = True
    axes, colours = draw({"image": images}, {"score": maps}, ["a\nb", "c"], [mask, None])
    assert [axis.get_title() for axis in axes[0]] == ["image", "score"]
    assert [axis.texts[0].get_text() for axis in axes[:, 0]] == ["a\nb", "c"]
    coloured = np.ptp(colours[0, 1], 2) > 50
    assert coloured[13:15, 1:3].all() and not coloured[:8, :8].any() and not coloured[8:, 8:].any()
    grey = np.repeat([0, 255], 8).reshape(16, 1, 1)
    assert np.abs(colours[1, 1] - grey).max() < 3, "a low map is transparent"
    for column in 0, 1:
        path, = axes[0, column].collections[0].get_paths()
        assert path.get_extents().extents.tolist() == pytest.approx([9, 2, 14, 7], abs=0.6)
        assert not axes[1, column].collections


@torch.no_grad()
def test_restoration_is_drawn_where_tokens_are_hidden(monkeypatch):
    pictures = []
    monkeypatch.setattr(afire, "plot_images", lambda file, columns: pictures.append(columns))
    model = tiny_model().eval()
    randomise(model.student)
    images = phantom_images(160, 32)[:3]
    afire.plot_restoration("file", model, images)
    lesioned, mask = afire.synthetic_lesion_mask(images, seeded())
    abnormal = afire.abnormal_tokens(mask, 8)
    hidden = abnormal.view(3, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)
    restored = model.decoder(model.student["encoder"](afire.normalise(lesioned)), abnormal)
    restored = (restored[:, 1] * 0.224 + 0.456).clamp(0, 1)            # ImageNet's, of green
    expected = [images[:, 0], lesioned[:, 0], lesioned[:, 0] * ~hidden,
                torch.where(hidden, restored, lesioned[:, 0])]
    for drawn, picture in zip(pictures[0].values(), expected, strict=True):
        np.testing.assert_allclose(drawn, picture, atol=1e-5)


# ---- Command line --------------------------------------------------------------------------------

FINE = "pretrain --preset small --batch-size 1 --data {tmp}/fine "
MISTAKES = {
    "pretrain --device abacus": "abacus", "pretrain --device meta": "meta",
    "pretrain --lr nan": "argument --lr", "pretrain --structure-weight -1": "structure-weight",
    "pretrain --seed 18446744073709551616": "seed", "pretrain --img-size 100000000": "img-size",
    "pretrain --img-size 30": "img-size", FINE + "--batch-size 64": "batch-size",
    FINE + "--out {tmp}/odd.csv/run": "odd.csv", "pretrain --labels {tmp}/odd.csv": "--data",
    "pretrain --data {tmp}/nowhere": "nowhere", "pretrain --data {tmp}/empty": "empty",
    "pretrain --data {tmp}/broken": "broken",
    "pretrain --data {tmp}/sick --labels {tmp}/sick.csv": "is normal.*mass",
    FINE + "--labels {tmp}/no.csv": "no.csv", FINE + "--labels {tmp}/odd.csv": "odd.csv",
    FINE + "--init {tmp}/no.pth": "no.pth", "eval --ckpt {tmp}/nowhere": "nowhere",
    FINE + "--init {run}/checkpoint.pth --patch-size 16": "checkpoint.pth",
    "eval --ckpt {run} --img-size 32": "img-size", "eval --ckpt {tmp}/odd.csv": "odd.*damaged",
    "eval --ckpt {run} --labels {tmp}/odd.csv": "odd.csv",
    "eval --ckpt {run} --data {tmp}/sick --labels {tmp}/sick.csv": "sick",
    "eval --ckpt {run} --data {tmp}/fine --labels {tmp}/1.csv": "1 normal .* train and 2 in test",
    "eval --ckpt {run} --data {tmp}/fine --labels {tmp}/2.csv": "2 normal .* train and 1 in test",
    "eval --ckpt {run}/encoder.pth --data {tmp}/fine": "--labels"}


@pytest.mark.parametrize("command", MISTAKES)
def test_bad_input_ends_in_one_sentence_that_names_it(tmp_path, run, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_films(tmp_path, "sick/MASS/a.png", *[f"fine/{name}.png" for name in "abcd"])
    for n in 1, 2:                                         # normal images in train, of three
        table(tmp_path / f"{n}.csv", *[f"{name}.png,{'mass' * (name == 'd')},,{part}"
                                       for name, part in zip("abcd", n * ["train"] + 3 * ["test"])])
    table(tmp_path / "sick.csv", "MASS/a.png,mass,,train")
    (tmp_path / "broken").mkdir()
    for name in os.fsdecode(b"broken/\xff.png"), "odd.csv":
        (tmp_path / name).write_text("file,label\na.png,1\n")
    device = "" if "--device" in command else " --device cpu"
    sentence = refusal(capsys, (command + device).format(tmp=tmp_path, run=run).split())
    assert sentence.startswith("afire.py") and re.search(MISTAKES[command], sentence)
    assert not Path("runs/afire").exists(), "a mistake leaves no folder"


README = Path(afire.__file__).with_name("README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("n", range(README.count("```python\n")))
def test_the_readme_examples_run(tmp_path, monkeypatch, run, n):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "runs/afire")
    Image.fromarray(film()).save("image.png")
    exec(README.split("```python\n")[1 + n].split("```")[0], {})
