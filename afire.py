#!/usr/bin/env python3
"""AFiRe: anatomy-driven self-supervised learning for fine-grained representation of radiographs.

A single-file reference implementation of Liu, He, Wen, Yang and Chen, AAAI 2025 (arXiv:2504.10972).
A Vision Transformer is pre-trained on *normal* chest radiographs only, with two tasks on tokens:
(I) a position shows the same anatomy in every patient, so its tokens are drawn to a prototype
of that position; (II) synthetic lesions are added, and the normal image is restored.

                        teacher: moving average of the student
    x  normal --------> encoder --E^T--> head --Q^T--> mean over images --> P --Sinkhorn--> C
    |                                                                       |               |
    + lesions M                                                      Task I: L_cate      L_stru
    |                                                                       |               |
    x' ---------------> encoder --E^S--> head --Q^S-------------------------+---------------+
                        student   |
                                  +--> tokens under M masked --> decoder --> Task II: L_rest to x

    x, x'     normal radiograph, and the same with lesions          (B, 1, H, W) in [0, 1]
    M         synthetic lesion mask: what was added to x            (B, 1, H, W) in [0, 1]
    L         number of tokens, also called positions               (H / patch) * (W / patch)
    E^S, E^T  tokens of the student (of x') and the teacher (of x)  (B, 1 + L, D), class token first
    Q^S, Q^T  head outputs over K pseudo-clusters                   (B, L, K)
    P         spatial-aware prototypes: running mean of Q^T         (L, K)
    C         P after Sinkhorn-Knopp: soft assignment of positions  (L, K), rows sum to 1
    N, A      normal and abnormal tokens: M > 0 anywhere in its patch makes a token abnormal

In docstrings [P] is what the paper says, [R] what the authors' released code does
(github.com/LYH-hh/AFiRe at commit 660d917; none of it is copied here), [D] our choice.
"""

import argparse
import collections
import concurrent.futures
import csv
import dataclasses
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
import zlib
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

def otsu_threshold(levels):
    """Otsu's threshold (1979); pixels above it are bright: (B, H, W) in 0..255 -> (B,)."""
    levels = levels.flatten(1)                                                 # (B, H * W)
    counts = torch.zeros(len(levels), 256, device=levels.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=counts.dtype))
    below = counts.cumsum(1)                                   # pixels up to a level, (B, 256)
    total = (counts * torch.arange(256, device=levels.device)).cumsum(1)       # sum of their levels
    n = below[:, -1:]
    mean = total[:, -1:] / n
    # The variance between the two classes, up to a factor, (B, 256)
    between_classes = (mean * below - total) ** 2 / (below * (n - below)).clamp_min(1)
    return between_classes.argmax(1)


def largest_region(bright, rounds=12):
    """The largest 8-connected component of an image [D]: (B, H, W) bool -> (B, H, W) bool."""
    # Connected components by pointer jumping. A pixel's label is the index of a pixel, at first its
    # own (as float32, exact below 2^24). In every round (1) neighbours share their highest label,
    # (2) the pixel that a label names takes it too, (3) labels jump to their label's label, twice.
    # In the end a component has one label; the worst maze tried, at 1024 px, needs 10 rounds.
    B, H, W = bright.shape
    pixel = torch.arange(H * W, device=bright.device, dtype=torch.float)
    label = pixel.expand(B, -1)                                                # (B, H * W)
    dark = ~bright.flatten(1)
    for _ in range(rounds):
        highest = label.masked_fill(dark, 0).view(B, 1, H, W)
        highest = F.max_pool2d(highest, 3, stride=1, padding=1).flatten(1)
        highest = torch.where(dark, pixel, highest)                            # (1)
        label = label.scatter_reduce(1, label.long(), highest, "amax")         # (2)
        label = label.gather(1, label.long())                                  # (3)
        label = label.gather(1, label.long())
    label = label.long()
    size = torch.zeros_like(pixel).expand(B, -1).scatter_add(1, label, (~dark).float())
    largest = label == size.argmax(1, keepdim=True)
    return bright & largest.view(B, H, W)


def enclosing_circle_centre(region, steps=80):
    """The centre of the smallest circle around a region: (B, H, W) bool -> (B, 2), y and x."""
    # Badoiu and Clarkson (2003): step i moves 1/i of the way to the farthest point; 80 steps end
    # within 2.5 px at 224. Only the first and the last pixel of a row can be farthest.
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


def texture_centre(images):
    """The largest bright region's centre [P: Fig. 2; R]: (B, 1, H, W) in [0, 1] -> (B, 2), y, x."""
    levels = (images.squeeze(1).float() * 255).round().long()                  # (B, H, W)
    bright = levels > otsu_threshold(levels).view(-1, 1, 1)
    return enclosing_circle_centre(largest_region(bright))


def bilinear_weights(size_draw, start_draw, source, length):
    """Weights that resize source pixels of an axis and place them on one of length pixels.

    size_draw, start_draw (B, 4, 1) in [0, 1): a size of 16 to 128 px (at 224 px), and a start for
    which the result lies inside. Returns (B, 4, length, source), 0 outside of the result.
    """
    smallest = max(1, round(16 * length / 224))
    largest = max(1, round(128 * length / 224))
    size = smallest + (size_draw * (largest - smallest + 1)).floor()           # in pixels
    start = (start_draw * (length - size + 1)).floor()
    pixel = torch.arange(length, device=size.device) - start                   # (B, 4, length)
    position = ((pixel + 0.5) * source / size - 0.5).clamp(0, source - 1)      # in the source
    distance = position.unsqueeze(3) - torch.arange(source, device=size.device)
    inside = (pixel >= 0) & (pixel < size)
    return (1 - distance.abs()).clamp_min(0) * inside.unsqueeze(3)


def synthetic_lesion_mask(images, generator=None, centre=None, offset=0):
    """Adds 1 to 4 synthetic lesions to each image [P: Fig. 2; R: the numbers].

    A lesion is the image's own tissue under an elliptical Gaussian, resized and added elsewhere.
    Only lesion pixels are clipped at 235 / 255, and none is darkened [D; R: the whole image].

    images (B, 1, H, W) in [0, 1]; centre (B, 2) as from texture_centre, computed if not given;
    offset: images of the batch that earlier processes hold; their random numbers are skipped.
    Returns lesioned x' and mask M, both shaped like images; x' == x where M == 0.
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
    image = torch.arange(B, device=device).view(B, 1, 1)
    row = top.view(B, 1, 1) + torch.arange(h, device=device).unsqueeze(1)      # (B, h, 1)
    column = left.view(B, 1, 1) + torch.arange(w, device=device)               # (B, 1, w)
    texture = grey[image, row, column]                                         # (B, h, w)
    v = torch.linspace(-1, 1, h, device=device).unsqueeze(1)
    u = torch.linspace(-1, 1, w, device=device)
    window = torch.exp(-(u ** 2 + v ** 2) / 0.5)                               # (h, w)
    window = (window - window.min()) / (window.max() - window.min()).clamp_min(1e-6)

    # Five random numbers for each of 4 lesions; the first one's count says how many exist.
    source = generator.device if generator else device
    draws = torch.rand((offset + B, 4, 5), generator=generator, device=source)[offset:]
    draws = draws.to(device, non_blocking=True).unsqueeze(3)
    height, width, y, x, count = draws.unbind(2)                               # (B, 4, 1)
    exists = torch.arange(4, device=device).view(4, 1) <= (4 * count[:, :1]).floor()   # (B, 4, 1)

    # Resizing and placing is linear and separable: a lesion is rows @ texture @ columns^T.
    rows = bilinear_weights(height, y, h, H) * exists.unsqueeze(3)             # (B, 4, H, h)
    columns = bilinear_weights(width, x, w, W)                                 # (B, 4, W, w)
    with torch.autocast(device.type, enabled=False):
        mask = torch.einsum("bnyi,bij,bnxj->byx", rows, 0.5 * window * texture, columns)
    mask = torch.where(mask < 1 / 255, 0, mask.clamp_max(1)).unsqueeze(1)      # (B, 1, H, W)
    lesioned = torch.maximum(images, (images + mask).clamp_max(235 / 255))
    return lesioned, mask


# ---- Vision Transformer: names and arithmetic as in timm, positions as in MAE --------------------

def patchify(images, patch_size):
    """(B, C, H, W) -> (B, L, C * p * p), row by row."""
    return F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)


def unpatchify(patches, patch_size):
    """(B, L, C * p * p) -> (B, C, H, W): the exact inverse of patchify, for square images."""
    side = math.isqrt(patches.shape[1])
    return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (side, side)), patch_size)


def abnormal_tokens(mask, patch_size):
    """A token is abnormal if any lesion is in its patch [R]: (B, 1, H, W) -> (B, L) bool."""
    return patchify(mask, patch_size).amax(2) > 0


def sincos_positions(side, dim):
    """MAE's [R], half for the column, half for the row: (1, 1 + L, dim); 0 for the class token."""
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
        self.sizes = (img_size, patch_size, in_chans, embed_dim, depth, num_heads)
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
    """Tokens (B, 1 + L, D) to images (B, C, H, W); those in masked (B, L) are replaced [P; R]."""

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
    """Logits of tokens over the K pseudo-clusters of their position [R]: (B, L, D) -> (B, L, K).

    A logit is the cosine between the token, after an MLP, and a row of its position's last layer.
    """

    def __init__(self, in_dim, num_patches, out_dim=256, hidden_dim=1024, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim))
        # Only the direction of a row counts; its length sets how slowly it turns. Rows of N(0, 1)
        # are long (sqrt(bottleneck_dim)), so that the encoder learns, not the last layers alone:
        # with short rows tokens of a position barely clustered (silhouette .01, not .31) [D].
        self.last_layers = nn.Parameter(torch.randn(num_patches, out_dim, bottleneck_dim))
        for layer in self.mlp[::2]:
            nn.init.normal_(layer.weight, std=0.02)        # [R] truncates at 100 std
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
    """P, a prototype per position: the running mean of the teacher's logits there [P; R]."""

    def __init__(self, num_patches, out_dim, momentum=0.75):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("prototypes", torch.zeros(num_patches, out_dim))  # (L, K)

    @torch.no_grad()
    def update(self, teacher_logits):
        """P <- m P + (1 - m) mean of teacher_logits (B, L, K); the first update copies the mean."""
        mean = gather(teacher_logits.float().mean(0, keepdim=True)).mean(0)    # (L, K)
        # P is 0 before the first update only; `if P.any()` would wait for the GPU.
        weight = torch.where(self.prototypes.any(), 1 - self.momentum, 1.0)
        self.prototypes.lerp_(mean, weight)

    @torch.no_grad()
    def assignment(self):
        """C, the soft assignment of positions to the pseudo-clusters: (L, K)."""
        return sinkhorn(self.prototypes)


# ---- Losses --------------------------------------------------------------------------------------

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

    A stand-in, to be replaced freely: written without access to the full text of the paper; its
    formula for L_cate is not known here, and the released code lacks it. Ours is InfoNCE with the
    prototype as the anchor. With the mean of the negatives, not their sum, it is log 2 if tokens
    are indistinguishable, for any batch size.

    logits (B, L, K), prototypes (L, K), normal and abnormal (B, L) bool -> scalar. Positions
    without both kinds of token are ignored; 0 if none is left.
    """
    # eps: the gradient of zero vectors stays finite in half precision.
    s = F.cosine_similarity(logits.float(), prototypes, dim=2, eps=1e-3) / temperature  # (B, L)
    contrasted = abnormal.any(0)                           # positions with a negative, (L,)
    positive = normal & contrasted                                             # (B, L)
    # The log of the mean over negatives. Positions without one keep all tokens, as the gradient of
    # an empty logsumexp is NaN; they are not in `positive`.
    log_sum = s.masked_fill(~abnormal & contrasted, -math.inf).logsumexp(0)    # (L,)
    log_mean = log_sum - abnormal.sum(0).clamp_min(1).log()
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
    """Patch tokens, as no loss reads the class token: (B, 1, H, W) in [0, 1] -> (B, L, D)."""
    return encoder(normalise(images))[:, 1:]


class AFiRe(nn.Module):
    """Student, teacher (moving average), decoder, prototypes; weights of the losses, 1 each [R]."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12,
                 out_dim=256, head_dim=1024, bottleneck_dim=256, decoder_dim=512, decoder_depth=8,
                 decoder_heads=16, weights=(1.0, 1.0, 1.0)):
        super().__init__()
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.weights = weights

        def network():
            encoder = ViT(img_size, patch_size, 3, embed_dim, depth, num_heads)
            head = AnatomyHead(embed_dim, self.num_patches, out_dim, head_dim, bottleneck_dim)
            return nn.ModuleDict({"encoder": encoder, "head": head})

        self.student = network()
        self.decoder = Decoder(img_size, patch_size, 3, embed_dim, decoder_dim, decoder_depth,
                               decoder_heads)
        self.teacher = network().requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.prototypes = SpatialPrototypes(self.num_patches, out_dim)

    def forward(self, normal, lesioned, mask):
        """x, x', M, (B, 1, H, W) in [0, 1] -> {"loss", "structure", "category", "restoration"}.

        In train mode the teacher updates the prototypes first.
        """
        if self.training:
            with torch.no_grad():
                teacher_tokens = features(self.teacher["encoder"], normal)     # (B, L, D)
                self.prototypes.update(self.teacher["head"](teacher_tokens))

        abnormal = abnormal_tokens(mask, self.patch_size)                      # (B, L)
        tokens = self.student["encoder"](normalise(lesioned))                  # (B, 1 + L, D)
        logits = self.student["head"](tokens[:, 1:])                           # (B, L, K)
        restored = self.decoder(tokens, abnormal)                              # (B, 3, H, W)

        logits = gather(logits)                            # task I uses the global batch
        abnormal = gather(abnormal)
        prototypes = self.prototypes.prototypes                                # (L, K)
        assignment = self.prototypes.assignment()                              # (L, K)
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


# ---- Options: declared once, here ----------------------------------------------------------------

class InputError(Exception):
    """Bad input or a bad option, in one sentence with the remedy; the command line exits with 2."""


def option(default, text, choices=None, minimum=0):
    """A field of a dataclass that is also an option of the command line."""
    metadata = {"help": text, "choices": choices, "minimum": minimum}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class DataOptions:
    """Options that both commands share."""
    data: str = option(None, "folder of radiographs; without it, phantoms are drawn")
    labels: str = option(None, "CSV: image, findings (a|b), and if known patient and split")
    device: str = option("auto", "cpu, cuda, cuda:1 or mps; auto: cuda if there is one, else cpu")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            minimum = field.metadata.get("minimum", 0)
            if isinstance(value, (int, float)) and not value >= minimum:       # nor is NaN
                name = field.name.replace("_", "-")
                raise InputError(f"--{name} {value}: choose at least {minimum}")


@dataclasses.dataclass
class PretrainOptions(DataOptions):
    """Pre-train on normal radiographs. Preset paper is the release's recipe for one GPU [R]."""
    out: str = option("runs/afire", "folder of the run; an existing run is resumed")
    init: str = option(None, "checkpoint that the encoder starts from")
    preset: str = option(None, "set of defaults; if not given: phantoms without --data, else paper "
                         "on a GPU and small elsewhere", ("paper", "small", "phantoms"))
    arch: str = option("vit_base", "encoder", ("vit_micro", "vit_small", "vit_base"))
    img_size: int = option(224, "side of the square that images are resized to, in px", minimum=1)
    patch_size: int = option(16, "side of a patch, in pixels", minimum=1)
    levels: str = option("file", "grey levels as in the file, or equalised", ("file", "equal"))
    epochs: int = option(400, "passes over the normal images, in whole batches", minimum=1)
    batch_size: int = option(64, "images in a step, over all processes (release: 1024)", minimum=1)
    lr: float = option(5e-4, "peak learning rate at batch size 256, scaled linearly with it")
    structure_weight: float = option(1.0, "weight of L_stru; 0 disables it")
    category_weight: float = option(1.0, "weight of L_cate; 0 disables it")
    restoration_weight: float = option(1.0, "weight of L_rest; 0 disables it")
    seed: int = option(0, "random seed")
    warmup_epochs: int = 10                    # of linear warm-up; only presets change it
    teacher_momentum: float = 0.996            # at the start, 1 at the end; only presets change it


PRESETS = {
    "paper": {},
    "small": dict(arch="vit_micro", img_size=64, patch_size=8, levels="equal", epochs=38,
                  batch_size=32, lr=8e-3, warmup_epochs=3, teacher_momentum=0.99),
    "phantoms": dict(arch="vit_micro", img_size=64, patch_size=8, epochs=18, batch_size=16,
                     lr=16e-3, structure_weight=0.2, category_weight=0.2, warmup_epochs=2,
                     teacher_momentum=0.97)}


@dataclasses.dataclass
class EvalOptions(DataOptions):
    """Evaluate an encoder and the same encoder untrained, on --data or the data of its run."""
    ckpt: str = option("runs/afire", "folder of a run, or a ViT of ours, timm, MAE, DINO, ...")
    out: str = option(None, "folder for the results; if not given: eval in the run's folder")
    img_size: int = option(None, "side of the images in pixels, if not the encoder's", minimum=1)


def parse_arguments(argv=None):
    """The command line: -> PretrainOptions or EvalOptions. Typed options override the preset."""
    parser = argparse.ArgumentParser(prog="afire.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, options, presets in ("pretrain", PretrainOptions, PRESETS), ("eval", EvalOptions, {}):
        command = commands.add_parser(name, allow_abbrev=False, help=options.__doc__.split("\n")[0])
        for field in dataclasses.fields(options):
            if field.metadata:
                defaults = [str(field.default)]
                defaults += [f"{preset} {changes[field.name]}"
                             for preset, changes in presets.items() if field.name in changes]
                command.add_argument(
                    "--" + field.name.replace("_", "-"), type=field.type,
                    choices=field.metadata["choices"], default=argparse.SUPPRESS,
                    help=f"{field.metadata['help']} ({', '.join(defaults)})")
    typed = vars(parser.parse_args(argv))                  # SUPPRESS leaves only what was typed
    if typed.pop("command") == "eval":
        return EvalOptions(**typed)
    if not typed.get("data"):
        default = "phantoms"
    elif torch.cuda.is_available() and typed.get("device") != "cpu":
        default = "paper"
    else:
        default = "small"
    preset = typed.setdefault("preset", default)
    return PretrainOptions(**{**PRESETS[preset], **typed})


# ---- Pre-training --------------------------------------------------------------------------------

ARCHITECTURES = {
    "vit_micro": dict(embed_dim=128, depth=4, num_heads=2, out_dim=64, head_dim=128,
                      bottleneck_dim=128, decoder_dim=64, decoder_depth=2, decoder_heads=2),
    "vit_small": dict(embed_dim=384, depth=12, num_heads=6),
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12)}


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
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} is not available: try --device cpu") from error


def to_device(array, device):
    """An array as a tensor on the device, copied without blocking the host."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@torch.no_grad()
def in_batches(function, images, rows, device):
    """Applies function to images[rows] in batches of 64 at most: -> its results, concatenated."""
    batches = np.array_split(rows, 1 + len(rows) // 64)
    return torch.cat([function(to_device(images[batch], device) / 255) for batch in batches])


def cosine(start, end, progress):
    """From start to end along half a cosine, for progress from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """The training state (model and optimiser), and the step that changes it [R]."""

    metrics = ("loss", "structure", "category", "restoration", "gradient_norm")

    def __init__(self, options, device, rank=0, world=1):
        self.options = options
        self.device = device
        self.rank = rank
        self.model = build_model(options).to(device).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        weights = [p for p in self.parameters if p.ndim > 1]
        biases_and_norms = [p for p in self.parameters if p.ndim == 1]
        self.optimizer = torch.optim.AdamW([{"params": weights}, {"params": biases_and_norms}],
                                           fused=device.type != "mps")
        # A GPU without native bf16 trains in float32.
        self.bf16 = (device.type == "cuda"
                     and torch.cuda.is_bf16_supported(including_emulation=False))
        self.network = self.model
        if world > 1:
            self.network = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)

    def schedules(self, step, per_epoch):
        """-> learning rate, weight decay, momentum of the teacher."""
        warmup = self.options.warmup_epochs * per_epoch
        total = self.options.epochs * per_epoch
        peak = self.options.lr * self.options.batch_size / 256
        if step < warmup:
            lr = peak * (step + 1) / warmup
        else:
            lr = cosine(peak, 1e-6, (step - warmup) / (total - warmup))
        weight_decay = cosine(0.04, 0.4, step / total)
        return lr, weight_decay, cosine(self.options.teacher_momentum, 1.0, step / total)

    def step(self, images, centres, step, per_epoch):
        """A step on this process's images (b, 1, S, S) uint8, their centres (b, 2): -> metrics."""
        first_epoch = step < per_epoch
        lr, weight_decay, momentum = self.schedules(step, per_epoch)
        for group, decay in zip(self.optimizer.param_groups, (weight_decay, 0.0)):
            group.update(lr=lr, weight_decay=decay)
        self.model.prototypes.momentum = 0.0 if first_epoch else 0.75          # [R]

        # Generators use 32 bits of a seed. Multiples of 2^32 / golden ratio keep runs far apart.
        seed = (self.options.seed * 2654435769 + step) % 2 ** 32
        generator = torch.Generator().manual_seed(seed)
        normal = to_device(images, self.device) / 255
        lesioned, mask = synthetic_lesion_mask(normal, generator, to_device(centres, self.device),
                                               offset=self.rank * len(images))

        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self.network(normal, lesioned, mask)
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
    if rank >= world:
        raise InputError(f"RANK is {rank} without a larger WORLD_SIZE: use torchrun")
    return rank, world


def resume(trainer, path, run):
    """Loads an interrupted run into the trainer: -> its state. run: a new one's, to agree with."""
    checkpoint = read_checkpoint(path)
    model, _ = model_of_run(checkpoint, path)
    before = {**checkpoint["config"], "images": checkpoint["images"]}
    now = {**run["config"], "images": run["images"]}
    may_differ = ("out", "data", "labels", "device", "preset")         # the images are compared
    different = [name for name in now if now[name] != before[name] and name not in may_differ]
    if different:
        raise InputError(f"the run in {path.parent} has other {' and '.join(different)}: repeat "
                         "its command to resume it, or name another --out")
    trainer.model.load_state_dict(model.state_dict())
    trainer.optimizer.load_state_dict(checkpoint["optimizer"])
    return {**{key: checkpoint[key] for key in run}, "config": run["config"]}


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
    if world > 1:
        try:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            raise InputError(f"WORLD_SIZE is {world}, but {error}: use torchrun") from error
    data = load_radiographs(options.data, options.img_size, labels=options.labels,
                            levels=options.levels)
    normals = data.normal(data.train)
    if not len(normals):
        present = np.array(data.findings)[data.labels[data.train].any(0)]
        raise InputError("no image in train is normal; its findings are: "
                         f"{', '.join(present) or 'none, as it is empty'}")
    if len(normals) < options.batch_size:
        raise InputError(f"--batch-size must be at most {len(normals)}, the normal images in train")
    print(f"preset {options.preset}: pre-training on {len(normals)} normal images (excluded: "
          f"{len(data.train) - len(normals)} with findings, {len(data.test)} held out)")
    if options.epochs <= options.warmup_epochs:
        print(f"--epochs {options.epochs} ends in the warm-up of {options.warmup_epochs} epochs: "
              "the learning rate never reaches its peak")

    trainer = Trainer(options, device, rank, world)
    out = Path(options.out)
    run = {"config": dataclasses.asdict(options), "earlier_images": [],        # those of --init
           "images": [data.hashes[row] for row in normals], "epoch": 0, "history": []}
    if (out / "checkpoint.pth").exists():
        run = resume(trainer, out / "checkpoint.pth", run)
        print(f"resuming after epoch {run['epoch']} of {options.epochs}")
    elif options.init:
        checkpoint = read_checkpoint(options.init)
        encoder = load_encoder(options.init, options.img_size, checkpoint)
        if encoder.sizes != trainer.model.student["encoder"].sizes:
            raise InputError(f"--init {options.init} does not fit --arch and --patch-size")
        for network in trainer.model.student, trainer.model.teacher:
            network["encoder"].load_state_dict(encoder.state_dict())
        run["earlier_images"] = trained_images(checkpoint, options.init)
    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        (out / "config.json").write_text(json.dumps(run["config"], indent=2))
        if run["epoch"] == 0:
            write_table(out / "table.csv", data)
    train(trainer, data.images, normals, run, out, world)
    if rank == 0:
        save_checkpoint(trainer.model.teacher["encoder"].state_dict(), out / "encoder.pth")
        plot_restoration(out / "restoration.png", trainer.model.eval(),
                         to_device(data.images[normals[:4]], device) / 255)
    print(f"in {out}: checkpoint.pth, encoder.pth (the teacher's), table.csv (the images used), "
          "log.jsonl, restoration.png")
    if world > 1:
        torch.distributed.barrier()                        # wait until rank 0 has written
        torch.distributed.destroy_process_group()


def train(trainer, images, normals, run, out, world):
    """The epochs that are left of a run, on images[normals]; its state is saved after each."""
    options = trainer.options
    centres = in_batches(texture_centre, images, normals, trainer.device).cpu().numpy()    # (n, 2)
    per_epoch = len(normals) // options.batch_size
    with tqdm(total=options.epochs * per_epoch, initial=run["epoch"] * per_epoch, desc="pretrain",
              unit="step", mininterval=1, disable=trainer.rank > 0) as bar:
        for epoch in range(run["epoch"], options.epochs):
            order = np.random.default_rng((options.seed, epoch)).permutation(len(normals))
            batches = order[:per_epoch * options.batch_size].reshape(per_epoch, -1)
            sums = torch.zeros(len(trainer.metrics), device=trainer.device)
            for i, batch in enumerate(batches):
                shard = np.array_split(np.sort(batch), world)[trainer.rank]    # (b,)
                step = epoch * per_epoch + i
                sums += trainer.step(images[normals[shard]], centres[shard], step, per_epoch)
                bar.update()
                if i % 10 == 9 or i == per_epoch - 1:      # reading it synchronises with the GPU
                    loss, *_, gradient_norm = (sums / (i + 1)).tolist()
                    bar.set_postfix(loss=f"{loss:.3f}")
                    if not math.isfinite(gradient_norm):   # alike in all processes: all stop here
                        raise InputError(f"the gradient is not finite in epoch {epoch + 1}: try a "
                                         "lower --lr in another --out")
            means = (gather(sums.unsqueeze(0)).mean(0) / per_epoch).tolist()
            run["epoch"] = epoch + 1
            run["history"].append({"epoch": epoch + 1, **dict(zip(trainer.metrics, means)),
                                   "lr": trainer.schedules(step, per_epoch)[0]})
            if trainer.rank == 0:
                log = [json.dumps(record) + "\n" for record in run["history"]]
                (out / "log.jsonl").write_text("".join(log))
                save_checkpoint({"model": trainer.model.state_dict(), **run,
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
    """Means over the draws where it is defined: (draws, T, F), (T, F) bool -> (F,)."""
    areas = [[auroc(draw[:, f], labels[:, f]) for f in range(labels.shape[1])] for draw in scores]
    return nan_mean(areas, 0)


def linear_probe(x, y, penalty=10.0):
    """Ridge regression on standardised x [D]: (n, D), y (n, F) bool -> weight (D, F), bias (F,)."""
    mean = x.mean(0)
    std = x.std(0, correction=0) + 1e-6
    z = (x - mean) / std
    y = y.to(x.dtype)
    ridge = penalty * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(z.T @ z + ridge, z.T @ (y - y.mean(0))) / std.unsqueeze(1)
    return weight, y.mean(0) - mean @ weight


def learn_from_few(learn, labels, train):
    """Test scores (T, F) of learn(rows) for 1, 10, 100 % of train: -> {"1%": (draws, T, F)}."""
    random = np.random.default_rng(0)
    scores = {}
    for percent, draws in (1, 5), (10, 5), (100, 1):
        results = []
        for _ in range(draws):
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


@torch.no_grad()
def anomaly_maps(images, rows, device, encoder, model=None, normals=()):
    """How abnormal the tokens of images[rows] look [D]: -> {score: (T, side, side)}, T rows.

    prototype    1 - cosine between the token's head output and the prototype. With normal images
                 at hand, the prototype is their mean, so that an untrained network has one too;
                 without, it is the learned P
    restoration  error of the token's pixels when it is restored from the other tokens' encodings,
                 without its own; with normal images, standardised by position
    neighbours   mean distance to the 5 nearest tokens of normal images, at its position

    images (n, 1, S, S) uint8; model: an AFiRe, which the first two scores need; normals: rows of
    normal images, which the third one needs.
    """
    names = []
    if model:
        names += ["prototype", "restoration"]
        prototypes = model.prototypes.prototypes                               # (L, K)
        mean = 0                                           # of the restoration error
        std = 1
    if len(normals):
        names += ["neighbours"]
        references = in_batches(lambda x: features(encoder, x), images, normals, device)
    if model and len(normals):
        logits = [model.teacher["head"](part) for part in references.split(64)]    # it is wide
        prototypes = torch.cat(logits).mean(0)
        errors = in_batches(lambda x: restoration_error(model, x), images, normals, device)
        mean = errors.mean(0)                                                  # (L,)
        std = errors.std(0, correction=0) + 1e-6

    def score(x):
        tokens = features(encoder, x)                                          # (B, L, D)
        scores = []
        if model:
            logits = model.teacher["head"](tokens)                             # (B, L, K)
            scores += [1 - F.cosine_similarity(logits, prototypes, dim=2),
                       (restoration_error(model, x) - mean) / std]
        if len(normals):
            distance = torch.cdist(tokens.transpose(0, 1), references.transpose(0, 1))
            nearest = distance.topk(min(5, len(normals)), largest=False).values    # (L, B, 5)
            scores += [nearest.mean(2).T]
        return torch.stack(scores, 1)                                          # (B, scores, L)

    maps = in_batches(score, images, rows, device)                             # (T, scores, L)
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
    labels = masks[:, step // 2::step, step // 2::step]                        # (T, 56, 56)
    grids = torch.from_numpy(maps).unsqueeze(1)
    grids = F.interpolate(grids, labels.shape[1:], mode="bilinear").numpy()    # (T, 1, 56, 56)
    return grids.reshape(len(maps), -1), labels.reshape(len(maps), -1)


def normal_references(data, limit=1000):
    """Rows of normal training images that anomalies are compared with: (N,), at most limit [D]."""
    random = np.random.default_rng(0)
    return random.permutation(data.normal(data.train))[:limit]         # bounds time and memory


def evaluate_network(encoder, model, data, normals, device):
    """All metrics of a network: -> report for metrics.json, arrays for predictions.npz.

    model: the AFiRe of the encoder, or None; data: Radiographs; normals as in anomaly_maps.
    """
    truth = data.labels[data.test]                                             # (T, F)
    report = {"linear": {}, "anomaly": {}}
    arrays = {}

    # Few labels: a linear probe on the mean token [D].
    used = data.used()
    x = torch.zeros(len(data.images), encoder.sizes[3])                        # (n, D)
    x[used] = in_batches(lambda images: features(encoder, images).mean(1), data.images, used,
                         device).cpu()

    def probe(rows):
        weight, bias = linear_probe(x[rows], torch.from_numpy(data.labels[rows]))
        return (x[data.test] @ weight + bias).numpy()                          # (T, F)

    for fraction, scores in learn_from_few(probe, data.labels, data.train).items():
        by_finding = auroc_by_finding(scores, truth)
        report["linear"][fraction] = {
            "macro_auroc": float(nan_mean(by_finding)),
            "per_finding": dict(zip(data.findings, by_finding.tolist()))}
        arrays[f"linear {fraction}"] = scores

    # Anomalies, by comparison with normal images.
    maps = anomaly_maps(data.images, data.test, device, encoder, model, normals)
    for score, grids in maps.items():
        pixels, inside = pixel_scores(grids, data.masks[data.test])
        report["anomaly"][score] = {
            "image_auroc": auroc(image_scores(grids), truth.any(1)),
            "pixel_auroc": auroc(pixels.ravel(), inside.ravel())}
    return report, arrays | maps


def print_table(report, labels):
    """A row for every AUROC of metrics.json, or why it is undefined; labels (T, F) of the test."""
    def rows(network):
        for fraction, metrics in network["linear"].items():
            areas = np.array(list(metrics["per_finding"].values()))
            defined = (~np.isnan(areas)).sum()
            note = f"{defined} of {len(areas)} findings" if defined < len(areas) else ""
            yield f"linear probe, {fraction} of the labels", metrics["macro_auroc"], note
        for level in "image", "pixel":
            for score, metrics in network["anomaly"].items():
                area = metrics[f"{level}_auroc"]
                unknown = level == "pixel" and math.isnan(area)
                note = "no masks of findings" if unknown else ""
                yield f"abnormal {level}s by {score}", area, note

    print(f"{'AUROC':36}{'trained':>9}{'untrained':>11}")
    both = zip(rows(report["checkpoint"]), rows(report["random_init"]))
    for (name, trained, note), (_, untrained, _) in both:
        numbers = f"{trained:9.3f}{untrained:11.3f}" if not math.isnan(trained) else "undefined:"
        note = note if labels.any() else "no abnormal image in test"
        print(f"{name:36}{numbers}   {note}".rstrip())


def write_scores(file, data, maps, seen):
    """scores.csv, the most abnormal image first by the first score: -> order of the test images.

    maps {score: (T, side, side)} of data.test; seen (n,) bool: images of the pre-training.
    """
    scores = np.stack([image_scores(grids) for grids in maps.values()], 1)     # (T, scores)
    order = np.argsort(-scores[:, 0], kind="stable")
    with open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", "findings", "pretrained_on", *maps])
        for row, values in zip(data.test[order], scores[order]):
            pretrained_on = "yes" if seen[row] else "no"
            writer.writerow([data.names[row], data.findings_of(row), pretrained_on,
                             *values.round(4)])
    return order


def results_folder(path, run):
    """Where results of a checkpoint go: to its run, or to runs/PARENT-STEM for an encoder alone."""
    return path.parent if run else Path("runs", f"{path.resolve().parent.name}-{path.stem}")


def evaluate(options):
    """An encoder beside the same encoder untrained: writes its metrics and prints a table.

    Without labels, all images are scored, by the scores that need no normal images.
    """
    device = get_device(options.device)
    path = find_checkpoint(options.ckpt)
    models, run, trained_on = load_models(path, options.img_size)
    for encoder, model in models.values():
        (model or encoder).to(device).eval().requires_grad_(False)
    encoder, model = models["checkpoint"]
    levels = run.levels if run else "file"
    source = run if run and not options.data else options
    data = load_radiographs(source.data, encoder.sizes[0], labels=options.labels or source.labels,
                            levels=levels)
    seen = np.isin(data.hashes, trained_on)                                    # (n,)
    out = Path(options.out or results_folder(path, run) / "eval")
    out.mkdir(parents=True, exist_ok=True)
    report = {}
    if data.findings:
        if seen[data.test].any():
            print(f"{seen[data.test].sum()} test images left out, as pre-training has seen them")
        data.test = data.test[~seen[data.test]]
        normals = normal_references(data)
        tested = len(data.normal(data.test))
        if min(len(normals), tested) < 2:
            raise InputError(f"--data {source.data} has {len(normals)} normal images in train and "
                             f"{tested} in test: two of each are needed")
        arrays = {"images": np.array(data.names)[data.test],
                  "patients": np.array(data.patients)[data.test],
                  "findings": np.array(data.findings),
                  "labels": data.labels[data.test], "masks": data.masks[data.test]}
        for name, pair in models.items():
            report[name], results = evaluate_network(*pair, data, normals, device)
            arrays |= {f"{name}/{key}": array for key, array in results.items()}
        maps = {score: arrays[f"checkpoint/{score}"] for score in report["checkpoint"]["anomaly"]}
    elif model:
        print("no findings are known: all images are scored, without metrics")
        data.test = data.used()
        maps = anomaly_maps(data.images, data.test, device, encoder, model)
    else:
        raise InputError(f"{path} is an encoder alone: it needs findings, so give --labels")

    for name in "metrics.json", "predictions.npz", "scores.csv", "anomaly.png":
        (out / name).unlink(missing_ok=True)               # of an earlier evaluation
    order = write_scores(out / "scores.csv", data, maps, seen)
    plot_images(out / "anomaly.png", {
        "image": data.images[data.test[order[:5]], 0],
        **{score: grids[order[:5]] for score, grids in maps.items()}})
    if report:
        np.savez_compressed(out / "predictions.npz", **arrays)
        metrics = json.loads(json.dumps(report), parse_constant=lambda _: None)        # NaN: null
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2))
        print_table(report, arrays["labels"])
    if not model:
        print("prototype and restoration are left out: they need AFiRe's head and decoder, at the "
              f"image size of the run; grey levels: {levels} (a run's folder brings its own)")
    print(f"in {out}: scores.csv, anomaly.png{', metrics.json, predictions.npz' if report else ''}")


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
    """-> AFiRe with the weights of a run's checkpoint, and the run's PretrainOptions."""
    try:
        options = PretrainOptions(**checkpoint["config"])
        model = build_model(options)
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is not of a run of this version of afire.py: name another --out, "
                         "or give eval --ckpt or pretrain --init the run's encoder, "
                         f"{find_checkpoint(path).with_name('encoder.pth')}") from error
    return model, options


def trained_images(checkpoint, path):
    """Hashes of the files that a checkpoint was pre-trained on, to keep them out of the test."""
    hashes = checkpoint.get("images", ["unknown"]) + checkpoint.get("earlier_images", [])
    if "unknown" in hashes:
        print(f"{path} does not say what it was trained on: that may be among the test images")
    return hashes


def load_models(path, img_size=None):
    """-> {"checkpoint": (ViT, AFiRe), "random_init": (ViT, AFiRe)}, options, hashes of its images.

    AFiRe and the PretrainOptions are None for an encoder alone, AFiRe also at another img_size.
    """
    checkpoint = read_checkpoint(path)
    hashes = trained_images(checkpoint, path)
    run = None
    if "history" in checkpoint:
        trained, run = model_of_run(checkpoint, path)
        if img_size in (None, run.img_size):
            both = {"checkpoint": trained, "random_init": build_model(run)}
            models = {name: (model.teacher["encoder"], model) for name, model in both.items()}
            return models, run, hashes
    encoder = load_encoder(path, img_size, checkpoint)
    if encoder.sizes[2] != 3:
        raise InputError(f"{path} takes {encoder.sizes[2]} channels: use an encoder of 3 channels")
    torch.manual_seed(0)
    return {"checkpoint": (encoder, None), "random_init": (ViT(*encoder.sizes), None)}, run, hashes


def load_encoder(path, img_size=None, checkpoint=None):
    """The encoder of a checkpoint, ours, the release's, MAE's, DINO's or timm's: -> ViT.

    The teacher's, if there is one [R]. Positions are interpolated to img_size pixels. checkpoint:
    the content of the file, if it has been read.
    """
    first = "patch_embed.proj.weight"
    state = checkpoint or read_checkpoint(path)
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
        heads = min(16, max(1, dim // 64))     # not stored: 64 channels each, at most 16
        positions = state["pos_embed"]                                 # (1, 1 + L, D)
        size = img_size or math.isqrt(positions.shape[1] - 1) * patch_size
        if size % patch_size:
            raise InputError(f"--img-size {size} must be a multiple of the patch, {patch_size}")
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
          f"blocks, {heads} heads (assumed)")
    return vit


# ---- Data: files and tables ----------------------------------------------------------------------

@dataclasses.dataclass
class Radiographs:
    """n images with F findings, which are either to train on or held out for testing."""
    names: list                   # n paths below the data folder, with /
    images: np.ndarray            # (n, 1, S, S) uint8, memory-mapped
    labels: np.ndarray            # (n, F) bool
    findings: list                # F names
    patients: list                # n names; an image's own name where the patient is unknown
    hashes: list                  # n, of the files' bytes: an image is known by its content
    train: np.ndarray             # rows to train on. Unusable and equal files have a row, but are
    test: np.ndarray              # neither in train nor among those held out, in test
    masks: np.ndarray             # (n, S, S) bool, where the findings are; (n, 1, 1) if unknown
    split_by: str = "given"       # or "fixed fifth"

    def used(self):
        """Rows of train and test, sorted."""
        return np.union1d(self.train, self.test)

    def normal(self, rows):
        """Those of the rows that have no finding, in their order."""
        return rows[~self.labels[rows].any(1)]

    def findings_of(self, row):
        """As in a table, joined by |."""
        return "|".join(np.array(self.findings)[self.labels[row]])


def read_image(path, size, levels="file"):
    """A file as a viewer shows it, resized to a square: -> (size, size) uint8.

    More than 8 bits are scaled between the 0.5 and the 99.5 percentile, as a burned-in marker is
    brighter than the rest. levels "equal": the histogram is equalised, as in MIMIC-CXR-JPG.
    """
    with Image.open(path, formats=["PNG", "JPEG"]) as file:
        if file.mode[0] not in "IF" and "16" in str(file.tile[0][3]):
            raise ValueError("16 bits in colour")          # Pillow would drop the lower 8
        file.draft("L", (size * 3 // 2, size * 3 // 2))    # a large JPEG at half size or less
        image = ImageOps.exif_transpose(file)
    if image.mode[0] in "IF":
        pixels = np.asarray(image, np.float32)
        low, high = np.percentile(pixels, [0.5, 99.5])
        pixels = (pixels - low) * (255 / max(high - low, 1e-6))
        image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    image = TF.resize(image.convert("L"), [size, size])
    return np.asarray(TF.equalize(image) if levels == "equal" else image)


def decode_files(paths, size, levels, cache):
    """Decodes files once: -> images (n, 1, S, S) uint8, hashes (n), {row: why it is unusable}.

    The cache is a memory-mapped file of n records, shared by all runs. A record whose checksum is
    wrong is decoded again: after a failure, a power cut, or while another process is writing it.
    """
    if not paths:
        return np.empty((0, 1, size, size), np.uint8), [], {}
    versions = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    rules = inspect.getsource(read_image)                  # whoever edits it gets a new cache
    key = hashlib.sha256(repr((rules, size, levels, versions)).encode()).hexdigest()[:16]
    file = Path(cache or "runs/cache", f"{key}.images")
    file.parent.mkdir(parents=True, exist_ok=True)
    layout = np.dtype([("hash", "S16"), ("image", np.uint8, (1, size, size)), ("checksum", "<u4")])
    try:
        file.touch()
        with open(file, "r+b") as stream:
            if hasattr(os, "posix_fallocate"):             # a full disk fails here, not by SIGBUS
                os.posix_fallocate(stream.fileno(), 0, len(paths) * layout.itemsize)
            stream.truncate(len(paths) * layout.itemsize)
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}") from error
    records = np.memmap(file, layout, "r+", shape=(len(paths),))
    hashes = [""] * len(paths)
    unusable = {}

    def decode(row):
        record = records[row]                              # a view
        try:
            if record["checksum"] != zlib.crc32(record.tobytes()[:-4]):
                record["image"] = read_image(paths[row], size, levels)
                record["hash"] = hashlib.sha256(paths[row].read_bytes()).hexdigest()[:16]
                record["checksum"] = zlib.crc32(record.tobytes()[:-4])
            hashes[row] = record["hash"].decode()
            if record["image"].min() == record["image"].max():
                unusable[row] = "blank, of one grey level"
        except Exception as error:                         # a decoder can raise anything
            known = isinstance(error, ValueError)          # other errors name the file
            unusable[row] = f"unreadable ({error if known else type(error).__name__})"

    rows = np.random.default_rng(os.getpid()).permutation(len(paths))  # processes share the work
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(decode, rows), "decode", len(rows), delay=1))
    records.flush()
    return records["image"], hashes, unusable


def find_files(folder, passed_over):
    """Sorted names of the PNG and JPEG files below a folder; passed_over {reason: names} grows."""
    names = []
    for path in Path(folder).rglob("*"):                   # does not enter links to folders
        name = path.relative_to(folder).as_posix()
        suffix = path.suffix.lower()
        if path.is_dir() and not path.is_symlink() and os.access(path, os.R_OK | os.X_OK):
            continue
        if re.search(r"(^|/)([.@$]|__MACOSX)", name):
            passed_over["hidden or of the system"].append(name)
        elif path.is_dir():
            passed_over["links to folders, or folders without access"].append(name)
        elif suffix in (".dcm", ".dicom"):
            passed_over["DICOM: convert it with data/make_table.py"].append(name)
        elif suffix not in (".png", ".jpg", ".jpeg"):
            passed_over[f"{suffix or 'no suffix'}, not PNG or JPEG"].append(name)
        elif not (path.is_file() and os.access(path, os.R_OK)):
            passed_over["broken links or without access"].append(name)
        else:
            names.append(name)
    return sorted(names)


def is_normal(name):
    """Does a finding or a folder of this name mean that there is none? As in data/make_table.py."""
    name = name.strip().lower()
    return re.fullmatch(r"((normal|no[ _-]?finding|healthy)s?)?", name) is not None


def speaks(folder):
    """Does the name of a folder say something about findings, or about the split?"""
    words = re.sub(r"[\W\d_]+", " ", folder.lower()).strip()
    part = r"^(train|test|val)|\b(train(ing|set)?|test(ing|set|s)?|val(id|idation)?)\b"
    return bool(re.search(rf"{part}|\b(normal|no ?finding|healthy)s?\b", words))


def read_folders(names, data, passed_over):
    """Findings and split by folders' names, if nothing must be guessed: -> table as of read_table.

    Images are normal if no folder speaks. CLASS/... or train/CLASS/... and test/CLASS/... is read,
    as by torchvision's ImageFolder, if one class means normal; val/... is left out. Any other
    folder that speaks raises an InputError.
    """
    masks = [name for name in names if "mask" in name.lower().rpartition("/")[0]]
    passed_over["in folders whose name contains mask"] = masks
    folders = {name: name.lower().replace("_", " ").split("/")[:-1]
               for name in sorted(set(names).difference(masks))}
    speaking = {folder for parents in folders.values() for folder in parents if speaks(folder)}
    if not speaking:
        shown = sorted({Path(name).parent.name for name in folders} - {""})[:5]
        print("no folder is called after findings or a split, so all images count as normal: "
              f"{', '.join(shown) or data}")
        return {name: (set(), name, "") for name in folders}

    tops = {parents[0] if parents else "" for parents in folders.values()}
    has_split = {"train", "test"} <= tops <= {"train", "test", "val"}
    table = {}
    classes = set()
    below = set()
    for name, parents in folders.items():
        split = parents.pop(0) if has_split else ""
        if split == "val":
            passed_over["of a validation split"].append(name)
        elif not parents or not parents[0].strip():
            passed_over["beside the class folders"].append(name)
        else:
            classes.add(parents[0])
            below.update(parents[1:])
            table[name] = (set() if is_normal(parents[0]) else {parents[0]}, name, split)
    normal = {name for name in classes if is_normal(name)}
    if len(normal) != 1 or any(speaks(name) for name in classes - normal | below):
        raise InputError(f"{data} has folders called {', '.join(sorted(speaking)[:5])}, in no "
                         "layout that is read: what they mean belongs in a table: python "
                         f"data/make_table.py folders {data} > labels.csv")
    return table


def read_table(file):
    """CSV -> {image: (set of findings, patient, split)}; the patient is the image if not known."""
    content = Path(file).read_bytes()
    line = 1                                               # the first one of a row
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""),
                                skipinitialspace=True, strict=True)
        titles = [title.strip().lower() for title in reader.fieldnames or ()]
        known = [title for title in titles if title in ("image", "findings", "patient", "split")]
        if not {"image", "findings"} <= set(known) or len(set(known)) < len(known):
            raise InputError(f"{file}, line 1: expected the columns image and findings, with "
                             f"commas, once each, not {titles}")
        ignored = [title or "without a title" for title in titles
                   if title not in (*known, "split_by")]               # ours, for people to read
        if ignored:
            print(f"{file}: ignored columns: {', '.join(ignored)}")
        reader.fieldnames = titles
        table = {}
        line = reader.line_num + 1
        for row in reader:
            cells = {title: cell.strip() for title, cell in row.items() if title in known and cell}
            name = cells.get("image", "")
            split = cells.get("split", "")
            if any(row.pop(None, [])) or None in row.values() or split not in ("", "train", "test"):
                raise InputError(f"{file}, line {line}: expected {len(titles)} cells, and train, "
                                 f"test or nothing as split, not {split!r}")
            findings = {finding.strip().lower() for finding in cells.get("findings", "").split("|")
                        if not is_normal(finding)}
            value = (findings, cells.get("patient") or name, split)
            if any(cells.values()) and table.setdefault(name, value) != value:
                raise InputError(f"{file}, line {line}: conflicting rows for {name}: keep one")
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        line = content[:error.start].count(b"\n") + 1
        raise InputError(f"{file}, line {line}: not UTF-8: save the table as UTF-8") from error
    except csv.Error as error:
        raise InputError(f"{file}, line {line}: {error}: is a quote not closed?") from error
    return table


def write_table(file, data):
    """The images used, as a table that --labels takes; its last column says who made the split."""
    test = set(data.test)
    with open(file, "w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", "findings", "patient", "split", "split_by"])
        for row in data.used():
            patient = data.patients[row] if data.patients[row] != data.names[row] else ""
            split = "test" if row in test else "train"
            writer.writerow([data.names[row], data.findings_of(row), patient, split, data.split_by])


def split_patients(table, passed_over):
    """-> {name: train or test}; "given", or "fixed fifth" (of the patients, as test)."""
    tested = {patient for _, patient, split in table.values() if split == "test"}
    given = any(split for _, _, split in table.values())
    splits = {}
    for name, (_, patient, split) in table.items():
        if not given:
            splits[name] = "test" if zlib.crc32(os.fsencode(patient)) % 1000 < 200 else "train"
        elif not split:
            passed_over["without a split"].append(name)
        elif split == "train" and patient in tested:
            passed_over["in train, of patients in test"].append(name)
        else:
            splits[name] = split
    return splits, "given" if given else "fixed fifth"


def load_radiographs(data, img_size, *, labels=None, levels="file", cache=None):
    """Radiographs of a folder, with the findings of a CSV or of folders; without both, phantoms."""
    if not data and not labels:
        print("without --data: 2,500 phantoms, a fifth of them held out")
        return phantom_radiographs(img_size)
    if not data or not Path(data).is_dir():
        raise InputError(f"--data {data} is no folder: name the one that holds the images")
    passed_over = collections.defaultdict(list)            # reason: names
    files = find_files(data, passed_over)
    if labels:
        rows = read_table(labels)
        table = {name: rows[name] for name in files if name in rows}
        passed_over[f"without a row in {labels}"] = [name for name in files if name not in rows]
        missing = rows.keys() - table.keys()
        if missing:
            print(f"{labels}: {len(missing)} rows without a file (first: {min(missing)})")
    else:
        table = read_folders(files, data, passed_over)
    splits, split_by = split_patients(table, passed_over)
    names = list(splits)
    images, hashes, unusable = decode_files([Path(data, name).absolute() for name in names],
                                            img_size, levels, cache)

    present = [table[name][0] for name in names]           # a set of findings for each image
    first = {}                                             # row of a content
    for row, name in enumerate(names):
        if row in unusable:
            passed_over[unusable[row]].append(name)
        elif first.setdefault(hashes[row], row) != row:
            passed_over["equal to another image"].append(name)
            present[first[hashes[row]]] |= present[row]    # the first has the findings of all
    used = np.array(list(first.values()), int)
    reasons = [f"{len(group)} {reason} (first: {min(group)})"
               for reason, group in sorted(passed_over.items()) if group]
    if not len(used):
        raise InputError(f"--data {data} has no image to use: give PNG or JPEG files, and --labels "
                         f"paths below it; passed over: {'; '.join(reasons) or 'nothing'}")
    findings = sorted(set().union(*[present[row] for row in used]))
    truth = np.array([[name in found for name in findings] for found in present], bool)
    patients = [table[name][1] for name in names]
    unknown = sum(patients[row] == names[row] for row in used)
    held_out = np.array([splits[names[row]] == "test" for row in used])

    for reason in reasons:
        print(f"passed over: {reason}")
    print(f"{data}: {len(used)} images, {(~truth[used].any(1)).sum()} of them normal; findings: "
          f"{', '.join(findings) or 'none known'}")
    note = f"; {unknown} images without one count as one each (--labels can name them)"
    print(f"{len({patients[row] for row in used})} patients{note if unknown else ''}")
    print(f"{(~held_out).sum()} images to train on, {held_out.sum()} held out (split: {split_by})")
    return Radiographs(names, images, truth, findings, patients, hashes, used[~held_out],
                       used[held_out], np.zeros((len(names), 1, 1), bool), split_by)


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
    # Film: exposure and contrast vary, and grain is drawn last
    film = (1 - np.exp(-draw(0.8, 3.6) * (tissue + bones))) ** draw(0.7, 2.6)
    film += draw(0.008, 0.02) * rng.standard_normal((size, size))
    return (255 * np.clip(0.03 + 0.93 * film, 0, 1)).astype(np.uint8), labels, masks


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
    return Radiographs(names, images, labels, findings, names, names, np.arange(2000),
                       np.arange(2000, 2500), masks.any(1))


# ---- Figures -------------------------------------------------------------------------------------

def plot_images(file, columns):
    """A column for each title: {title: (n, S, S)}; in colour if S is below the first column's."""
    n, _, size = next(iter(columns.values())).shape
    figure = Figure(figsize=(1.9 * len(columns), 1.9 * n + 0.3), layout="constrained")
    axes = figure.subplots(n, len(columns), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for column, (title, images) in zip(axes.T, columns.items()):
        column[0].set_title(title)
        is_map = images.shape[-1] < size
        for axis, image in zip(column, images):
            axis.imshow(image, "magma" if is_map else "gray", vmin=images.min(), vmax=images.max(),
                        interpolation="bilinear" if is_map else None)
    figure.savefig(file, dpi=100)


@torch.no_grad()
def plot_restoration(file, model, normal):
    """x, x', which tokens are hidden, and x' with these restored: images (B, 1, H, W)."""
    lesioned, mask = synthetic_lesion_mask(normal, torch.Generator().manual_seed(0))
    abnormal = abnormal_tokens(mask, model.patch_size)                         # (B, L)
    restored = model.decoder(model.student["encoder"](normalise(lesioned)), abnormal)
    black, white = normalise(torch.tensor([0.0, 1.0], device=normal.device).view(2, 1, 1, 1))
    restored = ((restored - black) / (white - black))[:, 1:2].clamp(0, 1)      # one channel
    hidden = unpatchify(abnormal.unsqueeze(2).expand(-1, -1, model.patch_size ** 2),
                        model.patch_size)                                      # (B, 1, H, W) bool
    columns = {"x": normal, "x' = x + M": lesioned,
               "hidden tokens": lesioned.masked_fill(hidden, 0),
               "hidden restored": torch.where(hidden, restored, lesioned)}
    plot_images(file, {title: images[:, 0].cpu().numpy() for title, images in columns.items()})


# ---- Command line --------------------------------------------------------------------------------

def main(argv=None):
    """python afire.py pretrain | eval: bad input ends in one sentence and status 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may have any bytes
    options = None
    try:
        rank, _ = processes()
        if rank > 0:
            sys.stdout = open(os.devnull, "w", errors="replace")   # only the first process prints
        options = parse_arguments(argv)
        if isinstance(options, PretrainOptions):
            pretrain(options)
        elif rank == 0:                                    # one process is enough under torchrun
            evaluate(options)
    except (InputError, OSError) as error:
        print(f"afire.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        resumes = isinstance(options, PretrainOptions)
        print("\nstopped" + ": the same command resumes after the last whole epoch" * resumes)
        sys.exit(130)


if __name__ == "__main__":
    main()
