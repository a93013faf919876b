#!/usr/bin/env python3
"""AFiRe: anatomy-driven self-supervised learning for fine-grained representation of radiographs.

A single-file reference implementation of Liu, He, Wen, Yang and Chen, AAAI 2025 (arXiv:2504.10972).
A Vision Transformer is pre-trained on *normal* chest radiographs only, with two tasks on tokens:
(I) a position shows the same anatomy in every patient, so its tokens are contrasted with a
prototype of that position; (II) synthetic lesions are added, and the normal image is restored.

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

In docstrings [P] is what the paper says, [R] what the authors' released code does, [D] our choice.
"""

import argparse
import collections
import concurrent.futures
import copy
import csv
import dataclasses
import hashlib
import inspect
import json
import math
import os
import sys
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
    """Otsu's threshold (1979), pixels above it are bright: (B, H, W) in 0..255 -> (B,)."""
    levels = levels.flatten(1)                                                 # (B, H * W)
    counts = torch.zeros(len(levels), 256, device=levels.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=counts.dtype))
    n = counts.cumsum(1)                                       # pixels up to a level, (B, 256)
    s = (counts * torch.arange(256, device=levels.device)).cumsum(1)           # their sum
    n_all = n[:, -1:]
    mean = s[:, -1:] / n_all
    between_classes = (mean * n - s) ** 2 / (n * (n_all - n)).clamp_min(1)     # variance, (B, 256)
    return between_classes.argmax(1)


def largest_region(bright, rounds=12):
    """The largest 8-connected component of an image [D]: (B, H, W) bool -> (B, H, W) bool."""
    # Pointer jumping: a pixel's label is the index of a pixel, at first its own. Neighbours share
    # the highest label, so does the pixel it points to, and labels of labels are followed. In the
    # end a component has one label; the worst maze that was tried, at 1024 px, needs 10 rounds.
    B, H, W = bright.shape
    pixel = torch.arange(H * W, device=bright.device)
    label = pixel.expand(B, -1)                                                # (B, H * W)
    dark = ~bright.flatten(1)
    for _ in range(rounds):
        highest = label.masked_fill(dark, 0).view(B, 1, H, W).float()          # exact below 2^24
        highest = F.max_pool2d(highest, 3, stride=1, padding=1).flatten(1).long()
        highest = torch.where(dark, pixel, highest)                            # neighbours share
        label = label.scatter_reduce(1, label, highest, "amax")                # so does its root
        label = label.gather(1, label)                                         # a label's label
        label = label.gather(1, label)
    size = torch.zeros_like(label).scatter_add(1, label, (~dark).long())       # pixels of a label
    largest = label == size.argmax(1, keepdim=True)
    return bright & largest.view(B, H, W)


def enclosing_circle_centre(region, steps=80):
    """The centre of the smallest circle around a region: (B, H, W) bool -> (B, 2), y and x."""
    # Badoiu and Clarkson (2003): step i moves 1/i of the way to the farthest point; 80 steps end
    # within 2.5 px at 224. The farthest point is the first or the last of its row.
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


def uniform(shape, generator, device):
    """Uniform random numbers in [0, 1), copied to the device without blocking the host."""
    source = generator.device if generator else device
    pinned = source.type == "cpu" and device.type == "cuda"
    draws = torch.rand(shape, generator=generator, device=source, pin_memory=pinned)
    return draws.to(device, non_blocking=pinned)


def synthetic_lesion_mask(images, generator=None, centre=None, offset=0):
    """Adds 1 to 4 synthetic lesions to each image [P: Fig. 2; R: the numbers].

    A lesion is the image's own tissue under an elliptical Gaussian, resized and added elsewhere.
    Only lesion pixels are clipped at 235 / 255, and none is darkened [D; R: the whole image].

    images (B, 1, H, W) in [0, 1]; centre (B, 2) as from texture_centre, computed if not given;
    offset: index of images[0] in the global batch, for which the generator draws.
    Returns lesioned x' and mask M, both shaped like images; x' == x where M == 0.
    """
    B, _, H, W = images.shape
    device = images.device
    grey = images.squeeze(1).float()                                           # (B, H, W)
    if centre is None:
        centre = texture_centre(images)

    # Texture: the 60 x 60 px around the centre, shifted to lie inside (for an image of 224 px).
    h = max(1, round(60 * H / 224))
    w = max(1, round(60 * W / 224))
    top = (centre[:, 0] - h / 2).round().clamp(0, H - h).long()                # (B,)
    left = (centre[:, 1] - w / 2).round().clamp(0, W - w).long()
    crops = grey.unfold(1, h, 1).unfold(2, w, 1)               # a view, (B, H-h+1, W-w+1, h, w)
    texture = crops[torch.arange(B, device=device), top, left]                 # (B, h, w)
    v = torch.linspace(-1, 1, h, device=device).unsqueeze(1)
    u = torch.linspace(-1, 1, w, device=device)
    window = torch.exp(-(u ** 2 + v ** 2) / 0.5)                               # (h, w)
    window = (window - window.min()) / (window.max() - window.min()).clamp_min(1e-6)

    # Resizing and placing is linear and separable: a lesion is rows @ texture @ columns^T, with a
    # matrix of bilinear weights for each axis.
    def resize_and_place(size, start, source, length):
        """Weights along an axis, from draws of size and start in [0, 1): (B, 4, length, source)."""
        smallest = max(1, round(16 * length / 224))
        largest = max(1, round(128 * length / 224))
        size = smallest + (size * (largest - smallest + 1)).floor()            # in pixels
        start = (start * (length - size + 1)).floor()
        pixel = torch.arange(length, device=device) - start                    # (B, 4, length)
        position = ((pixel + 0.5) * source / size - 0.5).clamp(0, source - 1)  # in the texture
        distance = position.unsqueeze(3) - torch.arange(source, device=device)
        inside = (pixel >= 0) & (pixel < size)
        return (1 - distance.abs()).clamp_min(0) * inside.unsqueeze(3)

    # Five draws in [0, 1) for 4 lesions, of which the first 1 to 4 exist.
    draws = uniform((offset + B, 4, 5), generator, device)[offset:]
    height, width, y, x, number = draws.unsqueeze(3).unbind(2)                 # (B, 4, 1)
    exists = torch.arange(4, device=device).view(4, 1) <= (4 * number[:, :1]).floor()   # (B, 4, 1)
    rows = resize_and_place(height, y, h, H) * exists.unsqueeze(3)             # (B, 4, H, h)
    columns = resize_and_place(width, x, w, W)                                 # (B, 4, W, w)
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


class Mlp(nn.Module):
    """Two linear layers with a GELU between them: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim, num_heads, eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


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

    def forward(self, x, visible=None):
        """visible (B, V) long: sorted positions, the only ones to encode -> (B, 1 + V, D)."""
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)             # (B, L, D)
        x = x + self.pos_embed[:, 1:]
        if visible is not None:
            x = x.gather(1, visible.unsqueeze(2).expand(-1, -1, x.shape[2]))   # (B, V, D)
        class_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return self.norm(self.blocks(torch.cat([class_token, x], 1)))


class Decoder(nn.Module):
    """Tokens (B, 1 + L, D) to images (B, C, H, W); those in abnormal (B, L) are masked [P; R]."""

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

    def forward(self, tokens, abnormal):
        x = self.embedding(tokens)                                             # (B, 1 + L, d)
        patches = torch.where(abnormal.unsqueeze(2), self.mask_token.to(x.dtype), x[:, 1:])
        x = torch.cat([x[:, :1], patches], 1) + self.pos_embed                 # (B, 1 + L, d)
        x = self.image_pred(self.norm(self.blocks(x))[:, 1:])                  # (B, L, C * p * p)
        return unpatchify(x, self.patch_size)


# ---- Projection head and spatial-aware prototypes (Fig. 3) ---------------------------------------

class AnatomyHead(nn.Module):
    """Scores tokens against K pseudo-clusters of their position [R]: (B, L, D) -> (B, L, K)."""

    def __init__(self, in_dim, num_patches, out_dim=256, hidden_dim=1024, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim))
        self.last_layers = nn.Parameter(torch.randn(num_patches, out_dim, bottleneck_dim))
        for layer in self.mlp[::2]:
            nn.init.normal_(layer.weight, std=0.02)        # [R] truncates at 100 std
            nn.init.zeros_(layer.bias)

    def forward(self, tokens):
        z = self.mlp(tokens).float()                                           # (B, L, d)
        # Float32 also under autocast: a cosine in half precision is off by up to 0.003.
        with torch.autocast(z.device.type, enabled=False):
            rows = self.last_layers.float()
            scores = torch.einsum("bld,lkd->blk", F.normalize(z, dim=2), rows)
            return scores / rows.norm(dim=2)               # cosines; longer rows learn slower [D]


def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Sinkhorn-Knopp [R]: scores -> assignment (L, K), rows sum to 1, columns nearly to L / K."""
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
    """P, a prototype per position: the running mean of the teacher's scores there [P; R]."""

    def __init__(self, num_patches, out_dim, momentum=0.75):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("prototypes", torch.zeros(num_patches, out_dim))  # (L, K)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, teacher_logits, momentum=None):
        """P <- m P + (1 - m) mean of teacher_logits (B, L, K) over images; at first P <- mean."""
        mean = gather(teacher_logits.float().mean(0, keepdim=True)).mean(0)    # (L, K)
        m = self.momentum if momentum is None else momentum
        # torch.where, as a branch on a tensor would synchronise with the GPU.
        self.prototypes.lerp_(mean, torch.where(self.updates > 0, 1 - m, 1.0))
        self.updates += 1

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

    A stand-in, to be replaced freely: the paper defines L_cate, but neither the text at hand nor
    the released code shows how. Ours is InfoNCE with the prototype as the anchor; as it takes the
    mean of the negatives, it is log 2 if tokens are indistinguishable, for any batch size.

    logits (B, L, K), prototypes (L, K), normal and abnormal (B, L) bool -> scalar. Positions
    without both kinds of token are ignored; 0 if none is left.
    """
    # eps keeps the gradient at a vector of zeros within the range of half precision.
    s = F.cosine_similarity(logits.float(), prototypes, dim=2, eps=1e-3) / temperature  # (B, L)
    contrasted = abnormal.any(0)                                               # (L,)
    positive = normal & contrasted                                             # (B, L)
    # Other positions keep all tokens: the gradient of an empty logsumexp is not a number.
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


def put_back(tokens, visible, num_patches):
    """Scatters visible tokens (B, 1 + V, D) to their positions (B, V), fills the rest with zeros.

    Returns tokens (B, 1 + L, D), hidden (B, L) bool: the positions that are not visible.
    """
    B, _, D = tokens.shape
    index = F.pad(visible + 1, (1, 0)).unsqueeze(2).expand(-1, -1, D)          # 0: the class token
    placed = tokens.new_zeros(B, 1 + num_patches, D).scatter(1, index, tokens)
    hidden = torch.ones(B, num_patches, dtype=torch.bool, device=tokens.device)
    return placed, hidden.scatter(1, visible, False)


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

    def forward(self, normal, lesioned, mask, prototype_momentum=None, visible=None):
        """x, x', M, (B, 1, H, W) in [0, 1] -> {"loss", "structure", "category", "restoration"}.

        In train mode the prototypes are updated first. visible (B, V) long: sorted positions that
        the student sees [D]; the others become mask tokens, neither normal nor abnormal.
        """
        if self.training:
            with torch.no_grad():
                teacher_tokens = features(self.teacher["encoder"], normal)     # (B, L, D)
                teacher_logits = self.teacher["head"](teacher_tokens)          # (B, L, K)
            self.prototypes.update(teacher_logits, prototype_momentum)

        tokens = self.student["encoder"](normalise(lesioned), visible)         # (B, 1 + V, D)
        abnormal = abnormal_tokens(mask, self.patch_size)                      # (B, L)
        hidden = torch.zeros_like(abnormal)                                    # (B, L)
        if visible is not None:
            tokens, hidden = put_back(tokens, visible, self.num_patches)
        logits = self.student["head"](tokens[:, 1:])                           # (B, L, K)
        restored = self.decoder(tokens, abnormal | hidden)                     # (B, 3, H, W)

        logits = gather(logits)                            # task I uses the global batch
        normal_set = gather(~abnormal & ~hidden)
        abnormal_set = gather(abnormal & ~hidden)
        assignment = self.prototypes.assignment()                              # (L, K)
        structure = structure_consistency_loss(logits, assignment, normal_set)
        category = category_consistency_loss(logits, self.prototypes.prototypes, normal_set,
                                             abnormal_set)
        restoration = restoration_loss(restored, normalise(normal))
        losses = {"structure": structure, "category": category, "restoration": restoration}
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


def option(default, text, choices=None, least=0):
    """A field of a dataclass that is also an option of the command line."""
    metadata = {"help": text, "choices": choices, "least": least}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class DataOptions:
    """Options that both commands share."""
    data: str = option(None, "folder of radiographs; without it, phantoms are drawn")
    labels: str = option(None, "CSV: image, findings (a|b), and if known patient and split")
    device: str = option("auto", "cpu, cuda, cuda:1 or mps; auto: an accelerator if there is one")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = field.metadata.get("least")
            if field.metadata and isinstance(value, (int, float)) and not value >= least:
                name = field.name.replace("_", "-")
                raise InputError(f"--{name} {value}: choose at least {least}")


@dataclasses.dataclass
class PretrainOptions(DataOptions):
    """Pre-train on normal radiographs. Preset paper is the release's recipe for one GPU [R]."""
    out: str = option("runs/afire", "folder of the run; an existing run is resumed")
    init: str = option(None, "checkpoint that the encoder starts from")
    preset: str = option(None, "set of defaults; if not given: phantoms without --data, else paper "
                         "on a GPU and small elsewhere", ("paper", "small", "phantoms"))
    arch: str = option("vit_base", "encoder", ("vit_micro", "vit_small", "vit_base"))
    img_size: int = option(224, "side of the square that images are resized to, in pixels", least=1)
    patch_size: int = option(16, "side of a patch, in pixels", least=1)
    levels: str = option("file", "grey levels as in the file, or equalised", ("file", "equal"))
    keep: float = option(1.0, "fraction of the tokens of x' that the student sees")
    epochs: int = option(400, "passes over the normal images, in whole batches", least=1)
    batch_size: int = option(64, "images in a step, over all processes (release: 1024)", least=1)
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
    img_size: int = option(None, "side of the images in pixels, if not the encoder's", least=1)
    finetune: int = option(0, "also fine-tune for this many steps; 0: only the probe")


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
    preset = "paper" if torch.cuda.is_available() and typed.get("device") != "cpu" else "small"
    preset = preset if typed.get("data") else "phantoms"
    preset = typed.setdefault("preset", preset)
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


def find_device(name):
    """The torch.device of this name; "auto" is an accelerator if there is one."""
    if name == "auto":
        available = torch.accelerator.is_available()
        name = str(torch.accelerator.current_accelerator()) if available else "cpu"
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

    figures = ("loss", "structure", "category", "restoration", "gradient_norm")

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
        """A step on this process's images (b, 1, S, S) uint8, their centres (b, 2): -> figures."""
        options = self.options
        num_patches = self.model.num_patches
        first_epoch = step < per_epoch
        offset = self.rank * len(images)
        lr, weight_decay, momentum = self.schedules(step, per_epoch)
        for group, decay in zip(self.optimizer.param_groups, (weight_decay, 0.0)):
            group.update(lr=lr, weight_decay=decay)

        seed = (options.seed * 2654435769 + step) % 2 ** 32    # generators ignore all higher bits
        generator = torch.Generator().manual_seed(seed)        # draws for all processes' images
        visible = None
        if options.keep < 1:
            draws = uniform((options.batch_size, num_patches), generator, self.device)
            order = draws[offset:offset + len(images)].argsort(1)              # (b, L)
            kept = math.ceil(options.keep * num_patches)
            visible = order[:, :kept].sort(1).values                           # (b, V)
        normal = to_device(images, self.device) / 255
        centres = to_device(centres, self.device)
        lesioned, mask = synthetic_lesion_mask(normal, generator, centres, offset)

        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            # In the first epoch the prototypes are the batch mean: momentum 0.
            losses = self.network(normal, lesioned, mask, 0.0 if first_epoch else None, visible)
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


def pretrain(options):
    """Trains in the folder options.out, or resumes the run in it; also under torchrun.

    Everything random depends on seed and step alone: on a CPU a resumed run equals an unbroken one
    bit for bit, and several processes equal one up to rounding.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(options.device)
    if (options.img_size % options.patch_size or options.batch_size % world
            or not 0 < options.keep <= 1):
        raise InputError("--img-size must be a multiple of --patch-size, --batch-size of the "
                         f"number of processes ({world}), and --keep above 0 and at most 1")
    if world > 1:
        try:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            raise InputError(f"WORLD_SIZE is {world}, but {error}: use torchrun") from error
    data = load_radiographs(options.data, options.img_size, labels=options.labels,
                            levels=options.levels)
    normals = data.train[~data.labels[data.train].any(1)]
    print(f"preset {options.preset}: pre-training on {len(normals)} normal images (excluded: "
          f"{len(data.train) - len(normals)} with findings, {len(data.test)} held out)")
    if len(normals) < options.batch_size:
        raise InputError(f"--batch-size must be at most {len(normals)}, the normal images in train")

    trainer = Trainer(options, device, rank, world)
    model = trainer.model
    run = {"config": dataclasses.asdict(options), "earlier_images": [],        # those of --init
           "images": [data.hashes[row] for row in normals], "epoch": 0, "history": []}
    out = Path(options.out)
    path = out / "checkpoint.pth"
    if path.exists():
        checkpoint = read_checkpoint(path)
        if "history" not in checkpoint:
            raise InputError(f"{path} is not of a run of afire.py: name another --out")
        may_differ = ("out", "data", "labels", "device", "preset")     # the images are compared
        before = {**checkpoint["config"], "images": checkpoint["images"]}
        now = {**run["config"], "images": run["images"]}
        different = [name for name in now
                     if now[name] != before.get(name) and name not in may_differ]
        if different:
            raise InputError(f"the run in {out} has other {' and '.join(different)}: repeat its "
                             "command to resume it, or name another --out")
        model.load_state_dict(checkpoint["model"])
        trainer.optimizer.load_state_dict(checkpoint["optimizer"])
        run = {**{key: checkpoint[key] for key in run}, "config": run["config"]}
        print(f"resuming after epoch {run['epoch']} of {options.epochs}")
    elif options.init:
        encoder = load_encoder(options.init, options.img_size)
        if encoder.sizes != model.student["encoder"].sizes:
            raise InputError(f"--init {options.init} has another size: change --arch or "
                             "--patch-size")
        model.student["encoder"].load_state_dict(encoder.state_dict())
        model.teacher["encoder"].load_state_dict(encoder.state_dict())
        run["earlier_images"] = trained_images(options.init)
    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        (out / "config.json").write_text(json.dumps(run["config"], indent=2))

    centres = in_batches(texture_centre, data.images, normals, device).cpu().numpy()   # (n, 2)
    per_epoch = len(normals) // options.batch_size
    bar = tqdm(total=options.epochs * per_epoch, initial=run["epoch"] * per_epoch, desc="pretrain",
               unit="step", mininterval=1, disable=rank > 0)
    for epoch in range(run["epoch"], options.epochs):
        order = np.random.default_rng((options.seed, epoch)).permutation(len(normals))
        batches = order[:per_epoch * options.batch_size].reshape(per_epoch, -1)
        sums = torch.zeros(len(trainer.figures), device=device)
        for i, batch in enumerate(batches):
            share = np.array_split(np.sort(batch), world)[rank]                # (b,)
            step = epoch * per_epoch + i
            sums += trainer.step(data.images[normals[share]], centres[share], step, per_epoch)
            bar.update()
            if i % 10 == 9 or i == per_epoch - 1:          # reading it synchronises with the GPU
                loss, *_, gradient_norm = (sums / (i + 1)).tolist()
                bar.set_postfix(loss=f"{loss:.3f}")
                if not math.isfinite(gradient_norm):       # alike in all processes: all stop here
                    raise InputError(f"the gradient is not finite in epoch {epoch + 1}: try a "
                                     "lower --lr in another --out")
        means = (gather(sums.unsqueeze(0)).mean(0) / per_epoch).tolist()
        run["epoch"] = epoch + 1
        run["history"].append({"epoch": epoch + 1, **dict(zip(trainer.figures, means)),
                               "lr": trainer.schedules(step, per_epoch)[0]})
        if rank == 0:
            log = [json.dumps(record) + "\n" for record in run["history"]]
            (out / "log.jsonl").write_text("".join(log))
            save_checkpoint({"model": model.state_dict(), **run,
                             "optimizer": trainer.optimizer.state_dict()}, path)
    bar.close()
    if rank == 0:
        save_checkpoint(model.teacher["encoder"].state_dict(), out / "encoder.pth")
        plot_restoration(out / "restoration.png", model.eval(),
                         to_device(data.images[normals[:4]], device) / 255)
    print(f"in {out}: checkpoint.pth, encoder.pth (the teacher's), log.jsonl, restoration.png")
    if world > 1:
        torch.distributed.barrier()                        # wait until rank 0 has written
        torch.distributed.destroy_process_group()


# ---- Evaluation ----------------------------------------------------------------------------------

def detection(scores, labels):
    """AUROC, average precision, best Dice of scores (n,) and labels (n,) bool; NaN if undefined."""
    if labels.all() or not labels.any() or np.isnan(scores).any():
        return {"auroc": math.nan, "ap": math.nan, "dice": math.nan}
    _, rank = np.unique(-scores, return_inverse=True)                  # the highest score first
    positive = np.bincount(rank, labels)
    negative = np.bincount(rank, ~labels)
    true_positives = positive.cumsum()
    called = (positive + negative).cumsum()
    negatives_below = negative.sum() - negative.cumsum() + negative / 2
    return {"auroc": float((positive * negatives_below).sum() / positive.sum() / negative.sum()),
            "ap": float((positive * true_positives / called).sum() / positive.sum()),
            "dice": float((2 * true_positives / (called + positive.sum())).max())}


def auroc(scores, labels):
    """The probability that a positive scores above a negative; ties count half: -> float."""
    return detection(np.asarray(scores, float), np.asarray(labels, bool))["auroc"]


def nan_mean(values, axis=None):
    """The mean without NaN; NaN if nothing is left."""
    return np.ma.filled(np.ma.masked_invalid(values).mean(axis), math.nan)


def mean_auroc(scores, labels, patients, resamples=200):
    """AUROC of each finding, averaged over draws: -> (F,), and a 95 % interval of their mean.

    scores (draws, T, F), labels (T, F) bool, patients (T,), over whom the bootstrap is [D].
    """
    def by_finding(rows):
        return nan_mean([[auroc(draw[rows, f], labels[rows, f]) for f in range(labels.shape[1])]
                             for draw in scores], 0)

    _, person = np.unique(patients, return_inverse=True)
    rows_of = np.split(person.argsort(kind="stable"), np.bincount(person).cumsum()[:-1])
    random = np.random.default_rng(0)
    means = []
    for _ in range(resamples):
        drawn = random.integers(len(rows_of), size=len(rows_of))
        means.append(nan_mean(by_finding(np.concatenate([rows_of[i] for i in drawn]))))
    means = [mean for mean in means if not math.isnan(mean)] or [math.nan]
    return by_finding(slice(None)), np.quantile(means, [0.025, 0.975]).tolist()


def silhouette(points, cluster):
    """Mean silhouette (Rousseeuw, 1987): points (N, D), cluster (N,) integers -> -1 to 1."""
    cluster = cluster.unique(return_inverse=True)[1]
    member = F.one_hot(cluster).to(points.dtype)                       # (N, clusters)
    size = member.sum(0)
    distance = torch.cdist(points, points) @ member / size             # means by cluster
    own = (distance * member).sum(1) * (size / (size - 1).clamp_min(1))[cluster]
    other = distance.masked_fill(member.bool(), math.inf).amin(1)
    score = (other - own) / torch.maximum(own, other).clamp_min(1e-12)
    return float(torch.where(size[cluster] > 1, score, 0).mean())


def linear_probe(x, y, penalty=10.0):
    """Ridge regression on standardised x [D]: (n, D), y (n, F) bool -> weight (D, F), bias (F,)."""
    mean = x.mean(0)
    std = x.std(0, correction=0) + 1e-6
    z = (x - mean) / std
    y = y.to(x.dtype)
    ridge = penalty * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(z.T @ z + ridge, z.T @ (y - y.mean(0))) / std.unsqueeze(1)
    return weight, y.mean(0) - mean @ weight


def finetune(encoder, data, rows, steps, device, batch_size=32):
    """Fine-tunes a copy's blocks, with a linear layer, on rows [P; D: recipe]: -> copy, layer."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    encoder = copy.deepcopy(encoder)
    dim = encoder.pos_embed.shape[2]
    layer = nn.Linear(dim, len(data.findings)).to(device)
    trained = [*encoder.blocks.requires_grad_().parameters(), *layer.parameters()]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.05)
    for step in range(steps):
        batch = random.choice(rows, batch_size)
        truth = to_device(data.labels[batch], device).float()
        images = to_device(data.images[batch], device) / 255
        scores = layer(features(encoder, images).mean(1))
        loss = F.binary_cross_entropy_with_logits(scores, truth)
        warmup = min(1, (step + 1) / 10)
        optimizer.param_groups[0]["lr"] = warmup * cosine(0.128 / dim, 0.0, step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.requires_grad_(False), layer.requires_grad_(False)


def learn_from_few(learn, labels, train):
    """Test scores (T, F) of learn(rows) for 1, 10, 100 % of train: -> {"1%": (draws, T, F)}."""
    random = np.random.default_rng(0)
    scores = {}
    for percent, draws in (1, 5), (10, 5), (100, 1):
        results = []
        for _ in range(draws):
            rows = random.permutation(train)[:max(2, round(len(train) * percent / 100))]
            constant = labels[rows].all(0) | ~labels[rows].any(0)
            results.append(np.where(constant, math.nan, learn(rows)))
        scores[f"{percent}%"] = np.stack(results)
    return scores


def restoration_error(afire, images):
    """Error of tokens, a quarter of which is masked at a time [D]: (B, 1, S, S) -> (B, L)."""
    x = normalise(images)
    tokens = afire.student["encoder"](x)                                       # (B, 1 + L, D)
    odd = torch.arange(math.isqrt(tokens.shape[1] - 1), device=x.device) % 2   # (side,)
    place = (2 * odd.unsqueeze(1) + odd).flatten()                             # (L,), 0 to 3
    error = 0
    for turn in range(4):
        hidden = (place == turn).expand(len(x), -1)                            # (B, L)
        restored = afire.decoder(tokens, hidden)                               # (B, 3, S, S)
        error = error + hidden * patchify((restored - x) ** 2, afire.patch_size).mean(2)
    return error


@torch.no_grad()
def anomaly_maps(images, rows, device, encoder, afire=None, normals=()):
    """How abnormal each token of images[rows] looks [D]: -> {score: (T, side, side)}, T rows.

    prototype    1 - cosine between the token's scores and the prototype, as in L_cate
    restoration  error of the token's pixels when it is restored from the other tokens
    neighbours   mean distance to the 5 nearest normal tokens of the position

    images (n, 1, S, S) uint8; afire: the whole model, for the first two scores; normals: rows of
    normal images, for the third. With them a prototype is the mean of their head outputs, so that
    an untrained network has prototypes too, and restoration errors are standardised by position.
    """
    def embed(x):
        return features(encoder, x)                                            # (B, L, D)

    def error(x):
        return restoration_error(afire, x)                                     # (B, L)

    def score(x):
        tokens = embed(x)
        scores = []
        if afire:
            logits = afire.teacher["head"](tokens)                             # (B, L, K)
            scores = [1 - F.cosine_similarity(logits, prototypes, dim=2), error(x)]
        if len(normals):
            distance = torch.cdist(tokens.transpose(0, 1), references.transpose(0, 1))
            nearest = distance.topk(min(5, len(normals)), largest=False).values    # (L, B, 5)
            scores.append(nearest.mean(2).T)
        return torch.stack(scores, 1)                                          # (B, scores, L)

    names = []
    if afire:
        names = ["prototype", "restoration"]
        prototypes = afire.prototypes.prototypes                               # (L, K)
    if len(normals):
        names.append("neighbours")
        references = in_batches(embed, images, normals, device)                # (N, L, D)
    if afire and len(normals):                             # in parts, as the head is wide
        logits = [afire.teacher["head"](part) for part in references.split(64)]
        prototypes = torch.cat(logits).mean(0)
    maps = in_batches(score, images, rows, device)                             # (T, scores, L)
    if afire and len(normals):
        errors = in_batches(error, images, normals, device)                    # (N, L)
        maps[:, 1] -= errors.mean(0)
        maps[:, 1] /= errors.std(0, correction=0) + 1e-6
    side = math.isqrt(maps.shape[2])
    grids = maps.unflatten(2, (side, side)).cpu().numpy()
    return {name: grids[:, i] for i, name in enumerate(names)}


def image_scores(maps):
    """An image's score is the mean of its highest quarter of tokens: (T, side, side) -> (T,)."""
    tokens = np.sort(maps.reshape(len(maps), -1))                              # (T, L)
    return tokens[:, -max(1, tokens.shape[1] // 4):].mean(1)


def evaluate_maps(maps, abnormal, masks, patients):
    """Detection of abnormal images, and of pixels on a grid of about 56 x 56.

    maps {score: (T, side, side)}, abnormal (T,) bool, masks (T, S, S) bool, patients (T,).
    """
    step = max(1, masks.shape[1] // 56)
    truth = masks[:, step // 2::step, step // 2::step]                         # (T, 56, 56)
    report = {}
    for name, grids in maps.items():
        scores = image_scores(grids)
        image = detection(scores, abnormal)
        _, ci95 = mean_auroc(scores[None, :, None], abnormal[:, None], patients)
        grids = torch.from_numpy(grids).unsqueeze(1)
        grids = F.interpolate(grids, truth.shape[1:], mode="bilinear")         # (T, 1, 56, 56)
        pixel = detection(grids.numpy().ravel(), truth.ravel())
        report[name] = {"image_auroc": image["auroc"], "image_ap": image["ap"], "image_ci95": ci95,
                        "pixel_auroc": pixel["auroc"], "pixel_ap": pixel["ap"],
                        "dice": pixel["dice"]}
    return report


def load_models(path, img_size=None):
    """-> {"checkpoint": (encoder, AFiRe or None), "random_init": ...}, options of the run or None.

    AFiRe is None for files that are not of a run here, and at another image size.
    """
    checkpoint = read_checkpoint(path)
    try:
        run = PretrainOptions(**checkpoint["config"]) if "history" in checkpoint else None
        if run and img_size in (None, run.img_size):
            trained = build_model(run)
            trained.load_state_dict(checkpoint["model"])
            untrained = build_model(run)
            return {"checkpoint": (trained.teacher["encoder"], trained),
                    "random_init": (untrained.teacher["encoder"], untrained)}, run
    except (TypeError, RuntimeError) as error:
        raise InputError(f"{path} is of another version of afire.py: use that one") from error
    encoder = load_encoder(path, img_size)
    if encoder.sizes[2] != 3:
        raise InputError(f"{path} takes {encoder.sizes[2]} channels: use an encoder of 3 channels")
    torch.manual_seed(0)
    return {"checkpoint": (encoder, None), "random_init": (ViT(*encoder.sizes), None)}, run


def trained_images(path):
    """Hashes of the files that a checkpoint was pre-trained on, to keep them out of the test."""
    checkpoint = read_checkpoint(path)
    hashes = checkpoint.get("images", ["unknown"]) + checkpoint.get("earlier_images", [])
    if "unknown" in hashes:
        print(f"{path} does not say what it was trained on: that may be among the test images")
    return hashes


def evaluate_network(encoder, afire, data, normals, steps, device):
    """All metrics of one network: -> report for metrics.json, arrays for predictions.npz.

    data: Radiographs; normals: rows of normal images to compare with; steps of fine-tuning.
    """
    truth = data.labels[data.test]
    patients = np.array(data.patients)[data.test]
    report = {}
    arrays = {}

    # Few labels: a linear probe on the mean token [D], and fine-tuning.
    x = in_batches(lambda images: features(encoder, images).mean(1), data.images,
                   np.arange(len(data.images)), device).cpu()                  # (n, D)

    def probe(rows):
        weight, bias = linear_probe(x[rows], torch.from_numpy(data.labels[rows]))
        return (x[data.test] @ weight + bias).numpy()                          # (T, F)

    def finetuned(rows):
        copied, layer = finetune(encoder, data, rows, steps, device)
        return in_batches(lambda images: layer(features(copied, images).mean(1)), data.images,
                          data.test, device).cpu().numpy()

    protocols = {"linear": probe, "finetune": finetuned} if steps else {"linear": probe}
    for protocol, learn in protocols.items():
        report[protocol] = {}
        for share, scores in learn_from_few(learn, data.labels, data.train).items():
            values, ci95 = mean_auroc(scores, truth, patients)
            report[protocol][share] = {"macro_auroc": float(nan_mean(values)), "ci95": ci95,
                                       "per_finding": dict(zip(data.findings, values.tolist()))}
            arrays[f"{protocol} {share}"] = scores

    # Anomalies, by comparison with normal images.
    maps = anomaly_maps(data.images, data.test, device, encoder, afire, normals)
    report["anomaly"] = evaluate_maps(maps, truth.any(1), data.masks[data.test], patients)

    # Cohesion [P: Fig. 5]: do the tokens of a position lie together across patients?
    healthy = data.test[~truth.any(1)][:24]
    tokens = in_batches(lambda images: features(encoder, images), data.images, healthy, device)
    position = torch.arange(tokens.shape[1]).repeat(len(tokens))
    report["cohesion"] = silhouette(tokens.flatten(0, 1).cpu(), position)
    return report, arrays | maps


def print_table(report):
    """The main metrics of {"checkpoint": ..., "random_init": ...}, a row each."""
    def rows(network):
        for protocol, name in ("linear", "linear probe"), ("finetune", "fine-tuning"):
            for share, metrics in network.get(protocol, {}).items():
                yield f"{name}, {share} of the labels", metrics["macro_auroc"], metrics["ci95"]
        for level in "image", "pixel":
            for score, metrics in network["anomaly"].items():
                interval = metrics.get(f"{level}_ci95", [])
                yield f"abnormal {level}s by {score}", metrics[f"{level}_auroc"], interval
        yield "cohesion (silhouette by position)", network["cohesion"], []

    print(f"{'AUROC':36}{'trained':>9}{'untrained':>11}   95 % interval of the trained")
    both = zip(rows(report["checkpoint"]), rows(report["random_init"]))
    for (name, trained, interval), (_, untrained, _) in both:
        if not math.isnan(trained):
            ends = " to ".join(f"{end:.3f}" for end in interval)
            print(f"{name:36}{trained:9.3f}{untrained:11.3f}   {ends}")


def evaluate(options):
    """An encoder beside the same encoder untrained: writes its metrics and prints a table.

    Without labels, all images are scored, by the scores that need no normal images.
    """
    device = find_device(options.device)
    path = Path(options.ckpt)
    path = path / "checkpoint.pth" if path.is_dir() else path
    models, run = load_models(path, options.img_size)
    encoder, afire = models["checkpoint"]
    if run and not options.data:
        options = dataclasses.replace(options, data=run.data, labels=options.labels or run.labels)
    data = load_radiographs(options.data, encoder.sizes[0], labels=options.labels,
                            levels=run.levels if run else "file")
    for network, whole in models.values():
        (whole or network).to(device).eval().requires_grad_(False)
    seen = np.isin(data.hashes, trained_images(path))                          # (n,)
    out = Path(options.out or (path.parent if run else Path("runs", path.stem)) / "eval")
    out.mkdir(parents=True, exist_ok=True)
    if data.findings:
        if seen[data.test].any():
            print(f"{seen[data.test].sum()} test images left out, as pre-training has seen them")
        data.test = data.test[~seen[data.test]]
        normal = ~data.labels.any(1)
        normals = np.random.default_rng(0).permutation(data.train[normal[data.train]])[:1000]
        if min(len(normals), normal[data.test].sum()) < 2:
            raise InputError(f"--data {options.data} needs at least two normal images in train, "
                             "and two in test")
        arrays = {"images": np.array(data.names)[data.test],
                  "patients": np.array(data.patients)[data.test],
                  "findings": np.array(data.findings),
                  "labels": data.labels[data.test], "masks": data.masks[data.test]}
        report = {}
        for name, (network, whole) in models.items():
            report[name], results = evaluate_network(network, whole, data, normals,
                                                     options.finetune, device)
            arrays |= {f"{name}/{key}": array for key, array in results.items()}
        np.savez_compressed(out / "predictions.npz", **arrays)
        metrics = json.loads(json.dumps(report), parse_constant=lambda _: None)        # NaN: null
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2))
        maps = {score: arrays[f"checkpoint/{score}"] for score in report["checkpoint"]["anomaly"]}
    elif afire:
        data.test = np.arange(len(data.names))
        maps = anomaly_maps(data.images, data.test, device, encoder, afire)
    else:
        raise InputError(f"without findings, eval needs a run at its own image size: {path} is an "
                         "encoder alone, so give --labels")
    scores = np.stack([image_scores(grids) for grids in maps.values()], 1)     # (T, scores)
    order = np.argsort(-scores[:, 0], kind="stable")                           # most abnormal first
    with open(out / "scores.csv", "w", newline="", encoding="utf-8",
              errors="surrogateescape") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", "findings", "pretrained_on", *maps])
        for row, values in zip(data.test[order], scores[order]):
            findings = "|".join(np.array(data.findings)[data.labels[row]])
            known = "yes" if seen[row] else "no"
            writer.writerow([data.names[row], findings, known, *values.round(4)])
    plot_images(out / "anomaly.png", {"image": data.images[data.test[order[:5]], 0],
                                      **{name: grids[order[:5]] for name, grids in maps.items()}})
    if data.findings:
        print_table(report)
    if not afire:
        print("prototype and restoration are left out: they need AFiRe's head and decoder, at the "
              f"image size of the run; grey levels: {run.levels if run else 'as in the files'}")
    others = ", metrics.json, predictions.npz" if data.findings else ""
    print(f"in {out}: scores.csv, anomaly.png{others}")


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
        raise InputError(f"cannot write {path} ({error}): free space and resume") from error


def read_checkpoint(path):
    """A dictionary of tensors and plain data; a file with anything else is refused, not run."""
    path = Path(path, "checkpoint.pth") if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}: name one, or make it with `pretrain`")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):   # DINO's options are in one
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:                             # a broken file can raise anything
        raise InputError(f"{path} holds more than tensors: save its state dict alone") from error


def load_encoder(path, img_size=None):
    """The encoder of a checkpoint, ours, the release's, MAE's, DINO's or timm's: -> ViT.

    The teacher's, if there is one [R]. Positions are interpolated to img_size pixels.
    """
    first = "patch_embed.proj.weight"
    state = read_checkpoint(path)
    for key in "teacher", "model", "state_dict":
        if isinstance(state.get(key), dict):
            state = state[key]
    prefixes = [key.removesuffix(first) for key in state if key.endswith(first)]
    if not prefixes:
        raise InputError(f"{path} holds no ViT: there is no {first} among {list(state)[:4]}")
    prefix = max(prefixes, key=lambda name: "teacher" in name)         # a teacher's, if any
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
    print(f"{path}: ViT of width {dim}, {depth} blocks, {heads} heads (assumed)")
    return vit


# ---- Data: files and tables ----------------------------------------------------------------------

@dataclasses.dataclass
class Radiographs:
    """n images with F findings, which are either to train on or held out for testing."""
    names: list                   # n paths below the data folder, with /
    images: np.ndarray            # (n, 1, S, S) uint8, memory-mapped
    labels: np.ndarray            # (n, F) bool
    findings: list                # F names
    patients: list                # n names
    hashes: list                  # n, of the files' bytes: an image is known by its content
    train: np.ndarray             # rows to train on
    test: np.ndarray              # rows held out
    masks: np.ndarray             # (n, S, S) bool, where the findings are; (n, 1, 1) if unknown


def is_dicom(path):
    """Is it a DICOM file, whatever its suffix?"""
    with open(path, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def read_dicom(path):
    """A DICOM file as a viewer shows it: -> (H, W) float32, uint8 if it has no more than 8 bits."""
    import pydicom                                         # the one package that is optional
    file = pydicom.dcmread(path)
    stored = file.pixel_array
    kind = file.PhotometricInterpretation
    if stored.ndim != 2 or not kind.startswith("MONOCHROME"):
        raise ValueError(f"DICOM of {kind}, {stored.ndim} dimensions")
    pixels = pydicom.pixels.apply_modality_lut(stored, file)
    pixels = pydicom.pixels.apply_voi_lut(pixels, file).astype(np.float32)
    if kind == "MONOCHROME1" or file.get("PresentationLUTShape") == "INVERSE":
        pixels = 2.0 ** file.BitsStored - 1 - pixels
    if file.get("PixelPaddingValue") is not None:
        ends = (file.PixelPaddingValue, file.get("PixelPaddingRangeLimit", file.PixelPaddingValue))
        padding = (stored >= min(ends)) & (stored <= max(ends))
        pixels[padding] = pixels[~padding].min(initial=pixels.max())
    in_8_bits = file.BitsStored <= 8 and pixels.min() >= 0 and pixels.max() <= 255
    return pixels.round().astype(np.uint8) if in_8_bits else pixels.astype(np.float32)


def read_image(path, size, levels="file"):
    """A file as a viewer shows it, resized to a square: -> (size, size) uint8.

    More than 8 bits are scaled between the 0.5 and the 99.5 percentile, as a burned-in marker is
    brighter than the rest. levels "equal": the histogram is equalised, as in MIMIC-CXR-JPG.
    """
    if is_dicom(path):
        image = Image.fromarray(read_dicom(path))
    else:
        with Image.open(path, formats=["PNG", "JPEG"]) as file:
            file.draft("L", (size * 3 // 2, size * 3 // 2))    # a large JPEG at half size or less
            image = ImageOps.exif_transpose(file)
    if image.mode[0] in "IF":
        pixels = np.asarray(image, np.float32)
        low, high = np.percentile(pixels, [0.5, 99.5])
        if not math.isfinite(high - low):
            raise ValueError("pixels that are not finite")
        pixels = (pixels - low) * (255 / max(high - low, 1e-6))
        image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    image = TF.resize(image.convert("L"), [size, size])
    return np.asarray(TF.equalize(image) if levels == "equal" else image)


def decode_files(paths, size, levels, cache):
    """Decodes files once: -> images (n, 1, S, S) uint8, {row: hash}, {row: why it failed}.

    The cache is a memory-mapped file of n records, shared by all runs. A record whose checksum is
    wrong is decoded again: after a failure, a power cut, or while another process is writing it.
    """
    versions = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    rules = inspect.getsource(read_dicom) + inspect.getsource(read_image)      # changed: a new file
    key = hashlib.sha256(repr((rules, size, levels, versions)).encode()).hexdigest()[:16]
    file = Path(cache or "runs/cache", f"{key}.images")
    file.parent.mkdir(parents=True, exist_ok=True)
    layout = np.dtype([("hash", "S16"), ("image", np.uint8, (1, size, size)), ("checksum", "<u4")])
    file.touch()
    with open(file, "r+b") as stream:
        if hasattr(os, "posix_fallocate"):                 # a full disk fails here, not by SIGBUS
            os.posix_fallocate(stream.fileno(), 0, len(paths) * layout.itemsize)
        stream.truncate(len(paths) * layout.itemsize)
    records = np.memmap(file, layout, "r+", shape=(len(paths),))
    hashes = {}
    failed = {}

    def decode(row):
        record = records[row]                              # a view
        try:
            if record["checksum"] != zlib.crc32(record.tobytes()[:-4]):
                record["image"] = read_image(paths[row], size, levels)
                record["hash"] = hashlib.sha256(paths[row].read_bytes()).hexdigest()[:16]
                record["checksum"] = zlib.crc32(record.tobytes()[:-4])
            hashes[row] = record["hash"].decode()
        except Exception as error:                         # a decoder can raise anything
            shown = isinstance(error, (ValueError, ImportError))       # others name the file
            failed[row] = str(error) if shown else type(error).__name__

    rows = np.random.default_rng(os.getpid()).permutation(len(paths))  # processes share the work
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(decode, rows), "decode", len(rows), delay=1))
    records.flush()
    return records["image"], hashes, failed


def find_files(folder):
    """Images below a folder: -> their sorted names, a Counter of what is skipped and why."""
    names = []
    skipped = collections.Counter()
    for place, folders, files in os.walk(folder, onerror=lambda _: skipped.update(["no access"])):
        skipped["links to folders"] += sum(Path(place, name).is_symlink() for name in folders)
        for path in [Path(place, file) for file in files]:
            name = path.relative_to(folder).as_posix()
            parts = name.lower().split("/")
            if any(part.startswith((".", "@", "$", "__macosx")) for part in parts):
                skipped["hidden or of the system"] += 1
            elif "masks" in parts[:-1]:
                skipped["in folders called masks"] += 1
            elif not (path.is_file() and os.access(path, os.R_OK)):
                skipped["broken links or without access"] += 1
            elif name.lower().endswith((".png", ".jpg", ".jpeg")) or is_dicom(path):
                names.append(name)
            else:
                skipped[f"{path.suffix or 'no suffix'}, not PNG, JPEG or DICOM"] += 1
    return sorted(names), skipped


NORMAL = ("", "normal", "normals", "no finding", "nofinding", "no findings", "healthy")
SPLITS = {"train": "train", "training": "train", "train images": "train",
          "test": "test", "testing": "test", "test images": "test",
          "val": "val", "valid": "val", "validation": "val", "dev": "val"}


def read_table(file):
    """CSV -> {image: (set of findings, patient, split)}; the patient is the image if not known."""
    try:
        with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            reader = csv.reader(stream)
            lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader if line]
    except csv.Error as error:
        raise InputError(f"{file} is not a CSV file: {error}") from error
    titles = lines[0][1] if lines else []
    if not {"image", "findings"} <= set(titles) or len(set(titles)) < len(titles):
        raise InputError(f"{file} needs columns image and findings, with commas, all of "
                         f"them once: it has {titles}")
    table = {}
    for number, line in lines[1:]:
        cells = dict(zip(titles, line))
        split = cells.get("split", "")
        if len(line) != len(titles) or split not in ("", "train", "test"):
            raise InputError(f"{file}, line {number}: expected {len(titles)} cells, and "
                             "train, test or nothing as split")
        findings = {name.strip().lower() for name in cells["findings"].split("|")}
        row = (findings.difference(NORMAL), cells.get("patient") or cells["image"], split)
        if table.setdefault(cells["image"], row) != row:
            raise InputError(f"{file}, line {number}: conflicting rows for {cells['image']}, keep "
                             "one")
    return table


def class_folders(names, skipped):
    """Findings and split by folders: -> {name: row} as read_table.

    Classes are the folders called normal, no_finding or healthy and those beside one; without any,
    no findings are known. Folders called train and test are the split, if there is one called test.
    """
    folders = {name: name.lower().replace("_", " ").split("/")[:-1] for name in names}
    class_parts = {name: [part for part in parts if part not in SPLITS]
                   for name, parts in folders.items()}
    class_parents = {tuple(parts[:i]) for parts in class_parts.values()
                     for i, part in enumerate(parts) if part in NORMAL}
    table = {}
    for name, parts in class_parts.items():
        classes = [part for i, part in enumerate(parts) if tuple(parts[:i]) in class_parents]
        split = next((SPLITS[part] for part in folders[name] if part in SPLITS), "")
        if class_parents and not classes:
            skipped["outside the class folders"] += 1
        elif split == "val":
            skipped["of a validation split"] += 1
        else:
            table[name] = (set(classes[:1]).difference(NORMAL), name, split)
    if "test" not in [split for _, _, split in table.values()]:
        table = {name: (findings, name, "") for name, (findings, _, _) in table.items()}
    return table


def split_patients(table, skipped):
    """The split of a table, or a fixed fifth of its patients as test: -> {name: train or test}."""
    if not any(split for _, _, split in table.values()):
        return {name: "test" if zlib.crc32(os.fsencode(patient)) % 1000 < 200 else "train"
                for name, (_, patient, _) in table.items()}
    tested = {patient for _, patient, split in table.values() if split == "test"}
    splits = {}
    for name, (_, patient, split) in table.items():
        if not split:
            skipped["without a split"] += 1
        elif split == "train" and patient in tested:
            skipped["in train, of patients in test"] += 1
        else:
            splits[name] = split
    return splits


def load_radiographs(data, img_size, *, labels=None, levels="file", cache=None):
    """Radiographs of a folder, with labels of a CSV or of class folders; without both, phantoms."""
    if not data and not labels:
        return phantom_radiographs(img_size)
    if not data or not Path(data).is_dir():
        raise InputError("--data must be the folder that holds the images, and in which --labels "
                         f"names them, not {data}")
    files, skipped = find_files(data)
    if labels:
        rows = read_table(labels)
        table = {name: rows[name] for name in files if name in rows}
        skipped[f"without a row in {labels}"] = len(files) - len(table)
        print(f"{labels}: {len(rows) - len(table)} rows without a file")
    else:
        table = class_folders(files, skipped)
    splits = split_patients(table, skipped)
    names = list(splits)
    paths = [Path(data, name).absolute() for name in names]
    images, hashes, failed = decode_files(paths, img_size, levels, cache) if paths else ([], {}, {})
    skipped.update(f"unreadable ({reason})" for reason in failed.values())
    first = {}                                             # content: the row of its first file
    findings_of = collections.defaultdict(set)             # content: findings of all its files
    for row in sorted(hashes):
        first.setdefault(hashes[row], row)
        findings_of[hashes[row]] |= table[names[row]][0]
    skipped["equal to another image"] = len(hashes) - len(first)
    reasons = "; ".join(f"{n} {reason}" for reason, n in skipped.most_common() if n) or "nothing"
    if not first:
        raise InputError(f"--data {data} has no image to use (passed over: {reasons}): it needs "
                         "PNG, JPEG or DICOM files, and --labels paths below it")
    kept = list(first.values())
    if len(kept) < len(names):                             # decode these into a cache of their own
        images, again, _ = decode_files([paths[row] for row in kept], img_size, levels, cache)
        if list(first) != [again.get(i) for i in range(len(kept))]:
            raise InputError(f"files in {data} changed while they were read: start again")
    names = [names[row] for row in kept]
    patients = [table[name][1] for name in names]
    findings = sorted(set().union(*findings_of.values()))
    truth = np.array([[finding in findings_of[key] for finding in findings] for key in first], bool)
    test = np.array([splits[name] == "test" for name in names])
    print(f"{data}: {len(names)} images, {(~truth.any(1)).sum()} of them normal; passed over: "
          f"{reasons}")
    folders = sorted({Path(name).parent.name for name in names})
    print(f"findings by {labels or 'class folders'}: {', '.join(findings)}" if findings else
          f"no findings are known: all images count as normal, of the folders {folders[:5]}")
    unknown = sum(patient == name for patient, name in zip(patients, names))
    print(f"patients unknown: {unknown} images count as {unknown} people; name them with --labels"
          if unknown else f"{len(names)} images of {len(set(patients))} patients")
    print(f"{(~test).sum()} images to train on, {test.sum()} held out")
    return Radiographs(names, images, truth, findings, patients, list(first), np.flatnonzero(~test),
                       np.flatnonzero(test), np.zeros((len(names), 1, 1), bool))


# ---- Phantoms ------------------------------------------------------------------------------------

def edge(distance, blur):
    """A soft edge: 0 where distance < -blur (outside), 1 where distance > blur (inside)."""
    return np.clip(0.5 + 0.5 * distance / blur, 0, 1)


def ellipse(x, y, width, height, blur):
    """A soft-edged ellipse around x = y = 0 with these half axes: 1 inside, 0 outside."""
    return edge(width * (1 - np.hypot(x / width, y / height)), blur)


def radiograph(rng, size):
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
    drawn = [radiograph(np.random.default_rng((seed, i)), size) for i in range(n)]
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
def plot_restoration(file, afire, normal):
    """x, x', which tokens are hidden, and x' with these restored: images (B, 1, H, W)."""
    lesioned, mask = synthetic_lesion_mask(normal, torch.Generator().manual_seed(0))
    abnormal = abnormal_tokens(mask, afire.patch_size)                         # (B, L)
    restored = afire.decoder(afire.student["encoder"](normalise(lesioned)), abnormal)
    restored = (restored[:, 1:2] * 0.224 + 0.456).clamp(0, 1)  # one channel, no longer normalised
    hidden = unpatchify(abnormal.unsqueeze(2).expand(-1, -1, afire.patch_size ** 2),
                        afire.patch_size)                                      # (B, 1, H, W) bool
    columns = {"x": normal, "x' = x + M": lesioned,
               "hidden tokens": lesioned.masked_fill(hidden, 0),
               "hidden restored": torch.where(hidden, restored, lesioned)}
    plot_images(file, {title: images[:, 0].cpu().numpy() for title, images in columns.items()})


# ---- Command line --------------------------------------------------------------------------------

def main(argv=None):
    """python afire.py pretrain | eval: bad input ends in one sentence and status 2."""
    rank = int(os.environ.get("RANK", 0))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may have any bytes
    try:
        if rank >= int(os.environ.get("WORLD_SIZE", 1)):
            raise InputError(f"RANK is {rank} without a larger WORLD_SIZE: use torchrun")
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
        print("\nstopped: the same `pretrain` command resumes after the last whole epoch")
        sys.exit(130)


if __name__ == "__main__":
    main()
