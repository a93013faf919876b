"""Tests of afire.py, each against something written independently of it: a plain loop from the
equation in float64, timm, scikit-learn, OpenCV, or a property that must hold whatever the input.

They need pytest, timm, scikit-learn and opencv-python-headless; `pytest test_afire.py` runs them.
"""

import argparse
import contextlib
import copy
import csv
import functools
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import cv2
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sklearn.covariance
import sklearn.linear_model
import sklearn.metrics
import sklearn.neighbors
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import afire


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@functools.cache
def phantom_images(n, size):
    """Phantoms as a model takes them: (n, 1, size, size) in [0, 1]."""
    return torch.from_numpy(afire.phantoms(n, size)[0]).float() / 255


def odd_images(height, width, seed):
    """(8, 1, H, W): a phantom, noise, blobs, one bright pixel, constants."""
    random = np.random.default_rng(seed)
    phantom = cv2.resize(phantom_images(4, 64)[seed % 4, 0].numpy(), (width, height))
    noise, pixel = random.random((height, width)), np.zeros((height, width))
    blobs = cv2.GaussianBlur(random.random((height, width)), (0, 0), width / 12)
    blobs = (blobs - blobs.min()) / np.ptp(blobs)
    pixel[random.integers(height), random.integers(width)] = 1
    flat = [np.full((height, width), grey) for grey in (0, 0.3, 0.95, 1)]
    return torch.from_numpy(np.stack([phantom, noise, blobs, pixel, *flat])).float().unsqueeze(1)

# --------------------------------------------------------------------------------------------------
# Synthetic lesion mask
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(32, 32), (64, 64), (97, 97), (224, 224), (64, 97)])
@pytest.mark.parametrize("seed", range(8))
def test_lesions_keep_their_promises_for_any_image(size, seed):
    images = odd_images(*size, seed)
    lesioned, mask = afire.synthetic_lesion_mask(images, seeded(seed))
    assert torch.equal(images, odd_images(*size, seed)), "the input is left alone"
    for each in lesioned, mask:
        assert each.shape == images.shape and each.dtype == torch.float32
        assert each.min() >= 0 and each.max() <= 1                     # never NaN
    assert ((mask == 0) | (mask >= 1 / 255)).all()
    assert (lesioned >= images).all() and torch.equal(lesioned[mask == 0], images[mask == 0])
    assert (lesioned <= images.clamp_min(235 / 255) + 1e-6).all()
    below = images + mask < 235 / 255
    torch.testing.assert_close(lesioned[below], (images + mask)[below])
    assert (mask[4] == 0).all(), "black tissue makes black lesions"
    assert (mask[5:].flatten(1).amax(1) > 0.1).all(), "bright tissue makes bright ones"


def test_lesions_follow_the_generator_and_the_image_alone():
    images = odd_images(64, 64, 0)
    once, again, other = (afire.synthetic_lesion_mask(images, seeded(s))[1] for s in (1, 1, 2))
    assert torch.equal(once, again) and not torch.equal(once[0], other[0])
    assert not torch.allclose(once[5] / 0.3, once[7]), "each image of a batch draws its own"
    images[3] = images[1]
    same = (afire.synthetic_lesion_mask(images, seeded(1))[1] == once).flatten(1).all(1)
    assert same.tolist() == [i != 3 for i in range(8)]


@pytest.mark.parametrize("seed", range(6))
def test_a_random_affine_is_opencvs_of_the_same_square(seed):
    """Images whose brightness tells their pixels' x and y also tell which square was taken."""
    ramp = torch.arange(64.).expand(1, 1, 64, 64)
    x, y = (afire.random_affine(each, seeded(seed))[0][0, 0].numpy() for each in (ramp, ramp.mT))
    corners = (0, 0), (0, 63), (63, 0), (63, 63)
    taken = np.float32([(x[corner], y[corner]) for corner in corners])
    side = np.hypot(*(taken[1] - taken[0])) / 63
    assert 0.499 < side < 0.851 and 0 <= taken.min() <= taken.max() <= 63
    assert np.hypot(*(taken[2] - taken[0])) / 63 == pytest.approx(side, abs=1e-4)
    assert abs(taken[1] - taken[0])[1] <= side * 63 * math.sin(math.radians(10)) + 1e-4
    image = phantom_images(4, 64)[:1]
    cropped, mask = afire.random_affine(image, seeded(seed))
    forward = cv2.getAffineTransform(taken[:3], np.float32([(0, 0), (63, 0), (0, 63)]))
    expected = cv2.warpAffine(image[0, 0].numpy(), forward, (64, 64), flags=cv2.INTER_LINEAR)
    assert np.abs(cropped[0, 0].numpy() - expected).max() < 0.02 and not mask.any()


def test_a_random_affine_depends_on_its_place_in_the_batch_alone():
    images = odd_images(48, 48, 1)
    whole, part = afire.random_affine(images, seeded())[0], afire.random_affine(
        images[5:], seeded(), 5)[0]
    torch.testing.assert_close(part, whole[5:])


def test_there_are_one_to_four_lesions_anywhere_and_overlaps_add_up():
    mask = afire.synthetic_lesion_mask(torch.full((600, 1, 112, 112), 0.3), seeded())[1][:, 0]
    regions = {cv2.connectedComponents(np.uint8(each > 0))[0] - 1 for each in mask.numpy()}
    assert regions == {1, 2, 3, 4}
    peak, reached = mask.amax((1, 2)), (mask > 0).any(0)
    assert (peak > 0.95 * 0.15).all() and (peak < 4 * 0.15).all() and (peak > 1.2 * 0.15).sum() > 30
    assert all(edge.any() for edge in (reached[0], reached[-1], reached[:, 0], reached[:, -1]))


def texture_centre_by_opencv(image):
    """(H, W) in [0, 1] -> y, x of the largest bright region's minimum enclosing circle."""
    bright = cv2.threshold(np.uint8(np.round(image * 255)), 0, 1, cv2.THRESH_OTSU)[1]
    _, labels, stats, _ = cv2.connectedComponentsWithStats(bright, connectivity=8)
    region = labels == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
    (x, y), _ = cv2.minEnclosingCircle(np.argwhere(region)[:, ::-1].astype(np.float32))
    return y, x


def sides_of_one_lesion(image, mask):
    """Height and width if one whole lesion, made by OpenCV, explains the mask; None if not."""
    (top, left), (bottom, right) = np.argwhere(mask > 0).min(0), np.argwhere(mask > 0).max(0) + 1
    u, v = np.meshgrid(np.linspace(-1, 1, 60), np.linspace(-1, 1, 60))
    window = np.exp(-(u * u + v * v) / 0.5)
    window = 0.5 * (window - window.min()) / (window.max() - window.min())
    y, x = (round(centre) - 30 for centre in texture_centre_by_opencv(image))
    for i in {min(max(y + d, 0), 224 - 60) for d in range(-4, 5)}:     # within 4 px
        for j in {min(max(x + d, 0), 224 - 60) for d in range(-4, 5)}:
            lesion = cv2.resize(window * image[i:i + 60, j:j + 60], (right - left, bottom - top))
            if np.abs(lesion - mask[top:bottom, left:right]).max() < 1.01 / 255:
                return bottom - top, right - left


def test_a_lesion_equals_one_made_by_opencv():
    images = (0.2 + 0.8 * phantom_images(12, 224)).repeat(16, 1, 1, 1)  # lifted: no lesion is faint
    mask = afire.synthetic_lesion_mask(images, seeded())[1]
    sides = map(sides_of_one_lesion, images[:, 0].numpy(), mask[:, 0].numpy())
    sides = np.array([each for each in sides if each])
    assert 30 <= len(sides) <= 70, "a quarter of 192 images has one lesion, the others have more"
    assert 16 <= sides.min() < 28 and 116 < sides.max() <= 128 and 60 < sides.mean() < 84


@pytest.mark.parametrize("seed", range(10))
def test_otsu_threshold_and_largest_region_are_opencvs(seed):
    images = (odd_images(64, 97, seed)[:3, 0] * 255).round()           # phantom, noise, blobs
    bright = images > afire.otsu_threshold(images.long()).view(-1, 1, 1)
    for ours, image in zip(bright.numpy(), images.numpy()):
        assert np.array_equal(ours, cv2.threshold(np.uint8(image), 0, 1, cv2.THRESH_OTSU)[1] > 0)
    bright[1] = torch.rand(64, 97, generator=seeded(seed)) < 0.3 + 0.02 * seed
    turn = torch.linspace(0, 28, 4000)
    y, x = (32 + turn * turn.sin()).long(), (48 + turn * turn.cos()).long()
    spiral = torch.zeros(1, 64, 97, dtype=torch.bool)
    spiral[0, y[seed * 50:], x[seed * 50:]] = True
    bright = torch.cat([bright, spiral])
    for region, each in zip(afire.largest_region(bright).numpy(), bright.numpy()):
        _, labels, stats, _ = cv2.connectedComponentsWithStats(np.uint8(each), connectivity=8)
        assert region.sum() == stats[1:, cv2.CC_STAT_AREA].max()
        assert len(set(labels[region])) == 1, "it is one region, and whole, as its area is right"


def test_texture_centre_is_within_4_pixels_of_opencvs():
    blobs = [odd_images(224, 224, seed)[2] for seed in range(20)]
    images = torch.cat([torch.stack(blobs), phantom_images(12, 224)])[:, 0]
    levels = (images * 255).round().long()
    bright = levels > afire.otsu_threshold(levels).view(-1, 1, 1)
    centres = afire.enclosing_circle_centre(afire.largest_region(bright))
    exact = torch.tensor([texture_centre_by_opencv(image) for image in images.numpy()])
    assert (centres - exact).norm(dim=1).max() <= 4

# --------------------------------------------------------------------------------------------------
# Vision Transformer
# --------------------------------------------------------------------------------------------------

def test_patchify_cuts_rows_of_patches_and_unpatchify_undoes_it():
    images = torch.randn(2, 3, 32, 32)
    patches = afire.patchify(images, 8)
    assert torch.equal(patches[1, 6], images[1, :, 8:16, 16:24].flatten())
    assert torch.equal(afire.unpatchify(patches, 8), images)
    assert torch.equal(afire.patchify(afire.unpatchify(patches, 8), 8), patches)


def timm_vit(**options):
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    return timm.models.VisionTransformer(num_classes=0, norm_layer=norm, **options).eval()


def test_vit_computes_what_timm_computes_with_the_same_weights():
    size = {"img_size": 48, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 4}
    ours, theirs = afire.ViT(**size), timm_vit(**size)
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(ours(images), theirs.forward_features(images), atol=1e-5, rtol=1e-4)


def test_vit_of_some_tokens_is_the_vit_without_the_others():
    torch.manual_seed(0)
    vit, images = afire.ViT(32, 8, 3, 32, 2, 2), torch.randn(3, 3, 32, 32)
    seen = torch.rand(3, 16, generator=seeded()).argsort(1) < 5
    tokens = vit(images, seen)
    patches = vit.patch_embed.proj(images).flatten(2).mT + vit.pos_embed[:, 1:]
    for i, each in enumerate(seen):                                    # one image after the other
        few = vit.norm(vit.blocks(torch.cat([vit.cls_token, patches[i:i + 1, each]], 1)))
        torch.testing.assert_close(tokens[i, 1:][each], few[0, 1:])
        torch.testing.assert_close(tokens[i, 0], few[0, 0])
        assert (tokens[i, 1:][~each] == 0).all()
    torch.testing.assert_close(vit(images, torch.ones_like(seen)), vit(images))


def test_positions_are_those_of_mae():
    """Half the channels tell the column, half the row: first the sines, then the cosines."""
    positions = afire.ViT(40, 8, embed_dim=24, depth=1, num_heads=1).pos_embed
    assert not positions.requires_grad and (positions[0, 0] == 0).all()
    for row, column in np.ndindex(5, 5):
        expected = []
        for place in column, row:
            angles = [place / 10000 ** (i / 6) for i in range(6)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        ours = positions[0, 1 + 5 * row + column]
        torch.testing.assert_close(ours, torch.tensor(expected), atol=1e-6, rtol=0)


@torch.no_grad()
def test_decoder_sees_all_but_the_masked_tokens():
    decoder = afire.Decoder(32, 8, 2, 24, embed_dim=32, depth=2, num_heads=2)
    tokens, abnormal = torch.randn(2, 17, 24), torch.rand(2, 16) < 0.5
    image, hidden = decoder(tokens, abnormal), F.pad(abnormal, (1, 0)).unsqueeze(2)
    assert image.shape == (2, 2, 32, 32)
    assert torch.equal(decoder(tokens + 9 * hidden, abnormal), image)
    for place in (~hidden[0, :, 0]).nonzero():                         # the class token among them
        changed = tokens.clone()
        changed[0, place] += 1
        moved = (decoder(changed, abnormal) != image).flatten(1).any(1)
        assert moved.tolist() == [True, False]
    for place in range(16):                                            # one mask token for each
        changed = copy.deepcopy(decoder)
        changed.mask_token[..., place, :] += 1
        moved = (changed(tokens, abnormal) != image).flatten(1).any(1)
        assert torch.equal(moved, abnormal[:, place])

# --------------------------------------------------------------------------------------------------
# Projection head and prototypes
# --------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_head_equals_a_loop_over_weight_normalised_layers():
    head = afire.AnatomyHead(12, 9, 7, hidden_dim=20, bottleneck_dim=5)
    tokens = torch.randn(3, 9, 12)
    for position, logits in enumerate(head(tokens).unbind(1)):
        layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, 7, bias=False))
        layer.parametrizations.weight.original0.fill_(1)
        layer.parametrizations.weight.original1.copy_(head.last_layers[position])
        x = tokens[:, position]
        for i in 0, 2, 4:
            x = F.linear(F.gelu(x) if i else x, head.mlp[i].weight, head.mlp[i].bias)
        torch.testing.assert_close(logits, layer(x / x.norm(dim=1, keepdim=True)))


def naive_sinkhorn(scores, epsilon=0.05, iterations=3):
    """As published: in probabilities, columns to 1 / K and rows to 1 / L in turn."""
    c = np.exp((scores - scores.max()) / epsilon)
    c /= c.sum()
    for _ in range(iterations):
        c /= c.sum(0, keepdims=True) * c.shape[1]
        c /= c.sum(1, keepdims=True) * c.shape[0]
    return c * c.shape[0]


@pytest.mark.parametrize("shape, options", [
    ((16, 16), {}), ((1, 5), {}), ((9, 1), {}), ((30, 8), {"epsilon": 0.2, "iterations": 5})])
def test_sinkhorn_equals_its_original_form(shape, options):
    scores = np.random.default_rng(0).uniform(-0.5, 0.5, shape)
    ours = afire.sinkhorn(torch.from_numpy(scores).float(), **options)
    np.testing.assert_allclose(ours, naive_sinkhorn(scores, **options), atol=2e-5)


def test_sinkhorn_sums_rows_to_one_spreads_over_columns_and_survives_huge_scores():
    scores = 0.1 * torch.randn(64, 16, generator=seeded())
    for iterations, tolerance in (3, 0.6), (50, 0.004):
        assignment = afire.sinkhorn(scores, iterations=iterations)
        assert (assignment.sum(1) - 1).abs().max() < 1e-6
        assert (assignment.sum(0) - 64 / 16).abs().max() < tolerance
    for dtype in torch.float32, torch.bfloat16, torch.float16:
        for size in 1e3, 1e5:
            assert (afire.sinkhorn((size * scores).to(dtype)).sum(1) - 1).abs().max() < 1e-4


def test_prototypes_copy_the_first_mean_then_run_each_on_its_own():
    first, second, third = torch.randn(3, 4, 6, 5)
    ours, loaded = afire.SpatialPrototypes(6, 5), afire.SpatialPrototypes(6, 5)
    ours.update(first)
    expected = first.mean(0)
    torch.testing.assert_close(ours.prototypes, expected)
    ours.update(second)
    expected = 0.75 * expected + 0.25 * second.mean(0)
    torch.testing.assert_close(ours.prototypes, expected)
    torch.testing.assert_close(ours.assignment(), afire.sinkhorn(expected))

    loaded.load_state_dict(ours.state_dict())
    changed = third.clone()
    changed[:, 2] += 1                                                 # position 2 in all images
    ours.update(third, momentum=0.1)
    loaded.update(changed, momentum=0.1)                               # not as if it were the first
    torch.testing.assert_close(ours.prototypes, 0.1 * expected + 0.9 * third.mean(0))
    same = (ours.prototypes == loaded.prototypes).all(1)
    assert same.tolist() == [True, True, False, True, True, True]

# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------

def naive_structure(logits, assignment, abnormal, temperature=0.1):
    losses = []
    for i, j in np.ndindex(abnormal.shape):
        if not abnormal[i, j]:
            q = np.exp(logits[i, j] / temperature)
            losses.append(-(assignment[j] * np.log(q / q.sum())).sum())
    return sum(losses) / max(len(losses), 1)


def naive_category(logits, prototypes, abnormal, temperature=0.1):
    """At each position the prototype picks a normal token out of it and the mean abnormal one."""
    losses = []
    for j, p in enumerate(prototypes):
        cosines = [q @ p / math.sqrt((q @ q) * (p @ p)) for q in logits[:, j]]
        likeness = np.exp(np.array(cosines) / temperature)
        normal, others = likeness[~abnormal[:, j]], likeness[abnormal[:, j]]
        if len(others):
            losses += [-math.log(each / (each + others.mean())) for each in normal]
    return sum(losses) / max(len(losses), 1)


def naive_restoration(restored, target, _):
    return sum((a - b) ** 2 for a, b in zip(restored.flat, target.flat)) / restored.size


LOSSES = {"structure": (afire.structure_consistency_loss, naive_structure),
          "category": (afire.category_consistency_loss, naive_category),
          "restoration": (lambda a, b, _: afire.restoration_loss(a, b), naive_restoration)}


def loss_input(name, batch=5, share=0.4):
    """Student logits (B, 6, 4), what they are compared with, and a random share of abnormal."""
    logits = torch.rand(batch, 6, 4, generator=seeded(1)) * 2 - 1
    other = torch.rand(batch, 6, 4, generator=seeded(2)) * 2 - 1
    other = {"structure": other[0].softmax(1), "category": other[0], "restoration": other}[name]
    return logits, other, torch.rand(batch, 6, generator=seeded(3)) < share


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("batch, share", [(5, 0.4), (1, 0.4), (4, 0), (4, 1), (12, 0.1)])
def test_loss_and_gradient_equal_a_naive_loop_and_its_differences(name, batch, share):
    loss, naive = LOSSES[name]
    logits, *others = loss_input(name, batch, share)
    value = loss(logits.requires_grad_(), *others)
    value.backward()
    x, *others = (each.detach().numpy() for each in (logits.double(), *others))
    assert value.item() == pytest.approx(naive(x, *others), abs=1e-5)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-5
        slope = (naive(x + step, *others) - naive(x - step, *others)) / 2e-5
        assert logits.grad[index].item() == pytest.approx(slope, abs=1e-5)


def test_category_loss_of_some_tokens_is_that_without_the_others():
    logits, prototypes, abnormal = loss_input("category", 9, 0.5)
    seen = torch.rand(9, 6, generator=seeded(4)) < 0.5
    seen[:, 2], seen[:, 3] = ~abnormal[:, 2], abnormal[:, 3]           # one category is seen
    value = afire.category_consistency_loss(logits, prototypes, abnormal, seen)
    terms = []
    for j in range(6):                                                 # they may differ in number
        one = (logits[seen[:, j], j:j + 1], prototypes[j:j + 1], abnormal[seen[:, j], j:j + 1])
        terms += [naive_category(*(each.numpy() for each in one))] * int((~one[2]).sum()) * bool(
            one[2].any())
    assert terms and value.item() == pytest.approx(np.mean(terms), abs=1e-5)
    changed = torch.where(seen.unsqueeze(2), logits, math.pi)
    assert value == afire.category_consistency_loss(changed, prototypes, abnormal, seen)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_loss_of_half_precision_is_finite_and_computed_in_full(name, dtype, share):
    logits, *others = loss_input(name, share=share)
    for scale in 1, 1000:                                              # its square is not in fp16
        x = (scale * logits).to(dtype).requires_grad_()
        value = LOSSES[name][0](x, *others)
        value.backward()
        assert value.isfinite() and value.dtype == torch.float32 and x.grad.isfinite().all()
        assert value.item() == pytest.approx(LOSSES[name][0](x.float(), *others).item(), rel=1e-5)


TYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 7), st.integers(0, 10 ** 6),
                  st.sampled_from(TYPES),
                  st.sampled_from([0, 1e-8, 1, 100, 6e4]), st.sampled_from([0, 0.5, 1]))
def test_losses_are_finite_for_any_shape_value_and_type(
        batch, length, k, seed, dtype, scale, share):
    random = seeded(seed)
    logits = (scale * (2 * torch.rand(batch, length, k, generator=random) - 1)).to(dtype)
    logits.requires_grad_()
    prototypes = scale * (2 * torch.rand(length, k, generator=random) - 1)
    abnormal = torch.rand(batch, length, generator=random) < share
    losses = (afire.structure_consistency_loss(logits, afire.sinkhorn(prototypes), abnormal),
              afire.category_consistency_loss(logits, prototypes, abnormal))
    sum(losses).backward()
    assert all(loss.isfinite() and loss >= 0 for loss in losses) and logits.grad.isfinite().all()


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(st.integers(1, 3), st.integers(4, 80), st.integers(4, 80), st.integers(0, 999),
                  st.sampled_from(TYPES),
                  st.sampled_from([0, 1e-3, 1]))
def test_lesions_are_sound_for_any_shape_value_and_type(batch, height, width, seed, dtype, scale):
    images = (scale * torch.rand(batch, 1, height, width, generator=seeded(seed))).to(dtype)
    lesioned, mask = afire.synthetic_lesion_mask(images, seeded(seed))
    assert lesioned.shape == mask.shape == images.shape
    assert ((0 <= mask) & (mask <= 1)).all() and ((images <= lesioned) & (lesioned <= 1)).all()
    assert torch.equal(lesioned[mask == 0].to(dtype), images[mask == 0])


def test_category_loss_is_zero_for_one_category_and_log_2_at_chance():
    logits, prototypes, abnormal = loss_input("category")
    abnormal[:, :2], abnormal[:, 2:4], abnormal[1:, 4:] = False, True, False
    abnormal[0, 4:] = True                                             # both at positions 4 and 5
    value = afire.category_consistency_loss(logits.requires_grad_(), prototypes, abnormal)
    value.backward()
    assert value > 0 and (logits.grad[:, :4] == 0).all() and (logits.grad[:, 4:] != 0).any()
    assert afire.category_consistency_loss(logits[:, :4], prototypes[:4], abnormal[:, :4]) == 0
    alike = afire.category_consistency_loss(logits[:1].expand(5, -1, -1), prototypes, abnormal)
    assert alike.item() == pytest.approx(math.log(2), abs=1e-5)

# --------------------------------------------------------------------------------------------------
# AFiRe
# --------------------------------------------------------------------------------------------------

def tiny_model(**options):
    torch.manual_seed(0)
    return afire.AFiRe(**{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1,
                          "num_heads": 2, "out_dim": 16, "head_dim": 64, "decoder_dim": 32,
                          "decoder_depth": 1, "decoder_heads": 2, **options}).train()


def tiny_batch():
    images = phantom_images(160, 32)[:6]
    return images, *afire.synthetic_lesion_mask(images, seeded())


def test_forward_equals_its_parts():
    model, (normal, lesioned, mask) = tiny_model(weights=(2.0, 0.0, 5.0)), tiny_batch()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))                 # ImageNet's
    x, x_lesioned = (normal - mean) / std, (lesioned - mean) / std
    abnormal = torch.tensor([[patch.max() > 0 for patch in image]
                             for image in afire.patchify(mask, 8)])
    with torch.no_grad():
        prototypes = model.teacher.head(model.teacher.encoder(x)[:, 1:]).mean(0)
        tokens = model.student.encoder(x_lesioned)
        logits = model.student.head(tokens[:, 1:])
        expected = {
            "structure": afire.structure_consistency_loss(
                logits, afire.sinkhorn(prototypes), abnormal),
            "category": afire.category_consistency_loss(logits, prototypes, abnormal),
            "restoration": afire.restoration_loss(model.decoder(tokens, abnormal), x)}
        expected["loss"] = 2 * expected["structure"] + 5 * expected["restoration"]
        torch.testing.assert_close(model(normal, lesioned, mask), expected)


def test_what_the_student_does_not_see_changes_nothing():
    model, (normal, lesioned, mask) = tiny_model(), tiny_batch()
    seen = torch.rand(6, 16, generator=seeded()).argsort(1) < 6
    hide = afire.unpatchify((~seen).unsqueeze(2).expand(-1, -1, 64), 8)
    torch.manual_seed(1)
    noise = torch.rand_like(lesioned)
    with torch.no_grad():
        model.prototypes.update(model.teacher.head(model.features(normal)))
        model.eval()
        losses = model(normal, lesioned, mask, seen=seen)
        torch.testing.assert_close(
            losses, model(normal, torch.where(hide, noise, lesioned), mask, seen=seen))
        torch.testing.assert_close(
            model(normal, lesioned, mask), model(normal, lesioned, mask, seen=seen | True))
    assert all(losses[name] != value for name, value in model(normal, lesioned, mask).items())


def test_teacher_is_an_explicit_moving_average():
    model = tiny_model()
    expected = copy.deepcopy(dict(model.student.named_parameters()))
    assert all(torch.equal(p, expected[name]) for name, p in model.teacher.named_parameters())
    for momentum in 0.9, 0.5, 0.0, 0.99, 1.0:
        for name, parameter in model.student.named_parameters():
            parameter.data += torch.randn_like(parameter) * parameter.requires_grad
            expected[name] = momentum * expected[name] + (1 - momentum) * parameter.detach()
        model.update_teacher(momentum)
    for name, parameter in model.teacher.named_parameters():
        torch.testing.assert_close(parameter, expected[name])


def test_teacher_gets_no_gradient_and_is_never_in_train_mode():
    model = tiny_model()
    model(*tiny_batch())["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    for name, parameter in [*model.student.named_parameters(), *model.decoder.named_parameters()]:
        assert not parameter.requires_grad or parameter.grad is not None, name
    for each in model, model.eval().train():
        assert each.student.training and not any(m.training for m in each.teacher.modules())


def test_prototypes_are_saved_and_move_in_train_mode_only():
    model, batch = tiny_model(), tiny_batch()
    name, = (name for name in model.state_dict() if name.endswith("prototypes.prototypes"))
    model(*batch)
    first = model.state_dict()[name].clone()
    model.eval()(batch[0].flip(3), *batch[1:])
    assert torch.equal(model.state_dict()[name], first) and (first != 0).any()
    model.train()(batch[0].flip(3), *batch[1:])
    assert not torch.equal(model.state_dict()[name], first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seen", [None, torch.arange(16).expand(6, -1) % 3 > 0])
def test_autocast_gives_finite_losses_near_those_in_full(dtype, seen):
    """What is not seen comes to the head as zeros, of which half precision must make no 0 / 0."""
    full, model = tiny_model()(*tiny_batch(), seen=seen), tiny_model()
    with torch.autocast("cpu", dtype):
        losses = model(*tiny_batch(), seen=seen)
    losses["loss"].backward()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(full[name].item(), 0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_short_training_learns_both_tasks():
    images = phantom_images(160, 32)[~afire.phantoms(160, 32)[1].any(1)]
    model, generator, history = tiny_model(), seeded(), []
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(90):
        batch = images[torch.randperm(len(images), generator=generator)[:32]]
        losses = model(batch, *afire.synthetic_lesion_mask(batch, generator))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        model.update_teacher(0.97)
        history.append([losses[name].item() for name in ("structure", "category", "restoration")])
    structure, category, restoration = np.mean(history[-15:], 0)
    assert structure < 0.5 * history[0][0] and restoration < 0.3 * history[0][2]
    assert category < 0.95 * math.log(2), "below chance"

# --------------------------------------------------------------------------------------------------
# Data: files, labels, boxes
# --------------------------------------------------------------------------------------------------

GREY = np.random.default_rng(0).integers(0, 256, (24, 24), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (24, 24, 3), np.uint8)
DEEP = np.random.default_rng(2).integers(900, 3000, (24, 24), np.uint16)
SCALED = (DEEP - float(DEEP.min())) / (float(DEEP.max()) - DEEP.min()) * 255
PALETTE = Image.fromarray(COLOUR).quantize(16)
LUMA = [0.299, 0.587, 0.114]


@pytest.mark.parametrize("name, image, expected, tolerance", [
    ("grey.png", GREY, GREY, 0), ("grey.bmp", GREY, GREY, 0), ("grey.jpg", GREY, GREY, 40),
    ("bits.png", GREY > 99, 255 * (GREY > 99), 0), ("rgb.png", COLOUR, COLOUR @ LUMA, 1),
    ("rgba.png", np.dstack([COLOUR, GREY]), COLOUR @ LUMA, 1),
    ("grey_alpha.png", np.dstack([GREY, GREY.T]), GREY, 0),
    ("palette.png", PALETTE, np.asarray(PALETTE.convert("RGB")) @ LUMA, 1),
    ("deep.png", DEEP, SCALED, 1), ("deep.tif", DEEP, SCALED, 1),
    ("float.tiff", DEEP.astype(np.float32) / 7e6 - 1, SCALED, 1),
    ("flat.png", np.full((24, 24), 700, np.uint16), 0, 0),
    ("wide.png", np.tile(np.linspace(0, 255, 120), (40, 1)).astype(np.uint8),
     np.linspace(0, 255, 24), 6)])                                     # squashed, not cropped
def test_any_kind_of_file_becomes_a_grey_square(tmp_path, name, image, expected, tolerance):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(tmp_path / name)
    pixels = afire.read_image(tmp_path / name, 24)
    assert pixels.shape == (24, 24) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(float) - expected).max() <= tolerance


def test_equal_levels_are_mean_ranks_whatever_the_exposure(tmp_path):
    for name, image in ("a", GREY), ("b", 128 * (GREY / 255) ** 0.3), ("c", 0 * GREY):
        Image.fromarray(np.uint8(image)).save(tmp_path / f"{name}.png")
    a, b, c = (afire.read_image(tmp_path / f"{name}.png", 24, equal=True) for name in "abc")
    rank = [[(GREY < each).mean() + (GREY == each).mean() / 2 for each in row] for row in GREY]
    assert np.abs(a - 255 * np.array(rank)).max() <= 0.5001 and (c == 128).all()
    assert np.abs(a.astype(float) - b).max() < 12, "but for the levels that were rounded away"


def save_images(folder, *names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(GREY, i)).save(folder / name)


def load(data, **options):
    return afire.load_radiographs(argparse.Namespace(**{
        "data": str(data), "root": None, "labels": None, "cache": None, "img_size": 24,
        "test_fraction": 0.5, "out": str(data.parent / "run"), **options}))


def names(data, rows=slice(None)):
    return [data.records[i]["path"].name for i in np.arange(len(data.records))[rows]]


def assert_split_by_patient(data, patient_of, patients):
    train, test = ({patient_of(name) for name in names(data, rows)}
                   for rows in (data.train, data.test))
    assert train and test and not train & test and len(train | test) == patients


FAULTS = {
    "empty.png": lambda file: file.write_bytes(b""),
    "text.png": lambda file: file.write_text("a letter, not a picture"),
    "cut.png": lambda file: file.write_bytes(png(GREY)[:-40]),
    "cut.jpg": lambda file: (Image.fromarray(GREY).save(file), os.truncate(file, 300)),
    "nan.tif": lambda file: Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(file),
    "bomb.png": lambda file: Image.new("1", (20000, 20000)).save(file),
    "loop.png": lambda file: file.symlink_to(file.name),
    "folder.png": lambda file: file.mkdir()}


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "png")
    return stream.getvalue()


def test_faulty_files_are_left_out_and_odd_ones_are_read(tmp_path, capsys):
    folder = tmp_path / "images"
    odd = ["a name with spaces.png", "ein Röntgenbild \u80ba.png", "a\nnewline.png", "wide.png",
           "one.png", "cmyk.jpg", "moving.png", "black.png"]
    save_images(folder, *odd[:3])
    Image.new("L", (20000, 10)).save(folder / "wide.png")
    Image.new("L", (1, 1)).save(folder / "one.png")
    Image.new("CMYK", (30, 30)).save(folder / "cmyk.jpg")
    frames = [Image.new("L", (30, 30), grey) for grey in (50, 200)]
    frames[0].save(folder / "moving.png", save_all=True, append_images=frames[1:])
    Image.new("L", (30, 30)).save(folder / "black.png")
    for name, make in FAULTS.items():
        make(folder / name)
    (folder / "again").symlink_to(folder, target_is_directory=True)
    data = load(folder, cache=tmp_path / "cache")
    told = capsys.readouterr().out
    assert all(name in told for name in FAULTS) and not any(name in told for name in odd)
    read = {data.records[row]["name"] for row in np.union1d(data.train, data.test)}
    assert read == set(odd)


def dicom(file, pixels, interpretation="MONOCHROME2", **tags):
    """A 12-bit DICOM file of pixels."""
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset = pydicom.dataset.FileDataset(str(file), {}, file_meta=meta, preamble=bytes(128))
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, interpretation
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation, dataset.PixelData = 0, pixels.astype(np.uint16).tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(file)


def test_dicom_is_read_as_it_is_meant_to_be_seen(tmp_path):
    ramp = np.tile(np.arange(0, 4096, 128), (32, 1))
    dicom(tmp_path / "plain.dcm", ramp)
    dicom(tmp_path / "inverted.dcm", ramp, "MONOCHROME1")
    dicom(tmp_path / "scaled.dcm", ramp, RescaleSlope=2, RescaleIntercept=-1000)
    dicom(tmp_path / "window.dcm", ramp, WindowCenter=2048, WindowWidth=1024)
    plain, inverted, scaled, window = (
        afire.read_image(tmp_path / f"{name}.dcm", 32).astype(int)[0]
        for name in ("plain", "inverted", "scaled", "window"))
    np.testing.assert_allclose(plain, np.linspace(0, 255, 32), atol=1)
    np.testing.assert_allclose(inverted, plain[::-1], atol=1)
    np.testing.assert_allclose(scaled, plain, atol=1)
    assert (window[:12] == 0).all() and (window[20:] == 255).all() and 100 < window[16] < 155


def test_dicom_without_pydicom_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.dcm").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(SystemExit) as stopped:
        afire.main(pretraining(tmp_path, tmp_path / "run"))
    assert stopped.value.code == 2 and "pip install pydicom" in capsys.readouterr().err


def memory():
    """MiB that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


@pytest.mark.skipif("AFIRE_FUZZ" not in os.environ, reason="AFIRE_FUZZ=SECONDS runs it")
def test_fuzz_images_and_checkpoints(tmp_path):
    """Mutated bytes end in pixels, in weights or in a plain refusal; never in a hang or worse."""
    random, until, done = np.random.default_rng(), time.time() + float(os.environ["AFIRE_FUZZ"]), 0
    torch.save(timm_vit(**{**WIDE, "embed_dim": 64, "num_heads": 1}).state_dict(),
               tmp_path / "vit.pth")
    for name in "a.png", "b.jpg", "c.bmp", "d.tif":
        Image.fromarray(GREY).save(tmp_path / name)
    Image.fromarray(GREY.astype(np.uint16) * 200).save(tmp_path / "e.png")
    seeds = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    before = memory()
    while time.time() < until:
        name = random.choice(list(seeds))
        content = bytearray(seeds[name])
        for _ in range(random.integers(1, 20)):
            content[random.integers(min(len(content), random.choice([64, 10 ** 9])))] = \
                random.integers(256)
        file = tmp_path / f"mutated{Path(name).suffix}"
        file.write_bytes(content[:random.integers(len(content))] if random.random() < 0.2
                         else content)
        started = time.time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if file.suffix == ".pth":
                with contextlib.suppress(afire.InputError):
                    afire.load_encoder(file)
            else:
                with contextlib.suppress(afire.InputError):
                    afire.cached_images([file], 16, tmp_path / "cache")
                for each in (tmp_path / "cache").iterdir():
                    each.unlink()
        assert time.time() - started < 10
        done += 1
    print(f"{done} mutated files, memory grew by {memory() - before:.0f} MiB")
    assert memory() - before < 200


@pytest.mark.parametrize("above", ["", "download/chest_xray/"])
def test_class_folders_tell_findings_and_split(tmp_path, above):
    """Also if --data is a folder further up; a folder in a class folder tells nothing."""
    save_images(tmp_path / "d" / above, "train/NORMAL/a.png", "train/EFFUSION/b.png",
                "test/MASS/e.bmp", "test/No_Finding/c.JPG", "train/NORMAL/p1/MASS/f.tif")
    (tmp_path / "d" / above / "train/NORMAL/readme.txt").write_text("no image")
    data = load(tmp_path / "d")
    assert list(data.findings) == ["EFFUSION", "MASS"] and data.labels.shape == (5, 2)
    assert sorted(names(data, data.train)) == ["a.png", "b.png", "f.tif"]
    assert sorted(names(data, data.test)) == ["c.JPG", "e.bmp"]
    assert sorted(names(data, data.labels.any(1))) == ["b.png", "e.bmp"]
    image = data.images[names(data).index("f.tif"), 0]
    assert np.array_equal(image, np.roll(GREY, 4)), "image and name go together"


@pytest.mark.parametrize("normal, sick, test", [
    (["Train/Normal/a.png", "Test/normal/b.png"], ["Train/Mass/c.png"], ["Test/normal/b.png"]),
    (["train/NORMAL/a.png", "test/NORMAL/b.png", "set/set/test/NORMAL/d.png"],
     ["set/set/train/MASS/e.png"], ["test/NORMAL/b.png", "set/set/test/NORMAL/d.png"]),
    (["A/NORMAL/a.png", "B/deep/NORMAL/b.png"], ["A/MASS/c.png", "B/deep/MASS/d.png"], None),
    (["NORMAL/a.png", "NORMAL/p1/MASS/b.png"], ["MASS/p2/c.png", "d.png"], None),
    (["test/cxr/train/NORMAL/a.png", "test/cxr/test/NORMAL/b.png"], ["test/cxr/train/MASS/c.png"],
     ["test/cxr/test/NORMAL/b.png"])])
def test_class_folders_may_lie_anywhere(tmp_path, normal, sick, test):
    save_images(tmp_path, *normal, *sick)
    records = afire.find_images(tmp_path)
    assert {record["name"] for record in records if not record["findings"]} == set(normal)
    assert {record["name"] for record in records if record["findings"]} == set(sick)
    if test:
        assert {record["name"] for record in records if record["test"]} == set(test)


def test_a_list_file_gives_labels_and_keeps_a_patient_in_one_split(tmp_path):
    files = [f"{patient:08}_{view:03}.png" for patient in range(12) for view in range(3)]
    save_images(tmp_path / "images", *files)
    flags = {file: ["0 0", "1 0", "0 1", "1 1"][i % 4] for i, file in enumerate(files)}
    (tmp_path / "list.txt").write_text("\n".join(f"{f} {flags[f]}" for f in files) + "\n\n")
    data = load(tmp_path / "list.txt", root=str(tmp_path / "images"))
    for name, label in zip(names(data), data.labels, strict=True):
        assert " ".join(str(int(each)) for each in label) == flags[name]
    assert_split_by_patient(data, lambda name: name[:8], 12)
    (tmp_path / "list.txt").write_text("a b.png 1 0\r\na b.png 0 0")   # told twice, a finding stays
    assert afire.read_list(tmp_path / "list.txt") == {"a b.png": {"finding_1"}}


def test_a_csv_gives_labels_and_keeps_a_patient_in_one_split(tmp_path):
    told = {"Mass|Edema": [True, True], "No Finding": [False, False], "Edema": [True, False]}
    save_images(tmp_path / "d", *[f"{i}.png" for i in range(30)], "unlabelled.png")
    lines = [f"{i}.png,{list(told)[i % 3]},p{i // 3}" for i in range(30)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,findings,patient", *lines]))
    data = load(tmp_path / "d", labels=str(tmp_path / "labels.csv"))
    assert list(data.findings) == ["Edema", "Mass"] and len(data.images) == 30
    for name, label in zip(names(data), data.labels, strict=True):
        assert label.tolist() == list(told.values())[int(Path(name).stem) % 3]
    assert_split_by_patient(data, lambda name: int(Path(name).stem) // 3, 10)


def test_messy_labels(tmp_path, capsys):
    """A byte order mark, semicolons, images without label, labels without image, duplicates."""
    save_images(tmp_path, *(f"{i}.png" for i in range(6)))
    lines = ["image;findings;patient", *(f"{i}.png;{'MASS' if i == 1 else 'No Finding'};p{i % 2}"
                                         for i in range(4)), "9.png;MASS;p9", "1.png;EDEMA;p1"]
    (tmp_path / "labels.csv").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    data = load(tmp_path, labels=str(tmp_path / "labels.csv"), test_fraction=0.5)
    assert "4 of 6 images" in capsys.readouterr().out
    told = {record["name"]: record["findings"] for record in data.records}
    assert told == {"0.png": set(), "1.png": {"MASS", "EDEMA"}, "2.png": set(), "3.png": set()}
    sides = [{data.records[row]["patient"] for row in rows} for rows in (data.train, data.test)]
    assert not sides[0] & sides[1], "no patient on both sides"


def test_a_probe_of_too_little_is_nan_and_not_half(tmp_path):
    """No positive in the test split, or none to learn from: undefined, and not in the mean."""
    labels = np.zeros((40, 3), bool)
    labels[::2, 0], labels[:20:3, 1], labels[30:, 2] = True, True, True
    data = afire.Radiographs([], None, labels, ["a", "b", "c"], np.arange(20), np.arange(20, 40))
    features = torch.randn(40, 5, generator=seeded())
    report, _ = afire.evaluate_labels(lambda rows: afire.linear_probe(
        features[rows], labels[rows], features[data.test]), data, 0.01)
    assert math.isnan(report["per_finding"]["b"]) and math.isnan(report["per_finding"]["c"])
    assert report["macro_auroc"] == pytest.approx(report["per_finding"]["a"], nan_ok=True)


def test_boxes_become_masks_of_the_squashed_image(tmp_path):
    save_images(tmp_path / "d", "b.png")
    Image.new("L", (48, 96)).save(tmp_path / "d/a.png")                # 48 wide, 96 high
    (tmp_path / "boxes.csv").write_text("image,finding,x,y,w,h\nelsewhere.png,Mass,1,1,1,1\n"
                                        "a.png,Mass,8,16,4,32\na.png,Mass,40,88,99,99")
    data = load(tmp_path / "d")
    afire.read_boxes(str(tmp_path / "boxes.csv"), data)
    expected = np.zeros((24, 24), bool)
    expected[4:12, 4:6] = expected[22:, 20:] = True
    masks = {record["name"]: record["mask"] for record in data.records if "mask" in record}
    assert list(masks) == ["a.png"] and np.array_equal(masks["a.png"], expected)


def test_patients_with_a_box_are_tested_on_unless_a_normal_image_was_trained_on(tmp_path):
    text = "image,findings,patient\n"
    for i in range(40):                                                # the even ones are normal
        text += f"{i}.png,{'Mass' if i % 2 else 'No Finding'},{i if i < 20 else i // 2}\n"
    save_images(tmp_path / "data", *(f"{i}.png" for i in range(40)))
    (tmp_path / "labels.csv").write_text(text)
    boxed = [1, 3, 5, 7, 21, 23, 25]               # of the last three also a normal one
    (tmp_path / "boxes.csv").write_text("image,finding,x,y,w,h\n" + "".join(
        f"{i}.png,Mass,1,2,9,9\n" for i in boxed))
    data = load(tmp_path / "data", labels=str(tmp_path / "labels.csv"))
    train, test = set(names(data, data.train)), set(names(data, data.test))
    afire.read_boxes(tmp_path / "boxes.csv", data)
    moved = {f"{i}.png" for i in boxed[:4]}
    assert moved & train and {"21.png", "23.png", "25.png"} & train
    assert set(names(data, data.test)) == test | moved
    assert set(names(data, data.train)) == train - moved
    assert data.train.dtype == data.test.dtype == int


def test_the_cache_is_read_again_and_renewed_when_a_file_changes(tmp_path):
    def read():
        images, readable = afire.cached_images([tmp_path / "a.bmp", tmp_path / "b.bmp"], 24,
                                               tmp_path / "cache")
        assert readable.all() and isinstance(images, np.memmap)
        files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*.npy")}
        return images[:, 0].tolist(), files

    save_images(tmp_path, "a.bmp", "b.bmp")
    images, before = read()
    assert images == [GREY.tolist(), np.roll(GREY, 1).tolist()]
    assert read() == (images, before)
    Image.fromarray(GREY.T).save(tmp_path / "b.bmp")                   # of the same size in bytes
    images, after = read()
    assert images == [GREY.tolist(), GREY.T.tolist()] and set(after) > set(before)


def test_a_cache_that_a_power_cut_has_emptied_is_one_sentence(tmp_path):
    save_images(tmp_path, "a.png")
    for kind in "npy", "json":
        afire.cached_images([tmp_path / "a.png"], 24, tmp_path / "cache")
        for file in (tmp_path / "cache").glob(f"*.{kind}"):
            file.write_bytes(b"")
        with pytest.raises(afire.InputError, match="delete both"):
            afire.cached_images([tmp_path / "a.png"], 24, tmp_path / "cache")
        shutil.rmtree(tmp_path / "cache")


def test_what_cannot_be_read_at_all_is_tried_again(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.png").write_bytes(b"no image at all")
    with pytest.raises(afire.InputError, match="UnidentifiedImageError"):
        afire.cached_images([tmp_path / "d/a.png"], 24, tmp_path / "cache")
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} <= {".lock"}


def test_unreadable_files_are_named_counted_and_skipped(tmp_path, capsys):
    save_images(tmp_path / "d", "a.png", "b.png", "whole.png")
    (tmp_path / "d/broken.png").write_bytes(b"no image at all")
    (tmp_path / "d/cut.png").write_bytes((tmp_path / "d/whole.png").read_bytes()[:300])
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "d/nan.tif")
    for _ in range(2):                                                 # from the cache, too
        data = load(tmp_path / "d")
        used = sorted(names(data, data.train) + names(data, data.test))
        assert used == ["a.png", "b.png", "whole.png"]
        told = capsys.readouterr().out
        assert all(each in told for each in ("broken.png", "cut.png", "nan.tif", "3 of 6"))

# --------------------------------------------------------------------------------------------------
# Data: phantoms
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [32, 65, 224])
def test_phantoms_have_masks_exactly_where_labels_say(size):
    images, labels, masks, findings = afire.phantoms(24, size)
    assert set(findings) == {"nodule", "effusion", "cardiomegaly", "pneumothorax"}
    assert images.shape == (24, 1, size, size) and images.dtype == np.uint8
    assert labels.shape == (24, 4) and masks.shape == (24, 4, size, size)
    assert labels.dtype == masks.dtype == bool and np.array_equal(masks.any((2, 3)), labels)
    assert labels.any(0).all() and not labels.any(1).all() and images.std((2, 3)).min() > 20


def test_phantoms_depend_on_seed_and_index_alone():
    for few, many in zip(afire.phantoms(2, 40, seed=3), afire.phantoms(4, 40, seed=3)):
        assert np.array_equal(few[:2], many[:2])                       # the names as well
    images = np.concatenate([afire.phantoms(4, 40, seed=seed)[0] for seed in (3, 4)])
    assert len(np.unique(images.reshape(8, -1), axis=0)) == 8

# --------------------------------------------------------------------------------------------------
# Encoders from files
# --------------------------------------------------------------------------------------------------

WIDE = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("kind", ["ours", "encoder.pth", "timm", "dino"])
def test_load_encoder_knows(tmp_path, kind):
    model, vit = tiny_model(**WIDE), timm_vit(**WIDE)
    for parameter in model.teacher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)            # the student is another
    backbone = {f"module.backbone.{key}": value for key, value in vit.state_dict().items()}
    state, expected = {
        "ours": ({"model": model.state_dict(), "epoch": 3}, model.teacher.encoder),
        "encoder.pth": (model.teacher.encoder.state_dict(), model.teacher.encoder),
        "timm": ({**vit.state_dict(), "head.weight": torch.zeros(9, 128)}, vit.forward_features),
        "dino": ({"student": {key: 0 * value for key, value in backbone.items()},
                  "teacher": {**backbone, "module.head.last_layer.weight_g": torch.ones(9, 1)},
                  "args": argparse.Namespace(arch="vit_small")}, vit.forward_features)}[kind]
    torch.save(state, tmp_path / "file.pth")
    images = torch.randn(2, 3, 32, 32)
    tokens = afire.load_encoder(tmp_path / "file.pth")(images)
    torch.testing.assert_close(tokens, expected(images), atol=1e-5, rtol=1e-4)


def test_load_encoder_gives_a_vit_huge_its_sixteen_heads(tmp_path):
    vit = timm_vit(img_size=32, patch_size=16, embed_dim=1280, depth=1, num_heads=16)
    torch.save(vit.state_dict(), tmp_path / "huge.pth")
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(afire.load_encoder(tmp_path / "huge.pth")(images),
                               vit.forward_features(images), atol=1e-4, rtol=1e-4)


def test_positions_are_interpolated_as_timm_does(tmp_path):
    vit, larger = timm_vit(**WIDE), timm_vit(**{**WIDE, "img_size": 48})
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    state = vit.state_dict()
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(
        state["pos_embed"], [6, 6], num_prefix_tokens=1)
    larger.load_state_dict(state)
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(afire.load_encoder(tmp_path / "vit.pth", 48)(images),
                               larger.forward_features(images), atol=1e-4, rtol=1e-4)


def test_load_encoder_says_what_it_takes_and_what_does_not_fit(tmp_path, capsys):
    state = {**timm_vit(**WIDE).state_dict(), "head.weight": torch.zeros(9, 128)}
    torch.save(state, tmp_path / "vit.pth")
    afire.load_encoder(tmp_path / "vit.pth")
    assert "1 left: head.weight" in capsys.readouterr().out
    for key, wrong in (("norm.weight", None), ("blocks.1.mlp.fc1.weight", torch.zeros(3, 3)),
                       ("pos_embed", torch.zeros(1, 6, 128)), ("pos_embed", None)):
        broken = {**state, key: wrong}
        torch.save({k: v for k, v in broken.items() if v is not None}, tmp_path / "broken.pth")
        with pytest.raises(afire.InputError, match=key.split(".")[-2] if "." in key else "ViT"):
            afire.load_encoder(tmp_path / "broken.pth")


def test_timm_loads_the_encoder_strictly():
    ours, theirs = afire.ViT().eval(), timm.create_model("vit_base_patch16_224", num_classes=0)
    theirs.eval().load_state_dict(ours.state_dict())
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs.forward_features(image), atol=1e-4,
                                   rtol=1e-4)


@pytest.mark.parametrize("prefix, dim, heads", [("", 128, 2), ("module.", 128, 2), ("", 1280, 16)])
def test_from_release_reads_the_authors_layout(prefix, dim, heads):
    model = tiny_model(embed_dim=dim, num_heads=heads, decoder_dim=64, decoder_heads=2)
    for parameter in model.teacher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)

    def theirs(state):
        layers = state.pop("head.last_layers")
        state |= {f"head.last_layers.{i}.weight_v": layer for i, layer in enumerate(layers)}
        state |= {f"head.last_layers.{i}.weight_g": torch.ones(len(layer), 1)
                  for i, layer in enumerate(layers)}
        return {prefix + key: value for key, value in state.items()}

    decoder = {f"decoder.{key}": value for key, value in model.decoder.state_dict().items()}
    loaded = afire.AFiRe.from_release({
        "student": theirs({**model.student.state_dict(), **decoder}),
        "teacher": theirs(dict(model.teacher.state_dict()))}).train()
    expected, ours = model(*tiny_batch()), loaded(*tiny_batch())
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.parametrize("n", range(3))
def test_the_readme_examples_of_copying_run(tmp_path, monkeypatch, n):
    monkeypatch.chdir(tmp_path)
    readme = Path(afire.__file__).with_name("README.md").read_text(encoding="utf-8")
    exec(readme.split("```python\n")[1 + n].split("```")[0], {})


class Trap:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("save", [torch.save, lambda each, file: file.write_bytes(
    pickle.dumps(each, protocol=2))], ids=["torch", "pickle"])
def test_load_encoder_runs_no_code_from_the_file(tmp_path, save):
    save({"model": Trap(tmp_path / "sprung")}, tmp_path / "file.pth")
    with pytest.raises((pickle.UnpicklingError, afire.InputError)):
        afire.load_encoder(tmp_path / "file.pth")
    assert not (tmp_path / "sprung").exists()

# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_detection_is_scikit_learns_with_many_ties(levels, seed):
    random = np.random.default_rng(seed)
    scores, labels = random.integers(0, levels, 99) / 7, random.random(99) < 0.3
    close = functools.partial(pytest.approx, abs=1e-12)
    area, precision = sklearn.metrics.roc_auc_score, sklearn.metrics.average_precision_score
    found = afire.detection(scores, labels)
    assert afire.auroc(scores, labels) == found["auroc"] == close(area(labels, scores))
    assert found["ap"] == close(precision(labels, scores))
    dice = [sklearn.metrics.f1_score(labels, scores >= each) for each in np.unique(scores)]
    assert found["dice"] == close(max(dice))
    for one_class in np.zeros(99, bool), np.ones(99, bool):
        assert math.isnan(afire.auroc(scores, one_class))
        assert all(math.isnan(value) for value in afire.detection(scores, one_class).values())
    assert math.isnan(afire.auroc(np.where(np.arange(99) == 7, np.nan, scores), labels))


def test_linear_probe_is_scikit_learns():
    random = np.random.default_rng(0)
    x = random.normal(5, random.uniform(0.1, 30, 40), (300, 40))
    y = x / x.std(0) @ random.normal(size=(40, 3)) + random.normal(0, 3, (300, 3))
    y = np.c_[y > np.quantile(y, 0.8, 0), np.zeros(300, bool)]         # the last has one class
    scores = afire.linear_probe(torch.from_numpy(x[:200]).float(), y[:200],
                                torch.from_numpy(x[200:]).float())
    assert scores.shape == (100, 4) and np.abs(scores[:, 3]).max() < 1e-6
    x = (x - x[:200].mean(0)) / x[:200].std(0)
    theirs = sklearn.linear_model.Ridge(alpha=10.0).fit(x[:200], y[:200, :3]).predict(x[200:])
    np.testing.assert_allclose(scores[:, :3], theirs, atol=1e-4)


def small_set(n=60):
    """Radiographs of which half are bright, and are so labelled."""
    images = (255 * phantom_images(160, 32)[:n] / 2).byte().numpy()
    bright = np.arange(n) % 2 > 0
    images[bright] += 100
    return afire.Radiographs([], images, np.c_[bright, ~bright], ["bright", "dark"],
                             np.arange(n // 2), np.arange(n // 2, n))


def test_finetune_learns_from_its_rows_alone_and_leaves_the_model_as_it_was():
    model, data, cpu = tiny_model().eval(), small_set(), torch.device("cpu")
    before = copy.deepcopy(model.state_dict())
    scores = afire.finetune(model, data, data.train[:10], cpu, steps=30, batch_size=8)
    assert scores.shape == (30, 2) and afire.auroc(scores[:, 0], data.labels[30:, 0]) > 0.95
    assert equal(before, model.state_dict())
    data.labels, data.images = data.labels.copy(), data.images.copy()
    data.labels[10:] ^= True                       # of the test images and of what it may not see
    data.images[10:30] = 0
    again = afire.finetune(model, data, data.train[:10], cpu, steps=30, batch_size=8)
    np.testing.assert_array_equal(scores, again)


def test_samples_of_two_models_are_of_the_same_images_and_draws():
    data, seen = small_set(), ([], [])
    noise = np.random.default_rng(0).random((30, 2))
    samples = []
    for better, rows_seen in zip((0, 1), seen):
        def predict(rows):
            rows_seen.append(rows)
            return noise + better * 2 * data.labels[data.test]
        report, each = afire.evaluate_labels(predict, data, 0.5)
        samples.append(each)
        assert report["ci95"][0] <= np.mean(each) <= report["ci95"][1]
    assert all(map(np.array_equal, *seen)) and len(seen[0]) == 5
    assert np.allclose(samples[1], 1) and np.std(samples[0]) > 0.01
    assert afire.evaluate_labels(lambda rows: noise, data, 0.5)[1] == samples[0]


def test_grad_cam_is_the_gradient_by_differences_times_the_activation():
    model = tiny_model().eval()
    weight, image = torch.randn(32, generator=seeded()), phantom_images(160, 32)[:2]
    cam = afire.grad_cam(model, weight, image)
    encoder = copy.deepcopy(model.teacher.encoder).double()
    x = encoder.patch_embed.proj(model.normalise(image).double()).flatten(2).mT
    x = torch.cat([encoder.cls_token.expand(2, -1, -1), x], 1) + encoder.pos_embed
    last = encoder.blocks(x)                                           # (2, 17, 32)

    def score(activation, i):
        return encoder.norm(activation)[i, 1:].mean(0) @ weight.double()

    for i in range(2):
        slope = torch.zeros(16, 32, dtype=torch.float64)
        for j, d in np.ndindex(16, 32):
            step = torch.zeros_like(last)
            step[i, 1 + j, d] = 1e-4
            slope[j, d] = (score(last + step, i) - score(last - step, i)) / 2e-4
        expected = last[i, 1:] @ slope.mean(0)
        torch.testing.assert_close(cam[i].double(), expected, rtol=1e-3, atol=1e-6)


def test_probe_maps_are_grad_cam_of_scikit_learns_probe_less_the_usual():
    model, data, images = tiny_model().eval(), small_set(), phantom_images(160, 32)[100:103]
    data.labels = data.labels[:, :1]                                   # the dark ones are normal
    x = afire.to_device(data.images, torch.device("cpu"))
    features = model.features(x).mean(1)
    train = features[data.train].double()
    probe = sklearn.linear_model.Ridge(alpha=10.0).fit(
        (train - train.mean(0)) / train.std(0, correction=0), data.labels[data.train, 0])
    weight = (torch.from_numpy(probe.coef_) / train.std(0, correction=0)).float()
    usual = afire.grad_cam(model, weight, x[data.train[~data.labels[data.train, 0]]]).mean(0)
    cam = (afire.grad_cam(model, weight, images) - usual).clamp_min(0).view(3, 1, 4, 4)
    expected = F.interpolate(cam, (32, 32), mode="bilinear")[:, 0].numpy()
    np.testing.assert_allclose(afire.probe_maps(model, features, data, images), expected,
                               rtol=1e-2, atol=1e-2 * expected.max())


def test_localisation_is_perfect_worst_or_scikit_learns_by_image():
    masks = np.zeros((8, 16, 16), bool)
    for i in range(8):
        masks[i, i:i + 4, 3:9 + i % 3] = True
    random = np.random.default_rng(0).random((8, 16, 16))
    maps = {"perfect": masks * 1.0, "worst": ~masks * 1.0, "random": random}
    found = {name: afire.evaluate_localisation(each, masks) for name, each in maps.items()}
    for name, best in ("perfect", 1), ("worst", 0):
        assert found[name]["images"] == 8
        for measure in "pointing", "auroc":
            assert found[name][measure] == {"mean": best, "ci95": [best, best]}
    areas = [sklearn.metrics.roc_auc_score(m.ravel(), a.ravel()) for a, m in zip(random, masks)]
    hits = [m.ravel()[a.ravel().argmax()] for a, m in zip(random, masks)]
    assert found["random"]["auroc"]["mean"] == pytest.approx(np.mean(areas))
    assert found["random"]["pointing"]["mean"] == np.mean(hits)
    low, high = found["random"]["auroc"]["ci95"]
    spread = 1.96 * np.std(areas) / math.sqrt(8)
    assert low == pytest.approx(np.mean(areas) - spread, abs=spread / 3)
    assert high == pytest.approx(np.mean(areas) + spread, abs=spread / 3)


@pytest.mark.parametrize("apart", [0, 1, 10])
def test_silhouette_is_scikit_learns(apart):
    cluster = torch.tensor([0, 0, 1, 2, 2, 2, 3, 3] * 5 + [4])         # the last one is alone
    points = torch.randn(41, 6, generator=seeded()) + apart * cluster.unsqueeze(1)
    expected = sklearn.metrics.silhouette_score(points.numpy(), cluster.numpy())
    assert afire.silhouette(points, cluster) == pytest.approx(expected, abs=1e-4)


def test_anomaly_scores_point_at_what_normal_images_never_show():
    images, model = phantom_images(160, 32), tiny_model().eval()
    normals = model.features(images[:150])
    odd = images[150:].clone()
    odd[:, :, 8:16, 16:24] = torch.rand(10, 1, 8, 8, generator=seeded())  # one token is noise
    maps = afire.anomaly_maps(model, normals, odd)
    assert {"restoration", "prototype", "position"} <= set(maps)
    assert all(each.shape == (10, 32, 32) and np.isfinite(each).all() for each in maps.values())
    for name in "position", "neighbours":
        there, elsewhere = maps[name][:, 12, 20], maps[name].copy()
        elsewhere[:, 4:20, 12:28] = 0
        assert (there > elsewhere.max((1, 2))).mean() >= 0.9, "but a phantom may be odd too"
        assert (there > afire.anomaly_maps(model, normals, images[150:])[name][:, 12, 20]).all()


def test_restoration_error_is_of_tokens_restored_without_their_own():
    model, images = tiny_model().eval(), phantom_images(70, 32)[:3]
    x = model.normalise(images)
    tokens = model.student.encoder(x)
    expected = torch.zeros(3, 16)
    for dy, dx in np.ndindex(2, 2):
        hidden = torch.zeros(4, 4, dtype=torch.bool)
        hidden[dy::2, dx::2] = True
        restored = model.decoder(tokens, hidden.flatten().expand(3, -1))
        for row, column in np.ndindex(4, 4):
            if hidden[row, column]:
                patch = np.s_[:, :, 8 * row:8 * row + 8, 8 * column:8 * column + 8]
                expected[:, 4 * row + column] = ((restored - x)[patch] ** 2).mean((1, 2, 3))
    torch.testing.assert_close(afire.restoration_error(model, images), expected)


def test_anomaly_figures_are_scikit_learns_on_what_is_located():
    """The last image is abnormal, nobody knows where: it counts as an image, not by its pixels."""
    random, abnormal = np.random.default_rng(0), np.arange(12) % 3 == 2
    maps, masks = random.random((12, 8, 8)), np.zeros((12, 8, 8), bool)
    masks[abnormal, 2:5, 3:7] = True
    masks[11] = False
    maps[masks] += 0.3
    found = afire.evaluate_anomaly(maps, abnormal, masks)
    scores = [np.sort(each.ravel())[-16:].mean() for each in maps]     # the top quarter
    pixels = maps[:11].ravel(), masks[:11].ravel()
    assert found["image_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(abnormal, scores))
    assert found["pixel_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(*pixels[::-1]))
    precision = sklearn.metrics.average_precision_score(*pixels[::-1])
    assert found["pixel_ap"] == pytest.approx(precision)


def test_batches_keep_the_order_of_rows():
    images = np.random.default_rng(0).integers(0, 256, (200, 1, 4, 4), np.uint8)
    rows = np.random.default_rng(1).permutation(200)[:130]
    found = afire.in_batches(lambda x: x.mean((1, 2, 3)), images, rows, torch.device("cpu"))
    np.testing.assert_allclose(found, images[rows].mean((1, 2, 3)) / 255, rtol=1e-5)


def test_an_image_that_was_pre_trained_on_is_not_tested_on(tmp_path, capsys):
    """Another root gives other names, and so another split of the same files."""
    save_images(tmp_path, *(f"train/NORMAL/{i}.png" for i in range(9)),
                *(f"train/MASS/{i}.png" for i in range(9, 18)), "test/NORMAL/a.png")
    run, data = load(tmp_path), load(tmp_path / "train")
    before = names(data, data.test)
    afire.leave_out_trained(data, run)
    assert names(data, data.test) == [name for name in before if int(Path(name).stem) >= 9]
    assert 0 < len(data.test) < len(before) and "pre-trained" in capsys.readouterr().out


def test_position_and_neighbours_are_scikit_learns():
    images, model = phantom_images(70, 32), tiny_model().eval()
    normals, tokens = model.features(images[:60]).double(), model.features(images[60:]).double()
    maps = afire.anomaly_maps(model, normals.float(), images[60:], shrinkage=0.3)
    for j, (y, x) in enumerate(np.ndindex(4, 4)):
        position, test = normals[:, j].numpy(), tokens[:, j].numpy()
        shrunk = sklearn.covariance.shrunk_covariance(np.cov(position.T, bias=True), 0.3)
        off = test - position.mean(0)
        expected = np.einsum("nd,de,ne->n", off, np.linalg.inv(shrunk), off)
        nearest = sklearn.neighbors.NearestNeighbors(n_neighbors=5).fit(position).kneighbors(test)
        corner = np.s_[:, [0, 31][y == 3], [0, 31][x == 3]]            # there a map is not blended
        if y in (0, 3) and x in (0, 3):
            np.testing.assert_allclose(maps["position"][corner], expected, rtol=1e-2)
            np.testing.assert_allclose(maps["neighbours"][corner], nearest[0].mean(1), rtol=1e-3)

# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def shell(*arguments):
    return subprocess.run([sys.executable, afire.__file__, *arguments], timeout=170,
                          capture_output=True, text=True, check=False)


def pretraining(data, out):
    """A small pre-training as a command."""
    return (f"pretrain --data {data} --out {out} --preset small --arch vit_micro --img-size 32 "
            "--patch-size 8 --epochs 2 --warmup-epochs 1 --batch-size 8 --device cpu --amp none"
            ).split()


@pytest.fixture(scope="session")
def radiographs(tmp_path_factory):
    """72 phantoms in class folders, a third of them held out, and one broken file."""
    folder = tmp_path_factory.mktemp("radiographs")
    images, labels, _, findings = afire.phantoms(72, 40)
    for i, (image, label) in enumerate(zip(images, labels)):
        name = findings[label.argmax()].upper() if label.any() else "NORMAL"
        file = folder / ("train" if i % 3 else "test") / name / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(file)
    (folder / "train/NORMAL/broken.png").write_bytes(b"no image at all")
    return folder


@pytest.fixture(scope="session")
def run(radiographs, tmp_path_factory):
    """The folder of a pre-training from the shell."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done = shell(*pretraining(radiographs, out))
    assert done.returncode == 0, done.stderr
    assert "broken.png" in done.stdout
    return out


def load_run(folder):
    """Its checkpoint, and the lines of its log."""
    return (torch.load(folder / "checkpoint.pth", weights_only=True),
            (folder / "log.jsonl").read_text().splitlines())


def test_pretrain_leaves_what_it_should(run, radiographs):
    checkpoint, log = load_run(run)
    assert len(log) == 2 and list(run.glob("*.png"))
    for record in map(json.loads, log):
        assert all(math.isfinite(record[name]) for name in (
            "loss", "structure", "category", "restoration"))
    assert json.loads((run / "config.json").read_text())["patch_size"] == 8
    normal = len(list(radiographs.glob("train/NORMAL/*.png"))) - 1     # not the broken one
    steps = [int(value) for key, value in checkpoint["model"].items() if key.endswith("updates")]
    assert steps == [2 * (normal // 8)], "a step takes 8 of the normal training images"
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(*(afire.load_encoder(run / name)(images)
                         for name in ("checkpoint.pth", "encoder.pth")))


def test_eval_writes_metrics_and_figures(run):
    done = shell("eval", "--ckpt", str(run / "checkpoint.pth"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert list((run / "eval").glob("*.png"))
    report = json.loads((run / "eval/metrics.json").read_text(), parse_constant=pytest.fail)
    assert report["checkpoint"] != report["random_init"]
    for each in report["checkpoint"], report["random_init"]:
        assert set(each["linear"]) == {"1%", "10%", "100%"}
        for probe in each["linear"].values():
            assert set(probe) == {"macro_auroc", "ci95", "per_finding"} and len(probe["ci95"]) == 2
            assert set(probe["per_finding"]) == {
                "NODULE", "EFFUSION", "CARDIOMEGALY", "PNEUMOTHORAX"}
        low, high = probe["ci95"]                                      # of the last, 100 %
        mean = np.mean([value for value in probe["per_finding"].values() if value is not None])
        assert low <= probe["macro_auroc"] <= high and probe["macro_auroc"] == pytest.approx(mean)
        for score in "restoration", "prototype", "position":
            found = each["anomaly"][score]
            assert set(found) == {"image_auroc", "image_ap", "image_ci95", "pixel_auroc",
                                  "pixel_ap", "dice"}
            low, high = found["image_ci95"]
            assert 0 <= low <= found["image_auroc"] <= high <= 1
            assert found["pixel_auroc"] is None, "nobody told where the findings are"
        assert -1 <= each["cohesion"] <= 1


def test_eval_finetunes_localises_and_pairs(run, radiographs, tmp_path, capsys):
    """By another name of the images: boxes are asked for on data of labels, test and train."""
    rows = [f"{file.name},x,{x},5,20,30" for x, file in enumerate(
        sorted(radiographs.glob("test/EFFUSION/*.png")))]
    (tmp_path / "boxes.csv").write_text("\n".join(["image,finding,x,y,w,h", *rows]))
    out = tmp_path / "run"
    shutil.copytree(run, out)
    afire.main(["eval", "--ckpt", str(out), "--boxes", str(tmp_path / "boxes.csv"), "--finetune",
                "2", "--device", "cpu"])
    told = capsys.readouterr().out
    report = json.loads((out / "eval/metrics.json").read_text())
    samples = json.loads((out / "eval/samples.json").read_text())
    for way in "linear", "finetune":
        assert f"{way} 100% gain, in pairs" in told
        for percent in "1%", "10%", "100%":
            ours, theirs = (np.array(samples[f"{name} {way} {percent}"], float)
                            for name in ("checkpoint", "random_init"))
            assert ours.shape == theirs.shape == (200,)
            low, high = report["checkpoint"][way][percent]["ci95"]
            assert (low, high) == pytest.approx(np.nanquantile(ours, [0.025, 0.975]))
    for name in "checkpoint", "random_init":
        assert -1 <= report[name]["cohesion_by_category"] <= 1
        for score in "restoration", "prototype", "position", "neighbours", "grad-cam":
            found = report[name]["localisation"][score]
            assert found["images"] == len(rows) > 1
            for measure in "pointing", "auroc", "dice":
                low, high = found[measure]["ci95"]
                assert 0 <= low <= found[measure]["mean"] <= high <= 1


def equal(a, b):
    """Bit for bit, through dictionaries and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_resumed_run_equals_an_unbroken_one(run, radiographs, tmp_path, monkeypatch):
    class PowerCut(Exception):
        pass

    def update_or_break(model, momentum):
        if (tmp_path / "checkpoint.pth").exists():                     # in the second epoch
            raise PowerCut
        update(model, momentum)

    update, command = afire.AFiRe.update_teacher, pretraining(radiographs, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(afire.AFiRe, "update_teacher", update_or_break)
        afire.main(command)
    assert len(load_run(tmp_path)[1]) == 1 and not equal(load_run(tmp_path), load_run(run))
    afire.main(command)
    assert equal(load_run(tmp_path), load_run(run)), "weights, optimiser, log"


def processes(n, arguments):
    """The command under torchrun, as n processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={n}", afire.__file__, *arguments]
    done = subprocess.run(command, timeout=280, capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def same_run(a, b, tolerance):
    """Do two runs agree, in their logs and prototypes, and so in the gradients, up to rounding?"""
    (a, a_log), (b, b_log) = load_run(a), load_run(b)
    for ours, theirs in zip(map(json.loads, a_log), map(json.loads, b_log), strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
    torch.testing.assert_close(*(each["model"]["prototypes.prototypes"] for each in (a, b)),
                               rtol=0, atol=tolerance)


def test_two_processes_train_as_one_and_one_goes_on_from_there(run, radiographs, tmp_path):
    """L_cate contrasts tokens of images that lie in different processes: all must be gathered."""
    command = [*pretraining(radiographs, tmp_path), "--cache", str(tmp_path)]
    told = processes(2, command)
    assert told.count("pre-training on") == 1, "one of them speaks"
    same_run(tmp_path, run, 1e-5)
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    first = torch.load(tmp_path / "previous.pth", weights_only=True)   # after one epoch of two
    assert 2 * first["step"] == state["step"]
    (tmp_path / "previous.pth").replace(tmp_path / "checkpoint.pth")
    afire.main(command)
    same_run(tmp_path, run, 1e-5)


def test_parts_of_a_batch_train_as_the_whole_where_the_loss_is_a_mean_of_images(
        radiographs, tmp_path):
    command = [*pretraining(radiographs, tmp_path / "a"), "--structure-weight", "0",
               "--category-weight", "0"]
    afire.main(command)
    afire.main([*command, "--out", str(tmp_path / "b"), "--grad-accum", "4"])
    losses = [[json.loads(line)["restoration"] for line in load_run(tmp_path / name)[1]]
              for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def start(command, out):
    """The command in its own process, once it has begun to train in `out`."""
    (out / "config.json").unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, afire.__file__, *command], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not (out / "config.json").exists():
        time.sleep(0.01)
    return process


def longer(command):
    return [*command, "--epochs", "12", "--save-every", "0"]


@pytest.fixture(scope="session")
def unbroken(radiographs, tmp_path_factory):
    """A run of 24 steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken")
    afire.main(longer(pretraining(radiographs, out)))
    return out


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
        unbroken, radiographs, tmp_path, number, status):
    command = longer(pretraining(radiographs, tmp_path))
    process = start(command, tmp_path)
    time.sleep(0.1)
    process.send_signal(number)
    told, errors = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in errors
    assert "goes on" in told and 0 < load_run(tmp_path)[0]["step"] < 24
    afire.main(command)
    assert equal(load_run(tmp_path), load_run(unbroken))


@pytest.mark.parametrize("seed", range(30 if os.environ.get("AFIRE_SLOW") else 3))
def test_a_killed_run_goes_on_as_if_nothing_had_been(unbroken, radiographs, tmp_path, seed):
    """At any moment, as with a power cut; it saves at every tenth step and at every epoch's end."""
    random, command = np.random.default_rng(seed), longer(pretraining(radiographs, tmp_path))
    for _ in range(2):
        process = start(command, tmp_path)
        time.sleep(random.uniform(0, 1.5))
        process.kill()
        process.communicate(timeout=60)
    afire.main(command)
    assert equal(load_run(tmp_path), load_run(unbroken))


def test_a_full_disk_leaves_the_last_checkpoint_whole(unbroken, radiographs, tmp_path, monkeypatch,
                                                      capsys):
    def write_until_full(state, stream):
        if state["step"] > 4:
            stream.write(b"half of it")
            raise OSError(28, "No space left on device")
        save(state, stream)

    save, command = torch.save, longer(pretraining(radiographs, tmp_path))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(torch, "save", write_until_full)
        afire.main(command)
    assert stopped.value.code == 2 and "No space left" in capsys.readouterr().err
    assert load_run(tmp_path)[0]["step"] == 4 and not list(tmp_path.glob("*.partial"))
    afire.main(command)
    assert equal(load_run(tmp_path), load_run(unbroken))


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(radiographs, tmp_path):
    command = [*pretraining(radiographs, tmp_path), "--epochs", "10000"]
    first = start(command, tmp_path)
    second = shell(*command)
    first.kill()
    first.communicate()
    assert second.returncode == 2 and "another run" in second.stderr
    third = start(command, tmp_path)
    time.sleep(0.1)
    third.send_signal(signal.SIGINT)
    assert third.wait(60) == 130, "a dead process holds no lock"


@pytest.mark.parametrize("change", ["--arch vit_tiny", "--img-size 40", "--seed 7", "--lr 1"])
def test_another_run_is_not_gone_on_with(run, radiographs, capsys, change):
    before = load_run(run)
    with pytest.raises(SystemExit) as stopped:
        afire.main([*pretraining(radiographs, run), *change.split()])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and change.split()[0].strip("-").replace("-", "_") in told
    assert equal(load_run(run), before)


def test_bench_tells_the_cost_of_a_run():
    done = shell("bench", "--batch-size", "2", "--img-size", "32", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    for part in "decode", "cached read", "lesion mask", "bare backbone", "full step", "memory":
        assert part in done.stdout


@pytest.mark.parametrize("bad_step", [3, 4])
def test_a_loss_that_is_not_finite_stops_the_run(radiographs, tmp_path, monkeypatch, bad_step):
    """Weights that turn bad in the last step of an epoch are not saved, though its loss is fine."""
    updates = []

    def poison(model, _):
        updates.append(model)
        if len(updates) == bad_step:
            model.student.encoder.cls_token.data.fill_(math.nan)

    monkeypatch.setattr(afire.AFiRe, "update_teacher", poison)
    with pytest.raises(SystemExit, match="finite"):
        afire.main(pretraining(radiographs, tmp_path))
    assert all(value.isfinite().all() for value in load_run(tmp_path)[0]["model"].values())


def test_each_step_draws_its_own_lesions_from_seed_and_step_alone(monkeypatch):
    masks = []

    def record(*arguments):
        masks.append(lesions(*arguments)[1])
        return lesions(*arguments[:1], seeded())

    lesions = afire.synthetic_lesion_mask
    monkeypatch.setattr(afire, "synthetic_lesion_mask", record)
    images = (255 * phantom_images(4, 32)).byte().numpy()
    for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        args = afire.parse_arguments(f"pretrain --img-size 32 --seed {seed} --device cpu".split())
        afire.Trainer(args).step(images, np.arange(4), step, 10, 100)
    assert torch.equal(masks[0], masks[3])
    assert not any(torch.equal(masks[0], other) for other in masks[1:3])


def test_keep_shows_that_share_of_tokens_drawn_from_seed_and_step_alone(monkeypatch):
    shown = []

    def record(model, *arguments):
        shown.append(arguments[-1])
        return forward(model, *arguments)

    forward = afire.AFiRe.forward
    monkeypatch.setattr(afire.AFiRe, "forward", record)
    images = (255 * phantom_images(4, 32)).byte().numpy()
    for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        args = afire.parse_arguments(
            f"pretrain --img-size 32 --keep 0.3 --seed {seed} --device cpu".split())
        afire.Trainer(args).step(images, np.arange(4), step, 10, 100)
    assert all((seen.sum(1) == 5).all() for seen in shown), "5 of 16 are the first above 0.3"
    assert torch.equal(shown[0], shown[3]) and len({tuple(row.tolist()) for row in shown[0]}) == 4
    assert not any(torch.equal(shown[0], other) for other in shown[1:3])


def test_eval_of_images_without_labels_ranks_them(run, tmp_path):
    images, _, _, _ = afire.phantoms(12, 40, seed=5)
    for i, image in enumerate(images):
        Image.fromarray(image[0]).save(tmp_path / f"{i}.png")
    done = shell("eval", "--ckpt", str(run), "--data", str(tmp_path), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    with open(run / "eval/scores.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["image"] for row in rows} == {f"{i}.png" for i in range(12)}
    for column in "score", "percentile":
        values = [float(row[column]) for row in rows]
        assert values == sorted(values, reverse=True)
    assert 0 <= values[-1] <= values[0] <= 100 and (run / "eval/highest.png").exists()


def test_identical_images_do_not_make_a_nan(tmp_path):
    for i in range(200):
        Image.fromarray(GREY).save(tmp_path / f"{i}.png")
    afire.main([*pretraining(tmp_path, tmp_path / "run"), "--batch-size", "64"])
    checkpoint, _ = load_run(tmp_path / "run")
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


@pytest.mark.filterwarnings("error")
def test_a_run_without_labels_is_evaluated_by_its_lesions_alone(tmp_path, capsys):
    save_images(tmp_path, *(f"data/{i}.png" for i in range(60)))
    afire.main(pretraining(tmp_path / "data", tmp_path / "run"))
    afire.main(["eval", "--ckpt", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "run/eval/metrics.json").read_text())["checkpoint"]
    assert report["linear"]["1%"]["macro_auroc"] is None and "gain" not in printed
    assert 0 <= report["synthetic"]["prototype"]["pixel_auroc"] <= 1
    assert re.search(r"learning from \d+ images, testing on \d+, 0 with findings", printed)


MISTAKES = {
    "no such architecture": "pretrain --arch vit_huge",
    "no such device": "pretrain --device abacus",
    "a negative rate": "pretrain --lr -1",
    "a batch larger than the data": "pretrain --data {tmp}/fine --batch-size 64",
    "a batch that parts do not share": "pretrain --data {tmp}/fine --batch-size 8 --grad-accum 3",
    "a folder that cannot be": "pretrain --data {tmp}/fine --out {tmp}/odd.csv/run",
    "boxes without numbers": "eval --ckpt {run} --data {tmp}/cases --boxes {tmp}/boxes.csv",
    "no such option": "pretrain --colour red",
    "no such folder": "pretrain --data {tmp}/nowhere",
    "an empty folder": "pretrain --data {tmp}/empty",
    "no readable file": "pretrain --data {tmp}/broken",
    "no normal image": "pretrain --data {tmp}/sick",
    "no such labels": "pretrain --data {tmp}/fine --labels {tmp}/no.csv",
    "labels without columns": "pretrain --data {tmp}/fine --labels {tmp}/odd.csv",
    "no such init": "pretrain --data {tmp}/fine --init {tmp}/no.pth",
    "an image of half patches": "pretrain --data {tmp}/fine --img-size 30",
    "a fraction above one": "pretrain --keep 1.5",
    "a momentum above one": "pretrain --teacher-momentum 7",
    "a rate that is no number": "pretrain --lr nan",
    "fine-tuning backwards": "eval --ckpt {run} --finetune -5",
    "a negative seed": "pretrain --seed -1",
    "boxes of other images": "eval --ckpt {run} --data {tmp}/cases --boxes {tmp}/other.csv",
    "boxes of phantoms": "eval --ckpt {run} --boxes {tmp}/boxes.csv",
    "boxes without findings": "eval --ckpt {run} --data {tmp}/fine --boxes {tmp}/boxes.csv",
    "an image for a folder": "pretrain --data {tmp}/fine/a.png",
    "labels with an open quotation": "pretrain --data {tmp}/fine --labels {tmp}/open.csv",
    "labels for a list": "pretrain --data {tmp}/odd.csv",
    "an empty batch": "pretrain --data {tmp}/fine --batch-size 0",
    "no such checkpoint": "eval --ckpt {tmp}/nowhere",
    "not a checkpoint": "eval --ckpt {tmp}/odd.csv",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_sentence(tmp_path, run, capsys, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    save_images(tmp_path, "broken/a.png", "sick/MASS/a.png", "sick/NORMAL/b.png", "fine/a.png")
    for file in "sick/NORMAL/b.png", "broken/a.png":
        (tmp_path / file).write_bytes(b"no image at all")
    (tmp_path / "odd.csv").write_text("file,label\na.png,1\n")
    (tmp_path / "open.csv").write_text("image,findings\na.png,\"" + 200_000 * "x")
    save_images(tmp_path, "cases/MASS/c.png", *(f"cases/NORMAL/{i}.png" for i in range(20)))
    (tmp_path / "boxes.csv").write_text("image,finding,x,y,w,h\nc.png,MASS,1,2,wide,3\n")
    (tmp_path / "other.csv").write_text("image,finding,x,y,w,h\nd.png,MASS,1,2,3,4\n")
    with pytest.raises(SystemExit) as stopped:
        afire.main(MISTAKES[mistake].format(tmp=tmp_path, run=run).split())
    assert stopped.value.code == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("afire.py")]
    assert len(told) == 1 and len(told[0]) > 30


def test_a_mistake_in_the_shell_leaves_no_traceback(tmp_path):
    done = shell("pretrain", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "nowhere" in done.stderr


def test_the_readme_names_the_lines_where_things_are():
    readme = Path(afire.__file__).with_name("README.md").read_text(encoding="utf-8")
    lines = Path(afire.__file__).read_text(encoding="utf-8").splitlines()
    links = re.findall(r"\[`(\w+)`\]\(afire\.py#L(\d+)\)", readme)
    assert len(links) > 15
    for name, line in links:
        assert re.match(rf"(def|class) {name}\b", lines[int(line) - 1]), name
