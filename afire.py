#!/usr/bin/env python3
"""AFiRe: anatomy-driven self-supervised learning for fine-grained representation of radiographs.

A single-file reference implementation of Liu, He, Wen, Yang and Chen, AAAI 2025 (arXiv:2504.10972).
A Vision Transformer is pre-trained on *normal* chest radiographs only, by two tasks on tokens:
(I) the same position shows the same anatomy in every patient, so a token is contrasted with its
position's prototype; (II) synthetic lesions are added to the image, and must be restored away.

                         teacher (moving average of the student)
    x  normal ---------> encoder --E^T--> head --Q^T--> mean over images --> P --Sinkhorn--> C
    |                                                                        |               |
    + lesions M                                                        Task I: L_cate   L_stru
    |                                                                        |               |
    x' ----------------> encoder --E^S--> head --Q^S-------------------------+---------------+
                         student    |
                                    +--> tokens under M hidden --> decoder --> Task II: L_rest with x

    x, x'     normal radiograph, and the same with lesions          (B, 1, H, W) in [0, 1]
    M         synthetic lesion mask: what was added to x            (B, 1, H, W) in [0, 1]
    L         tokens, also called positions, of an image            (H / patch) * (W / patch)
    E^S, E^T  tokens of the student (of x') and the teacher (of x)  (B, 1 + L, D), class token first
    Q^S, Q^T  head outputs over K pseudo-clusters                   (B, L, K)
    P         spatial-aware prototypes: running mean of Q^T         (L, K)
    C         P after Sinkhorn-Knopp: soft assignment of positions  (L, K), rows sum to 1
    N, A      normal and abnormal tokens: M > 0 anywhere in a token's patch makes it abnormal

Where a docstring says [P] it follows the paper, [R] the authors' released code, [D] it is ours.
"""

import argparse
import concurrent.futures
import copy
import csv
import dataclasses
import hashlib
import json
import math
import re
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Synthetic lesion mask (Fig. 2, left)
# --------------------------------------------------------------------------------------------------

def otsu_threshold(levels):
    """The grey level that best splits an image into dark and bright (Otsu, 1979).

    levels (B, H, W) integers in 0..255 -> (B,) integers; bright is what lies above.
    """
    flat = levels.flatten(1)                                           # (B, N)
    counts = torch.zeros(len(flat), 256, device=flat.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype))
    below = counts.cumsum(1)                                           # pixels at or below a level
    grey = (counts * torch.arange(256, device=flat.device)).cumsum(1)  # and their sum of levels
    total, mean = below[:, -1:], grey[:, -1:] / below[:, -1:]
    between_classes = (mean * below - grey) ** 2 / (below * (total - below)).clamp_min(1)
    return between_classes.argmax(1)


def largest_region(bright, iterations=8):
    """The largest 8-connected region, for a whole batch at once: (B, H, W) bool -> the same.

    The pixels of a 2 x 2 block all touch, so a block is one node of the graph to be labelled.
    Each node points at a node of its region with a larger index. A round passes the largest
    pointer to the neighbours and to whom they pointed at, then follows the pointers twice, so
    that the reach doubles: 6 rounds were enough on 300 radiographs, and 8 on spirals.
    """
    B, H, W = bright.shape
    padded = F.pad(bright, (0, 2 + W % 2, 0, 2 + H % 2))     # a rim, so that nothing wraps around
    h, w = padded.shape[1] // 2, padded.shape[2] // 2
    blocks = padded.view(B, h, 2, w, 2)
    nw, ne, sw, se = blocks.permute(2, 4, 0, 1, 3).reshape(4, B, h, w)
    links = []
    for dy, dx, mine, theirs in ((0, 1, ne | se, nw | sw), (1, 0, sw | se, nw | ne),
                                 (1, 1, se, nw), (1, -1, sw, ne)):
        touch = mine & theirs.roll((-dy, -dx), (1, 2))
        links += [(-dy, -dx, touch), (dy, dx, touch.roll((dy, dx), (1, 2)))]

    pointer = torch.arange(h * w, device=bright.device).expand(B, -1)  # (B, nodes)
    for _ in range(iterations):
        grid = pointer.reshape(B, h, w)
        best = grid
        for dy, dx, touch in links:
            best = torch.maximum(best, grid.roll((dy, dx), (1, 2)) * touch)
        best = best.flatten(1)
        pointer = best.scatter_reduce(1, pointer, best, "amax")
        pointer = pointer.gather(1, pointer)
        pointer = pointer.gather(1, pointer)
    pixels = blocks.sum((2, 4)).flatten(1)                             # (B, nodes)
    size = torch.zeros_like(pixels).scatter_add_(1, pointer, pixels)
    largest = pointer == size.argmax(1, keepdim=True)
    return (blocks & largest.view(B, h, 1, w, 1)).reshape(B, 2 * h, 2 * w)[:, :H, :W]


def enclosing_circle_centre(region, iterations=100):
    """Centre of the smallest circle around a region: (B, H, W) bool -> (B, 2) as y, x in pixels.

    Badoiu and Clarkson (2003): walk towards the farthest point in ever smaller steps; 100 steps
    end within 2 px at 224. Only the first and last pixel of each row can be the farthest.
    """
    B, H, W = region.shape
    columns = torch.arange(W, device=region.device, dtype=torch.float)
    first = torch.where(region, columns, W).amin(2)                    # (B, H)
    last = torch.where(region, columns, -1).amax(2)
    rows = torch.arange(H, device=region.device, dtype=torch.float).expand(B, H)
    points = torch.stack([rows, first, rows, last], -1).view(B, 2 * H, 2)
    inside = region.any(2).repeat_interleave(2, 1).unsqueeze(2)        # (B, 2H, 1)
    centre = (points * inside).sum(1) / inside.sum(1).clamp_min(1)
    for i in range(2, iterations + 2):
        distance = ((points - centre.unsqueeze(1)) ** 2 * inside).sum(2)
        farthest = distance.argmax(1).view(B, 1, 1).expand(B, 1, 2)
        centre = centre + (points.gather(1, farthest).squeeze(1) - centre) / i
    return centre


def synthetic_lesion_mask(images, generator=None):
    """Adds 1 to 4 synthetic lesions to each image [P: Fig. 2; R: all numbers; D: what is clipped].

    A lesion is the image's own tissue under an elliptical Gaussian window, resized and added
    elsewhere. Unlike a crop or an affine transform, it leaves every position's anatomy in place.

    images (B, 1, H, W) in [0, 1]; generator draws the lesions, on its own device.
    Returns lesioned and mask, both (B, 1, H, W) in [0, 1]; lesioned == images where mask == 0.
    """
    B, _, H, W = images.shape
    device, grey = images.device, images.squeeze(1).float()
    scale = torch.tensor([H, W], device=device) / 224                  # all sizes below are at 224

    # The texture: a 60 x 60 crop around the centre of the largest bright region.
    levels = (grey * 255).round().long()
    region = largest_region(levels > otsu_threshold(levels).view(B, 1, 1))
    h, w = (60 * scale).round().clamp_min(1).int().tolist()
    limit = torch.tensor([H - h, W - w], device=device)
    corner = enclosing_circle_centre(region) - torch.tensor([h, w], device=device) / 2
    corner = torch.minimum(corner.round().long().clamp_min(0), limit)  # (B, 2)
    y = corner[:, :1] + torch.arange(h, device=device)                 # (B, h)
    x = corner[:, 1:] + torch.arange(w, device=device)                 # (B, w)
    texture = grey[torch.arange(B, device=device).view(B, 1, 1), y[:, :, None], x[:, None, :]]

    u, v = torch.linspace(-1, 1, h, device=device), torch.linspace(-1, 1, w, device=device)
    window = torch.exp(-(u[:, None] ** 2 + v ** 2) / 0.5)              # (h, w)
    window = (window - window.min()) / (window.max() - window.min()).clamp_min(1e-6)
    texture = 0.5 * window * texture                                   # (B, h, w)

    # Each lesion's height and width, then its place: all uniform.
    draws = torch.rand(B, 4, 5, generator=generator, device=generator and generator.device)
    draws = draws.to(device)
    exists = torch.arange(4, device=device) <= (draws[:, :1, 4] * 4).floor()  # 1 to 4 of 4
    smallest, largest = (16 * scale).round().clamp_min(1), (128 * scale).round().clamp_min(1)
    size = smallest + (draws[:, :, 0:2] * (largest - smallest + 1)).floor()   # (B, 4, 2)
    place = (draws[:, :, 2:4] * (torch.tensor([H, W], device=device) - size + 1)).floor()

    # Bilinear resizing is linear in rows and in columns, so a lesion is R_y T R_x^T, and the sum
    # over lesions is one matrix product.
    def resize_and_place(length, source, size, place):
        """-> (B, 4, length, source): which source pixels make up each pixel along one axis."""
        pixel = torch.arange(length, device=device) - place.unsqueeze(2)      # (B, 4, length)
        size = size.unsqueeze(2)
        position = ((pixel + 0.5) * source / size - 0.5).clamp(0, source - 1)
        offset = position.unsqueeze(3) - torch.arange(source, device=device)
        inside = ((pixel >= 0) & (pixel < size)).unsqueeze(3)
        return (1 - offset.abs()).clamp_min(0) * inside

    rows = resize_and_place(H, h, size[..., 0], place[..., 0]) * exists.view(B, 4, 1, 1)
    columns = resize_and_place(W, w, size[..., 1], place[..., 1])
    mask = torch.einsum("bnyi,bij,bnxj->byx", rows, texture, columns).clamp(0, 1)
    mask = torch.where(mask < 1 / 255, 0, mask).unsqueeze(1)
    lesioned = torch.maximum(images, (images + mask).clamp_max(235 / 255))
    return lesioned, mask

# --------------------------------------------------------------------------------------------------
# Vision Transformer (names and arithmetic as timm's, positions as MAE's)
# --------------------------------------------------------------------------------------------------

def patchify(images, patch_size):
    """(B, C, H, W) -> (B, L, C * p * p), row by row."""
    return F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)


def unpatchify(patches, patch_size):
    """(B, L, C * p * p) -> (B, C, H, W): the inverse of patchify, for square images."""
    side = math.isqrt(patches.shape[1])
    return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (side, side)), patch_size)


def abnormal_tokens(mask, patch_size):
    """A patch is abnormal if it holds any lesion [R]: (B, 1, H, W) -> (B, L) bool."""
    return patchify(mask, patch_size).amax(2) > 0


def sincos_positions(side, dim):
    """Fixed sine-cosine positions as in MAE: -> (1, 1 + side * side, dim), zero for the class token.

    The first half of the channels tells the column, the second half the row.
    """
    frequency = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency       # (side, dim / 4)
    wave = torch.cat([angle.sin(), angle.cos()], 1)                            # (side, dim / 2)
    column = wave.expand(side, side, -1)                                       # varies along axis 1
    grid = torch.cat([column, column.transpose(0, 1)], 2).flatten(0, 1)
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
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.attn.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


def init_weights(module):
    """As in MAE: Xavier for linear layers and for the patch embedding, seen as one."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)


class ViT(nn.Module):
    """Vision Transformer: (B, C, H, W) -> (B, 1 + L, D), the class token first [R: ViT-B/16].

    Its state dict is timm's, with or without the other's positions.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12,
                 num_heads=12):
        super().__init__()
        self.patch_size, self.num_patches = patch_size, (img_size // patch_size) ** 2
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(img_size // patch_size, embed_dim), False)
        self.blocks = nn.Sequential(*[Block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)                # (B, L, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.norm(self.blocks(x))                                       # (B, 1 + L, D)


class Decoder(nn.Module):
    """Restores the normal image from tokens, without those at abnormal places [P: Fig. 2; R].

    tokens (B, 1 + L, D) of the encoder, abnormal (B, L) bool -> (B, C, H, W).
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, encoder_dim=768, embed_dim=512,
                 depth=8, num_heads=16):
        super().__init__()
        self.patch_size = patch_size
        side = img_size // patch_size
        self.embedding = nn.Linear(encoder_dim, embed_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, side * side, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(side, embed_dim), False)
        self.blocks = nn.Sequential(*[Block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.image_pred = nn.Linear(embed_dim, in_chans * patch_size ** 2)
        self.apply(init_weights)

    def forward(self, tokens, abnormal):
        x = self.embedding(tokens)                                             # (B, 1 + L, d)
        hidden = F.pad(abnormal, (1, 0)).unsqueeze(2)                          # never the class token
        x = torch.where(hidden, F.pad(self.mask_token, (0, 0, 1, 0)).to(x.dtype), x)
        x = self.norm(self.blocks(x + self.pos_embed))
        return unpatchify(self.image_pred(x[:, 1:]), self.patch_size)

# --------------------------------------------------------------------------------------------------
# Projection head and spatial-aware prototypes (Fig. 3)
# --------------------------------------------------------------------------------------------------

class AnatomyHead(nn.Module):
    """Tokens -> cosine scores of K pseudo-clusters, with own clusters for each position [R].

    (B, L, D) -> (B, L, K) in [-1, 1]. The last layer of position j is weight-normalised with norm
    1, so a score is the cosine between the token and one of position j's K directions.
    """

    def __init__(self, in_dim, num_patches, out_dim=256, hidden_dim=1024, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim))
        self.last_layers = nn.Parameter(torch.randn(num_patches, out_dim, bottleneck_dim))
        self.mlp.apply(init_weights)

    def forward(self, tokens):
        z = F.normalize(self.mlp(tokens), dim=2)                               # (B, L, d)
        directions = F.normalize(self.last_layers, dim=2)                      # (L, K, d)
        return torch.einsum("bld,lkd->blk", z, directions)


def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Sinkhorn-Knopp: scores -> soft assignment that uses all clusters alike [R; as in SwAV].

    (L, K) -> (L, K): rows sum to 1, columns nearly to L / K. In the logarithm, so that no score
    is too large; the constants 1/K and 1/L of the original cancel in the next normalisation.
    """
    log_c = scores.float() / epsilon
    for _ in range(iterations):
        log_c = log_c - log_c.logsumexp(0, keepdim=True)
        log_c = log_c - log_c.logsumexp(1, keepdim=True)
    return log_c.exp()


class SpatialPrototypes(nn.Module):
    """P, one prototype for each position: the running mean of the teacher's scores there [P, R]."""

    def __init__(self, num_patches, out_dim, momentum=0.75):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("prototypes", torch.zeros(num_patches, out_dim))  # (L, K)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, teacher_logits, momentum=None):
        """P <- m P + (1 - m) mean over the images of all devices; the first update copies it.

        teacher_logits (B, L, K); momentum None takes the constructor's.
        """
        mean = teacher_logits.float().mean(0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        momentum = self.momentum if momentum is None else momentum
        self.prototypes.lerp_(mean, torch.where(self.updates > 0, 1 - momentum, 1.0))
        self.updates += 1

    @torch.no_grad()
    def assignment(self):
        """C (L, K)."""
        return sinkhorn(self.prototypes)

# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------

def structure_consistency_loss(logits, assignment, abnormal, temperature=0.1):
    """L_stru: every normal token predicts the cluster assignment of its position [P, R].

        - 1 / |N|  sum over normal (i, j), sum over k of  C_jk log softmax(Q^S_ij / temperature)_k

    logits (B, L, K), assignment (L, K), abnormal (B, L) bool -> scalar; 0 without normal tokens.
    """
    cross_entropy = -(assignment * F.log_softmax(logits.float() / temperature, 2)).sum(2)
    normal = ~abnormal
    return torch.where(normal, cross_entropy, 0).sum() / normal.sum().clamp_min(1)


def restoration_loss(restored, target):
    """L_rest: mean squared error over all pixels, lesions or not [R]. Any equal shapes -> scalar."""
    return F.mse_loss(restored.float(), target.float())


def category_consistency_loss(logits, prototypes, abnormal, temperature=0.1):
    """L_cate"""
    similarity = F.cosine_similarity(logits.float(), prototypes, dim=2) / temperature   # (B, L)
    negatives = similarity.masked_fill(~abnormal, -math.inf).logsumexp(0) - abnormal.sum(0).log()
    both = abnormal.any(0) & (~abnormal).any(0)                                # (L,)
    negatives = torch.where(both, negatives, 0)
    use = ~abnormal & both
    loss = F.softplus(negatives - similarity)
    return torch.where(use, loss, 0).sum() / use.sum().clamp_min(1)

# --------------------------------------------------------------------------------------------------
# AFiRe (Fig. 2, whole)
# --------------------------------------------------------------------------------------------------

class AFiRe(nn.Module):
    """Student (encoder, head), its slow average the teacher, decoder and prototypes, in training.

    normal, lesioned, mask: (B, 1, H, W) in [0, 1], the last two from synthetic_lesion_mask.
    weights are those of L_stru, L_cate and L_rest in the total [R: 1 each].
    """

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12,
                 out_dim=256, head_hidden_dim=1024, decoder_dim=512, decoder_depth=8,
                 decoder_heads=16, weights=(1.0, 1.0, 1.0)):
        super().__init__()
        encoder = ViT(img_size, patch_size, 3, embed_dim, depth, num_heads)
        head = AnatomyHead(embed_dim, encoder.num_patches, out_dim, head_hidden_dim)
        self.student = nn.ModuleDict({"encoder": encoder, "head": head})
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.decoder = Decoder(img_size, patch_size, 3, embed_dim, decoder_dim, decoder_depth,
                               decoder_heads)
        self.prototypes = SpatialPrototypes(encoder.num_patches, out_dim)
        self.patch_size, self.weights = patch_size, weights
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), False)

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def normalise(self, images):
        """(B, 1, H, W) in [0, 1] -> (B, 3, H, W): three equal channels, ImageNet's statistics [R]."""
        return (images - self.mean) / self.std

    def forward(self, normal, lesioned, mask, prototype_momentum=None):
        x, x_lesioned = self.normalise(normal), self.normalise(lesioned)
        abnormal = abnormal_tokens(mask, self.patch_size)                      # (B, L)

        with torch.no_grad():
            teacher_tokens = self.teacher.encoder(x)                           # (B, 1 + L, D)
            if self.training:
                teacher_logits = self.teacher.head(teacher_tokens[:, 1:])      # (B, L, K)
                self.prototypes.update(teacher_logits, prototype_momentum)
        tokens = self.student.encoder(x_lesioned)                              # (B, 1 + L, D)
        logits = self.student.head(tokens[:, 1:])                              # (B, L, K)
        restored = self.decoder(tokens, abnormal)                              # (B, 3, H, W)

        losses = {
            "structure": structure_consistency_loss(logits, self.prototypes.assignment(), abnormal),
            "category": category_consistency_loss(logits, self.prototypes.prototypes, abnormal),
            "restoration": restoration_loss(restored, x)}
        total = sum(weight * loss for weight, loss in zip(self.weights, losses.values()))
        return {"loss": total, **losses}

    @torch.no_grad()
    def features(self, images):
        """What to use downstream [R]: the teacher's tokens, (B, 1, H, W) in [0, 1] -> (B, L, D)."""
        return self.teacher.encoder(self.normalise(images))[:, 1:]

    @torch.no_grad()
    def restore(self, images):
        """Restores each token from the others: (B, 1, H, W) in [0, 1] -> (B, 3, H, W) normalised.

        Four complementary masks in turn, each hiding one token of every 2 x 2 from the decoder [D].
        """
        tokens = self.student.encoder(self.normalise(images))                  # (B, 1 + L, D)
        place = torch.arange(tokens.shape[1] - 1, device=tokens.device)        # (L,)
        side = math.isqrt(len(place))
        turn = 2 * (place // side % 2) + place % side % 2
        restored = 0
        for each in range(4):
            hidden = turn == each
            patches = patchify(self.decoder(tokens, hidden.expand(len(tokens), -1)), self.patch_size)
            restored = restored + patches * hidden.view(1, -1, 1)
        return unpatchify(restored, self.patch_size)                           # (B, 3, H, W)

    @torch.no_grad()
    def update_teacher(self, momentum):
        """theta^T <- m theta^T + (1 - m) theta^S, for the encoder and the head [R]."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()),
                             1 - momentum)

# --------------------------------------------------------------------------------------------------
# Data: files, labels, boxes (all of it ours)
# --------------------------------------------------------------------------------------------------

class InputError(Exception):
    """Bad input or a bad option, in one sentence with the remedy; the command line exits with 2."""


@dataclasses.dataclass
class Radiographs:
    """n images and what is known of them."""
    names: list           # n names, as the list or the labels have them,
    paths: list           # and where the files are
    images: np.ndarray    # (n, 1, S, S) uint8, memory-mapped if they come from files
    labels: np.ndarray    # (n, F) bool; None if nothing is known
    findings: list        # F names
    train: np.ndarray     # indices of the images to train and to fit on,
    test: np.ndarray      # and of those held out; unreadable ones are in neither
    masks: dict           # index -> (S, S) bool: where the findings are, for those where it is known

    def normal(self):
        """(n,) bool: the images without findings; all of them if nothing is known."""
        return np.ones(len(self.names), bool) if self.labels is None else ~self.labels.any(1)


def is_normal(name):
    """Does a folder or a label called this mean "no finding"?"""
    return re.sub("[^a-z]", "", name.lower()) in ("", "normal", "nofinding", "nofindings", "healthy")


def read_csv(file, columns):
    """-> a dictionary a line, after a check that the columns are there."""
    with open(file, newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
    missing = set(columns) - set(reader.fieldnames or [])
    if missing:
        raise InputError(f"{file} lacks the column {min(missing)!r}: it needs {', '.join(columns)}")
    return rows


def read_list(file):
    """The field's lists, `relative/path 0 1 0 ...`: -> names, and a set of findings for each."""
    chestxray14 = "Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia " \
        "Pneumothorax Consolidation Edema Emphysema Fibrosis Pleural_Thickening Hernia".split()
    names, told, width = [], [], None
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            name, flags = re.fullmatch(r"\s*(.*?\S)((?:\s+[01])*)\s*", line).groups()
            flags = flags.split()
            width = len(flags) if width is None else width
            if len(flags) != width:
                raise InputError(f"{file}, line {number} has {len(flags)} labels, the first line has "
                                 f"{width}: give every line the same number of zeros and ones")
            called = chestxray14 if width == 14 else [f"finding_{i + 1}" for i in range(width)]
            names.append(name)
            told.append({finding for finding, flag in zip(called, flags) if flag == "1"})
    return names, told if width else None


def find_images(data, root, labels):
    """What --data, --root, --labels name: -> names, paths, a set of findings each or None, patients."""
    told, patients = None, {}
    if data.is_file():
        names, told = read_list(data)
        paths = [Path(root or data.parent) / name for name in names]
    elif data.is_dir():
        suffixes = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
        paths = sorted(path for path in data.rglob("*") if path.suffix.lower() in suffixes)
        names = [path.relative_to(data).as_posix() for path in paths]
        classes = [Path(name).parent.name for name in names]
        if any(is_normal(each) for each in set(classes) - {""}):
            told = [set() if is_normal(each) else {each} for each in classes]
    else:
        raise InputError(f"--data {data} is neither a folder of images nor a list of them")
    if labels:
        rows = {row["image"]: row for row in read_csv(labels, ["image", "findings"])}
        rows = [rows.get(name) or rows.get(Path(name).name) for name in names]
        known = [i for i, row in enumerate(rows) if row]
        print(f"{labels} has labels for {len(known)} of {len(names)} images; the others are left out")
        names, paths = [names[i] for i in known], [paths[i] for i in known]
        told = [{f.strip() for f in rows[i]["findings"].split("|") if not is_normal(f)} for i in known]
        patients = {names[k]: rows[i].get("patient") for k, i in enumerate(known)}
    if not names:
        raise InputError(f"--data {data} names no PNG, JPEG, BMP or TIFF image"
                         + (f" that has a line in {labels}" if labels else ""))
    return names, paths, told, patients


def is_test(names, patients, fraction):
    """The folder test where there are train and test, else a fixed part of the patients: (n,) bool.

    A patient who is not told is guessed from the file's name up to the first underscore after a
    number: 00000001_000.png of ChestX-ray14, person1_virus_6.jpeg of Kermany et al.
    """
    splits = [Path(name).parts[0].lower() for name in names]
    if {"train", "test"} <= set(splits):
        return np.array([split == "test" for split in splits])
    keys = [patients.get(name) or re.sub(r"(\d)_.*", r"\1", Path(name).name) for name in names]
    return np.array([zlib.crc32(key.encode()) % 1000 < 1000 * fraction for key in keys])


def read_image(path, size):
    """One file -> (size, size) uint8, squashed; 16 bits and more by their own minimum and maximum."""
    with Image.open(path) as image:
        if image.mode[0] in "IF":
            pixels = np.asarray(image, np.float32)
            low, high = float(pixels.min()), float(pixels.max())
            if not math.isfinite(high - low):
                raise ValueError("not all of its pixels are finite")
            image = Image.fromarray((pixels - low) * (255 / max(high - low, 1e-6)))
        else:
            image.draft("L", (size, size))        # a large JPEG is decoded at a fraction of its size
            image = image.convert("L")
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    return pixels.round().clip(0, 255).astype(np.uint8)


def cached_images(paths, size, cache):
    """Files decoded once, in parallel: -> (n, 1, size, size) uint8, memory-mapped; readable (n,).

    The cache is known by the files' names, sizes and times and by the image size.
    """
    facts = [(str(path.absolute()), *path.stat()[6:9:2]) if path.is_file() else str(path)
             for path in paths]                                        # [6:9:2]: size, time
    file = cache / (hashlib.sha256(repr((size, facts)).encode()).hexdigest()[:16] + ".npy")
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        images = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(paths), 1, size, size))
        readable = np.ones(len(paths), bool)

        def decode(i):
            try:
                images[i, 0] = read_image(paths[i], size)
            except Exception:                     # every format's decoder fails in its own ways
                readable[i] = False

        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(tqdm(pool.map(decode, range(len(paths))), "decode", len(paths), unit="image"))
        images.flush()
        np.save(file.with_suffix(".readable.npy"), readable)
        partial.rename(file)
    return np.load(file, mmap_mode="r"), np.load(file.with_suffix(".readable.npy"))


def load_radiographs(args, for_training):
    """The images that --data names, or phantoms -> Radiographs.

    for_training leaves only those of the training split without findings.
    """
    if args.data:
        names, paths, told, patients = find_images(Path(args.data), args.root, args.labels)
        findings = sorted(set().union(*told)) if told else []
        labels = told and np.array([[f in each for f in findings] for each in told], bool)
        test = is_test(names, patients, args.test_fraction)
    else:
        images, labels, truth, findings = phantoms(2500, args.img_size)
        names = paths = [f"phantom {i}" for i in range(len(images))]
        test = np.arange(len(images)) >= round((1 - args.test_fraction) * len(images))
    abnormal = np.zeros(len(names), bool) if labels is None else labels.any(1)
    chosen = np.arange(len(names))
    if for_training:
        chosen = np.flatnonzero(~test & ~abnormal)
        print(f"{len(chosen)} images to pre-train on, left out are {(abnormal & ~test).sum()} with "
              f"findings and {test.sum()} held out for testing"
              + ("; nothing is known of findings, all count as normal" if labels is None else ""))
        if len(chosen) == 0:
            raise InputError("--data holds no image without findings to pre-train on: AFiRe learns "
                             "from normal images; add some, or lower --test-fraction")
    readable, masks = np.ones(len(chosen), bool), {}
    if args.data:
        paths = [paths[i] for i in chosen]
        images, readable = cached_images(paths, args.img_size, Path(args.cache or f"{args.out}/cache"))
        failed = [str(path) for path, good in zip(paths, readable) if not good]
        if failed:
            print(f"{len(failed)} of {len(paths)} files are left out, as they cannot be read: "
                  + ", ".join(failed[:9]) + (", ..." if len(failed) > 9 else ""))
        if len(failed) == len(paths):
            raise InputError(f"--data {args.data}: none of the files is a readable image")
    else:
        images, masks = images[chosen], {int(i): truth[i].any(0) for i in np.flatnonzero(abnormal)}
    return Radiographs([names[i] for i in chosen], paths, images,
                       None if labels is None else labels[chosen], findings,
                       np.flatnonzero(~test[chosen] & readable),
                       np.flatnonzero(test[chosen] & readable), masks)


def read_boxes(file, data):
    """Boxes of findings, in pixels of the image: -> {index: (S, S) bool} for Radiographs."""
    index = {key: i for i, name in enumerate(data.names) for key in (Path(name).name, name)}
    masks, side = {}, data.images.shape[-1]
    for row in read_csv(file, ["image", "finding", "x", "y", "w", "h"]):
        i = index.get(row["image"])
        if i is not None:
            with Image.open(data.paths[i]) as image:
                scale = side / np.array(image.size)
            corner = np.array([float(row["x"]), float(row["y"])]) * scale
            end = corner + np.array([float(row["w"]), float(row["h"])]) * scale
            (left, top), (right, bottom) = corner.round().astype(int).clip(0), end.round().astype(int)
            masks.setdefault(i, np.zeros((side, side), bool))[top:bottom, left:right] = True
    return masks

# --------------------------------------------------------------------------------------------------
# Data: phantoms (D)
# --------------------------------------------------------------------------------------------------

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
    density += 0.2 * fluid - draw(0.62, 0.76) * air - free * (0.08 - 0.3 * collapsed)
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
    density *= 1 + draw(-0.15, 0.15) * np.sin(draw(-2, 2) * x + draw(-2, 2) * y + draw(0, 6))
    film = (1 - np.exp(-draw(1.2, 2.4) * np.maximum(density, 0))) ** draw(1, 1.9)
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

# --------------------------------------------------------------------------------------------------
# Pre-training
# --------------------------------------------------------------------------------------------------

def build_model(args):
    """The AFiRe that the options describe; its initial weights depend on --seed alone."""
    embed_dim, depth, num_heads = {
        "vit_micro": (128, 4, 2), "vit_tiny": (192, 12, 3),
        "vit_small": (384, 12, 6), "vit_base": (768, 12, 12)}[args.arch]
    torch.manual_seed(args.seed)
    return AFiRe(args.img_size, args.patch_size, embed_dim, depth, num_heads, args.out_dim,
                 args.head_dim, args.decoder_dim, args.decoder_depth, args.decoder_dim // 32,
                 (args.structure_weight, args.category_weight, args.restoration_weight))


def to_device(images, device):
    """uint8 array (B, 1, S, S) -> float tensor in [0, 1] on the device, without waiting for it."""
    batch = torch.from_numpy(np.ascontiguousarray(images))
    if device.type == "cuda":
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=True).float() / 255


def cosine(start, end, progress):
    """From start to end along half a cosine, for progress from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def pretrain(args):
    """Trains in the folder args.out, and goes on from the checkpoint there if there is one.

    All that is random is a function of (seed, step), so that a resumed run equals an unbroken one.
    """
    device, out = torch.device(args.device), Path(args.out)
    ckpt, log_file = out / "checkpoint.pth", out / "log.jsonl"
    config = {key: value for key, value in vars(args).items()
              if key not in ("verb", "device", "cache", "out")}
    checkpoint, start, records = None, 0, []
    if ckpt.exists():
        checkpoint = torch.load(ckpt, map_location="cpu", weights_only=True)
        start = checkpoint["epoch"]
        changed = [key for key in config if config[key] != checkpoint["config"].get(key)]
        if changed:
            raise InputError(f"{out} holds a run with another --{changed[0].replace('_', '-')}, "
                             f"{checkpoint['config'].get(changed[0])}: repeat it to go on with that "
                             "run, or name another --out")
        records = [json.loads(line) for line in log_file.read_text().splitlines()[:start]]
        print(f"{out} is at epoch {start} of {args.epochs}: going on from there")

    data = load_radiographs(args, for_training=True)
    model = build_model(args).to(device).train()
    if args.init:
        weights = load_encoder(args.init, args.img_size).state_dict()
        for network in model.student, model.teacher:
            network.encoder.load_state_dict(weights)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim == 1]}])           # biases and norms: no decay
    amp = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2))

    batch_size = min(args.batch_size, len(data.train))
    per_epoch = len(data.train) // batch_size
    total, warmup = args.epochs * per_epoch, args.warmup_epochs * per_epoch
    peak_lr = args.lr * batch_size / 256
    bar = tqdm(total=total, initial=start * per_epoch, unit="step", mininterval=1)
    for epoch in range(start, args.epochs):
        order = np.random.default_rng((args.seed, epoch)).permutation(data.train)
        sums = torch.zeros(4, device=device)                           # of the losses, this epoch
        for i in range(per_epoch):
            step = epoch * per_epoch + i
            lr = (peak_lr * (step + 1) / warmup if step < warmup else
                  cosine(peak_lr, 1e-6, (step - warmup) / (total - warmup)))
            decay = cosine(args.weight_decay, args.weight_decay_end, step / total)
            for group, weight_decay in zip(optimizer.param_groups, (decay, 0)):
                group.update(lr=lr, weight_decay=weight_decay)

            generator = torch.Generator().manual_seed(args.seed * 2 ** 40 + step)
            rows = np.sort(order[i * batch_size:(i + 1) * batch_size])
            normal = to_device(data.images[rows], device)
            lesioned, mask = synthetic_lesion_mask(normal, generator)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                losses = model(normal, lesioned, mask, 0.0 if epoch == 0 else None)
            optimizer.zero_grad()
            scaler.scale(losses["loss"]).backward()
            if epoch == 0:
                model.student.head.last_layers.grad = None             # frozen at first, as in DINO
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, 3.0)
            scaler.step(optimizer)
            scaler.update()
            model.update_teacher(cosine(args.teacher_momentum, 1.0, step / total))

            sums += torch.stack([loss.detach() for loss in losses.values()])
            bar.update()
            if step % 10 == 0 or i == per_epoch - 1:                   # seldom: it waits for the GPU
                means = dict(zip(losses, (sums / (i + 1)).tolist()))
                bar.set_postfix({name: f"{means[name]:.3f}" for name in means if name != "loss"})
                if not math.isfinite(means["loss"]):
                    bar.close()
                    sys.exit(f"afire.py: the loss is no longer finite at step {step}, {bar.postfix}; "
                             f"{ckpt} of epoch {epoch} stays. Try a lower --lr or --amp none, with "
                             "another --out (and --init to start from that checkpoint)")
        records.append({"epoch": epoch + 1, **means, "lr": lr})
        log_file.write_text("".join(json.dumps(record) + "\n" for record in records))
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(), "epoch": epoch + 1, "config": config},
                   ckpt.with_suffix(".tmp"))
        ckpt.with_suffix(".tmp").replace(ckpt)
    bar.close()
    torch.save(model.teacher.encoder.state_dict(), out / "encoder.pth")
    plot_losses(records, out / "losses.png")
    plot_restoration(model.eval(), to_device(data.images[data.train[:6]], device),
                     out / "restoration.png")
    print(f"in {out}: checkpoint.pth, encoder.pth (the teacher's), restoration.png, losses.png")


def load_encoder(path, img_size=None):
    """The encoder of a checkpoint, as a ViT: the teacher's of ours and of the release, or a timm, MAE
    or DINO ViT. Positions are interpolated where img_size asks for another grid.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):       # DINO keeps its options so
        state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "teacher", "state_dict", "student"):
        state = state[key] if isinstance(state.get(key), dict) else state
    state = {key.removeprefix("module."): value for key, value in state.items()}
    for prefix in ("teacher.encoder.", "encoder.", "backbone.", ""):
        found = {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}
        if "patch_embed.proj.weight" in found:
            break
    else:
        raise InputError(f"{path} holds no ViT: there is no patch_embed.proj.weight in it")
    dim, in_chans, _, patch_size = found["patch_embed.proj.weight"].shape
    side = math.isqrt(found["pos_embed"].shape[1] - 1)
    depth = 1 + max(int(key.split(".")[1]) for key in found if key.startswith("blocks."))
    vit = ViT(img_size or side * patch_size, patch_size, in_chans, dim, depth, max(1, dim // 64))
    if vit.num_patches != side * side:
        grid = found["pos_embed"][:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=math.isqrt(vit.num_patches), mode="bicubic")
        grid = grid.flatten(2).transpose(1, 2)
        found["pos_embed"] = torch.cat([found["pos_embed"][:, :1], grid], 1)
    missing, _ = vit.load_state_dict(found, strict=False)
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing[:3])} of a ViT with {depth} blocks")
    return vit

# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------

def detection(scores, labels, weights=None):
    """Area under the ROC curve, average precision, best Dice over all thresholds; NaN with one class.

    scores (n,), labels (n,) bool, weights (n,) or None for ones. Equal scores count together.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, bool)
    weights = np.ones(len(scores)) if weights is None else weights
    _, rank = np.unique(-scores, return_inverse=True)                  # the highest score first
    positive, total = np.bincount(rank, weights * labels), np.bincount(rank, weights)
    hits, called, negative = positive.cumsum(), total.cumsum(), total - positive
    if hits[-1] == 0 or negative.sum() == 0:
        return {"auroc": math.nan, "ap": math.nan, "dice": math.nan}
    share = positive / hits[-1]                                        # of positives at each score
    below = 1 - (negative.cumsum() - negative / 2) / negative.sum()    # of negatives, ties by half
    return {"auroc": float((share * below).sum()),
            "ap": float((share * hits / called.clip(1e-12)).sum()),
            "dice": float((2 * hits / (called + hits[-1])).max())}


def auroc(scores, labels):
    """The chance that a positive scores above a negative, ties counting half: -> float."""
    return detection(scores, labels)["auroc"]


def linear_probe(train_x, train_y, test_x, penalty=10.0):
    """Logistic regression on standardised features, one for each finding: -> scores (T, F).

    train_x (n, D), train_y (n, F) bool, test_x (T, D); penalty is scikit-learn's 1 / C. A finding
    with only one class in train_y scores NaN.
    """
    mean, std = train_x.mean(0), train_x.std(0, correction=0) + 1e-6
    x, y = (train_x - mean) / std, torch.from_numpy(train_y).to(train_x.dtype)
    weight, bias = (torch.zeros(d, y.shape[1], dtype=x.dtype, requires_grad=True)
                    for d in (x.shape[1], 1))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weight + bias, y, reduction="sum")
        loss = (loss + penalty / 2 * (weight ** 2).sum()) / len(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    scores = ((test_x - mean) / std @ weight + bias).detach().numpy()
    scores[:, train_y.all(0) | ~train_y.any(0)] = math.nan
    return scores


def evaluate_probe(features, data, fraction, draws=5, resamples=200):
    """The probe on a fraction of the training labels: macro AUROC, its interval, each finding's.

    features (n, D). Below 1, the mean over random draws of that fraction; the interval is a
    bootstrap over test images and draws.
    """
    random, test_y, scores = np.random.default_rng(0), data.labels[data.test], []
    for _ in range(draws if fraction < 1 else 1):
        rows = random.permutation(data.train)[:max(2, round(fraction * len(data.train)))]
        scores.append(linear_probe(features[rows], data.labels[rows], features[data.test]))

    def aurocs(draws, weights=None):
        """(draws, F); NaN where a finding lacks a class."""
        return np.array([[detection(s, y, weights)["auroc"] if np.isfinite(s[0]) else math.nan
                          for s, y in zip(scores[draw].T, test_y.T)] for draw in draws])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                # the mean of nothing is NaN
        per_finding = np.nanmean(aurocs(range(len(scores))), 0)
        uniform = np.full(len(test_y), 1 / len(test_y))
        samples = [np.nanmean(aurocs(random.choice(len(scores), len(scores)),
                                     random.multinomial(len(test_y), uniform)))
                   for _ in range(resamples)]
        return {"macro_auroc": float(np.nanmean(per_finding)),
                "ci95": np.nanquantile(samples, [0.025, 0.975]).tolist(),
                "per_finding": dict(zip(data.findings, per_finding.tolist()))}


def silhouette(points, cluster):
    """Mean silhouette (Rousseeuw, 1987): points (N, D), cluster (N,) integers -> -1 to 1."""
    distance = torch.cdist(points, points)
    member = F.one_hot(cluster).to(points.dtype)                       # (N, clusters)
    size = member.sum(0)
    mean = distance @ member / size                                    # to the points of a cluster
    own = mean.gather(1, cluster[:, None])[:, 0] * (size / (size - 1).clamp_min(1))[cluster]
    other = mean.masked_fill(member.bool(), math.inf).amin(1)
    score = (other - own) / torch.maximum(own, other).clamp_min(1e-12)
    return float(torch.where(size[cluster] > 1, score, 0).mean())


class AnomalyScores:
    """Maps of how abnormal each place looks, from normal images alone [D]: higher is more abnormal.

    restoration: the squared error of a token's pixels, restored from the other tokens;
    prototype:   the surprise of a token under its position's prototype, as in L_stru;
    position:    the Mahalanobis distance of a token to the normal tokens of its position.
    """

    @torch.no_grad()
    def __init__(self, model, batches, shrinkage=0.1):
        """Fits a Gaussian to each position; batches yields normal images (B, 1, S, S) in [0, 1]."""
        self.model, n, total, square = model, 0, 0.0, 0.0
        for images in batches:
            tokens = model.features(images)                                    # (B, L, D)
            n, total = n + len(tokens), total + tokens.sum(0)
            square = square + torch.einsum("bld,ble->lde", tokens, tokens)
        self.mean = total / n                                                  # (L, D)
        covariance = square / n - self.mean[:, :, None] * self.mean[:, None]   # (L, D, D)
        spread = covariance.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
        eye = torch.eye(covariance.shape[1], device=covariance.device)
        shrunk = (1 - shrinkage) * covariance + (shrinkage * spread + 1e-6) * eye
        self.precision = torch.linalg.inv(shrunk)

    @torch.no_grad()
    def __call__(self, images):
        """(B, 1, S, S) in [0, 1] -> a dictionary of maps (B, S, S)."""
        model = self.model
        tokens = model.features(images)                                        # (B, L, D)
        error = (model.restore(images) - model.normalise(images)) ** 2
        log_q = F.log_softmax(model.teacher.head(tokens) / 0.1, 2)
        centred = tokens - self.mean
        maps = {"restoration": patchify(error, model.patch_size).mean(2),
                "prototype": -(model.prototypes.assignment() * log_q).sum(2),
                "position": torch.einsum("bld,lde,ble->bl", centred, self.precision, centred)}
        side = math.isqrt(tokens.shape[1])
        return {name: F.interpolate(each.view(-1, 1, side, side), size=images.shape[-2:],
                                    mode="bilinear").squeeze(1) for name, each in maps.items()}


def evaluate_anomaly(score_maps, batches):
    """Detection by each score -> {score: {image_auroc, image_ap, pixel_auroc, pixel_ap, dice}}.

    batches yields images (B, 1, S, S), abnormal (B,) bool, masks (B, S, S) bool, and located (B,)
    bool: whether the mask is known; other images count at the image level only. An image scores
    the mean of the highest twentieth of its map.
    """
    found = {}
    for images, abnormal, masks, located in batches:
        for name, maps in score_maps(images).items():
            image_scores = maps.flatten(1).topk(maps[0].numel() // 20 + 1).values.mean(1)
            found.setdefault(name, []).append((
                image_scores.cpu().numpy(), abnormal,
                maps.cpu().numpy()[located].ravel(), masks[located].ravel()))
    report = {}
    for name, parts in found.items():
        of_images, image_truth, of_pixels, pixel_truth = map(np.concatenate, zip(*parts))
        image, pixel = detection(of_images, image_truth), detection(of_pixels, pixel_truth)
        report[name] = {"image_auroc": image["auroc"], "image_ap": image["ap"],
                        "pixel_auroc": pixel["auroc"], "pixel_ap": pixel["ap"],
                        "dice": pixel["dice"]}
    return report


def evaluate_model(model, data, device, batch_size):
    """All figures of one model -> what metrics.json holds of it, and its AnomalyScores."""
    model.eval()
    normal = data.normal()

    def batches(rows):
        for i in range(0, len(rows), batch_size):
            yield rows[i:i + batch_size], to_device(data.images[rows[i:i + batch_size]], device)

    def real_findings():
        for rows, images in batches(data.test):
            masks = np.stack([data.masks.get(i, np.zeros(images.shape[-2:], bool))
                              for i in rows.tolist()])
            yield images, ~normal[rows], masks, normal[rows] | np.isin(rows, list(data.masks))

    def synthetic_lesions():
        generator = torch.Generator().manual_seed(0)
        for rows, images in batches(data.test[normal[data.test]]):
            lesioned, mask = synthetic_lesion_mask(images, generator)
            yes, mask = np.ones(len(rows), bool), mask.squeeze(1).cpu().numpy() > 0
            yield images, ~yes, np.zeros_like(mask), yes
            yield lesioned, yes, mask, yes

    features = torch.zeros(len(data.names), model.teacher.encoder.cls_token.shape[2])
    for rows, images in batches(np.union1d(data.train, data.test)):
        features[rows] = model.features(images).mean(1).cpu()          # no loss reads the class token
    score_maps = AnomalyScores(model, (images for _, images in batches(data.train[normal[data.train]])))
    few = model.features(to_device(data.images[data.test[:24]], device)).cpu()  # (24, L, D)
    known = data.labels is not None and 0 < normal[data.test].sum() < len(data.test)
    return {"linear": {f"{percent}%": evaluate_probe(features, data, percent / 100)
                       for percent in (1, 10, 100)} if known else None,
            "anomaly": evaluate_anomaly(score_maps, real_findings()) if known else None,
            "synthetic": evaluate_anomaly(score_maps, synthetic_lesions()),
            "cohesion": silhouette(few.flatten(0, 1), torch.arange(few.shape[1]).repeat(len(few)))
            }, score_maps


def evaluate(args):
    """A checkpoint beside the same model untrained: prints a table, writes metrics and figures."""
    ckpt = Path(args.ckpt or max(Path("runs").glob("*/checkpoint.pth"), default="none",
                                 key=lambda file: file.stat().st_mtime))
    ckpt = ckpt / "checkpoint.pth" if ckpt.is_dir() else ckpt
    if not ckpt.is_file():
        raise InputError(f"there is no checkpoint {args.ckpt or 'runs/*/checkpoint.pth'}: make one "
                         "with `python afire.py pretrain`, or name one with --ckpt")
    checkpoint = torch.load(ckpt, map_location="cpu", weights_only=True)
    elsewhere = {"root": None, "labels": None} if "data" in args else {}
    args = argparse.Namespace(**{**checkpoint["config"], "out": str(ckpt.parent), **elsewhere,
                                 **vars(args)})
    device, out = torch.device(args.device), ckpt.parent / "eval"
    data = load_radiographs(args, for_training=False)
    if args.boxes:
        data.masks.update(read_boxes(args.boxes, data))
    if min(data.normal()[data.train].sum(), data.normal()[data.test].sum()) < 2:
        raise InputError(f"--data {args.data} lacks normal images to fit on or to test on: add some, "
                         "or change --test-fraction")
    report, scores = {}, {}
    for name in "checkpoint", "random_init":
        model = build_model(args).to(device)
        if name == "checkpoint":
            model.load_state_dict(checkpoint["model"])
        else:                                     # its prototypes: the mean over normal images
            rows = data.train[data.normal()[data.train]][:512]
            with torch.no_grad():
                model.prototypes.update(model.teacher.head(
                    model.features(to_device(data.images[rows], device))))
        report[name], scores[name] = evaluate_model(model, data, device, args.batch_size)
    out.mkdir(exist_ok=True)
    report = json.loads(json.dumps(report), parse_constant=lambda _: None)     # NaN becomes null
    (out / "metrics.json").write_text(json.dumps(report, indent=2))
    print_report(report)
    plot_anomalies(scores["checkpoint"], data, device, out / "anomaly.png")
    plot_tokens({name: each.model for name, each in scores.items()}, data, device, out / "tokens.png")
    print(f"in {out}: metrics.json, anomaly.png, tokens.png")


def print_report(report):
    """A line a figure: of the checkpoint, of the same model untrained."""
    def lines(prefix, ours, untrained):
        for name, value in ours.items():
            if isinstance(value, dict):
                yield from lines(f"{prefix}{name} ", value, untrained[name])
            elif name != "ci95" and value is not None:
                interval = " [{:.3f}, {:.3f}]".format(*ours["ci95"]) if "ci95" in ours else ""
                yield f"{prefix + name:45}{value:10.3f} {untrained[name]:10.3f} {interval}"

    print(f"{'':45}checkpoint  untrained  95 % interval of the checkpoint")
    print("\n".join(lines("", report["checkpoint"], report["random_init"])))

# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------

def plot_grid(file, rows, titles, draw):
    """Saves rows x len(titles) square panels, each by draw(axis, row, column)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg        # needs no screen
    from matplotlib.figure import Figure
    figure = Figure(figsize=(1.9 * len(titles), 1.9 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, len(titles), squeeze=False)
    for (row, column), axis in np.ndenumerate(axes):
        axis.set(xticks=[], yticks=[], title=titles[column] if row == 0 else "")
        draw(axis, row, column)
    FigureCanvasAgg(figure).print_png(file)


@torch.no_grad()
def plot_restoration(model, normal, file):
    """x, x', what is restored from x', and M, for images normal (B, 1, H, W)."""
    lesioned, mask = synthetic_lesion_mask(normal, torch.Generator().manual_seed(0))
    restored = model.decoder(model.student.encoder(model.normalise(lesioned)),
                             abnormal_tokens(mask, model.patch_size))
    restored = (restored * model.std + model.mean).mean(1, keepdim=True)
    panels = [each.squeeze(1).cpu() for each in (normal, lesioned, restored, mask)]
    plot_grid(file, len(normal), ["x", "x' = x + lesions", "restored", "mask M"],
              lambda axis, row, column: axis.imshow(panels[column][row], vmin=0, vmax=1,
                                                    cmap="magma" if column == 3 else "gray"))


def plot_losses(records, file):
    """The losses over the epochs, from the records in log.jsonl."""
    names = ["structure", "category", "restoration"]

    def draw(axis, row, column):
        axis.plot([record["epoch"] for record in records],
                  [record[names[column]] for record in records])
        axis.set(xlabel="epoch", xticks=[1, len(records)])
        axis.tick_params(axis="y", reset=True, labelsize=7)
        axis.locator_params(axis="y", nbins=5)

    plot_grid(file, 1, names, draw)


def plot_anomalies(score_maps, data, device, file):
    """Anomaly maps over test images, truth outlined: real findings if known, else lesions."""
    known = [i for i in data.test.tolist() if i in data.masks]
    rows = known[:8] or data.test[:8]
    images = to_device(data.images[rows], device)
    if known:
        truth = np.stack([data.masks[i] for i in rows])
    else:
        images, mask = synthetic_lesion_mask(images, torch.Generator().manual_seed(0))
        truth = mask.squeeze(1).cpu().numpy() > 0
    maps = score_maps(images)

    def draw(axis, row, column):
        axis.imshow(images[row, 0].cpu(), cmap="gray", vmin=0, vmax=1)
        if column:
            each = list(maps.values())[column - 1].cpu()
            axis.imshow(each[row], cmap="inferno", alpha=0.5, vmin=each.min(), vmax=each.max())
        axis.contour(truth[row], [0.5], colors="cyan", linewidths=0.8)

    plot_grid(file, len(rows), ["truth", *maps], draw)


def plot_tokens(models, data, device, file):
    """Tokens in their first two principal components, coloured by position as the first panel."""
    images = to_device(data.images[data.test[:24]], device)
    tokens = [model.features(images).cpu() for model in models.values()]       # (B, L, D) each
    side = math.isqrt(tokens[0].shape[1])
    y, x = torch.meshgrid(*[torch.linspace(0, 1, side)] * 2, indexing="ij")
    colour = torch.stack([x, y, 1 - x], 2)                                     # (side, side, 3)

    def draw(axis, row, column):
        if column == 0:
            axis.imshow(images[0, 0].cpu(), cmap="gray", extent=(0, 1, 1, 0))
            axis.imshow(colour, alpha=0.5, extent=(0, 1, 1, 0))
        else:
            points = tokens[column - 1].flatten(0, 1)
            points = points - points.mean(0)
            plane = points @ torch.linalg.eigh(points.T @ points).eigenvectors[:, -2:]
            axis.scatter(*plane.T, s=2, c=colour.flatten(0, 1).repeat(len(images), 1))

    plot_grid(file, 1, ["position", *models], draw)

# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

def parse_arguments(argv=None):
    """Every option is declared once; a preset sets the defaults of pretrain, and an option wins."""
    small = {"arch": "vit_micro", "img_size": 64, "patch_size": 8, "out_dim": 64, "head_dim": 256,
             "decoder_dim": 64, "decoder_depth": 2, "epochs": 100, "warmup_epochs": 5,
             "batch_size": 64, "lr": 4e-3, "teacher_momentum": 0.99}
    presets = {
        "phantoms": {**small, "epochs": 16, "warmup_epochs": 2, "batch_size": 32},
        "small": small,
        "paper": {"arch": "vit_base", "img_size": 224, "patch_size": 16, "out_dim": 256,
                  "head_dim": 1024, "decoder_dim": 512, "decoder_depth": 8, "epochs": 400,
                  "warmup_epochs": 10, "batch_size": 64, "lr": 5e-4, "teacher_momentum": 0.996}}
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "mps" if torch.backends.mps.is_available() else "cpu"

    parser = argparse.ArgumentParser(prog="afire.py", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (("pretrain", "pre-train on normal radiographs, or on phantoms without --data"),
                       ("eval", "evaluate a checkpoint on the data of its run, or on --data")):
        verbs.add_parser(verb, help=text, description=text,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    train, test = verbs.choices["pretrain"], verbs.choices["eval"]

    add = train.add_argument
    add("--out", default="runs/afire", help="folder of the run; a run that is there is gone on with")
    add("--preset", choices=presets, default=argparse.SUPPRESS, help="what the defaults below come "
        "from: phantoms without --data; else paper on a GPU, small on a CPU")
    add("--arch", choices=("vit_micro", "vit_tiny", "vit_small", "vit_base"), help="encoder")
    add("--img-size", type=int, help="side of the square that images are squashed to, in pixels")
    add("--patch-size", type=int, help="side of a token's patch, in pixels")
    add("--out-dim", type=int, help="K, the number of pseudo-clusters")
    add("--head-dim", type=int, help="hidden width of the head")
    add("--decoder-dim", type=int, help="width of the decoder")
    add("--decoder-depth", type=int, help="blocks of the decoder")
    for loss, symbol in ("structure", "L_stru"), ("category", "L_cate"), ("restoration", "L_rest"):
        add(f"--{loss}-weight", type=float, default=1.0, help=f"of {symbol} in the total; 0 ablates")
    add("--epochs", type=int, help="an epoch is each normal image once")
    add("--warmup-epochs", type=int, help="epochs of linear warm-up")
    add("--batch-size", type=int, help="images in a step")
    add("--lr", type=float, help="peak learning rate for a batch of 256, scaled with the batch")
    add("--weight-decay", type=float, default=0.04, help="at the start")
    add("--weight-decay-end", type=float, default=0.4, help="at the end")
    add("--teacher-momentum", type=float, help="of the teacher's average, at the start; 1 at the end")
    add("--amp", choices=("none", "bf16", "fp16"), help="autocast",
        default="none" if not gpu else "bf16" if torch.cuda.is_bf16_supported() else "fp16")
    add("--seed", type=int, default=0, help="of all that is random")
    add("--init", help="checkpoint that the encoder starts from")

    add = test.add_argument
    add("--ckpt", help="checkpoint.pth or its folder (default: of the last run under runs/)")
    add("--batch-size", type=int, default=64, help="images at a time")
    add("--boxes", help="CSV: image, finding, x, y, w, h in pixels of the image")

    for parser_, default in (train, None), (test, argparse.SUPPRESS):  # eval: what the run had
        add = parser_.add_argument
        add("--data", default=default, help="folder of images, or a list: relative/path 0 1 0 ...")
        add("--root", default=default, help="folder that the paths in a list start from")
        add("--labels", default=default, help="CSV: image, findings (a|b), and optional patient")
        add("--cache", default=default, help="folder for decoded images (default: the run's)")
        add("--test-fraction", type=float, default=default or 0.2, help="of patients to hold out "
            "where --data has no folders train and test")
        add("--device", default=device, help="cpu, cuda, cuda:1, mps")

    args = parser.parse_args(argv)
    if args.verb == "pretrain":
        preset = "phantoms" if not args.data else "paper" if gpu else "small"
        preset = getattr(args, "preset", preset)
        train.set_defaults(preset=preset, **presets[preset])
        args = parser.parse_args(argv)
    return args


def main(argv=None):
    args = parse_arguments(argv)
    try:
        if args.verb == "pretrain":
            print(f"pre-training on {args.device} with the preset {args.preset}, in {args.out}")
            pretrain(args)
        else:
            evaluate(args)
    except InputError as error:
        print(f"afire.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
