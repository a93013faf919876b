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
import signal
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
from torch._subclasses.fake_tensor import FakeTensorMode
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
    """The command ends with status 2: -> the sentence that it prints, in a line of its own, below
    nothing but progress bars and argparse's usage."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        afire.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    above, _, sentence = error.removesuffix("\n").rpartition("\n")
    bars = re.sub(r"\r?(decode|pretrain):[^\r\n]*", "", above)
    assert not bars.strip() or bars.startswith("usage:"), error
    return sentence


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

def test_patchify_cuts_rows_of_patches_and_unpatchify_undoes_it():
    images = torch.randn(2, 3, 32, 32)
    patches = afire.patchify(images, 8)
    assert torch.equal(patches[1, 6], images[1, :, 8:16, 16:24].flatten())
    assert torch.equal(afire.unpatchify(patches, 8), images)


@pytest.mark.parametrize("module", [afire.ViT(40, 8, 3, 24, 1, 1),
                                    afire.Decoder(40, 8, 3, 12, 24, 1, 1)])
def test_positions_are_those_of_mae(module):
    """Half the channels tell the column, half the row: first the sines, then the cosines."""
    expected = [[function(place / 10000 ** (i / 6)) for place in (column, row)
                 for function in (math.sin, math.cos) for i in range(6)]
                for row, column in np.ndindex(5, 5)]
    assert_close(module.pos_embed[0], torch.tensor([[0.0] * 24, *expected]), atol=1e-6, rtol=0)


def test_weights_start_as_xavier_and_biases_at_zero():
    model = tiny_model(embed_dim=64, decoder_dim=64)
    for module in (*model.student["encoder"].modules(), *model.decoder.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = math.sqrt(6 / (module.weight.shape[0] + module.weight[0].numel()))
            assert 0.99 * bound < module.weight.abs().max() <= bound and not module.bias.any()


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


def test_the_head_s_weights_start_as_they_should():
    head = afire.AnatomyHead(12, 9, 7, hidden_dim=64, bottleneck_dim=64)
    assert 0.97 < head.last_layers.std() < 1.03 and 0.017 < head.mlp[2].weight.std() < 0.023
    assert not any(head.mlp[i].bias.any() for i in (0, 2, 4))


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


def test_prototypes_copy_the_first_mean_then_run_each_on_its_own():
    first, second, third = torch.randn(3, 4, 6, 5, requires_grad=True)
    ours = afire.SpatialPrototypes(6, 5)
    ours.update(first)
    assert not ours.prototypes.requires_grad
    assert_close(ours.prototypes, first.mean(0).detach())
    ours.update(second)
    expected = (0.75 * first.mean(0) + 0.25 * second.mean(0)).detach()
    assert_close(ours.prototypes, expected)
    assert_close(ours.assignment(), afire.sinkhorn(expected))
    loaded = afire.SpatialPrototypes(6, 5, momentum=0.1)
    loaded.load_state_dict(ours.state_dict())
    loaded.update(third)                                               # not as if it were the first
    assert_close(loaded.prototypes, 0.1 * expected + 0.9 * third.mean(0).detach())
    loaded.momentum = 0.0
    loaded.update(second)
    assert torch.equal(loaded.prototypes, second.mean(0).detach())


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


@pytest.mark.parametrize("dtype", TYPES)
def test_the_category_loss_of_zero_logits_has_a_gradient_of_the_type(dtype):
    logits, *others = loss_input("category")
    logits = (0 * logits).to(dtype).requires_grad_()
    afire.category_consistency_loss(logits, *others).backward()
    assert logits.grad.isfinite().all() and 1 < logits.grad.abs().max() < 1e4


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


def test_the_teacher_starts_as_the_student():
    model = tiny_model()
    assert equal(model.teacher.state_dict(), model.student.state_dict())


def test_student_and_decoder_learn_by_gradients_and_teacher_and_prototypes_do_not():
    model = tiny_model()
    model(*tiny_batch())["loss"].backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    names = {n for n, _ in model.named_parameters() if "teacher" not in n and "pos_embed" not in n}
    assert trained.keys() == names and all(gradient.any() for gradient in trained.values())
    model.update_teacher(0.9)
    assert not any(p.requires_grad for p in model.teacher.parameters()), "no graph grows"
    prototypes = model.prototypes.prototypes.clone()
    model.eval()(*(images.flip(3) for images in tiny_batch()))
    assert torch.equal(model.prototypes.prototypes, prototypes), "they stay in eval mode"


@pytest.mark.skipif(torch.__version__ < "2.7", reason="here fake CUDA tensors need a CUDA driver")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_step_on_a_gpu_mixes_no_devices_and_never_waits():
    """Fake CUDA tensors need no GPU; that the host uses the value of one is an error."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model = tiny_model()
            images = torch.rand(6, 1, 32, 32)
        for generator in None, seeded():
            lesions = afire.synthetic_lesion_mask(images, generator, offset=3)
            losses = model(images, *lesions)
            assert {value.device.type for value in (*lesions, *losses.values())} == {"cuda"}
            model.update_teacher(0.9)


COMPONENTS = {"synthetic_lesion_mask": lambda f: f(torch.rand(6, 1, 32, 32))[0],
              "AFiRe": lambda f: f(32, 8, 32, 1, 2)(*torch.rand(3, 6, 1, 32, 32))["loss"]}


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_runs_alone_with_the_helpers_that_it_names(name):
    """AFiRe names all others, which are lifted out with it."""
    tree = ast.parse(Path(afire.__file__).read_text(encoding="utf-8"))
    definitions = {node.name: node for node in tree.body if hasattr(node, "name")}
    names, queue = set(), [name]
    while queue:
        names.add(queue[-1])
        used = {node.id for node in ast.walk(definitions[queue.pop()]) if type(node) is ast.Name}
        queue += (used & definitions.keys()) - names
    source = "\n".join(ast.unparse(node) for key, node in definitions.items() if key in names)
    space = {"math": math, "np": np, "torch": torch, "nn": nn, "F": F}
    exec(source, space)
    results = []
    for component in space[name], getattr(afire, name):
        torch.manual_seed(0)
        results.append(COMPONENTS[name](component))
    assert torch.equal(*results) and results[0].isfinite().all()


# ---- Options and pre-training --------------------------------------------------------------------

CPU = torch.device("cpu")
COMMAND = f"{sys.executable} {afire.__file__}"


def options_of(command):
    return afire.parse_arguments(command.split())


def shell(command, **options):
    return subprocess.run(command, shell=True, timeout=170, capture_output=True, text=True,
                          check=False, **options)


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
    """72 phantoms, a third of them held out, a broken file, and their table labels.csv, in which
    most abnormal images have a mask."""
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


@pytest.mark.parametrize("preset, recipe", [
    ("paper", ("vit_base", 224, 16, "file", 400, 64, 5e-4, 10, 0.996, 1, 1, 1)),
    ("small", ("vit_micro", 64, 8, "equal", 38, 32, 8e-3, 3, 0.99, 1, 1, 1)),
    ("phantoms", ("vit_micro", 64, 8, "file", 18, 16, 16e-3, 2, 0.97, 0.2, 0.2, 1))])
def test_a_preset_is_this_recipe_and_what_is_typed_overrides_it(preset, recipe):
    options = vars(options_of(f"pretrain --data x --preset {preset}"))
    assert tuple(options[name] for name in RECIPE) == recipe and options["preset"] == preset
    options = vars(options_of(f"pretrain --epochs 5 --preset {preset} --levels equal --lr 1"))
    typed = {"epochs": 5, "levels": "equal", "lr": 1}
    assert {name: options[name] for name in RECIPE} == {**dict(zip(RECIPE, recipe)), **typed}


@pytest.mark.parametrize("gpu, command, preset", [
    (False, "", "phantoms"), (True, "", "phantoms"), (False, "--data x", "small"),
    (True, "--data x", "paper"), (True, "--data x --device cpu", "small"),
    (True, "--data x --preset small", "small")])
def test_the_preset_suits_data_and_device(monkeypatch, gpu, command, preset):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert options_of(f"pretrain {command}").preset == preset


def test_an_architecture_has_these_sizes():
    micro = dict(embed_dim=128, depth=4, num_heads=2, out_dim=64, head_dim=128, bottleneck_dim=128,
                 decoder_dim=64, decoder_depth=2, decoder_heads=2)
    assert afire.ARCHITECTURES == {"vit_micro": micro,
                                   "vit_small": dict(embed_dim=384, depth=12, num_heads=6),
                                   "vit_base": dict(embed_dim=768, depth=12, num_heads=12)}


@torch.no_grad()
def test_options_weigh_the_losses():
    model = afire.build_model(options_of("pretrain --img-size 32 --structure-weight 2 "
                                         "--category-weight 3 --restoration-weight 5"))
    losses = model(*tiny_batch())
    expected = 2 * losses["structure"] + 3 * losses["category"] + 5 * losses["restoration"]
    assert_close(losses["loss"], expected)


def test_initial_weights_depend_on_the_seed_alone():
    states = []
    for seed in 1, 2, 1:
        torch.rand(seed)
        states.append(afire.build_model(options_of(f"pretrain --seed {seed}")).state_dict())
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
    assert json.loads((run / "config.json").read_text())["patch_size"] == 8
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


def test_a_run_killed_within_a_save_resumes_bit_for_bit(run, radiographs, tmp_path):
    """kill -9 when half of the third checkpoint is written."""
    script = ("import os, signal, sys, torch, afire\nsave = torch.save\n"
              "def kill(state, stream):\n"
              "    if state['epoch'] == 3:\n"
              "        stream.write(b'half of it')\n"
              "        stream.flush()\n"
              "        os.kill(os.getpid(), signal.SIGKILL)\n"
              "    save(state, stream)\n"
              "torch.save = kill\nafire.main(sys.argv[1:])")
    command = pretraining(radiographs, tmp_path)
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert load_run(tmp_path)[0]["epoch"] == 2 and (tmp_path / "checkpoint.partial").exists()
    afire.main(command)
    resumed, unbroken = [load_run(folder)[0] for folder in (tmp_path, run)]
    resumed["config"]["out"] = unbroken["config"]["out"]
    assert equal(resumed, unbroken)
    assert (tmp_path / "log.jsonl").read_bytes() == (run / "log.jsonl").read_bytes()


@pytest.mark.parametrize("command, function, resumes", [("pretrain", "pretrain", True),
                                                        ("eval", "evaluate", False)])
def test_ctrl_c_says_that_a_pre_training_resumes(monkeypatch, capsys, command, function, resumes):
    monkeypatch.setattr(afire, function, Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as stopped:
        afire.main([command])
    printed = capsys.readouterr().out
    assert stopped.value.code == 130 and "stopped" in printed
    assert ("resumes" in printed) == resumes


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


def test_a_moved_run_resumes_but_not_with_other_options_or_images(run, radiographs, tmp_path,
                                                                 capsys):
    interrupt(pretraining(radiographs, tmp_path / "first"), 3)
    moved_run = (tmp_path / "first").rename(tmp_path / "run")
    moved_set = shutil.copytree(radiographs, tmp_path / "set")
    command = pretraining(moved_set, moved_run)
    before = load_run(moved_run)
    for change in "--arch vit_small", "--seed 7", "--lr 1", "--epochs 9", "--levels file":
        name = change.split()[0].strip("-")
        sentence = refusal(capsys, [*command, *change.split()])
        assert f"was started with {name} {before[0]['config'][name]}: repeat" in sentence
    labels = moved_set / "labels.csv"
    content = labels.read_text()
    labels.write_text(re.sub(r"^train/NORMAL/[0-9].*\n", "", content, count=1, flags=re.M))
    assert "was started with other images" in refusal(capsys, command)
    assert equal(load_run(moved_run), before), "it was left as it was"
    assert (moved_run / "table.csv").read_text() == content
    labels.write_text(content)
    (moved_run / "table.csv").write_text("as at the start")
    afire.main(command)
    assert (moved_run / "table.csv").read_text() == "as at the start"
    assert json.loads((moved_run / "config.json").read_text())["data"] == str(moved_set)
    assert equal(load_run(moved_run)[0]["model"], load_run(run)[0]["model"])
    assert (moved_run / "log.jsonl").read_bytes() == (run / "log.jsonl").read_bytes()
    other = load_run(moved_run)[0]
    other["config"]["method"] = "MAE"
    torch.save(other, moved_run / "checkpoint.pth")
    assert "was started with method MAE" in refusal(capsys, command)


@pytest.mark.parametrize("key", ["config", "model", "images", "optimizer", "history",
                                 "earlier_images", "arch", "lr", "prototypes.prototypes"])
def test_a_run_that_lacks_something_is_refused_by_one_sentence(run, radiographs, tmp_path, capsys,
                                                               key):
    checkpoint = load_run(run)[0]
    for part in checkpoint, checkpoint["config"], checkpoint["model"]:
        part.pop(key, None)
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    content = (tmp_path / "checkpoint.pth").read_bytes()
    sentence = refusal(capsys, pretraining(radiographs, tmp_path))
    assert "another version" in sentence and f"{tmp_path}/encoder.pth" in sentence
    assert (tmp_path / "checkpoint.pth").read_bytes() == content


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


def test_two_processes_train_as_one_and_the_first_one_decodes_and_evaluates(run, radiographs,
                                                                           tmp_path):
    """L_cate contrasts tokens of both processes' images. The cache is a new one."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, afire\ndecode, evaluate = afire.decode, afire.evaluate\n"
        "note = lambda what: open(what + os.environ['RANK'], 'a').write('x')\n"
        "afire.decode = lambda *a: (note('decode'), decode(*a))[1]\n"
        "afire.evaluate = lambda *a: (note('eval'), evaluate(*a))\n"
        f"afire.main({pretraining(radiographs, 'run')})\n"
        "afire.main(['eval', '--ckpt', 'run', '--device', 'cpu'])\n")
    done = shell(f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2 "
                 f"{script}", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pre-training on") == done.stdout.count("AUROC") == 1
    shown = re.findall(r"\d+", re.search("pre-training on.*", done.stdout)[0])
    normal, train, test = [len(list(radiographs.glob(files))) for files in
                           ("train/NORMAL/[0-9]*", "train/*/[0-9]*", "test/*/*")]
    assert [int(count) for count in shown] == [normal, train - normal, test]
    calls = {file.name: len(file.read_text()) for file in tmp_path.glob("*[01]")}
    assert calls["decode0"] > 72 and calls["decode1"] <= 1, "it decodes what it names as broken"
    assert calls["eval0"] == 1 and "eval1" not in calls
    together, log = load_run(tmp_path / "run")
    alone, log_alone = load_run(run)
    for ours, theirs in zip(log, log_alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    name = "prototypes.prototypes"
    assert_close(together["model"][name], alone["model"][name], rtol=0, atol=1e-5)
    for cache in (tmp_path / "runs/cache").iterdir():
        assert cache.read_bytes() == Path("runs/cache", cache.name).read_bytes()


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

def test_a_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "zeros", lambda _, device: Mock(device=torch.device(device)))
    for gpu, names in (True, ("auto", "cuda")), (False, ("cuda",)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert {str(afire.get_device(name)) for name in names} == {"cuda:3"}
        assert str(afire.get_device("cuda:1")) == "cuda:1"
    assert str(afire.get_device("auto")) == "cpu"


@pytest.mark.parametrize("error", [AssertionError("Torch not compiled with CUDA enabled"),
                                   RuntimeError("No CUDA GPUs are available")])
def test_a_device_that_is_not_there_is_one_sentence(monkeypatch, error):
    monkeypatch.setattr(torch, "zeros", Mock(side_effect=error))
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


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(request.param)


@pytest.mark.parametrize("device, dtype", [
    ("cpu", torch.bfloat16), ("cpu", torch.float16), ("cuda", torch.float32),
    ("cuda", torch.bfloat16), ("cuda", torch.float16)], indirect=["device"])
def test_losses_and_gradients_are_those_of_the_cpu_in_float32(device, dtype):
    images, lesioned, mask = tiny_batch()
    expected = tiny_model()
    expected_losses = expected(images, lesioned, mask)
    expected_losses["loss"].backward()
    batch = images.to(device)
    centre = afire.texture_centre(batch)
    assert_close(centre.cpu(), afire.texture_centre(images), atol=0.5, rtol=0)
    lesions = afire.synthetic_lesion_mask(batch, seeded(), afire.texture_centre(images).to(device))
    assert_close([x.cpu() for x in lesions], [lesioned, mask], atol=1e-5, rtol=0)
    model = tiny_model().to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        losses = model(batch, lesioned.to(device), mask.to(device))
    losses["loss"].backward()
    assert_close({name: loss.cpu() for name, loss in losses.items()}, expected_losses, rtol=0.03,
                 atol=0)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for name, parameter in expected.named_parameters():
        if parameter.grad is not None:
            error = model.get_parameter(name).grad.cpu() - parameter.grad
            assert error.norm() <= tolerance * (parameter.grad.norm() + 0.01), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_run_is_trained_and_evaluated_on_a_gpu(radiographs, tmp_path):
    afire.main([*pretraining(radiographs, tmp_path), "--device", "cuda"])
    afire.main(["eval", "--ckpt", str(tmp_path), "--device", "cuda"])
    assert_report(tmp_path / "eval")


# ---- Evaluation ----------------------------------------------------------------------------------

@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_auroc_is_scikit_learns_with_many_ties(levels, seed):
    random = np.random.default_rng(seed)
    scores = random.integers(0, levels, 99) / 7
    labels = random.random(99) < 0.3
    area = sklearn.metrics.roc_auc_score(labels, scores)
    assert afire.auroc(scores, labels) == pytest.approx(area, abs=1e-12)
    for one_class in np.zeros(99, bool), np.ones(99, bool):
        assert math.isnan(afire.auroc(scores, one_class))
    assert math.isnan(afire.auroc(np.where(np.arange(99) == 7, np.nan, scores), labels))


IMAGENET = (0.485, 0.229), (0.456, 0.224), (0.406, 0.225)              # means, standard deviations


@torch.no_grad()
def test_the_token_of_a_patch_is_the_mean_of_its_pixels():
    greys = torch.rand(2, 4, 4)
    images = greys.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1)
    noise = torch.rand(2, 1, 32, 32) - 0.5
    images += noise - F.interpolate(F.avg_pool2d(noise, 8), scale_factor=8)
    tokens = afire.features(afire.PatchMeans(8), images)
    normalised = [(greys - mean) / std for mean, std in IMAGENET]
    assert_close(tokens, (sum(normalised) / 3).view(2, 16, 1), rtol=1e-4, atol=1e-4)


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
def test_linear_probe_is_scikit_learns_ridge_in_both_forms(monkeypatch, n, penalty):
    def record(matrix, right):
        sides.append(len(matrix))
        return solve(matrix, right)

    sides = []
    solve = torch.linalg.solve
    monkeypatch.setattr(torch.linalg, "solve", record)
    random = np.random.default_rng(0)
    x = random.normal(5, random.uniform(0.1, 30, 40), (n + 100, 40))
    y = x / x.std(0) @ random.normal(size=(40, 3)) + random.normal(0, 3, (n + 100, 3)) > 3
    x[:, 7] = 9                                            # one feature is constant
    weight, bias = afire.linear_probe(torch.from_numpy(x[:n]), torch.from_numpy(y[:n]), penalty)
    expected = ridge(penalty).fit(x[:n], y[:n]).predict(x[n:])
    np.testing.assert_allclose(x[n:] @ weight.numpy() + bias.numpy(), expected, atol=2e-5)
    assert sides == [min(n, 40)], "the smaller of images and features"


def test_learn_from_few_counts_labels_and_takes_training_rows_only():
    labels = np.random.default_rng(0).random((500, 3)) < 0.5
    labels[:, 1:] = [False, True]
    train = np.arange(100, 390)
    drawn = []
    scores = afire.learn_from_few(lambda rows: drawn.append(rows) or np.zeros((7, 3)), labels,
                                  train)
    assert {share: draws.shape for share, draws in scores.items()} == {
        "1%": (5, 7, 3), "10%": (5, 7, 3), "100%": (1, 7, 3)}
    assert [len(set(rows)) for rows in drawn] == 5 * [3] + 5 * [29] + [290]
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


@pytest.mark.parametrize("encoder", [afire.ViT(48, 8, 3, 32, 1, 2), afire.PatchMeans(8)])
def test_the_probe_learns_from_training_images_alone(encoder):
    def evaluate():
        return afire.evaluate_network(encoder, None, data, *afire.masks_of_test(data),
                                      data.train[:9], CPU)[1]

    data = drawn_set()
    encoder.requires_grad_(False)
    before = evaluate()
    assert before["linear 10%"].shape == (5, 40, 1) and before["neighbours"].shape == (40, 6, 6)
    x = afire.average_in_cells(afire.features(encoder, torch.from_numpy(data.images) / 255))
    x = x.half().double().numpy()                          # as they are kept
    model = ridge(x.shape[1] / 2).fit(x[data.train], data.labels[data.train])
    expected = model.predict(x[data.test])
    np.testing.assert_allclose(before["linear 100%"][0].ravel(), expected.ravel(), atol=1e-3)
    data.labels[data.test] = np.random.default_rng(0).random((40, 1)) < 0.5
    assert_close(evaluate(), before, equal_nan=True)


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
def odd():
    """100 normal phantoms, 60 others, and these with an odd patch: -> images, their pixels, the
    anomaly maps of the 120 by a function, a model that restores the mean image, its tokens."""
    images = phantom_images(160, 32)
    model = tiny_model().eval().requires_grad_(False)
    randomise(model.student)                               # the teacher's encoder and head count
    model.prototypes.prototypes.normal_()
    mean = afire.normalise(images[:100].mean(0, keepdim=True))
    model.decoder.forward = lambda tokens, masked: mean.expand(len(tokens), -1, -1, -1)
    changed = images[100:].clone()
    changed[:, :, 8:16, 16:24] = (torch.rand(60, 1, 8, 8, generator=seeded()) > 0.5).float()
    pixels = (255 * torch.cat([images, changed])).byte().numpy()
    images = torch.from_numpy(pixels) / 255
    encoder = model.teacher["encoder"]
    maps = functools.partial(afire.anomaly_maps, pixels, np.arange(100, 220), CPU, encoder)
    return argparse.Namespace(images=images, model=model, maps=maps,
                              tokens=afire.features(encoder, images))


def test_scores_are_high_where_an_image_is_odd(odd):
    maps = odd.maps(odd.model, np.arange(100))
    assert [*maps] == SCORES
    for name, grids in maps.items():
        assert (grids[60:, 1, 2] > grids[:60, 1, 2]).mean() > 0.7, name
        scores = afire.image_scores(grids)
        assert (scores[60:] > scores[:60]).mean() > 0.7, name


def test_neighbours_are_scikit_learns(odd):
    maps = odd.maps(normals=np.arange(100))
    assert [*maps] == ["neighbours"], "the others need more than an encoder"
    for j in range(16):
        tree = sklearn.neighbors.NearestNeighbors(n_neighbors=5).fit(odd.tokens[:100, j])
        distance = tree.kneighbors(odd.tokens[100:, j])[0].mean(1)
        np.testing.assert_allclose(maps["neighbours"][:, j // 4, j % 4], distance, rtol=1e-3)
    twice = odd.maps(normals=np.array([3, 3]))["neighbours"]           # fewer than five
    distance = (odd.tokens[100:] - odd.tokens[3]).norm(dim=2).view(-1, 4, 4)
    np.testing.assert_allclose(twice, distance, rtol=1e-3)


@pytest.mark.parametrize("normals", [0, 100])
def test_prototypes_are_the_mean_of_normal_images_or_the_model_s_own(odd, normals):
    head = odd.model.teacher["head"]
    prototypes = head(odd.tokens[:100]).mean(0) if normals else odd.model.prototypes.prototypes
    logits = head(odd.tokens[100:])
    cosine = (logits * prototypes).sum(2) / logits.norm(dim=2) / prototypes.norm(dim=1)
    maps = odd.maps(odd.model, np.arange(normals))
    assert_close(torch.from_numpy(maps["prototype"]), (1 - cosine).view(-1, 4, 4))
    assert ("neighbours" in maps) == bool(normals)


def test_restoration_is_compared_with_that_of_normal_images(odd):
    error = afire.restoration_error(odd.model, odd.images).view(-1, 4, 4).numpy()
    maps = odd.maps(odd.model)
    np.testing.assert_allclose(maps["restoration"], error[100:], rtol=1e-4, atol=1e-6)
    expected = (error[100:] - error[:100].mean(0)) / error[:100].std(0)
    maps = odd.maps(odd.model, np.arange(100))
    np.testing.assert_allclose(maps["restoration"], expected, rtol=1e-3, atol=1e-4)
    assert np.isfinite(odd.maps(odd.model, np.array([3, 3]))["restoration"]).all(), "equal errors"


@pytest.mark.parametrize("size", [8, 224])
def test_an_image_s_score_and_the_pixels_of_a_map(size):
    maps = np.random.default_rng(0).random((12, 4, 4)).astype(np.float32)
    highest = np.sort(maps.reshape(12, 16))[:, -4:]
    np.testing.assert_allclose(afire.image_scores(maps), highest.mean(1))
    masks = np.zeros((12, size, size), bool)
    masks[:, size // 4 + 1:size // 2 - 1, size // 8 + 1:] = True       # not the borders of cells
    scores, labels = afire.pixel_scores(maps, masks)
    step = size // round(math.sqrt(scores.shape[1]))
    centres = (np.arange(0, size, step) + step / 2) * 4 / size - 0.5   # in tokens
    y, x = np.meshgrid(centres, centres, indexing="ij")
    grids = [cv2.remap(grid, np.float32(x), np.float32(y), cv2.INTER_LINEAR, None,
                       cv2.BORDER_REPLICATE) for grid in maps]
    np.testing.assert_allclose(scores, np.reshape(grids, (12, -1)), atol=0.02)
    y, x = ((place + 0.5) * size / 4 for place in (y, x))              # in pixels
    inside = (y > size // 4 + 1) & (y < size // 2 - 1) & (x > size // 8 + 1)
    np.testing.assert_array_equal(labels, np.tile(inside.ravel(), (12, 1)))


def test_references_are_a_thousand_normal_training_images_anywhere_in_the_set():
    data = drawn_set(3000, size=8)
    data.labels = np.arange(3000).reshape(-1, 1) % 10 == 9
    references = afire.normal_references(data)
    assert len(set(references)) == 1000 and set(references) <= set(data.train[data.train % 10 < 9])
    assert 650 < np.mean(references) < 850
    assert set(afire.normal_references(data, 9999)) == set(data.train[data.train % 10 < 9])


def test_the_teacher_is_evaluated_beside_the_initial_weights(run):
    models, options, hashes = afire.load_models(run / "checkpoint.pth")
    checkpoint = load_run(run)[0]
    assert hashes == checkpoint["images"]
    assert equal(models["checkpoint"][0].state_dict(), {
        key.removeprefix("teacher.encoder."): value for key, value in checkpoint["model"].items()
        if key.startswith("teacher.encoder.")})
    untrained = afire.build_model(options)
    assert equal(models["random_init"][1].state_dict(), untrained.state_dict())
    assert options.levels == "equal" and options.data
    models, options, _ = afire.load_models(run / "encoder.pth")
    again = afire.load_models(run / "encoder.pth")[0]
    assert options is None and models["checkpoint"][1] is None
    assert equal(models["random_init"][0].state_dict(), again["random_init"][0].state_dict())


@pytest.mark.parametrize("chosen, of_run, config, levels, origin", [
    ("file", "equal", '{"levels": "equal"}', "file", "--levels"),
    (None, "equal", '{"levels": "file"}', "equal", "as in its pre-training"),
    (None, None, '{"levels": "equal"}', "equal", "config.json"),
    (None, None, '{"levels": "sharp"}', "file", "guess"), (None, None, None, "file", "guess")])
def test_grey_levels_are_those_of_the_pre_training(tmp_path, chosen, of_run, config, levels,
                                                   origin):
    if config:
        (tmp_path / "config.json").write_text(config)
    run = argparse.Namespace(levels=of_run) if of_run else None
    found, text = afire.grey_levels(chosen, run, tmp_path / "encoder.pth")
    assert found == levels and origin in text


def test_results_lie_beside_the_file_that_a_link_leads_to(tmp_path):
    """Links called best0.pth and best1.pth, to runs and to encoders alone."""
    for i, is_run in itertools.product((0, 1), (True, False)):
        file = tmp_path / f"run{i}/file.pth"
        file.parent.mkdir(exist_ok=True)
        link = tmp_path / f"best{i}{is_run}.pth"
        link.symlink_to(file)
        for path in file, link:
            folder = afire.results_folder(path, argparse.Namespace() if is_run else None, "eval")
            assert folder.resolve() == file.with_name("eval" if is_run else "eval-file.pth")


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


def report_of(arrays, name):
    """A network's part of metrics.json, computed anew from predictions.npz."""
    labels, masks = arrays["labels"], arrays["masks"]
    report = {"linear": {}, "anomaly": {}}
    for fraction in "1%", "10%", "100%":
        draws = arrays[f"{name}/linear {fraction}"]
        areas = {finding: mean_of_defined([sklearn_auroc(d[:, f], labels[:, f]) for d in draws])
                 for f, finding in enumerate(arrays["findings"])}
        report["linear"][fraction] = {"macro_auroc": mean_of_defined(areas.values()),
                                      "per_finding": areas}
    for score in ["neighbours"] if name == "pixels" else SCORES:
        maps = arrays[f"{name}/{score}"]
        large = [cv2.resize(grid, masks.shape[1:], interpolation=cv2.INTER_LINEAR)
                 for grid in maps[arrays["measured"]]]
        report["anomaly"][score] = {
            "image_auroc": sklearn_auroc(score_of_images(maps), labels.any(1)),
            "pixel_auroc": sklearn_auroc(np.ravel(large), masks.ravel())}
    return report


def flat(report):
    """-> {path of keys: number}."""
    if not isinstance(report, dict):
        return {"": report}
    return {f"{key}/{rest}": value for key, part in report.items()
            for rest, value in flat(part).items()}


def assert_report(folder):
    """metrics.json is what predictions.npz gives: -> metrics.json."""
    report = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    arrays = np.load(folder / "predictions.npz")
    expected = {name: report_of(arrays, name) for name in ("checkpoint", "random_init", "pixels")}
    assert [*report] == [*expected] and flat(report) == pytest.approx(flat(expected), abs=1e-6)
    return report


def test_eval_measures_what_the_table_says(evaluation, radiographs):
    report = assert_report(evaluation.folder)
    assert 0 < report["checkpoint"]["anomaly"]["prototype"]["pixel_auroc"] < 1
    arrays, rows = evaluation.arrays, evaluation.rows
    assert len(rows) == 24 and {row["split"] for row in rows} == {"test"}
    assert arrays["patients"].tolist() == arrays["images"].tolist()
    assert ["|".join(arrays["findings"][labels]) for labels in arrays["labels"]] == [
        row["findings"] for row in rows]
    measured = [bool(row["mask"]) or not row["findings"] for row in rows]
    assert arrays["measured"].tolist() == measured and not all(measured)
    for row, mask in zip(itertools.compress(rows, measured), arrays["masks"], strict=True):
        expected = np.zeros((32, 32), bool)
        if row["mask"]:
            expected = afire.read_mask(radiographs / row["mask"], radiographs / row["image"], 32)
        assert np.array_equal(mask, expected)


def test_the_column_pixels_is_the_probe_and_neighbours_on_means_of_patches(evaluation,
                                                                         radiographs):
    train = [row for row in read_rows(radiographs / "labels.csv")
             if row["split"] == "train" and "broken" not in row["image"]]
    rows = train + evaluation.rows
    images = [afire.read_image(radiographs / row["image"], 32, "equal") / 255 for row in rows]
    x = np.array([cv2.resize(image, (4, 4), interpolation=cv2.INTER_AREA) for image in images])
    x = np.mean([(x - mean) / std for mean, std in IMAGENET], 0).reshape(72, 16)
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
    assert sorted(order) == list(range(24)) and maps["images"].tolist() == [
        row["image"] for row in rows]
    assert {row["pretrained_on"] for row in rows} == {"no"}
    findings = [evaluation.rows[i]["findings"] for i in order]
    assert [row["findings"] for row in rows] == findings and "|" in "".join(findings)
    (columns, grids, captions, masks) = evaluation.picture
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
        caption = f"{row['image']}\n{findings[i] or 'no known finding'}\nprototype "
        assert captions[i].startswith(caption)
        assert float(captions[i].removeprefix(caption)) == pytest.approx(values[i], abs=1e-3)
        assert (masks[i] is not None) == bool(evaluation.rows[order[i]]["mask"])


def test_one_s_own_films_are_scored_without_findings_at_any_depth(run, radiographs, tmp_path,
                                                                 capsys):
    """With the grey levels that are asked for; what was pre-trained on is marked."""
    folder = tmp_path / "films"
    for i, file in enumerate(radiographs.glob("*/NORMAL/[0-9]*")):
        (folder / f"a/b{i % 3}").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / f"a/b{i % 3}/scan{i}.png")
    (tmp_path / "metrics.json").touch()                    # of an earlier evaluation
    afire.main(["eval", "--ckpt", str(run), "--data", str(folder), "--out", str(tmp_path),
                "--levels", "file", "--device", "cpu"])
    assert_printed(capsys, "grey levels: file (--levels)", "no findings are known")
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"films", "scores.csv", "maps.npz", "anomaly.png"}
    rows = read_rows(tmp_path / "scores.csv")
    assert [*rows[0]] == ["image", "findings", "pretrained_on", "prototype", "restoration"]
    trained = {file.read_bytes() for file in radiographs.glob("train/NORMAL/*")}
    for row in rows:
        seen = (folder / row["image"]).read_bytes() in trained
        assert row["pretrained_on"] == ("yes" if seen else "no")
    maps = np.load(tmp_path / "maps.npz")
    assert maps["images"].tolist() == [row["image"] for row in rows]
    assert len(rows) == len(list(folder.glob("*/*/*")))
    images = np.stack([afire.read_image(folder / name, 32)[None] for name in maps["images"]])
    encoder, model = afire.load_models(run)[0]["checkpoint"]
    expected = afire.anomaly_maps(images, np.arange(len(images)), CPU, encoder.eval(), model.eval())
    for score, grids in expected.items():
        np.testing.assert_allclose(maps[score], grids, rtol=2e-3, atol=1e-4)


def test_people_of_the_pre_training_are_not_tested_on(run, radiographs, tmp_path, capsys):
    """Its images are known by content: here they are renamed, and some are in test."""
    (tmp_path / "set").mkdir()
    lines, trained, tested = [], {}, {}
    files = np.random.default_rng(0).permutation(sorted(radiographs.glob("t*/*/[0-9]*")))
    for i, file in enumerate(files):
        name = f"{i}.png"
        shutil.copy(file, tmp_path / "set" / name)
        part = ("train", "test")[i // 3 % 2]
        patient = str(i // 3) if i % 12 < 9 else ""        # three images of each, or unknown
        lines.append(f"{name},{'sick' * (file.parent.name == 'SICK')},{patient},{part}")
        if file.parts[-3:-1] == ("train", "NORMAL"):
            trained[name] = patient or name
        if part == "test":
            tested[name] = patient or name
    afire.main(["eval", "--ckpt", str(run), "--data", f"{tmp_path}/set", "--labels",
                str(table(tmp_path / "t.csv", *lines)), "--out", str(tmp_path), "--device", "cpu"])
    unknown = {name for name in tested if tested[name] not in trained.values()}
    assert {row["image"] for row in read_rows(tmp_path / "scores.csv")} == unknown
    seen = len(tested.keys() & trained.keys())
    others = len(tested) - len(unknown) - seen
    assert seen > 0 and others > 0
    assert_printed(capsys, f"{seen} test images left out", f"and {others} others",
                   "no abnormal image in test has a mask")


def test_a_run_is_not_evaluated_on_its_own_data_if_they_have_changed(run, radiographs, tmp_path,
                                                                    capsys):
    folder = shutil.copytree(radiographs, tmp_path / "set")
    checkpoint = load_run(run)[0]
    checkpoint["config"].update(data=str(folder), labels=str(folder / "labels.csv"))
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    for file in list(folder.glob("train/NORMAL/[0-9]*"))[:2]:
        Image.fromarray(film(1, 64)).save(file)            # twice the same, and another one
    sentence = refusal(capsys, ["eval", "--ckpt", tmp_path, "--device", "cpu"])
    assert f"2 of the {len(checkpoint['images'])} images" in sentence and "--data" in sentence


def printed_table(text):
    """-> {title of a row: its three columns, None for a dash}."""
    rows = re.findall(r"^(.+?) +([\d.]+|-) +([\d.]+|-) +([\d.]+|-)$", text, re.MULTILINE)
    return {title: [None if area == "-" else float(area) for area in areas]
            for title, *areas in rows}


def table_of(report):
    """What should be printed for metrics.json."""
    networks = [report[name] for name in ("checkpoint", "random_init", "pixels")]
    expected = {}
    for fraction in "1%", "10%", "100%":
        expected[f"linear probe, {fraction} of the labels"] = [
            network["linear"][fraction]["macro_auroc"] for network in networks]
    for level, score in itertools.product(("image", "pixel"), SCORES):
        expected[f"abnormal {level}s by {score}"] = [
            network["anomaly"].get(score, {}).get(f"{level}_auroc") for network in networks]
    return expected


@pytest.mark.parametrize("image, pixel, note", [
    (0.5, 0.625, ""), (0.5, math.nan, "abnormal pixels: undefined, as no abnormal image .* mask"),
    (math.nan, math.nan, "abnormal images and pixels: undefined, as no image .* abnormal")])
def test_the_table_says_what_is_undefined(capsys, image, pixel, note):
    networks = {}
    for name, area in ("checkpoint", 0.25), ("random_init", 0.125), ("pixels", 0):
        of_findings = {"a": area, "b": math.nan, "c": math.nan}
        networks[name] = {
            "linear": {"10%": {"macro_auroc": area, "per_finding": of_findings}},
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
    afire.main(f"pretrain --out {tmp_path} --epochs 20 --img-size 32 --device cpu".split())
    log = load_run(tmp_path)[1]
    assert log[-1]["structure"] < 0.6 * log[0]["structure"]
    assert log[-1]["restoration"] < 0.3 * log[0]["restoration"]
    assert log[-1]["category"] < 0.95 * math.log(2), "below chance"
    capsys.readouterr()
    afire.main(["eval", "--ckpt", str(tmp_path), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 30, "it fits a screen"
    report = assert_report(tmp_path / "eval")
    areas = printed_table(printed)
    assert areas.keys() == table_of(report).keys()
    for name, values in table_of(report).items():
        assert areas[name] == pytest.approx(values, abs=5.1e-4), name
    assert areas["abnormal images by prototype"][2] is areas["abnormal pixels by restoration"][2]
    best = {name: np.array([network["linear"]["100%"]["macro_auroc"],
                            *[max(score[level] for score in network["anomaly"].values())
                              for level in ("image_auroc", "pixel_auroc")]])
            for name, network in report.items()}
    gains = best["checkpoint"] - best["random_init"]
    assert (gains > [0.02, 0.08, 0.08]).all(), gains


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
    text = "text.blocks.0.weight"
    return content.get(kind, {"state_dict": prefixed(kind, state, text)}), vit.forward_features


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


@pytest.mark.parametrize("content, message", [
    ({"a.": 3, "b.": 3}, r"several encoders, a\. and b\."),
    ({"": 1}, "1 channels")])
def test_eval_takes_one_encoder_of_three_channels(tmp_path, capsys, content, message):
    state = {}
    for prefix, channels in content.items():
        vit = afire.ViT(32, 8, channels, 32, 1, 1).state_dict()
        state |= {prefix + key: value for key, value in vit.items()}
    torch.save(state, tmp_path / "vit.pth")
    sentence = refusal(capsys, ["eval", "--ckpt", tmp_path / "vit.pth", "--data", tmp_path])
    assert re.search(message, sentence) and "vit.pth" in sentence


@pytest.mark.parametrize("damage", [lambda content: content[:9000], lambda content: b""],
                         ids=["cut", "empty"])
def test_a_damaged_checkpoint_is_not_said_to_hold_more_than_tensors(tmp_path, damage):
    torch.save(timm_vit(**WIDE).state_dict(), tmp_path / "vit.pth")
    (tmp_path / "vit.pth").write_bytes(damage((tmp_path / "vit.pth").read_bytes()))
    with pytest.raises(afire.InputError, match="vit.pth.* damaged"):
        afire.load_encoder(tmp_path / "vit.pth")


@pytest.mark.parametrize("options, changes, message", [
    ({"init_values": 0.1}, {}, "ls1.gamma"), ({"reg_tokens": 4}, {}, "reg_token"),
    ({"qk_norm": True}, {}, "q_norm"), ({"pre_norm": True}, {}, "norm_pre"),
    ({}, {"norm.weight": None}, "norm.weight"), ({}, {"pos_embed": None}, "pos_embed"),
    ({}, {"patch_embed.proj.weight": None}, "patch_embed.proj.weight"),
    ({}, {"blocks.1.mlp.fc1.weight": torch.zeros(3, 3)}, "fc1"),
    ({}, {"pos_embed": torch.zeros(1, 6, 128)}, "vit.pth")])
def test_an_encoder_that_is_another_or_lacks_something_is_refused_by_name(tmp_path, options,
                                                                         changes, message):
    state = {**timm_vit(**WIDE, **options).state_dict(), **changes}
    state = {key: value for key, value in state.items() if value is not None}
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(afire.InputError, match=message):
        afire.load_encoder(tmp_path / "vit.pth")


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


def by_percentiles(pixels):
    low, high = np.percentile(pixels, [0.5, 99.5])
    return np.clip((pixels.astype(float) - low) / (high - low), 0, 1) * 255


def film(seed=0, size=48):
    """A drawn chest that is not symmetric: (size, size) uint8."""
    return afire.phantoms(seed + 1, size)[0][seed, 0]


def squash(pixels, size):
    """What a viewer shows, after the same scaling and resizing."""
    return np.asarray(Image.fromarray(pixels.astype(np.float32)).resize((size, size), 2))


@pytest.mark.parametrize("name, image, expected, tolerance", [
    ("grey.png", GREY, GREY, 0), ("grey.jpg", GREY, GREY, 40),
    ("bits.png", GREY > 99, 255 * (GREY > 99), 0), ("rgb.png", COLOUR, COLOUR @ LUMA, 1),
    ("rgba.png", np.dstack([COLOUR, GREY]), COLOUR @ LUMA, 1),
    ("palette.png", PALETTE, np.asarray(PALETTE.convert("RGB")) @ LUMA, 1),
    ("deep.png", DEEP, by_percentiles(DEEP), 1),
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
        expected = squash(np.asarray(ImageOps.exif_transpose(image)), 48)
    assert np.abs(afire.read_image(tmp_path / "a.jpg", 48) - expected).max() <= 3


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
    assert [data.findings_of(data.names.index(name)) for name in ("a.png", "b.png")] == [
        "", "mass|nodule"]
    assert_printed(
        capsys, f"{labels}: 5 images; left out: 1 rows without a split, 2 files without a row\n",
        f"{folder}: 5 images of 4 patients, 2 without findings; 2 to train on, 3 held out; "
        "findings: Mass, mass, nodule\n", "patient unknown for 2 images")


@pytest.mark.parametrize("lines, header, message", [
    (["a.png,,train"], "image,findings,split", ", line 1: .*columns image, findings, patient"),
    (["a.png,,1,train"], "Image,findings,patient,split", ", line 1: "),
    (["a.png,,1,train,"], f"{HEADER},split", ", line 1: .*once each"), ([], "", ", line 1: "),
    (["a.png,,1,train", "b.png,,1,dev"], HEADER, ", line 3: .*as split"),
    (["a.png,,1,train", "", "a.png,,1,train"], HEADER, ", line 4: "),
    (["a.png,train,1"], "image,split,patient,findings", ", line 2: it needs 4 cells"),
    ([",,1,train"], HEADER, ", line 2: "),
    (["a.png,,1,train,x"], HEADER, ", line 2: it needs 4 cells"),
    (["b.png,,,train", "a.png,\"Mass,,train", "c.png,,,train"], HEADER, ", after line 2: .*quote"),
    (["b.png,,,train", "a.png,\"" + 200_000 * "x"], HEADER, ", after line 2: "),
    (["b.png,,,train", "a.png,\udcff,,train"], HEADER, ", line 3: not UTF-8"),
    *[([f"a.png,{findings},1,train"], HEADER, ", line 2: '.*' is no finding") for findings in (
        "No Finding", "no_finding", "NORMAL", "healthy", "Mass|No Finding", "\"Mass, nodule\"",
        "Mass;nodule", "Mass|", " Mass")],
    (["a.png,,1,train", "c.png,,7,train", "b.png,,1,test", "d.png,,7,test"], HEADER,
     ": 2 patients are in train and in test, the first is 1"),
    (["a.png,,1,"], HEADER, ": no row has train or test as split"),
    (["a.png,,1,train", "x.png,,2,train", "y.png,,2,"], HEADER,
     ": 2 rows have no file below .*set, the first is x.png")])
def test_a_table_that_cannot_be_trusted_is_refused_with_the_remedy(tmp_path, lines, header,
                                                                  message):
    folder = tmp_path / "set"
    write_films(folder, "a.png", "b.png", "c.png", "d.png")
    file = table(tmp_path / "t.csv", *lines, header=header)
    remedy = f": python data/make_table.py table {file} --data {folder} > labels.csv"
    with pytest.raises(afire.InputError, match=f"^{file}{message}.*{re.escape(remedy)}$"):
        load(folder, file)


@pytest.mark.parametrize("name, command", [
    ("NORMAL/b.png", "folders {}"), ("Masks.PNG", "folders {}"),
    ("b.dcm", "dicom {} --images PNG_FOLDER"), ("x/B.DICOM", "dicom {} --images PNG_FOLDER")])
def test_a_folder_in_which_not_all_may_be_normal_is_refused_with_the_remedy(tmp_path, name,
                                                                           command):
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


def test_what_cannot_be_used_is_one_line_and_is_tried_again_without_the_cache(tmp_path, capsys):
    folder = tmp_path / "set"
    write_films(folder, "a.png", "b.png", "c.png", "d.png", "e.png")
    Image.new("L", (9, 9), 3).save(folder / "a.png")
    (folder / "c.png").write_bytes((folder / "c.png").read_bytes()[:99])
    (folder / "d.png").unlink()
    (folder / "d.png").symlink_to("nowhere.png")
    shutil.copy(folder / "b.png", folder / "e.png")
    skipped = {"a.png": "blank", "c.png": "unreadable, OSError",
               "d.png": "unreadable, FileNotFoundError", "e.png": "equal to b.png"}
    for i, (name, reason) in enumerate(skipped.items()):
        data = load(folder)
        assert names(data, data.train) == {"b.png", *[*skipped][:i]}
        line = (f"skipped: {4 - i} files, unreadable, blank or equal to another; the first is "
                f"{name} ({reason}); to try them again, delete ")
        printed = capsys.readouterr().out
        assert line in printed
        Path(printed.split(line)[1].split("\n")[0]).unlink()
        (folder / name).unlink()
        write_images(folder, [film(9 + i, 24)], [name])


def test_names_in_any_bytes_do_no_harm_and_a_mistake_leaves_no_folder(tmp_path, capsys):
    folder = tmp_path / "set"
    images = [os.fsdecode(b"film \xff\xe9.png"), "R\u00f6ntgen \u80ba.png", "a\nnewline.png"]
    write_films(folder, *images)
    assert set(findings_of(load(folder))) == set(images)
    labels = table(tmp_path / "t.csv", *[f"\"{name}\",mass,,train" for name in images[1:]])
    assert set(findings_of(load(folder, labels))) == set(images[1:])
    command = (f"pretrain --data {folder} --batch-size 1 --preset small --epochs 1 "
               f"--device cpu --out {tmp_path}/run")
    sentence = refusal(capsys, [*command.split(), "--labels", labels])
    assert "no image in train is normal" in sentence and not (tmp_path / "run").exists()
    (folder / os.fsdecode(b"broken \xff.png")).write_bytes(b"")
    done = shell(f"{COMMAND} {command}")
    assert done.returncode == 0 and "first is broken" in done.stdout, done.stderr


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


def test_kill_9_leaves_no_cache(films):
    script = ("import os, signal, sys, afire\n"
              "kill = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
              "afire.tqdm = lambda files, *_, **__: [*map(kill, files)]\n"
              "afire.load_radiographs(sys.argv[1], 8, cache=sys.argv[1] + '.cache')")
    done = subprocess.run([sys.executable, "-c", script, films], capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL and caches(films) == [".partial"]
    assert_right(films, load(films))


def test_a_full_disk_is_one_sentence_and_leaves_no_cache(films, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(afire.InputError, match="cannot write .*set.cache/.*: No space left"):
            load(films)
    assert caches(films) == []
    assert_right(films, load(films))


def test_two_processes_that_write_one_cache_do_not_meet(films, monkeypatch):
    """The second one starts and ends just before the first one has finished."""
    def load_within(stream, fsync=os.fsync):
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            patch.setattr(os, "fsync", fsync)
            assert_right(films, load(films))
        fsync(stream)

    monkeypatch.setattr(os, "fsync", load_within)
    assert_right(films, load(films))
    assert caches(films) == [".images"]


# ---- Data: masks ---------------------------------------------------------------------------------

def save_mask(file, mask):
    Image.fromarray(np.uint8(255 * mask)).save(file)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_mask_is_true_where_most_of_it_is_white(tmp_path, orientation):
    """The mask is of the image as a viewer shows it."""
    mask = np.random.default_rng(0).random((40, 24)) < 0.5
    stored = np.rot90(mask) if orientation == 6 else mask
    tag = Image.Exif()
    tag[0x0112] = orientation
    Image.fromarray(255 * np.uint8(stored)).save(tmp_path / "film.png", exif=tag)
    save_mask(tmp_path / "mask.png", mask)
    found = afire.read_mask(tmp_path / "mask.png", tmp_path / "film.png", 8)
    expected = [[mask[5 * y:5 * y + 5, 3 * x:3 * x + 3].mean() > 0.5 for x in range(8)]
                for y in range(8)]
    assert found.dtype == bool and np.array_equal(found, expected)


@pytest.mark.parametrize("findings, mask, message", [
    ("mass", None, "mask .*white.png of .*film.png .*No such file"),
    ("mass", np.ones((24, 20)), r"white.png of .*film.png .*\(20, 24\) pixels.*\(24, 24\)"),
    ("mass", np.ones((24, 24)) / 255, "white.png of .*film.png .*levels up to 1, .*white"),
    ("mass", b"no image", "white.png of .*film.png .*cannot identify"),
    ("", np.ones((24, 24)), "t.csv: film.png has no finding, but its mask is white")])
def test_a_mask_that_cannot_be_right_is_refused(tmp_path, findings, mask, message):
    write_films(tmp_path / "set", "film.png")
    file = tmp_path / "set/white.png"
    if isinstance(mask, np.ndarray):
        save_mask(file, mask)
    elif mask:
        file.write_bytes(mask)
    labels = table(tmp_path / "t.csv", f"film.png,{findings},,test,white.png",
                   header=f"{HEADER},mask")
    with pytest.raises(afire.InputError, match=message):
        load(tmp_path / "set", labels)
    save_mask(file, np.zeros((24, 24)))
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
    if read and rows is not None:
        left_out = re.search(r"(\d+) images; left out: (\d+) rows .*, (\d+) files", printed)
        assert [int(n) for n in left_out.groups()] == [
            len(read), len(known) - len(read), len(images - known.keys())]
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
    images, labels, masks, findings = afire.phantoms(2500, 32)
    assert np.array_equal(data.images, images) and np.array_equal(data.labels, labels)
    assert data.findings == findings and data.masks.keys() == set(np.flatnonzero(labels.any(1)))
    assert all(np.array_equal(mask, masks[row].any(0)) for row, mask in data.masks.items())
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
    "pretrain --arch vit_huge": "vit_huge", "pretrain --device abacus": "abacus",
    "pretrain --device meta": "meta", "pretrain --lr nan": "argument --lr",
    "pretrain --structure-weight -1": "structure-weight", "pretrain --seed -1": "seed",
    "pretrain --seed 18446744073709551616": "seed", "pretrain --colour red": "colour",
    "pretrain --img-size 30": "img-size", "pretrain --img-size 100000000": "img-size",
    "pretrain --epochs 0": "epochs", FINE + "--batch-size 0": "batch-size",
    FINE + "--batch-size 64": "batch-size", FINE + "--out {tmp}/odd.csv/run": "odd.csv",
    "pretrain --data {tmp}/nowhere": "nowhere", "pretrain --data {tmp}/empty": "empty",
    "pretrain --data {tmp}/broken": "broken", "pretrain --data {tmp}/fine/a.png": "a.png",
    "pretrain --data {tmp}/sick --labels {tmp}/sick.csv": "is normal.*mass",
    "pretrain --labels {tmp}/odd.csv": "--data",
    FINE + "--labels {tmp}/no.csv": "no.csv", FINE + "--labels {tmp}/odd.csv": "odd.csv",
    FINE + "--init {tmp}/no.pth": "no.pth",
    FINE + "--init {run}/checkpoint.pth --patch-size 16": "checkpoint.pth",
    "eval --ckpt {run} --img-size 32": "img-size", "eval --ckpt {tmp}/nowhere": "nowhere",
    "eval --ckpt {run} --levels sharp": "levels",
    "eval --ckpt {run} --labels {tmp}/odd.csv": "odd.csv",
    "eval --ckpt {tmp}/odd.csv": "odd.csv",
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
    for name in "broken/a.png", "odd.csv":
        (tmp_path / name).write_text("file,label\na.png,1\n")
    device = "" if "--device" in command else " --device cpu"
    sentence = refusal(capsys, (command + device).format(tmp=tmp_path, run=run).split())
    assert sentence.startswith("afire.py") and re.search(MISTAKES[command], sentence)


README = Path(afire.__file__).with_name("README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("n", range(README.count("```python\n")))
def test_the_readme_examples_run(tmp_path, monkeypatch, run, n):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "runs/afire")
    Image.fromarray(film()).save("image.png")
    exec(README.split("```python\n")[1 + n].split("```")[0], {})
