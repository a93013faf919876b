#!/usr/bin/env python3
"""AFiRe: anatomy-driven self-supervised learning for fine-grained representation of radiographs.

A single-file reference implementation of Liu, He, Wen, Yang and Chen, AAAI 2025 (arXiv:2504.10972).
A Vision Transformer is pre-trained on *normal* chest radiographs only, by two tasks on tokens:
(I) one position shows the same anatomy in every patient, so a token is contrasted with its
position's prototype; (II) synthetic lesions are added to the image, and must be restored away.

                        teacher: moving average of the student
    x  normal --------> encoder --E^T--> head --Q^T--> mean over images --> P --Sinkhorn--> C
    |                                                                       |               |
    + lesions M                                                      Task I: L_cate      L_stru
    |                                                                       |               |
    x' ---------------> encoder --E^S--> head --Q^S-------------------------+---------------+
                        student   |
                                  +--> tokens under M hidden --> decoder --> Task II: L_rest to x

    x, x'     normal radiograph, and the same with lesions          (B, 1, H, W) in [0, 1]
    M         synthetic lesion mask: what was added to x            (B, 1, H, W) in [0, 1]
    L         number of tokens, also called positions               (H / patch) * (W / patch)
    E^S, E^T  tokens of the student (of x') and the teacher (of x)  (B, 1 + L, D), class token first
    Q^S, Q^T  head outputs over K pseudo-clusters                   (B, L, K)
    P         spatial-aware prototypes: running mean of Q^T         (L, K)
    C         P after Sinkhorn-Knopp: soft assignment of positions  (L, K), rows sum to 1
    N, A      normal and abnormal tokens: M > 0 anywhere in its patch makes a token abnormal

In docstrings [P] is what the paper says, [R] what the authors' released code does, [D] our choice.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import datetime
import hashlib
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

__version__ = "1.0.0"

# ---- Synthetic lesion mask (Fig. 2, left) --------------------------------------------------------

def otsu_threshold(levels):
    """The grey level up to which pixels are dark (Otsu, 1979): (B, H, W) in 0..255 -> (B,)."""
    levels = levels.flatten(1)                                                 # (B, H * W)
    counts = torch.zeros(len(levels), 256, device=levels.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=counts.dtype))
    n = counts.cumsum(1)                                                       # pixels so far
    s = (counts * torch.arange(256, device=levels.device)).cumsum(1)           # their sum
    n_all, mean = n[:, -1:], s[:, -1:] / n[:, -1:]
    between_classes = (mean * n - s) ** 2 / (n * (n_all - n)).clamp_min(1)
    return between_classes.argmax(1)

def largest_region(bright, rounds=8):
    """The largest 8-connected region of each image: (B, H, W) bool -> (B, H, W) bool.

    The pixels of a 2 x 2 block all touch, so a block is one node. Each node points to a node of
    its region. A round hands the largest pointer on to the neighbours and to whom they pointed,
    then follows pointers twice: the reach grows faster than twofold (6 rounds served 300 images).
    """
    B, H, W = bright.shape
    padded = F.pad(bright, (0, 2 + W % 2, 0, 2 + H % 2))     # a rim, as roll wraps around
    blocks = padded.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))                # (B, h, 2, w, 2)
    nw, ne, sw, se = (blocks[:, :, i, :, j] for i in (0, 1) for j in (0, 1))
    _, h, w = nw.shape
    links = [(by, (mine & theirs.roll((-by[0], -by[1]), (1, 2))).int()) for by, mine, theirs in (
        ((0, 1), ne | se, nw | sw), ((1, 0), sw | se, nw | ne), ((1, 1), se, nw), ((1, -1), sw, ne))]
    pointer = torch.arange(h * w, device=bright.device).expand(B, -1)          # (B, h * w)
    for _ in range(rounds):
        grid = best = pointer.view(B, h, w).int()
        for (dy, dx), touch in links:
            best = torch.maximum(best, (grid * touch).roll((dy, dx), (1, 2)))
            best = torch.maximum(best, grid.roll((-dy, -dx), (1, 2)) * touch)
        best = best.flatten(1).long()
        pointer = best.scatter_reduce(1, pointer, best, "amax")
        pointer = pointer.gather(1, pointer)
        pointer = pointer.gather(1, pointer)
    pixels = blocks.sum((2, 4)).flatten(1)                                     # (B, h * w)
    size = torch.zeros_like(pixels).scatter_add_(1, pointer, pixels)
    largest = pointer == size.argmax(1, keepdim=True)
    return (blocks & largest.view(B, h, 1, w, 1)).reshape(B, 2 * h, 2 * w)[:, :H, :W]

def enclosing_circle_centre(region, steps=80):
    """Centre (y, x) of the smallest circle around each region: (B, H, W) bool -> (B, 2) in pixels.

    Badoiu and Clarkson (2003): go towards the farthest point, by less each time; 80 steps end
    within 2.5 px at 224. The farthest point is the first or the last of its row.
    """
    B, H, W = region.shape
    x = torch.arange(W, device=region.device, dtype=torch.float)
    y = torch.arange(H, device=region.device, dtype=torch.float).repeat(B, 2)
    ends = [torch.where(region, x, W).amin(2), torch.where(region, x, -1).amax(2)]
    points = torch.complex(torch.cat(ends, 1), y)                              # (B, 2H), x + iy
    inside = region.any(2).repeat(1, 2)
    centre = (points * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp_min(1)
    points = torch.where(inside, points, centre)
    for i in range(2, steps + 2):
        farthest = points.gather(1, (points - centre).abs().argmax(1, keepdim=True))
        centre = centre + (farthest - centre) / i                              # (B, 1)
    return torch.cat([centre.imag, centre.real], 1)

def synthetic_lesion_mask(images, generator=None, first=0):
    """Adds 1 to 4 synthetic lesions to each image [P: Fig. 2; R: the numbers; D: what is clipped].

    A lesion is the image's own tissue under an elliptical Gaussian, resized and added elsewhere.
    Unlike a crop or an affine transform it leaves the anatomy at every position in place.
    images (B, 1, H, W) in [0, 1]; the generator, on whichever device, draws the lesions. They are
    part of a batch in which `first` images come before them, elsewhere.
    Returns lesioned and mask, both (B, 1, H, W) in [0, 1]; lesioned == images where mask == 0.
    """
    B, _, H, W = images.shape
    device, grey = images.device, images.squeeze(1).float()
    h, w = max(1, round(60 * H / 224)), max(1, round(60 * W / 224))            # sizes are at 224 px
    full, crop = torch.tensor([[H, W], [h, w]], device=device)
    smallest, largest = ((side * full / 224).round().clamp_min(1) for side in (16, 128))

    # Texture: the 60 x 60 pixels around the centre of the largest bright region, inside the image.
    levels = (grey * 255).round().long()
    region = largest_region(levels > otsu_threshold(levels).view(B, 1, 1))
    corner = (enclosing_circle_centre(region) - crop / 2).round().long().clamp_min(0)
    corner = torch.minimum(corner, full - crop)                                # (B, 2)
    y = corner[:, 0].view(B, 1, 1) + torch.arange(h, device=device).view(h, 1)
    x = corner[:, 1].view(B, 1, 1) + torch.arange(w, device=device)
    texture = grey[torch.arange(B, device=device).view(B, 1, 1), y, x]         # (B, h, w)
    v, u = torch.linspace(-1, 1, h, device=device), torch.linspace(-1, 1, w, device=device)
    window = torch.exp(-(u ** 2 + v.view(h, 1) ** 2) / 0.5)                    # (h, w)
    window = (window - window.min()) / (window.max() - window.min()).clamp_min(1e-6)
    texture = 0.5 * window * texture

    # Up to 4 lesions: each height and width uniform, then its place.
    draws = torch.rand(first + B, 4, 5, generator=generator,
                       device=generator.device if generator else device)[first:].to(device)
    size = smallest + (draws[:, :, :2] * (largest - smallest + 1)).floor()     # (B, 4, 2)
    start = (draws[:, :, 2:4] * (full - size + 1)).floor()                     # (B, 4, 2)
    exists = torch.arange(4, device=device) <= (4 * draws[:, :1, 4]).floor()   # (B, 4)

    def resize_and_place(length, source, size, start):
        """Bilinear resizing along one axis, as a matrix (B, 4, length, source)."""
        pixel = torch.arange(length, device=device) - start.unsqueeze(2)       # (B, 4, length)
        position = (pixel + 0.5) * source / size.unsqueeze(2) - 0.5
        offset = position.clamp(0, source - 1).unsqueeze(3) - torch.arange(source, device=device)
        inside = (pixel >= 0) & (pixel < size.unsqueeze(2))
        return (1 - offset.abs()).clamp_min(0) * inside.unsqueeze(3)

    rows = resize_and_place(H, h, size[..., 0], start[..., 0]) * exists.view(B, 4, 1, 1)
    columns = resize_and_place(W, w, size[..., 1], start[..., 1])
    with torch.autocast(device.type, enabled=False):
        mask = torch.einsum("bnyi,bij,bnxj->byx", rows, texture, columns).clamp_max(1)
    mask = torch.where(mask < 1 / 255, 0, mask).unsqueeze(1)
    return torch.maximum(images, (images + mask).clamp_max(235 / 255)), mask

# ---- Vision Transformer: names and arithmetic are timm's, positions MAE's ------------------------

def patchify(images, patch_size):
    """(B, C, H, W) -> (B, L, C * p * p), row by row."""
    return F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)

def unpatchify(patches, patch_size):
    """(B, L, C * p * p) -> (B, C, H, W): the exact inverse of patchify, for square images."""
    side = math.isqrt(patches.shape[1])
    return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (side, side)), patch_size)

def abnormal_tokens(mask, patch_size):
    """A token is abnormal if there is any lesion in its patch [R]: (B, 1, H, W) -> (B, L) bool."""
    return patchify(mask, patch_size).amax(2) > 0

def sincos_positions(side, dim):
    """Fixed sine-cosine positions (1, 1 + side * side, dim), zero for the class token [R; as MAE].

    The first half of the channels tells the column, the second half the row.
    """
    frequency = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(side, dtype=torch.float64).outer(frequency)           # (side, dim / 4)
    column = torch.cat([angle.sin(), angle.cos()], 1).expand(side, side, -1)   # (side, side, d / 2)
    grid = torch.cat([column, column.transpose(0, 1)], 2).flatten(0, 1)        # (L, dim)
    return F.pad(grid, (0, 0, 1, 0)).float().unsqueeze(0)

class Block(nn.Module):
    """Pre-norm transformer block: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        qkv = self.attn.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                   # (B, h, T, D / h)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attn.proj(attended)
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))

def init_weights(module):
    """As in MAE: Xavier's uniform for all linear layers, the patch embedding too; zero biases."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)

class ViT(nn.Module):
    """Vision Transformer [P: ViT-B/16]: (B, C, H, W) -> (B, 1 + L, D), the class token first.

    seen (B, L) bool, equally many in each image: only these tokens are worked on, as in MAE, and
    the others come out as zeros.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12,
                 num_heads=12):
        super().__init__()
        side = img_size // patch_size
        self.num_patches = side * side
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(side, embed_dim), requires_grad=False)
        self.blocks = nn.Sequential(*[Block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)

    def forward(self, x, seen=None):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)                # (B, L, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        if seen is None:
            return self.norm(self.blocks(x))                                   # (B, 1 + L, D)
        seen = F.pad(seen, (1, 0), value=True)
        few = self.norm(self.blocks(x[seen].unflatten(0, (len(x), -1))))       # (B, 1 + seen, D)
        return few.new_zeros(x.shape).masked_scatter(seen.unsqueeze(2), few)

class Decoder(nn.Module):
    """Restores the normal image from the tokens, less the abnormal ones [P: Fig. 2; R].

    tokens (B, 1 + L, D) of the encoder, abnormal (B, L) bool -> (B, C, H, W).
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, encoder_dim=768, embed_dim=512,
                 depth=8, num_heads=16):
        super().__init__()
        self.patch_size, side = patch_size, img_size // patch_size
        self.embedding = nn.Linear(encoder_dim, embed_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, side * side, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(side, embed_dim), requires_grad=False)
        self.blocks = nn.Sequential(*[Block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.image_pred = nn.Linear(embed_dim, in_chans * patch_size ** 2)
        self.apply(init_weights)

    def forward(self, tokens, abnormal):
        x = self.embedding(tokens)                                             # (B, 1 + L, d)
        patches = torch.where(abnormal.unsqueeze(2), self.mask_token.to(x.dtype), x[:, 1:])
        x = torch.cat([x[:, :1], patches], 1) + self.pos_embed
        x = self.norm(self.blocks(x))
        return unpatchify(self.image_pred(x[:, 1:]), self.patch_size)

# ---- Projection head (Fig. 3) --------------------------------------------------------------------

class AnatomyHead(nn.Module):
    """Scores each token against K pseudo-clusters of its own position [R]: (B, L, D) -> (B, L, K).

    Each position has its own last layer, weight-normalised with norm 1: a score is the cosine
    between the projected token and one of that position's K directions, from -1 to 1.
    """

    def __init__(self, in_dim, num_patches, out_dim=256, hidden_dim=1024, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, bottleneck_dim))
        self.last_layers = nn.Parameter(torch.randn(num_patches, out_dim, bottleneck_dim))
        self.mlp.apply(init_weights)

    def forward(self, tokens):
        z = F.normalize(self.mlp(tokens), dim=2)                               # (B, L, d)
        scores = torch.einsum("bld,lkd->blk", z, self.last_layers)             # (B, L, K)
        return scores / self.last_layers.norm(dim=2)

# ---- Spatial-aware prototypes (Fig. 3) -----------------------------------------------------------

def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Sinkhorn-Knopp: scores (L, K) -> soft assignment (L, K) that uses all clusters alike [R].

    Rows sum to 1, columns nearly to L / K. It works on logarithms, so that no score overflows; the
    factors 1 / K and 1 / L of the usual form cancel in the next normalisation.
    """
    log_c = scores.float() / epsilon
    for _ in range(iterations):
        log_c = log_c - log_c.logsumexp(0, keepdim=True)
        log_c = log_c - log_c.logsumexp(1, keepdim=True)
    return log_c.exp()

def gather(x):
    """(B, ...) of each process -> (N * B, ...) of all N, with the gradient; x itself if alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.cat(torch.distributed.nn.functional.all_gather(x))
    return x

class SpatialPrototypes(nn.Module):
    """P, a prototype for each position: the running mean of the teacher's scores there [P; R]."""

    def __init__(self, num_patches, out_dim, momentum=0.75):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("prototypes", torch.zeros(num_patches, out_dim))  # (L, K)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, teacher_logits, momentum=None):
        """P <- m P + (1 - m) mean over the images of all devices; the first update copies the mean.

        teacher_logits (B, L, K); m is the constructor's momentum unless given.
        """
        mean = gather(teacher_logits.float().mean(0, keepdim=True)).mean(0)    # (L, K)
        momentum = self.momentum if momentum is None else momentum
        # No `if` on a tensor, as that would wait for the GPU.
        self.prototypes.lerp_(mean, torch.where(self.updates > 0, 1 - momentum, 1.0))
        self.updates += 1

    @torch.no_grad()
    def assignment(self):
        """C (L, K)."""
        return sinkhorn(self.prototypes)

# ---- Losses --------------------------------------------------------------------------------------

def structure_consistency_loss(logits, assignment, abnormal, temperature=0.1):
    """L_stru: every normal token predicts the clusters of its position [P; R].

        - 1 / |N|  sum over (i, j) in N, over k:  C_jk log softmax_k(Q^S_ij / temperature)

    logits (B, L, K), assignment (L, K), abnormal (B, L) bool -> scalar, 0 if no token is normal.
    """
    cross_entropy = -(assignment * F.log_softmax(logits.float() / temperature, 2)).sum(2)  # (B, L)
    return torch.where(abnormal, 0, cross_entropy).sum() / (~abnormal).sum().clamp_min(1)

def category_consistency_loss(logits, prototypes, abnormal, seen=True, temperature=0.1):
    """L_cate: at each position, normal tokens are nearer to the prototype than abnormal ones [D].

        s_ij = cos(Q^S_ij, P_j) / temperature
        mean over normal (i, j) of  - log  exp s_ij / (exp s_ij + mean over A at j of exp s_aj)

    The paper names this loss, the release lacks it, the form is ours: InfoNCE with the position's
    prototype as the anchor, normal tokens as positives, the abnormal tokens there as negatives.
    The mean over negatives makes chance log 2 for any batch. Token-to-token contrast stayed at
    chance: at one position all logits point the same way, and only the prototype tells where.
    logits (B, L, K), prototypes (L, K), abnormal and seen (B, L) bool -> scalar; an unseen token,
    and a position that has only one category, count for nothing.
    """
    # eps keeps the gradient at a vector of zeros within the range of half precision.
    similarity = F.cosine_similarity(logits.float(), prototypes, dim=2, eps=1e-3) / temperature
    normal, abnormal = ~abnormal & seen, abnormal & seen                               # (B, L)
    counts = normal & abnormal.any(0)
    negatives = similarity.masked_fill(~abnormal & abnormal.any(0), -math.inf).logsumexp(0)
    negatives = negatives - abnormal.sum(0).clamp_min(1).log()                         # (L,)
    loss = F.softplus(negatives - similarity)
    return torch.where(counts, loss, 0).sum() / counts.sum().clamp_min(1)

def restoration_loss(restored, target):
    """L_rest: mean squared error over all pixels, lesions or not [R]: equal shapes -> scalar."""
    return F.mse_loss(restored.float(), target.float())

# ---- AFiRe (Fig. 2, whole) -----------------------------------------------------------------------

class AFiRe(nn.Module):
    """Student (encoder and head), teacher (its moving average), decoder and prototypes.

    weights are those of L_stru, L_cate and L_rest in the total [R: 1 each].
    """

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12,
                 out_dim=256, head_dim=1024, bottleneck_dim=256, decoder_dim=512, decoder_depth=8,
                 decoder_heads=16, weights=(1.0, 1.0, 1.0)):
        super().__init__()
        self.patch_size, self.weights = patch_size, weights
        self.num_patches = (img_size // patch_size) ** 2

        def network():
            return nn.ModuleDict({
                "encoder": ViT(img_size, patch_size, 3, embed_dim, depth, num_heads),
                "head": AnatomyHead(embed_dim, self.num_patches, out_dim, head_dim,
                                    bottleneck_dim)})

        self.student = network()
        self.decoder = Decoder(img_size, patch_size, 3, embed_dim, decoder_dim, decoder_depth,
                               decoder_heads)
        self.teacher = network().requires_grad_(False).eval()
        self.teacher.load_state_dict(self.student.state_dict())
        self.prototypes = SpatialPrototypes(self.num_patches, out_dim)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), False)

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def normalise(self, images):
        """Three equal channels, ImageNet's mean and std [R]: (B, 1, H, W) -> (B, 3, H, W)."""
        return (images - self.mean) / self.std

    def forward(self, normal, lesioned, mask, prototype_momentum=None, seen=None):
        """x, x', M, each (B, 1, H, W) in [0, 1] -> dictionary of the total and the three losses.

        seen (B, L) bool: the student sees these tokens of x' only [D]. The others are restored,
        as the abnormal ones are, and count for neither contrast.
        """
        x, abnormal = self.normalise(normal), abnormal_tokens(mask, self.patch_size)
        if self.training:
            with torch.no_grad():
                teacher_tokens = self.teacher.encoder(x)[:, 1:]                # (B, L, D)
                self.prototypes.update(self.teacher.head(teacher_tokens), prototype_momentum)
        tokens = self.student.encoder(self.normalise(lesioned), seen)          # (B, 1 + L, D)
        seen = torch.ones_like(abnormal) if seen is None else seen
        logits = self.student.head(tokens[:, 1:])                              # (B, L, K)
        restored = self.decoder(tokens, abnormal | ~seen)                      # (B, 3, H, W)

        # Both contrasts are over the tokens of all processes, as if it were one.
        logits = gather(logits)
        abnormal, seen = gather(abnormal.byte()).bool(), gather(seen.byte()).bool()
        assignment, prototypes = self.prototypes.assignment(), self.prototypes.prototypes
        losses = {"structure": structure_consistency_loss(logits, assignment, abnormal | ~seen),
                  "category": category_consistency_loss(logits, prototypes, abnormal, seen),
                  "restoration": restoration_loss(restored, x)}
        total = sum(weight * loss for weight, loss in zip(self.weights, losses.values()))
        return {"loss": total, **losses}

    @torch.no_grad()
    def update_teacher(self, momentum):
        """Teacher <- momentum * teacher + (1 - momentum) * student, encoder and head [R]."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()),
                             1 - momentum)

    @classmethod
    def from_release(cls, checkpoint):
        """The authors' whole model, from their {"student": state, "teacher": state} [R]."""
        return read_release(cls, checkpoint)

    @torch.no_grad()
    def features(self, images):
        """The teacher's tokens, to be used downstream [R]: (B, 1, H, W) in [0, 1] -> (B, L, D)."""
        return self.teacher.encoder(self.normalise(images))[:, 1:]

# ---- Data: files, labels, boxes ------------------------------------------------------------------

class InputError(Exception):
    """Bad input or a bad option, in one sentence with the remedy; the command line exits with 2."""

@dataclasses.dataclass
class Radiographs:
    """n images and what is known of them."""
    records: list         # n of {"name", "path", "findings": a set, "patient", "test": held out?,
    #                         and if it is known where the findings are, "mask": (S, S) bool}
    images: np.ndarray    # (n, 1, S, S) uint8, memory-mapped if they come from files
    labels: np.ndarray    # (n, F) bool, no column if nothing is known
    findings: list        # F names
    train: np.ndarray     # indices of the readable images to train and to fit on,
    test: np.ndarray      # and of those held out

def is_normal(name):
    """Does a folder or a label of this name mean "no finding"?"""
    return re.sub(r"[\W_]", "", name.lower()).removesuffix("s") in (
        "", "normal", "nofinding", "healthy")

def read_csv(file, columns):
    """-> a dictionary for each line, with these columns at the least."""
    with open(file, newline="", encoding="utf-8-sig", errors="replace") as stream:
        header = stream.readline()
        stream.seek(0)
        rows = list(csv.DictReader(stream, delimiter=max(",;\t", key=header.count)))
    for column in columns:
        if not rows or rows[0].get(column) is None:
            raise InputError(f"{file} has no column {column!r}: it needs {', '.join(columns)}")
    return rows

def read_list(file):
    """The field's lists, `relative/path 0 1 0 ...`: -> a (name, set of findings) each."""
    text = file.read_text("utf-8-sig", errors="replace")
    lines = re.findall(r"^[ \t]*(\S.*?)((?:[ \t]+[01])*)[ \t]*$", text, re.MULTILINE)
    count = len(lines[0][1].split()) if lines else 0
    findings = [f"finding_{i + 1}" for i in range(count)]
    if count == 14:                               # ChestX-ray14's, in the order of its lists
        findings = ("Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia "
                    "Pneumothorax Consolidation Edema Emphysema Fibrosis Pleural_Thickening Hernia"
                    ).split()
    for name, flags in lines:
        if len(flags.split()) != count:
            raise InputError(f"{file}: {name} has {len(flags.split())} labels, the first line "
                             f"{count}: give every line as many zeros and ones")
    return [(name, {finding for finding, flag in zip(findings, flags.split()) if flag == "1"})
            for name, flags in lines]

def find_images(data, root=None, labels=None, test_fraction=0.2):
    """What --data, --root and --labels name: -> records as in Radiographs.

    Held out is the folder test beside a folder train, else a fixed part of the patients, who are
    told by --labels or by the names of ChestX-ray14, CheXpert, MIMIC-CXR and Kermany et al.
    """
    if data.is_file():
        records = [{"name": name, "path": Path(root or data.parent) / name, "findings": findings}
                   for name, findings in read_list(data)]
    else:
        kinds = ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm"
        paths = [path for path in sorted(data.rglob("*")) if path.suffix.lower() in kinds]
        classes = [next(part for part in (*path.relative_to(data).parts[:-1], "unsorted")
                        if part not in ("train", "val", "test")) for path in paths]
        known = any(map(is_normal, classes))
        records = [{"name": path.relative_to(data).as_posix(), "path": path,
                    "findings": {each} if known and not is_normal(each) else set()}
                   for path, each in zip(paths, classes)]
    if labels:
        rows = {row["image"]: row for row in read_csv(labels, ["image", "findings"])}
        told = [(record, rows.get(record["name"]) or rows.get(record["path"].name))
                for record in records]
        records = [{**record, **row, "findings": {each.strip() for each in row["findings"].split("|")
                                                  if not is_normal(each)}}
                   for record, row in told if row]
        print(f"{labels} tells of {len(records)} of {len(told)} images; the others are left out")
    if not records:
        raise InputError(f"--data {data} is neither a list of images nor a folder with PNG, "
                         "JPEG, BMP, TIFF or DICOM files"
                         + (f" that {labels} tells of" if labels else ""))
    split = {record["name"].split("/")[0] for record in records} >= {"train", "test"}
    for record in records:
        guess = re.search(r"patient\d+|person\d+(?=_)|\bp\d{8}\b|\d{8}(?=_\d{3})", record["name"])
        record["patient"] = record.get("patient") or (guess[0] if guess else record["name"])
        record["test"] = (record["name"].startswith("test/") if split else
                          zlib.crc32(record["patient"].encode()) % 1000 < 1000 * test_fraction)
    return records

def open_image(path):
    """A Pillow image; of DICOM the pixels as they are meant to be seen, in floating point."""
    if path.suffix.lower() != ".dcm":
        return Image.open(path)
    try:
        import pydicom
    except ImportError as error:
        raise InputError(f"{path} is DICOM: `pip install pydicom` to read it") from error
    file = pydicom.dcmread(path)
    pixels = pydicom.pixels.apply_rescale(file.pixel_array, file)
    pixels = pydicom.pixels.apply_windowing(pixels, file).astype(np.float32)
    inverted = file.PhotometricInterpretation == "MONOCHROME1"
    return Image.fromarray(pixels.max() - pixels if inverted else pixels)

def read_image(path, size, equal=False):
    """One file, squashed: -> (size, size) uint8. Over 8 bits, by its own minimum and maximum.

    equal: its histogram is equalised, as those of MIMIC-CXR-JPG are, on which the paper trains.
    """
    with open_image(path) as image:
        if image.mode[0] in "IF":
            pixels = np.asarray(image, np.float32)
            low, high = float(pixels.min()), float(pixels.max())
            if not math.isfinite(high - low):
                raise ValueError("not all of its pixels are finite")
            image = Image.fromarray((pixels - low) * (255 / max(high - low, 1e-6)))
        else:
            image.draft("L", (size, size))        # decodes a large JPEG at a fraction of its size
            image = image.convert("L")
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    pixels = pixels.round().clip(0, 255).astype(np.uint8)
    if not equal:
        return pixels
    counts = np.bincount(pixels.ravel(), minlength=256)                # a level becomes its
    rank = 255 * (counts.cumsum() - counts / 2) / pixels.size          # mean rank: (256,)
    return rank.round().astype(np.uint8)[pixels]

def cached_images(paths, size, cache, equal=False):
    """Files decoded once, in parallel: -> (n, 1, size, size) uint8, memory-mapped; readable (n,).

    The cache is known by the files' names, sizes and times of change, and by the other options.
    """
    facts = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns)
             if path.is_file() else str(path) for path in paths]
    key = hashlib.sha256(repr((size, equal, facts)).encode()).hexdigest()[:16]
    file, status = cache / f"{key}.npy", cache / f"{key}.readable.npy"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        images = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(paths), 1, size, size))

        def decode(i):
            try:
                images[i, 0] = read_image(paths[i], size, equal)
                return True
            except InputError:
                raise
            except Exception:                     # each decoder fails in its own ways
                return False

        with concurrent.futures.ThreadPoolExecutor() as pool:
            done = pool.map(decode, range(len(paths)))
            np.save(status, list(tqdm(done, "decode", len(paths), unit="image")))
        images.flush()
        partial.rename(file)
    readable = np.load(status)
    failed = [str(path) for path, good in zip(paths, readable) if not good]
    if len(failed) == len(paths):
        raise InputError(f"--data has no image that can be read: {failed[0]} and all others fail")
    if failed:
        print(f"{len(failed)} of {len(paths)} files cannot be read and are left out: "
              + ", ".join(failed[:9]) + (", ..." if len(failed) > 9 else ""))
    return np.load(file, mmap_mode="r"), readable

def load_radiographs(args):
    """The images that --data names, or phantoms: -> Radiographs."""
    if args.data:
        records = find_images(Path(args.data), args.root, args.labels, args.test_fraction)
        images, readable = cached_images([record["path"] for record in records], args.img_size,
                                         Path(args.cache or f"{args.out}/cache"),
                                         getattr(args, "levels", "file") == "equal")
    else:
        images, labels, masks, names = phantoms(2500, args.img_size)
        readable = np.ones(len(images), bool)
        records = [{"name": f"phantom {i}", "test": i >= (1 - args.test_fraction) * len(images),
                    "findings": set(np.array(names)[labels[i]]), "mask": masks[i].any(0)}
                   for i in range(len(images))]
    findings = sorted(set().union(*[record["findings"] for record in records]))
    labels = [[finding in record["findings"] for finding in findings] for record in records]
    test = np.array([record["test"] for record in records])
    return Radiographs(records, images, np.array(labels, bool), findings,
                       np.flatnonzero(~test & readable), np.flatnonzero(test & readable))

def read_boxes(file, data):
    """Boxes around findings, in pixels of the image, become masks in the records of Radiographs.

    Boxes are few: all images of patients who have one are tested on, wherever the split put them,
    unless pre-training has seen a normal image of theirs.
    """
    records, side = data.records, data.images.shape[-1]
    by_name = {**{record["path"].name: record for record in records},
               **{record["name"]: record for record in records}}
    for row in read_csv(file, ["image", "finding", "x", "y", "w", "h"]):
        record = by_name.get(row["image"])
        if record:
            with open_image(record["path"]) as image:
                scale = side / np.array(image.size)
            try:
                x, y, w, h = (float(row[key]) for key in "xywh")
            except (TypeError, ValueError) as error:
                raise InputError(f"{file}: the box of {row['image']} has no number in one of x, y, "
                                 "w, h: correct it") from error
            left, top = np.floor(scale * [x, y]).astype(int).clip(0, side)
            right, bottom = np.ceil(scale * [x + w, y + h]).astype(int).clip(0, side)
            mask = record.setdefault("mask", np.zeros((side, side), bool))
            mask[top:bottom, left:right] = True
    moved = {record["patient"] for record in records if "mask" in record}
    moved -= {records[row]["patient"] for row in data.train if not data.labels[row].any()}
    moved = np.array([records[row]["patient"] in moved for row in data.train], bool)
    data.train, data.test = data.train[~moved], np.union1d(data.test, data.train[moved])

# ---- Data: phantoms ------------------------------------------------------------------------------

def inside(distance, soft):
    """A smooth step: 0 where distance < -soft (outside), 1 where distance > soft (inside)."""
    t = np.clip(0.5 + 0.5 / soft * distance, 0, 1)
    return t * t * (3 - 2 * t)

def radiograph(rng, size):
    """One image (size, size) uint8, its labels (F,) bool and its masks (F, size, size) bool."""
    nodule, effusion, cardiomegaly, pneumothorax = labels = rng.random(4) < 0.16
    draw, px, grid = rng.uniform, 2 / size, np.arange(size, dtype=np.float32)
    fine, blur = 0.006 + 0.7 * px, 0.025 + 0.7 * px     # no edge is sharper than a pixel
    # x to the image's right (the patient's left) and y down, both about -1..1, a little turned
    turn, zoom, col = draw(-0.07, 0.07), draw(0.93, 1.15), (grid + 0.5) * px - 1
    row, col = zoom * (col[:, None] + draw(-0.08, 0.08)), zoom * (col + draw(-0.08, 0.08))
    x, y = col + turn * row, row - turn * col           # (size, size) each
    a = np.abs(x)                                       # distance from the midline
    # body: trunk and neck with the shoulders sloping between them; it grows thicker downwards
    neck, flank = draw(0.2, 0.28), draw(0.84, 1.0) + 0.4 * inside(-0.3 - y, 0.4) + 0.1 * y ** 2 - a
    shoulder = y - draw(-0.9, -0.8) - draw(0.2, 0.3) * (a - neck) + 4 * np.maximum(neck - a, 0)
    body = inside(flank, 0.04) * inside(shoulder, 0.06)
    density = body * (0.55 + 0.4 * inside(flank - 0.4, 0.5) + draw(0.1, 0.2) * inside(y + 0.3, 0.6))
    # lungs: apex, rib cage, mediastinum, and diaphragm, whose right dome the liver lifts
    width, apex, base = draw(0.66, 0.78), draw(-0.78, -0.66), draw(0.34, 0.52)
    floor, middle, blunt = base + draw(0.22, 0.3), draw(0.24, 0.3), draw(2.2, 3.2)
    def lungs(top, half):
        depth = np.clip((y - top) / (floor - top), 0, 1)
        spread = np.sqrt(1 - (1 - depth) ** blunt) + 20 * np.minimum(y - top, 0)
        outer, inner = middle + (half - middle) * spread, middle - (middle - 0.06) * spread
        return outer, inside(np.minimum(outer - a, a - inner), fine)
    cage, lung = lungs(apex, width)
    lateral = np.minimum(a / np.maximum(cage, 0.1), 1)  # 0 at the midline, 1 at the rib cage
    dome = base - draw(0.03, 0.09) * inside(-x, 0.2) + draw(1.3, 2.2) * (a - 0.5 * width) ** 2
    lung *= inside(dome - y, fine) * (0.7 + 0.3 * inside(cage - a - 0.08, 0.2))
    # mediastinum: great vessels and aortic knob; heart: a leaning ellipse, measured in thoraxes
    waist = draw(0.1, 0.13) + 0.06 * np.exp(-((y + 0.1) / 0.2) ** 2) + 0.1 * np.maximum(y, 0)
    lung *= inside(a - waist, 2 * blur) * inside(np.hypot(x - 0.06, y + draw(0.3, 0.4)) - 0.1, blur)
    lean, dx, dy = draw(0.2, 0.45), x - draw(0.09, 0.13), y - base + draw(0.07, 0.15)
    ratio = np.hypot(dx - lean * dy, dy / 0.85) * math.hypot(1, 0.85 * lean) / width
    normal, large = inside(draw(0.40, 0.48) - ratio, blur), inside(draw(0.56, 0.64) - ratio, blur)
    excess = cardiomegaly * lung * (large - normal)
    air = lung * (1 - normal) - excess
    # effusion climbs the chest wall; in pneumothorax the lung, edged by its pleura, leaves it
    surface = floor - draw(0.1, 0.45) - draw(0.12, 0.25) * lateral ** 4
    fluid = effusion * air * inside(y - surface, 2 * blur) * (x * draw(-1, 1) > 0)
    air -= fluid
    side, shrunk = draw(-1, 1), width * (1 - draw(0.07, 0.2) * inside(floor - 0.35 - y, 0.5))
    collapsed = lungs(apex + draw(0.06, 0.16), shrunk)[1]
    free = pneumothorax * air * (x * side > 0) * (1 - collapsed)
    density += 0.2 * fluid - draw(0.62, 0.76) * air - free * (0.16 - 0.3 * collapsed)
    # hilar vessels: a fan whose branches fork where the distance to the nearest is folded
    hx, hy = a - 0.13, y + draw(0.03, 0.1) - 0.04 * (x < 0)
    r, fan = np.hypot(hx, hy), 4 / math.pi * np.arctan2(hy, hx) + draw(0, 1) + draw(0, 1) * (x < 0)
    fan += 0.2 * np.sin(11 * x + 5 * y + draw(0, 6)) + 0.2 * np.sin(8 * y - 6 * x + draw(0, 6))
    off = np.abs(fan - np.round(fan)) * r * math.pi / 4
    off = np.abs(np.abs(off - 0.3 * np.maximum(r - 0.12, 0)) - 0.3 * np.maximum(r - 0.3, 0))
    tree = inside(0.022 - 0.025 * r - off, fine + 0.008) * inside(0.35 - r, 0.4)
    # ribs: behind they leave the spine and drop at the side, in front they come down from there
    drop, spacing, first = draw(0.15, 0.28), draw(0.15, 0.18), draw(0, 1)
    def ribs(level):
        off = np.abs((level / spacing + first) % 1 - 0.5)
        return inside(0.2 - off, 0.06 + fine / spacing) - 0.4 * inside(0.1 - off, 0.1)
    back = ribs(y - drop * lateral ** 3 + 0.05 * np.sin(math.pi * lateral))
    front = ribs(y - drop - draw(0.35, 0.5) * (1 - lateral)) * inside(lateral - 0.5, 0.2)
    belly = inside(y - dome, fine + 0.25 * inside(0.3 - a, 0.2)) * inside(cage - a, 0.15)
    bones = (back + 0.7 * front) * inside(cage + 0.02 - a, 0.02) * (1 - 0.6 * belly)
    density += 0.3 * belly + 0.1 * body * bones + 0.14 * tree * (air - free)
    # clavicles, shoulder blades, vertebrae, trachea
    collar = y + draw(0.5, 0.6) + draw(0.15, 0.3) * (a - 0.1) - 0.03 * np.sin(7 * a)
    collar = inside(0.03 - np.abs(collar), fine + 0.01) * inside(0.36 - np.abs(a - 0.48), 0.03)
    blade = inside(a - 0.6 + 0.2 * y, 0.02 + fine) * inside(0.25 - np.abs(y + 0.33), 0.1)
    spine = inside(0.075 - a, blur) * (1 + 0.25 * np.cos(2 * math.pi / draw(0.11, 0.13) * y))
    trachea = inside(0.045 - np.abs(x + 0.01), blur) * inside(-0.22 - y, 0.08)
    density += body * (0.16 * collar + 0.08 * blade + 0.2 * spine - 0.22 * trachea)
    # nodule: a ball, never in the lung with the pneumothorax
    nx, ny = -math.copysign(width, side) * draw(0.5, 0.78), apex + draw(0.25, 0.55) * (floor - apex)
    spot = np.hypot(x - nx, y - ny) / max(draw(0.04, 0.08), 0.75 * px * zoom)
    density += nodule * draw(0.1, 0.18) * np.sqrt(np.maximum(1 - spot ** 2, 0))
    density *= 1 + draw(-0.25, 0.25) * np.sin(draw(-2, 2) * x + draw(-2, 2) * y + draw(0, 6))
    film = (1 - np.exp(-draw(0.8, 3.6) * np.maximum(density, 0))) ** draw(0.7, 2.6)
    grain = draw(0.004, 0.012) * rng.standard_normal((size, size), dtype=np.float32)
    film = 0.03 + 0.93 * film + grain + 0.7 * (np.roll(grain, 1, 0) + np.roll(grain, 1, 1))
    masks = np.stack([nodule & (spot < 1), fluid > 0.1, excess > 0.1, free > 0.1])
    return (255 * np.clip(film, 0, 1)).astype(np.uint8), labels, masks

def phantoms(n, size, seed=0):
    """Frontal chest radiographs of simple anatomy, ours (not in the paper): each part adds its
    thickness along the ray to a density, which the film turns into brightness. Image i depends
    on (seed, i) alone, and its anatomy not on size (32..512). Each of F = 4 findings has a chance
    of 0.16, so half the images are normal. Returns images (n, 1, size, size) uint8, labels (n, F)
    bool, masks of the pixels that each finding changes (n, F, size, size) bool, F names."""
    drawn = [radiograph(np.random.default_rng((seed, i)), size) for i in range(n)]
    images, labels, masks = (np.stack(part) for part in zip(*drawn))
    return images[:, None], labels, masks, ['nodule', 'effusion', 'cardiomegaly', 'pneumothorax']

# ---- Pre-training --------------------------------------------------------------------------------

def build_model(args):
    """AFiRe as the options describe it; its first weights depend on --seed alone."""
    sizes = {
        "vit_micro": dict(embed_dim=128, depth=4, num_heads=2, out_dim=64, head_dim=128,
                          bottleneck_dim=128, decoder_dim=64, decoder_depth=2, decoder_heads=2),
        "vit_tiny": dict(embed_dim=192, depth=12, num_heads=3, decoder_dim=192, decoder_heads=6),
        "vit_small": dict(embed_dim=384, depth=12, num_heads=6),
        "vit_base": dict(embed_dim=768, depth=12, num_heads=12)}
    torch.manual_seed(args.seed)
    weights = (args.structure_weight, args.category_weight, args.restoration_weight)
    return AFiRe(args.img_size, args.patch_size, weights=weights, **sizes[args.arch])

def to_device(images, device):
    """uint8 array (B, 1, S, S) -> float tensor in [0, 1] on the device, without waiting for it."""
    batch = torch.from_numpy(images)
    batch = batch.pin_memory() if device.type == "cuda" else batch
    return batch.to(device, non_blocking=True).float() / 255

def cosine(start, end, progress):
    """From start to end along half a cosine, for progress from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))

def random_affine(images, generator=None, first=0):
    """What the lesions are to replace [P]: a turned crop, which moves the anatomy [D: the numbers].

    It stands in for synthetic_lesion_mask, with an empty mask. The crop has 0.5 to 0.85 of the
    image's side, is turned by up to 10 degrees, and lies anywhere inside.
    """
    draws = torch.rand(first + len(images), 4, generator=generator)[first:].to(images)
    side, angle = 0.5 + 0.35 * draws[:, :1], (2 * draws[:, 1:2] - 1) * math.pi / 18    # (B, 1)
    cos, sin = side * angle.cos(), side * angle.sin()
    shift = (2 * draws[:, 2:] - 1) * (1 - cos - sin.abs())                     # (B, 2)
    theta = torch.cat([cos, -sin, shift[:, :1], sin, cos, shift[:, 1:]], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False), torch.zeros_like(images)

class Trainer:
    """All that a step changes: the model, its optimiser and the scale of its gradients."""

    def __init__(self, args, rank=0, world=1):
        self.args, self.rank, self.world = args, rank, world
        self.model = build_model(args).to(args.device).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW([
            {"params": [p for p in self.parameters if p.ndim > 1]},
            {"params": [p for p in self.parameters if p.ndim == 1]}],
            fused=args.device.type != "mps")
        self.amp = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
        self.scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp == "fp16")
        if args.compile:
            for part in (*self.model.student.values(), *self.model.teacher.values(),
                         self.model.decoder):
                part.compile()
        self.parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        self.network = self.model if world == 1 else nn.parallel.DistributedDataParallel(
            self.model, broadcast_buffers=False)

    def step(self, images, rows, step, per_epoch, total):
        """One step on images (n, 1, S, S) uint8 [rows]: -> the four losses (4,), lr.

        The batch is cut into parts, a device's one after the other with --grad-accum.
        """
        args, device, warmup = self.args, self.args.device, self.args.warmup_epochs * per_epoch
        peak = args.lr * args.batch_size / 256
        lr = (peak * (step + 1) / warmup if step < warmup else
              cosine(peak, 1e-6, (step - warmup) / (total - warmup)))
        decay = cosine(args.weight_decay, 10 * args.weight_decay, step / total)
        for group, weight_decay in zip(self.optimizer.param_groups, (decay, 0)):
            group.update(lr=lr, weight_decay=weight_decay)             # none on biases and norms

        augment = synthetic_lesion_mask if args.augment == "lesion" else random_affine
        seed = (args.seed * 2654435769 + step) % 2 ** 32     # generators ignore all further bits
        size, sums = len(rows) // (self.world * args.grad_accum), 0
        self.optimizer.zero_grad()
        for part in range(args.grad_accum):
            first = (part * self.world + self.rank) * size
            normal = to_device(images[rows[first:first + size]], device)
            generator, seen = torch.Generator().manual_seed(seed), None
            if args.keep < 1:
                draws = torch.rand(len(rows), self.model.num_patches, generator=generator)
                rank = draws[first:first + size].argsort(1).argsort(1)         # (B, L)
                seen = (rank < args.keep * self.model.num_patches).to(device)
            lesioned, mask = augment(normal, generator, first)
            with torch.autocast(device.type, self.amp, enabled=self.amp is not None):
                losses = self.network(normal, lesioned, mask, 0.0 if step < per_epoch else None,
                                      seen)
            self.scaler.scale(losses["loss"] / args.grad_accum).backward()
            sums = sums + torch.stack(list(losses.values())).detach() / args.grad_accum
        if step < per_epoch:
            self.model.student.head.last_layers.grad = None            # P has no meaning yet
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, 3.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.update_teacher(cosine(args.teacher_momentum, 1.0, step / total))
        return sums, lr

@contextlib.contextmanager
def only_run_in(folder):
    """Keeps a second run out of the folder; the system frees the lock of a process that died."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            import fcntl                                               # not there on Windows
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another run is at work in --out {folder}: wait for its end, or name "
                             "another folder") from error
        except ImportError:
            pass
        yield

@contextlib.contextmanager
def signals_noted():
    """Ctrl-C and SIGTERM do nothing but add their number to the list that this gives."""
    noted = []
    before = {each: signal.signal(each, lambda number, _: noted.append(number))
              for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)

def save_checkpoint(state, path):
    """First beside it, so that neither a kill nor a full disk harms what is there."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {partial} ({error}); {path} is as it was: free some space, "
                         "and repeat the command to go on from there") from error
    if path.exists():
        path.replace(path.with_name("previous.pth"))
    partial.replace(path)

def pretrain(args):
    """Trains in the folder args.out, and goes on from the checkpoint there if there is one.

    All that is random is a function of seed and step, so that a resumed run equals an unbroken one.
    Under torchrun it takes part in one training by several processes, with the same result.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo",
                                             timeout=datetime.timedelta(hours=4))
    if args.batch_size % (world * args.grad_accum):
        raise InputError(f"--batch-size {args.batch_size} cannot be shared by {world} processes "
                         f"with --grad-accum {args.grad_accum}: make it a multiple of both")
    with only_run_in(Path(args.out)) if rank == 0 else contextlib.redirect_stdout(None):
        train(args, rank, world)
    if world > 1:
        torch.distributed.destroy_process_group()

def train(args, rank, world):
    """pretrain in one of its processes; the first one speaks and writes."""
    device, out = args.device, Path(args.out)
    ckpt = out / "checkpoint.pth"
    files = [file for file in (ckpt, out / "previous.pth") if file.exists()]
    state = read_checkpoint(files[0]) if files else None
    config = {key: value for key, value in vars(args).items()
              if key not in ("verb", "device", "out")}

    def refuse_another_run():
        for key, value in config.items():
            before = state["config"].get(key) if state else value
            if before != value and key not in ("cache", "save_every", "compile"):
                raise InputError(f"{out} holds a run with {key} {before}, not {value}: repeat that "
                                 "to go on with it, else name another --out")

    refuse_another_run()
    if rank:
        torch.distributed.barrier()                # until the first process has filled the cache
    data = load_radiographs(args)
    if world > 1 and not rank:
        torch.distributed.barrier()
    normals = data.train[~data.labels[data.train].any(1)]
    print(f"preset {args.preset} on {world} x {device}, in {out}")
    print(f"pre-training on {len(normals)} images; left out: {len(data.train) - len(normals)} with "
          f"findings, {len(data.test)} held out for testing"
          + ("" if data.findings else "; nothing is known of findings, all count as normal"))
    if len(normals) < args.batch_size:
        raise InputError(f"--data {args.data} has {len(normals)} images without findings to train "
                         f"on: fewer than --batch-size {args.batch_size}, lower it or add images")
    names = "\n".join(data.records[row]["name"] for row in normals)
    config["images"] = f"{len(normals)} of key {zlib.crc32(names.encode()):08x}"
    refuse_another_run()

    trainer, start, history = Trainer(args, rank, world), 0, []
    sums = torch.zeros(4, device=device)                               # of the losses, this epoch
    if args.init:
        try:
            weights = load_encoder(args.init, args.img_size).state_dict()
            for network in trainer.model.student, trainer.model.teacher:
                network.encoder.load_state_dict(weights)
        except RuntimeError as error:
            raise InputError(f"--init {args.init} does not fit --arch {args.arch} and --patch-size "
                             f"{args.patch_size}: change these") from error
    per_epoch = len(normals) // args.batch_size
    total = args.epochs * per_epoch
    if state:
        for name, part in trainer.parts.items():
            part.load_state_dict(state[name])
        start, history, sums = state["step"], state["history"], state["sums"].to(device)
        print(f"{out} is at step {start} of {total}: going on from there")

    def save(step):
        parts = {name: part.state_dict() for name, part in trainer.parts.items()}
        save_checkpoint({**parts, "step": step, "sums": sums.cpu(), "history": history,
                         "config": config}, ckpt)
        lines = "".join(json.dumps(record) + "\n" for record in history)
        (out / "log.jsonl").write_text(lines)

    if rank == 0:
        (out / "config.json").write_text(json.dumps(config, indent=2))
    bar = tqdm(total=total, initial=start, unit="step", mininterval=1, disable=rank > 0)
    saved_at = time.monotonic()
    with signals_noted() as signals:
        for step in range(start, total):
            epoch, i = divmod(step, per_epoch)
            if i == 0 or step == start:
                order = np.random.default_rng((args.seed, epoch)).permutation(normals)
            rows = np.sort(order[i * args.batch_size:(i + 1) * args.batch_size])
            losses, lr = trainer.step(data.images, rows, step, per_epoch, total)
            sums = losses if i == 0 else sums + losses
            bar.update()
            last = i == per_epoch - 1
            if not (last or step % 10 == 0 or signals and world == 1):
                continue                                               # .tolist waits for the GPU
            told = torch.cat([sums, sums.new_tensor([len(signals)])])
            if world > 1:                                              # all stop at the same step
                torch.distributed.all_reduce(told)
                told /= world
            sums, stop = told[:4], bool(told[4])
            means = dict(zip(("loss", "structure", "category", "restoration"),
                             (sums / (i + 1)).tolist()))
            bar.set_postfix({name: f"{means[name]:.3f}" for name in means if name != "loss"})
            saving = last or stop or time.monotonic() - saved_at > 60 * args.save_every
            sound = not saving or all(p.isfinite().all() for p in trainer.parameters)
            if not (math.isfinite(means["loss"]) and sound):
                bar.close()
                sys.exit(f"afire.py: the loss is not finite at step {step} ({bar.postfix}); "
                         f"{ckpt} is from before. Try a lower --lr or --amp none in another --out, "
                         "with --init to start from that checkpoint")
            if last:
                history.append({"epoch": epoch + 1, **means, "lr": lr})
            if rank == 0 and saving:
                save(step + 1)
                saved_at = time.monotonic()
            if stop:
                bar.close()
                print(f"stopped after step {step + 1} of {total}; the same command goes on from "
                      "there")
                sys.exit(128 + max(signals, default=signal.SIGTERM))
    bar.close()
    if rank == 0:
        torch.save(trainer.model.teacher.encoder.state_dict(), out / "encoder.pth")
        plot_losses(history, out / "losses.png")
        plot_restoration(trainer.model.eval(), to_device(data.images[normals[:4]], device),
                         out / "restoration.png")
    print(f"in {out}: checkpoint.pth, encoder.pth (the teacher's), restoration.png, losses.png")

def read_checkpoint(path):
    """What torch.save wrote; a file with anything but tensors and plain data is refused, unrun."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):   # DINO's options are in one
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:                    # each broken file fails in its own way
        raise InputError(f"{path} is not a checkpoint of tensors: name another") from error

def load_encoder(path, img_size=None):
    """The encoder in a checkpoint: of our or the release's teacher, or a timm, MAE or DINO ViT.

    Its positions are interpolated if img_size, in pixels, has another grid than they. It prints
    what it takes and what it leaves.
    """
    state = read_checkpoint(path)
    for key in "model", "teacher", "state_dict":
        state = state[key] if isinstance(state.get(key), dict) else state
    state = {key.removeprefix("module."): value for key, value in state.items()}
    prefix = next((prefix for prefix in ("teacher.encoder.", "encoder.", "backbone.", "")
                   if f"{prefix}patch_embed.proj.weight" in state), None)
    if prefix is None:
        raise InputError(f"{path} holds no ViT: there is no patch_embed.proj.weight in it")
    taken = {key.removeprefix(prefix): value for key, value in state.items()
             if key.startswith(prefix)}
    depth = len({key.split(".")[1] for key in taken if key.startswith("blocks.")})
    dim, in_chans, _, patch_size = taken["patch_embed.proj.weight"].shape
    try:
        positions = taken["pos_embed"]                                         # (1, 1 + L, D)
        side = math.isqrt(positions.shape[1] - 1)
        size = img_size or side * patch_size
        if size != side * patch_size:
            grid = unpatchify(positions[:, 1:], 1)                             # (1, D, side, side)
            grid = F.interpolate(grid, (size // patch_size,) * 2, mode="bicubic", antialias=True)
            taken["pos_embed"] = torch.cat([positions[:, :1], patchify(grid, 1)], 1)
        vit = ViT(size, patch_size, in_chans, dim, depth, max(1, dim // 64))
        vit.load_state_dict({key: taken[key] for key in vit.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path} is not a ViT of {depth} blocks: {error}") from error
    left = [key for key in state if key.removeprefix(prefix) not in vit.state_dict()]
    print(f"{path}: {len(vit.state_dict())} tensors of {prefix or 'the encoder'} taken, "
          f"{len(left)} left" + (f": {', '.join(left[:4])}, ..." if left else ""))
    return vit

def read_release(cls, checkpoint):
    """The authors' {"student": state, "teacher": state} as an AFiRe, its prototypes still empty.

    Their last layers, a module of weight_g (all 1) and weight_v for each position, become one.
    """
    def rename(state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
        layers = []
        while f"head.last_layers.{len(layers)}.weight_v" in state:
            layers.append(state[f"head.last_layers.{len(layers)}.weight_v"])
        return {**{key: value for key, value in state.items() if "last_layers" not in key},
                "head.last_layers": torch.stack(layers)}

    def depth(part):
        return len({key.split(".")[2] for key in student if key.startswith(f"{part}.blocks.")})

    student, teacher = rename(checkpoint["student"]), rename(checkpoint["teacher"])
    dim, _, _, patch_size = student["encoder.patch_embed.proj.weight"].shape
    num_patches, out_dim, bottleneck_dim = student["head.last_layers"].shape
    decoder_dim = len(student["decoder.embedding.weight"])
    model = cls(math.isqrt(num_patches) * patch_size, patch_size, dim, depth("encoder"),
                max(1, dim // 64), out_dim, len(student["head.mlp.0.weight"]), bottleneck_dim,
                decoder_dim, depth("decoder"), max(1, decoder_dim // 32))
    model.decoder.load_state_dict({key.removeprefix("decoder."): student.pop(key)
                                   for key in list(student) if key.startswith("decoder.")})
    model.student.load_state_dict(student)
    model.teacher.load_state_dict(teacher)
    return model

# ---- Bench ---------------------------------------------------------------------------------------

def bench(args, rounds=7):
    """Times the parts of a pre-training with these options, in turn, and prints their medians [D].

    The bare backbone is what no implementation can do without: the networks forward and the
    student's backward, on tensors that are on the device. What AFiRe adds should cost little.
    """
    device, n, size = args.device, args.batch_size, args.img_size
    trainer, generator = Trainer(args), torch.Generator().manual_seed(0)
    model, amp = trainer.model, trainer.amp

    def backbone():
        trainer.optimizer.zero_grad()
        with torch.autocast(device.type, amp, enabled=amp is not None):
            with torch.no_grad():
                model.teacher.head(model.teacher.encoder(x)[:, 1:])
            tokens = model.student.encoder(x)
            outputs = model.student.head(tokens[:, 1:]), model.decoder(tokens, abnormal)
        sum(each.float().mean() for each in outputs).backward()

    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor() as pool:
        for i, image in enumerate([] if args.data else phantoms(32, 512)[0]):
            Image.fromarray(image[0]).save(f"{folder}/{i}.png")
        records = find_images(Path(args.data or folder), args.root, args.labels)
        normals = sum(not record["findings"] for record in records) if args.data else 1000
        paths = [record["path"] for record in records[:64]]
        images, _ = cached_images(paths, size, Path(folder))
        rows = np.resize(np.arange(len(paths)), n)
        normal = to_device(images[rows], device)
        x = model.normalise(normal)
        abnormal = abnormal_tokens(synthetic_lesion_mask(normal, generator)[1], args.patch_size)
        a = torch.randn(4096, 4096, device=device, dtype=amp)
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as flops:
            backbone()
        parts = {"decode": lambda: list(pool.map(read_image, paths, [size] * len(paths))),
                 "cached read": lambda: to_device(images[rows], device),
                 "lesion mask": lambda: synthetic_lesion_mask(normal, generator),
                 "bare backbone": backbone,
                 "full step": lambda: trainer.step(images, rows, 10, 10, 100),
                 "matrix product": lambda: a @ a}
        seconds = {name: [] for name in parts}
        for _ in tqdm(range(rounds + 2), "bench"):
            for name, part in parts.items():
                start = time.perf_counter()
                part()
                torch.zeros(1, device=device).item()                   # waits for the device
                seconds[name].append(time.perf_counter() - start)
    median = {name: float(np.median(each[2:])) for name, each in seconds.items()}
    for name, count in zip(parts, (len(paths), n, n, n, n)):
        each = median[name] / count
        print(f"{name:26} {1e3 * each:10.3f} ms an image {1 / each:10.1f} images/s")
    ratio = np.median(np.divide(seconds["full step"], seconds["bare backbone"])[2:])
    speed = flops.get_total_flops() / median["bare backbone"] / 1e9
    limit = 2 * len(a) ** 3 / median["matrix product"] / 1e9
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        import resource                                                # not there on Windows
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hours = args.epochs * normals * median["full step"] / n / 3600
    print(f"{'full step / bare backbone':26} {ratio:10.3f}\n"
          f"{'bare backbone':26} {speed:10.0f} GFLOP/s\n"
          f"{'large matrix product':26} {limit:10.0f} GFLOP/s, of which the backbone reaches "
          f"{speed / limit:.2f}\n"
          f"{'peak memory':26} {memory / 2 ** 30:10.2f} GiB\n"
          f"{normals} images x {args.epochs} epochs on one such device: {hours:.2f} hours")

# ---- Evaluation ----------------------------------------------------------------------------------

def detection(scores, labels):
    """Area under the ROC curve, average precision and the best Dice -> dictionary of floats.

    scores (n,), labels (n,) bool. Equal scores count together. NaN with one class or a NaN score.
    """
    scores, labels = np.asarray(scores), np.asarray(labels, bool)
    if labels.all() or not labels.any() or np.isnan(scores).any():
        return {"auroc": math.nan, "ap": math.nan, "dice": math.nan}
    _, rank = np.unique(-scores, return_inverse=True)                  # the highest score first
    positive, negative = np.bincount(rank, labels), np.bincount(rank, ~labels)
    hits, called = positive.cumsum(), (positive + negative).cumsum()
    lower = 1 - (negative.cumsum() - negative / 2) / negative.sum()    # negatives below, ties half
    return {"auroc": float((positive * lower).sum() / hits[-1]),
            "ap": float((positive * hits / called).sum() / hits[-1]),
            "dice": float((2 * hits / (called + hits[-1])).max())}

def auroc(scores, labels):
    """The chance that a positive scores above a negative, ties counting half: -> float."""
    return detection(scores, labels)["auroc"]

def linear_probe(train_x, train_y, test_x, penalty=10.0):
    """Ridge regression of each finding on standardised features: -> scores (T, F).

    train_x (n, D), train_y (n, F) bool, test_x (T, D); penalty is scikit-learn's alpha.
    """
    mean, std = train_x.mean(0), train_x.std(0, correction=0) + 1e-6
    x, y = (train_x - mean) / std, torch.from_numpy(train_y).to(train_x.dtype)
    weight = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ (y - y.mean(0)))
    return ((test_x - mean) / std @ weight + y.mean(0)).numpy()

def finetune(model, data, rows, device, steps=300, batch_size=32, lr=1e-3):
    """Trains a copy of the teacher's encoder, and a linear layer on its mean token, on labels [P].

    rows are those of data that it may see. Returns scores (T, F) of the test images. Steps, batch
    and rate are ours [D], and the same for any number of rows and any encoder.
    """
    torch.manual_seed(0)
    encoder = copy.deepcopy(model.teacher.encoder).train()
    for block in encoder.blocks:
        block.requires_grad_()
    layer = nn.Linear(encoder.pos_embed.shape[2], len(data.findings)).to(device)
    trained = [*encoder.blocks.parameters(), *layer.parameters()]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.05)
    random = np.random.default_rng(0)

    def predict(images):
        return layer(encoder(model.normalise(images))[:, 1:].mean(1))          # (B, F)

    for step in range(steps):
        chosen = random.choice(rows, batch_size)
        truth = torch.from_numpy(data.labels[chosen]).to(device, torch.float)
        loss = F.binary_cross_entropy_with_logits(
            predict(to_device(data.images[chosen], device)), truth)
        for group in optimizer.param_groups:
            group["lr"] = cosine(lr, 0.0, step / steps) * min(1, (step + 1) / 30)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return in_batches(predict, data.images, data.test, device).cpu().numpy()

def evaluate_labels(predict, data, fraction, draws=5, resamples=200):
    """AUROC after learning from a fraction of the training labels: macro, its interval, by finding.

    predict takes the rows of data to learn from and scores the test images (T, F). A mean over
    draws of the fraction; a bootstrap over test images and draws. Returns the report and the
    bootstrap's macro AUROCs: two models see the same draws and samples, and can be paired.
    """
    random, truth, scores = np.random.default_rng(0), data.labels[data.test], []
    for _ in range(draws if fraction < 1 else 1):
        rows = random.permutation(data.train)[:max(2, round(fraction * len(data.train)))]
        scores.append(predict(rows))
        scores[-1][:, data.labels[rows].all(0) | ~data.labels[rows].any(0)] = math.nan

    def by_finding(draws, rows):
        areas = [[auroc(scores[draw][rows, i], truth[rows, i]) for i in range(truth.shape[1])]
                 for draw in draws]
        return np.nanmean(areas, 0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                # a mean of nothing is NaN
        each = by_finding(range(len(scores)), slice(None))
        samples = [np.nanmean(by_finding(random.choice(len(scores), len(scores)),
                                         random.choice(len(truth), len(truth))))
                   for _ in range(resamples)]
        return {"macro_auroc": float(np.nanmean(each)),
                "ci95": np.nanquantile(samples, [0.025, 0.975]).tolist(),
                "per_finding": dict(zip(data.findings, each.tolist()))}, samples

def grad_cam(model, weight, images):
    """Token-wise Grad-CAM on the last block [P], of a score that is linear in the mean token.

    weight (D,), images (B, 1, S, S) -> (B, L): the sum of the channels, each with its mean
    gradient as its weight, before the negative part is cut.
    """
    encoder = model.teacher.encoder
    with torch.enable_grad():
        kept, x = [], model.normalise(images).requires_grad_()
        hook = encoder.blocks[-1].register_forward_hook(lambda *call: kept.append(call[2]))
        score = encoder(x)[:, 1:].mean(1) @ weight
        hook.remove()
        gradient = torch.autograd.grad(score.sum(), kept)[0][:, 1:]            # (B, L, D)
    return (gradient.mean(1, keepdim=True) * kept[0][:, 1:]).sum(2).detach()

def probe_maps(model, features, data, images):
    """Where the probe of "any finding" looks, by Grad-CAM: (n, 1, S, S) -> (n, S, S).

    Tokens differ more by position than by finding, so the mean of 300 normal images is taken off
    before the negative part is cut [D].
    """
    normal = ~data.labels.any(1)
    # The probe is affine, so its scores of zero and of the unit vectors tell its weights.
    points = torch.eye(features.shape[1] + 1)[:, 1:]
    scores = linear_probe(features[data.train], ~normal[data.train, None], points)[:, 0]
    weight = torch.from_numpy(scores[1:] - scores[0]).to(images.device)        # (D,)
    usual = in_batches(lambda x: grad_cam(model, weight, x), data.images,
                       data.train[normal[data.train]][:300], images.device).mean(0)
    return enlarge((grad_cam(model, weight, images) - usual).clamp_min(0), images.shape[-1])

def evaluate_localisation(maps, masks, resamples=1000):
    """Do maps {score: (n, S, S)} point at the findings in masks (n, S, S), image by image?

    pointing: is the map's maximum on a finding? auroc and dice: of the pixels of one image. Each
    is a mean over images, with a bootstrap interval over them.
    """
    report = {}
    for name, each in maps.items():
        best = each.reshape(len(each), -1).argmax(1)
        found = [detection(a.ravel(), m.ravel()) for a, m in zip(each, masks)]
        values = {"pointing": np.take_along_axis(masks.reshape(len(masks), -1), best[:, None], 1),
                  "auroc": [image["auroc"] for image in found],
                  "dice": [image["dice"] for image in found]}
        report[name] = {"images": len(masks)}
        for measure, value in values.items():
            value = np.asarray(value, float).ravel()
            draws = np.random.default_rng(0).choice(value, (resamples, len(value))).mean(1)
            report[name][measure] = {"mean": float(value.mean()),
                                     "ci95": np.quantile(draws, [0.025, 0.975]).tolist()}
    return report

def silhouette(points, cluster):
    """Mean silhouette (Rousseeuw, 1987): points (N, D), cluster (N,) integers -> -1 to 1."""
    member = F.one_hot(cluster).to(points.dtype)                       # (N, clusters)
    size = member.sum(0)
    mean = torch.cdist(points, points) @ member / size                 # distance to each cluster
    own = (mean * member).sum(1) * (size / (size - 1).clamp_min(1))[cluster]
    other = mean.masked_fill(member.bool(), math.inf).amin(1)
    score = (other - own) / torch.maximum(own, other).clamp_min(1e-12)
    return float(torch.where(size[cluster] > 1, score, 0).mean())

def restoration_error(model, images):
    """Four masks in turn hide one token of every 2 x 2: (B, 1, S, S) -> mean square (B, L)."""
    x = model.normalise(images)
    tokens, error = model.student.encoder(x), 0                                # (B, 1 + L, D)
    place = torch.arange(tokens.shape[1] - 1, device=x.device)                 # (L,)
    side = math.isqrt(len(place))
    for turn in range(4):
        hidden = 2 * (place // side % 2) + place % side % 2 == turn            # (L,)
        restored = model.decoder(tokens, hidden.expand(len(x), -1))            # (B, 3, S, S)
        error = error + hidden * patchify((restored - x) ** 2, model.patch_size).mean(2)
    return error

@torch.no_grad()
def anomaly_maps(model, normals, images, shrinkage=0.1):
    """How abnormal each place looks, from normal images alone [D]: -> {score: (n, S, S)}.

    normals (N, L, D) are tokens of normal images, images (n, 1, S, S) in [0, 1]. The scores:
    restoration: the error of a token's pixels when it is restored from the other tokens;
    prototype:   how far a token's scores are from its position's prototype, as in L_cate;
    position:    Mahalanobis distance to the normal tokens of the position, as in PaDiM, shrunk;
    neighbours:  mean distance to the 5 nearest of them.
    """
    mean, normals = normals.mean(0), normals.transpose(0, 1)                   # (L, N, D)
    centred = normals - mean.unsqueeze(1)
    covariance = centred.transpose(1, 2) @ centred / normals.shape[1]          # (L, D, D)
    spread = covariance.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1) + 1e-6
    eye = torch.eye(covariance.shape[1], device=covariance.device)
    precision = torch.linalg.inv((1 - shrinkage) * covariance + shrinkage * spread * eye)
    maps = {"restoration": [], "prototype": [], "position": [], "neighbours": []}
    for batch in images.split(64):
        tokens = model.features(batch)                                         # (B, L, D)
        logits, off = model.teacher.head(tokens), tokens - mean
        distance = torch.cdist(tokens.transpose(0, 1), normals)                # (L, B, N)
        nearest = distance.topk(min(5, normals.shape[1]), largest=False).values
        for name, each in zip(maps, (
                restoration_error(model, batch),
                1 - F.cosine_similarity(logits, model.prototypes.prototypes, dim=2),
                torch.einsum("bld,lde,ble->bl", off, precision, off), nearest.mean(2).T)):
            maps[name].append(each)                                            # (B, L)
    return {name: enlarge(torch.cat(each), images.shape[-1]) for name, each in maps.items()}

def enlarge(tokens, size):
    """A number for each token, drawn over the image: (n, L) -> (n, size, size) array."""
    return F.interpolate(unpatchify(tokens.unsqueeze(2), 1), (size, size),
                         mode="bilinear").squeeze(1).cpu().numpy()

def image_scores(maps):
    """An image scores the mean of its map's top quarter: (n, S, S) -> (n,)."""
    ranked = np.sort(maps.reshape(len(maps), -1))
    return ranked[:, 3 * ranked.shape[1] // 4:].mean(1)

def evaluate_anomaly(maps, abnormal, masks, located):
    """Detection of images and of pixels, for each score of the maps (n, S, S).

    abnormal (n,) bool, masks (n, S, S) bool, located (n,) bool: is the mask known? The others
    count as images only.
    """
    report, random = {}, np.random.default_rng(0)
    samples = random.integers(len(maps["position"]), size=(200, len(maps["position"])))
    for name, each in maps.items():
        scores = image_scores(each)
        image = detection(scores, abnormal)
        pixel = detection(each[located].ravel(), masks[located].ravel())
        areas = [auroc(scores[rows], abnormal[rows]) for rows in samples]
        report[name] = {"image_auroc": image["auroc"], "image_ap": image["ap"],
                        "image_ci95": np.nanquantile(areas, [0.025, 0.975]).tolist(),
                        "pixel_auroc": pixel["auroc"], "pixel_ap": pixel["ap"],
                        "dice": pixel["dice"]}
    return report

def in_batches(function, images, rows, device):
    """function of images[rows] on the device, 64 at a time: (n, ...)."""
    parts = np.array_split(rows, 1 + len(rows) // 64)
    return torch.cat([function(to_device(images[part], device)) for part in parts])

def rank_images(model, run, data, device, out):
    """For images without labels: how odd does each look beside normal training images of the run?

    Half of these are compared with, the other half tells which scores are usual. Writes scores.csv
    and the map of the first eight, by the score `neighbours`.
    """
    normals = np.random.default_rng(0).permutation(run.train[~run.labels[run.train].any(1)])
    tokens = in_batches(model.features, run.images, normals[:1000:2], device)

    def score(x):
        return torch.from_numpy(image_scores(anomaly_maps(model, tokens, x)["neighbours"]))

    usual = in_batches(score, run.images, normals[1:1000:2], device)
    rows = np.union1d(data.train, data.test)
    scores = in_batches(score, data.images, rows, device)
    order = scores.argsort(descending=True).numpy()
    with open(out / "scores.csv", "w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["image", "score", "percentile"])
        table.writerows([data.records[rows[i]]["name"], f"{scores[i]:.4f}",
                         f"{100 * (usual < scores[i]).double().mean():.1f}"] for i in order)
    first = to_device(data.images[rows[order[:8]]], device)
    maps = anomaly_maps(model, tokens, first)["neighbours"]
    plot_images(out / "highest.png", {"image": (first[:, 0].cpu().numpy(), "gray"),
                                      "neighbours": (maps, "magma")})
    print(f"no labels in --data: scores of {len(rows)} images, the oddest first, and percentiles "
          f"among {len(usual)} normal training images, in {out}: scores.csv, highest.png")

def evaluate(args):
    """A checkpoint beside the same model untrained: prints a table, writes metrics and figures."""
    given = dict(vars(args))
    ckpt = Path(given.get("ckpt") or max(
        Path("runs").glob("*/checkpoint.pth"), default="runs/*/checkpoint.pth",
        key=lambda file: file.stat().st_mtime))
    ckpt = ckpt / "checkpoint.pth" if ckpt.is_dir() else ckpt
    if not ckpt.is_file():
        raise InputError(f"there is no {ckpt}: make one with `python afire.py pretrain`, or "
                         "name one with --ckpt")
    checkpoint, out = read_checkpoint(ckpt), Path(given.pop("out", ckpt.parent / "eval"))
    if "config" not in checkpoint:
        raise InputError(f"{ckpt} is not a checkpoint of `pretrain`: name its checkpoint.pth")
    moved = {"root": None, "labels": None} if "data" in given else {}
    trained = {**checkpoint["config"], "out": str(ckpt.parent)}
    args = argparse.Namespace(**{"boxes": None, **trained, **moved, **given})
    data, device, random = load_radiographs(args), args.device, np.random.default_rng(0)
    out.mkdir(parents=True, exist_ok=True)
    if "data" in given and not data.findings:
        run = load_radiographs(argparse.Namespace(**trained))
        model = build_model(args).to(device).eval()
        model.load_state_dict(checkpoint["model"])
        return rank_images(model, run, data, device, out)
    if args.boxes and args.data:
        read_boxes(args.boxes, data)
    normal = ~data.labels.any(1)
    fit = random.permutation(data.train[normal[data.train]])[:1000]    # so many are enough
    test = random.permutation(data.test)
    test = test[np.argsort(["mask" not in data.records[row] for row in test], kind="stable")]
    rows = np.sort(np.concatenate([test[normal[test]][:500], test[~normal[test]][:500]]))
    if min(len(fit), normal[rows].sum()) < 2:
        raise InputError(f"--data {args.data} has too few images without findings, to fit on or to "
                         "test on: add some, or change --test-fraction")

    images = to_device(data.images[rows], device)                              # (n, 1, S, S)
    nowhere = np.zeros(images.shape[2:], bool)
    masks = np.stack([data.records[row].get("mask", nowhere) for row in rows])
    healthy = images[normal[rows]]
    lesioned, lesions = synthetic_lesion_mask(healthy, torch.Generator().manual_seed(0))
    lesions = torch.cat([torch.zeros_like(lesions), lesions]).squeeze(1).cpu().numpy() > 0
    sets = {"anomaly": (images, ~normal[rows], masks, normal[rows] | masks.any((1, 2))),
            "synthetic": (torch.cat([healthy, lesioned]), lesions.any((1, 2)), lesions,
                          np.ones(len(lesions), bool))}
    report, samples, maps, tokens = {}, {}, {}, {}
    for name in "random_init", "checkpoint":
        model = build_model(args).to(device).eval()
        if name == "checkpoint":
            model.load_state_dict(checkpoint["model"])
        features = in_batches(lambda x: model.features(x).mean(1), data.images,
                              np.arange(len(normal)), device).cpu()            # (n, D)
        normals = in_batches(model.features, data.images, fit, device)         # (N, L, D)
        if name == "random_init":                 # its prototypes: the mean over normal images
            model.prototypes.update(model.teacher.head(normals))
        tokens[name] = model.features(healthy[:24]).cpu()                      # (24, L, D)

        def probe(rows):
            return linear_probe(features[rows], data.labels[rows], features[data.test])

        def tune(rows):
            return finetune(model, data, rows, device)

        ways = {"linear": (probe, 5), **({"finetune": (tune, 3)} if args.finetune else {})}
        report[name] = {way: {} for way in ways}
        for way, (predict, draws) in ways.items():
            for percent in 1, 10, 100:
                report[name][way][f"{percent}%"], samples[f"{name} {way} {percent}%"] = (
                    evaluate_labels(predict, data, percent / 100, draws))
        for kind, (tested, *truth) in sets.items():
            maps[kind] = anomaly_maps(model, normals, tested)
            report[name][kind] = evaluate_anomaly(maps[kind], *truth)
        report[name]["cohesion"] = silhouette(
            tokens[name].flatten(0, 1), torch.arange(normals.shape[1]).repeat(len(tokens[name])))
        odd = abnormal_tokens(torch.from_numpy(lesions[len(healthy):, None][:24]), args.patch_size)
        off = (model.features(lesioned[:24]) - normals.mean(0)).cpu()          # (24, L, D)
        report[name]["cohesion_by_category"] = silhouette(off.flatten(0, 1), odd.flatten().long())
        located = np.flatnonzero(masks.any((1, 2)))
        if len(located):
            found = {score: each[located] for score, each in maps["anomaly"].items()}
            found["grad-cam"] = probe_maps(model, features, data, images[located])
            report[name]["localisation"] = evaluate_localisation(found, masks[located])
    report = json.loads(json.dumps(report), parse_constant=lambda _: None)     # NaN becomes null
    (out / "metrics.json").write_text(json.dumps(report, indent=2))
    (out / "samples.json").write_text(json.dumps(samples))
    print(f"{'':44} checkpoint  untrained")
    print_report("", report["checkpoint"], report["random_init"])
    for way in ways:
        for percent in 1, 10, 100:
            gain = np.subtract(*[samples[f"{name} {way} {percent}%"] for name in reversed(report)])
            low, high = np.nanquantile(gain, [0.025, 0.975])
            print(f"{f'{way} {percent}% gain, in pairs':44} {np.nanmean(gain):10.3f}"
                  f"              [{low:.3f}, {high:.3f}]")
    kind = "anomaly" if masks.any() else "synthetic"
    shown, _, truth, _ = sets[kind]
    five = np.flatnonzero(truth.any((1, 2)))[:5]
    plot_images(out / "anomaly.png", {
        "truth": (shown[five, 0].cpu().numpy(), "gray"),
        **{title: (each[five], "magma") for title, each in maps[kind].items()}}, truth[five])
    plot_tokens(tokens, out / "tokens.png")
    print(f"in {out}: metrics.json, anomaly.png, tokens.png")

def print_report(prefix, report, untrained):
    """A line for each figure, with its 95 % interval where there is one."""
    for name, value in report.items():
        if isinstance(value, dict):
            print_report(f"{prefix}{name} ", value, untrained[name])
        elif isinstance(value, float):
            interval = "  [{:.3f}, {:.3f}]".format(*report["ci95"]) if "ci95" in report else ""
            print(f"{prefix + name:44} {value:10.3f} {untrained[name]:10.3f}{interval}")

# ---- Figures -------------------------------------------------------------------------------------

def plot_images(file, columns, outline=None):
    """A row for each image: columns {title: ((n, S, S), colour map)}, outline (n, S, S) bool."""
    from matplotlib.figure import Figure                               # only here: slow to import
    n = len(next(iter(columns.values()))[0])
    figure = Figure(figsize=(1.9 * len(columns), 1.9 * n + 0.3), layout="constrained")
    axes = figure.subplots(n, len(columns), squeeze=False)
    for column, (title, (images, cmap)) in enumerate(columns.items()):
        for row, axis in enumerate(axes[:, column]):
            axis.imshow(images[row], cmap, vmin=images.min(), vmax=images.max())
            axis.set(xticks=[], yticks=[], title="" if row else title)
            if outline is not None:
                axis.contour(outline[row], [0.5], colors="cyan", linewidths=0.8)
    figure.savefig(file, dpi=100)

@torch.no_grad()
def plot_restoration(model, normal, file):
    """x, x', what is restored from x', and M, for images (B, 1, H, W)."""
    lesioned, mask = synthetic_lesion_mask(normal, torch.Generator().manual_seed(0))
    restored = model.decoder(model.student.encoder(model.normalise(lesioned)),
                             abnormal_tokens(mask, model.patch_size))
    restored = (restored * model.std + model.mean).mean(1, keepdim=True).clamp(0, 1)
    panels = {"x": normal, "x' = x + lesions": lesioned, "restored": restored, "mask M": mask}
    plot_images(file, {title: (each[:, 0].cpu().numpy(), "magma" if each is mask else "gray")
                       for title, each in panels.items()})

def plot_losses(history, file):
    """The losses over the epochs, from the lines of log.jsonl."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    for axis, name in zip(figure.subplots(1, 3), ("structure", "category", "restoration")):
        axis.plot([record["epoch"] for record in history], [record[name] for record in history])
        axis.set(title=name, xlabel="epoch", ylim=(0, None))
    figure.savefig(file, dpi=100)

def plot_tokens(tokens, file):
    """Tokens {title: (B, L, D)} on two principal components, in the colour of their position."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 3), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(tokens))
    side = math.isqrt(next(iter(tokens.values())).shape[1])
    y, x = np.mgrid[0:1:1j * side, 0:1:1j * side]
    colour = np.stack([x, y, 1 - x], 2)                                        # (side, side, 3)
    first.imshow(colour)
    first.set_title("position")
    for axis, (title, each) in zip(others, tokens.items()):
        points = each.flatten(0, 1) - each.mean((0, 1))                        # (B * L, D)
        plane = points @ torch.linalg.eigh(points.T @ points).eigenvectors[:, -2:]
        axis.scatter(*plane.T, s=2, c=np.tile(colour.reshape(-1, 3), (len(each), 1)))
        axis.set_title(title)
    for axis in first, *others:
        axis.set(xticks=[], yticks=[])
    figure.savefig(file, dpi=100)

# ---- Command line --------------------------------------------------------------------------------

def find_device(name):
    """The device of this name, after a trial: a GPU that is not there is told before any work."""
    try:
        if name == "cuda":                         # torchrun gives each process one of them
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name} is not to be had here") from error

def parse_arguments(argv=None):
    """Every option is declared once; those that a preset sets, with the value in each preset."""
    presets = "phantoms", "small", "paper"
    by_preset = {
        "arch": ("encoder", "vit_micro", "vit_micro", "vit_base"),
        "img-size": ("side of the square that images are squashed to, in pixels", 64, 64, 224),
        "patch-size": ("side of a token's patch, in pixels", 8, 8, 16),
        "keep": ("fraction of the tokens of x' that the student sees", 1.0, 0.25, 1.0),
        "levels": ("grey levels of --data: as they are, or equalised", "file", "equal", "file"),
        "epochs": ("an epoch is each normal image once", 18, 60, 400),
        "warmup-epochs": ("epochs of linear warm-up", 2.0, 3.0, 10.0),
        "batch-size": ("images in a step, over all processes", 16, 32, 64),
        "lr": ("peak learning rate for a batch of 256, scaled with the batch", 16e-3, 8e-3, 5e-4),
        "teacher-momentum": ("of the teacher, at the start; 1 at the end", 0.97, 0.99, 0.996),
        "structure-weight": ("of L_stru in the total loss; 0 ablates it", 0.2, 1.0, 1.0),
        "category-weight": ("of L_cate", 0.2, 1.0, 1.0),
        "restoration-weight": ("of L_rest", 1.0, 1.0, 1.0),
        "weight-decay": ("at the start; ten times as much at the end", 0.04, 0.04, 0.04)}
    gpu = torch.cuda.is_available()
    best = "cuda" if gpu else "mps" if torch.backends.mps.is_available() else "cpu"

    parser = argparse.ArgumentParser(prog="afire.py", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"AFiRe {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True)
    train, test = (argparse.ArgumentParser(add_help=False, argument_default=default)
                   for default in (None, argparse.SUPPRESS))   # eval falls back on the run's
    for add in train.add_argument, test.add_argument:
        add("--data", help="folder of images, or a list: relative/path 0 1 0 ... (none: phantoms)")
        add("--root", help="folder that the paths in a list start from (the list's)")
        add("--labels", help="CSV: image, findings (a|b), and patient if you have it")
        add("--cache", help="folder for decoded images (the run's)")
        add("--device", type=find_device, default=best, help="cpu, cuda, cuda:1, mps (%(default)s)")
    test.add_argument("--ckpt", help="checkpoint.pth or its folder (the last run's)")
    test.add_argument("--out", help="folder for the results (eval, in the run's)")
    test.add_argument("--boxes", help="CSV: image, finding, x, y, w, h in pixels of the image")
    test.add_argument("--finetune", action="store_true", default=False,
                      help="also train the whole encoder on the labels, which takes minutes")
    add = train.add_argument
    add("--test-fraction", type=float, default=0.2, help="of patients to hold out where "
        "--data has no folders train and test (%(default)s)")
    add("--out", default="runs/afire", help="folder of the run; one that is there is gone on with "
        "(%(default)s)")
    add("--init", help="checkpoint that the encoder starts from")
    add("--save-every", type=float, default=30, help="minutes between checkpoints; one is also "
        "made at the end of an epoch (%(default)s)")
    add("--grad-accum", type=int, default=1, help="parts that a batch is worked through in, to "
        "save memory; the losses see one part at a time (%(default)s)")
    add("--augment", choices=["lesion", "crop"], default="lesion", help="what makes x' of x: "
        "synthetic lesions, or for comparison a random affine crop (%(default)s)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--seed", type=int, default=0, help="of all that is random (%(default)s)")
    add("--amp", choices=["none", "bf16", "fp16"], help="autocast (%(default)s)", default="none"
        if not gpu else "bf16" if torch.cuda.is_bf16_supported() else "fp16")
    add("--preset", choices=presets, help="one of the three defaults of each option below: "
        "phantoms without --data, else paper on a CUDA GPU, small elsewhere")
    for name, (text, *values) in by_preset.items():
        add(f"--{name}", type=type(values[0]), help=f"{text} {tuple(values)}",
            choices={"arch": ["vit_micro", "vit_tiny", "vit_small", "vit_base"],
                     "levels": ["file", "equal"]}.get(name))
    verbs.add_parser("pretrain", parents=[train], help="pre-train on normal radiographs")
    verbs.add_parser("eval", parents=[test], help="evaluate a run, on its data or on --data")
    verbs.add_parser("bench", parents=[train], help="time a pretrain with these options")
    args = parser.parse_args(argv)
    if args.verb != "eval":
        args.preset = args.preset or ("phantoms" if not args.data else
                                      "paper" if args.device.type == "cuda" else "small")
        for name, (_, *values) in by_preset.items():
            key, value = name.replace("-", "_"), values[presets.index(args.preset)]
            if getattr(args, key) is None:
                setattr(args, key, value)
            if not isinstance(value, str) and getattr(args, key) < isinstance(value, int):
                parser.error(f"--{name} must be at least {isinstance(value, int):d}")
        if not 0 < args.keep <= 1:
            parser.error(f"--keep {args.keep} is no fraction: choose above 0 and at most 1")
        if args.img_size % args.patch_size:
            parser.error(f"--img-size {args.img_size} is not a multiple of --patch-size "
                        f"{args.patch_size}: change one of them")
    return args

def main(argv=None):
    args = parse_arguments(argv)
    try:
        {"pretrain": pretrain, "bench": bench, "eval": evaluate}[args.verb](args)
    except (InputError, OSError) as error:
        print(f"afire.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

if __name__ == "__main__":
    main()
