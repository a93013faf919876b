#!/usr/bin/env python3
"""Pre-trains a masked autoencoder (He et al., CVPR 2022) on the same encoder, decoder and images.

    python results/mae.py pretrain --epochs 103 --out runs/mae ...

The other options are those of `afire.py pretrain`, in one process; resume such a run with this
script. The optimiser, its schedules and the moving average are AFiRe's too. The head is not trained
and the decoder predicts normalised patches: the anomaly scores `prototype` and `restoration` of
`afire.py eval`, and restoration.png, mean nothing for such a run.
"""

import argparse
import functools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402


def hide_patches(images, generator=None, centre=None, offset=0, *, patch_size, mask_ratio=0.75):
    """Hides a fraction of the patches of images (B, 1, S, S), at random places.

    The arguments are those of synthetic_lesion_mask, of which centre is not used. Returns the
    images as they are, and a mask (B, 1, S, S), 1 in hidden patches and 0 in the others.
    """
    num_patches = (images.shape[3] // patch_size) ** 2
    uniform = torch.rand(offset + len(images), num_patches, generator=generator)[offset:]
    order = uniform.to(images.device).argsort(1)                               # (B, L)
    visible = order[:, :math.ceil((1 - mask_ratio) * num_patches)]             # (B, V)
    hidden = torch.ones_like(order, dtype=images.dtype).scatter(1, visible, 0)     # (B, L)
    mask = hidden.unsqueeze(2).expand(-1, -1, patch_size ** 2)                 # (B, L, p * p)
    return images, afire.unpatchify(mask, patch_size)


def encode_visible(vit, x, visible):
    """Encodes tokens at the positions visible (B, V) only: (B, C, H, W) -> (B, 1 + V, D)."""
    x = vit.patch_embed["proj"](x).flatten(2).transpose(1, 2)                  # (B, L, D)
    x = x + vit.pos_embed[:, 1:]
    x = x.gather(1, visible.unsqueeze(2).expand(-1, -1, x.shape[2]))           # (B, V, D)
    class_token = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
    return vit.norm(vit.blocks(torch.cat([class_token, x], 1)))


class MAE(afire.AFiRe):
    """AFiRe's encoder and decoder with MAE's loss: hidden patches restored from visible ones."""

    def forward(self, normal, lesioned, mask):
        """The arguments of AFiRe; normal (B, 1, S, S) and a mask by hide_patches are used."""
        x = afire.normalise(normal)
        hidden = afire.abnormal_tokens(mask, self.patch_size)                  # (B, L)
        visible = (~hidden).nonzero()[:, 1].view(len(x), -1)                   # (B, V), sorted
        encoded = encode_visible(self.student["encoder"], x, visible)          # (B, 1 + V, D)
        B, _, D = encoded.shape
        place = F.pad(visible + 1, (1, 0))                 # 0 is the class token's, (B, 1 + V)
        place = place.unsqueeze(2).expand(-1, -1, D)
        tokens = encoded.new_zeros(B, 1 + self.num_patches, D).scatter(1, place, encoded)
        restored = afire.patchify(self.decoder(tokens, hidden), self.patch_size)
        target = afire.patchify(x, self.patch_size)                            # (B, L, C * p * p)
        variance, mean = torch.var_mean(target, 2, keepdim=True)
        error = (restored - (target - mean) / (variance + 1e-6).sqrt()).square().mean(2)
        loss = (error * hidden).sum() / hidden.sum()
        nothing = torch.zeros_like(loss)
        return {"loss": loss, "structure": nothing, "category": nothing, "restoration": loss}


def main(argv=None):
    """afire.main with MAE in the place of AFiRe and hidden patches in the place of lesions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="other options: python afire.py pretrain --help")
    parser.add_argument("command", choices=["pretrain"])
    parser.add_argument("--mask-ratio", type=afire.number(float, 0.01, 0.99), default=0.75,
                        help="fraction of the patches that are hidden (default: 0.75)")
    options, others = parser.parse_known_args(argv)
    afire_pretrain = afire.pretrain

    def pretrain(settings):
        settings.method = f"MAE, mask ratio {options.mask_ratio}"
        afire.AFiRe = MAE
        afire.synthetic_lesion_mask = functools.partial(
            hide_patches, patch_size=settings.patch_size, mask_ratio=options.mask_ratio)
        afire_pretrain(settings)

    afire.pretrain = pretrain
    afire.main(["pretrain", *others])


if __name__ == "__main__":
    main()
