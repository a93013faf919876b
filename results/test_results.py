"""Tests of the scripts in this folder, with the helpers of test_afire.py.

One small run serves most of them. After its pre-training its table changes: patients that it was
trained on are to be tested, beside a broken file and a copy, and none of these may count.
"""

import argparse
import contextlib
import copy
import csv
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402
import bench  # noqa: E402
import boxes  # noqa: E402
import crops  # noqa: E402
import curves  # noqa: E402
import finetune  # noqa: E402
import mae  # noqa: E402
import runs  # noqa: E402
import shift  # noqa: E402
import tokens as token_pictures  # noqa: E402
from test_afire import (CPU, drawn_set, load_run, phantom_images, randomise,  # noqa: E402
                        seeded, table, tiny_batch, tiny_model, working_folder, write_images)

__all__ = ["working_folder"]                               # a fixture: pytest finds it here

HELD_OUT = [f"{i:03}.png" for i in range(90)]
MOVED = [f"{i:03}.png" for i in range(90, 98)]             # to train on, then to be tested
TRAIN = [f"{i:03}.png" for i in range(98, 150)]
NEW = [*HELD_OUT, "095.png"]                               # of patients who were not trained on


def is_normal(name):
    return int(name[:3]) % 5 != 0


def patient_of(name):
    """Two images each; 095.png has a finding and its own, so that nobody of it was trained on."""
    return "single" if name == "095.png" else str(int(name[:3]) // 2)


def write_labels(file, held_out):
    """The images, beside a broken file and a copy of a normal image."""
    rows = [f"{name},{'' if is_normal(name) else 'a'},{patient_of(name)},"
            f"{'test' if name in held_out else 'train'}" for name in HELD_OUT + MOVED + TRAIN]
    table(file, *rows, "broken.png,,new,test", "copy.png,,new,test")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of 4 epochs, in the folder of its images and tables."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder, afire.phantoms(150, 40)[0][:, 0], HELD_OUT + MOVED + TRAIN)
    (folder / "broken.png").write_bytes(b"no image at all")
    shutil.copy(folder / "002.png", folder / "copy.png")
    write_labels(folder / "before.csv", HELD_OUT)
    shutil.copy(folder / "before.csv", folder / "labels.csv")
    afire.main(f"pretrain --data {folder} --labels {folder}/labels.csv --out {folder}/run --preset "
               "small --img-size 32 --batch-size 8 --epochs 4 --lr 0.1 --device cpu".split())
    write_labels(folder / "labels.csv", HELD_OUT + MOVED)
    return folder / "run"


def images_of(run, file_names):
    """The pixels that the run sees: (n, 1, 32, 32) uint8."""
    return np.stack([afire.read_image(run.parent / name, 32, "equal")[None] for name in file_names])


def encoders_of(run):
    """The trained encoder, of the file that the run leaves, and the untrained."""
    untrained = afire.build_model(argparse.Namespace(**load_run(run)[0]["config"]))
    encoders = {"checkpoint": afire.load_encoder(run / "encoder.pth"),
                "random_init": untrained.student["encoder"]}
    return {name: encoder.eval().requires_grad_(False) for name, encoder in encoders.items()}


@pytest.fixture(scope="module")
def evaluated(run):
    """What the scripts print that evaluate the run."""
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        afire.main(f"eval --ckpt {run} --device cpu".split())
        finetune.main([str(run), "--steps", "3"])
        token_pictures.main([str(run), "--no-picture"])
    return stream.getvalue()


def refusal(capsys, script, *arguments):
    """The script ends with status 2: -> the sentence that it prints last."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    *_, sentence = capsys.readouterr().err.splitlines()
    return sentence


# ---- Other methods: crops.py, mae.py -------------------------------------------------------------

def test_crops_are_turned_squares_inside_the_image_and_depend_on_their_place_alone():
    """Images whose brightness tells their pixels' x and y also tell which square was taken."""
    ramp = torch.arange(64.).expand(99, 1, 64, 64)
    x, mask = crops.crop(ramp, seeded())
    y, _ = crops.crop(ramp[1:].mT, seeded(), offset=1)
    z = x[1:, 0].numpy() + 1j * y[:, 0].numpy()
    step = (z[:, 31:32, 41:42] - z[:, 31:32, 31:32]) / 10              # of a pixel to the right
    row, column = np.indices((64, 64))
    taken = z[:, 31:32, 31:32] + step * (column - 31 + 1j * (row - 31))
    taken = np.stack([taken.real, taken.imag])
    np.testing.assert_allclose([z.real, z.imag], taken.clip(0, 63), atol=1e-3)
    assert -0.5 < taken.min() and taken.max() < 63.5                   # edges of the last pixels
    assert 0.499 < abs(step).min() < 0.52 and 0.83 < abs(step).max() < 0.851 and not mask.any()
    assert 9 < np.angle(step, deg=True).max() < 10.1


def test_mae_hides_three_quarters_of_the_patches_by_seed_and_place_alone():
    images = phantom_images(160, 32)[:20]
    same, mask = mae.hide_patches(images, seeded(), patch_size=8)
    hidden = afire.patchify(mask, 8)                                   # (20, 16, 64)
    assert torch.equal(same, images) and mask.shape == images.shape
    assert (hidden == hidden[:, :, :1]).all() and set(mask.unique().tolist()) == {0, 1}
    assert (hidden[:, :, 0].sum(1) == 12).all()
    assert hidden[:, :, 0].mean(0).min() > 0.4, "any patch can be hidden"
    assert torch.equal(mae.hide_patches(0 * images[7:], seeded(), offset=7, patch_size=8)[1],
                       mask[7:])
    assert not torch.equal(mae.hide_patches(images, seeded(1), patch_size=8)[1], mask)
    for ratio, hidden in (0.75, 6), (0.5, 4):              # of 9; the visible are rounded up
        odd = mae.hide_patches(torch.zeros(2, 1, 24, 24), seeded(), patch_size=8,
                               mask_ratio=ratio)[1]
        assert (afire.abnormal_tokens(odd, 8).sum(1) == hidden).all()


def test_mae_replaces_model_and_lesions_and_says_so_in_the_options(monkeypatch):
    """Patches are of the run's size."""
    started = []
    for name in "AFiRe", "synthetic_lesion_mask":                      # both are restored later
        monkeypatch.setattr(afire, name, getattr(afire, name))
    monkeypatch.setattr(afire, "pretrain", started.append)
    mae.main("pretrain --patch-size 4 --mask-ratio 0.5 --device cpu".split())
    images = phantom_images(160, 32)[:6]
    assert_close(afire.synthetic_lesion_mask(images, seeded()),
                 mae.hide_patches(images, seeded(), patch_size=4, mask_ratio=0.5))
    assert afire.AFiRe is mae.MAE
    assert started[0].method == "MAE, mask ratio 0.5" and started[0].patch_size == 4


@torch.no_grad()
def test_mae_encodes_what_timm_computes_of_the_visible_tokens():
    size = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4)
    ours = randomise(afire.ViT(**size))
    theirs = timm.models.VisionTransformer(num_classes=0, **size).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    visible = torch.rand(6, 16, generator=seeded()).argsort(1)[:, :5].sort(1).values
    places = F.pad(1 + visible, (1, 0))                                # with the class token's, 0
    theirs.patch_drop.register_forward_hook(
        lambda *args: torch.stack([x[kept] for x, kept in zip(args[2], places)]))
    images = torch.randn(6, 3, 32, 32)
    assert_close(mae.encode_visible(ours, images, visible), theirs.forward_features(images),
                 atol=1e-5, rtol=1e-4)


def test_mae_restores_hidden_patches_that_are_normalised_one_by_one():
    model = randomise(mae.MAE(32, 8, 32, 2, 2, 16, 32, 16, 32, 1, 2)).eval()
    images, lesioned, _ = tiny_batch()
    _, mask = mae.hide_patches(images, seeded(), patch_size=8)
    loss = model(images, lesioned, mask)["loss"]
    x = afire.normalise(images)
    hidden = afire.patchify(mask, 8)[:, :, 0] == 1                     # (6, 16)
    tokens = torch.zeros(6, 17, 32)
    for i in range(6):
        positions = [j for j in range(16) if not hidden[i, j]]
        encoded = mae.encode_visible(model.student["encoder"], x[i:i + 1],
                                     torch.tensor([positions]))
        tokens[i, [0] + [1 + j for j in positions]] = encoded[0]
    restored = afire.patchify(model.decoder(tokens, hidden), 8)
    errors = []
    for i, j in hidden.nonzero():
        patch = afire.patchify(x, 8)[i, j]
        target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
        errors.append((restored[i, j] - target).square().mean())
    assert_close(loss, torch.stack(errors).mean())
    loss.backward()
    assert model.student["encoder"].cls_token.grad.any()


@pytest.mark.parametrize("script", [crops, mae])
def test_other_methods_pretrain_and_only_they_resume(run, tmp_path, monkeypatch, capsys, script):
    arguments = (f"pretrain --data {run.parent} --labels {run.parent}/before.csv --out {tmp_path} "
                 "--preset small --img-size 32 --patch-size 16 --batch-size 8 --epochs 1 "
                 "--device cpu").split()
    with monkeypatch.context() as patch:
        for name in "AFiRe", "synthetic_lesion_mask", "pretrain":      # which the script replaces
            patch.setattr(afire, name, getattr(afire, name))
        patch.setattr(afire, "plot_restoration", Mock())   # it takes seconds
        script.main(arguments)
        assert "resuming" not in capsys.readouterr().out
        script.main(arguments)
        assert "resuming after epoch 1" in capsys.readouterr().out
    epoch = load_run(tmp_path)[1][0]
    assert epoch["category"] == 0 and epoch["restoration"] > 0
    assert (epoch["structure"] > 0) == (script is crops)
    assert "method" in refusal(capsys, afire, *arguments)


@pytest.mark.parametrize("script, words", [(crops, "crops in the place of lesions"),
                                           (mae, "masked autoencoder")])
def test_other_methods_say_what_they_do(capsys, script, words):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    assert words in capsys.readouterr().out


# ---- runs.py -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def plain_run(run):
    """The folder of a run on normal images without a table: nothing is held out."""
    out = run.parent / "plain"
    write_images(out / "images", afire.phantoms(8, 40)[0][:, 0], HELD_OUT[:8])
    afire.main(f"pretrain --data {out}/images --out {out} --preset small --img-size 32 "
               "--batch-size 8 --epochs 1 --device cpu".split())
    return out


@pytest.mark.parametrize("script", [finetune, token_pictures])
def test_what_is_no_run_or_holds_nothing_out_is_refused(run, plain_run, tmp_path, monkeypatch,
                                                        capsys, script):
    assert "is an encoder alone: name the folder of a run" in refusal(capsys, script,
                                                                      run / "encoder.pth")
    assert "there is no checkpoint" in refusal(capsys, script, run / "restoration.png/eval")
    assert re.search("has 0 .*(held out|findings).*(table|--labels)",
                     refusal(capsys, script, plain_run))
    checkpoint = load_run(run)[0]
    checkpoint["config"] |= {"data": str(plain_run / "images"), "labels": None}
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    assert re.search("images that .* was pre-trained on are not in .*/images: start this",
                     refusal(capsys, script, tmp_path))
    monkeypatch.setattr(script, "load_run",
                        Mock(side_effect=FileNotFoundError(2, "No such file", "a.csv")))
    assert refusal(capsys, script, run).endswith(".py: cannot use a.csv: No such file")


# ---- finetune.py ---------------------------------------------------------------------------------

def test_finetuning_learns_what_a_linear_probe_cannot():
    """It leaves the encoder as it was."""
    data = drawn_set(240, 32)
    encoder = tiny_model().teacher["encoder"].requires_grad_(False)
    before = copy.deepcopy(encoder.state_dict())
    truth = data.labels[data.test, 0]
    areas = []
    for steps in 0, 150:
        tuned, layer = finetune.finetune(encoder, data, data.train, steps, CPU)
        scores = finetune.score_rows(tuned, layer, data, data.test, CPU)
        areas.append(sklearn.metrics.roc_auc_score(truth, scores[:, 0]))
    assert areas[1] > max(0.95, areas[0] + 0.05)
    assert_close(encoder.state_dict(), before, rtol=0, atol=0)


def test_finetuning_starts_at_the_probe_of_eval(run, evaluated):
    """As a logit, whose sigmoid has the probe's value and slope at 1/2."""
    _, _, data = runs.load_run(run)
    probe = np.load(run / "eval/predictions.npz")
    options = argparse.Namespace(steps=0, fractions=["10%", "100%"], repeats=5)
    for name, encoder in encoders_of(run).items():
        start = finetune.scores_of_network(encoder, data, options, CPU, Mock(n=-1))
        for fraction, logits in start.items():
            np.testing.assert_allclose(logits, 4 * probe[f"{name}/linear {fraction}"] - 2,
                                       atol=0.01)


def test_finetuning_does_not_learn_from_what_is_tested():
    data = drawn_set(80, 32)
    encoder = tiny_model().teacher["encoder"].eval().requires_grad_(False)
    options = argparse.Namespace(steps=2, fractions=["10%"], repeats=2)
    bar = Mock(n=2, total=8, format_dict={"elapsed": 30})
    before = finetune.scores_of_network(encoder, data, options, CPU, bar)
    bar.write.assert_called_with("4 fits of 2 steps take about 2.0 minutes")
    data.labels[data.test] = np.random.default_rng(0).random((40, 1)) < 0.5
    assert_close(finetune.scores_of_network(encoder, data, options, CPU, Mock(n=0)), before,
                 equal_nan=True)


def ridge_by_sklearn(x, labels):
    """On standardised x (n, D), of labels (n,): -> weight (D,) of x and bias."""
    scale = x.std(0) + 1e-6
    ridge = sklearn.linear_model.Ridge(alpha=x.shape[1] / 2).fit((x - x.mean(0)) / scale, labels)
    weight = ridge.coef_ / scale
    return weight, ridge.intercept_ - x.mean(0) @ weight


def finetune_by_hand(encoder, images, labels, steps, pool):
    """The recipe, written out for one finding; pool: tokens (n, 16, 128) -> features (n, D).

    -> the encoder, and weight (D,) and bias of the features.
    """
    encoder = copy.deepcopy(encoder).requires_grad_(False)
    encoder.blocks.requires_grad_()

    def pooled(pixels):
        return pool(encoder(afire.normalise(torch.from_numpy(pixels) / 255))[:, 1:])

    weight, bias = ridge_by_sklearn(pooled(images).detach().double().numpy(), labels)
    weight = torch.tensor(4 * weight, dtype=torch.float).requires_grad_()
    bias = torch.tensor(4 * (bias - 0.5), dtype=torch.float).requires_grad_()
    random = np.random.default_rng(0)
    optimizer = torch.optim.AdamW([*encoder.blocks.parameters(), weight, bias], weight_decay=0.05)
    for step in range(steps):
        rows = random.choice(len(images), 32)
        lr = 1e-3 * (step + 1) / 10 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr
        p = (pooled(images[rows]) @ weight + bias).sigmoid()
        truth = torch.from_numpy(labels[rows]).float()
        optimizer.zero_grad()
        (-truth * p.log() - (1 - truth) * (1 - p).log()).mean().backward()
        optimizer.step()
    return encoder.requires_grad_(False), weight.detach(), bias.detach()


def all_tokens(tokens):
    """What 4 x 4 cells are in a grid of 4 x 4 tokens: (n, 16, D) -> (n, D * 16)."""
    return tokens.transpose(1, 2).flatten(1)


def test_finetuned_scores_are_of_both_networks_few_labels_and_new_images(run, evaluated):
    arrays = dict(np.load(run / "finetune/predictions.npz"))
    truth = np.array([[not is_normal(name)] for name in NEW])
    assert arrays["images"].tolist() == NEW and arrays["findings"].tolist() == ["a"]
    assert arrays["patients"].tolist() == [patient_of(name) for name in NEW]
    np.testing.assert_array_equal(arrays["labels"], truth)
    tested = torch.from_numpy(images_of(run, NEW)) / 255
    for network, encoder in encoders_of(run).items():
        parts = [arrays[f"{network}/finetune {fraction}"] for fraction in ("1%", "10%", "100%")]
        assert [part.shape for part in parts] == [(5, 91, 1), (5, 91, 1), (1, 91, 1)]
        random = np.random.default_rng(0)
        learned = []
        numbers = [2] * 5 + [5] * 5 + [52]                 # of images to learn from
        for n, scores in zip(numbers, np.concatenate(parts)):
            subset = [TRAIN[row] for row in random.permutation(len(TRAIN))[:n]]
            labels = np.array([not is_normal(name) for name in subset])
            assert np.isnan(scores).all() == (labels.all() or not labels.any())
            if n not in learned and not np.isnan(scores).any():
                start, expected = [
                    all_tokens(afire.features(tuned, tested)) @ weight + bias
                    for tuned, weight, bias in (
                        finetune_by_hand(encoder, images_of(run, subset), labels, steps, all_tokens)
                        for steps in (0, 3))]
                # AdamW's first steps are of one size, so rounding errors grow.
                np.testing.assert_allclose(scores[:, 0], expected, atol=0.04)
                assert (expected - start).abs().max() > 0.3
                learned.append(n)
        assert {5, 52} <= set(learned)
        areas = [[sklearn.metrics.roc_auc_score(truth, repeat) for repeat in part
                  if not np.isnan(repeat).any()] for part in parts]
        lines = re.findall(r"^\d+% of the labels +(\S+) +(\S+)", evaluated, re.M)[-3:]
        shown = [line[network == "random_init"] for line in lines]
        assert shown == [f"{np.mean(area):.3f}" for area in areas]
    assert "22 fits of 3 steps take about" in evaluated


def test_fewer_fits_are_the_first_of_all(run, evaluated, tmp_path, monkeypatch, capsys):
    shutil.copy(run / "checkpoint.pth", tmp_path)
    optimizers = Mock(side_effect=torch.optim.AdamW)
    monkeypatch.setattr(torch.optim, "AdamW", optimizers)
    finetune.main(f"{tmp_path} --steps 3 --fractions 10% --repeats 2".split())
    assert [call.kwargs for call in optimizers.call_args_list] == 4 * [{"weight_decay": 0.05}]
    printed = capsys.readouterr().out
    assert "4 fits of 3 steps take about" in printed and "100% of" not in printed
    arrays = dict(np.load(tmp_path / "finetune/predictions.npz"))
    assert {key for key in arrays if "%" in key} == {"checkpoint/finetune 10%",
                                                     "random_init/finetune 10%"}
    whole = np.load(run / "finetune/predictions.npz")
    for key in "checkpoint/finetune 10%", "random_init/finetune 10%":
        np.testing.assert_array_equal(arrays[key], whole[key][:2])
    for option in "--steps -1", "--repeats 0", "--fractions 5%":
        assert option.split()[0] in refusal(capsys, finetune, tmp_path, *option.split())


def test_the_mean_auroc_is_of_findings_and_each_is_of_its_defined_repeats():
    labels = np.arange(12)[:, None] % [2, 3] == 0
    scores = np.random.default_rng(0).random((3, 12, 2))
    areas = [np.mean([sklearn.metrics.roc_auc_score(labels[:, f], repeat[:, f])
                      for repeat in defined]) for f, defined in enumerate((scores[2:], scores))]
    scores[:2, :, 0] = np.nan
    assert finetune.macro_auroc(scores, labels) == pytest.approx(np.mean(areas))


# ---- tokens.py -----------------------------------------------------------------------------------

@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved = []
    original = curves.Figure.savefig
    monkeypatch.setattr(curves.Figure, "savefig",
                        lambda self, *args, **options: saved.append(self)
                        or original(self, *args, **options))
    return saved


def normal_images(run):
    """The 24 normal images of tokens.py: (24, 1, 32, 32) in [0, 1]."""
    return torch.from_numpy(images_of(run, [n for n in HELD_OUT if is_normal(n)][:24])) / 255


def test_cohesion_is_the_silhouette_of_tokens_by_position(run, evaluated):
    assert not (run / "tokens.png").exists()
    expected = {}
    for name, encoder in encoders_of(run).items():
        tokens = afire.features(encoder, normal_images(run))           # (24, 16, D)
        expected[name] = sklearn.metrics.silhouette_score(
            tokens.transpose(0, 1).reshape(16 * 24, -1).numpy(), np.arange(16).repeat(24))
    assert abs(expected["checkpoint"] - expected["random_init"]) > 0.002
    assert json.loads((run / "cohesion.json").read_text()) == pytest.approx(expected, abs=1e-4)
    assert re.search("cohesion {checkpoint:.3f}, .*{random_init:.3f}".format(**expected),
                     evaluated)


def test_the_picture_of_tokens_shows_their_positions_and_what_is_under_a_lesion(
        run, evaluated, figures, monkeypatch):
    monkeypatch.setattr(token_pictures.TSNE, "fit_transform", lambda self, points: points[:, :2])
    token_pictures.main([str(run)])
    assert Image.open(run / "tokens.png").width > 300
    images = normal_images(run)
    lesioned, mask = afire.synthetic_lesion_mask(images, seeded())
    by_position = [[row / 3, 1 - column / 3, column / 3] for row, column in np.ndindex(4, 4)] * 24
    by_class = []
    for i, row, column in np.ndindex(24, 4, 4):
        patch = mask[i, 0, 8 * row:8 * row + 8, 8 * column:8 * column + 8]
        by_class.append([0.8, 0.1, 0.1] if patch.any() else [0.7, 0.7, 0.7])
    axes = np.reshape(figures[0].axes, (2, 3))
    for column, (name, title) in enumerate([("random_init", "untrained"),
                                            ("checkpoint", "trained")]):
        encoder = encoders_of(run)[name]
        tokens = afire.features(encoder, images)                       # (24, 16, D)
        without = afire.features(encoder, lesioned) - tokens.mean(0, keepdim=True)
        for axis, points, colours in ((axes[0, column], tokens, by_position),
                                      (axes[1, column], without, by_class)):
            cloud = axis.collections[0]
            np.testing.assert_allclose(cloud.get_offsets(), points.flatten(0, 1)[:, :2], atol=1e-4)
            np.testing.assert_allclose(cloud.get_facecolors()[:, :3], colours)
            assert axis.get_title().startswith(f"{title}, by ")
    np.testing.assert_allclose(axes[0, 2].images[0].get_array().reshape(-1, 3), by_position[:16])
    legend = axes[1, 2].get_legend()
    colours = [handle.get_facecolor()[0, :3].tolist() for handle in legend.legend_handles]
    assert colours == [[0.8, 0.1, 0.1], [0.7, 0.7, 0.7]]
    assert [text.get_text() for text in legend.get_texts()] == ["under a lesion", "elsewhere"]


# ---- curves.py -----------------------------------------------------------------------------------

def copy_run(run, folder, epochs, **config):
    """A run whose log ends after so many epochs, with another config."""
    folder.mkdir(parents=True)
    shutil.copy(run / "checkpoint.pth", folder)
    log = (run / "log.jsonl").read_text().splitlines()
    (folder / "log.jsonl").write_text("\n".join(log[:epochs]) + "\n")
    config = {**json.loads((run / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_curves_are_those_of_the_logs_with_lines_that_give_them_meaning(run, tmp_path, figures,
                                                                       capsys):
    labels = str(run.parent / "before.csv")
    folders = [copy_run(run, tmp_path / "whole", 4, labels=labels),
               copy_run(run, tmp_path / "begun", 1, labels=labels, arch="vit_small"),
               copy_run(run, tmp_path / "gone", 4, data=str(tmp_path / "nowhere")),
               copy_run(run, tmp_path / "other", 3)]
    curves.main(folders)
    assert Image.open(tmp_path / "whole/curves.png").mode == "RGB"
    printed = capsys.readouterr().out
    assert re.search("gone: the variance is left out.*nowhere", printed)
    assert re.search("other: the variance is left out.*are others", printed)
    assert "whole: the" not in printed and "begun: the" not in printed
    pixels = images_of(run, [n for n in MOVED + TRAIN if is_normal(n)])[:, 0] / 255
    variance = np.mean([((pixels - mean) / std).var() for mean, std in
                        zip([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    expected = {"structure": {math.log(64), math.log(256)}, "category": {math.log(2)},
                "restoration": {variance}, "lr": set(), "gradient_norm": set()}
    for panel, (metric, heights) in zip(figures[0].axes, expected.items()):
        lines = panel.get_lines()
        for line, folder in zip(lines, folders):
            records = load_run(Path(folder))[1]
            assert line.get_label() == folder
            assert list(line.get_xdata()) == [record["epoch"] for record in records]
            assert list(line.get_ydata()) == [record[metric] for record in records]
        assert sorted(line.get_ydata()[0] for line in lines[4:]) == pytest.approx(sorted(heights))
    assert len({line.get_color() for line in figures[0].axes[0].get_lines()[:4]}) == 4
    shown = [text.get_text() for text in figures[0].axes[5].get_legend().get_texts()]
    assert shown == folders


@pytest.mark.parametrize("file, content, sentence", [
    ("log.jsonl", None, "there is no .*log.jsonl: name the folder of a run"),
    ("log.jsonl", b"", "log.jsonl is empty, cut off or"),
    ("log.jsonl", b'{"epoch": 1, "los', "log.jsonl is empty, cut off or"),
    ("log.jsonl", b'{"epoch": 1}', "log.jsonl is empty, cut off or"),
    ("log.jsonl", b"[1]", "log.jsonl is empty, cut off or"),
    ("log.jsonl", b"\xff", "log.jsonl is empty, cut off or"),
    ("config.json", None, "cannot use .*config.json: No such file"),
    ("config.json", b'{"command": "pre', "config.json is cut off or of no run"),
    ("config.json", b'{"arch": "resnet"}', "config.json is cut off or of no run"),
    ("config.json", b"[1]", "config.json is cut off or of no run")])
def test_curves_of_a_damaged_run_are_one_sentence(run, tmp_path, capsys, file, content, sentence):
    folder = copy_run(run, tmp_path / "run", 4)
    Path(folder, file).unlink()
    if content is not None:
        Path(folder, file).write_bytes(content)
    assert re.search(sentence, refusal(capsys, curves, folder))
    assert not Path(folder, "curves.png").exists()


def test_the_variance_of_phantoms_and_without_a_checkpoint(tmp_path, monkeypatch):
    phantoms = drawn_set(80, 32)
    monkeypatch.setattr(afire, "phantom_radiographs", lambda size: phantoms)
    normals = [row for row in phantoms.train if not phantoms.labels[row, 0]]
    config = {"arch": "vit_base", "data": None, "labels": None, "levels": "file", "img_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert curves.reference_lines(tmp_path).keys() == {"structure", "category"}
    torch.save({"images": [str(row) for row in normals]}, tmp_path / "checkpoint.pth")
    x = afire.normalise(torch.from_numpy(phantoms.images[normals]) / 255)
    expected = x.var((0, 2, 3), correction=0).mean()
    assert curves.reference_lines(tmp_path)["restoration"] == pytest.approx(float(expected))


# ---- boxes.py ------------------------------------------------------------------------------------

FULL, EMPTY, SEEN = "005.png", "010.png", "090.png"
BOXED = [name for name in HELD_OUT if not is_normal(name) and name not in (FULL, EMPTY)]


def patient_in_boxes(name):
    """Up to four of the boxed images are of one patient."""
    return f"p{int(name[:3]) // 20}" if name in BOXED else patient_of(name)


def view_of(name):
    return ["AP", "PA", ""][int(name[:3]) % 3]


@pytest.fixture(scope="module")
def boxes_table(run):
    """A table with masks, of which one is full, one empty, and one of a patient trained on."""
    folder = run.parent
    (folder / "masks").mkdir()
    for name in [*BOXED, FULL, EMPTY, SEEN]:
        mask = np.zeros((40, 40), np.uint8)
        if name != EMPTY:
            top = int(name[:3]) % 7 * 3
            mask[top:top + 15, 8 + top // 2:25] = 255
        Image.fromarray(np.full_like(mask, 255) if name == FULL else mask).save(
            folder / f"masks/{name}")
    rows = [f"{name},{'' if is_normal(name) else 'a|b' if name in BOXED else 'a'},"
            f"{patient_in_boxes(name)},{'train' if name in TRAIN else 'test'},"
            f"{f'masks/{name}' if (folder / 'masks' / name).exists() else ''},{view_of(name)}"
            for name in HELD_OUT + MOVED + TRAIN]
    return table(folder / "boxes.csv", *rows, header="image,findings,patient,split,mask,view")


def grad_cam_by_hooks(encoder, score, images):
    """Loops over images and channels: the mean gradient times the activation, (B, 16).

    score: (1 + 16, D) -> scalar.
    """
    encoder = copy.deepcopy(encoder).requires_grad_()
    caught = {}
    encoder.blocks[-1].register_forward_hook(
        lambda block, x, output: caught.update(activation=output[0]))
    encoder.blocks[-1].register_full_backward_hook(
        lambda block, x, output: caught.update(gradient=output[0][0]))
    cams = []
    for image in images:
        score(encoder(afire.normalise(image[None]))[0]).backward()
        cam = torch.zeros(16, dtype=image.dtype)
        for channel in range(caught["activation"].shape[1]):
            weight = caught["gradient"][1:, channel].mean()
            cam += weight * caught["activation"][1:, channel].detach()
        cams.append(cam)
    return torch.stack(cams)


@pytest.mark.parametrize("cells", [1, 4])
def test_grad_cam_is_the_gradient_times_the_activation_caught_by_hooks(cells):
    encoder = randomise(afire.ViT(32, 8, 3, 32, 2, 2)).double().requires_grad_(False)
    images = torch.rand(3, 1, 32, 32).double()
    weight = torch.randn(32 * cells ** 2).double()
    pool = all_tokens if cells == 4 else lambda tokens: tokens.mean(1)
    expected = grad_cam_by_hooks(encoder, lambda tokens: pool(tokens[None, 1:])[0] @ weight, images)
    assert_close(boxes.grad_cam(encoder, weight, images), expected.view(3, 4, 4))


def test_grad_cam_is_the_gradient_by_differences_times_the_activation():
    encoder = afire.ViT(32, 8, 3, 32, 2, 2).double().requires_grad_(False)
    weight = torch.randn(32).double()
    outputs = []
    encoder.blocks[-1].register_forward_hook(lambda block, x, output: outputs.append(output[0]))
    cam = boxes.grad_cam(encoder, weight, torch.rand(1, 1, 32, 32).double())
    steps = F.pad(1e-4 * torch.eye(16 * 32).double().view(-1, 16, 32), (0, 0, 1, 0))
    ends = [encoder.norm(outputs[0] + d * steps)[:, 1:].mean(1) @ weight for d in (1, -1)]
    slope = ((ends[0] - ends[1]) / 2e-4).view(16, 32)
    expected = outputs[0][1:] @ slope.mean(0)
    assert_close(cam[0], expected.view(4, 4), rtol=1e-5, atol=1e-8)


def area_by_sklearn(grid, mask):
    """AUROC in a mask (S, S) of the pixels of a grid, enlarged to S x S."""
    pixels = F.interpolate(torch.from_numpy(grid)[None, None], mask.shape, mode="bilinear")
    return sklearn.metrics.roc_auc_score(mask.ravel(), pixels.ravel())


def localise_by_loops(grids, masks, patients):
    """-> {column: values}: of the own map, the mean map, own minus others."""
    own, mean, difference = [], [], []
    for i in range(len(grids)):
        others = [j for j in range(len(grids)) if patients[j] != patients[i]]
        own.append(area_by_sklearn(grids[i], masks[i]))
        mean.append(area_by_sklearn(grids[others].sum(0), masks[i]))
        difference.append(own[-1] - np.mean([area_by_sklearn(grids[j], masks[i]) for j in others]))
    return {"own map": own, "mean map": mean, "own minus others": difference}


def test_localisation_and_static_priors_are_those_of_loops():
    random = np.random.default_rng(0)
    masks = random.random((8, 6, 6)) < 0.3
    grids = random.integers(9, size=(8, 3, 3)) / 8         # with ties
    patients = np.array(list("aabcdeed"))
    found = boxes.localise(grids, masks, patients)
    assert list(found) == ["own map", "mean map", "own minus others"]
    for column, values in localise_by_loops(grids, masks, patients).items():
        np.testing.assert_allclose(found[column], values, err_msg=column)
    perfect = boxes.localise(masks * 1.0, masks, patients)
    assert (perfect["own map"] == 1).all() and (perfect["own minus others"] > 0.1).all()
    nearness = [[-math.dist((row, column), (2.5, 2.5)) for column in range(6)] for row in range(6)]
    priors = boxes.static_priors(masks, patients)
    for i, mask in enumerate(masks):
        others = np.mean([masks[j] for j in range(8) if patients[j] != patients[i]], 0)
        assert priors["nearness to the centre"][i] == pytest.approx(
            sklearn.metrics.roc_auc_score(mask.ravel(), np.ravel(nearness)))
        assert priors["mean mask"][i] == pytest.approx(
            sklearn.metrics.roc_auc_score(mask.ravel(), others.ravel()))


def test_the_interval_is_of_patients_drawn_with_all_their_images():
    values = np.random.default_rng(1).random(9)
    patients = np.array(list("bbbaaacdd"))
    random = np.random.default_rng(0)
    means = []
    for sample in random.integers(4, size=(1000, 4)):
        means.append(np.concatenate([values[patients == "abcd"[i]] for i in sample]).mean())
    assert boxes.with_interval(values, patients) == pytest.approx(
        [values.mean(), *np.quantile(means, [0.025, 0.975])])


def test_boxes_are_of_new_patients_and_maps_of_what_was_learned(run, boxes_table, tmp_path,
                                                                monkeypatch, capsys):
    """Every value of boxes.npz and of the tables, from the images and the two encoders alone."""
    pictures = []
    monkeypatch.setattr(afire, "plot_images", lambda *args: pictures.append(args))
    boxes.main(f"--ckpt {run} --data {run.parent} --labels {boxes_table} --steps 3 "
               f"--out {tmp_path}".split())
    printed = capsys.readouterr().out
    assert "17 images in test have a mask; left out: 2 images whose mask" in printed
    arrays = dict(np.load(tmp_path / "boxes.npz"))
    patients = np.array([patient_in_boxes(name) for name in BOXED])
    assert arrays["images"].tolist() == BOXED and arrays["patients"].tolist() == patients.tolist()
    assert arrays["train/images"].tolist() == TRAIN
    assert arrays["train/views"].tolist() == [view_of(name) for name in TRAIN]
    masks = np.stack([np.asarray(Image.open(run.parent / f"masks/{name}").resize(
        (32, 32), Image.Resampling.BOX)) > 127 for name in BOXED])
    labels = np.array([not is_normal(name) for name in TRAIN])
    pixels = np.concatenate([images_of(run, TRAIN), images_of(run, BOXED)])
    tested = torch.from_numpy(pixels[52:]) / 255
    learned = torch.from_numpy(pixels[:52]) / 255
    normal = learned[~labels]

    def mean_token(tokens):
        return tokens.mean(1)

    def cams(encoder, weight):
        weight = torch.as_tensor(weight, dtype=torch.float)
        of_tested, of_normal = [boxes.grad_cam(encoder, weight, x) for x in (tested, normal)]
        less = of_tested - of_normal.mean(0)
        return of_tested.clamp_min(0).numpy(), less.clamp_min(0).numpy()

    model = afire.load_models(run)[0]["checkpoint"][1].eval()
    networks = {**encoders_of(run), "pixels": lambda x: F.pad(
        F.avg_pool2d(x, 8).mean(1).flatten(1)[:, :, None], (0, 0, 1, 0))}
    rows = np.arange(52, len(pixels))
    for name, encoder in networks.items():
        expected = afire.anomaly_maps(pixels, rows, CPU, encoder,
                                      model if name == "checkpoint" else None,
                                      np.flatnonzero(~labels))
        if name != "pixels":
            x = mean_token(afire.features(encoder, learned)).double().numpy()
            plain, less = cams(encoder, ridge_by_sklearn(x, labels)[0])
            expected |= {"Grad-CAM, probe": plain, "Grad-CAM minus normals, probe": less}
            tuned, weight, _ = finetune_by_hand(encoder, pixels[:52], labels, 3, mean_token)
            plain, less = cams(tuned, weight)
            expected |= {"Grad-CAM, tuned": plain, "Grad-CAM minus normals, tuned": less}
            assert_classifier(printed, arrays, name, x, labels)
        for score, grids in expected.items():
            for column, values in boxes.localise(grids, masks, patients).items():
                found = arrays[f"{name}/{score}/{column}"]
                np.testing.assert_allclose(found, values, atol=0.02, err_msg=f"{name} {score}")
                assert np.abs(found - values).mean() < 2e-3
                shown = re.findall(rf"^{name}/{score} .*", printed, re.M)[0]
                sign = "+" if column == "own minus others" else ""
                form = " {:0.3f} ({:0.3f} to {:0.3f})".replace("0", sign)
                assert form.format(*boxes.with_interval(found, patients)) in shown
    assert {key.split("/")[1] for key in arrays if key.startswith("random_init/")} == {
        key.split("/")[1] for key in arrays if key.startswith("checkpoint/")}
    for prior, values in boxes.static_priors(masks, patients).items():
        np.testing.assert_allclose(arrays[f"static/{prior}/own map"], values)
    assert arrays["checkpoint/neighbours/own map"].std() > 0.02
    _, columns, maps, captions, outlines = pictures[0]
    np.testing.assert_array_equal(columns["image"], pixels[52:57, 0])
    assert list(maps) == ["prototype", "restoration", "neighbours",
                          "Grad-CAM\nminus normals, probe", "Grad-CAM\nminus normals, tuned"]
    found = boxes.localise(maps["neighbours"], masks[:5], patients[:5])["own map"]
    np.testing.assert_allclose(found, arrays["checkpoint/neighbours/own map"][:5], atol=1e-6)
    assert captions == [f"{name}\na|b" for name in BOXED[:5]]
    np.testing.assert_array_equal(outlines, masks[:5])


def assert_classifier(printed, arrays, network, x, labels):
    """Its scores are of three folds of the patients; AUROC overall and within each view."""
    patients = [patient_of(name) for name in TRAIN]
    folds = np.random.default_rng(0).permutation(len(set(patients))) % 3
    fold = np.array([folds[sorted(set(patients)).index(patient)] for patient in patients])
    scores = np.zeros(52)
    for i in range(3):
        weight, bias = ridge_by_sklearn(x[fold != i], labels[fold != i])
        scores[fold == i] = 4 * (x[fold == i] @ weight + bias) - 2
    np.testing.assert_allclose(arrays[f"train/{network}/probe"], scores, atol=1e-3)
    found = re.findall(rf"^{network}/probe +(overall.*)", printed, re.M)[0].split()
    views = np.array([view_of(name) for name in TRAIN])
    expected = [sklearn.metrics.roc_auc_score(labels, scores)]
    expected += [sklearn.metrics.roc_auc_score(labels[views == view], scores[views == view])
                 for view in ("AP", "PA")]
    assert found[::2] == ["overall", "AP", "PA"]
    assert [float(area) for area in found[1::2]] == pytest.approx(expected, abs=0.002)


def test_boxes_without_views_or_a_run(run, boxes_table, tmp_path, capsys):
    """An encoder alone has no prototype and no restoration; its folder is beside it."""
    lines = [line.rpartition(",")[0] for line in boxes_table.read_text().splitlines()]
    labels = table(tmp_path / "labels.csv", *lines[1:], header=lines[0])
    shutil.copy(run / "encoder.pth", tmp_path)
    boxes.main(f"--ckpt {tmp_path}/encoder.pth --data {run.parent} --labels {labels} "
               "--steps 1".split())
    printed = capsys.readouterr().out
    assert re.search(r"checkpoint/probe +overall 0\.\d{3} *\n", printed)
    assert "prototype" not in printed and "checkpoint/neighbours" in printed
    assert Image.open(tmp_path / "boxes-encoder.pth/boxes.png").width > 600


def test_boxes_need_masks_and_a_table(run, tmp_path, capsys):
    arguments = ["--ckpt", run, "--data", run.parent, "--labels"]
    assert "has masks of 0 new patients in test" in refusal(capsys, boxes, *arguments,
                                                            run.parent / "labels.csv")
    assert refusal(capsys, boxes, *arguments, "none.csv") == (
        "boxes.py: cannot use none.csv: No such file or directory")
    assert "--steps" in refusal(capsys, boxes, *arguments, "none.csv", "--steps", -1)


# ---- bench.py ------------------------------------------------------------------------------------

def operations_of_blocks(tokens, dim, depth):
    """Of a ViT's blocks, forward: qkv and proj, q k^T and its product with v, two layers of 4 D."""
    linear = 2 * tokens * (3 * dim * dim + dim * dim + 2 * 4 * dim * dim)
    attention = 2 * 2 * tokens * tokens * dim
    return depth * (linear + attention)


def operations_by_formula(size, patch, D=128, depth=4, K=64, h=128, b=128, d=64, decoder_depth=2):
    """Of a step of vit_micro for an image: -> forward, backward."""
    L = (size // patch) ** 2
    pixels = 3 * patch ** 2
    embedding = 2 * L * pixels * D
    encoder = operations_of_blocks(1 + L, D, depth)
    head = 2 * L * (D * h + h * h + h * b + b * K)
    decoder = (2 * (1 + L) * D * d + operations_of_blocks(1 + L, d, decoder_depth)
               + 2 * L * d * pixels)
    # Backward: a product for the gradient of the input, and one for that of the weight. Pixels
    # have no gradient, and the teacher has none at all.
    backward = embedding + 2 * (encoder + head + decoder)
    return 2 * (embedding + encoder + head) + decoder, backward


BENCH = "--preset small --img-size 32 --patch-size 8 --batch-size 4 --epochs 3 --device cpu"


def test_operations_are_those_of_a_formula():
    for size, patch in (32, 8), (32, 16):
        options = afire.parse_arguments(["pretrain", "--preset", "small", "--img-size", f"{size}",
                                         "--patch-size", f"{patch}"])
        model = afire.build_model(options).train()
        expected = operations_by_formula(size, patch)
        assert bench.operations(model, phantom_images(160, 32)[:2]) == expected


def test_a_benchmark_has_the_parts_of_a_step_of_these_options(tmp_path):
    options = afire.parse_arguments(["pretrain", *BENCH.split()])
    trainer = afire.Trainer(options, CPU, 5)
    Image.fromarray(afire.phantoms(1, 64)[0][0, 0]).save(tmp_path / "a.png")
    parts = bench.parts_of_a_step(trainer, tmp_path / "a.png")
    images = parts["decode"]()
    assert len(images) == 4 and images[0].shape == (32, 32)
    assert parts["texture centre"]().shape == (4, 2)
    assert parts["lesion mask"]().shape == (4, 1, 32, 32)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            parts["bare backbone"]()
    assert counter.get_total_flops() == 4 * sum(operations_by_formula(32, 8)), "teacher and student"
    before = copy.deepcopy(trainer.model.state_dict())
    parts["full step"]()
    changed = {key.split(".")[0] for key, value in trainer.model.state_dict().items()
               if not torch.equal(value, before[key])}
    assert changed == {"student", "teacher", "decoder", "prototypes"}
    assert trainer.model.prototypes.momentum == 0.75, "of a step after the first epoch"


def test_a_part_takes_the_median_of_its_rounds_after_two(monkeypatch):
    clock = [0.0]
    calls = []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def part(name, seconds):
        seconds = iter(seconds)

        def run_part():
            calls.append(name)
            clock[0] += next(seconds)
        return run_part

    medians = bench.measure({"a": part("a", [90, 80, 7, 6, 5, 4, 3, 2, 1]),
                             "b": part("b", [0, 0, 10, 30, 20, 10, 30, 20, 30])}, CPU)
    assert medians == {"a": 4, "b": 20} and calls == ["a", "b"] * 9


def test_the_benchmark_says_what_an_image_and_a_run_take(monkeypatch, capsys):
    medians = {"decode": 0.1, "texture centre": 0.2, "lesion mask": 0.004, "bare backbone": 4.8,
               "full step": 7.2}
    monkeypatch.setattr(bench, "measure", lambda parts, device: medians)
    bench.main([*BENCH.split(), "--images", "40001"])
    printed = capsys.readouterr().out
    assert "vit_micro, 32 px, batches of 4, on cpu\n" in printed
    for part, milliseconds, speed in (("decode", "25.000", "40.0"),
                                      ("lesion mask", "1.000", "1000.0"),
                                      ("full step", "1800.000", "0.6")):
        assert re.search(rf"^{part} +{milliseconds} ms an image +{speed} images/s$", printed, re.M)
    assert "full step / bare backbone: 1.500\n" in printed
    forward, backward = operations_by_formula(32, 8)
    assert f"{forward / 1e9:.3f} GFLOP an image forward, {backward / 1e9:.3f} backward" in printed
    # 10,000 steps of 4 images in an epoch; a step takes 7.2 seconds
    total = 120_000 * (forward + backward) / 1e12
    assert f"3 epochs of 40,001 images: 30,000 steps, {total:.1f} TFLOP, 60.0 hours here" in printed
    for option in "--img-size 30", "--images 3", "--images -1":
        assert option.split()[0] in refusal(capsys, bench, *BENCH.split(), *option.split())


def test_without_options_two_presets_are_measured(monkeypatch):
    measured = []
    monkeypatch.setattr(bench, "bench", lambda options, images: measured.append(
        (options.preset, options.batch_size, options.epochs, images)))
    bench.main([])
    bench.main("--preset paper --images 81117".split())
    assert measured == [("phantoms", 16, 18, 10_000), ("paper", 8, 400, 10_000),
                        ("paper", 64, 400, 81_117)]


# ---- shift.py ------------------------------------------------------------------------------------

def test_moved_images_are_those_held_out_and_the_others_stay(run, tmp_path):
    shift.main(f"--data {run.parent} --labels {run.parent}/labels.csv --out {tmp_path}/out".split())
    with open(tmp_path / "out/labels.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 150 and len(list((tmp_path / "out").iterdir())) == 151
    before = afire.load_radiographs(run.parent, 32, labels=run.parent / "labels.csv")
    moved = afire.load_radiographs(tmp_path / "out", 32, labels=tmp_path / "out/labels.csv")
    for part in "train", "test":
        members = getattr(before, part), getattr(moved, part)
        patients = [sorted((data.patients[row], bool(data.labels[row, 0])) for row in part_rows)
                  for data, part_rows in zip((before, moved), members)]
        contents = [{data.hashes[row] for row in part_rows}
                    for data, part_rows in zip((before, moved), members)]
        assert patients[0] == patients[1]
        assert contents[0] & contents[1] == (contents[0] if part == "train" else set())


def test_a_moved_image_is_zoomed_by_up_to_a_fifth_and_repeats_its_border():
    """To either side, and nothing is darker than the image."""
    ramp = np.tile(100 + np.arange(100, dtype=np.uint8), (100, 1))
    zooms = []
    places = []                                            # of the middle, by x and y in turn
    for seed in range(60):
        for image, axis in (ramp, 1), (ramp.T, 0):
            image = Image.fromarray(np.ascontiguousarray(image))
            moved = np.asarray(shift.move(image, np.random.default_rng(seed))).astype(float)
            line = moved[50] if axis else moved[:, 50]
            zooms.append((line[70] - line[30]) / 40)
            places.append(line[50] - 150)
            assert moved.shape == (100, 100) and moved.min() >= 100 and moved.max() <= 199
    assert 0.8 < min(zooms) < 0.87 and 0.97 < max(zooms) <= 1.03
    for axis in places[::2], places[1::2]:
        assert -7 <= min(axis) < -4 and 4 < max(axis) <= 7
    assert abs(np.corrcoef(places[::2], places[1::2])[0, 1]) < 0.4


def test_what_cannot_be_reframed_is_one_sentence(run, tmp_path, capsys):
    arguments = ["--data", run.parent, "--labels", run.parent / "labels.csv", "--out"]
    assert "exists: name a new folder" in refusal(capsys, shift, *arguments, tmp_path)
    labels = table(tmp_path / "train.csv", "001.png,,1,train")
    arguments[3] = labels
    assert "holds no image out" in refusal(capsys, shift, *arguments, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    arguments[3] = tmp_path / "none.csv"
    assert "cannot use" in refusal(capsys, shift, *arguments, tmp_path / "out")
