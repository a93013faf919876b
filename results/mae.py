#!/usr/bin/env python3
"""Pre-trains a masked autoencoder (He et al., CVPR 2022) on the same encoder, decoder and images.

    python results/mae.py pretrain --keep 0.25 --epochs 103 --out runs/mae ...

The options are those of afire.py, in one process; --keep is the fraction of the tokens that the
encoder sees. The optimiser, its schedules and the moving average are AFiRe's too. The head is not
trained and the decoder predicts normalised patches: the anomaly scores `prototype` and
`restoration` of `afire.py eval`, and restoration.png, mean nothing for such a run.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402


class MAE(afire.AFiRe):
    """AFiRe's encoder and decoder with MAE's loss: hidden patches restored from visible ones."""

    def forward(self, normal, lesioned, mask, prototype_momentum=None, visible=None):
        """The arguments of AFiRe; only normal (B, 1, H, W) and visible (B, V) are used."""
        if visible is None:
            raise afire.InputError("an MAE hides tokens: choose --keep below 1, such as 0.25")
        x = afire.normalise(normal)
        tokens = self.student["encoder"](x, visible)                           # (B, 1 + V, D)
        tokens, hidden = afire.put_back(tokens, visible, self.num_patches)
        restored = afire.patchify(self.decoder(tokens, hidden), self.patch_size)
        target = afire.patchify(x, self.patch_size)                            # (B, L, C * p * p)
        variance, mean = torch.var_mean(target, 2, keepdim=True)
        error = (restored - (target - mean) / (variance + 1e-6).sqrt()).square().mean(2)
        loss = (error * hidden).sum() / hidden.sum()
        nothing = torch.zeros_like(loss)
        return {"loss": loss, "structure": nothing, "category": nothing, "restoration": loss}


if __name__ == "__main__":
    afire.AFiRe = MAE
    afire.main()
