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
import zlib
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
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


def test_the_head_s_gradient_is_that_of_cosines_and_its_weights_start_as_they_should():
    head = afire.AnatomyHead(12, 9, 7, hidden_dim=64, bottleneck_dim=64)
    assert 0.97 < head.last_layers.std() < 1.03 and 0.017 < head.mlp[2].weight.std() < 0.023
    assert not any(head.mlp[i].bias.any() for i in (0, 2, 4))
    tokens = torch.randn(3, 9, 12)
    target = torch.randn(3, 9, 7)
    ours = torch.autograd.grad((head(tokens) * target).sum(), head.last_layers)[0]
    cosines = F.cosine_similarity(head.mlp(tokens).unsqueeze(2), head.last_layers, dim=3)
    assert_close(ours, torch.autograd.grad((cosines * target).sum(), head.last_layers)[0])


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


def test_lesions_and_model_compile_to_one_graph():
    model, images = tiny_model(), tiny_batch()[0]

    def step(images, centre):
        return model(images, *afire.synthetic_lesion_mask(images, None, centre))

    results = []
    for function in step, torch.compile(step, backend="eager", fullgraph=True):
        torch.manual_seed(0)
        model.prototypes.prototypes.zero_()
        results.append(function(images, afire.texture_centre(images)))
    assert_close(*results)


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


X = torch.rand(6, 1, 32, 32)
COMPONENTS = {
    "texture_centre": lambda f: f(X), "synthetic_lesion_mask": lambda f: f(X)[0],
    "patchify": lambda f: f(X, 8), "unpatchify": lambda f: f(torch.rand(2, 16, 64), 8),
    "ViT": lambda f: f(32, 8, 1, 32, 1, 2)(X),
    "Decoder": lambda f: f(32, 8, 1, 16, 32, 1, 2)(torch.rand(6, 17, 16), torch.rand(6, 16) > 0.5),
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
    results = []
    for component in space[name], getattr(afire, name):
        torch.manual_seed(0)
        results.append(COMPONENTS[name](component))
    assert torch.equal(*results) and results[0].isfinite().all()


# ---- Options and pre-training --------------------------------------------------------------------

CPU = torch.device("cpu")
COMMAND = f"{sys.executable} {afire.__file__}"


def shell(command, **options):
    return subprocess.run(command, shell=True, timeout=170, capture_output=True, text=True,
                          check=False, **options)


def pretraining(data, out):
    """A small pre-training as a command."""
    return (f"pretrain --data {data} --out {out} --preset small --img-size 32 --epochs 5 "
            "--batch-size 8 --device cpu").split()


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
              paper.lr, paper.warmup_epochs, paper.teacher_momentum)
    assert recipe == ("vit_base", 224, 16, 400, 64, 5e-4, 10, 0.996)
    small = afire.parse_arguments(["pretrain", "--data", "x", "--preset", "small"])
    assert (small.levels, small.epochs) == ("equal", 38)


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
        metrics = trainer.step(pixels, centres, step, 3)
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
        trainer.step(pixels[rows], centres[rows], step, 10)
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
        return values[-1]

    taken = []
    values = []
    step = afire.Trainer.step
    monkeypatch.setattr(afire.Trainer, "step", record)
    afire.main(pretraining(radiographs, tmp_path))
    epochs = [first | second for first, second in zip(taken[::2], taken[1::2], strict=True)]
    assert [len(images) for images in epochs] == 5 * [16], "two steps of 8"
    checkpoint, log = load_run(tmp_path)
    assert len(set.union(*epochs)) == len(checkpoint["images"]) > 16
    means = torch.stack(values).view(5, 2, 5).mean(1).tolist()
    for epoch, (record, mean) in enumerate(zip(log, means, strict=True), 1):
        loss, structure, category, restoration, gradient_norm = mean
        peak = 8e-3 * 8 / 256                              # lr of the last step, after 3 of warm-up
        lr = peak * min(1, epoch / 3)
        if epoch > 3:
            lr = 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * (2 * epoch - 7) / 4)) / 2
        assert record == pytest.approx({
            "epoch": epoch, "loss": loss, "structure": structure, "category": category,
            "restoration": restoration, "gradient_norm": gradient_norm, "lr": lr}, rel=1e-5)
        assert record["loss"] == pytest.approx(structure + category + restoration)


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
    used = (moved_run / "table.csv").read_bytes()
    for change in "--arch vit_small", "--seed 7", "--lr 1", "--epochs 9", "--levels file":
        assert change.split()[0].strip("-") in refusal(capsys, [*command, *change.split()])
    removed = next((moved_set / "train/NORMAL").glob("[0-9]*"))
    content = removed.read_bytes()
    removed.unlink()
    assert "images" in refusal(capsys, command)
    assert equal(load_run(moved_run), before), "it was left as it was"
    assert (moved_run / "table.csv").read_bytes() == used
    removed.write_bytes(content)
    (moved_run / "table.csv").write_text("as at the start")
    afire.main(command)
    assert (moved_run / "table.csv").read_text() == "as at the start"
    assert json.loads((moved_run / "config.json").read_text())["data"] == str(moved_set)
    assert equal(load_run(moved_run)[0]["model"], load_run(run)[0]["model"])
    assert (moved_run / "log.jsonl").read_bytes() == (run / "log.jsonl").read_bytes()
    torch.save({"epoch": 3}, moved_run / "checkpoint.pth")
    assert "checkpoint.pth" in refusal(capsys, command)


@pytest.mark.parametrize("change", [
    lambda checkpoint: checkpoint["config"].update(keep=1.0),
    lambda checkpoint: checkpoint["model"].update({"prototypes.updates": torch.tensor(5)})])
def test_a_run_of_another_version_is_refused_and_its_encoder_is_not(run, radiographs, tmp_path,
                                                                   capsys, change):
    old = shutil.copytree(run, tmp_path / "old")
    checkpoint = load_run(old)[0]
    change(checkpoint)
    torch.save(checkpoint, old / "checkpoint.pth")
    content = (old / "checkpoint.pth").read_bytes()
    for command in pretraining(radiographs, old), ["eval", "--ckpt", old]:
        assert str(old / "encoder.pth") in refusal(capsys, command)
    assert (old / "checkpoint.pth").read_bytes() == content
    command = pretraining(radiographs, tmp_path / "new")
    afire.main([*command, "--init", str(old / "encoder.pth")])


@pytest.mark.parametrize("bad_step", [3, 4])
def test_a_gradient_that_is_not_finite_stops_the_run(radiographs, tmp_path, monkeypatch, capsys,
                                                     bad_step):
    """The loss alone does not tell: it stays finite here."""
    def poison(*arguments):
        metrics = step(*arguments)
        metrics[4] = math.inf if arguments[3] == bad_step else metrics[4]
        return metrics

    step = afire.Trainer.step
    monkeypatch.setattr(afire.Trainer, "step", poison)
    assert "finite" in refusal(capsys, pretraining(radiographs, tmp_path))
    checkpoint, log = load_run(tmp_path)
    assert len(log) == checkpoint["epoch"] == bad_step // 2


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
    shown = re.findall(r"\d+", re.search("pre-training on.*", done.stdout)[0])
    normal, train, test = [len(list(radiographs.glob(files))) for files in
                           ("train/NORMAL/[0-9]*", "train/*/[0-9]*", "test/*/*")]
    assert [int(count) for count in shown] == [normal, train - normal, test]
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
    if variable == "WORLD_SIZE":
        command = [command, "--device", "cpu", "--batch-size", "7"]
        assert "--batch-size" in refusal(capsys, command)


def test_init_starts_the_encoders_and_hands_on_what_was_trained_on(run, radiographs, tmp_path):
    """The images of the earlier run stay known, though they are not among the new ones."""
    command = [*pretraining(radiographs / "test", tmp_path),
               "--init", str(run / "checkpoint.pth"), "--lr", "0"]
    interrupt(command, 1)
    afire.main(command)
    before = load_run(run)[0]
    after = load_run(tmp_path)[0]
    assert set(after["earlier_images"]) == set(before["images"])
    assert set(afire.load_models(tmp_path)[2]) > set(before["images"])
    for network in "student", "teacher":
        weight = after["model"][f"{network}.encoder.blocks.0.attn.qkv.weight"]
        assert_close(weight, before["model"]["teacher.encoder.blocks.0.attn.qkv.weight"])


# ---- Devices: on a GPU where there is one --------------------------------------------------------

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
def test_a_training_step_never_waits_for_the_gpu():
    options = afire.parse_arguments("pretrain --img-size 32 --batch-size 8".split())
    trainer = afire.Trainer(options, torch.device("cuda"))
    pixels, centres = pixels_and_centres(8)
    trainer.step(pixels, centres, 0, 1)                    # the first one allocates and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = trainer.step(pixels, centres, 1, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.isfinite().all()


def test_a_run_resumes_and_is_evaluated_on_the_device(device, radiographs, tmp_path):
    """Bit for bit on the CPU; on CUDA within 2 %, as its attention is not deterministic."""
    for name in "whole", "resumed":
        command = [*pretraining(radiographs, tmp_path / name), "--device", str(device)]
        if name == "resumed":
            interrupt(command, 1)
        afire.main(command)
    logs = [load_run(tmp_path / name)[1] for name in ("whole", "resumed")]
    tolerance = 0 if device.type == "cpu" else 0.02
    for record, expected in zip(*logs, strict=True):
        assert record == pytest.approx(expected, rel=tolerance)
    afire.main(["eval", "--ckpt", str(tmp_path / "whole"), "--device", str(device)])
    assert_report(tmp_path / "whole/eval")


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
def test_auroc_is_scikit_learns_with_many_ties(levels, seed):
    random = np.random.default_rng(seed)
    scores = random.integers(0, levels, 99) / 7
    labels = random.random(99) < 0.3
    area = sklearn.metrics.roc_auc_score(labels, scores)
    assert afire.auroc(scores, labels) == pytest.approx(area, abs=1e-12)
    for one_class in np.zeros(99, bool), np.ones(99, bool):
        assert math.isnan(afire.auroc(scores, one_class))
    assert math.isnan(afire.auroc(np.where(np.arange(99) == 7, np.nan, scores), labels))


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


@torch.no_grad()
def test_scores_equal_their_oracles_and_are_high_where_an_image_is_odd():
    images = phantom_images(160, 32)
    model = tiny_model().eval()
    randomise(model.student)                               # the teacher's encoder and head count
    encoder = model.teacher["encoder"]
    mean = afire.normalise(images[:100].mean(0, keepdim=True))
    model.decoder.forward = lambda tokens, masked: mean.expand(len(tokens), -1, -1, -1)
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


def test_the_teacher_is_evaluated_beside_the_initial_weights(run):
    models, options, hashes = afire.load_models(run / "checkpoint.pth")
    checkpoint = load_run(run)[0]
    assert hashes == checkpoint["images"]
    assert equal(models["checkpoint"][0].state_dict(), {
        key.removeprefix("teacher.encoder."): value for key, value in checkpoint["model"].items()
        if key.startswith("teacher.encoder.")})
    untrained = afire.build_model(options)
    assert equal(models["random_init"][1].state_dict(), untrained.state_dict())
    models, options, _ = afire.load_models(run, 48)                    # another image size
    assert models["checkpoint"][0].sizes[0] == 48 and models["checkpoint"][1] is None
    assert options.levels == "equal" and options.data
    twice = [afire.load_models(run / "encoder.pth")[0]["random_init"][0] for _ in range(2)]
    assert equal(*[encoder.state_dict() for encoder in twice])


def test_eval_compares_with_normal_training_images_and_shows_the_most_abnormal(
        run, tmp_path, monkeypatch):
    def spy(*arguments):
        calls.append(arguments)
        return evaluate_network(*arguments)

    calls = []
    pictures = []
    levels = []
    load_radiographs = afire.load_radiographs
    monkeypatch.setattr(afire, "load_radiographs", lambda *arguments, **options: (
        levels.append(options["levels"]) or load_radiographs(*arguments, **options)))
    evaluate_network = afire.evaluate_network
    monkeypatch.setattr(afire, "evaluate_network", spy)
    monkeypatch.setattr(afire, "plot_images", lambda file, columns: pictures.append(columns))
    afire.main(["eval", "--ckpt", str(run), "--out", str(tmp_path), "--device", "cpu"])
    assert levels == ["equal"], "as in pre-training"
    encoder, _, data, normals, _ = calls[0]
    assert set(normals) == set(data.train[~data.labels[data.train].any(1)])
    assert len(afire.normal_references(data, 5)) == 5
    arrays = np.load(tmp_path / "predictions.npz")
    models = afire.load_models(run)[0]
    for name, (encoder, _) in models.items():
        encoder.eval().requires_grad_(False)
        expected = afire.anomaly_maps(data.images, data.test, CPU, encoder, None, normals)
        np.testing.assert_array_equal(arrays[f"{name}/neighbours"], expected["neighbours"])
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
    before = afire.evaluate_network(encoder, None, data, data.train[:9], CPU)[1]
    assert before["linear 10%"].shape == (5, 40, 1) and before["neighbours"].shape == (40, 4, 4)
    data.labels[data.test] = np.random.default_rng(0).random((40, 1)) < 0.5
    after = afire.evaluate_network(encoder, None, data, data.train[:9], CPU)[1]
    assert_close(after, before, equal_nan=True)


def test_the_table_says_what_is_undefined(capsys):
    linear = {"1%": {"macro_auroc": 0.7, "per_finding": {"a": 0.7, "b": math.nan, "c": math.nan}}}
    network = {"linear": linear, "anomaly": {"x": {"image_auroc": 0.6, "pixel_auroc": math.nan}}}
    afire.print_table({"checkpoint": network, "random_init": network}, np.eye(3, dtype=bool))
    printed = capsys.readouterr().out
    assert re.search(r"0\.700 +0\.700 +1 of 3", printed) and "nan" not in printed


def read_scores(folder):
    with open(folder / "scores.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def evaluation(run):
    """The folder of an eval of which `head` takes but one line."""
    done = shell(f"{COMMAND} eval --ckpt {run} --device cpu | head -n 1",
                 env={**os.environ, "PYTHONUNBUFFERED": ""})
    files = {file.name for file in run.glob("eval/*")}
    assert files == {"metrics.json", "predictions.npz", "scores.csv", "anomaly.png"}, done.stderr
    return run / "eval"


def sklearn_auroc(scores, labels):
    """None where it is undefined."""
    if labels.all() or not labels.any() or np.isnan(scores).any():
        return None
    return sklearn.metrics.roc_auc_score(labels, scores)


def mean_of_defined(values):
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


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
    for score in "prototype", "restoration", "neighbours":
        maps = arrays[f"{name}/{score}"]
        tokens = np.sort(maps.reshape(len(maps), -1))
        highest = tokens[:, -(tokens.shape[1] // 4):].mean(1)
        large = [cv2.resize(grid, masks.shape[1:], interpolation=cv2.INTER_LINEAR) for grid in maps]
        report["anomaly"][score] = {
            "image_auroc": sklearn_auroc(highest, labels.any(1)),
            "pixel_auroc": sklearn_auroc(np.ravel(large), masks.ravel())}
    return report


def assert_report(folder):
    """metrics.json is what predictions.npz gives: -> metrics.json."""
    report = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    arrays = np.load(folder / "predictions.npz")
    for name, network in report.items():
        expected = report_of(arrays, name)
        assert network["linear"].keys() == expected["linear"].keys()
        for fraction, metrics in network["linear"].items():
            oracle = expected["linear"][fraction]
            assert metrics["macro_auroc"] == pytest.approx(oracle["macro_auroc"])
            assert metrics["per_finding"] == pytest.approx(oracle["per_finding"])
        assert network["anomaly"].keys() == expected["anomaly"].keys()
        for score, metrics in network["anomaly"].items():
            assert metrics == pytest.approx(expected["anomaly"][score], abs=1e-6)
    assert report.keys() == {"checkpoint", "random_init"}
    return report


def test_eval_writes_what_others_rely_on(evaluation):
    report = assert_report(evaluation)
    assert report["checkpoint"]["anomaly"]["prototype"]["pixel_auroc"] is None, "no masks"
    arrays = np.load(evaluation / "predictions.npz")
    assert len(arrays["images"]) == len(arrays["patients"]) == len(arrays["labels"]) == 24


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
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"moved", "scores.csv", "anomaly.png"}, "none of the first evaluation"
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
    capsys.readouterr()
    afire.main(["eval", "--ckpt", str(tmp_path), "--device", "cpu"])
    report = assert_report(tmp_path / "eval")
    table = capsys.readouterr().out
    assert len(table.splitlines()) < 30, "it fits a screen"
    metrics = {}
    for name, network in report.items():
        scores = network["anomaly"].values()
        metrics[name] = np.array([network["linear"]["100%"]["macro_auroc"],
                                  max(score["image_auroc"] for score in scores),
                                  max(score["pixel_auroc"] for score in scores)])
    gains = metrics["checkpoint"] - metrics["random_init"]
    assert (gains > [0.02, 0.08, 0.08]).all(), gains
    rows = re.findall(r"^(.+?) +([\d.]+) +([\d.]+)$", table, re.MULTILINE)
    printed = {name: (float(trained), float(untrained)) for name, trained, untrained in rows}
    expected = {}
    for fraction in "1%", "10%", "100%":
        expected[f"linear probe, {fraction} of the labels"] = [
            network["linear"][fraction]["macro_auroc"] for network in report.values()]
    for level in "image", "pixel":
        for score in "prototype", "restoration", "neighbours":
            expected[f"abnormal {level}s by {score}"] = [
                network["anomaly"][score][f"{level}_auroc"] for network in report.values()]
    assert printed.keys() == expected.keys()
    for name, values in expected.items():
        assert printed[name] == pytest.approx(values, abs=5.1e-4), name


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


@pytest.mark.parametrize("damage", [lambda content: content[:9000], lambda content: b"", lambda _: (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 49210\n")],
    ids=["cut", "empty", "pointer"])
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


def load(folder, labels=None, size=8):
    """A set, its cache beside it."""
    return afire.load_radiographs(folder, size, labels=labels, cache=f"{folder}.cache")


def table(file, *lines, header="image,findings,patient,split"):
    file.write_text("\n".join([header, *lines]), "utf-8", "surrogateescape")
    return file


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


def assert_printed(capsys, *reasons):
    printed = capsys.readouterr().out
    assert [reason for reason in reasons if reason not in printed] == []


def counted(printed):
    """What was passed over: {first file: how many} for every reason."""
    lines = re.findall(r"(?:passed over: \(?|; )(\d+) [^;]*?\(first: (.*?)\)(?=$|;|\):)", printed,
                       re.M)
    return {first: int(n) for n, first in lines}


def test_what_is_passed_over_is_counted_by_reason_with_its_first_file(tmp_path, capsys):
    """Masks beside images, what Macs, Jupyter, NAS boxes and Windows leave, other kinds of file."""
    folder = tmp_path / "set"
    images = [f"{kind}/images/{i}.png" for kind in ("Normal", "COVID") for i in (1, 2)]
    write_films(folder, *images, *[f"COVID/{masks}/{i}.png" for masks in ("lung masks", "Masks")
                                   for i in (1, 2)],
                "COVID/.ipynb_checkpoints/1.png", "@eaDir/1.png/T.jpg", ".Trash-1000/files/c.png",
                "$RECYCLE.BIN/x.png", "__MACOSX/Normal/1.png", "Normal/film.tif")
    for name in "Normal/._1.png", "notes.txt", "README", "Normal/broken.png", "Normal/empty.jpg":
        (folder / name).write_bytes(b"")
    for name in "Normal/a.dcm", "Normal/b.DICOM":
        (folder / name).write_bytes(bytes(128) + b"DICM")
    for i, grey in enumerate((0, 3, 255)):
        Image.new("L", (9, 9), grey).save(folder / f"COVID/blank{i}.png")
    (folder / "again").symlink_to(folder, target_is_directory=True)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    data = load(folder)
    assert findings_of(data) == {
        name: {"covid"} if "COVID" in name else set() for name in images}
    printed = capsys.readouterr().out
    assert counted(printed) == {
        "$RECYCLE.BIN/x.png": 6, "COVID/Masks/1.png": 4, "Normal/film.tif": 1, "notes.txt": 1,
        "README": 1, "Normal/a.dcm": 2, "again": 1, "gone.png": 1, "Normal/broken.png": 2,
        "COVID/blank0.png": 3}
    assert "make_table.py" in printed, "the remedy for DICOM"


@pytest.mark.parametrize("tree, expected", [
    # (1) No folder speaks.
    (["a.png", "b.PNG"], {"a.png": "normal", "b.PNG": "normal"}),
    (["images_001/a.png", "abnormal/b.png", "contest/c.png"],
     {"images_001/a.png": "normal", "abnormal/b.png": "normal", "contest/c.png": "normal"}),
    # (2) Classes, or train and test of classes.
    (["NORMAL/a.png", "Mass/p1/b.png", "c.png"],
     {"NORMAL/a.png": "normal", "Mass/p1/b.png": "mass"}),
    (["Train/No_Finding/a.png", "train/Lung_Opacity/b.png", "TEST/no finding/x/c.png",
      "test/lung opacity/d.png", "val/no_finding/e.png", "train/f.png"],
     {"Train/No_Finding/a.png": "normal", "train/Lung_Opacity/b.png": "lung opacity",
      "TEST/no finding/x/c.png": "normal", "test/lung opacity/d.png": "lung opacity"}),
    # (3) Whatever else speaks.
    (["train/NORMAL/a.png", "train/MASS/b.png"], None),
    (["train/MASS/a.png", "test/MASS/b.png"], None),
    (["NORMAL/train/a.png", "MASS/train/b.png", "NORMAL/test/c.png"], None),
    (["train/NORMAL/a.png", "test/NORMAL/b.png", "c.png"], None),
    (["train/NORMAL/a.png", "test/NORMAL/b.png", "extra/NORMAL/c.png"], None),
    (["x/train/NORMAL/a.png", "x/test/NORMAL/b.png"], None),
    (["Train_set/NORMAL/a.png", "test/NORMAL/b.png"], None),
    (["chest_test/a.png"], None), (["stage_2_train_images/a.png"], None),
    (["testing/a.png"], None), (["validation/a.png"], None), (["0_normal/a.png"], None),
    (["NORMAL/a.png", "healthy/b.png"], None), (["NORMAL/a.png", "not normal/b.png"], None),
    (["NORMAL/NORMAL/a.png", "MASS/b.png"], None)])
def test_folders_are_read_in_one_layout_and_refused_where_they_say_something_else(
        tmp_path, capsys, tree, expected):
    write_films(tmp_path, *tree)
    if expected is None:
        with pytest.raises(afire.InputError, match="make_table.py folders"):
            load(tmp_path)
    else:
        data = load(tmp_path)
        found = {name: "|".join(words) or "normal" for name, words in findings_of(data).items()}
        assert found == expected
        printed = capsys.readouterr().out
        assert ("all images count as normal" in printed) == (set(expected.values()) == {"normal"})
        assert f"{len(expected)} images without one count as one each" in printed
        if "TEST" in "".join(tree):
            assert names(data, data.test) == {name for name in expected if "test" in name.lower()}


def test_a_table_says_everything(tmp_path, capsys):
    folder = tmp_path / "set"
    write_films(folder, *[f"{name}.png" for name in "abcdefg"], "masks/train/h.png", ".i.png")
    labels = table(tmp_path / "t.csv", "a.png,No Finding,1,train,x",
                   "b.png,Mass|nodule, 2 ,train,x", "c.png, mass ,3,test,x", "d.png,,3,train,x",
                   "e.png,Healthy,,test,x", "f.png,,5,,x", ",,,,",
                   "masks/train/h.png,No_Finding,6,train,x",
                   "nowhere.png,mass,9,train,x", "", " b.png ,nodule| MASS,2,train,y",
                   "other.png,mass,9,train,x", ".i.png,mass,9,train,x",
                   header="\ufeff IMAGE , Findings,Patient,Split,fold")
    data = load(folder, labels)
    assert findings_of(data) == {"a.png": set(), "b.png": {"mass", "nodule"}, "c.png": {"mass"},
                                 "e.png": set(), "masks/train/h.png": set()}
    assert names(data, data.test) == {"c.png", "e.png"}
    patients = dict(zip(data.names, data.patients))
    assert [patients[name] for name in ("a.png", "b.png", "c.png", "e.png")] == [
        "1", "2", "3", "e.png"]
    printed = capsys.readouterr().out
    assert counted(printed) == {".i.png": 1, "d.png": 1, "f.png": 1, "g.png": 1}
    assert "ignored columns: fold" in printed
    assert "3 rows without a file (first: .i.png)" in printed
    assert "5 patients; 1 images without one" in printed


def test_the_table_of_a_run_gives_the_same_set_again(run, radiographs):
    data = load(radiographs)
    again = load(radiographs, run / "table.csv")
    assert findings_of(again) == findings_of(data)
    for part in "train", "test":
        rows = getattr(data, part), getattr(again, part)
        assert [data.hashes[row] for row in rows[0]] == [again.hashes[row] for row in rows[1]]
    with open(run / "table.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["image"] for row in rows} == findings_of(data).keys()
    assert {(row["patient"], row["split_by"]) for row in rows} == {("", "given")}


def test_without_a_split_a_fixed_fifth_of_the_patients_is_held_out(tmp_path, capsys):
    """Today's and tomorrow's, on any machine: the names below are of test."""
    folder = tmp_path / "set"
    images = [f"{'NORMAL' if i % 2 else 'SICK'}/{i}.png" for i in range(80)]
    write_films(folder, *images)
    labels = table(tmp_path / "t.csv", *[f"{name},,{i // 2}," for i, name in enumerate(images)])
    for source in None, labels:
        data = load(folder, source)
        patients = np.array(data.patients)
        assert not set(patients[data.train]) & set(patients[data.test])
        assert 8 <= len(data.test) <= 24 and len(findings_of(data)) == 80
        assert data.split_by == "fixed fifth"
        tested = {name for name in images
                  if zlib.crc32(patients[data.names.index(name)].encode()) % 1000 < 200}
        assert names(data, data.test) == tested
    assert_printed(capsys, "80 images without one count", "40 patients\n", "fixed fifth")


@pytest.mark.parametrize("lines, header, message", [
    (["a.png,x"], "picture,findings", "line 1.*image and findings"),
    (["a.png,x,"], "image,findings,Findings", "line 1.*image and findings"),
    (["a.png;x"], "image;findings", "line 1.*image and findings"),
    ([], "", "line 1.*image and findings"), (["a.png"], "image,findings", "line 2"),
    (["b.png,x", "a.png,x,1"], "image,findings", "line 3"),
    (["a.png,x,dev"], "image,findings,split", "line 2"),
    (["a.png,Mass,1", "a.png,Mass,2"], "image,findings,patient", "line 3.*a.png"),
    (["b.png,x", "a.png,\"Mass", "c.png,", "d.png,"], "image,findings", "line 3.*quote"),
    (["b.png,x", "a.png,\"Mass", "c.png,\"x|y\""], "image,findings", "line 3.*quote"),
    (["a.png,\"" + 200_000 * "x"], "image,findings", "line 2"),
    (["b.png,x", "a.png,\udcff"], "image,findings", "line 3.*UTF-8"),
    (["view1_frontal.png,Mass"], "image,findings", "no image to use")])
def test_a_table_that_cannot_be_trusted_is_refused(tmp_path, lines, header, message):
    write_films(tmp_path / "set", "a.png", "b.png", "p1/view1_frontal.png", "p2/view1_frontal.png")
    with pytest.raises(afire.InputError, match=message):
        load(tmp_path / "set", table(tmp_path / "t.csv", *lines, header=header))


def test_a_table_in_utf_16_is_refused(tmp_path):
    write_films(tmp_path / "set", "a.png")
    (tmp_path / "t.csv").write_text("image,findings\na.png,\n", "utf-16")
    with pytest.raises(afire.InputError, match="line 1.*UTF-8"):
        load(tmp_path / "set", tmp_path / "t.csv")


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
    assert data.findings == ["mass"]


def test_names_in_any_bytes_do_no_harm_and_a_mistake_leaves_no_folder(tmp_path):
    folder = tmp_path / "set"
    images = [os.fsdecode(b"film \xff\xe9.png"), "R\u00f6ntgen \u80ba.png", "a\nnewline.png"]
    write_films(folder, *images)
    assert set(findings_of(load(folder))) == set(images)
    labels = table(tmp_path / "t.csv", *[f"\"{name}\",mass" for name in images[1:]],
                   header="image,findings")
    assert set(findings_of(load(folder, labels))) == set(images[1:])
    command = f"{COMMAND} pretrain --data {folder} --batch-size 1 --preset small --epochs 1"
    done = shell(f"{command} --labels {labels} --out {tmp_path}/run")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert len(done.stderr.splitlines()) == 1 and "no image in train is normal" in done.stderr
    done = shell(f"{command} --out {tmp_path}/run")
    assert done.returncode == 0, done.stderr


def test_what_failed_is_tried_again_and_nothing_else_is_decoded_again(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    write_films(folder, "a.png", "b.png", "c.png")
    Image.new("L", (9, 9)).save(folder / "blank.png")
    shutil.copy(folder / "a.png", folder / "equal.png")
    turn = ImageOps.exif_transpose                         # called once for a file that is decoded
    read = Mock(side_effect=PermissionError)
    monkeypatch.setattr(ImageOps, "exif_transpose", read)
    with pytest.raises(afire.InputError, match="5 unreadable .PermissionError. .first: a.png"):
        load(folder)
    read.side_effect = turn
    for _ in range(2):
        assert set(findings_of(load(folder))) == {"a.png", "b.png", "c.png"}
    assert read.call_count == 5 + 5
    for levels in "file", "equal":
        data = afire.load_radiographs(folder, 32, levels=levels, cache=f"{folder}.cache")
        assert np.array_equal(data.images[0, 0], afire.read_image(folder / "a.png", 32, levels))
    for seed in 9, 10:                                     # two files of the same size
        Image.fromarray(film(seed, 24)).save(folder / "a.png", compress_level=0)
        os.utime(folder / "a.png", (seed, seed))
        data = load(folder)
        assert np.array_equal(data.images[0, 0], afire.read_image(folder / "a.png", 8))
        content = (folder / "a.png").read_bytes()
        assert data.hashes[0] == hashlib.sha256(content).hexdigest()[:16]


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


MEANING = {"NORMAL": "normal", "no_finding": "normal", "Healthy": "normal", "0_normal": "speaks",
           "Mass": "", "abnormal": "", "p1": "", "contest": "", "train": "train", "TEST": "test",
           "val": "val", "chest_test": "speaks", "Training": "speaks", "lung masks": "mask",
           ".hidden": "hidden"}
FOLDERS = st.sampled_from(list(MEANING))
FILES = st.sampled_from(["a.png", "b.PNG", "c.jpg", "d.txt", "e.tif"])
PATHS = st.tuples(st.lists(FOLDERS, max_size=3), FILES).map(lambda x: "/".join([*x[0], x[1]]))
CLASSES = st.sampled_from(["NORMAL/", "Mass/p1/", "Mass/", "abnormal/"])
STRICT = st.tuples(CLASSES, FILES).map("".join)
SPLIT = st.tuples(st.sampled_from(["train/", "TEST/", "val/"]), STRICT).map("".join)
TREES = st.one_of(*[st.dictionaries(paths, st.integers(-2, 6), min_size=1, max_size=14)
                    for paths in (PATHS, STRICT, SPLIT, st.one_of(STRICT, PATHS))])
ROWS = st.tuples(st.integers(0, 13), st.sampled_from(["", "No Finding", "Mass", "mass|Nodule"]),
                 st.sampled_from(["", "1", "2"]), st.sampled_from(["", "train", "test"]))


def case_of(files):
    """-> 1, 2 or 3 of the data contract, {name: (findings, split)} of the images that are read."""
    trees = {}
    for name in files:
        meanings = [MEANING[folder] for folder in name.split("/")[:-1]]
        if name[-4:].lower() in (".png", ".jpg") and not {"mask", "hidden"} & set(meanings):
            trees[name] = (name.split("/")[:-1], meanings)
    if not any(any(meanings) for _, meanings in trees.values()):
        return 1, {name: (set(), None) for name in trees}
    for depth in 0, 1:
        read = {}
        classes = set()
        strict = True
        for name, (folders, meanings) in trees.items():
            split = meanings[0] if meanings and depth else None
            if depth and split not in ("train", "test", "val"):
                strict = False
            elif split != "val" and len(folders) > depth:
                own = meanings[depth]
                strict &= own in ("", "normal") and not any(meanings[depth + 1:])
                classes.add((folders[depth].lower().replace("_", " "), own))
                read[name] = (set() if own else {folders[depth].lower()}, split)
        parts = {meanings[0] for _, meanings in trees.values() if meanings}
        strict &= not depth or {"train", "test"} <= parts
        if strict and [own for _, own in classes].count("normal") == 1:
            return 2, read
    return 3, {}


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(TREES, st.none() | st.lists(ROWS, max_size=14))
def test_nobody_and_no_content_is_in_both_parts_and_the_counts_add_up(files, rows):
    """files: {path: content}, of which -1 is broken, -2 blank; rows of the table, by number of the
    file. Without a table exactly one of the three cases of the data contract holds."""
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()) as out:
        folder = Path(place, "set")
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((2, 2), 9, np.uint8)
            pixels[0, 0] += 30 * (content + 2)
            Image.fromarray(pixels).save(folder / name, "png")
            if content == -1:
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
    printed = out.getvalue()
    usable = {name for name, content in files.items() if content >= 0}
    if labels is None:
        case, read = case_of(files)
        assert ("make_table.py folders" in printed) == (case == 3)
        assert ("all images count as normal" in printed) == (case == 1)
        assert bool(data) == (case != 3 and bool(read.keys() & usable))
        if case == 3:
            return
    findings = findings_of(data) if data else {}
    assert sum(counted(printed).values()) + len(findings) == len(files), printed
    if data:
        patients = np.array(data.patients)
        assert not set(patients[data.train]) & set(patients[data.test])
        assert f"\n{len({patients[row] for row in (*data.train, *data.test)})} patients" in printed
        assert len({data.hashes[row] for row in (*data.train, *data.test)}) == len(findings)
        assert findings.keys() <= usable
        for name, found in findings.items():
            if labels:
                assert found >= set(known[name][0].lower().split("|")) - {"", "no finding"}
            else:
                assert found >= read[name][0]
                part = "test" if name in names(data, data.test) else "train"
                assert read[name][1] in (None, part)
            equal = [other for other in usable if files[other] == files[name]]
            everything = [set(known[other][0].lower().split("|")) - {"", "no finding"}
                          if labels else read[other][0] for other in equal
                          if other in (known if labels else read)]
            assert found <= set().union(*everything)


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
    assert np.array_equal(data.masks, masks.any(1)) and data.findings == findings
    assert sorted([*data.train, *data.test]) == list(range(2500)) and len(data.test) == 500
    assert len(set(data.hashes)) == len(set(data.patients)) == 2500


# ---- Figures -------------------------------------------------------------------------------------

def test_a_picture_has_a_column_a_title_photographs_in_grey_and_maps_in_colour(monkeypatch,
                                                                               tmp_path):
    figures = []
    monkeypatch.setattr(afire.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16), np.uint8)
    maps = np.random.default_rng(1).random((3, 4, 4))
    afire.plot_images(tmp_path / "a.png", {"image": images, "score": maps})
    axes = np.reshape(figures[0].axes, (3, 2))
    assert [axis.get_title() for axis in axes[0]] == ["image", "score"]
    for column, values, colours in (0, images, "gray"), (1, maps, "magma"):
        for axis, expected in zip(axes[:, column], values):
            shown = axis.images[0]
            np.testing.assert_array_equal(shown.get_array(), expected)
            assert shown.get_cmap().name == colours
            assert shown.get_clim() == (values.min(), values.max())


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
    "pretrain --lr nan": "lr", "pretrain --seed -1": "seed", "pretrain --colour red": "colour",
    "pretrain --img-size 30": "img-size", FINE + "--batch-size 0": "batch.size",
    FINE + "--batch-size 64": "batch-size", FINE + "--out {tmp}/odd.csv/run": "odd.csv",
    "pretrain --data {tmp}/nowhere": "nowhere", "pretrain --data {tmp}/empty": "empty",
    "pretrain --data {tmp}/broken": "broken", "pretrain --data {tmp}/fine/a.png": "a.png",
    "pretrain --data {tmp}/sick": "is normal.*mass", "pretrain --labels {tmp}/odd.csv": "--data",
    FINE + "--labels {tmp}/no.csv": "no.csv", FINE + "--labels {tmp}/odd.csv": "odd.csv",
    FINE + "--init {tmp}/no.pth": "no.pth",
    FINE + "--init {run}/checkpoint.pth --patch-size 16": "checkpoint.pth",
    "eval --ckpt {run} --img-size 0": "img-size", "eval --ckpt {tmp}/nowhere": "nowhere",
    "eval --ckpt {run} --labels {tmp}/odd.csv": "odd.csv",
    "eval --ckpt {tmp}/odd.csv": "odd.csv", "eval --ckpt {run} --data {tmp}/sick": "sick",
    "eval --ckpt {run}/encoder.pth --data {tmp}/fine": "--labels",
    "eval --ckpt {run}/encoder.pth --data {tmp}/fine --img-size 30": "img-size"}


@pytest.mark.parametrize("command", MISTAKES)
def test_bad_input_ends_in_one_sentence_that_names_it(tmp_path, run, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_films(tmp_path, "sick/MASS/a.png", "fine/a.png", "fine/b.png")
    for name in "sick/NORMAL/b.png", "broken/a.png", "odd.csv":
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("file,label\na.png,1\n")
    device = "" if "--device" in command else " --device cpu"
    sentence = refusal(capsys, (command + device).format(tmp=tmp_path, run=run).split())
    assert sentence.startswith("afire.py") and re.search(MISTAKES[command], sentence)


README = Path(afire.__file__).with_name("README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("n", range(README.count("```python\n")))
def test_the_readme_examples_run(tmp_path, monkeypatch, n):
    monkeypatch.chdir(tmp_path)
    exec(README.split("```python\n")[1 + n].split("```")[0], {})
