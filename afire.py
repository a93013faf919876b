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
import importlib.util
import io
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

import filelock                         # torch needs it, as matplotlib needs Pillow
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
    n_all, mean = n[:, -1:], s[:, -1:] / n[:, -1:]                             # (B, 1) each
    between_classes = (mean * n - s) ** 2 / (n * (n_all - n)).clamp_min(1)     # (B, 256)
    return between_classes.argmax(1)

def largest_region(bright, rounds=8):
    """The largest 8-connected region of each image: (B, H, W) bool -> (B, H, W) bool."""
    # The pixels of a 2 x 2 block all touch: it is one node, and points to a node of its region. A
    # round hands the largest pointer on to the neighbours and to whom they pointed, then follows
    # pointers (radiographs take 4 rounds, the worst maze 7). A dark rim is there as roll wraps.
    B, H, W = bright.shape
    blocks = F.pixel_unshuffle(F.pad(bright, (0, 2 + W % 2, 0, 2 + H % 2)).unsqueeze(1), 2)
    h, w = blocks.shape[2:]                                                    # of (B, 4, h, w)
    nw, ne, sw, se = blocks.flatten(2).unbind(1)                               # (B, h * w) each
    links = [(step, (near & far.roll(-step, 1)).int()) for step, near, far in (
        (1, ne | se, nw | sw), (w, sw | se, nw | ne), (w + 1, se, nw), (w - 1, sw, ne))]
    pointer = torch.arange(h * w, device=bright.device).expand(B, -1)          # (B, h * w)
    for _ in range(rounds):
        best = pointer.int()                                                   # faster than long
        for step, touch in links:
            best = torch.maximum(best, (best * touch).roll(step, 1))
            best = torch.maximum(best, best.roll(-step, 1) * touch)
        pointer = best.scatter_reduce(1, pointer, best, "amax").long()
        pointer = pointer.gather(1, pointer)
        pointer = pointer.gather(1, pointer)
    size = torch.zeros_like(pointer).scatter_add(1, pointer, blocks.sum(1).flatten(1))
    largest = pointer == size.argmax(1, keepdim=True)                          # (B, h * w)
    return F.pixel_shuffle(blocks & largest.view(B, 1, h, w), 2)[:, 0, :H, :W]

def enclosing_circle_centre(region, steps=80):
    """The centre of the smallest circle around each region: (B, H, W) bool -> (B, 2), y and x."""
    # Badoiu and Clarkson (2003): go towards the farthest point, by less each time; 80 steps end
    # within 2.5 px at 224. The farthest point is the first or the last of its row.
    B, H, W = region.shape
    y, x = (torch.arange(side, device=region.device, dtype=torch.float) for side in (H, W))
    ends = torch.where(region, x, W).amin(2), torch.where(region, x, -1).amax(2)   # (B, H) each
    points = torch.complex(torch.cat(ends, 1), y.repeat(B, 2))                 # (B, 2H), x + iy
    inside = region.any(2).repeat(1, 2)                                        # (B, 2H)
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
    images (B, 1, H, W) in [0, 1] -> lesioned and mask, alike; lesioned == images where mask == 0.
    The generator, on any device, draws as for a batch in which `first` images come before these.
    """
    B, _, H, W = images.shape
    device, grey = images.device, images.squeeze(1).float()                    # (B, H, W)
    # Texture: the 60 x 60 pixels around the centre of the largest bright region, inside the image.
    h, w = (max(1, round(60 * side / 224)) for side in (H, W))                 # sizes are at 224 px
    levels = (grey * 255).round().long()                                       # (B, H, W)
    bright = levels > otsu_threshold(levels).view(B, 1, 1)                     # (B, H, W)
    y, x = enclosing_circle_centre(largest_region(bright)).unbind(1)           # (B,) each
    y, x = (y - h / 2).round().clamp(0, H - h), (x - w / 2).round().clamp(0, W - w)
    crops = grey.unfold(1, h, 1).unfold(2, w, 1)                               # (B, y, x, h, w)
    texture = crops[torch.arange(B, device=device), y.long(), x.long()]        # (B, h, w)
    v, u = (torch.linspace(-1, 1, side, device=device) for side in (h, w))
    window = torch.exp(-(u ** 2 + v.unsqueeze(1) ** 2) / 0.5)                  # (h, w)
    window = (window - window.min()) / (window.max() - window.min()).clamp_min(1e-6)

    def resize_and_place(size, start, source, length):
        """One axis of the lesions, drawn in [0, 1), as a bilinear matrix (B, 4, length, source)."""
        smallest, largest = (max(1, round(side * length / 224)) for side in (16, 128))
        size = smallest + (size * (largest - smallest + 1)).floor()            # (B, 4, 1)
        start = (start * (length - size + 1)).floor()                          # (B, 4, 1)
        pixel = torch.arange(length, device=device) - start                    # (B, 4, length)
        position = ((pixel + 0.5) * source / size - 0.5).clamp(0, source - 1)  # in the texture
        offset = position.unsqueeze(3) - torch.arange(source, device=device)
        return (1 - offset.abs()).clamp_min(0) * ((pixel >= 0) & (pixel < size)).unsqueeze(3)

    draws = torch.rand(first + B, 4, 5, generator=generator,
                       device=generator.device if generator else device)
    height, width, top, left, number = draws[first:].to(device).unsqueeze(3).unbind(2)  # (B, 4, 1)
    exists = torch.arange(4, device=device).view(4, 1) <= (4 * number[:, :1]).floor()   # (B, 4, 1)
    rows = resize_and_place(height, top, h, H) * exists.unsqueeze(3)           # (B, 4, H, h)
    columns = resize_and_place(width, left, w, W)                              # (B, 4, W, w)
    with torch.autocast(device.type, enabled=False):
        mask = torch.einsum("bnyi,bij,bnxj->byx", rows, 0.5 * window * texture, columns)
    mask = torch.where(mask < 1 / 255, 0, mask.clamp_max(1)).unsqueeze(1)      # (B, 1, H, W)
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
    """MAE's [R]: (1, 1 + L, dim), half for the column, half for the row; 0 for the class token."""
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
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)     # (B, T, h, D / h)
        x = x + self.attn.proj(attended.flatten(2))                            # (B, T, D)
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))

class ViT(nn.Module):
    """Vision Transformer [P: ViT-B/16]: (B, C, H, W) -> (B, 1 + L, D), the class token first."""

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12,
                 num_heads=12):
        super().__init__()
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(img_size // patch_size, embed_dim), False)
        self.blocks = nn.Sequential(*[Block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)

    def forward(self, x, seen=None):
        """seen (B, L) bool: what is encoded, as many tokens in each image [MAE]; the rest is 0."""
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)                # (B, L, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        if seen is None:
            return self.norm(self.blocks(x))                                   # (B, 1 + L, D)
        seen = F.pad(seen, (1, 0), value=True)                                 # (B, 1 + L)
        few = self.norm(self.blocks(x[seen].unflatten(0, (len(x), -1))))       # (B, 1 + seen, D)
        return few.new_zeros(x.shape).masked_scatter(seen.unsqueeze(2), few)

class Decoder(nn.Module):
    """Restores x from tokens (B, 1 + L, D) but those abnormal (B, L) [P; R]: -> (B, C, H, W)."""

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
        x = torch.cat([x[:, :1], patches], 1) + self.pos_embed                 # (B, 1 + L, d)
        x = self.image_pred(self.norm(self.blocks(x))[:, 1:])                  # (B, L, C * p * p)
        return unpatchify(x, self.patch_size)

# ---- Projection head (Fig. 3) --------------------------------------------------------------------

class AnatomyHead(nn.Module):
    """Scores each token against K pseudo-clusters of its position [R]: (B, L, D) -> (B, L, K)."""

    def __init__(self, in_dim, num_patches, out_dim=256, hidden_dim=1024, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, bottleneck_dim))
        self.last_layers = nn.Parameter(torch.randn(num_patches, out_dim, bottleneck_dim))
        self.mlp.apply(init_weights)

    def forward(self, tokens):
        z = F.normalize(self.mlp(tokens).float(), dim=2)   # (B, L, d), in full: no 0 / 0
        scores = torch.einsum("bld,lkd->blk", z, self.last_layers)             # (B, L, K)
        return scores / self.last_layers.norm(dim=2)  # norm 1: a cosine; long rows learn slowly [D]

# ---- Spatial-aware prototypes (Fig. 3) -----------------------------------------------------------

def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Sinkhorn-Knopp [R]: scores -> assignment (L, K), rows sum to 1, columns nearly to L / K."""
    log_c = scores.float() / epsilon                       # (L, K), a logarithm: no overflow
    for _ in range(iterations):
        log_c = log_c - log_c.logsumexp(0, keepdim=True)
        log_c = log_c - log_c.logsumexp(1, keepdim=True)
    return log_c.exp()

def gather(x):
    """(B, ...) of each process -> (N * B, ...) of all N, with the gradient; x itself if alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    from torch.distributed.nn.functional import all_gather
    return torch.cat(all_gather(x))

class SpatialPrototypes(nn.Module):
    """P, a prototype for each position: the running mean of the teacher's scores there [P; R]."""

    def __init__(self, num_patches, out_dim, momentum=0.75):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("prototypes", torch.zeros(num_patches, out_dim))  # (L, K)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, teacher_logits, momentum=None):
        """P <- m P + (1 - m) mean of teacher_logits (B, L, K) over images; at first the mean."""
        mean = gather(teacher_logits.float().mean(0, keepdim=True)).mean(0)    # (L, K)
        m = self.momentum if momentum is None else momentum
        self.prototypes.lerp_(mean, torch.where(self.updates > 0, 1 - m, 1.0))  # `if` would wait
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

    The paper only names it. Ours is InfoNCE with the prototype as the anchor, normal tokens as
    positives, abnormal ones as negatives; by their mean, chance is log 2 whatever the batch.
    Token-to-token contrast stayed at chance: at one position all logits point the same way.
    logits (B, L, K), prototypes (L, K), abnormal and seen (B, L) bool -> scalar; an unseen token
    counts for nothing, as does a position of one category.
    """
    # eps keeps the gradient at a vector of zeros within the range of half precision.
    s = F.cosine_similarity(logits.float(), prototypes, dim=2, eps=1e-3) / temperature  # (B, L)
    negative = abnormal & seen                                                 # (B, L)
    positive = ~abnormal & seen & negative.any(0)                              # (B, L)
    log_sum = s.masked_fill(~negative & negative.any(0), -math.inf).logsumexp(0)        # (L,)
    log_mean = log_sum - negative.sum(0).clamp_min(1).log()                    # (L,)
    return torch.where(positive, F.softplus(log_mean - s), 0).sum() / positive.sum().clamp_min(1)

def restoration_loss(restored, target):
    """L_rest: mean squared error over all pixels, lesions or not [R]: equal shapes -> scalar."""
    return F.mse_loss(restored.float(), target.float())

# ---- AFiRe (Fig. 2, whole) -----------------------------------------------------------------------

class AFiRe(nn.Module):
    """Student, teacher (its average), decoder, prototypes; weights of the losses [R: 1 each]."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12,
                 out_dim=256, head_dim=1024, bottleneck_dim=256, decoder_dim=512, decoder_depth=8,
                 decoder_heads=16, weights=(1.0, 1.0, 1.0)):
        super().__init__()
        self.patch_size, self.weights = patch_size, weights
        self.num_patches = (img_size // patch_size) ** 2
        vit = img_size, patch_size, 3, embed_dim, depth, num_heads
        head = embed_dim, self.num_patches, out_dim, head_dim, bottleneck_dim
        self.student = nn.ModuleDict({"encoder": ViT(*vit), "head": AnatomyHead(*head)})
        self.decoder = Decoder(img_size, patch_size, 3, embed_dim, decoder_dim, decoder_depth,
                               decoder_heads)
        self.teacher = nn.ModuleDict({"encoder": ViT(*vit), "head": AnatomyHead(*head)})
        self.teacher.requires_grad_(False).eval().load_state_dict(self.student.state_dict())
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

    @torch.no_grad()
    def features(self, images):
        """The teacher's tokens, to be used downstream [R]: (B, 1, H, W) in [0, 1] -> (B, L, D)."""
        return self.teacher.encoder(self.normalise(images))[:, 1:]

    def forward(self, normal, lesioned, mask, prototype_momentum=None, seen=None):
        """x, x', M, each (B, 1, H, W) in [0, 1] -> dictionary of the total and the three losses.

        seen (B, L) bool: what the student sees of x' [D]; the rest is restored and not contrasted.
        """
        if self.training:
            teacher_logits = self.teacher.head(self.features(normal))          # (B, L, K)
            self.prototypes.update(teacher_logits, prototype_momentum)
        tokens = self.student.encoder(self.normalise(lesioned), seen)          # (B, 1 + L, D)
        logits = self.student.head(tokens[:, 1:])                              # (B, L, K)
        abnormal = abnormal_tokens(mask, self.patch_size)                      # (B, L)
        seen = torch.ones_like(abnormal) if seen is None else seen             # (B, L)
        restored = self.decoder(tokens, abnormal | ~seen)                      # (B, 3, H, W)
        logits, abnormal, seen = map(gather, (logits, abnormal, seen))         # of all processes
        assignment, prototypes = self.prototypes.assignment(), self.prototypes.prototypes   # (L, K)
        losses = {"structure": structure_consistency_loss(logits, assignment, abnormal | ~seen),
                  "category": category_consistency_loss(logits, prototypes, abnormal, seen),
                  "restoration": restoration_loss(restored, self.normalise(normal))}
        return {"loss": sum(w * loss for w, loss in zip(self.weights, losses.values())), **losses}

    @torch.no_grad()
    def update_teacher(self, momentum):
        """Teacher <- momentum * teacher + (1 - momentum) * student, encoder and head [R]."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()),
                             1 - momentum)

    @classmethod
    def from_release(cls, checkpoint):
        """The authors' whole model, from their {"student": state, "teacher": state} [R]."""
        return read_release(cls, checkpoint)

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
    text = Path(file).read_text("utf-8-sig", errors="replace")
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    try:
        rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    except csv.Error:                              # a quotation mark that is never closed
        rows = []
    if not rows or any(row.get(column) is None for row in rows for column in columns):
        raise InputError(f"{file} needs the columns {', '.join(columns)} in every line")
    return rows

def read_list(file):
    """The field's lists, `relative/path 0 1 0 ...`: -> {name: set of findings}."""
    text = file.read_text("utf-8-sig", errors="replace")
    lines = re.findall(r"^[ \t]*(\S.*?)((?:[ \t]+[01])*)[ \t]*$", text, re.MULTILINE)
    lines = [(name, flags.split()) for name, flags in lines]
    found = {}
    for name, flags in lines:
        if len(flags) != len(lines[0][1]):
            raise InputError(f"{file}: {name} has {len(flags)} labels, the first line "
                             f"{len(lines[0][1])}: give every line as many zeros and ones")
        found.setdefault(name, set()).update(
            f"finding_{i}" for i, flag in enumerate(flags, 1) if flag == "1")
    return found

def find_images(data, root=None, labels=None, test_fraction=0.2):
    """What --data, --root and --labels name: -> records as in Radiographs.

    Held out is the folder test beside a folder train, else a fixed part of the patients, who are
    told by --labels or by the names of ChestX-ray14, CheXpert, MIMIC-CXR and Kermany et al.
    """
    kinds = ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm"
    split = "train", "val", "test"
    if data.is_file() and data.suffix.lower() not in (*kinds, ".csv"):
        root, found = Path(root or data.parent), read_list(data)
    else:
        root, found = data, {path.relative_to(data).as_posix(): set()
                             for path in sorted(data.rglob("*")) if path.suffix.lower() in kinds}
        # Classes are the folders of normal images and those beside, in whatever part of a split.
        folders = {name: [part for part in name.split("/")[:-1] if part.lower() not in split]
                   for name in found}
        above = {tuple(parts[:i]) for parts in folders.values() for i, part in enumerate(parts)
                 if is_normal(part)}
        for name, parts in folders.items() if above else ():
            below = [part for i, part in enumerate(parts) if tuple(parts[:i]) in above]
            found[name] = {part for part in below[-1:] or ["unsorted"] if not is_normal(part)}
    records = [{"name": name, "path": root / name, "findings": each}
               for name, each in found.items()]
    if labels:
        told = {}
        for row in read_csv(labels, ["image", "findings"]):
            fact = told.setdefault(row["image"], {"patient": row.get("patient"), "findings": set()})
            fact["findings"] |= {finding.strip() for finding in row["findings"].split("|")
                                 if not is_normal(finding)}
        facts = [told.get(record["name"]) or told.get(record["path"].name) for record in records]
        records = [{**record, **fact} for record, fact in zip(records, facts) if fact]
        print(f"{labels} tells of {len(records)} of {len(facts)} images; the others are left out")
    if not records:
        raise InputError(f"--data {data} " + ("is" if data.exists() else "is not there:")
                         + " no folder or list of PNG, JPEG, BMP, TIFF or DICOM files"
                         + (f" that {labels} tells of" if labels else "")
                         + ": name the folder of images or a list, and a CSV with --labels")
    dicom = any(record["path"].suffix.lower() == ".dcm" for record in records)
    if dicom and not importlib.util.find_spec("pydicom"):
        raise InputError(f"--data {data} has DICOM files: `pip install pydicom` to read them")
    sides = [[part for part in record["name"].lower().split("/")[:-1] if part in split][-1:]
             for record in records]
    for record, side in zip(records, sides):
        guess = re.search(r"patient\d+|person\d+(?=_)|\bp\d{8}\b|\d{8}(?=_\d{3})", record["name"])
        record["patient"] = record.get("patient") or (guess[0] if guess else record["name"])
        record["test"] = (side == ["test"] if ["train"] in sides and ["test"] in sides else
                          zlib.crc32(record["patient"].encode()) % 1000 < 1000 * test_fraction)
    return records

def open_image(path):
    """A Pillow image; of DICOM the pixels as they are meant to be seen, in floating point."""
    if path.suffix.lower() != ".dcm":
        return Image.open(path)
    import pydicom
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
    Where several processes want it, one fills it, and the others wait.
    """
    facts = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns)
             if path.is_file() else str(path) for path in paths]
    key = hashlib.sha256(repr((equal, size, facts)).encode()).hexdigest()[:16]
    file, status, partial = (cache / f"{key}.{kind}" for kind in ("npy", "json", "partial"))

    def decode(image, path):
        try:
            image[0] = read_image(path, size, equal)
        except Exception as error:                # each decoder fails in its own ways
            return f"{type(error).__name__}: {error}"

    cache.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if file.exists() else filelock.FileLock(cache / f"{key}.lock"):
        if not file.exists():
            images = np.lib.format.open_memmap(partial, "w+", np.uint8,
                                               (len(paths), 1, size, size))
            with concurrent.futures.ThreadPoolExecutor() as pool:
                done = pool.map(decode, images, paths)
                failed = list(tqdm(done, "decode", len(paths), unit="image"))
            images.flush()
            if all(failed):                       # nothing is kept: a decoder may be missing
                partial.unlink()
                raise InputError(f"--data has no image that can be read: {paths[0]} and all "
                                 f"others fail ({failed[0]})")
            status.write_text(json.dumps(failed))
            partial.replace(file)
    try:
        failed, images = json.loads(status.read_text()), np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:       # a power cut may leave them empty
        raise InputError(f"{file} or {status.name} is damaged: delete both") from error
    left_out = [str(path) for path, reason in zip(paths, failed) if reason]
    if left_out:
        print(f"{len(left_out)} of {len(paths)} files cannot be read and are left out, the first: "
              + ", ".join(left_out[:9]))
    return images, np.array([reason is None for reason in failed])

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
    readable = [records[row] for row in np.union1d(data.train, data.test)]
    by_name = {**{record["path"].name: record for record in readable},
               **{record["name"]: record for record in readable}}
    boxed = [row for row in read_csv(file, ["image", "finding", "x", "y", "w", "h"])
             if row["image"] in by_name]
    for row in boxed:
        record = by_name[row["image"]]
        with open_image(record["path"]) as image:
            scale_x, scale_y = (side / length for length in image.size)
        try:
            x, y, w, h = (float(row[key]) for key in "xywh")
            box = [slice(max(0, math.floor(scale * start)), max(0, math.ceil(scale * end)))
                   for scale, start, end in ((scale_y, y, y + h), (scale_x, x, x + w))]
        except (ValueError, OverflowError) as error:
            raise InputError(f"{file}: {row['image']} needs numbers as x, y, w, h") from error
        record.setdefault("mask", np.zeros((side, side), bool))[tuple(box)] = True
    if not boxed:
        raise InputError(f"{file} has no box in an image of --data: its column image must hold "
                         "names of files in there")
    moved = ({by_name[row["image"]]["patient"] for row in boxed}
             - {records[row]["patient"] for row in data.train if not data.labels[row].any()})
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
    return batch.to(device, non_blocking=device.type == "cuda").float() / 255

def cosine(start, end, progress):
    """From start to end along half a cosine, for progress from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))

def random_affine(images, generator=None, first=0):
    """What the lesions are to replace [P]: a crop of 0.5 to 0.85 of the side, turned by up to 10
    degrees [D], which moves the anatomy. The mask stays empty, so L_cate is 0."""
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
        """One step on images (n, 1, S, S) uint8 [rows]: -> the four losses (4,), lr."""
        args, device, warmup = self.args, self.args.device, self.args.warmup_epochs * per_epoch
        peak = args.lr * args.batch_size / 256
        lr = (peak * (step + 1) / warmup if step < warmup else
              cosine(peak, 1e-6, (step - warmup) / (total - warmup)))
        decay = cosine(args.weight_decay, 10 * args.weight_decay, step / total)
        for group, weight_decay in zip(self.optimizer.param_groups, (decay, 0)):
            group.update(lr=lr, weight_decay=weight_decay)             # none on biases and norms

        augment = synthetic_lesion_mask if args.augment == "lesion" else random_affine
        seed = (args.seed * 2654435769 + step) % 2 ** 32     # generators ignore all further bits
        momentum = 0.0 if step < per_epoch else None       # at first P is the batch's mean [R]
        size, sums = len(rows) // (self.world * args.grad_accum), 0
        self.optimizer.zero_grad()
        for part in range(args.grad_accum):       # of the batch, one after the other on a device
            first = (part * self.world + self.rank) * size
            normal = to_device(images[rows[first:first + size]], device)
            generator, seen = torch.Generator().manual_seed(seed), None
            if args.keep < 1:
                draws = torch.rand(len(rows), self.model.num_patches, generator=generator)
                rank = draws[first:first + size].argsort(1).argsort(1)         # (B, L)
                seen = (rank < args.keep * self.model.num_patches).to(device)
            lesioned, mask = augment(normal, generator, first)
            with torch.autocast(device.type, self.amp, enabled=self.amp is not None):
                losses = self.network(normal, lesioned, mask, momentum, seen)
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
    if args.batch_size % (world * args.grad_accum):
        raise InputError(f"--batch-size {args.batch_size} cannot be shared by {world} processes "
                         f"with --grad-accum {args.grad_accum}: make it a multiple of both")
    if world > 1:
        torch.distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo",
                                             timeout=datetime.timedelta(hours=4))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    try:                                           # the system frees the lock of a dead process
        with (filelock.FileLock(out / ".lock", timeout=0) if rank == 0 else
              contextlib.redirect_stdout(None)):
            train(args, rank, world)
    except filelock.Timeout as error:
        raise InputError(f"another run is at work in --out {out}: wait for its end, or name "
                         "another folder") from error
    if world > 1:
        torch.distributed.destroy_process_group()

def train(args, rank, world):
    """pretrain in one of its processes; the first one speaks and writes."""
    device, out = args.device, Path(args.out)
    ckpt = out / "checkpoint.pth"
    files = [file for file in (ckpt, out / "previous.pth") if file.exists()]
    state = read_checkpoint(files[0]) if files else {
        "config": {}, "step": 0, "history": [], "sums": torch.zeros(4)}
    config = {key: vars(args)[key] for key in vars(args) if key not in ("verb", "device", "out")}

    def refuse_another_run():
        for key, value in config.items():
            before = state["config"].get(key, value)
            if before != value and key not in ("cache", "save_every", "compile"):
                raise InputError(f"{out} holds a run with {key} {before}, not {value}: repeat that "
                                 "to go on with it, else name another --out")

    refuse_another_run()
    data = load_radiographs(args)
    normals = data.train[~data.labels[data.train].any(1)]
    print(f"preset {args.preset} on {world} x {device}, in {out}: pre-training on {len(normals)} "
          f"images; left out: {len(data.train) - len(normals)} with findings, {len(data.test)} "
          "held out for testing"
          + ("" if data.findings else "; nothing is known of findings, all count as normal"))
    if len(normals) < args.batch_size:
        raise InputError(f"--data {args.data} has {len(normals)} images without findings to train "
                         f"on: fewer than --batch-size {args.batch_size}, lower it or add images")
    names = "\n".join(data.records[row]["name"] for row in normals)
    config["images"] = f"{len(normals)} of key {zlib.crc32(names.encode()):08x}"
    refuse_another_run()

    trainer, per_epoch = Trainer(args, rank, world), len(normals) // args.batch_size
    start, total = state["step"], args.epochs * per_epoch
    history, sums = state["history"], state["sums"].to(device)         # of the losses, this epoch
    if files:
        for name, part in trainer.parts.items():
            part.load_state_dict(state[name])
        print(f"{out} is at step {start} of {total}: going on from there")
    elif args.init:
        try:
            weights = load_encoder(args.init, args.img_size).state_dict()
            for network in trainer.model.student, trainer.model.teacher:
                network.encoder.load_state_dict(weights)
        except RuntimeError as error:
            raise InputError(f"--init {args.init} does not fit --arch {args.arch} and --patch-size "
                             f"{args.patch_size}: change these") from error
    if rank == 0:
        (out / "config.json").write_text(json.dumps(config, indent=2))
    signals, saved_at = [], time.monotonic()
    bar = tqdm(range(start, total), "pretrain", total, initial=start, unit="step", mininterval=1,
               disable=rank > 0)
    with contextlib.ExitStack() as afterwards:
        for each in signal.SIGINT, signal.SIGTERM:                     # heeded after the step
            before = signal.signal(each, lambda number, _: signals.append(number))
            afterwards.callback(signal.signal, each, before)
        for step in bar:
            epoch, i = divmod(step, per_epoch)
            if i == 0 or step == start:
                order = np.random.default_rng((args.seed, epoch)).permutation(normals)
            rows = np.sort(order[i * args.batch_size:(i + 1) * args.batch_size])
            losses, lr = trainer.step(data.images, rows, step, per_epoch, total)
            sums = losses if i == 0 else sums + losses
            last = i == per_epoch - 1
            if not (last or step % 10 == 0 or signals and world == 1):
                continue                                               # .tolist waits for the GPU
            told = gather(F.pad(sums, (0, 1), value=len(signals)).unsqueeze(0)).mean(0)
            sums, stop = told[:4], bool(told[4])                       # all stop at the same step
            means = dict(zip(("loss", "structure", "category", "restoration"),
                             (sums / (i + 1)).tolist()))
            bar.set_postfix(means)
            if not all(each.isfinite().all() for each in (sums, *trainer.parameters)):
                sys.exit(f"afire.py: the loss or a weight is not finite at step {step}; {ckpt} is "
                         "from before. Try a lower --lr or --amp none in another --out, with "
                         "--init to start from that checkpoint")
            if last:
                history.append({"epoch": epoch + 1, **means, "lr": lr})
            if rank == 0 and (last or stop or time.monotonic() - saved_at > 60 * args.save_every):
                parts = {name: part.state_dict() for name, part in trainer.parts.items()}
                save_checkpoint({**parts, "step": step + 1, "sums": sums.cpu(), "history": history,
                                 "config": config}, ckpt)
                (out / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in history))
                saved_at = time.monotonic()
            if stop:
                bar.close()
                if world > 1:                      # else the others' end would kill the writer
                    torch.distributed.barrier()
                print(f"stopped after step {step + 1} of {total}; the same command goes on from "
                      "there")
                sys.exit(128 + max(signals, default=signal.SIGTERM))
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

def count_blocks(state, prefix="blocks."):
    """How many transformer blocks a state dict has under this prefix."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})

def guess_heads(dim):
    """How many heads an encoder has, which no file tells: 64 channels each; ViT-H, g, G have 16."""
    return min(16, max(1, dim // 64))

def load_encoder(path, img_size=None):
    """The encoder in a checkpoint: of our or the release's teacher, or a timm, MAE or DINO ViT.

    Its positions are interpolated to the grid of img_size, in pixels. It prints what it leaves.
    """
    state = read_checkpoint(path)
    for key in "model", "teacher", "state_dict":
        state = state[key] if isinstance(state.get(key), dict) else state
    state = {re.sub(r"^(module\.)?(teacher\.)?(encoder\.|backbone\.)?", "", key): value
             for key, value in state.items()}
    try:
        dim, in_chans, _, patch_size = state["patch_embed.proj.weight"].shape
        positions = state["pos_embed"]                                         # (1, 1 + L, D)
        size = img_size or math.isqrt(positions.shape[1] - 1) * patch_size
        grid = unpatchify(positions[:, 1:], 1)                                 # (1, D, side, side)
        grid = F.interpolate(grid, (size // patch_size,) * 2, mode="bicubic", antialias=True)
        state["pos_embed"] = torch.cat([positions[:, :1], patchify(grid, 1)], 1)
        vit = ViT(size, patch_size, in_chans, dim, count_blocks(state), guess_heads(dim))
        vit.load_state_dict({key: state[key] for key in vit.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path} holds no ViT that fits together: {error}") from error
    left = [key for key in state if key not in vit.state_dict()]
    print(f"{path}: {len(vit.state_dict())} tensors of the encoder taken, {len(left)} left"
          + (f": {', '.join(left[:4])}, ..." if left else ""))
    return vit

def read_release(cls, checkpoint):
    """The authors' {"student": state, "teacher": state} as an AFiRe, its prototypes still empty.

    Their last layers, a module of weight_g (all 1) and weight_v for each position, become one.
    """
    state = {f"{role}.{key.removeprefix('module.')}".replace("student.decoder", "decoder"): value
             for role in ("student", "teacher") for key, value in checkpoint[role].items()}
    num_patches = state["student.encoder.pos_embed"].shape[1] - 1
    for role in "student", "teacher":
        layers = [state[f"{role}.head.last_layers.{i}.weight_v"] for i in range(num_patches)]
        state[f"{role}.head.last_layers"] = torch.stack(layers)                # (L, K, d)
    dim, _, _, patch_size = state["student.encoder.patch_embed.proj.weight"].shape
    _, out_dim, bottleneck_dim = state["student.head.last_layers"].shape
    decoder_dim = len(state["decoder.embedding.weight"])
    model = cls(math.isqrt(num_patches) * patch_size, patch_size, dim,
                count_blocks(state, "student.encoder.blocks."), guess_heads(dim), out_dim,
                len(state["student.head.mlp.0.weight"]), bottleneck_dim, decoder_dim,
                count_blocks(state, "decoder.blocks."), max(1, decoder_dim // 32))
    model.load_state_dict({key: state[key] for key in model.state_dict()
                           if not key.startswith("prototypes.")}, strict=False)
    return model

# ---- Bench ---------------------------------------------------------------------------------------

def bench(args, rounds=7):
    """Times the parts of a pre-training with these options, in turn, and prints their medians [D].

    The bare backbone is what no implementation can do without: the networks forward and the
    student's backward, on tensors that are on the device. What AFiRe adds should cost little.
    """
    device, n, size = args.device, args.batch_size, args.img_size
    trainer, generator = Trainer(args), torch.Generator().manual_seed(0)
    model, rows = trainer.model, np.arange(n)

    def backbone():
        trainer.optimizer.zero_grad()
        with torch.autocast(device.type, trainer.amp, enabled=trainer.amp is not None):
            with torch.no_grad():
                model.teacher.head(model.teacher.encoder(x)[:, 1:])
            tokens = model.student.encoder(x, seen)
            outputs = model.student.head(tokens[:, 1:]), model.decoder(tokens, abnormal)
        sum(each.float().mean() for each in outputs).backward()

    def seconds(part):
        start = time.perf_counter()
        part()
        torch.zeros(1, device=device).item()                           # waits for the device
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor() as pool:
        if not args.data:
            Image.fromarray(phantoms(1, 512)[0][0, 0]).save(f"{folder}/phantom.png")
        records = find_images(Path(args.data or folder), args.root, args.labels,
                              args.test_fraction)
        paths = [records[i % len(records)]["path"] for i in range(n)]
        images, _ = cached_images(paths, size, Path(folder))
        normal = to_device(images[rows], device)
        x, mask = model.normalise(normal), synthetic_lesion_mask(normal, generator)[1]
        abnormal = abnormal_tokens(mask, args.patch_size)
        ranks = torch.rand(abnormal.shape, device=device).argsort(1).argsort(1)
        seen = ranks < args.keep * model.num_patches if args.keep < 1 else None
        a = torch.randn(4096, 4096, device=device, dtype=trainer.amp)
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as flops:
            backbone()
        parts = {"decode": lambda: list(pool.map(read_image, paths, [size] * n)),
                 "cached read": lambda: to_device(images[rows], device),
                 "lesion mask": lambda: synthetic_lesion_mask(normal, generator),
                 "bare backbone": backbone,
                 "full step": lambda: trainer.step(images, rows, 10, 10, 100),
                 "matrix product": lambda: a @ a}
        turns = [[seconds(part) for part in parts.values()]
                 for _ in tqdm(range(rounds + 2), "bench")]
    median = dict(zip(parts, np.median(turns[2:], 0)))
    limit = 2 * len(a) ** 3 / median.pop("matrix product") / 1e9
    speed = flops.get_total_flops() / median["bare backbone"] / 1e9
    for name, each in median.items():
        print(f"{name:14} {1e3 * each / n:10.3f} ms an image {n / each:10.1f} images/s")
    print(f"full step / bare backbone: {median['full step'] / median['bare backbone']:.3f}")
    print(f"bare backbone: {speed:.0f} GFLOP/s, {speed / limit:.2f} of a large matrix product's")
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        import resource                                                # not there on Windows
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory: {memory / 2 ** 30:.2f} GiB")
    normals = sum(not (record["findings"] or record["test"]) for record in records)
    normals = normals if args.data else 1000
    hours = args.epochs * normals * median["full step"] / n / 3600
    print(f"{normals} images x {args.epochs} epochs on one such device: {hours:.2f} hours")

# ---- Evaluation ----------------------------------------------------------------------------------

def detection(scores, labels):
    """Area under the ROC curve, average precision, Dice at its best threshold: -> floats by name.

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

def interval(samples):
    """The middle 95 % of bootstrap samples, those that are NaN left out: -> [low, high]."""
    return np.quantile([each for each in samples if not np.isnan(each)] or [math.nan],
                       [0.025, 0.975]).tolist()

def linear_probe(train_x, train_y, test_x, penalty=10.0):
    """Ridge regression of each finding on standardised features: -> scores (T, F).

    train_x (n, D), train_y (n, F) bool, test_x (T, D); penalty is scikit-learn's alpha.
    """
    mean, std = train_x.mean(0), train_x.std(0, correction=0) + 1e-6
    x, y = (train_x - mean) / std, torch.from_numpy(train_y).to(train_x.dtype)
    weight = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ (y - y.mean(0)))
    return ((test_x - mean) / std @ weight + y.mean(0)).numpy()

def finetune(model, data, rows, device, steps, batch_size=32, lr=1e-3):
    """Trains a copy of the teacher's blocks, and a linear layer on its mean token, on labels [P].

    It sees these rows of data. Returns scores (T, F) of the test images. The recipe is ours [D].
    """
    torch.manual_seed(0)
    random, encoder = np.random.default_rng(0), copy.deepcopy(model.teacher.encoder)
    layer = nn.Linear(encoder.pos_embed.shape[2], len(data.findings)).to(device)
    trained = [*encoder.blocks.requires_grad_().parameters(), *layer.parameters()]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.05)

    def predict(images):
        return layer(encoder(model.normalise(images))[:, 1:].mean(1))          # (B, F)

    for step in range(steps):
        chosen = random.choice(rows, batch_size)
        truth = torch.from_numpy(data.labels[chosen]).to(device, torch.float)
        scores = predict(to_device(data.images[chosen], device))
        loss = F.binary_cross_entropy_with_logits(scores, truth)
        optimizer.param_groups[0]["lr"] = cosine(lr, 0.0, step / steps) * min(1, (step + 1) / 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return in_batches(predict, data.images, data.test, device).cpu().numpy()

def evaluate_labels(predict, data, fraction, draws=5, resamples=200):
    """AUROC after learning from a fraction of the training labels: a mean over draws of it.

    predict takes rows of data to learn from and scores the test images (T, F). Returns a report,
    and macro AUROCs of bootstrap samples of draws and test images, the same ones for two models.
    """
    random, truth, scores = np.random.default_rng(0), data.labels[data.test], []
    for _ in range(draws if fraction < 1 else 1):
        rows = random.permutation(data.train)[:max(2, round(fraction * len(data.train)))]
        scores.append(predict(rows))
        scores[-1][:, data.labels[rows].all(0) | ~data.labels[rows].any(0)] = math.nan

    def by_finding(draws, rows):
        return np.nanmean([list(map(auroc, scores[draw][rows].T, truth[rows].T))
                           for draw in draws], 0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                # a mean of nothing is NaN
        each = by_finding(range(len(scores)), slice(None))
        samples = [np.nanmean(by_finding(random.choice(len(scores), len(scores)),
                                         random.choice(len(truth), len(truth))))
                   for _ in range(resamples)]
        return {"macro_auroc": float(np.nanmean(each)),
                "ci95": interval(samples),
                "per_finding": dict(zip(data.findings, each.tolist()))}, samples

def grad_cam(model, weight, images):
    """Token-wise Grad-CAM on the last block [P], before its negative part is cut.

    The score is the mean token times weight (D,): images (B, 1, S, S) -> (B, L).
    """
    encoder, kept = model.teacher.encoder, []
    with torch.enable_grad(), encoder.blocks.register_forward_hook(
            lambda blocks, inputs, output: kept.append(output.requires_grad_())):
        score = encoder(model.normalise(images))[:, 1:].mean(1) @ weight       # (B,)
    gradient = torch.autograd.grad(score.sum(), kept)[0][:, 1:]                # (B, L, D)
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
    cams = torch.cat([grad_cam(model, weight, part) for part in images.split(64)])
    return enlarge((cams - usual).clamp_min(0), images.shape[-1])

def evaluate_localisation(maps, masks, resamples=1000):
    """How well maps (n, S, S) of a score point at the findings in masks (n, S, S) bool.

    pointing: is the maximum on a finding? auroc, and dice at each image's own best threshold. Each
    figure is a mean over images, with an interval; an image that is all finding has no auroc.
    """
    report = {"images": len(masks)}
    found = [{**detection(scores.ravel(), mask.ravel()), "pointing": mask.flat[scores.argmax()]}
             for scores, mask in zip(maps, masks)]
    for measure in "pointing", "auroc", "dice":
        values = np.array([image[measure] for image in found], float)
        values = values[np.isfinite(values)]
        draws = np.random.default_rng(0).choice(values, (resamples, len(values))).mean(1)
        report[measure] = {"mean": float(values.mean()), "ci95": interval(draws)}
    return report

def silhouette(points, cluster):
    """Mean silhouette (Rousseeuw, 1987): points (..., D), cluster (...) integers -> -1 to 1."""
    points, cluster = points.flatten(0, -2), cluster.flatten().long()  # (N, D), (N,)
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
    odd = torch.arange(math.isqrt(tokens.shape[1] - 1), device=x.device) % 2   # (side,)
    for turn in range(4):
        hidden = (2 * odd.unsqueeze(1) + odd == turn).flatten()                # (L,)
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

    def scores(images):
        tokens = model.features(images)                                        # (B, L, D)
        logits, off = model.teacher.head(tokens), tokens - mean
        distance = torch.cdist(tokens.transpose(0, 1), normals)                # (L, B, N)
        nearest = distance.topk(min(5, normals.shape[1]), largest=False).values
        return torch.stack([
            restoration_error(model, images),
            1 - F.cosine_similarity(logits, model.prototypes.prototypes, dim=2),
            torch.einsum("bld,lde,ble->bl", off, precision, off), nearest.mean(2).T])

    found = torch.cat([scores(batch) for batch in images.split(64)], 1)        # (4, n, L)
    return {name: enlarge(each, images.shape[-1]) for name, each in zip(
        ("restoration", "prototype", "position", "neighbours"), found)}

def enlarge(tokens, size):
    """A number for each token, drawn over the image: (n, L) -> (n, size, size) array."""
    return F.interpolate(unpatchify(tokens.unsqueeze(2), 1), (size, size),
                         mode="bilinear").squeeze(1).cpu().numpy()

def image_scores(maps):
    """An image scores the mean of its map's top quarter: (n, S, S) -> (n,)."""
    ranked = np.sort(maps.reshape(len(maps), -1))
    return ranked[:, 3 * ranked.shape[1] // 4:].mean(1)

def evaluate_anomaly(maps, abnormal, masks):
    """How well maps (n, S, S) of a score detect abnormal images (n,) and pixels, masks (n, S, S).

    An abnormal image whose mask is empty counts as an image only.
    """
    scores, located = image_scores(maps), ~abnormal | masks.any((1, 2))
    samples = np.random.default_rng(0).integers(len(masks), size=(200, len(masks)))
    areas = [auroc(scores[rows], abnormal[rows]) for rows in samples]
    image = detection(scores, abnormal)
    pixel = detection(maps[located].ravel(), masks[located].ravel())
    return {"image_auroc": image["auroc"], "image_ap": image["ap"],
            "image_ci95": interval(areas),
            "pixel_auroc": pixel["auroc"], "pixel_ap": pixel["ap"], "dice": pixel["dice"]}

def in_batches(function, images, rows, device):
    """function of images[rows] on the device, 64 at a time: (n, ...)."""
    parts = np.array_split(rows, 1 + len(rows) // 64)
    return torch.cat([function(to_device(images[part], device)) for part in parts])

def rank_images(model, known, data, device, out):
    """How odd images without labels look by `neighbours`: writes scores.csv, maps of the oddest.

    They are compared with normal images that the run was trained on, and ranked among normal ones
    that it held out.
    """
    fit, usual = (np.random.default_rng(0).permutation(rows[~known.labels[rows].any(1)])[:500]
                  for rows in (known.train, known.test))
    tokens = in_batches(model.features, known.images, fit, device)             # (N, L, D)

    def score(images):
        return torch.from_numpy(image_scores(anomaly_maps(model, tokens, images)["neighbours"]))

    usual = in_batches(score, known.images, usual if len(usual) else fit, device)
    rows = np.union1d(data.train, data.test)
    scores = in_batches(score, data.images, rows, device)
    order = scores.argsort(descending=True).numpy()
    table = [(data.records[rows[i]]["name"], f"{scores[i]:.4f}",
              f"{100 * (usual < scores[i]).double().mean():.1f}") for i in order]
    with open(out / "scores.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([("image", "score", "percentile"), *table])
    first = to_device(data.images[rows[order[:8]]], device)
    maps = anomaly_maps(model, tokens, first)
    plot_images(out / "highest.png", {"image": first}, {"neighbours": maps["neighbours"]})
    print(f"no labels in --data: scores of {len(rows)} images, the oddest first, and percentiles "
          f"among {len(usual)} normal images of the run, in {out}: scores.csv, highest.png")

def open_run(args):
    """The run of --ckpt: -> options of eval, completed by the run's; the run's; its weights."""
    ckpt = Path(args.ckpt or max(Path("runs").glob("*/checkpoint.pth"), key=os.path.getmtime,
                                 default="runs/*/checkpoint.pth"))
    ckpt = ckpt / "checkpoint.pth" if ckpt.is_dir() else ckpt
    checkpoint = read_checkpoint(ckpt) if ckpt.is_file() else {}
    if "config" not in checkpoint:
        raise InputError(f"{ckpt} is no checkpoint of a run: make one with `python afire.py "
                         "pretrain`, or name one with --ckpt")
    run = {**checkpoint["config"], "out": str(ckpt.parent)}
    moved = {"root": None, "labels": None} if args.data else {}
    given = {key: value for key, value in vars(args).items() if value is not None}
    options = argparse.Namespace(**{**run, **moved, **given})
    return options, argparse.Namespace(**run), checkpoint["model"]

def leave_out_trained(data, known):
    """Takes out of data's test split what a run on `known` was pre-trained on, by the file."""
    trained = {known.records[row]["path"].resolve() for row in known.train
               if not known.labels[row].any()}
    new = np.array([data.records[row]["path"].resolve() not in trained for row in data.test], bool)
    data.test = data.test[new]
    if not new.all():
        print(f"{(~new).sum()} images to test on were pre-trained on, and are left out")

def choose_images(data, device):
    """-> rows of normal images to fit on, the sets to test on, and pairs: 24 x, their x' and M.

    A set is images (n, 1, S, S), which are abnormal (n,) and where (n, S, S): real ones, of which
    those with a mask come first, or the normal ones of these without and with synthetic lesions.
    """
    random, normal = np.random.default_rng(0), ~data.labels.any(1)
    fit = random.permutation(data.train[normal[data.train]])[:1000]    # so many are enough
    test = sorted(random.permutation(data.test), key=lambda row: "mask" not in data.records[row])
    rows = sorted([row for row in test if normal[row]][:500]
                  + [row for row in test if not normal[row]][:500])
    if min(len(fit), normal[rows].sum()) < 2:
        raise InputError("--data has too few images without findings, to fit on or to test on: add "
                         "some")
    nowhere = np.zeros(data.images.shape[2:], bool)
    masks = np.stack([data.records[row].get("mask", nowhere) for row in rows])
    images = to_device(data.images[rows], device)
    healthy = images[normal[rows]]
    lesioned, mask = synthetic_lesion_mask(healthy, torch.Generator().manual_seed(0))
    lesions = torch.cat([torch.zeros_like(mask), mask]).squeeze(1).cpu().numpy() > 0
    sets = {"anomaly": (images, ~normal[rows], masks),
            "synthetic": (torch.cat([healthy, lesioned]), lesions.any((1, 2)), lesions)}
    return fit, sets, (healthy[:24], lesioned[:24], mask[:24])

def evaluate_model(model, data, fit, sets, pairs, options):
    """All figures of one model: -> report, bootstrap samples, maps of each set, for plot_tokens."""
    device, everything = options.device, np.arange(len(data.images))
    features = in_batches(lambda x: model.features(x).mean(1), data.images, everything, device)
    features = features.cpu()                                                  # (n, D)
    normals = in_batches(model.features, data.images, fit, device)             # (N, L, D)
    if not model.prototypes.updates:              # untrained: the mean over normal images
        model.prototypes.update(model.teacher.head(normals))
    ways = {"linear": (5, lambda rows: linear_probe(
        features[rows], data.labels[rows], features[data.test]))}
    if options.finetune:
        ways["finetune"] = 3, lambda rows: finetune(model, data, rows, device, options.finetune)
    report, samples, maps = {way: {} for way in ways}, {}, {}
    for way, (draws, predict) in ways.items():
        for percent in 1, 10, 100:
            report[way][f"{percent}%"], samples[f"{way} {percent}%"] = evaluate_labels(
                predict, data, percent / 100, draws)
    for kind, (images, *truth) in sets.items():
        maps[kind] = anomaly_maps(model, normals, images)
        report[kind] = {score: evaluate_anomaly(each, *truth)
                        for score, each in maps[kind].items()}

    healthy, lesioned, mask = pairs
    tokens, abnormal = model.features(healthy).cpu(), abnormal_tokens(mask, model.patch_size).cpu()
    off = (model.features(lesioned) - normals.mean(0)).cpu()                   # (24, L, D)
    report["cohesion"] = silhouette(tokens, torch.arange(len(off[0])).expand(len(tokens), -1))
    report["cohesion_by_category"] = silhouette(off, abnormal)
    images, _, masks = sets["anomaly"]
    located = masks.any((1, 2))
    if located.any():
        found = {score: each[located] for score, each in maps["anomaly"].items()}
        found["grad-cam"] = probe_maps(model, features, data, images[located])
        report["localisation"] = {score: evaluate_localisation(each, masks[located])
                                  for score, each in found.items()}
    return report, samples, maps, (tokens, off, abnormal)

def print_report(prefix, report, untrained):
    """A line for each figure, with its 95 % interval where there is one."""
    for name, value in report.items():
        if isinstance(value, dict):
            print_report(f"{prefix}{name} ", value, untrained[name])
        elif isinstance(value, float):
            other = math.nan if untrained[name] is None else untrained[name]
            interval = "  [{:.3f}, {:.3f}]".format(*report["ci95"]) if "ci95" in report else ""
            print(f"{prefix + name:44} {value:10.3f} {other:10.3f}{interval}")

def write_report(report, samples, out):
    """metrics.json, samples.json and a table; gains are in pairs of samples of the same images."""
    flat = {f"{name} {key}": each for name in samples for key, each in samples[name].items()}
    report, flat = (json.loads(json.dumps(each), parse_constant=lambda _: None)    # NaN to null
                    for each in (report, flat))
    (out / "metrics.json").write_text(json.dumps(report, indent=2))
    (out / "samples.json").write_text(json.dumps(flat))
    print(f"{'':44} checkpoint  untrained  [95 % interval of the checkpoint's]")
    print_report("", report["checkpoint"], report["random_init"])
    for key, each in samples["checkpoint"].items():
        gain = np.subtract(each, samples["random_init"][key])
        low, high = interval(gain)
        if math.isnan(low):                                            # no finding to learn
            continue
        print(f"{f'{key} gain, in pairs':44} {np.nanmean(gain):10.3f}"
              f"{'':14}[{low:.3f}, {high:.3f}]")

def evaluate(args):
    """A checkpoint beside the same model untrained: prints a table, writes metrics and figures."""
    options, run, weights = open_run(args)
    data, device = load_radiographs(options), args.device
    if args.boxes and not (options.data and data.findings):
        raise InputError("--boxes needs images with findings: name them with --data, and their "
                         "findings with --labels, a list or folders of classes")
    out = Path(args.results or f"{run.out}/eval")
    out.mkdir(parents=True, exist_ok=True)
    models = {name: build_model(options).to(device).eval()
              for name in ("random_init", "checkpoint")}
    models["checkpoint"].load_state_dict(weights)
    if args.data and not data.findings:
        return rank_images(models["checkpoint"], load_radiographs(run), data, device, out)
    if args.boxes:
        read_boxes(args.boxes, data)
    if args.data and run.data and Path(run.data).exists():
        leave_out_trained(data, load_radiographs(run))
    print(f"{run.out} on {options.data or 'phantoms'}: learning from {len(data.train)} images, "
          f"testing on {len(data.test)}, {data.labels[data.test].any(1).sum()} with findings")
    fit, sets, pairs = choose_images(data, device)
    report, samples, tokens = {}, {}, {}
    for name, model in models.items():
        report[name], samples[name], maps, tokens[name] = evaluate_model(
            model, data, fit, sets, pairs, options)
    write_report(report, samples, out)
    kind = "anomaly" if sets["anomaly"][2].any() else "synthetic"
    images, _, masks = sets[kind]
    five = np.flatnonzero(masks.any((1, 2)))[:5]
    plot_images(out / "anomaly.png", {"truth": images[five]},
                {score: each[five] for score, each in maps[kind].items()}, masks[five])
    plot_tokens(tokens, out / "tokens.png")
    print(f"in {out}: metrics.json, samples.json, anomaly.png, tokens.png")

# ---- Figures -------------------------------------------------------------------------------------

def new_figure(width, height):
    """An empty figure, in inches; matplotlib is imported only here, as that takes a while."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")

def plot_images(file, images, maps, outline=None):
    """A column for each of images and maps {title: (n, S, S) or (n, 1, S, S)}, outline on all."""
    columns = {**images, **maps}
    n = len(next(iter(columns.values())))
    figure = new_figure(1.9 * len(columns), 1.9 * n + 0.3)
    axes = figure.subplots(n, len(columns), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for column, (title, each) in zip(axes.T, columns.items()):
        column[0].set_title(title)
        each = torch.as_tensor(each).cpu().numpy().reshape(n, *each.shape[-2:])
        for row, axis in enumerate(column):
            axis.imshow(each[row], "magma" if title in maps else "gray",
                        vmin=each.min(), vmax=each.max())
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
    plot_images(file, {"x": normal, "x' = x + lesions": lesioned, "restored": restored},
                {"mask M": mask})

def plot_losses(history, file):
    """The losses over the epochs, from the lines of log.jsonl."""
    figure = new_figure(9, 2.5)
    for axis, name in zip(figure.subplots(1, 3), ("structure", "category", "restoration")):
        axis.plot([record["epoch"] for record in history], [record[name] for record in history])
        axis.set(title=name, xlabel="epoch", ylim=(0, None))
    figure.savefig(file, dpi=100)

def plot_tokens(tokens, file):
    """Tokens of each model on two principal components, by position and by class [P: Fig. 5].

    tokens {title: (those of normal images (B, L, D), those of lesioned images less the mean of
    their position (B, L, D), abnormal (B, L) bool)}.
    """
    figure, side = new_figure(9, 6), math.isqrt(next(iter(tokens.values()))[0].shape[1])
    axes = figure.subplots(2, 1 + len(tokens), subplot_kw={"xticks": [], "yticks": []})
    y, x = np.mgrid[0:1:1j * side, 0:1:1j * side]
    colour = np.stack([x, y, 1 - x], 2)                                        # (side, side, 3)
    axes[0, 0].imshow(colour)
    axes[0, 0].set_title("position")
    for name, each in ("normal", "silver"), ("abnormal", "crimson"):
        axes[1, 0].scatter([], [], c=each, label=name)
    axes[1, 0].legend(title="class", loc="center", frameon=False)
    for column, title in zip(axes[:, 1:].T, tokens):
        healthy, lesioned, abnormal = tokens[title]
        column[0].set_title(title)
        for axis, each, colours in zip(column, (healthy, lesioned), (
                np.tile(colour.reshape(-1, 3), (len(healthy), 1)),
                np.where(abnormal.flatten(), "crimson", "silver"))):
            points = each.flatten(0, 1) - each.mean((0, 1))                    # (B * L, D)
            plane = points @ torch.linalg.eigh(points.T @ points).eigenvectors[:, -2:]
            axis.scatter(*plane.T, s=2, c=colours)
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
    """Every option is declared once, most in a table: help, and one default or one a preset."""
    presets = "phantoms", "small", "paper"
    options = {
        "out": ("folder of the run; one that is there is gone on with", "runs/afire"),
        "test-fraction": ("of patients to hold out, if --data has no folders train and test", 0.2),
        "save-every": ("minutes between checkpoints, of which the end of an epoch is one", 30.0),
        "grad-accum": ("parts of a batch, to save memory; losses and prototypes see one each", 1),
        "augment": ("what makes x' of x: lesions, or to compare a random affine crop", "lesion"),
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
    best = ("cuda" if torch.cuda.is_available() else
            "mps" if torch.backends.mps.is_available() else "cpu")

    parser = argparse.ArgumentParser(prog="afire.py", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"AFiRe {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True)
    both, train, test = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    add = both.add_argument
    add("--data", help="folder of images, or a list: relative/path 0 1 0 ... (none: phantoms; for "
        "eval those of the run)")
    add("--root", help="folder that the paths in a list start from (the list's)")
    add("--labels", help="CSV: image, findings (a|b), and patient if you have it")
    add("--cache", help="folder for decoded images (the run's)")
    add("--device", type=find_device, default=best, help="cpu, cuda, cuda:1, mps (%(default)s)")
    add = test.add_argument
    add("--ckpt", help="checkpoint.pth or its folder (the last run's)")
    add("--out", dest="results", help="folder for the results (eval, in the run's)")
    add("--boxes", help="CSV: image, finding, x, y, w, h in pixels of the image")
    add("--finetune", nargs="?", type=int, const=100, default=0, metavar="STEPS",
        help="also train all blocks of the encoder on the labels: for so many steps, 100 if no "
        "number is given, which takes minutes")
    add = train.add_argument
    add("--init", help="checkpoint that the encoder starts from")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--seed", type=int, default=0, help="of all that is random (%(default)s)")
    add("--amp", choices=["none", "bf16", "fp16"],
        help="autocast (on CUDA bf16, or fp16 where there is none; elsewhere none)")
    add("--preset", choices=presets, help="which of the defaults that are in threes: "
        "phantoms without --data, else paper on a CUDA GPU, small elsewhere")
    choices = {"arch": ["vit_micro", "vit_tiny", "vit_small", "vit_base"],
               "levels": ["file", "equal"], "augment": ["lesion", "crop"]}
    for name, (text, *values) in options.items():
        add(f"--{name}", type=type(values[0]), choices=choices.get(name),
            help=f"{text} ({', '.join(map(str, values))})")
    three = "; three defaults in brackets are those of the presets phantoms, small and paper"
    for verb, part, text in (("pretrain", train, "pre-train on normal radiographs"),
                             ("eval", test, "evaluate a run, on its data or on --data"),
                             ("bench", train, "time a pretrain with these options")):
        verbs.add_parser(verb, parents=[both, part], allow_abbrev=False, help=text,
                         description=text + three if part is train else text)
    args = parser.parse_args(argv)
    if args.verb == "eval":
        if args.finetune < 0:
            parser.error(f"--finetune {args.finetune} is negative: choose a number of steps")
        return args
    args.preset = args.preset or ("phantoms" if not args.data else
                                  "paper" if args.device.type == "cuda" else "small")
    for name, (_, *values) in options.items():
        key, value = name.replace("-", "_"), values[presets.index(args.preset) % len(values)]
        if getattr(args, key) is None:
            setattr(args, key, value)
        least = {int: 1, float: 0, str: ""}[type(value)]
        if not getattr(args, key) >= least:                            # also if it is not a number
            parser.error(f"--{name} must be at least {least}")
    for name in "keep", "teacher_momentum", "test_fraction":
        if vars(args)[name] > 1 or args.keep == 0:
            parser.error(f"--{name.replace('_', '-')} {vars(args)[name]} is no fraction: choose "
                         "one up to 1, for --keep above 0")
    if args.seed < 0:
        parser.error(f"--seed {args.seed} is negative: choose 0 or more")
    if args.amp is None:
        args.amp = ("none" if args.device.type != "cuda" else
                    "bf16" if torch.cuda.is_bf16_supported() else "fp16")
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
