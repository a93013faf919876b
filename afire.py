#!/usr/bin/env python3
"""AFiRe: anatomy-driven self-supervised learning for fine-grained representation of radiographs.

A single-file reference implementation of Liu, He, Wen, Yang and Chen, AAAI 2025 (arXiv:2504.10972).

    python afire.py pretrain --data FOLDER --labels CSV       or without options, on phantoms
    python afire.py eval                                      an encoder beside the same untrained

A Vision Transformer is pre-trained on *normal* chest radiographs only, with two token-level tasks:
(I) a position shows roughly the same anatomy in every patient, so its tokens are pulled towards a
prototype of that position; (II) synthetic lesions are added, and the normal image is restored.

                        teacher: moving average of the student
    x  normal --------> encoder --E^T--> head --Q^T--> moving average ----> P --Sinkhorn--> C
    |                                                                       |               |
    + lesions M                                                      Task I: L_cate      L_stru
    |                                                                       |               |
    x' ---------------> encoder --E^S--> head --Q^S-------------------------+---------------+
                        student   |
                                  +--> tokens under M masked --> decoder --> Task II: L_rest to x

    x, x'     normal radiograph, and the same with lesions          (B, 1, H, W) in [0, 1]
    M         synthetic lesion mask: grey levels added to x         (B, 1, H, W) in [0, 1]
    L         number of patches; a position is a patch's index      (H / patch) * (W / patch)
    E^S, E^T  encoder of the student and the teacher; its tokens    (B, 1 + L, D), class token first
    Q^S, Q^T  head outputs over K pseudo-clusters                   (B, L, K)
    P         spatial-aware prototypes: running mean of Q^T         (L, K)
    C         P after Sinkhorn-Knopp: soft assignment of positions  (L, K), rows sum to 1
    N, A      normal and abnormal tokens; a token is abnormal if M > 0 anywhere in its patch

The file has two halves. The method is complete at class AFiRe: lesions, Vision Transformer, head
and prototypes, losses. Below it stands what runs it: options, training, evaluation, checkpoints,
data, phantoms, figures, command line.

In docstrings [P] marks what the paper says, [R] what the authors' released code does
(github.com/LYH-hh/AFiRe at commit 660d917; none of it is copied here), [D] our own choice.
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import datetime
import hashlib
import inspect
import io
import json
import math
import os
import re
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from tqdm import tqdm


# ---- Synthetic lesion mask (Fig. 2, left) --------------------------------------------------------

def synthetic_lesion_mask(images, generator=None, centre=None, offset=0):
    """Adds 1 to 4 synthetic lesions to each image: -> x', M [P: Fig. 2; R: the numbers].

    A lesion is a crop of the image's own tissue times a Gaussian window, resized to a random height
    and width, and added at a random place. Where lesions overlap they add up. Only lesion pixels
    are clipped at 235 / 255, and none is darkened [D; R: the whole image is clipped].

    images (B, 1, H, W) in [0, 1]; centre (B, 2) as from texture_centre, computed if not given;
    offset: number of images that processes of lower rank hold; their random numbers are skipped, so
    that lesions do not depend on the number of processes. Returns the images with lesions and the
    mask, the grey levels that were added, both shaped like images; x' == x where M == 0.
    """
    B, _, H, W = images.shape
    device = images.device
    grey = images.squeeze(1).float()                                           # (B, H, W)
    if centre is None:
        centre = texture_centre(images)

    # Texture: 60 x 60 px (at 224; scaled with the image) around the centre, shifted to lie inside.
    h = max(1, round(60 * H / 224))
    w = max(1, round(60 * W / 224))
    top = (centre[:, 0] - h / 2).round().clamp(0, H - h).long()                # (B,)
    left = (centre[:, 1] - w / 2).round().clamp(0, W - w).long()
    b = torch.arange(B, device=device).view(B, 1, 1)
    row = top.view(B, 1, 1) + torch.arange(h, device=device).unsqueeze(1)      # (B, h, 1)
    column = left.view(B, 1, 1) + torch.arange(w, device=device)               # (B, 1, w)
    texture = grey[b, row, column]                                             # (B, h, w)
    v = torch.linspace(-1, 1, h, device=device).unsqueeze(1)
    u = torch.linspace(-1, 1, w, device=device)
    window = torch.exp(-(u ** 2 + v ** 2) / 0.5)                               # (h, w)
    window = (window - window.min()) / (window.max() - window.min()).clamp_min(1e-6)

    # For each of 4 candidate lesions, random numbers for height, width, y and x. The fifth number
    # of the first candidate chooses how many of them exist.
    rng_device = generator.device if generator else device
    uniform = torch.rand((offset + B, 4, 5), generator=generator, device=rng_device)[offset:]
    uniform = uniform.to(device, non_blocking=True).unsqueeze(3)
    height, width, y, x, number = uniform.unbind(2)                            # (B, 4, 1)
    count = 1 + (4 * number[:, :1]).floor()                                    # (B, 1, 1), 1 to 4
    exists = torch.arange(4, device=device).view(4, 1) < count                 # (B, 4, 1)

    # Resizing and placing is linear and separable: M is the sum over lesions n of
    # rows_n @ (0.5 * window * texture) @ columns_n^T, without what is below one grey level.
    rows = bilinear_weights(height, y, h, H) * exists.unsqueeze(3)             # (B, 4, H, h)
    columns = bilinear_weights(width, x, w, W)                                 # (B, 4, W, w)
    with torch.autocast(device.type, enabled=False):
        mask = torch.einsum("bnyi,bij,bnxj->byx", rows, 0.5 * window * texture, columns)
    mask = torch.where(mask < 1 / 255, 0, mask.clamp_max(1)).unsqueeze(1)      # (B, 1, H, W)
    lesioned = torch.maximum(images, (images + mask).clamp_max(235 / 255))
    return lesioned, mask


def bilinear_weights(random_size, random_start, texture_size, length):
    """Matrices that resize texture_size pixels and place them on an axis of length pixels.

    random_size, random_start (B, 4, 1) in [0, 1) choose a size of 16 to 128 px (at 224 px), and a
    start for which the lesion lies inside the image. Returns (B, 4, length, texture_size), zero
    outside of the lesion.
    """
    smallest = max(1, round(16 * length / 224))
    largest = max(1, round(128 * length / 224))
    size = smallest + (random_size * (largest - smallest + 1)).floor()         # in pixels
    start = (random_start * (length - size + 1)).floor()
    pixel = torch.arange(length, device=size.device) - start                   # (B, 4, length)
    position = ((pixel + 0.5) * texture_size / size - 0.5).clamp(0, texture_size - 1)
    distance = position.unsqueeze(3) - torch.arange(texture_size, device=size.device)
    inside = (pixel >= 0) & (pixel < size)
    return (1 - distance.abs()).clamp_min(0) * inside.unsqueeze(3)


def texture_centre(images):
    """The largest bright region's centre [P: Fig. 2; R]: (B, 1, H, W) in [0, 1] -> (B, 2), y, x."""
    levels = (images.squeeze(1).float() * 255).round().long()                  # (B, H, W)
    bright = levels > otsu_threshold(levels).view(-1, 1, 1)
    return enclosing_circle_centre(largest_region(bright))


def otsu_threshold(levels):
    """Otsu's threshold (1979); pixels above it are bright: (B, H, W) in 0..255 -> (B,)."""
    levels = levels.flatten(1)                                                 # (B, H * W)
    counts = torch.zeros(len(levels), 256, device=levels.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=counts.dtype))
    pixels_up_to = counts.cumsum(1)                        # at or below each level, (B, 256)
    sum_up_to = (counts * torch.arange(256, device=levels.device)).cumsum(1)
    n = pixels_up_to[:, -1:]
    mean = sum_up_to[:, -1:] / n
    # The variance between the two classes, up to a factor, (B, 256)
    between_classes = ((mean * pixels_up_to - sum_up_to) ** 2
                       / (pixels_up_to * (n - pixels_up_to)).clamp_min(1))
    return between_classes.argmax(1)


def largest_region(bright, rounds=12):
    """The largest 8-connected component, by pixel count [D; R: by contour area]: (B, H, W) bool."""
    # Connected components by pointer jumping, for a batch, on any device. In the end all pixels of
    # a component have one label, the highest index in it. Spreading labels to neighbours alone
    # takes as many rounds as the longest path; replacing a label by the label of the pixel that it
    # points at is faster. The worst of the mazes tried, of 1024 px, takes 10 rounds. Labels are
    # float32, exact below 2^24.
    B, H, W = bright.shape
    pixel = torch.arange(H * W, device=bright.device, dtype=torch.float)
    label = pixel.expand(B, -1)                            # at first its own index, (B, H * W)
    dark = ~bright.flatten(1)
    for _ in range(rounds):
        # Neighbours share their highest label ...
        highest = label.masked_fill(dark, 0).view(B, 1, H, W)
        highest = F.max_pool2d(highest, 3, stride=1, padding=1).flatten(1)
        highest = torch.where(dark, pixel, highest)
        # ... the pixel that the old label points at takes it too. Then every pixel replaces its
        # label by that of the pixel it points at, twice.
        label = label.scatter_reduce(1, label.long(), highest, "amax")
        label = label.gather(1, label.long())
        label = label.gather(1, label.long())
    label = label.long()
    size = torch.zeros_like(pixel).expand(B, -1).scatter_add(1, label, (~dark).float())
    largest = label == size.argmax(1, keepdim=True)
    return bright & largest.view(B, H, W)


def enclosing_circle_centre(region, steps=80):
    """The centre of the smallest circle around a region: (B, H, W) bool -> (B, 2), y and x."""
    # Badoiu and Clarkson (2003): step i moves 1/i of the way to the farthest point; 80 steps come
    # within 2.5 px of the exact centre, at 224 px. Only the first and the last pixel of a row can
    # be farthest.
    B, H, W = region.shape
    row = torch.arange(H, device=region.device, dtype=torch.float)
    column = torch.arange(W, device=region.device, dtype=torch.float)
    first = torch.where(region, column, W).amin(2)                             # (B, H)
    last = torch.where(region, column, -1).amax(2)                             # (B, H)
    points = torch.stack([row.repeat(B, 2), torch.cat([first, last], 1)], 2)   # (B, 2H, 2)
    inside = region.any(2).repeat(1, 2).unsqueeze(2)                           # (B, 2H, 1)
    centre = (points * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp_min(1)
    points = torch.where(inside, points, centre)           # an empty row has no effect
    for i in range(2, steps + 2):
        distance = (points - centre).square().sum(2)                           # (B, 2H)
        farthest = distance.argmax(1).view(B, 1, 1).expand(B, 1, 2)
        centre = centre + (points.gather(1, farthest) - centre) / i            # (B, 1, 2)
    return centre.squeeze(1)


def abnormal_tokens(mask, patch_size):
    """A of Fig. 2: tokens with any lesion in their patch [R]: M (B, 1, H, W) -> (B, L) bool."""
    return patchify(mask, patch_size).amax(2) > 0


# ---- Vision Transformer: names and arithmetic as in timm, positions as in MAE --------------------

def patchify(images, patch_size):
    """(B, C, H, W) -> (B, L, C * p * p), row by row."""
    return F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)


def unpatchify(patches, patch_size):
    """(B, L, C * p * p) -> (B, C, H, W): the exact inverse of patchify, for square images."""
    side = math.isqrt(patches.shape[1])
    return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (side, side)), patch_size)


def sincos_positions(side, dim):
    """MAE's sin-cos position embedding [R]: -> (1, 1 + L, dim).

    Half the channels encode the column, half the row; the class token has zeros.
    """
    frequency = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(side, dtype=torch.float64).outer(frequency)           # (side, dim / 4)
    column = torch.cat([angle.sin(), angle.cos()], 1).expand(side, side, -1)   # (side, side, d / 2)
    grid = torch.cat([column, column.transpose(0, 1)], 2).flatten(0, 1)        # (L, dim)
    return F.pad(grid, (0, 0, 1, 0)).float().unsqueeze(0)


def init_weights(module):
    """As in MAE: Xavier's uniform for all linear layers, the patch embedding too; zero biases."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)


class Attention(nn.Module):
    """Multi-head self-attention: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))                # (B, T, 3, h, D / h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                   # (B, h, T, D / h)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)            # (B, T, h, D / h)
        return self.proj(x.flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim, num_heads, eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))                        # (B, T, 4 D)
        return x + self.mlp["fc2"](hidden)


class ViT(nn.Module):
    """Vision Transformer [P: ViT-B/16]: (B, C, H, W) -> (B, 1 + L, D), the class token first."""

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12,
                 num_heads=12):
        super().__init__()
        self.config = dict(img_size=img_size, patch_size=patch_size, in_chans=in_chans,
                           embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        projection = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.ModuleDict({"proj": projection})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        positions = sincos_positions(img_size // patch_size, embed_dim)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)          # (1, 1 + L, D)
        self.blocks = nn.Sequential(*[Block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)             # (B, L, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)           # (B, 1 + L, D)
        return self.norm(self.blocks(x + self.pos_embed))


class Decoder(nn.Module):
    """Restores images from tokens [P; R]: (B, 1 + L, D), masked (B, L) bool -> (B, C, H, W).

    A masked token (in Fig. 2, an abnormal one) is replaced by a learned token of its position.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, encoder_dim=768, embed_dim=512,
                 depth=8, num_heads=16):
        super().__init__()
        self.patch_size = patch_size
        side = img_size // patch_size
        self.embedding = nn.Linear(encoder_dim, embed_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, side * side, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(side, embed_dim), requires_grad=False)
        self.blocks = nn.Sequential(*[Block(embed_dim, num_heads, 1e-5) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim)                # eps of 1e-5 here and in the blocks [R]
        self.image_pred = nn.Linear(embed_dim, in_chans * patch_size ** 2)
        self.apply(init_weights)

    def forward(self, tokens, masked):
        x = self.embedding(tokens)                                             # (B, 1 + L, d)
        patches = torch.where(masked.unsqueeze(2), self.mask_token.to(x.dtype), x[:, 1:])
        x = torch.cat([x[:, :1], patches], 1) + self.pos_embed                 # (B, 1 + L, d)
        x = self.image_pred(self.norm(self.blocks(x))[:, 1:])                  # (B, L, C * p * p)
        return unpatchify(x, self.patch_size)


# ---- Projection head and spatial-aware prototypes (Fig. 3) ---------------------------------------

class AnatomyHead(nn.Module):
    """Projection head: logits of tokens over K pseudo-clusters [R]: (B, L, D) -> (B, L, K).

    The MLP is shared; each position has its own last layer. A logit is the cosine between the
    MLP's output and a row of that layer.
    """

    def __init__(self, in_dim, num_patches, out_dim=256, hidden_dim=1024, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim))
        # A logit does not depend on the norm of a row, but a step of the optimiser rotates a long
        # row less. Rows of N(0, 1) have norms near sqrt(bottleneck_dim). With short rows (in an
        # early version) the last layers alone fitted the targets, and tokens barely clustered [D].
        self.last_layers = nn.Parameter(torch.randn(num_patches, out_dim, bottleneck_dim))
        for layer in self.mlp[::2]:
            nn.init.normal_(layer.weight, std=0.02)        # R: truncated at 100 std
            nn.init.zeros_(layer.bias)

    def forward(self, tokens):
        z = self.mlp(tokens).float()                                           # (B, L, d)
        # Float32 also under autocast: a cosine in half precision is off by up to 0.003.
        with torch.autocast(z.device.type, enabled=False):
            rows = self.last_layers.float()                                    # (L, K, d)
            logits = torch.einsum("bld,lkd->blk", F.normalize(z, dim=2), rows)
            return logits / rows.norm(dim=2)


def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Sinkhorn-Knopp [R]: (L, K) -> assignment (L, K), rows sum to 1, columns nearly to L / K."""
    log_c = scores.float() / epsilon                       # (L, K), in logarithms: no overflow
    for _ in range(iterations):
        log_c = log_c - log_c.logsumexp(0, keepdim=True)
        log_c = log_c - log_c.logsumexp(1, keepdim=True)
    return log_c.exp()


def gather(x):
    """(B, ...) -> (processes * B, ...), of all processes; identity without torch.distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    return torch.cat(torch.distributed.nn.functional.all_gather(x.contiguous()))


class SpatialPrototypes(nn.Module):
    """P, a prototype per position: the running mean of the teacher's logits there [P; R].

    In the first epoch the Trainer sets the momentum to 0 [R].
    """

    def __init__(self, num_patches, out_dim, momentum=0.75):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("prototypes", torch.zeros(num_patches, out_dim))  # (L, K)

    @torch.no_grad()
    def update(self, teacher_logits):
        """P <- m P + (1 - m) mean of teacher_logits (B, L, K); the first update copies the mean."""
        mean = gather(teacher_logits.float().mean(0, keepdim=True)).mean(0)    # (L, K)
        # P is 0 before the first update only; a Python `if` would synchronise with the GPU.
        weight = torch.where(self.prototypes.any(), 1 - self.momentum, 1.0)
        self.prototypes.lerp_(mean, weight)

    @torch.no_grad()
    def assignment(self):
        """C, the soft assignment of positions to the pseudo-clusters: (L, K)."""
        return sinkhorn(self.prototypes)


# ---- Losses (Figs. 3 and 4) ----------------------------------------------------------------------

def structure_consistency_loss(logits, assignment, normal, temperature=0.1):
    """L_stru: every normal token predicts the soft assignment of its position [P; R].

        - 1 / |N|  sum over (i, j) in N, over k:  C_jk log softmax_k(Q^S_ij / temperature)

    logits (B, L, K), assignment (L, K), normal (B, L) bool -> scalar, 0 if no token is normal.
    """
    cross_entropy = -(assignment * F.log_softmax(logits.float() / temperature, 2)).sum(2)  # (B, L)
    return torch.where(normal, cross_entropy, 0).sum() / normal.sum().clamp_min(1)


def category_consistency_loss(logits, prototypes, normal, abnormal, temperature=0.1):
    """L_cate: at a position, normal tokens are nearer to the prototype than abnormal ones [D].

        s_ij = cos(Q^S_ij, P_j) / temperature
        mean over (i, j) in N of  - log  exp s_ij / (exp s_ij + mean over A at j of exp s_aj)

    A stand-in: we had no access to the full text of the paper, and the released code lacks L_cate.
    It is InfoNCE with the prototype, a constant here, as the anchor. With the mean of the negatives
    instead of their sum, it is log 2 for any batch size if tokens are indistinguishable.

    logits (B, L, K), prototypes (L, K), normal and abnormal (B, L) bool -> scalar. Positions
    without both kinds of token are ignored; 0 if none is left.
    """
    s = F.cosine_similarity(logits.float(), prototypes, dim=2, eps=1e-3) / temperature  # (B, L)
    # (eps: the gradient of zero vectors stays finite in half precision.)
    contrasted = abnormal.any(0)                           # positions with a negative, (L,)
    positive = normal & contrasted                                             # (B, L)
    # Where a position has no negative, all tokens stand in: its result is not used, but the
    # gradient of an empty logsumexp would be NaN.
    negative = abnormal | ~contrasted                                          # (B, L)
    log_sum = s.masked_fill(~negative, -math.inf).logsumexp(0)                 # (L,)
    log_mean = log_sum - negative.sum(0).log()
    # - log(exp s / (exp s + m)) = softplus(log m - s)
    return torch.where(positive, F.softplus(log_mean - s), 0).sum() / positive.sum().clamp_min(1)


def restoration_loss(restored, target):
    """L_rest: mean squared error over all pixels, lesions or not [R]: equal shapes -> scalar."""
    return F.mse_loss(restored.float(), target.float())


# ---- AFiRe (Fig. 2, whole) -----------------------------------------------------------------------

def normalise(images, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """Three equal channels, ImageNet's mean and std [R]: (B, 1, H, W) -> (B, 3, H, W)."""
    return torch.cat([(images - m) / s for m, s in zip(mean, std)], 1)


def features(encoder, images):
    """An encoder's patch tokens, without the class token (no loss reads it).

    images (B, 1, H, W) in [0, 1] -> (B, L, D).
    """
    return encoder(normalise(images))[:, 1:]


class AFiRe(nn.Module):
    """Student, teacher (its moving average), decoder and prototypes.

    weights: of L_stru, L_cate and L_rest [R: 1 for L_stru and L_rest]. Call update_teacher after
    each step of the optimiser.
    """

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12,
                 out_dim=256, head_dim=1024, bottleneck_dim=256, decoder_dim=512, decoder_depth=8,
                 decoder_heads=16, weights=(1.0, 1.0, 1.0)):
        super().__init__()
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.weights = weights

        def branch():
            encoder = ViT(img_size, patch_size, 3, embed_dim, depth, num_heads)
            head = AnatomyHead(embed_dim, self.num_patches, out_dim, head_dim, bottleneck_dim)
            return nn.ModuleDict({"encoder": encoder, "head": head})

        self.student = branch()
        self.decoder = Decoder(img_size, patch_size, 3, embed_dim, decoder_dim, decoder_depth,
                               decoder_heads)
        self.teacher = branch().requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.prototypes = SpatialPrototypes(self.num_patches, out_dim)

    def forward(self, normal, lesioned, mask):
        """x, x', M, (B, 1, H, W) in [0, 1] -> {"loss", "structure", "category", "restoration"}.

        In train mode the teacher updates the prototypes first.
        """
        if self.training:
            with torch.no_grad():
                tokens = features(self.teacher["encoder"], normal)             # E^T (B, L, D)
                self.prototypes.update(self.teacher["head"](tokens))           # Q^T into P

        tokens = self.student["encoder"](normalise(lesioned))                  # E^S (B, 1 + L, D)
        logits = self.student["head"](tokens[:, 1:])                           # Q^S (B, L, K)
        abnormal = abnormal_tokens(mask, self.patch_size)                      # A (B, L)
        restored = self.decoder(tokens, abnormal)              # Task II, (B, 3, H, W)

        # Task I compares with the tokens of all processes, as a single process would [D].
        logits = gather(logits)
        abnormal = gather(abnormal)
        prototypes = self.prototypes.prototypes                                # P (L, K)
        assignment = self.prototypes.assignment()                              # C (L, K)
        losses = {"structure": structure_consistency_loss(logits, assignment, ~abnormal),
                  "category": category_consistency_loss(logits, prototypes, ~abnormal, abnormal),
                  "restoration": restoration_loss(restored, normalise(normal))}
        total = sum(weight * loss for weight, loss in zip(self.weights, losses.values()))
        return {"loss": total, **losses}

    @torch.no_grad()
    def update_teacher(self, momentum):
        """Teacher <- momentum * teacher + (1 - momentum) * student, encoder and head [R]."""
        for average, parameter in zip(self.teacher.parameters(), self.student.parameters()):
            average.lerp_(parameter, 1 - momentum)


# ---- Options: architectures, presets, command line -----------------------------------------------

ARCHITECTURES = {
    "vit_micro": dict(embed_dim=128, depth=4, num_heads=2, out_dim=64, head_dim=128,
                      bottleneck_dim=128, decoder_dim=64, decoder_depth=2, decoder_heads=2),
    "vit_small": dict(embed_dim=384, depth=12, num_heads=6),
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12)}                   # [P]
PRESETS = {                                # paper: the release's recipe for one GPU; small: ours
    "paper": dict(arch="vit_base", img_size=224, patch_size=16, levels="file", epochs=400,
                  batch_size=64, lr=5e-4, warmup_epochs=10, teacher_momentum=0.996,
                  structure_weight=1.0, category_weight=1.0, restoration_weight=1.0),
    "small": dict(arch="vit_micro", img_size=64, patch_size=8, levels="equal", epochs=38,
                  batch_size=32, lr=8e-3, warmup_epochs=3, teacher_momentum=0.99,
                  structure_weight=1.0, category_weight=1.0, restoration_weight=1.0),
    "phantoms": dict(arch="vit_micro", img_size=64, patch_size=8, levels="file", epochs=18,
                     batch_size=16, lr=16e-3, warmup_epochs=2, teacher_momentum=0.97,
                     structure_weight=0.2, category_weight=0.2, restoration_weight=1.0)}


def number(kind, minimum, maximum=10 ** 9):
    """The type of an option: an int or a float from minimum to maximum."""
    def number_of(text):
        if not minimum <= kind(text) <= maximum:           # NaN is refused too
            raise argparse.ArgumentTypeError(f"choose from {minimum} to {maximum}, not {text}")
        return kind(text)
    number_of.__name__ = kind.__name__                     # argparse says "invalid int value"
    return number_of


def parse_arguments(argv=None):
    """The command line: -> its options. Explicit options override the preset."""
    parser = argparse.ArgumentParser(prog="afire.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    pretrain = commands.add_parser(
        "pretrain", help="pre-train on normal radiographs", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"preset {name}: {settings}" for name, settings in PRESETS.items()))
    evaluate = commands.add_parser(
        "eval", help="evaluate an encoder beside the same one untrained", allow_abbrev=False)
    for command in pretrain, evaluate:
        add = command.add_argument
        add("--data", help="folder of PNG or JPEG files; default: phantoms; in eval, the run's")
        add("--labels", help="CSV by data/make_table.py: image, findings, patient, split, mask; "
            "without it all images are normal; in eval, scored")
        add("--device", default="auto", help="cpu, cuda, cuda:1 or mps; default: cuda, or else cpu")
        add("--levels", choices=("file", "equal"), help="grey levels as in the file, or equalised; "
            "default in eval: as in pre-training if that is known, else file")
    add("--ckpt", default="runs/afire", help="folder of a run (default: runs/afire), or a ViT")
    add("--out", help="folder for the results; default: eval in the run's folder")
    add = pretrain.add_argument
    add("--all-normal", action="store_true", help="without --labels: images of subfolders too")
    add("--out", default="runs/afire", help="folder (default: runs/afire); a run in it is resumed")
    add("--init", help="checkpoint that the encoder starts from")
    add("--preset", choices=PRESETS, help="defaults of the options below, see the end; if not "
        "given: phantoms without --data, else paper on a GPU and small elsewhere")
    add("--arch", choices=ARCHITECTURES, help="encoder")
    add("--img-size", type=number(int, 1, 4096), help="side of the square that images become")
    add("--patch-size", type=number(int, 1, 4096), help="side of a patch, in pixels")
    add("--epochs", type=number(int, 1), help="passes over the normal images, in whole batches")
    add("--batch-size", type=number(int, 1), help="images in a step, over all processes")
    add("--lr", type=number(float, 0), help="peak learning rate at batch size 256, scaled with it")
    for loss in "structure", "category", "restoration":
        add(f"--{loss}-weight", type=number(float, 0), help="weight of this loss; 0 disables it")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="random seed (default: 0)")
    options = parser.parse_args(argv)
    if options.command == "pretrain":
        gpu = torch.cuda.is_available() and options.device != "cpu"
        default = "phantoms" if not options.data else "paper" if gpu else "small"
        preset = options.preset or default
        pretrain.set_defaults(preset=preset, method="AFiRe", **PRESETS[preset])
        options = parser.parse_args(argv)
    return options


# ---- Pre-training --------------------------------------------------------------------------------

class InputError(Exception):
    """Bad input or a bad option, in one sentence with the remedy; the command line exits with 2."""


def build_model(options):
    """AFiRe as a run's options describe it; its initial weights depend on the seed alone."""
    torch.manual_seed(options.seed)
    weights = (options.structure_weight, options.category_weight, options.restoration_weight)
    return AFiRe(options.img_size, options.patch_size, weights=weights,
                 **ARCHITECTURES[options.arch])


def get_device(name):
    """The torch.device of this name; "auto" is CUDA if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name).item()                 # "meta" has no numbers
    except (RuntimeError, AssertionError) as error:        # torch has no such device, or no CUDA
        raise InputError(f"--device {name} is not available: try --device cpu") from error
    return torch.device(name)


def to_device(array, device):
    """An array as a tensor on the device, copied without blocking the host."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@torch.no_grad()
def in_batches(function, images, rows, device, bar=None):
    """Applies function to images[rows] in batches of 64 at most: -> its results, concatenated.

    bar: a tqdm, which counts the images.
    """
    results = []
    for batch in np.array_split(rows, 1 + len(rows) // 64):
        results.append(function(to_device(images[batch], device) / 255))
        if bar is not None:
            bar.update(len(batch))
    return torch.cat(results)


def cosine(start, end, progress):
    """From start to end along half a cosine, for progress from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """The training state (model and optimiser), and the step that changes it [R]."""

    metrics = ("loss", "structure", "category", "restoration", "gradient_norm")

    def __init__(self, options, device, per_epoch, rank=0, world=1):
        self.options = options
        self.device = device
        self.per_epoch = per_epoch                         # steps
        self.rank = rank
        self.world = world
        self.model = build_model(options).to(device).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        decayed = [p for p in self.parameters if p.ndim > 1]
        biases_and_norms = [p for p in self.parameters if p.ndim == 1]
        self.optimizer = torch.optim.AdamW([{"params": decayed}, {"params": biases_and_norms}],
                                           fused=device.type != "mps")
        # A GPU without native bf16 trains in float32.
        self.bf16 = (device.type == "cuda"
                     and torch.cuda.is_bf16_supported(including_emulation=False))
        self.parallel = self.model
        if world > 1:
            self.parallel = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)

    def schedules(self, iteration):
        """-> learning rate, weight decay and momentum of the teacher at this iteration."""
        warmup = self.options.warmup_epochs * self.per_epoch
        total = self.options.epochs * self.per_epoch
        peak = self.options.lr * self.options.batch_size / 256
        if iteration < warmup:
            lr = peak * (iteration + 1) / warmup
        else:
            lr = cosine(peak, 1e-6, (iteration - warmup) / (total - warmup))
        weight_decay = cosine(0.04, 0.4, iteration / total)
        return lr, weight_decay, cosine(self.options.teacher_momentum, 1.0, iteration / total)

    def step(self, images, centres, iteration):
        """A step on this process's images (b, 1, S, S) uint8, their centres (b, 2): -> metrics."""
        first_epoch = iteration < self.per_epoch
        lr, weight_decay, momentum = self.schedules(iteration)
        for group, decay in zip(self.optimizer.param_groups, (weight_decay, 0.0)):
            group.update(lr=lr, weight_decay=decay)
        self.model.prototypes.momentum = 0.0 if first_epoch else 0.75          # [R]

        seed = np.random.SeedSequence((self.options.seed, iteration)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        normal = to_device(images, self.device) / 255
        lesioned, mask = synthetic_lesion_mask(normal, generator, to_device(centres, self.device),
                                               offset=self.rank * len(images))

        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self.parallel(normal, lesioned, mask)
        losses["loss"].backward()
        if first_epoch:
            self.model.student["head"].last_layers.grad = None                 # frozen, as in DINO
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norms = torch.stack([gradient.norm() for gradient in gradients])
        scales = (3 / norms).clamp_max(1)                      # per parameter, as in DINO [R]
        for gradient, scale in zip(gradients, scales):
            gradient.mul_(scale)
        self.optimizer.step()
        self.model.update_teacher(momentum)
        return torch.stack([*losses.values(), norms.norm()]).detach()


def processes():
    """-> rank of this process, number of processes, as torchrun sets them."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if rank >= world or (world > 1 and "MASTER_ADDR" not in os.environ):
        raise InputError(f"RANK {rank} and WORLD_SIZE {world} were not set by torchrun: start "
                         "with it, or unset them")
    return rank, world


def load_init(model, path):
    """Starts both encoders of the model from a checkpoint: -> hashes of its training images."""
    checkpoint = read_checkpoint(path)
    ours = model.student["encoder"]
    encoder = load_encoder(path, ours.config["img_size"], checkpoint)
    if encoder.config != ours.config:
        raise InputError(f"--init {path} is a ViT of {encoder.config}, but --arch and --patch-size "
                         f"ask for {ours.config}")
    for branch in model.student, model.teacher:
        branch["encoder"].load_state_dict(encoder.state_dict())
    return trained_images(checkpoint, path)


def resume(trainer, path, run):
    """Loads a checkpoint into the trainer and into run, the state of a new run.

    It is refused if its options or images differ from those of the new run.
    """
    checkpoint = read_checkpoint(path)
    model, before = model_of_run(checkpoint, path)
    may_differ = ("out", "data", "labels", "all_normal", "device", "preset")   # images are compared
    different = [f"{name.replace('_', '-')} {getattr(before, name, None)}"
                 for name, value in vars(trainer.options).items()
                 if getattr(before, name, None) != value and name not in may_differ]
    if before.images != run["images"]:
        different.append("other images")
    if different:
        raise InputError(f"the run in {path.parent} was started with {' and '.join(different)}: "
                         "repeat its command to resume it, or choose another --out")
    trainer.model.load_state_dict(model.state_dict())
    trainer.optimizer.load_state_dict(checkpoint["optimizer"])
    run["history"] = checkpoint["history"]
    run["earlier_images"] = checkpoint["earlier_images"]


def pretrain(options):
    """Trains in the folder options.out, or resumes the run in it; also under torchrun.

    Everything random depends on seed and step alone: on a CPU a resumed run equals an unbroken one
    bit for bit, and several processes equal one up to rounding.
    """
    rank, world = processes()
    device = get_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)                      # where this process's NCCL works
    if options.img_size % options.patch_size or options.batch_size % world:
        raise InputError("--img-size must be a multiple of --patch-size, and --batch-size of the "
                         f"number of processes ({world})")
    if world > 1:                                          # the first one may decode for hours
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                             timeout=datetime.timedelta(days=1))
    data = load_radiographs(options.data, options.img_size, labels=options.labels,
                            levels=options.levels, all_normal=options.all_normal,
                            with_masks=False)
    normals = data.normal(data.train)                                          # (n,)
    if not len(normals):
        raise InputError("no image in train is normal; the findings are: "
                         f"{', '.join(data.findings) or 'none'}")
    if len(normals) < options.batch_size:
        raise InputError(f"--batch-size must be at most {len(normals)}, the normal images in train")
    print(f"preset {options.preset}: pre-training on {len(normals)} normal images (excluded: "
          f"{len(data.train) - len(normals)} with findings, {len(data.test)} held out)")
    if options.epochs <= options.warmup_epochs:
        print(f"--epochs {options.epochs} ends in the warm-up of {options.warmup_epochs} epochs: "
              "the learning rate never reaches its peak")

    trainer = Trainer(options, device, len(normals) // options.batch_size, rank, world)
    out = Path(options.out)
    run = {"history": [],                                  # a record an epoch
           "images": [data.hashes[row] for row in normals], "earlier_images": []}  # those of --init
    if (out / "checkpoint.pth").exists():
        resume(trainer, out / "checkpoint.pth", run)
        print(f"resuming after epoch {len(run['history'])} of {options.epochs}")
    elif options.init:
        run["earlier_images"] = load_init(trainer.model, options.init)
    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        (out / "config.json").write_text(json.dumps(vars(options), indent=2))
        if options.labels and not run["history"]:
            (out / "table.csv").write_bytes(Path(options.labels).read_bytes())
    train(trainer, data.images, normals, run, out)
    if rank == 0:
        save_checkpoint(trainer.model.teacher["encoder"].state_dict(), out / "encoder.pth")
        plot_restoration(out / "restoration.png", trainer.model.eval(),
                         to_device(data.images[normals[:4]], device) / 255)
    print(f"in {out}: checkpoint.pth, encoder.pth (the teacher's), log.jsonl, restoration.png")
    if world > 1:
        torch.distributed.barrier()                        # wait until rank 0 has written
        torch.distributed.destroy_process_group()


def train(trainer, images, normals, run, out):
    """The epochs that are left of a run, on images[normals]; its state is saved after each."""
    options = trainer.options
    per_epoch = trainer.per_epoch
    start = len(run["history"])
    centres = in_batches(texture_centre, images, normals, trainer.device).cpu().numpy()    # (n, 2)
    with tqdm(total=options.epochs * per_epoch, initial=start * per_epoch, desc="pretrain",
              unit="step", mininterval=1, disable=trainer.rank > 0) as bar:
        for epoch in range(start, options.epochs):
            order = np.random.default_rng((options.seed, epoch)).permutation(len(normals))
            batches = order[:per_epoch * options.batch_size].reshape(per_epoch, -1)
            sums = torch.zeros(len(trainer.metrics), device=trainer.device)
            for i, batch in enumerate(batches):
                shard = np.array_split(np.sort(batch), trainer.world)[trainer.rank]    # (b,)
                iteration = epoch * per_epoch + i
                sums += trainer.step(images[normals[shard]], centres[shard], iteration)
                bar.update()
                if i % 10 == 9 or i == per_epoch - 1:      # tolist() waits for the GPU
                    loss, *_, gradient_norm = (sums / (i + 1)).tolist()
                    bar.set_postfix(loss=f"{loss:.3f}")
                    if not math.isfinite(gradient_norm):   # alike in all processes: all stop here
                        raise InputError(f"the gradient is not finite in epoch {epoch + 1}: try a "
                                         "lower --lr in another --out")
            means = (gather(sums.unsqueeze(0)).mean(0) / per_epoch).tolist()
            run["history"].append({"epoch": epoch + 1, **dict(zip(trainer.metrics, means)),
                                   "lr": trainer.schedules(iteration)[0]})
            if trainer.rank == 0:
                log = [json.dumps(record) + "\n" for record in run["history"]]
                (out / "log.jsonl").write_text("".join(log))
                save_checkpoint({"config": vars(options), "epoch": epoch + 1, **run,
                                 "model": trainer.model.state_dict(),
                                 "optimizer": trainer.optimizer.state_dict()},
                                out / "checkpoint.pth")


# ---- Evaluation ----------------------------------------------------------------------------------

def auroc(scores, labels):
    """P(a positive scores above a negative), ties count half: (n,), (n,) bool -> float or NaN."""
    scores = np.asarray(scores, float)
    labels = np.asarray(labels, bool)
    if labels.all() or not labels.any() or np.isnan(scores).any():
        return math.nan
    _, rank = np.unique(scores, return_inverse=True)
    positives = np.bincount(rank, labels)                  # at every distinct score
    negatives = np.bincount(rank, ~labels)
    negatives_below = negatives.cumsum() - negatives / 2
    return float((positives * negatives_below).sum() / positives.sum() / negatives.sum())


def nan_mean(values, axis=None):
    """np.nanmean, without its warning where nothing is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis)


def auroc_by_finding(scores, labels):
    """AUROC of each finding, averaged over the repeats in which it is defined.

    scores (repeats, T, F), labels (T, F) bool -> (F,).
    """
    areas = [[auroc(repeat[:, f], labels[:, f]) for f in range(labels.shape[1])]
             for repeat in scores]
    return nan_mean(areas, 0)


class PatchMeans(nn.Module):
    """An encoder that learns nothing: a token is the mean of its patch's pixels [D].

    (B, 3, H, W) -> (B, 1 + L, 1), zero for the class token.
    """

    def __init__(self, patch_size):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, x):
        means = patchify(x, self.patch_size).mean(2, keepdim=True)             # (B, L, 1)
        return F.pad(means, (0, 0, 1, 0))


def average_in_cells(tokens, cells=4):
    """Tokens averaged in cells x cells parts of their grid [D]: (B, L, D) -> (B, D * cells ** 2).

    A probe on them knows the position, which the mean of all tokens loses. Tokens of a smaller
    grid, and tokens of a single channel (PatchMeans), are not averaged.
    """
    grid = unpatchify(tokens, 1)                                               # (B, D, side, side)
    if grid.shape[1] > 1 and grid.shape[3] > cells:
        grid = F.adaptive_avg_pool2d(grid, cells)
    return grid.flatten(1)


def linear_probe(x, y, penalty=None):
    """Ridge regression on standardised x [D]: (n, D), y (n, F) bool -> weight (D, F), bias (F,).

    The penalty is D / 2 by default: among 10, 100, 1,000 and 10,000 for 2,048 features, 1,000 was
    best for AFiRe, MAE and the untrained network together, on patients held out of training.
    """
    penalty = x.shape[1] / 2 if penalty is None else penalty
    mean = x.mean(0)
    std = x.std(0, correction=0) + 1e-6
    z = (x - mean) / std
    y = y.to(x.dtype)
    targets = y - y.mean(0)
    ridge = penalty * torch.eye(min(z.shape), dtype=x.dtype)
    if len(z) < z.shape[1]:                                # dual form, as images are fewer
        weight = z.T @ torch.linalg.solve(z @ z.T + ridge, targets)
    else:
        weight = torch.linalg.solve(z.T @ z + ridge, z.T @ targets)
    weight = weight / std.unsqueeze(1)
    return weight, y.mean(0) - mean @ weight


def learn_from_few(learn, labels, train):
    """Test scores (T, F) of learn(rows) for 1, 10, 100 % of train: -> {"1%": (repeats, T, F)}."""
    random = np.random.default_rng(0)
    scores = {}
    for percent, repeats in (1, 5), (10, 5), (100, 1):
        results = []
        for _ in range(repeats):
            rows = random.permutation(train)[:max(2, round(len(train) * percent / 100))]
            constant = labels[rows].all(0) | ~labels[rows].any(0)      # nothing can be learned
            results.append(np.where(constant, math.nan, learn(rows)))
        scores[f"{percent}%"] = np.stack(results)
    return scores


def restoration_error(model, images):
    """Error of tokens, a quarter of which is masked at a time [D]: (B, 1, S, S) -> (B, L).

    model: an AFiRe. A token is restored from the other tokens' encodings, without its own.
    """
    x = normalise(images)
    tokens = model.student["encoder"](x)                                       # (B, 1 + L, D)
    odd = torch.arange(math.isqrt(tokens.shape[1] - 1), device=x.device) % 2   # (side,)
    quarter = (2 * odd.unsqueeze(1) + odd).flatten()                           # (L,), 0 to 3
    error = 0
    for i in range(4):
        masked = (quarter == i).expand(len(x), -1)                             # (B, L)
        restored = model.decoder(tokens, masked)                               # (B, 3, S, S)
        error = error + masked * patchify((restored - x) ** 2, model.patch_size).mean(2)
    return error


def prototype_score(logits, prototypes):
    """1 - cosine between head outputs (B, L, K) and the prototypes (L, K) [D]: -> (B, L)."""
    return 1 - F.cosine_similarity(logits, prototypes, dim=2)


def neighbour_score(tokens, references):
    """Mean distance to the 5 nearest reference tokens (N, L, D) of a position [D]: -> (B, L)."""
    distance = torch.cdist(tokens.transpose(0, 1), references.transpose(0, 1))     # (L, B, N)
    nearest = distance.topk(min(5, len(references)), largest=False).values         # (L, B, 5)
    return nearest.mean(2).T


@torch.no_grad()
def anomaly_maps(images, rows, device, encoder, model=None, normals=(), bar=None):
    """How abnormal the tokens of images[rows] look [D]: -> {score: (T, side, side)}, T rows.

    prototype    prototype_score. With normal images at hand, the prototype is the mean of their
                 head outputs, so that an untrained network has one too; else, the learned P
    restoration  restoration_error; with normal images, standardised by position
    neighbours   neighbour_score

    images (n, 1, S, S) uint8; model: an AFiRe, which the first two scores need; normals: rows of
    normal images, which the third one needs; bar: see in_batches.
    """
    names = []
    if model:
        names += ["prototype", "restoration"]
        prototypes = model.prototypes.prototypes                               # (L, K)
        mean = 0                                           # the error is not standardised
        std = 1                                            # without normal images
    if len(normals):
        names += ["neighbours"]
        references = in_batches(lambda x: features(encoder, x), images, normals, device, bar)
    if model and len(normals):
        logits = [model.teacher["head"](part) for part in references.split(64)]    # it is wide
        prototypes = torch.cat(logits).mean(0)
        errors = in_batches(lambda x: restoration_error(model, x), images, normals, device, bar)
        mean = errors.mean(0)                                                  # (L,)
        std = errors.std(0, correction=0) + 1e-6

    def score(x):
        tokens = features(encoder, x)                                          # (B, L, D)
        scores = []
        if model:
            scores += [prototype_score(model.teacher["head"](tokens), prototypes),
                       (restoration_error(model, x) - mean) / std]
        if len(normals):
            scores += [neighbour_score(tokens, references)]
        return torch.stack(scores, 1)                                          # (B, scores, L)

    maps = in_batches(score, images, rows, device, bar)                        # (T, scores, L)
    side = math.isqrt(maps.shape[2])
    grids = maps.unflatten(2, (side, side)).cpu().numpy()
    return {name: grids[:, i] for i, name in enumerate(names)}


def image_scores(maps):
    """An image's score is the mean of its highest quarter of tokens: (T, side, side) -> (T,)."""
    tokens = np.sort(maps.reshape(len(maps), -1))                              # (T, L)
    return tokens[:, -max(1, tokens.shape[1] // 4):].mean(1)


def pixel_scores(maps, masks):
    """Maps and masks on one grid of at least 56 x 56 pixels, or of all pixels if there are fewer.

    maps (T, side, side), masks (T, S, S) bool -> scores and labels, both (T, pixels).
    """
    step = max(1, masks.shape[1] // 56)
    labels = torch.from_numpy(masks[:, step // 2::step, step // 2::step])      # (T, 56, 56)
    grids = torch.from_numpy(maps).unsqueeze(1)
    grids = F.interpolate(grids, labels.shape[1:], mode="bilinear")            # (T, 1, 56, 56)
    return grids.flatten(1).numpy(), labels.flatten(1).numpy()


def masks_of_test(data):
    """The test images that the pixel AUROC is of, (T,) bool, and their masks, (m, S, S) bool.

    Normal images, whose mask is empty, and abnormal ones with a mask; none if no image has one.
    """
    abnormal = data.labels[data.test].any(1)                                   # (T,)
    has_mask = abnormal & np.isin(data.test, list(data.masks))
    measured = (~abnormal | has_mask) & has_mask.any()
    masks = np.zeros((measured.sum(), *data.images.shape[2:]), bool)
    for mask, row in zip(masks, data.test[measured]):
        mask[:] = data.masks.get(row, False)
    return measured, masks


def normal_references(data, limit=1000):
    """Rows of normal training images that anomalies are compared with: (N,), at most limit [D]."""
    random = np.random.default_rng(0)
    return random.permutation(data.normal(data.train))[:limit]         # bounds time and memory


def evaluate_network(encoder, model, data, measured, masks, normals, device, bar=None):
    """All metrics of a network: -> report for metrics.json, arrays for predictions.npz.

    model: the AFiRe of the encoder, or None; data: Radiographs; measured, masks: as by
    masks_of_test; normals, bar: see anomaly_maps.
    """
    truth = data.labels[data.test]                                             # (T, F)
    report = {"linear": {}, "anomaly": {}}
    arrays = {}

    # Few labels: a linear probe [D], on features of half precision, as there are many.
    pooled = in_batches(lambda images: average_in_cells(features(encoder, images)).half(),
                        data.images, np.arange(len(data.images)), device, bar).cpu()   # (n, 16 D)

    def probe(rows):
        weight, bias = linear_probe(pooled[rows].float(), torch.from_numpy(data.labels[rows]))
        return (pooled[data.test].float() @ weight + bias).numpy()             # (T, F)

    for fraction, scores in learn_from_few(probe, data.labels, data.train).items():
        by_finding = auroc_by_finding(scores, truth)
        report["linear"][fraction] = {
            "macro_auroc": float(nan_mean(by_finding)),
            "per_finding": dict(zip(data.findings, by_finding.tolist()))}
        arrays[f"linear {fraction}"] = scores

    # Anomalies, by comparison with normal images.
    maps = anomaly_maps(data.images, data.test, device, encoder, model, normals, bar)
    for score, grids in maps.items():
        pixels, inside = pixel_scores(grids[measured], masks)
        report["anomaly"][score] = {
            "image_auroc": auroc(image_scores(grids), truth.any(1)),
            "pixel_auroc": auroc(pixels.ravel(), inside.ravel())}
    return report, arrays | maps


def print_table(report):
    """Rows for the AUROCs of metrics.json, columns for the networks, and why some are missing."""
    trained = report["checkpoint"]
    known = {level: not math.isnan(trained["anomaly"]["neighbours"][f"{level}_auroc"])
             for level in ("image", "pixel")}
    rows = [(f"linear probe, {fraction} of the labels", "linear", fraction, "macro_auroc")
            for fraction in trained["linear"]]
    rows += [(f"abnormal {level}s by {score}", "anomaly", score, f"{level}_auroc")
             for level in known if known[level] for score in trained["anomaly"]]
    print(f"{'AUROC':36}{'trained':>11}{'untrained':>11}{'pixels':>11}")
    for title, part, key, figure in rows:
        areas = [network[part].get(key, {}).get(figure, math.nan) for network in report.values()]
        print(f"{title:36}" + "".join(f"{area:11.3f}" for area in areas).replace("nan", "  -"))
    for fraction, metrics in trained["linear"].items():
        areas = np.array(list(metrics["per_finding"].values()))
        if np.isnan(areas).any():
            print(f"{fraction}: the mean of {(~np.isnan(areas)).sum()} of {len(areas)} findings; "
                  "the others are in all or none of the images to learn from or to test on")
    if not known["image"]:
        print("abnormal images and pixels: undefined, as no image in test is abnormal")
    elif not known["pixel"]:
        print("abnormal pixels: undefined, as no abnormal image in test has a mask")


def write_maps(out, data, maps, seen):
    """maps.npz, scores.csv and anomaly.png of the test images, the most abnormal first.

    maps {score: (T, side, side)}, of which the first score counts; seen (n,) bool: images of the
    pre-training.
    """
    scores = np.stack([image_scores(grids) for grids in maps.values()], 1)     # (T, scores)
    order = np.argsort(-scores[:, 0], kind="stable")
    rows = data.test[order]
    scores = scores[order]
    maps = {name: grids[order] for name, grids in maps.items()}
    np.savez_compressed(out / "maps.npz", images=np.array(data.names)[rows],
                        **{name: grids.astype(np.float16) for name, grids in maps.items()})
    with open(out / "scores.csv", "w", newline="", encoding="utf-8",
              errors="surrogateescape") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", "findings", "pretrained_on", *maps])
        for row, values in zip(rows, scores.round(4)):
            pretrained_on = "yes" if seen[row] else "no"
            writer.writerow([data.names[row], data.findings_of(row), pretrained_on, *values])
    captions = [f"{data.names[row][-36:]}\n{data.findings_of(row)[:36] or 'no known finding'}\n"
                f"{[*maps][0]} {value:.3f}" for row, value in zip(rows[:5], scores[:, 0])]
    plot_images(out / "anomaly.png", {"image": data.images[rows[:5], 0]},
                {name: grids[:5] for name, grids in maps.items()}, captions,
                [data.masks.get(row) for row in rows[:5]])


def results_folder(path, run, name):
    """Where results go: RUN/name for a run, name-FILE beside the file of an encoder alone."""
    path = path.resolve()                                  # of a link, its target's
    return Path(os.path.relpath(path.parent), name if run else f"{name}-{path.name}")


def grey_levels(chosen, run, path):
    """-> the grey levels that an encoder is evaluated on, and why these."""
    if chosen:
        return chosen, "--levels"
    if run:
        return run.levels, "as in its pre-training"
    file = path.with_name("config.json")                   # perhaps another program's
    config = file.read_text(errors="replace") if file.is_file() else ""
    found = re.search(r'"levels": "(file|equal)"', config)
    if found:
        return found[1], f"as in {file}"
    return "file", "a guess: choose --levels as in its pre-training"


def without_pretrained(data, seen):
    """Rows of data.test without patients of whom an image was pre-trained on; seen (n,) bool."""
    patients = np.array(data.patients)
    known = np.isin(patients[data.test], patients[seen])                       # (T,)
    if known.any():
        images = seen[data.test].sum()
        print(f"{images} test images left out, as they were used in pre-training, and "
              f"{known.sum() - images} others of the same patients")
    return data.test[~known]


def evaluate(options):
    """An encoder beside the same encoder untrained: writes its metrics and prints a table.

    Without labels, all images are scored, by the scores that need no normal images.
    """
    device = get_device(options.device)
    path = find_checkpoint(options.ckpt)
    models, run, trained_on = load_models(path)
    for encoder, model in models.values():
        (model or encoder).to(device).eval().requires_grad_(False)
    encoder, model = models["checkpoint"]
    levels, origin = grey_levels(options.levels, run, path)
    print(f"{path}: images of {encoder.config['img_size']} px; grey levels: {levels} ({origin})")
    # By default, the run's own data
    source = run if run and not options.data else options
    labels = options.labels or source.labels
    data = load_radiographs(source.data, encoder.config["img_size"], labels=labels, levels=levels,
                            all_normal=not labels)
    if source is run:
        missing = set(run.images).difference(data.hashes)
        if missing:
            raise InputError(f"{len(missing)} of the {len(run.images)} images that {path} was "
                             f"pre-trained on are not in {source.data}: name the set with --data")
    seen = np.isin(data.hashes, trained_on)                                    # (n,)
    out = Path(options.out or results_folder(path, run, "eval"))
    out.mkdir(parents=True, exist_ok=True)
    report = {}
    if data.findings:
        data.test = without_pretrained(data, seen)
        normals = normal_references(data)
        tested = len(data.normal(data.test))
        if min(len(normals), tested) < 2:
            raise InputError(f"--data {source.data} has {len(normals)} normal images in train and "
                             f"{tested} in test: two of each are needed: add some to its table")
        measured, masks = masks_of_test(data)
        if masks.any() and not measured.all():
            print(f"{(~measured).sum()} abnormal test images have no mask: not counted by pixel")
        arrays = {"images": np.array(data.names)[data.test],
                  "patients": np.array(data.patients)[data.test],
                  "findings": np.array(data.findings), "labels": data.labels[data.test],
                  "measured": measured, "masks": masks}
        models["pixels"] = (PatchMeans(encoder.config["patch_size"]), None)
        # restoration_error, of an AFiRe, needs a second pass over the normal images.
        images = sum(len(data.images) + len(data.test) + len(normals) * (2 if pair[1] else 1)
                     for pair in models.values())
        with tqdm(total=images, desc="evaluate", unit="image", mininterval=1) as bar:
            for name, pair in models.items():
                report[name], results = evaluate_network(*pair, data, measured, masks, normals,
                                                         device, bar)
                arrays |= {f"{name}/{key}": array for key, array in results.items()}
        maps = {score: arrays[f"checkpoint/{score}"] for score in report["checkpoint"]["anomaly"]}
    elif model:
        print("no findings are known: all images are scored, without metrics")
        data.test = data.used()
        with tqdm(total=len(data.test), desc="evaluate", unit="image", mininterval=1) as bar:
            maps = anomaly_maps(data.images, data.test, device, encoder, model, bar=bar)
    else:
        raise InputError(f"{path}: an encoder alone can only be evaluated with findings: give "
                         "--labels")

    for name in "metrics.json", "predictions.npz", "scores.csv", "maps.npz", "anomaly.png":
        (out / name).unlink(missing_ok=True)               # of an earlier evaluation
    write_maps(out, data, maps, seen)
    if report:
        np.savez_compressed(out / "predictions.npz", **arrays)
        metrics = json.loads(json.dumps(report), parse_constant=lambda _: None)        # NaN: null
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2))
        print_table(report)
    if not model:
        print("prototype and restoration are left out: they need AFiRe's head and decoder")
    print(f"in {out}: maps.npz (the map of every image), scores.csv, anomaly.png"
          f"{', metrics.json, predictions.npz' if report else ''}")


# ---- Checkpoints ---------------------------------------------------------------------------------

def save_checkpoint(state, path):
    """Writes beside the path, then renames: neither a kill nor a full disk harms the old file."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error}") from error


def find_checkpoint(path):
    """The path of a checkpoint, or of the one in a run's folder: -> Path of a file."""
    path = Path(path)
    path = path / "checkpoint.pth" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}: name one, or make one with `pretrain`")
    return path


def read_checkpoint(path):
    """A dictionary of tensors and plain data; a file with anything else is refused, not run."""
    path = find_checkpoint(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):   # DINO's options are in one
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:                             # a broken file can raise anything
        if zipfile.is_zipfile(path) or path.read_bytes()[:1] == b"\x80":       # zip or a pickle
            reason = "holds more than tensors: save its state dict alone"
        else:
            reason = "is no checkpoint, or is cut off or damaged: get it again"
        raise InputError(f"{path} {reason}") from error


def model_of_run(checkpoint, path):
    """-> AFiRe with the weights of a run's checkpoint, and the run's options and images."""
    try:
        options = argparse.Namespace(**checkpoint["config"], images=checkpoint["images"])
        model = build_model(options)
        model.load_state_dict(checkpoint["model"])
        if (checkpoint["config"].keys() != vars(parse_arguments(["pretrain"])).keys()
                or not {"history", "earlier_images", "optimizer"} <= checkpoint.keys()):
            raise KeyError("other options, or a part that resume needs")
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        encoder = find_checkpoint(path).with_name("encoder.pth")
        raise InputError(f"{path} was written by another version of afire.py; its encoder still "
                         f"works: --ckpt or --init {encoder}") from error
    return model, options


def trained_images(checkpoint, path):
    """Hashes of the files that a checkpoint was pre-trained on, to keep them out of the test."""
    hashes = checkpoint.get("images", ["unknown"]) + checkpoint.get("earlier_images", [])
    if "unknown" in hashes:
        print(f"{path} does not record its training images: some may be among the test images")
    return hashes


def load_models(path):
    """-> {"checkpoint": (ViT, AFiRe), "random_init": (ViT, AFiRe)}, options, hashes of its images.

    AFiRe and the options of the run are None for an encoder alone.
    """
    checkpoint = read_checkpoint(path)
    hashes = trained_images(checkpoint, path)
    if "history" in checkpoint:
        trained, run = model_of_run(checkpoint, path)
        both = {"checkpoint": trained, "random_init": build_model(run)}
        models = {name: (model.teacher["encoder"], model) for name, model in both.items()}
        return models, run, hashes
    encoder = load_encoder(path, checkpoint=checkpoint)
    channels = encoder.config["in_chans"]
    if channels != 3:
        raise InputError(f"{path} takes {channels} channels: use an encoder of 3 channels")
    torch.manual_seed(0)
    untrained = ViT(**encoder.config)
    return {"checkpoint": (encoder, None), "random_init": (untrained, None)}, None, hashes


def load_encoder(path, img_size=None, checkpoint=None):
    """The encoder of a checkpoint, ours, the release's, MAE's, DINO's or timm's: -> ViT.

    The teacher's, if there is one [R]. Positions are interpolated to img_size pixels. checkpoint:
    the content of the file, if it has been read.
    """
    first = "patch_embed.proj.weight"
    state = checkpoint or read_checkpoint(path)
    arch = state["config"].get("arch") if isinstance(state.get("config"), dict) else None
    known = ARCHITECTURES.get(arch, {}).get("num_heads")   # a run of ours says it
    for key in "teacher", "model", "state_dict":
        if isinstance(state.get(key), dict):
            state = state[key]
    prefixes = [key.removesuffix(first) for key in state if key.endswith(first)]
    if not prefixes:
        raise InputError(f"{path} holds no ViT: there is no {first} among {list(state)[:4]}")
    prefixes = [prefix for prefix in prefixes if "teacher" in prefix] or prefixes
    if len(prefixes) > 1:
        raise InputError(f"{path} holds several encoders, {' and '.join(prefixes)}: save the "
                         "wanted one alone")
    prefix = prefixes[0]
    state = {key.removeprefix(prefix): value for key, value in state.items()
             if key.startswith(prefix)}
    try:
        dim, in_chans, _, patch_size = state[first].shape
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        heads = known or min(16, max(1, dim // 64))        # assumed: 64 channels each, at most 16
        positions = state["pos_embed"]                                 # (1, 1 + L, D)
        size = img_size or math.isqrt(positions.shape[1] - 1) * patch_size
        if size % patch_size:
            raise InputError(f"{path}: {size} px are not a multiple of the patch, {patch_size} px")
        vit = ViT(size, patch_size, in_chans, dim, depth, heads)
        unknown = [key for key in state if key not in vit.state_dict()
                   and not key.startswith(("head", "decoder", "mask_token"))]
        if unknown:
            raise InputError(f"{path} has {', '.join(unknown[:4])}, which this ViT lacks")
        grid = unpatchify(positions[:, 1:], 1)                         # (1, D, side, side)
        grid = F.interpolate(grid, (size // patch_size,) * 2, mode="bicubic", antialias=True)
        state["pos_embed"] = torch.cat([positions[:, :1], patchify(grid, 1)], 1)
        vit.load_state_dict({key: state[key] for key in vit.state_dict()})
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds no complete ViT: {error}") from error
    print(f"{path}: took the encoder {prefix or 'without a prefix'}, a ViT of width {dim}, {depth} "
          f"blocks, {heads} heads{'' if known else ' (assumed)'}")
    return vit


# ---- Data: a folder of images and its table ------------------------------------------------------

@dataclasses.dataclass
class Radiographs:
    """n images with F findings. Unusable and equal files are neither in train nor in test."""
    names: list                   # n paths below the data folder, with /
    images: np.ndarray            # (n, 1, S, S) uint8, memory-mapped
    labels: np.ndarray            # (n, F) bool
    findings: list                # F names
    patients: list                # n names; an image's own name where the patient is unknown
    hashes: list                  # n, of the files' bytes: an image is known by its content
    train: np.ndarray             # rows to train on
    test: np.ndarray              # rows that are held out
    masks: dict                   # row of test: (S, S) bool, where its findings are, if known

    def used(self):
        """Rows of train and test, sorted."""
        return np.union1d(self.train, self.test)

    def normal(self, rows):
        """Those of the rows that have no finding, in their order."""
        return rows[~self.labels[rows].any(1)]

    def findings_of(self, row):
        """As in a table, joined by |."""
        return "|".join(np.array(self.findings)[self.labels[row]])


def read_image(file, size, levels="file"):
    """A PNG or JPEG file (a path or a stream) as a viewer shows it: -> (size, size) uint8.

    More than 8 bits are scaled between the 0.5 and the 99.5 percentile, as a burned-in marker is
    brighter than the rest. levels "equal": the histogram is equalised, as in MIMIC-CXR-JPG.
    """
    with Image.open(file, formats=["PNG", "JPEG"]) as image:
        if image.mode[0] not in "IF" and "16" in str(image.tile[0][3]):
            raise ValueError("16 bits in colour")          # Pillow would drop the lower 8
        image.draft("L", (size * 3 // 2, size * 3 // 2))   # a large JPEG at half size or less
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        pixels = np.asarray(image, np.float32)
        low, high = np.percentile(pixels, [0.5, 99.5])
        pixels = (pixels - low) * (255 / max(high - low, 1e-6))
        image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    image = TF.resize(image.convert("L"), [size, size])
    return np.array(TF.equalize(image) if levels == "equal" else image)


def read_mask(file, image, size):
    """The mask of an image, both paths: -> (size, size) bool, True where most of it is white."""
    try:
        with Image.open(file) as mask, Image.open(image) as source:
            ImageOps.exif_transpose(mask, in_place=True)
            if source.format == "JPEG" or "exif" in source.info:   # else Pillow decodes a whole PNG
                ImageOps.exif_transpose(source, in_place=True)
            levels = np.asarray(mask.convert("L"))
            if mask.size != source.size or 0 < levels.max() < 128:
                raise ValueError(f"its {mask.size} pixels, levels up to {levels.max()}, must be "
                                 f"{source.size}, white (255) where the findings are")
    except Exception as error:                             # a decoder can raise anything
        raise InputError(f"the mask {file} of {image} cannot be used: {error}") from error
    return np.asarray(Image.fromarray(levels).resize((size, size), Image.Resampling.BOX)) > 127


def find_files(folder, *suffixes):
    """Paths below a folder, with /, of files that have one of the suffixes and are not hidden.

    The folders of runs are skipped: their pictures are not radiographs.
    """
    hidden = (".", "@", "$", "__MACOSX")
    names = []
    visited = set()                                        # a link may lead to a folder above it
    for parent, folders, files in os.walk(folder, followlinks=True):
        if "checkpoint.pth" in files or os.path.realpath(parent) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if not name.startswith(hidden)]
        names += [os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/")
                  for name in files
                  if name.lower().endswith(suffixes) and not name.startswith(hidden)]
    return names


def read_folder(folder, all_normal):
    """Rows as from read_table: all images are normal and to train on.

    Without all_normal, a folder in which there may be anything else is refused.
    """
    names = find_files(folder, ".png", ".jpg", ".jpeg")
    dicom = find_files(folder, ".dcm", ".dicom")
    doubtful = [name for name in names if re.search(r"(?i)[/\\]|mask", name)]
    if (dicom or doubtful) and not all_normal:
        command = f"dicom {folder} --images PNG_FOLDER" if dicom else f"folders {folder}"
        raise InputError(f"--data {folder} has {min(dicom or doubtful)}: if all of them are "
                         "normal, add --all-normal; else what they mean belongs in a table: python "
                         f"data/make_table.py {command} > labels.csv")
    return {name: {"findings": set(), "patient": "", "split": "train"} for name in names}


def read_table(file, folder):
    """A table as data/make_table.py writes it: -> {image: the cells of its row}, findings a set.

    Rows without a split are left out. InputError, with the remedy, for anything else.
    """
    remedy = f"python data/make_table.py table {file} --data {folder} > labels.csv"

    def wrong(problem):
        return InputError(f"{file}{problem}: {remedy}")

    table = {}
    line = 0
    content = Path(file).read_bytes()
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        titles = list(reader.fieldnames or ())
        if any(titles.count(title) != 1 for title in ("image", "findings", "patient", "split")):
            raise wrong(", line 1: it needs the columns image, findings, patient, split, once each")
        for row in reader:
            line = reader.line_num
            if (None in row or None in row.values() or not row["image"] or row["image"] in table
                    or row["split"] not in ("train", "test", "")):
                raise wrong(f", line {line}: it needs {len(titles)} cells, an image that has no "
                            "other row, and train, test or nothing as split")
            row["findings"] = set(row["findings"].split("|")) if row["findings"] else set()
            for name in sorted(row["findings"]):
                if name != name.strip() or re.search(
                        r"(?i)[,;]|^((normal|no[ _-]?finding|healthy)s?)?$", name):
                    raise wrong(f", line {line}: {name!r} is no finding: they are joined "
                                "by |, and a normal image has none")
            table[row["image"]] = row
    except UnicodeDecodeError as error:
        raise wrong(f", line {content[:error.start].count(10) + 1}: not UTF-8") from error
    except csv.Error as error:
        raise wrong(f", after line {line}: {error} (is a quote not closed?)") from error

    missing = [name for name in table if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise wrong(f": {len(missing)} rows have no file below {folder}, the first is {missing[0]}")
    masks = {row.get("mask") for row in table.values()}
    others = set(find_files(folder, ".png", ".jpg", ".jpeg")).difference(table, masks)
    used = {name: row for name, row in table.items() if row["split"]}
    if not used:
        raise wrong(": no row has train or test as split")
    print(f"{file}: {len(used)} images; left out: {len(table) - len(used)} rows without a split, "
          f"{len(others)} files without a row")
    train, test = [{row["patient"] for row in used.values() if row["split"] == split} - {""}
                   for split in ("train", "test")]
    if train & test:
        raise wrong(f": {len(train & test)} patients are in train and in test, the first is "
                    f"{min(train & test)}")
    return used


def decode(path, size, levels):
    """-> hash of a file (16 hexadecimal digits), its image (size, size) uint8, why it is unusable.

    An unusable file has an empty hash, a usable one an empty reason.
    """
    try:
        content = Path(path).read_bytes()
        image = read_image(io.BytesIO(content), size, levels)
        if image.min() < image.max():
            return hashlib.sha256(content).hexdigest()[:16], image, ""
        reason = "blank"
    except Exception as error:                             # a decoder can raise anything
        reason = f"unreadable, {error if isinstance(error, ValueError) else type(error).__name__}"
    return "", np.zeros((size, size), np.uint8), reason


def decode_files(paths, size, levels, cache):
    """Decodes files once: -> images (n, 1, S, S) uint8, hashes (n), the cache that has both.

    Under torchrun the first process of a machine decodes, and the others wait for it. A kill or a
    full disk leaves no cache, as it gets its name when it is complete.
    """
    versions = []
    for path in paths:
        status = os.stat(path, follow_symlinks=os.path.exists(path))   # a broken link has its own
        versions.append((path, status.st_size, status.st_mtime_ns))
    rules = inspect.getsource(read_image)                  # an edit of it gives a new cache
    key = hashlib.sha256(repr((rules, size, levels, versions)).encode()).hexdigest()[:16]
    file = Path(cache or "runs/cache", f"{key}.images")
    partial = file.with_suffix(f".{os.getpid()}.partial")  # two runs at once write their own
    if os.environ.get("LOCAL_RANK", "0") == "0" and not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as stream, concurrent.futures.ThreadPoolExecutor() as pool:
                files = pool.map(lambda path: decode(path, size, levels), paths)
                for content_hash, image, _ in tqdm(files, "decode", len(paths), delay=1):
                    stream.write(content_hash.encode().ljust(16, b"\0") + image.tobytes())
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(file)
        except OSError as error:
            raise InputError(f"cannot write {file}: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    layout = np.dtype([("hash", "S16"), ("image", np.uint8, (1, size, size))])
    records = np.memmap(file, layout, "r")
    return records["image"], records["hash"].astype(str).tolist(), file


def load_radiographs(data, img_size, *, labels=None, levels="file", all_normal=False,
                     with_masks=True, cache=None):
    """-> Radiographs: of a folder and its table, of a folder of normal images, or phantoms."""
    if not data and not labels:
        print("without --data: 2,500 phantoms, a fifth of them held out")
        return phantom_radiographs(img_size)
    if not data or not Path(data).is_dir():
        raise InputError(f"--data {data} is no folder: name the one that holds the images")
    table = read_table(labels, data) if labels else read_folder(data, all_normal)
    if not table:
        raise InputError(f"--data {data} has no PNG or JPEG file to use; DICOM becomes PNG by "
                         f"python data/make_table.py dicom {data} --images FOLDER > labels.csv")
    names = sorted(table)
    rows = [table[name] for name in names]
    paths = [os.path.abspath(os.path.join(data, name)) for name in names]
    images, hashes, file = decode_files(paths, img_size, levels, cache)

    first = {}                                             # row of a content
    for i, content_hash in enumerate(hashes):
        if content_hash and first.setdefault(content_hash, i) != i:
            kept = rows[first[content_hash]]               # has the findings of all, and a mask
            kept["findings"] |= rows[i]["findings"]
            kept["mask"] = kept.get("mask") or rows[i].get("mask")
    used = np.array(list(first.values()), int)
    skipped = np.setdiff1d(np.arange(len(names)), used)
    if len(skipped):
        i = skipped[0]
        reason = decode(paths[i], img_size, levels)[2]
        if hashes[i]:
            reason = f"equal to {names[first[hashes[i]]]}"
        print(f"skipped: {len(skipped)} files, unreadable, blank or equal to another; the first is "
              f"{names[i]} ({reason}); to try them again, delete {file}")
    if not len(used):
        raise InputError(f"--data {data} has no image that can be used: see the line above")
    findings = sorted(set().union(*[rows[i]["findings"] for i in used]))
    truth = np.array([[name in row["findings"] for name in findings] for row in rows], bool)
    patients = [row["patient"] or name for row, name in zip(rows, names)]
    test = np.array([rows[i]["split"] == "test" for i in used])
    masks = {}
    for i in used[test]:
        if rows[i].get("mask") and with_masks:
            masks[i] = read_mask(os.path.join(data, rows[i]["mask"]), paths[i], img_size)
            if masks[i].any() and not rows[i]["findings"]:
                raise InputError(f"{labels}: {names[i]} has no finding, but its mask is "
                                 "white somewhere: correct one of them")
    print(f"{data}: {len(used)} images of {len({patients[i] for i in used})} patients, "
          f"{(~truth[used].any(1)).sum()} without findings; {(~test).sum()} to train on, "
          f"{test.sum()} held out; findings: {', '.join(findings) or 'none'}")
    unknown = sum(not rows[i]["patient"] for i in used)
    if unknown:
        print(f"patient unknown for {unknown} images: each counts as a patient of its own")
    return Radiographs(names, images, truth, findings, patients, hashes, used[~test], used[test],
                       masks)


# ---- Phantoms ------------------------------------------------------------------------------------

def edge(distance, blur):
    """A soft edge: 0 where distance < -blur (outside), 1 where distance > blur (inside)."""
    return np.clip(0.5 + 0.5 * distance / blur, 0, 1)


def ellipse(x, y, width, height, blur):
    """A soft-edged ellipse around x = y = 0 with these half axes: 1 inside, 0 outside."""
    return edge(width * (1 - np.hypot(x / width, y / height)), blur)


def draw_phantom(rng, size):
    """One image (size, size) uint8, labels (3,) bool and masks (3, size, size) bool of findings."""
    labels = rng.random(3) < 0.2
    draw = rng.uniform
    blur = 0.005 + 0.7 / size                               # no edge is sharper than a pixel
    axis = (2 * np.arange(size) + 1) / size - 1             # centres of the pixels
    y = draw(0.9, 1.1) * axis[:, None] + draw(-0.08, 0.08)  # down, -1 to 1
    x = draw(0.9, 1.15) * axis + draw(-0.08, 0.08) + draw(-0.07, 0.07) * y  # to the patient's left
    lateral = np.abs(x)                                     # distance from the midline
    shoulders = edge(y + 0.9 - 0.3 * lateral, 0.06)
    trunk = edge(draw(0.88, 1.05) - 0.12 * y - lateral, 0.04) * shoulders
    body = np.maximum(trunk, edge(draw(0.2, 0.28) - lateral, 0.04))     # with a neck
    # Lungs: the chest above the diaphragm (higher over the liver), without mediastinum and heart
    base = draw(0.35, 0.5)
    chest = body * ellipse(lateral - 0.37 - 0.1 * y, y - base, 0.36, base + 0.7, blur)
    diaphragm = base + draw(1.3, 2.2) * (lateral - 0.35) ** 2 - draw(0.03, 0.09) * (x < 0)
    mediastinum = edge(draw(0.11, 0.15) - lateral, 3 * blur)
    heart_y = y - base + 0.1
    heart_x = x - 0.1 - 0.35 * heart_y                      # leans to the patient's left
    radius = draw(0.26, 0.32)
    heart = ellipse(heart_x, heart_y, radius, 0.85 * radius, 3 * blur)
    air = chest * edge(diaphragm - y, blur) * (1 - mediastinum) * (1 - heart)
    # Findings replace air; a nodule, thinner than the lung, replaces only part of it
    side = rng.choice([-1, 1])
    nodule_x = x + side * draw(0.3, 0.5)                    # in the lung without the effusion
    nodule_y = y + draw(0.1, 0.45)                          # above the heart
    nodule = draw(0.3, 0.5) * ellipse(nodule_x, nodule_y, 0.06, 0.06, 0.03)
    surface = base - draw(0.05, 0.3) - 0.4 * lateral ** 3   # the fluid climbs the chest wall
    effusion = edge(y - surface, 3 * blur) * (side * x > 0)
    cardiomegaly = ellipse(heart_x, heart_y, 1.35 * radius, 1.15 * radius, 3 * blur)
    opacity = labels[:, None, None] * np.stack([nodule, effusion, cardiomegaly])
    masks = air * opacity > 0.05
    # Absorption: bone, and soft tissue where there is no air, denser at the hila
    ribs = np.cos(38 * (y - draw(0.3, 0.6) * lateral ** 3) + draw(0, 6))    # a wave per rib
    spine = edge(0.075 - lateral, 2 * blur) * (1 + 0.2 * np.cos(50 * y))    # a wave per vertebra
    clavicles = ellipse(lateral - 0.34, y + 0.5 + 0.2 * lateral, 0.25, 0.035, 0.05)
    bones = 0.1 * chest * edge(ribs - 0.3, 0.4) + body * (0.2 * spine + 0.16 * clavicles)
    hilum = ellipse(lateral - 0.12, y + 0.05, 0.18, 0.25, 0.15)
    air = air * np.prod(1 - opacity, 0) * (0.65 - 0.25 * hilum)
    tissue = body * (0.8 + 0.25 * edge(y, 0.6)) - air
    # Exposure and contrast vary, and grain is drawn last
    image = (1 - np.exp(-draw(0.8, 3.6) * (tissue + bones))) ** draw(0.7, 2.6)
    image += draw(0.008, 0.02) * rng.standard_normal((size, size))
    return (255 * np.clip(0.03 + 0.93 * image, 0, 1)).astype(np.uint8), labels, masks


def phantoms(n, size, seed=0):
    """Simple frontal chest radiographs [D] of 32 to 512 px; image i depends on (seed, i) alone.

    -> images (n, 1, size, size) uint8, labels (n, F) bool, masks (n, F, size, size) bool, F names.
    """
    drawn = [draw_phantom(np.random.default_rng((seed, i)), size) for i in range(n)]
    images, labels, masks = (np.stack(parts) for parts in zip(*drawn))
    return images[:, None], labels, masks, ["nodule", "effusion", "cardiomegaly"]


def phantom_radiographs(size):
    """2,500 phantoms of seed 0, of which the last fifth is held out: -> Radiographs."""
    images, labels, masks, findings = phantoms(2500, size)
    names = [f"phantom {i}" for i in range(len(images))]
    abnormal = np.flatnonzero(labels.any(1))
    return Radiographs(names, images, labels, findings, names, names, np.arange(2000),
                       np.arange(2000, 2500), {row: masks[row].any(0) for row in abnormal})


# ---- Figures -------------------------------------------------------------------------------------

def plot_images(file, columns, maps=None, captions=(), masks=()):
    """A column of images for each title, {title: (n, S, S)}, then one for each map over the first.

    maps {score: (n, side, side)} are transparent where they are low; captions: n texts on the
    images of the first column; masks: n arrays (S, S) bool, which are outlined, or None.
    """
    maps = maps or {}
    first = next(iter(columns.values()))                                       # (n, S, S)
    columns = columns | {score: first for score in maps}
    n, height, width = first.shape
    extent = (0, width, height, 0)                         # in pixels of the image
    figure = Figure(figsize=(2.2 * len(columns), 2.2 * n + 0.5), layout="constrained")
    axes = figure.subplots(n, len(columns), squeeze=False)
    for column, (title, images) in zip(axes.T, columns.items()):
        column[0].set_title(title)
        for axis, image in zip(column, images):
            axis.set(xticks=[], yticks=[])
            axis.imshow(image, "gray", vmin=images.min(), vmax=images.max(), extent=extent)
    for column, grids in zip(axes.T[len(columns) - len(maps):], maps.values()):
        low, high = np.quantile(grids, [0.5, 1])
        for axis, grid in zip(column, grids):
            opacity = ((grid - low) / max(high - low, 1e-6)).clip(0, 0.7)
            overlay = axis.imshow(grid, "inferno", vmin=low, vmax=high, alpha=opacity,
                                  interpolation="bilinear", extent=extent)
        figure.colorbar(overlay, ax=column, location="bottom", aspect=30, pad=0.01)
    for row, caption, mask in zip(axes, captions, masks):
        text = caption.encode(errors="replace").decode()   # file names may have any bytes, and $
        row[0].text(0.02, 0.98, text, transform=row[0].transAxes, verticalalignment="top",
                    fontsize=7, color="white", backgroundcolor="#000000a0", parse_math=False,
                    in_layout=False)
        if mask is not None:
            for axis in row:
                axis.contour(mask, [0.5], colors="cyan", linewidths=0.8, origin="upper",
                             extent=extent)
    figure.savefig(file, dpi=100)


@torch.no_grad()
def plot_restoration(file, model, normal):
    """x, x', x' without the patches of abnormal tokens, and these restored: (B, 1, H, W)."""
    lesioned, mask = synthetic_lesion_mask(normal, torch.Generator().manual_seed(0))
    abnormal = abnormal_tokens(mask, model.patch_size)                         # (B, L)
    restored = model.decoder(model.student["encoder"](normalise(lesioned)), abnormal)
    black, white = normalise(torch.tensor([0.0, 1.0], device=normal.device).view(2, 1, 1, 1))
    restored = ((restored - black) / (white - black))[:, 1:2].clamp(0, 1)      # one channel
    hidden = unpatchify(abnormal.unsqueeze(2).expand(-1, -1, model.patch_size ** 2),
                        model.patch_size)                                      # (B, 1, H, W) bool
    columns = {"x": normal, "x' = x + M": lesioned,
               "without hidden patches": lesioned.masked_fill(hidden, 0),
               "x', hidden patches restored": torch.where(hidden, restored, lesioned)}
    plot_images(file, {title: images[:, 0].cpu().numpy() for title, images in columns.items()})


# ---- Command line --------------------------------------------------------------------------------

def main(argv=None):
    """python afire.py pretrain | eval; on bad input, one sentence and exit status 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may have any bytes
    options = parse_arguments(argv)
    try:
        rank, _ = processes()
        if rank > 0:
            sys.stdout = open(os.devnull, "w", errors="replace")   # only the first process prints
        if options.command == "pretrain":
            pretrain(options)
        elif rank == 0:                                    # one process is enough under torchrun
            evaluate(options)
    except InputError as error:
        print(f"afire.py: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"afire.py: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        resumes = options.command == "pretrain"
        print("\nstopped" + ": the same command resumes after the last whole epoch" * resumes)
        sys.exit(130)


if __name__ == "__main__":
    main()
