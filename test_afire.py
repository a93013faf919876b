"""Tests of afire.py and of the scripts beside it, in the order of the file.

Each is against something written independently: a plain loop from the equation in float64, timm,
scikit-learn, OpenCV, pydicom, Pillow, or a property that must hold whatever the input.
"""

import argparse
import ast
import contextlib
import copy
import csv
import functools
import gzip
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pydicom
import pytest
import sklearn.linear_model
import sklearn.metrics
import sklearn.neighbors
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
sys.path.insert(0, str(ROOT / "results"))
import boxes  # noqa: E402
import crops  # noqa: E402
import lesions  # noqa: E402
import mae  # noqa: E402
import shift  # noqa: E402
import tables  # noqa: E402
import tokens as token_pictures  # noqa: E402


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
SOME = torch.rand(6, 16, generator=seeded(5)).argsort(1)[:, :6].sort(1).values


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
    """The command ends with status 2 and without a traceback: -> the sentence that it prints."""
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
@pytest.mark.parametrize("visible", [None, SOME])
def test_vit_computes_what_timm_computes_of_the_visible_tokens(visible):
    size = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4)
    ours = randomise(afire.ViT(**size))
    theirs = timm.models.VisionTransformer(num_classes=0, **size).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    if visible is not None:
        places = F.pad(1 + visible, (1, 0))                            # with the class token's, 0
        theirs.patch_drop.register_forward_hook(
            lambda *args: torch.stack([x[kept] for x, kept in zip(args[2], places)]))
    images = torch.randn(6, 3, 32, 32)
    assert_close(ours(images, visible), theirs.forward_features(images), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_decoder_is_timms_blocks_between_two_linear_layers():
    decoder = randomise(afire.Decoder(32, 8, 2, 24, embed_dim=32, depth=2, num_heads=4))
    vit = timm.models.VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=4,
                                        norm_layer=nn.LayerNorm).eval()        # eps of 1e-5
    vit.blocks.load_state_dict(decoder.blocks.state_dict())
    tokens, abnormal = torch.randn(2, 17, 24), torch.rand(2, 16) < 0.5
    x = F.linear(tokens, decoder.embedding.weight, decoder.embedding.bias)
    for i, j in abnormal.nonzero():                                    # each has its mask token
        x[i, 1 + j] = decoder.mask_token[0, j]
    x = decoder.norm(vit.blocks(x + decoder.pos_embed))[:, 1:]
    patches = F.linear(x, decoder.image_pred.weight, decoder.image_pred.bias)
    assert_close(afire.patchify(decoder(tokens, abnormal), 8), patches, atol=1e-5, rtol=1e-4)


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


def test_prototypes_copy_the_first_mean_then_run_each_on_its_own():
    first, second, third = torch.randn(3, 4, 6, 5, requires_grad=True)
    ours = afire.SpatialPrototypes(6, 5)
    ours.update(first, momentum=0.5)
    assert not ours.prototypes.requires_grad
    assert_close(ours.prototypes, first.mean(0).detach())
    ours.update(second)
    expected = (0.75 * first.mean(0) + 0.25 * second.mean(0)).detach()
    assert_close(ours.prototypes, expected)
    assert_close(ours.assignment(), afire.sinkhorn(expected))
    loaded = afire.SpatialPrototypes(6, 5)
    loaded.load_state_dict(ours.state_dict())
    loaded.update(third, momentum=0.1)                                 # not as if it were the first
    assert_close(loaded.prototypes, 0.1 * expected + 0.9 * third.mean(0).detach())


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
@pytest.mark.parametrize("visible", [None, SOME])
def test_forward_equals_its_parts(visible):
    model = tiny_model(weights=(2.0, 3.0, 5.0))
    randomise(model.student)
    normal, lesioned, mask = tiny_batch()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    x = (normal - mean) / std                                          # ImageNet's
    abnormal = F.max_pool2d(mask, 8).flatten(1) > 0
    model(normal.flip(3), lesioned, mask)                              # the first update
    scores = model.teacher["head"](model.teacher["encoder"](x)[:, 1:])
    prototypes = 0.6 * model.prototypes.prototypes + 0.4 * scores.mean(0)
    encoded = model.student["encoder"]((lesioned - mean) / std, visible)
    tokens = torch.zeros(6, 17, 32)
    seen = torch.zeros_like(abnormal)
    for i, places in enumerate(torch.arange(16).expand(6, -1) if visible is None else visible):
        tokens[i, F.pad(1 + places, (1, 0))] = encoded[i]
        seen[i, places] = True
    logits = model.student["head"](tokens[:, 1:])
    n = seen & ~abnormal
    structure = afire.structure_consistency_loss(logits, afire.sinkhorn(prototypes), n)
    category = afire.category_consistency_loss(logits, prototypes, n, seen & abnormal)
    restoration = afire.restoration_loss(model.decoder(tokens, ~n), x)
    assert_close(model(normal, lesioned, mask, 0.6, visible), {
        "loss": 2 * structure + 3 * category + 5 * restoration, "structure": structure,
        "category": category, "restoration": restoration})
    assert (tiny_model().weights, tiny_model().prototypes.momentum) == ((1, 1, 1), 0.75)


@pytest.mark.parametrize("visible", [None, SOME])
def test_student_and_decoder_learn_by_gradients_and_teacher_and_prototypes_do_not(visible):
    model = tiny_model()
    model(*tiny_batch(), visible=visible)["loss"].backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    names = {n for n, _ in model.named_parameters() if "teacher" not in n and "pos_embed" not in n}
    assert trained.keys() == names and all(gradient.any() for gradient in trained.values())
    prototypes = model.prototypes.prototypes.clone()
    model.eval()(*(images.flip(3) for images in tiny_batch()))
    assert torch.equal(model.prototypes.prototypes, prototypes), "they stay in eval mode"


@pytest.mark.parametrize("dtype, visible", [(torch.bfloat16, None), (torch.float16, SOME)])
def test_autocast_gives_finite_losses_near_those_in_full(dtype, visible):
    """What is not visible comes to the head as zeros, of which must come no 0 / 0."""
    full = tiny_model()(*tiny_batch(), visible=visible)
    model = tiny_model()
    with torch.autocast("cpu", dtype):
        losses = model(*tiny_batch(), visible=visible)
    losses["loss"].backward()
    assert_close(losses, full, rtol=0.03, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("visible", [None, SOME])
def test_lesions_and_model_compile_to_one_graph(visible):
    model, images = tiny_model(), tiny_batch()[0]

    def step(images, centre):
        return model(images, *afire.synthetic_lesion_mask(images, None, centre), 0.5, visible)

    results = []
    for function in step, torch.compile(step, backend="eager", fullgraph=True):
        torch.manual_seed(0)
        results.append(function(images, afire.texture_centre(images)))
    assert_close(*results)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="here fake CUDA tensors need a CUDA driver")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_step_on_a_gpu_mixes_no_devices_and_never_waits():
    """Fake CUDA tensors need no GPU; that the host uses the value of one is an error."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model = tiny_model()
            images, some = torch.rand(6, 1, 32, 32), torch.arange(9).expand(6, -1)
        for generator, visible in (None, None), (seeded(), some):
            lesions = afire.synthetic_lesion_mask(images, generator, offset=3)
            losses = model(images, *lesions, 0.5, visible)
            assert {value.device.type for value in (*lesions, *losses.values())} == {"cuda"}
            model.update_teacher(0.9)


X = torch.rand(6, 1, 32, 32)
COMPONENTS = {
    "texture_centre": lambda f: f(X), "synthetic_lesion_mask": lambda f: f(X)[0],
    "patchify": lambda f: f(X, 8), "unpatchify": lambda f: f(torch.rand(2, 16, 64), 8),
    "ViT": lambda f: f(32, 8, 1, 32, 1, 2)(X, SOME),
    "Decoder": lambda f: f(32, 8, 1, 16, 32, 1, 2)(torch.rand(6, 17, 16), SOME.new_ones(6, 16) > 0),
    "AnatomyHead": lambda f: f(4, 16, 8, 16, 8)(torch.rand(2, 16, 4)),
    "sinkhorn": lambda f: f(torch.rand(9, 8)),
    "SpatialPrototypes": lambda f: (p := f(9, 8), p.update(torch.rand(2, 9, 8)))[0].assignment(),
    "structure_consistency_loss": lambda f: f(*loss_input("structure")[:3]),
    "category_consistency_loss": lambda f: f(*loss_input("category")),
    "restoration_loss": lambda f: f(X, X), "AFiRe": lambda f: f(32, 8, 32, 1, 2)(X, X, X)["loss"]}


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_runs_alone_with_the_helpers_that_it_names(name):
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
    assert COMPONENTS[name](space[name]).isfinite().all()


# ---- Options and pre-training --------------------------------------------------------------------

CPU = torch.device("cpu")
COMMAND = f"{sys.executable} {afire.__file__}"


def shell(command, **options):
    return subprocess.run(command, shell=True, timeout=170, capture_output=True, text=True,
                          check=False, **options)


def pretraining(data, out):
    """A small pre-training as a command."""
    return (f"pretrain --data {data} --out {out} --preset small --img-size 32 --epochs 5 "
            "--batch-size 8 --keep 0.25 --device cpu").split()


def write_images(folder, images, names):
    for name, image in zip(names, images):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)


@pytest.fixture(scope="session")
def radiographs(tmp_path_factory):
    """72 phantoms in class folders, a third of them held out, and one broken file."""
    folder = tmp_path_factory.mktemp("radiographs")
    images, labels, _, findings = afire.phantoms(72, 40)
    classes = [findings[label.argmax()].upper() if label.any() else "NORMAL" for label in labels]
    write_images(folder, images[:, 0], [f"{'train' if i % 3 else 'test'}/{name}/{i}.png"
                                        for i, name in enumerate(classes)])
    (folder / "train/NORMAL/broken.png").write_bytes(b"no image at all")
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


def assert_same_run(a, b):
    """Equal bit for bit, but for the folder's name."""
    checkpoints = [load_run(folder)[0] for folder in (a, b)]
    for checkpoint in checkpoints:
        checkpoint["config"].pop("out")
    assert equal(*checkpoints)
    assert (a / "log.jsonl").read_bytes() == (b / "log.jsonl").read_bytes()


def recording_trainer(options, rank=0):
    """-> a Trainer for images of 32 px on the CPU, a list of the inputs that its model gets."""
    options = afire.parse_arguments(f"pretrain --img-size 32 --device cpu {options}".split())
    trainer = afire.Trainer(options, CPU, rank)
    inputs = []
    trainer.model.register_forward_pre_hook(lambda model, arguments: inputs.append(arguments))
    return trainer, inputs


def pixels_and_centres(n):
    pixels = afire.phantoms(n, 32)[0]
    return pixels, afire.texture_centre(torch.from_numpy(pixels) / 255).numpy()


def test_what_is_typed_overrides_the_preset_and_paper_is_the_release_s_recipe():
    options = afire.parse_arguments(["pretrain", "--epochs", "5"])
    assert (options.preset, options.epochs, options.batch_size) == ("phantoms", 5, 16)
    paper = afire.parse_arguments(["pretrain", "--data", "x", "--preset", "paper"])
    recipe = (paper.arch, paper.img_size, paper.patch_size, paper.epochs, paper.batch_size,
              paper.lr, paper.warmup_epochs, paper.teacher_momentum, paper.keep)
    assert recipe == ("vit_base", 224, 16, 400, 64, 5e-4, 10, 0.996, 1.0)
    small = afire.parse_arguments(["pretrain", "--data", "x", "--preset", "small"])
    assert (small.levels, small.epochs, small.keep) == ("equal", 38, 1.0)


def test_training_steps_equal_the_recipe_written_out():
    """The recipe [R]: schedules, AdamW, clipping, freezing, prototypes, teacher."""
    trainer, inputs = recording_trainer("--epochs 4 --batch-size 6 --keep 0.5 --lr 0.3 "
                                        "--restoration-weight 40 --seed 3")
    trainer.options.warmup_epochs = 1
    model = afire.build_model(trainer.options).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.optim.AdamW([p for p in trained if p.ndim > 1])
    biases_and_norms = torch.optim.AdamW([p for p in trained if p.ndim == 1], weight_decay=0)
    pixels, centres = pixels_and_centres(6)
    for step in range(7):                                              # of 12, 3 an epoch
        figures = trainer.step(pixels, centres, step, 3)
        normal, lesioned, mask, _, visible = inputs[step]
        assert torch.equal(normal, torch.from_numpy(pixels) / 255) and visible.shape == (6, 8)
        losses = model(normal, lesioned, mask, 0.0 if step < 3 else 0.75, visible)
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
        assert float(figures[0]) == pytest.approx(losses["loss"].item(), rel=1e-4)
        assert float(figures[4]) == pytest.approx(math.hypot(*norms), rel=1e-3)
    for name, value in model.state_dict().items():
        if "qkv.bias" not in name:             # the gradient of the keys' bias is rounding alone
            assert_close(trainer.model.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_lesions_and_visible_tokens_depend_on_seed_and_step_and_place_in_the_batch_alone():
    pixels, centres = pixels_and_centres(4)

    def drawn(seed, step, rank=0, rows=slice(0, 4)):
        trainer, inputs = recording_trainer(f"--batch-size 4 --keep 0.3 --seed {seed}", rank)
        trainer.step(pixels[rows], centres[rows], step, 10)
        _, lesioned, mask, _, visible = inputs[0]
        return lesioned, mask, visible

    whole = drawn(0, 0)
    assert equal(drawn(0, 0), whole)
    shards = [drawn(0, 0, rank, slice(2 * rank, 2 * rank + 2)) for rank in (0, 1)]
    assert_close([torch.cat(parts) for parts in zip(*shards)], [*whole])
    for other in drawn(0, 1), drawn(1, 0):
        assert not any(map(torch.equal, other, whole))
    visible = whole[2]
    assert visible.shape == (4, 5), "5 of 16 are the first share above 0.3"
    assert (visible.diff(dim=1) > 0).all() and len(visible.unique(dim=0)) == 4


def test_pretrain_leaves_what_it_should(run, radiographs):
    checkpoint, log = load_run(run)
    assert [record["epoch"] for record in log] == [1, 2, 3, 4, 5] and list(run.glob("*.png"))
    for name in "loss", "structure", "category", "restoration", "gradient_norm", "lr":
        assert all(math.isfinite(record[name]) for record in log)
    assert json.loads((run / "config.json").read_text())["patch_size"] == 8
    normal = len(list(radiographs.glob("train/NORMAL/*.png"))) - 1     # not the broken one
    assert len(set(checkpoint["images"])) == normal
    assert checkpoint["model"]["prototypes.updates"] == 5 * (normal // 8)
    images = torch.randn(1, 3, 32, 32)
    tokens = [afire.load_encoder(run / name)(images) for name in ("checkpoint.pth", "encoder.pth")]
    assert torch.equal(*tokens)


def test_every_epoch_takes_other_images_each_once(radiographs, tmp_path, monkeypatch):
    def record(trainer, images, *arguments):
        taken.append({image.tobytes() for image in images})
        return step(trainer, images, *arguments)

    taken = []
    step = afire.Trainer.step
    monkeypatch.setattr(afire.Trainer, "step", record)
    afire.main(pretraining(radiographs, tmp_path))
    epochs = [first | second for first, second in zip(taken[::2], taken[1::2], strict=True)]
    assert [len(images) for images in epochs] == 5 * [16], "two steps of 8"
    assert len(set.union(*epochs)) == len(load_run(tmp_path)[0]["images"]) > 16


@pytest.mark.parametrize("seed", range(30 if os.environ.get("AFIRE_SLOW") else 2))
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(run, radiographs, tmp_path, seed):
    """kill -9, twice, within the save as well: half of its bytes are written slowly."""
    random = np.random.default_rng(seed)
    command = pretraining(radiographs, tmp_path)
    slow = ("import sys, time, torch, afire\nsave = torch.save\ndef slow(state, stream):\n"
            " save(state, stream)\n stream.flush()\n time.sleep(0.05)\n"
            "torch.save = slow\nafire.main(sys.argv[1:])")
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", slow, *command],
                                   env={**os.environ, "PYTHONPATH": str(ROOT)},
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (tmp_path / "config.json").unlink(missing_ok=True)
        while process.poll() is None and not (tmp_path / "config.json").exists():
            time.sleep(0.01)
        time.sleep(random.uniform(0, 1.2))
        process.kill()
        process.wait()
    afire.main(command)
    assert_same_run(tmp_path, run)


def test_ctrl_c_says_how_to_resume(radiographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(afire.AFiRe, "update_teacher", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as stopped:
        afire.main(pretraining(radiographs, tmp_path))
    assert stopped.value.code == 130 and "resumes" in capsys.readouterr().out


def test_a_full_disk_leaves_the_last_checkpoint_whole(run, radiographs, tmp_path, monkeypatch,
                                                      capsys):
    def write_until_full(state, stream):
        if state["epoch"] > 2:
            stream.write(b"half of it")
            raise OSError(28, "No space left on device")
        save(state, stream)

    save = torch.save
    command = pretraining(radiographs, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", write_until_full)
        assert "No space left" in refusal(capsys, command)
    assert load_run(tmp_path)[0]["epoch"] == 2 and not list(tmp_path.glob("*.partial"))
    afire.main(command)
    assert_same_run(tmp_path, run)


def test_a_moved_run_resumes_but_not_with_other_options_or_images(run, radiographs, tmp_path,
                                                                 capsys):
    moved_run = shutil.copytree(run, tmp_path / "run")
    moved_set = shutil.copytree(radiographs, tmp_path / "set")
    command = pretraining(moved_set, moved_run)
    afire.main(command)
    assert json.loads((moved_run / "config.json").read_text())["data"] == str(moved_set)
    for change in "--arch vit_small", "--seed 7", "--lr 1":
        assert change.split()[0].strip("-") in refusal(capsys, [*command, *change.split()])
    min((moved_set / "train/NORMAL").iterdir()).unlink()
    assert "images" in refusal(capsys, command)
    assert equal(load_run(moved_run), load_run(run)), "it was left as it was"
    torch.save({"epoch": 3}, moved_run / "checkpoint.pth")
    assert "checkpoint.pth" in refusal(capsys, command)


@pytest.mark.parametrize("bad_step", [3, 4])
def test_a_gradient_that_is_not_finite_stops_the_run(radiographs, tmp_path, monkeypatch, capsys,
                                                     bad_step):
    def poison(model, _):
        updates.append(model)
        if len(updates) == bad_step:
            model.student["encoder"].cls_token.data.fill_(math.nan)

    updates = []
    monkeypatch.setattr(afire.AFiRe, "update_teacher", poison)
    assert "finite" in refusal(capsys, pretraining(radiographs, tmp_path))
    checkpoint, log = load_run(tmp_path)
    assert len(log) == checkpoint["epoch"] < 5


def test_two_processes_train_as_one_and_evaluate_once(run, radiographs, tmp_path):
    """L_cate contrasts tokens of both processes' images. Both decode into one cache, a new one."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, afire\nafire.main({pretraining(radiographs, 'run')})\n"
        "evaluate = afire.evaluate\n"
        "afire.evaluate = lambda *a: (open('rank' + os.environ['RANK'], 'w'), evaluate(*a))\n"
        "afire.main(['eval', '--ckpt', 'run', '--device', 'cpu'])\n")
    done = shell(f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2 "
                 f"{script}", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pre-training on") == done.stdout.count("AUROC") == 1
    assert [file.name for file in tmp_path.glob("rank*")] == ["rank0"]
    together, log = load_run(tmp_path / "run")
    alone, log_alone = load_run(run)
    for ours, theirs in zip(log, log_alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    name = "prototypes.prototypes"
    assert_close(together["model"][name], alone["model"][name], rtol=0, atol=1e-5)
    for cache in (tmp_path / "runs/cache").iterdir():
        assert cache.read_bytes() == Path("runs/cache", cache.name).read_bytes()


@pytest.mark.parametrize("command, variable, value", [
    ("pretrain", "WORLD_SIZE", "2"), ("pretrain", "RANK", "1"), ("eval", "RANK", "1")])
def test_processes_without_torchrun_are_one_sentence(monkeypatch, capsys, command, variable, value):
    for name in "WORLD_SIZE", "RANK", "MASTER_ADDR":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    assert "torchrun" in refusal(capsys, [command, "--device", "cpu"])


def test_init_starts_the_encoders_and_hands_on_what_was_trained_on(run, radiographs, tmp_path):
    """The images of the earlier run stay known, though they are not among the new ones."""
    afire.main([*pretraining(radiographs / "test", tmp_path),
                "--init", str(run / "checkpoint.pth"), "--lr", "0"])
    before = load_run(run)[0]
    after = load_run(tmp_path)[0]
    assert set(after["earlier_images"]) == set(before["images"])
    assert set(afire.trained_images(tmp_path / "checkpoint.pth")) > set(before["images"])
    for network in "student", "teacher":
        weight = after["model"][f"{network}.encoder.blocks.0.attn.qkv.weight"]
        assert_close(weight, before["model"]["teacher.encoder.blocks.0.attn.qkv.weight"])


# ---- Devices: on a GPU where there is one --------------------------------------------------------

@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("visible", [None, SOME])
def test_losses_and_gradients_are_those_of_the_cpu_in_float32(device, dtype, visible):
    images, lesioned, mask = tiny_batch()
    expected = tiny_model()
    expected(images, lesioned, mask, visible=visible)["loss"].backward()
    batch = images.to(device)
    centre = afire.texture_centre(batch)
    assert_close(centre.cpu(), afire.texture_centre(images), atol=0.5, rtol=0)
    lesions = afire.synthetic_lesion_mask(batch, seeded(), afire.texture_centre(images).to(device))
    assert_close([x.cpu() for x in lesions], [lesioned, mask], atol=1e-5, rtol=0)
    model = tiny_model().to(device)
    positions = None if visible is None else visible.to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        losses = model(batch, lesioned.to(device), mask.to(device), visible=positions)
    losses["loss"].backward()
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for name, parameter in expected.named_parameters():
        if parameter.grad is not None:
            error = model.get_parameter(name).grad.cpu() - parameter.grad
            assert error.norm() <= tolerance * (parameter.grad.norm() + 0.01), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_training_step_never_waits_for_the_gpu():
    options = afire.parse_arguments("pretrain --img-size 32 --batch-size 8 --keep 0.5".split())
    trainer = afire.Trainer(options, torch.device("cuda"))
    pixels = afire.phantoms(8, 32)[0]
    centres = afire.texture_centre(torch.from_numpy(pixels) / 255).numpy()
    trainer.step(pixels, centres, 0, 1)                    # the first one allocates and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        figures = trainer.step(pixels, centres, 1, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert figures.isfinite().all()


def test_a_run_resumes_and_is_evaluated_on_the_device(device, radiographs, tmp_path, monkeypatch):
    """Bit for bit on the CPU; on CUDA within 2 %, as its attention is not deterministic."""
    def stop(state, path, save=afire.save_checkpoint):
        save(state, path)
        raise KeyboardInterrupt

    for name in "whole", "resumed":
        command = [*pretraining(radiographs, tmp_path / name), "--device", str(device)]
        if name == "resumed":
            with monkeypatch.context() as patch, pytest.raises(SystemExit):
                patch.setattr(afire, "save_checkpoint", stop)
                afire.main(command)
        afire.main(command)
    logs = [load_run(tmp_path / name)[1] for name in ("whole", "resumed")]
    tolerance = 0 if device.type == "cpu" else 0.02
    for record, expected in zip(*logs, strict=True):
        assert record == pytest.approx(expected, rel=tolerance)
    afire.main(["eval", "--ckpt", str(tmp_path / "whole"), "--device", str(device)])
    metrics = json.loads((tmp_path / "whole/eval/metrics.json").read_text())
    assert 0 <= metrics["checkpoint"]["linear"]["100%"]["macro_auroc"] <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gather_is_the_identity_of_one_process_with_nccl(tmp_path):
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0,
                                         world_size=1)
    try:
        x = torch.rand(3, 4, device="cuda", requires_grad=True)
        afire.gather(x).sum().backward()
        assert_close(afire.gather(x), x)
        assert_close(x.grad, torch.ones_like(x))
    finally:
        torch.distributed.destroy_process_group()


# ---- Evaluation ----------------------------------------------------------------------------------

@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_detection_is_scikit_learns_with_many_ties(levels, seed):
    random = np.random.default_rng(seed)
    scores = random.integers(0, levels, 99) / 7
    labels = random.random(99) < 0.3
    result = afire.detection(scores, labels)
    area = sklearn.metrics.roc_auc_score(labels, scores)
    precision = sklearn.metrics.average_precision_score(labels, scores)
    dice = max(sklearn.metrics.f1_score(labels, scores >= t) for t in np.unique(scores))
    assert result == pytest.approx({"auroc": area, "ap": precision, "dice": dice}, abs=1e-12)
    assert afire.auroc(scores, labels) == result["auroc"]
    for one_class in np.zeros(99, bool), np.ones(99, bool):
        assert all(math.isnan(value) for value in afire.detection(scores, one_class).values())
    assert math.isnan(afire.auroc(np.where(np.arange(99) == 7, np.nan, scores), labels))


def test_mean_auroc_is_a_mean_over_draws_and_resamples_patients():
    random = np.random.default_rng(0)
    labels = random.random((60, 2)) < 0.4
    scores = random.random((3, 60, 2)) + 0.7 * labels
    values, (low, high) = afire.mean_auroc(scores, labels, np.arange(60))
    areas = [sklearn.metrics.roc_auc_score(labels, draw, average=None) for draw in scores]
    assert_close(values, np.mean(areas, 0))
    assert low < values.mean() < high
    # Ten copies of each film tell no more about people than one of each.
    copies = scores.repeat(10, 1), labels.repeat(10, 0)
    ends = afire.mean_auroc(*copies, np.arange(60).repeat(10))[1]
    assert ends == pytest.approx([low, high], abs=0.03) and np.ptp(ends) > 0.8 * (high - low)
    assert np.ptp(afire.mean_auroc(*copies, np.arange(600))[1]) < 0.5 * (high - low)


@pytest.mark.parametrize("apart", [0, 1, 10])
def test_silhouette_is_scikit_learns(apart):
    cluster = torch.tensor([0, 0, 1, 2, 2, 2, 3, 3] * 5 + [4])         # the last one is alone
    points = torch.randn(41, 6, generator=seeded()) + apart * cluster.unsqueeze(1)
    expected = sklearn.metrics.silhouette_score(points.numpy(), cluster.numpy())
    assert afire.silhouette(points, cluster) == pytest.approx(expected, abs=1e-4)


def test_linear_probe_is_scikit_learns_ridge():
    random = np.random.default_rng(0)
    x = random.normal(5, random.uniform(0.1, 30, 40), (300, 40))
    y = x / x.std(0) @ random.normal(size=(40, 3)) + random.normal(0, 3, (300, 3))
    y = y > np.quantile(y, 0.8, 0)
    weight, bias = afire.linear_probe(torch.from_numpy(x[:200]), torch.from_numpy(y[:200]))
    z = (x - x[:200].mean(0)) / x[:200].std(0)
    ridge = sklearn.linear_model.Ridge(alpha=10.0).fit(z[:200], y[:200])
    np.testing.assert_allclose(x[200:] @ weight.numpy() + bias.numpy(), ridge.predict(z[200:]),
                               atol=1e-6)


def test_learn_from_few_counts_labels_and_takes_training_rows_only():
    labels = np.random.default_rng(0).random((500, 2)) < 0.5
    labels[:, 1] = False
    train = np.arange(100, 400)
    drawn = []
    scores = afire.learn_from_few(lambda rows: drawn.append(rows) or np.zeros((7, 2)), labels,
                                  train)
    assert {share: draws.shape for share, draws in scores.items()} == {
        "1%": (5, 7, 2), "10%": (5, 7, 2), "100%": (1, 7, 2)}
    assert [len(set(rows)) for rows in drawn] == 5 * [3] + 5 * [30] + [300]
    assert set(np.concatenate(drawn)) == set(train) and not np.array_equal(*drawn[5:7])
    assert np.isnan(scores["100%"][0, :, 1]).all(), "of one class nothing can be learned"


def small_set(n=240, size=32):
    """Radiographs whose label is whether just one of two patches is bright: not linear in them."""
    random = np.random.default_rng(0)
    images = random.integers(60, 90, (n, 1, size, size), np.uint8)
    bright = random.random((n, 2)) < 0.5
    images[bright[:, 0], :, :8, :8] += 120
    images[bright[:, 1], :, 16:24, 16:24] += 120
    names = [f"{i}" for i in range(n)]
    return afire.Radiographs(names, images, bright.sum(1, keepdims=True) == 1, ["one"], names,
                             names, np.arange(n // 2), np.arange(n // 2, n),
                             np.zeros((n, 1, 1), bool))


def test_finetuning_learns_what_a_linear_probe_cannot():
    """It leaves the encoder as it was."""
    data = small_set()
    encoder = tiny_model().teacher["encoder"]
    before = copy.deepcopy(encoder.state_dict())
    x = afire.features(encoder, afire.to_device(data.images, CPU) / 255).mean(1)
    weight, bias = afire.linear_probe(x[data.train], torch.from_numpy(data.labels[data.train]))
    truth = data.labels[data.test, 0]
    probe = afire.auroc((x[data.test] @ weight + bias)[:, 0].numpy(), truth)
    tuned, layer = afire.finetune(encoder, data, data.train, 150, CPU)
    images = torch.from_numpy(data.images[data.test]) / 255
    scores = layer(afire.features(tuned, images).mean(1))[:, 0]
    assert afire.auroc(scores, truth) > max(0.95, probe + 0.05)
    assert equal(before, encoder.state_dict())


@torch.no_grad()
def test_restoration_error_is_of_tokens_restored_without_their_own():
    model = tiny_model().eval()
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


@torch.no_grad()
def test_scores_equal_their_oracles_and_are_high_where_an_image_is_odd():
    images = phantom_images(160, 32)
    model = tiny_model().eval()
    encoder = model.teacher["encoder"]
    mean = afire.normalise(images[:100].mean(0, keepdim=True))
    model.decoder.forward = lambda tokens, abnormal: mean.expand(len(tokens), -1, -1, -1)
    odd = images[100:].clone()
    odd[:, :, 8:16, 16:24] = (torch.rand(60, 1, 8, 8, generator=seeded()) > 0.5).float()
    pixels = (255 * torch.cat([images, odd])).byte().numpy()
    rows = np.arange(100, 220)
    maps = afire.anomaly_maps(pixels, rows, CPU, encoder, model, np.arange(100))
    for name, grids in maps.items():
        assert (grids[60:, 1, 2] > grids[:60, 1, 2]).mean() > 0.7, name
        scores = afire.image_scores(grids)
        assert (scores[60:] > scores[:60]).mean() > 0.7, name
    images = torch.from_numpy(pixels) / 255
    tokens = afire.features(encoder, images)                           # (220, L, D)
    for j in range(16):
        tree = sklearn.neighbors.NearestNeighbors(n_neighbors=5).fit(tokens[:100, j])
        distance = tree.kneighbors(tokens[100:, j])[0].mean(1)
        np.testing.assert_allclose(maps["neighbours"][:, j // 4, j % 4], distance, rtol=1e-3)

    def by_prototype(prototypes):
        logits = model.teacher["head"](tokens[100:])
        cosine = (logits * prototypes).sum(2) / logits.norm(dim=2) / prototypes.norm(dim=1)
        return (1 - cosine).view(-1, 4, 4)

    assert_close(torch.from_numpy(maps["prototype"]),
                 by_prototype(model.teacher["head"](tokens[:100]).mean(0)))
    error = afire.restoration_error(model, images).view(-1, 4, 4).numpy()
    expected = (error[100:] - error[:100].mean(0)) / error[:100].std(0)
    np.testing.assert_allclose(maps["restoration"], expected, rtol=1e-3, atol=1e-4)
    # Without normal images, the prototypes are the model's, and errors are as they are.
    model.prototypes.prototypes.normal_()
    own = afire.anomaly_maps(pixels, rows, CPU, encoder, model)
    assert set(own) == {"prototype", "restoration"}
    assert_close(torch.from_numpy(own["prototype"]), by_prototype(model.prototypes.prototypes))
    np.testing.assert_allclose(own["restoration"], error[100:], rtol=1e-4, atol=1e-6)
    # An encoder alone has neighbours alone; here these are twice the same image.
    alone = afire.anomaly_maps(pixels, rows, CPU, encoder, normals=np.array([3, 3]))
    distance = (tokens[100:] - tokens[3]).norm(dim=2).view(-1, 4, 4)
    assert list(alone) == ["neighbours"]
    np.testing.assert_allclose(alone["neighbours"], distance, rtol=1e-3)
    equal_errors = afire.anomaly_maps(pixels, rows, CPU, encoder, model, np.array([3, 3]))
    assert np.isfinite(equal_errors["restoration"]).all()


@pytest.mark.parametrize("size", [8, 224])
def test_metrics_of_maps_are_scikit_learns(size):
    abnormal = np.arange(12) % 3 == 2
    maps = np.random.default_rng(0).random((12, 4, 4)).astype(np.float32)
    maps[abnormal, 1, 1] += 0.5
    maps[11] += 1
    masks = np.zeros((12, size, size), bool)
    masks[abnormal, size // 4:size // 2, size // 4:size // 2] = True
    report = afire.evaluate_maps({"score": maps}, abnormal, masks, np.arange(12))["score"]
    scores = np.sort(maps.reshape(12, 16))[:, -4:].mean(1)             # the highest quarter
    area = sklearn.metrics.roc_auc_score(abnormal, scores)
    assert report["image_auroc"] == pytest.approx(area)
    low, high = report["image_ci95"]
    assert 0 <= low <= area <= high <= 1
    large = np.stack([cv2.resize(grid, (size, size)) for grid in maps])
    truth = masks.ravel()
    for figure, oracle in (("pixel_auroc", sklearn.metrics.roc_auc_score),
                           ("pixel_ap", sklearn.metrics.average_precision_score)):
        assert report[figure] == pytest.approx(oracle(truth, large.ravel()), abs=0.02), figure
    masks = np.zeros((12, 1, 1), bool)
    unknown = afire.evaluate_maps({"score": maps}, abnormal, masks, np.arange(12))["score"]
    assert math.isnan(unknown["pixel_auroc"]) and unknown["image_auroc"] == report["image_auroc"]


def test_the_teacher_is_evaluated_beside_the_initial_weights(run):
    models, options = afire.load_models(run / "checkpoint.pth")
    state = load_run(run)[0]["model"]
    assert equal(models["checkpoint"][0].state_dict(), {
        key.removeprefix("teacher.encoder."): value for key, value in state.items()
        if key.startswith("teacher.encoder.")})
    untrained = afire.build_model(options)
    assert equal(models["random_init"][1].state_dict(), untrained.state_dict())
    models, options = afire.load_models(run / "checkpoint.pth", 48)    # another image size
    assert models["checkpoint"][0].sizes[0] == 48 and models["checkpoint"][1] is None
    assert options.levels == "equal" and options.data


def test_eval_compares_with_normal_training_images_and_shows_the_most_abnormal(
        run, tmp_path, monkeypatch):
    def spy(*arguments):
        calls.append(arguments)
        return evaluate_network(*arguments)

    calls = []
    pictures = []
    evaluate_network = afire.evaluate_network
    monkeypatch.setattr(afire, "evaluate_network", spy)
    monkeypatch.setattr(afire, "plot_images", lambda file, columns: pictures.append(columns))
    afire.main(["eval", "--ckpt", str(run), "--out", str(tmp_path), "--device", "cpu"])
    encoder, _, data, normals, _, _ = calls[0]
    assert not data.labels[normals].any() and set(normals) <= set(data.train)
    arrays = np.load(tmp_path / "predictions.npz")
    expected = afire.anomaly_maps(data.images, data.test, CPU, encoder, None, normals)
    np.testing.assert_array_equal(arrays["checkpoint/neighbours"], expected["neighbours"])
    with open(tmp_path / "scores.csv", newline="") as stream:
        names = [row["image"] for row in csv.DictReader(stream)][:5]
    shown = [arrays["images"].tolist().index(name) for name in names]
    assert list(pictures[0]) == ["image", "prototype", "restoration", "neighbours"]
    np.testing.assert_array_equal(pictures[0]["image"], data.images[data.test[shown], 0])
    for score in list(pictures[0])[1:]:
        np.testing.assert_array_equal(pictures[0][score], arrays[f"checkpoint/{score}"][shown])


def test_what_is_tested_on_is_not_learned_from():
    data = small_set(80)
    encoder = tiny_model().teacher["encoder"].eval().requires_grad_(False)
    before = afire.evaluate_network(encoder, None, data, data.train[:9], 2, CPU)[1]
    assert before["finetune 10%"].shape == (5, 40, 1) and before["neighbours"].shape == (40, 4, 4)
    data.labels[data.test] = np.random.default_rng(0).random((40, 1)) < 0.5
    after = afire.evaluate_network(encoder, None, data, data.train[:9], 2, CPU)[1]
    assert_close(after, before, equal_nan=True)


def read_scores(folder):
    with open(folder / "scores.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def evaluation(run):
    """The folder of an eval with fine-tuning, of which `head` takes but one line."""
    done = shell(f"{COMMAND} eval --ckpt {run} --device cpu --finetune 2 | head -n 1",
                 env={**os.environ, "PYTHONUNBUFFERED": ""})
    files = {file.name for file in run.glob("eval/*")}
    assert files == {"metrics.json", "predictions.npz", "scores.csv", "anomaly.png"}, done.stderr
    return run / "eval"


def test_eval_writes_what_others_rely_on(evaluation):
    report = json.loads((evaluation / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert report["checkpoint"] != report["random_init"]
    arrays = np.load(evaluation / "predictions.npz")
    labels = arrays["labels"]
    assert len(arrays["images"]) == len(arrays["patients"]) == len(labels) == 24
    for name, network in report.items():
        for protocol in "linear", "finetune":
            assert set(network[protocol]) == {"1%", "10%", "100%"}
            figures = network[protocol]["100%"]
            scores = arrays[f"{name}/{protocol} 100%"][0]
            areas = {finding: afire.auroc(scores[:, f], labels[:, f])
                     for f, finding in enumerate(arrays["findings"])}
            assert figures["per_finding"] == pytest.approx(areas)
            assert figures["macro_auroc"] == pytest.approx(np.mean(list(areas.values())))
            low, high = figures["ci95"]
            assert low <= figures["macro_auroc"] <= high
        assert set(network["anomaly"]) == {"restoration", "prototype", "neighbours"}
        for score, figures in network["anomaly"].items():
            tokens = arrays[f"{name}/{score}"].reshape(24, 16)
            scores = np.sort(tokens)[:, -4:].mean(1)
            assert figures["image_auroc"] == pytest.approx(afire.auroc(scores, labels.any(1)))
            assert set(figures) == {"image_auroc", "image_ap", "image_ci95", "pixel_auroc",
                                    "pixel_ap", "dice"}
            assert figures["pixel_auroc"] is None, "nobody knows where the findings are"
        assert -1 <= network["cohesion"] <= 1


def test_scores_are_of_the_test_images_the_most_abnormal_first(evaluation, radiographs):
    rows = read_scores(evaluation)
    files = {file.relative_to(radiographs).as_posix() for file in radiographs.glob("test/*/*")}
    assert {row["image"] for row in rows} == files
    assert {row["pretrained_on"] for row in rows} == {"no"}
    values = [float(row["prototype"]) for row in rows]
    assert values == sorted(values, reverse=True)
    for row in rows:
        assert row["findings"] == row["image"].split("/")[1].lower().replace("normal", "")


def test_what_was_trained_on_is_known_by_content_wherever_it_lies(run, radiographs, tmp_path,
                                                                 capsys):
    """Renamed, copied, in another split; without labels all images are scored, and it is marked."""
    files = [*radiographs.glob("*/NORMAL/[0-9]*"), *radiographs.glob("*/EFFUSION/*")]
    trained = {file.read_bytes() for file in radiographs.glob("train/NORMAL/*")}
    for i, file in enumerate(files):
        place = tmp_path / "moved" / ("train", "test")[i % 2] / file.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place / f"scan{i}.png")
    for data in tmp_path / "moved", tmp_path / "moved/test/NORMAL":
        afire.main(["eval", "--ckpt", str(run), "--data", str(data), "--out", str(tmp_path),
                    "--device", "cpu"])
        scored = {(data / row["image"]).read_bytes(): row for row in read_scores(tmp_path)}
        printed = capsys.readouterr().out
        if data.name == "moved":
            assert scored and not trained & scored.keys()
            assert re.search(r"[1-9]\d* test images left out", printed)
    assert "count as normal" in printed and len(scored) == len(list(data.iterdir()))
    marked = {content for content, row in scored.items() if row["pretrained_on"] == "yes"}
    assert marked == trained & scored.keys() != set()
    assert [*scored.popitem()[1]] == ["image", "findings", "pretrained_on", "prototype",
                                      "restoration"]


def test_training_beats_no_training(tmp_path, monkeypatch, capsys):
    """End to end, on 1,000 small phantoms: losses, the probe, anomalies by image and by pixel."""
    images, labels, masks, findings = afire.phantoms(1000, 32)
    names = [f"{i}" for i in range(1000)]
    phantoms = afire.Radiographs(names, images, labels, findings, names, names, np.arange(700),
                                 np.arange(700, 1000), masks.any(1))
    monkeypatch.setattr(afire, "phantom_radiographs", lambda size: copy.copy(phantoms))
    afire.main(f"pretrain --out {tmp_path} --epochs 20 --img-size 32 --device cpu".split())
    log = load_run(tmp_path)[1]
    assert log[-1]["structure"] < 0.6 * log[0]["structure"]
    assert log[-1]["restoration"] < 0.3 * log[0]["restoration"]
    assert log[-1]["category"] < 0.95 * math.log(2), "below chance"
    afire.main(["eval", "--ckpt", str(tmp_path), "--device", "cpu"])
    report = json.loads((tmp_path / "eval/metrics.json").read_text())
    table = capsys.readouterr().out
    assert len(table.splitlines()) < 30, "it fits a screen"
    assert re.search(rf"100%.*{report['checkpoint']['linear']['100%']['macro_auroc']:.3f}", table)
    figures = {}
    for name, network in report.items():
        scores = network["anomaly"].values()
        figures[name] = np.array([network["linear"]["100%"]["macro_auroc"],
                                  max(score["image_auroc"] for score in scores),
                                  max(score["pixel_auroc"] for score in scores)])
    gains = figures["checkpoint"] - figures["random_init"]
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
    afire.main(["eval", "--ckpt", str(tmp_path / "vit.pth"), "--data", str(radiographs), "--out",
                str(tmp_path / "out"), "--device", "cpu"])
    assert_printed(capsys, "does not say what it was trained on", "prototype and restoration")
    report = json.loads((tmp_path / "out/metrics.json").read_text())
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
    with pytest.raises(afire.InputError):
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
    ("flat.png", np.full((24, 24), 700, np.uint16), 0, 0),
    ("wide.png", np.tile(np.linspace(0, 255, 120), (40, 1)).astype(np.uint8),
     np.linspace(0, 255, 24), 6)])                                     # resized, not cropped
def test_any_kind_of_file_becomes_a_grey_square(tmp_path, name, image, expected, tolerance):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(tmp_path / name)
    pixels = afire.read_image(tmp_path / name, 24)
    assert pixels.shape == (24, 24) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(float) - expected).max() <= tolerance
    equalised = ImageOps.equalize(Image.fromarray(pixels))
    assert np.array_equal(afire.read_image(tmp_path / name, 24, "equal"), equalised)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_tag_says(tmp_path, orientation):
    tag = Image.Exif()
    tag[0x0112] = orientation
    Image.fromarray(film(1, 96)).save(tmp_path / "a.jpg", exif=tag, quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        expected = squash(np.asarray(ImageOps.exif_transpose(image)), 48)
    assert np.abs(afire.read_image(tmp_path / "a.jpg", 48) - expected).max() <= 3


def dicom(file, pixels, interpretation="MONOCHROME2", bits=12, **tags):
    """Writes a DICOM file of pixels."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = pydicom.uid.generate_uid()
    dataset.set_pixel_data(pixels.astype(np.uint16), "MONOCHROME2", bits)
    dataset.PhotometricInterpretation = interpretation
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(file, enforce_file_format=True)
    return dataset


def lut(curve):
    item = pydicom.Dataset()
    item.LUTDescriptor = [4096, 0, 12]
    item.LUTExplanation = "drawn"
    item.add_new(0x00283006, "OW", curve.astype(np.uint16).tobytes())
    return pydicom.Sequence([item])


RAMP = np.arange(4096) / 4095


@pytest.mark.parametrize("tags, inverted", [
    ({}, False), ({"interpretation": "MONOCHROME1"}, True),
    ({"PresentationLUTShape": "INVERSE"}, True),
    ({"interpretation": "MONOCHROME1", "PresentationLUTShape": "IDENTITY"}, True),
    ({"interpretation": "MONOCHROME1", "PresentationLUTShape": ""}, True),
    ({"PixelPaddingValue": None}, False),
    ({"RescaleSlope": 2, "RescaleIntercept": -1000}, False),
    ({"WindowCenter": 2048, "WindowWidth": 1024}, False),
    ({"WindowCenter": [1500, 9], "WindowWidth": [800, 9]}, False),
    ({"VOILUTSequence": lut(4095 * RAMP ** 4)}, False),
    ({"VOILUTSequence": lut(4095 * (1 - RAMP))}, False)])              # it falls by itself
def test_dicom_is_what_pydicom_shows(tmp_path, tags, inverted):
    file = dicom(tmp_path / "a", film(1).astype(np.uint16) * 16, **tags)
    shown = pydicom.pixels.apply_modality_lut(file.pixel_array, file)
    shown = pydicom.pixels.apply_voi_lut(shown, file).astype(float)
    expected = squash(by_percentiles(-shown if inverted else shown), 24)
    assert np.abs(afire.read_image(tmp_path / "a", 24) - expected).max() <= 2


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
def test_dicom_of_8_bits_keeps_its_levels(tmp_path, interpretation):
    pixels = film(1) // 2 + 40
    dicom(tmp_path / "a", pixels, interpretation, bits=8)
    expected = 255 - pixels if interpretation == "MONOCHROME1" else pixels
    assert np.array_equal(afire.read_image(tmp_path / "a", 48), expected)


def test_padding_and_a_marker_cost_no_levels(tmp_path):
    pixels = film(1).astype(np.uint16) * 4 + 400
    plain = by_percentiles(pixels)
    padded = pixels.copy()
    padded[:, :6] = 4000
    dicom(tmp_path / "padded", padded, PixelPaddingValue=4000)
    shown = afire.read_image(tmp_path / "padded", 48)
    assert shown[:, :6].max() <= 1 and np.abs(shown[:, 6:] - plain[:, 6:]).mean() < 6
    marked = pixels.copy()
    marked[2:4, 2:4] = 4095
    dicom(tmp_path / "marked", marked)
    shown = afire.read_image(tmp_path / "marked", 48)
    assert np.abs(shown.astype(float) - plain)[5:].max() < 4


@pytest.mark.parametrize("pixels, interpretation", [
    (np.stack([DEEP, DEEP]), "MONOCHROME2"), (DEEP, "PALETTE COLOR")])
def test_dicom_that_cannot_be_shown_is_named(tmp_path, pixels, interpretation):
    dicom(tmp_path / "a", pixels, interpretation)
    with pytest.raises(ValueError, match=interpretation):
        afire.read_image(tmp_path / "a", 48)


def test_dicom_without_pydicom_is_one_sentence(tmp_path, monkeypatch, capsys):
    dicom(tmp_path / "a.dcm", DEEP)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "pydicom" in refusal(capsys, pretraining(tmp_path, tmp_path / "run"))


def load(folder, labels=None, size=8):
    """A set, its cache beside it."""
    return afire.load_radiographs(folder, size, labels=labels, cache=f"{folder}.cache")


def table(file, *lines, header="image,findings,patient,split"):
    file.write_text("\n".join([header, *lines]), "utf-8", "surrogateescape")
    return file


def write_films(folder, *names):
    write_images(folder, [film(i, 24) for i in range(len(names))], names)


def findings_of(data):
    """-> {name: findings}, and every image is either to train on or held out."""
    assert sorted([*data.train, *data.test]) == list(range(len(data.names)))
    assert len(data.images) == len(data.labels) == len(data.patients) == len(data.names)
    return {name: set(np.array(data.findings)[labels])
            for name, labels in zip(data.names, data.labels)}


def names(data, rows):
    return {data.names[row] for row in rows}


def assert_printed(capsys, *reasons):
    printed = capsys.readouterr().out
    assert [reason for reason in reasons if reason not in printed] == []


def test_what_is_passed_over_is_counted_by_reason(tmp_path, capsys):
    """Masks beside images, what Macs, Jupyter, NAS boxes and Windows leave, other kinds of file."""
    folder = tmp_path / "set"
    images = [f"{kind}/images/{i}.png" for kind in ("Normal", "COVID") for i in (1, 2)]
    write_films(folder, *images, *[f"COVID/{masks}/{i}.png" for masks in ("masks", "Masks")
                                   for i in (1, 2)],
                "COVID/.ipynb_checkpoints/1.png", "@eaDir/1.png/T.jpg", ".Trash-1000/files/c.png",
                "$RECYCLE.BIN/x.png", "__MACOSX/Normal/1.png", "Normal/film.tif")
    for name in "Normal/._1.png", "notes.txt", "README", "Normal/broken.png", "Normal/empty.jpg":
        (folder / name).write_bytes(b"")
    (folder / "again").symlink_to(folder, target_is_directory=True)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    assert findings_of(load(folder)) == {
        name: {"covid"} if "COVID" in name else set() for name in images}
    assert_printed(capsys, "6 hidden", "4 in folders called masks", "1 .tif", "1 .txt",
                   "1 no suffix", "1 links to folders", "1 broken links", "2 unreadable")


def test_class_folders_give_findings_and_split(tmp_path, capsys):
    folder = tmp_path / "set"
    write_films(folder, "x/train_images/No_Finding/a.png", "x/train_images/Mass/p1/b.png",
                "x/TEST/MASS/c.png", "x/TEST/no_finding/d.png", "x/valid/mass/e.png",
                "x/train/f.png", "x/other/NORMAL/g.png")
    data = load(folder)
    assert findings_of(data) == {
        "x/train_images/No_Finding/a.png": set(), "x/train_images/Mass/p1/b.png": {"mass"},
        "x/TEST/MASS/c.png": {"mass"}, "x/TEST/no_finding/d.png": set()}
    assert names(data, data.test) == {"x/TEST/MASS/c.png", "x/TEST/no_finding/d.png"}
    assert_printed(capsys, "1 of a validation split", "1 outside the class", "1 without a split",
                   "patients unknown: 4 images count as 4 people")


def test_a_table_says_everything(tmp_path, capsys):
    folder = tmp_path / "set"
    write_films(folder, *[f"{name}.png" for name in "abcdefgh"])
    labels = table(tmp_path / "t.csv", "a.png,No Finding,1,train", "b.png,Mass|nodule, 2 ,train",
                   "c.png, mass ,3,test", "d.png,,3,train", "e.png,Healthy,,test", "f.png,,5,",
                   "g.png,normal,,train", "nowhere.png,mass,9,train",
                   " b.png ,nodule| MASS,2,train", header=" image , findings,patient,split")
    data = load(folder, labels)
    assert findings_of(data) == {"a.png": set(), "b.png": {"mass", "nodule"}, "c.png": {"mass"},
                                 "e.png": set(), "g.png": set()}
    assert names(data, data.test) == {"c.png", "e.png"}
    assert data.patients == ["1", "2", "3", "e.png", "g.png"]
    assert_printed(capsys, "1 rows without a file", "1 in train, of patients in test",
                   "1 without a split", "1 without a row", "patients unknown: 2 images")


def test_without_a_split_a_fixed_fifth_of_the_patients_is_held_out(tmp_path, capsys):
    """train alone is no split. A table may say which images are of one patient."""
    folder = tmp_path / "set"
    images = [f"train/{'NORMAL' if i % 2 else 'SICK'}/{i}.png" for i in range(80)]
    write_films(folder, *images)
    labels = table(tmp_path / "t.csv", *[f"{name},,{i // 2}" for i, name in enumerate(images)],
                   header="image,findings,patient")
    for source in None, labels:
        data = load(folder, source)
        patients = np.array(data.patients)
        assert not set(patients[data.train]) & set(patients[data.test])
        assert 8 <= len(data.test) <= 24 and len(findings_of(data)) == 80
        assert names(load(folder, source), data.test) == names(data, data.test)
    assert_printed(capsys, "patients unknown: 80 images", "80 images of 40 patients")


@pytest.mark.parametrize("lines, header, message", [
    (["a.png,x"], "picture,findings", "columns image and findings"),
    (["a.png,x,"], "image,findings,findings", "columns image and findings"),
    (["a.png;x"], "image;findings", "columns image and findings"),
    ([], "", "columns image and findings"), (["a.png"], "image,findings", "line 2"),
    (["b.png,x", "a.png,x,1"], "image,findings", "line 3"),
    (["a.png,x,dev"], "image,findings,split", "line 2"),
    (["a.png,Mass,1", "a.png,Mass,2"], "image,findings,patient", "line 3.*a.png"),
    (["a.png,\"" + 200_000 * "x"], "image,findings", "not a CSV file"),
    (["view1_frontal.png,Mass"], "image,findings", "no image to use")])
def test_a_table_that_cannot_be_trusted_is_refused(tmp_path, lines, header, message):
    write_films(tmp_path / "set", "a.png", "b.png", "p1/view1_frontal.png", "p2/view1_frontal.png")
    with pytest.raises(afire.InputError, match=message):
        load(tmp_path / "set", table(tmp_path / "t.csv", *lines, header=header))


def test_equal_files_count_once_with_the_findings_of_all(tmp_path, capsys):
    folder = tmp_path / "set"
    write_films(folder, "train/NORMAL/a.png", "train/MASS/b.png", "test/NORMAL/c.png")
    shutil.copy(folder / "train/NORMAL/a.png", folder / "test/NORMAL/z.png")
    shutil.copy(folder / "train/MASS/b.png", folder / "test/NORMAL/b.png")
    data = load(folder)
    assert findings_of(data) == {"test/NORMAL/b.png": {"mass"}, "test/NORMAL/c.png": set(),
                                 "test/NORMAL/z.png": set()}
    assert_printed(capsys, "2 equal to another image")
    for name, image in zip(data.names, data.images):
        assert np.array_equal(image[0], afire.read_image(folder / name, 8)), "no row is displaced"


def test_names_in_any_bytes_do_no_harm_and_a_mistake_leaves_no_folder(tmp_path):
    folder = tmp_path / "set"
    images = [os.fsdecode(b"film \xff\xe9.png"), "R\u00f6ntgen \u80ba.png", "a\nnewline.png"]
    write_films(folder, *images)
    labels = table(tmp_path / "t.csv", *[f"\"{name}\",mass" for name in images],
                   header="image,findings")
    assert set(findings_of(load(folder, labels))) == set(images)
    done = shell(f"{COMMAND} pretrain --data {folder} --labels {labels} --out {tmp_path}/run")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert len(done.stderr.splitlines()) == 1 and "normal images" in done.stderr


def test_what_failed_is_tried_again_and_nothing_else_is_decoded_again(tmp_path, monkeypatch):
    """read_image begins with is_dicom."""
    folder = tmp_path / "set"
    write_films(folder, "a.png", "b.png", "c.png")
    with monkeypatch.context() as patch:
        patch.setattr(afire, "is_dicom", Mock(side_effect=PermissionError))
        with pytest.raises(afire.InputError, match="3 unreadable .PermissionError"):
            load(folder)
    read = Mock(side_effect=afire.is_dicom)
    monkeypatch.setattr(afire, "is_dicom", read)
    assert load(folder).names == load(folder).names == ["a.png", "b.png", "c.png"]
    assert read.call_count == 3
    write_images(folder, [film(9, 24)], ["a.png"])
    image = afire.read_image(folder / "a.png", 8)
    assert np.array_equal(load(folder).images[0, 0], image), "a changed file"


@pytest.mark.parametrize("damage", ["zeros", "random", "cut", "longer"])
def test_a_damaged_cache_is_mended(tmp_path, damage):
    folder = tmp_path / "set"
    write_films(folder, *[f"{i}.png" for i in range(6)])
    expected = np.array(load(folder).images)
    file = next(Path(f"{folder}.cache").iterdir())
    content = file.read_bytes()
    half = len(content) // 2
    noise = np.frombuffer(content, np.uint8).copy()
    noise[np.random.default_rng(0).integers(len(content), size=40)] ^= 255
    file.write_bytes({"zeros": content[:half] + bytes(len(content) - half), "cut": content[:half],
                      "longer": content + b"more", "random": noise.tobytes()}[damage])
    assert np.array_equal(load(folder).images, expected)


def test_a_disk_that_is_full_is_one_sentence(tmp_path, monkeypatch, capsys):
    write_films(tmp_path / "set", "a.png")
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=full))
    assert "No space left" in refusal(capsys, pretraining(tmp_path / "set", tmp_path / "run"))


FOLDERS = st.sampled_from(["NORMAL", "Mass", "no_finding", "train", "test", "val", "masks",
                           ".hidden", "p1", "p2"])
FILES = st.sampled_from(["a.png", "b.PNG", "c.jpg", "d.txt", "e.tif"])
PATHS = st.tuples(st.lists(FOLDERS, max_size=3), FILES).map(lambda x: "/".join([*x[0], x[1]]))
ROWS = st.tuples(st.integers(0, 13), st.sampled_from(["", "No Finding", "Mass", "mass|Nodule"]),
                 st.sampled_from(["", "1", "2"]), st.sampled_from(["", "train", "test"]))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(PATHS, st.integers(-1, 6), min_size=1, max_size=14),
       st.none() | st.lists(ROWS, max_size=14))
def test_nobody_and_no_content_is_in_both_parts_and_the_counts_add_up(files, rows):
    """files: {path: content}, of which -1 is broken; rows of the table, by number of the file."""
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()) as out:
        folder = Path(place, "set")
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(np.full((2, 2), 40 * max(content, 0) + 9, np.uint8))
            image.save(folder / name, "png")
            if content < 0:
                (folder / name).write_bytes(b"broken")
        labels = None
        if rows is not None:
            known = {list(files)[i % len(files)]: row for i, *row in rows}
            lines = [f"{name},{','.join(row)}" for name, row in known.items()]
            labels = table(Path(place, "t.csv"), *lines)
        try:
            data = load(folder, labels, 2)
        except afire.InputError as error:
            data = None
            print(error)
    passed_over = re.search(r"passed over: (.*)", out.getvalue())[1]
    count = sum(map(int, re.findall(r"(?:^|; )(\d+) ", passed_over)))
    assert count + len(data.names if data else []) == len(files), passed_over
    if data:
        findings = findings_of(data)
        patients = np.array(data.patients)
        assert not set(patients[data.train]) & set(patients[data.test])
        assert len(set(data.hashes)) == len(data.hashes)
        assert set(data.names) <= set(files)
        assert not {"masks", ".hidden"} & set("/".join(data.names).split("/"))
        for name in data.names if labels else []:
            words = set(known[name][0].lower().split("|"))
            assert findings[name] >= words - {"", "no finding"}


# ---- data/make_table.py -----------------------------------------------------------------------

FLAGS = ("No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,"
         "Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,"
         "Support Devices")
CHEXPERT = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{FLAGS}\n"
NIH = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
VINDR = "image_id,rad_id,Cardiomegaly,Other disease{},No finding\n"


def make_table(*arguments, status=0):
    """-> the rows as lines without the header, what is on stderr."""
    command = [sys.executable, ROOT / "data/make_table.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.startswith("image,findings,patient,split\n") == (status == 0)
    return done.stdout.splitlines()[1:], done.stderr


def write(folder, files):
    """files: {path: text}."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        opener = gzip.open if path.endswith(".gz") else open
        with opener(folder / path, "wt") as file:
            file.write(text)


def test_nih(tmp_path):
    """With the official lists, person 3 would be in train and in test."""
    write(tmp_path, {"Data_Entry_2017.csv": NIH
                     + "00000001_000.png,Mass|Cardiomegaly,0,1,58,M,PA\n"
                     "00000002_000.png, No Finding ,0, 2 ,81,M,PA\n"
                     "00000003_000.png,Hernia,0,3,81,F,AP\n"
                     "00000003_001.png,Pleural_Thickening,1,3,81,F,AP\n"})
    rows = ["00000001_000.png,cardiomegaly|mass,1,", "00000002_000.png,,2,",
            "00000003_000.png,hernia,3,", "00000003_001.png,pleural_thickening,3,"]
    assert make_table("nih", tmp_path)[0] == rows
    write(tmp_path, {"train_val_list.txt": "00000001_000.png\n00000003_001.png\n"})
    assert "test_list.txt" in make_table("nih", tmp_path, status=2)[1]
    write(tmp_path, {"test_list.txt": "00000003_000.png\n",
                     "images_001/images/00000001_000.png": ""})
    split_rows, counts = make_table("nih", tmp_path)
    assert split_rows == [f"images_001/images/{rows[0]}train", rows[1], rows[2] + "test", rows[3]]
    assert "out of train: 1 of people in test" in counts
    assert "all: 4 images of 3 patients, 1 of them normal" in counts
    assert "(test): 1 images of 1 patients, 0 of them normal" in counts


def test_chexpert(tmp_path):
    def row(path, view, flags):
        return f"CheXpert-v1.0-small/{path},Female,68,{view},AP,{flags}\n"

    first = "train/patient00001/study1/view1_frontal.jpg"
    second = "train/patient00002/study1/view1_frontal.jpg"
    third = "valid/patient64541/study1/view1_frontal.jpg"
    write(tmp_path, {"train.csv": CHEXPERT + row(first, "Frontal", "1.0,,,,,,,,,,,,,1.0")
                     + row(second, "Frontal", ",,,1.0,,1.0,-1.0,,,,,,,")
                     + row(second.replace("view1", "view2"), "Lateral", ",,,1.0,,1.0,-1.0,,,,,,,")
                     + row(first.replace("1/", "3/"), "Frontal", ",,,,,,-1,,,,0.0,,,1.0")})
    rows = [f"{first},,patient00001,", f"{second},edema|lung opacity,patient00002,"]
    train_rows, counts = make_table("chexpert", tmp_path)
    assert train_rows == rows and "not in the table: 1 images" in counts
    write(tmp_path, {"valid.csv": CHEXPERT + row(third, "Frontal", "0.0," * 12 + "1.0,0.0")})
    rows = [row + "train" for row in rows] + [f"{third},fracture,patient64541,test"]
    assert make_table("chexpert", tmp_path)[0] == rows
    (tmp_path / "CheXpert-v1.0-small").mkdir()
    assert make_table("chexpert", tmp_path)[0] == [f"CheXpert-v1.0-small/{row}" for row in rows]


@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
def test_mimic(tmp_path, suffix):
    def split(part):
        return {f"mimic-cxr-2.0.0-split.{suffix}": "dicom_id,study_id,subject_id,split\n"
                f"aa,50414267,10000032,train\ncc,57375967,10000764,{part}\n"}

    write(tmp_path, {
        f"mimic-cxr-2.0.0-chexpert.{suffix}": f"subject_id,study_id,{FLAGS}\n"
        f"10000032,50414267,1.0{13 * ','}\n10000764,57375967,,,1.0,,,,-1.0{7 * ','}\n"
        f"10000898,50771383,,-1.0{12 * ','}\n",
        f"mimic-cxr-2.0.0-metadata.{suffix}":
        "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition\n"
        "aa,10000032,50414267,CHEST,PA\nbb,10000032,50414267,CHEST,LATERAL\n"
        "cc,10000764,57375967,CHEST,AP\ndd,10000898,50771383,CHEST,PA\n"})
    rows = ["files/p10/p10000032/s50414267/aa.jpg,,10000032,",
            "files/p10/p10000764/s57375967/cc.jpg,cardiomegaly,10000764,"]
    assert make_table("mimic", tmp_path)[0] == rows
    write(tmp_path, split("validate"))
    assert make_table("mimic", tmp_path)[0] == rows[:1]         # train alone is no split
    write(tmp_path, split("test"))
    assert make_table("mimic", tmp_path)[0] == [rows[0] + "train", rows[1] + "test"]


def test_rsna(tmp_path):
    write(tmp_path, {"stage_2_detailed_class_info.csv": "patientId,class\na1,Normal\n"
                     "b2,Lung Opacity\nb2,Lung Opacity\nc3,No Lung Opacity / Not Normal\n"})
    assert make_table("rsna", tmp_path)[0] == [
        "stage_2_train_images/a1.dcm,,a1,", "stage_2_train_images/b2.dcm,lung opacity,b2,",
        "stage_2_train_images/c3.dcm,no lung opacity / not normal,c3,"]


def test_vindr(tmp_path):
    write(tmp_path, {"image_labels_train.csv": VINDR.format("s") + "a,R1,0,0,1\na,R2,1,0,0\n"
                     "a,R3,0,1,0\nb,R1,0,0,1\nb,R2,0,0,1\nc,R1,0,0,0\n"})
    assert "image_labels_test.csv" in make_table("vindr", tmp_path, status=2)[1]
    write(tmp_path, {"annotations/image_labels_test.csv":       # where PhysioNet has them
                     VINDR.format("").replace("rad_id,", "") + "d,0,1,0\ne,0,0,1\n"})
    assert make_table("vindr", tmp_path)[0] == [
        "train/a.dicom,cardiomegaly|other diseases,,train", "train/b.dicom,,,train",
        "test/d.dicom,other diseases,,test", "test/e.dicom,,,test"]


def test_kermany(tmp_path):
    rows = ["test/NORMAL/NORMAL-1003233-0001.jpeg,,1003233,test",
            "test/PNEUMONIA/BACTERIA-6249454-0002.jpeg,pneumonia,6249454,test",
            "test/PNEUMONIA/person1_virus_7.jpeg,pneumonia,test/person1,test",
            "train/NORMAL/IM-0429-0001-0001.jpeg,,train/IM-0429,train",
            "train/NORMAL/IM-0429-0001.jpeg,,train/IM-0429,train",
            "train/NORMAL/NORMAL2-IM-0429-0001.jpeg,,train/NORMAL2-IM-0429,train",
            "train/PNEUMONIA/VIRUS-6249454-0001.jpeg,pneumonia,6249454,",
            "train/PNEUMONIA/person1_bacteria_1.jpeg,pneumonia,train/person1,train",
            "train/PNEUMONIA/person1_virus_6.jpeg,pneumonia,train/person1,train",
            "val/NORMAL/NORMAL2-IM-1427-0001.jpeg,,NORMAL2-IM-1427,"]
    write(tmp_path, {row.split(",")[0]: "" for row in rows})
    write(tmp_path, {"train/NORMAL/._IM-0429-0001.jpeg": ""})
    assert make_table("kermany", tmp_path)[0] == rows
    assert make_table("kermany", tmp_path, "--no-split")[0] == [
        row[:row.rindex(",") + 1] for row in rows]
    assert make_table("kermany", tmp_path / "test")[0][2] == (
        "PNEUMONIA/person1_virus_7.jpeg,pneumonia,person1,")
    write(tmp_path, {"test/NORMAL/other.png": ""})
    assert "test/NORMAL/other.png" in make_table("kermany", tmp_path, status=2)[1]


def test_lists(tmp_path):
    none = " 0" * 14
    write(tmp_path, {"train": f"00000165_001.png{none[:-4]} 1 0\na b/00000193_019.png\t{none}\n\n",
                     "test": f"x/00000218_000.png 1{none[2:-2]} 1\n",
                     "day": "20240115_001.png 0 1\n", "bare": "a.png\nb.png\n",
                     "chexpert": f"v/patient00001/study1/view1_frontal.jpg 1{none[2:]}\n",
                     "uneven": "a.png 0 1\nb.png 0 1 1\n"})
    rows = ["00000165_001.png,pleural_thickening,00000165,", "a b/00000193_019.png,,00000193,"]
    assert make_table("lists", tmp_path / "train")[0] == rows
    assert make_table("lists", tmp_path / "train", tmp_path / "test")[0] == [
        rows[0] + "train", rows[1] + "train", "x/00000218_000.png,atelectasis|hernia,00000218,test"]
    # A day's export is not a patient, and CheXpert's 14 findings are not ChestX-ray14's.
    assert make_table("lists", tmp_path / "day")[0] == ["20240115_001.png,finding_2,,"]
    assert make_table("lists", tmp_path / "chexpert")[0] == [
        "v/patient00001/study1/view1_frontal.jpg,finding_1,patient00001,"]
    assert "b.png" in make_table("lists", tmp_path / "uneven", status=2)[1]
    assert "a.png" in make_table("lists", tmp_path / "bare", status=2)[1]


@pytest.mark.parametrize("labels, findings", [
    (np.eye(14, dtype=np.uint8), "atelectasis cardiomegaly effusion infiltration mass nodule "
     "pneumonia pneumothorax consolidation edema emphysema fibrosis pleural_thickening hernia"),
    (np.array([[1], [0]]), "pneumonia ")])
def test_medmnist(tmp_path, labels, findings):
    n = len(labels)
    images = np.random.default_rng(0).integers(0, 256, (n, 64, 64), np.uint8)
    arrays = {f"{part}_{name}": values for part in ("train", "val", "test")
              for name, values in (("images", images), ("labels", labels))}
    arguments = "medmnist", tmp_path / "set.npz", "--images", tmp_path / "png"
    np.savez(tmp_path / "set.npz", **arrays)
    rows, counts = make_table(*arguments)
    assert rows == [f"{part}/{i:06}.png,{finding},,{split}"
                    for part, split in (("train", "train"), ("val", ""), ("test", "test"))
                    for i, finding in enumerate(findings.split(" "))]
    assert f"{3 * n} without a patient" in counts
    with Image.open(tmp_path / "png/val/000001.png") as image:
        assert np.array_equal(image, images[1])
    for bad in {**arrays, "test_labels": labels * 3}, {"train_images": images}:
        np.savez(tmp_path / "set.npz", **bad)
        assert "set.npz" in make_table(*arguments, status=2)[1]


def test_folders(tmp_path):
    rows = ["Training/COVID/images/P002_x.JPG,covid,P002,train",
            "Training/No_Finding/P001/a.png,,P001,train", "testing/COVID/P003.dcm,covid,P003,test",
            "valid/COVID/P004.png,covid,P004,"]
    write(tmp_path, {row.split(",")[0]: "" for row in rows})
    write(tmp_path, dict.fromkeys(["Training/COVID/masks/P002_x.png", "Training/@eaDir/P9.png",
                                   "P005.png", "Training/COVID/notes.txt"], ""))
    rows_of_people, counts = make_table("folders", tmp_path, "--patient", r"P\d+")
    assert rows_of_people == rows and "not in the table: 1 images" in counts
    assert make_table("folders", tmp_path, "--patient", r"(P\d)\d+")[0][2].endswith(",P0,test")
    assert make_table("folders", tmp_path)[0] == [re.sub(r"P\d+,(\w*)$", r",\1", row)
                                                  for row in rows]
    assert "P002_x.JPG" in make_table("folders", tmp_path, "--patient", "P00[13]", status=2)[1]
    (tmp_path / "testing/COVID/P003.dcm").unlink()              # no test: no split, no valid
    assert make_table("folders", tmp_path, "--patient", r"P\d+")[0] == [
        row.removesuffix("train") for row in rows[:2]]
    rows, warning = make_table("folders", tmp_path / "Training/COVID")
    assert rows == ["images/P002_x.JPG,,,"] and "all images are normal" in warning


@pytest.mark.parametrize("arguments, text, message", [
    (["nih"], None, "Data_Entry_2017.csv"),
    (["nih"], NIH.replace("Patient ID", "Person") + "a.png,Mass,0,1,5,M,PA\n", "Patient ID"),
    (["nih"], NIH + "a.png,Mass\n", "line 2"),
    (["nih"], NIH + "a.png,Mass,Hernia,0,1,5,M,PA\n", "line 2"),
    (["nih"], NIH + "a.png,Mass,0,1,5,M,PA\na.png,Mass,0,2,5,M,PA\n", "a.png is told twice"),
    (["nih"], NIH, "no image"), (["folders"], None, "no image"),
    (["nih", "--patient", "("], NIH + "a.png,Mass,0,1,5,M,PA\n", "unterminated"),
    (["mimic"], None, "mimic-cxr-2.0.0-chexpert")])
def test_bad_input(tmp_path, arguments, text, message):
    if text:
        write(tmp_path, {"Data_Entry_2017.csv": text})
    _, sentence = make_table(arguments[0], tmp_path, *arguments[1:], status=2)
    assert message in sentence.splitlines()[-1]


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


# ---- Command line --------------------------------------------------------------------------------

FINE = "pretrain --preset small --batch-size 1 --data {tmp}/fine "
MISTAKES = {
    "pretrain --arch vit_huge": "vit_huge", "pretrain --device abacus": "abacus",
    "pretrain --lr nan": "lr", "pretrain --seed -1": "seed", "pretrain --colour red": "colour",
    "pretrain --img-size 30": "img-size", "pretrain --keep 1.5": "keep",
    "pretrain --keep 0": "keep", FINE + "--batch-size 0": "batch.size",
    FINE + "--batch-size 64": "batch-size", FINE + "--out {tmp}/odd.csv/run": "odd.csv",
    "pretrain --data {tmp}/nowhere": "nowhere", "pretrain --data {tmp}/empty": "empty",
    "pretrain --data {tmp}/broken": "broken", "pretrain --data {tmp}/fine/a.png": "a.png",
    "pretrain --data {tmp}/sick": "normal images", "pretrain --labels {tmp}/odd.csv": "--data",
    FINE + "--labels {tmp}/no.csv": "no.csv", FINE + "--labels {tmp}/odd.csv": "odd.csv",
    FINE + "--init {tmp}/no.pth": "no.pth",
    FINE + "--init {run}/checkpoint.pth --patch-size 16": "checkpoint.pth",
    "eval --ckpt {run} --finetune -5": "finetune", "eval --ckpt {tmp}/nowhere": "nowhere",
    "eval --ckpt {tmp}/odd.csv": "odd.csv", "eval --ckpt {run} --data {tmp}/sick": "sick",
    "eval --ckpt {run}/encoder.pth --data {tmp}/fine": "--labels"}


@pytest.mark.parametrize("command", MISTAKES)
def test_bad_input_ends_in_one_sentence_that_names_it(tmp_path, run, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_films(tmp_path, "sick/MASS/a.png", "fine/a.png", "fine/b.png")
    write(tmp_path, {"sick/NORMAL/b.png": "no image", "broken/a.png": "no image",
                     "odd.csv": "file,label\na.png,1\n"})
    device = "" if "--device" in command else " --device cpu"
    sentence = refusal(capsys, (command + device).format(tmp=tmp_path, run=run).split())
    assert sentence.startswith("afire.py") and re.search(MISTAKES[command], sentence)


README = Path(afire.__file__).with_name("README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("n", range(README.count("```python\n")))
def test_the_readme_examples_run(tmp_path, monkeypatch, n):
    monkeypatch.chdir(tmp_path)
    exec(README.split("```python\n")[1 + n].split("```")[0], {})


# ---- Benchmark -----------------------------------------------------------------------------------

@pytest.mark.skipif("AFIRE_BENCH" not in os.environ, reason="AFIRE_BENCH=1 with -s runs it")
@pytest.mark.parametrize("options", ["--preset phantoms", "--preset paper --batch-size 8"])
def test_bench(tmp_path, options):
    """Prints medians of the parts of a training step. The bare backbone is what no implementation
    can do without: the networks forward and the student's backward, on tensors on the device."""
    options = afire.parse_arguments(f"pretrain --data x {options}".split())
    n = options.batch_size
    size = options.img_size
    device = afire.find_device("auto")
    trainer = afire.Trainer(options, device)
    model = trainer.model
    pixels = afire.phantoms(8, size)[0].repeat(n // 8, 0)
    normal = afire.to_device(pixels, device) / 255
    centres = afire.texture_centre(normal)
    centres_on_host = centres.cpu().numpy()
    x = afire.normalise(normal)
    abnormal = F.max_pool2d(afire.synthetic_lesion_mask(normal, seeded(), centres)[1],
                            options.patch_size).flatten(1) > 0
    Image.fromarray(film(size=512)).save(tmp_path / "film.png")

    def backbone():
        trainer.optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=trainer.bf16):
            with torch.no_grad():
                model.teacher["head"](model.teacher["encoder"](x)[:, 1:])
            tokens = model.student["encoder"](x)
            outputs = model.student["head"](tokens[:, 1:]), model.decoder(tokens, abnormal)
        sum(output.float().mean() for output in outputs).backward()

    parts = {"decode": lambda: [afire.read_image(tmp_path / "film.png", size) for _ in range(n)],
             "texture centre": lambda: afire.texture_centre(normal),
             "lesion mask": lambda: afire.synthetic_lesion_mask(normal, seeded(), centres),
             "bare backbone": backbone,
             "full step": lambda: trainer.step(pixels, centres_on_host, 10, 10)}
    seconds = {name: [] for name in parts}
    for _ in range(9):                                     # in turn, so that drift hits them alike
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            torch.zeros(1, device=device).item()           # waits for the device
            seconds[name].append(time.perf_counter() - started)
    print(f"\n{options.arch}, {size} px, batch of {n}, {device}")
    for name, times in seconds.items():
        median = np.median(times[2:])
        print(f"{name:16} {1e3 * median / n:9.3f} ms an image {n / median:9.1f} images/s")
    ratio = np.median(seconds["full step"][2:]) / np.median(seconds["bare backbone"][2:])
    print(f"full step / bare backbone: {ratio:.3f}")


# ---- results/ -----------------------------------------------------------------------------------

def test_crops_are_turned_squares_inside_the_image_and_depend_on_their_place_alone():
    """Images whose brightness tells their pixels' x and y also tell which square was taken."""
    ramp = torch.arange(64.).expand(99, 1, 64, 64)
    x, mask = crops.crop(ramp, seeded())
    y, _ = crops.crop(ramp[1:].mT, seeded(), offset=1)
    z = x[1:, 0].numpy() + 1j * y[:, 0].numpy()
    step = (z[:, 31:32, 41:42] - z[:, 31:32, 31:32]) / 10              # of a pixel to the right
    row, column = np.indices((64, 64))
    taken = z[:, 31:32, 31:32] + step * (column - 31 + 1j * (row - 31))
    taken = np.stack([taken.real, taken.imag])
    np.testing.assert_allclose([z.real, z.imag], taken.clip(0, 63), atol=1e-3)
    assert -0.5 < taken.min() and taken.max() < 63.5                   # edges of the last pixels
    assert 0.499 < abs(step).min() < 0.52 and 0.83 < abs(step).max() < 0.851 and not mask.any()
    assert 9 < np.angle(step, deg=True).max() < 10.1


@pytest.mark.parametrize("script", ["crops.py", "mae.py"])
def test_other_methods_pretrain_and_boxes_are_of_people_who_are_new(tmp_path, monkeypatch, script):
    """40 people with two images each, of whom 20 to 39 are to train on; every third has a box."""
    monkeypatch.chdir(tmp_path)
    images, labels, _, _ = afire.phantoms(80, 32)
    write_images(tmp_path, images[:, 0], [f"{i}.png" for i in range(80)])
    labels = table(tmp_path / "labels.csv", *[
        f"{i}.png,{'a' if labels[i].any() else ''},{i // 2},{'test' if i < 40 else 'train'}"
        for i in range(80)])
    table(tmp_path / "boxes.csv", *[f"{i}.png,a,8,{i % 7},9,9" for i in range(0, 80, 6)],
          header="image,finding,x,y,w,h")
    options = ("--data . --labels labels.csv --out run --preset small --img-size 32 "
               "--batch-size 4 --epochs 1 --keep 0.5")
    done = shell(f"{sys.executable} {ROOT}/results/{script} pretrain {options}")
    assert done.returncode == 0, done.stderr
    epoch = load_run(tmp_path / "run")[1][0]
    assert epoch["category"] == 0 and epoch["restoration"] > 0
    assert (epoch["structure"] > 0) == (script == "crops.py")
    arguments = []
    original = boxes.maps_of_network
    monkeypatch.setattr(boxes, "maps_of_network", lambda *a: arguments.append(a) or original(*a))
    boxes.main("--ckpt run --data . --labels labels.csv --boxes boxes.csv".split())
    encoder, _, data, normals, rows, _ = arguments[0]
    pretrained = np.isin(data.hashes, afire.trained_images("run/checkpoint.pth"))
    people = set(np.array(data.patients)[pretrained])
    tested = {f"{i}.png" for i in range(0, 80, 6) if str(i // 2) not in people}
    assert names(data, rows) == tested and 7 <= len(tested) < 14
    assert {data.patients[row] for row in data.train} == {str(i) for i in range(20, 40) if i % 3}
    assert not data.labels[normals].any() and set(normals) <= set(data.train)
    images = torch.from_numpy(data.images).float() / 255
    x = afire.features(encoder, images[data.train]).mean(1).numpy()
    z = (x - x.mean(0)) / x.std(0)
    probe = sklearn.linear_model.Ridge(alpha=10).fit(z, data.labels[data.train, 0])
    cams = boxes.grad_cam(encoder, torch.from_numpy(probe.coef_ / x.std(0)), images)
    expected = (cams[rows] - cams[normals].mean(0)).clamp_min(0).numpy()
    maps = original(*arguments[0])
    np.testing.assert_allclose(maps["Grad-CAM, probe"], expected, rtol=0.01,
                               atol=0.01 * expected.max())
    assert not np.allclose(maps["Grad-CAM, tuned"], maps["Grad-CAM, probe"])


def test_boxes_become_masks_of_the_squashed_image_or_are_refused(tmp_path):
    Image.new("L", (48, 96)).save(tmp_path / "a.png")                  # 48 wide, 96 high
    data = load(tmp_path, size=24)

    def masks(header, *lines):
        file = table(tmp_path / "boxes.csv", *lines, header=f"image,finding,{header}")
        return boxes.read_boxes(file, data, tmp_path)

    expected = np.zeros((24, 24), bool)
    expected[4:12, 4:6] = True
    expected[22:, 20:] = True
    np.testing.assert_equal(masks("x,y,w,h", "b.png,c,1,1,1,1", "a.png,c,9,17,2,30",
                                  "a.png,c,41,88,7,8", "a.png,c,44,92,2,2"), {"a.png": expected})
    for header, line, message in (("x,y,w,h", "a.png,c,20,9,29,30", "29 x 30.*a.png.*48 x 96"),
                                  ("x,y,w,h", "a.png,c,20,70,9,27", "9 x 27.*a.png.*48 x 96"),
                                  ("x,y,w,h", "b.png,c,1,1,1,1", "no box"),
                                  ("x,y", "a.png,c,1,1", "columns")):
        with pytest.raises(afire.InputError, match=message):
            masks(header, line)


def test_grad_cam_is_the_gradient_by_differences_times_the_activation():
    encoder = afire.ViT(32, 8, 3, 32, 2, 2).double().requires_grad_(False)
    weight = torch.randn(32).double()
    outputs = []
    encoder.blocks[-1].register_forward_hook(lambda block, x, output: outputs.append(output[0]))
    cam = boxes.grad_cam(encoder, weight, torch.rand(1, 1, 32, 32).double())
    steps = F.pad(1e-4 * torch.eye(16 * 32).double().view(-1, 16, 32), (0, 0, 1, 0))
    ends = [encoder.norm(outputs[0] + d * steps)[:, 1:].mean(1) @ weight for d in (1, -1)]
    slope = ((ends[0] - ends[1]) / 2e-4).view(16, 32)
    expected = outputs[0][1:] @ slope.mean(0)
    assert_close(cam[0], expected.view(4, 4), rtol=1e-5, atol=1e-8)


def test_localisation_is_perfect_or_scikit_learns_with_an_interval_of_patients():
    masks = np.random.default_rng(0).random((8, 6, 6)) < 0.3
    report = boxes.localisation(masks * 1.0, masks, np.arange(8))
    assert report == dict.fromkeys(["AUROC", "Dice", "pointing"], {"mean": 1, "ci95": [1, 1]})
    scores = np.random.default_rng(1).random((8, 36))
    areas = [sklearn.metrics.roc_auc_score(mask.ravel(), s) for s, mask in zip(scores, masks)]
    grids = scores.reshape(8, 6, 6)
    report = boxes.localisation(grids, masks, np.array(list("aaaaaabb")))["AUROC"]
    ends = sorted([np.mean(areas[:6]), np.mean(areas[6:])])            # one patient, drawn twice
    assert [report["mean"], *report["ci95"]] == pytest.approx([np.mean(areas), *ends])


def test_tables_are_scikit_learns_and_pair_runs_and_patients(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    labels = np.arange(60)[:, None] % [3, 4] == 0
    masks = labels.any(1)[:, None, None] & (np.indices((8, 8)).sum(0) < 6)
    probe = []
    pixel = []
    for run in range(4):
        draws = (random.random((5, 60, 2)) + labels / 3).round(1)
        maps = random.random((60, 4, 4)) + labels[:, :1, None] / 9
        Path(str(run)).mkdir()
        np.savez(f"{run}/predictions.npz", patients=np.arange(60) // 2, findings=["a", "b"],
                 images=np.arange(60) + run // 3, labels=labels, masks=masks,
                 **{"checkpoint/linear 1%": draws, "random_init/prototype": maps})
        probe.append(np.mean([sklearn.metrics.roc_auc_score(labels, draw) for draw in draws]))
        grid = F.interpolate(torch.from_numpy(maps).unsqueeze(1), (8, 8), mode="bilinear")
        pixel.append(sklearn.metrics.roc_auc_score(masks.ravel(), grid.ravel()))
    tables.main(["A=0,1", "B=0,2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith(f"| B | {np.mean(probe[0:3:2]):.3f} ({min(probe[0:3:2]):.3f} to ")
    assert f"| {np.mean(pixel[:2]):.3f} ({min(pixel[:2]):.3f} to " in lines[4]
    assert lines[-2].startswith(f"| B | {(probe[2] - probe[1]) / 2:+.3f} (")
    tables.main(["A=0", "B=0"])
    assert "\n| B | +0.000 (+0.000 to +0.000) |" in capsys.readouterr().out
    counts = tables.draw_images(np.arange(60) // 2, 9)                 # of which the first are 1
    assert (counts[0] == 1).all() and (counts[:, ::2] == counts[:, 1::2]).all()
    area = sklearn.metrics.roc_auc_score(labels[:, 0], draws[0, :, 0], sample_weight=counts[8])
    assert tables.auroc(draws[0, :, 0], labels[:, 0], counts)[8] == pytest.approx(area)
    with pytest.raises(SystemExit, match="2"):
        tables.main(["A=0", "B=3"])
    assert "other images" in capsys.readouterr().err


def test_mae_restores_hidden_patches_that_are_normalised_one_by_one():
    model = mae.MAE(32, 8, 32, 2, 2, 16, 32, 16, 32, 1, 2).eval()
    images, lesioned, mask = tiny_batch()
    loss = model(images, lesioned, mask, visible=SOME)["loss"]
    x = afire.normalise(images)
    tokens = torch.zeros(6, 17, 32)
    hidden = torch.ones(6, 16, dtype=torch.bool)
    encoded = model.student["encoder"](x, SOME)
    for i, positions in enumerate(SOME):
        tokens[i, 0] = encoded[i, 0]
        tokens[i, 1 + positions] = encoded[i, 1:]
        hidden[i, positions] = False
    restored = afire.patchify(model.decoder(tokens, hidden), 8)
    errors = []
    for i, j in hidden.nonzero():
        patch = afire.patchify(x, 8)[i, j]
        target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
        errors.append((restored[i, j] - target).square().mean())
    assert_close(loss, torch.stack(errors).mean())


def test_scripts_for_the_evidence_run_on_phantoms(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images, labels, _, _ = afire.phantoms(60, 48)
    write_images(tmp_path, images[:, 0], [f"{i}.png" for i in range(60)])
    findings = ["a" if label.any() else "" for label in labels]
    table(tmp_path / "labels.csv", *[
        f"{i}.png,{findings[i]},{i // 2},{'test' if i < 20 else 'train'}" for i in range(60)])
    afire.main("pretrain --data . --labels labels.csv --out run --preset small --img-size 32 "
               "--batch-size 4 --epochs 1 --device cpu".split())
    lesions.main(["run"])
    arrays = np.load("run/lesions/predictions.npz")
    n = (~labels[:20].any(1)).sum()                                    # films, then with lesions
    assert arrays["labels"][:, 0].tolist() == [False] * n + [True] * n
    assert not arrays["masks"][:n].any() and arrays["masks"][n:].any((1, 2)).all()
    scores = arrays["checkpoint/neighbours"]
    assert scores[n:].mean() > scores[:n].mean()
    tables.main(["AFiRe=run/lesions"])
    assert "pixels by the best score" in capsys.readouterr().out
    token_pictures.main("--ckpt run --out tokens.png".split())
    assert Image.open("tokens.png").width > 300
    shift.main("--data . --labels labels.csv --out moved".split())
    whole = afire.load_radiographs(".", 32, labels="labels.csv")
    moved = afire.load_radiographs("moved", 32, labels="moved/labels.csv")
    for part in "train", "test":
        rows = getattr(whole, part), getattr(moved, part)
        contents = [set(np.array(data.hashes)[i]) for data, i in zip((whole, moved), rows)]
        people = [set(np.array(data.patients)[i]) for data, i in zip((whole, moved), rows)]
        assert people[0] == people[1]
        assert contents[0] & contents[1] == (contents[0] if part == "train" else set())


def test_a_moved_film_is_zoomed_by_up_to_a_fifth_and_repeats_its_border():
    ramp = np.tile(np.arange(100, dtype=np.uint8), (100, 1))
    zooms = []
    for seed in range(60):
        for film, axis in (ramp, 1), (ramp.T, 0):
            image = Image.fromarray(np.ascontiguousarray(film))
            moved = np.asarray(shift.move(image, np.random.default_rng(seed))).astype(float)
            line = moved[50] if axis else moved[:, 50]
            zooms.append((line[70] - line[30]) / 40)
            assert moved.shape == (100, 100) and abs(line[50] - 50) <= 7
    assert 0.8 < min(zooms) < 0.87 and 0.97 < max(zooms) <= 1.03
