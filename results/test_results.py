"""Tests of the scripts in this folder, with the helpers of test_afire.py.

One small run serves most of them. After its pre-training its table changes: people that it was
trained on are to be tested, beside a broken file and a copy, and none of these may count.
"""

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

import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402
import boxes  # noqa: E402
import crops  # noqa: E402
import curves  # noqa: E402
import finetune  # noqa: E402
import lesions  # noqa: E402
import mae  # noqa: E402
import shift  # noqa: E402
import tables  # noqa: E402
import tokens as token_pictures  # noqa: E402
from test_afire import (CPU, ROOT, load_run, names, phantom_images, randomise, seeded,  # noqa: E402
                        shell, small_set, table, tiny_batch, tiny_model, working_folder,
                        write_images)

__all__ = ["working_folder"]                               # a fixture: pytest finds it here

HELD_OUT = [f"{i:03}.png" for i in range(90)]
MOVED = [f"{i:03}.png" for i in range(90, 98)]             # trained on, then to be tested
TRAIN = [f"{i:03}.png" for i in range(98, 150)]
NEW = [*HELD_OUT, "090.png", "095.png"]                    # with findings: not trained on


def is_normal(name):
    return int(name[:3]) % 5 != 0


def write_labels(file, held_out):
    """Two images of a person each, beside a broken file and a copy of a normal film."""
    rows = [f"{name},{'' if is_normal(name) else 'a'},{int(name[:3]) // 2},"
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
    films = [afire.read_image(run.parent / name, 32, "equal") for name in file_names]
    return np.stack(films)[:, None]


def encoders_of(run):
    """The trained encoder, of the file that the run leaves, and the untrained."""
    options = afire.PretrainOptions(**load_run(run)[0]["config"])
    untrained = afire.build_model(options).student["encoder"]
    encoders = {"checkpoint": afire.load_encoder(run / "encoder.pth"), "random_init": untrained}
    return {name: encoder.eval().requires_grad_(False) for name, encoder in encoders.items()}


@pytest.fixture(scope="module")
def evaluated(run):
    """What the scripts print that evaluate the run."""
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        afire.main(f"eval --ckpt {run} --device cpu".split())
        lesions.main([str(run)])
        finetune.main([str(run), "--steps", "3"])
        token_pictures.main([str(run), "--no-picture"])
    return stream.getvalue()


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
    odd = mae.hide_patches(torch.zeros(2, 1, 24, 24), seeded(), patch_size=8)[1]
    assert (afire.abnormal_tokens(odd, 8).sum(1) == 6).all(), "a quarter of 9, rounded up, is 3"


def test_mae_hides_patches_of_the_run_s_size(monkeypatch):
    monkeypatch.setattr(afire, "AFiRe", afire.AFiRe)                   # both are restored later
    monkeypatch.setattr(afire, "synthetic_lesion_mask", afire.synthetic_lesion_mask)
    monkeypatch.setattr(mae, "afire_pretrain", lambda options: None)
    mae.pretrain(afire.parse_arguments("pretrain --patch-size 4 --device cpu".split()))
    images = phantom_images(160, 32)[:6]
    assert_close(afire.synthetic_lesion_mask(images, seeded()),
                 mae.hide_patches(images, seeded(), patch_size=4))
    assert afire.AFiRe is mae.MAE


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


@pytest.mark.parametrize("script", ["crops.py", "mae.py"])
def test_other_methods_pretrain(run, tmp_path, script):
    done = shell(f"{sys.executable} {ROOT}/results/{script} pretrain --data {run.parent} --labels "
                 f"{run.parent}/before.csv --out {tmp_path} --preset small --img-size 32 "
                 "--patch-size 16 --batch-size 8 --epochs 1 --device cpu")
    assert done.returncode == 0, done.stderr
    epoch = load_run(tmp_path)[1][0]
    assert epoch["category"] == 0 and epoch["restoration"] > 0
    assert (epoch["structure"] > 0) == (script == "crops.py")


# ---- lesions.py ----------------------------------------------------------------------------------

def test_lesions_are_scored_on_all_normal_films_that_are_new(run, evaluated):
    arrays = np.load(run / "lesions/predictions.npz")
    films = [name for name in HELD_OUT if is_normal(name)]
    n = len(films)
    assert n > 64, "in two batches"
    assert arrays["labels"][:, 0].tolist() == [False] * n + [True] * n
    assert arrays["patients"].tolist() == [str(int(name[:3]) // 2) for name in films] * 2
    pixels = images_of(run, films)
    lesioned, masks = afire.synthetic_lesion_mask(torch.from_numpy(pixels) / 255, seeded())
    assert not arrays["masks"][:n].any()
    np.testing.assert_array_equal(arrays["masks"][n:], masks[:, 0] > 0)
    references = images_of(run, [name for name in TRAIN if is_normal(name)])
    images = np.concatenate([references, pixels, (255 * lesioned).round().byte().numpy()])
    rows = np.arange(len(references), len(images))
    for name, encoder in encoders_of(run).items():
        expected = afire.anomaly_maps(images, rows, CPU, encoder, None, np.arange(len(references)))
        np.testing.assert_allclose(arrays[f"{name}/neighbours"], expected["neighbours"], rtol=1e-3)
        assert arrays[f"{name}/prototype"].shape == (2 * n, 4, 4)
    scores = arrays["checkpoint/neighbours"]
    assert scores[n:].mean() > scores[:n].mean()


def test_an_encoder_is_no_run(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        lesions.main([str(run / "encoder.pth")])
    assert "is not the folder of a run" in capsys.readouterr().err


# ---- finetune.py ---------------------------------------------------------------------------------

def test_finetuning_learns_what_a_linear_probe_cannot():
    """It leaves the encoder as it was."""
    data = small_set()
    encoder = tiny_model().teacher["encoder"]
    before = copy.deepcopy(encoder.state_dict())
    x = afire.features(encoder, torch.from_numpy(data.images) / 255).mean(1)
    weight, bias = afire.linear_probe(x[data.train], torch.from_numpy(data.labels[data.train]))
    truth = data.labels[data.test, 0]
    probe = afire.auroc((x[data.test] @ weight + bias)[:, 0].numpy(), truth)
    tuned, layer = finetune.finetune(encoder, data, data.train, 150, CPU)
    images = torch.from_numpy(data.images[data.test]) / 255
    scores = layer(afire.features(tuned, images).mean(1))[:, 0]
    assert afire.auroc(scores, truth) > max(0.95, probe + 0.05)
    assert_close(encoder.state_dict(), before, rtol=0, atol=0)


def test_finetuning_does_not_learn_from_what_is_tested():
    data = small_set(80)
    encoder = tiny_model().teacher["encoder"].eval().requires_grad_(False)
    before = finetune.scores_of_network(encoder, data, 2, CPU)
    data.labels[data.test] = np.random.default_rng(0).random((40, 1)) < 0.5
    assert_close(finetune.scores_of_network(encoder, data, 2, CPU), before, equal_nan=True)


def finetune_by_hand(encoder, images, labels, tested, steps):
    """The recipe, written out for one finding: -> scores of tested (T, 1)."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    model = nn.ModuleDict({"blocks": copy.deepcopy(encoder), "layer": nn.Linear(128, 1)})
    model.requires_grad_(False)["layer"].requires_grad_()
    model["blocks"].blocks.requires_grad_()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                  weight_decay=0.05)

    def score(pixels):
        tokens = model["blocks"](afire.normalise(torch.from_numpy(pixels) / 255))[:, 1:]
        return model["layer"](tokens.mean(1))

    for step in range(steps):
        rows = random.choice(len(images), 32)
        lr = 1e-3 * (step + 1) / 10 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr
        p = score(images[rows])[:, 0].sigmoid()
        truth = torch.from_numpy(labels[rows]).float()
        optimizer.zero_grad()
        (-truth * p.log() - (1 - truth) * (1 - p).log()).mean().backward()
        optimizer.step()
    return score(tested).detach().numpy()


def test_finetuned_scores_are_of_both_networks_few_labels_and_new_images(run, evaluated):
    arrays = dict(np.load(run / "finetune/predictions.npz"))
    truth = np.array([[not is_normal(name)] for name in NEW])
    assert arrays["images"].tolist() == NEW and arrays["findings"].tolist() == ["a"]
    assert arrays["patients"].tolist() == [str(int(name[:3]) // 2) for name in NEW]
    np.testing.assert_array_equal(arrays["labels"], truth)
    for network, encoder in encoders_of(run).items():
        parts = [arrays[f"{network}/finetune {fraction}"] for fraction in ("1%", "10%", "100%")]
        assert [part.shape for part in parts] == [(5, 92, 1), (5, 92, 1), (1, 92, 1)]
        random = np.random.default_rng(0)
        learned = []
        numbers = [2] * 5 + [5] * 5 + [52]                 # of images to learn from
        for n, scores in zip(numbers, np.concatenate(parts)):
            drawn = [TRAIN[row] for row in random.permutation(len(TRAIN))[:n]]
            labels = np.array([not is_normal(name) for name in drawn])
            assert np.isnan(scores).all() == (labels.all() or not labels.any())
            if n not in learned and not np.isnan(scores).any():
                expected = finetune_by_hand(encoder, images_of(run, drawn), labels,
                                            images_of(run, NEW), 3)
                np.testing.assert_allclose(scores, expected, atol=2e-4)
                learned.append(n)
        assert {5, 52} <= set(learned)
        areas = [[sklearn.metrics.roc_auc_score(truth, draw) for draw in part
                  if not np.isnan(draw).any()] for part in parts]
        lines = re.findall(r"^\d+% of the labels +(\S+) +(\S+)", evaluated, re.M)
        shown = [line[network == "random_init"] for line in lines]
        assert shown == [f"{np.mean(area):.3f}" for area in areas]


def test_the_mean_auroc_is_of_findings_and_each_is_of_its_defined_draws():
    labels = np.arange(12)[:, None] % [2, 3] == 0
    scores = np.random.default_rng(0).random((3, 12, 2))
    areas = [np.mean([sklearn.metrics.roc_auc_score(labels[:, f], draw[:, f]) for draw in draws])
             for f, draws in enumerate((scores[2:], scores))]
    scores[:2, :, 0] = np.nan
    assert finetune.macro_auroc(scores, labels) == pytest.approx(np.mean(areas))


# ---- tokens.py -----------------------------------------------------------------------------------

def test_cohesion_is_the_silhouette_of_tokens_by_position(run, evaluated):
    assert not (run / "tokens.png").exists()
    films = torch.from_numpy(images_of(run, [n for n in HELD_OUT if is_normal(n)][:24])) / 255
    expected = {}
    for name, encoder in encoders_of(run).items():
        tokens = afire.features(encoder, films)                        # (24, 16, D)
        expected[name] = sklearn.metrics.silhouette_score(
            tokens.transpose(0, 1).reshape(16 * 24, -1).numpy(), np.arange(16).repeat(24))
    assert abs(expected["checkpoint"] - expected["random_init"]) > 0.002
    assert json.loads((run / "cohesion.json").read_text()) == pytest.approx(expected, abs=1e-4)
    assert re.search("cohesion {checkpoint:.3f}, .*{random_init:.3f}".format(**expected),
                     evaluated)


def test_the_picture_of_tokens_has_a_column_for_each_network(run, evaluated, monkeypatch):
    clouds = []
    monkeypatch.setattr(token_pictures.TSNE, "fit_transform",
                        lambda self, points: clouds.append(points) or points[:, :2])
    token_pictures.main([str(run)])
    assert Image.open(run / "tokens.png").width > 300
    films = torch.from_numpy(images_of(run, [n for n in HELD_OUT if is_normal(n)][:24])) / 255
    encoders = encoders_of(run)
    for cloud, name in (clouds[0], "random_init"), (clouds[2], "checkpoint"):
        np.testing.assert_allclose(cloud, afire.features(encoders[name], films).flatten(0, 1),
                                   atol=1e-4)


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


def test_curves_are_those_of_the_logs_with_lines_that_give_them_meaning(run, tmp_path, monkeypatch,
                                                                       capsys):
    labels = str(run.parent / "before.csv")
    folders = [copy_run(run, tmp_path / "whole", 4, labels=labels),
               copy_run(run, tmp_path / "begun", 1, labels=labels, arch="vit_small"),
               copy_run(run, tmp_path / "gone", 4, data=str(tmp_path / "nowhere")),
               copy_run(run, tmp_path / "other", 3)]
    figures = []
    original = curves.Figure.savefig
    monkeypatch.setattr(curves.Figure, "savefig",
                        lambda self, *a, **b: figures.append(self) or original(self, *a, **b))
    curves.main([*folders, "--out", str(tmp_path / "curves.png")])
    assert Image.open(tmp_path / "curves.png").mode == "RGB"
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


def test_curves_of_a_run_without_a_log_are_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        curves.main([str(tmp_path)])
    assert re.fullmatch(r"curves.py: there is no .*log.jsonl: .*\n", capsys.readouterr().err)


def test_the_variance_of_phantoms_and_without_a_checkpoint(tmp_path, monkeypatch):
    phantoms = small_set(80)
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

def test_boxes_are_of_people_who_are_new_and_maps_of_what_was_learned(run, tmp_path, monkeypatch,
                                                                      capsys):
    """Every sixth image has a box, and so have the broken file and the copy, which do not count."""
    boxed = [name for name in HELD_OUT + MOVED + TRAIN if int(name[:3]) % 6 == 0]
    table(tmp_path / "boxes.csv", *[f"{name},a,8,{int(name[:3]) % 7},9,9" for name in boxed],
          "broken.png,a,8,8,9,9", "copy.png,a,8,8,9,9", header="image,finding,x,y,w,h")
    arguments = []
    tuned = []
    maps_of_network = boxes.maps_of_network
    monkeypatch.setattr(boxes, "maps_of_network",
                        lambda *args: arguments.append(args) or maps_of_network(*args, steps=3))
    monkeypatch.setattr(boxes, "finetune",
                        lambda *args: tuned.append(finetune.finetune(*args)) or tuned[-1])
    boxes.main(f"--ckpt {run} --data {run.parent} --labels {run.parent}/labels.csv --boxes "
               f"{tmp_path}/boxes.csv --out {tmp_path}".split())
    assert "27 boxes, 2 of them in no image" in capsys.readouterr().out
    encoder, _, data, normals, rows, _ = arguments[0]
    tested = [name for name in boxed if name in HELD_OUT]
    people = {int(name[:3]) // 2 for name in boxed}
    assert [data.names[row] for row in rows] == tested
    learned = [name for name in TRAIN if int(name[:3]) // 2 not in people]
    assert names(data, data.train) == set(learned)
    assert names(data, normals) == {name for name in learned if is_normal(name)}
    np.testing.assert_array_equal(data.images[rows], images_of(run, tested))
    for args, trained in zip(arguments, encoders_of(run).values()):
        assert_close(args[0].state_dict(), trained.state_dict())

    images = torch.from_numpy(data.images).float() / 255
    x = afire.features(encoder, images[data.train]).mean(1).numpy()
    z = (x - x.mean(0)) / x.std(0)
    probe = sklearn.linear_model.Ridge(alpha=10).fit(z, data.labels[data.train, 0])
    weight = torch.from_numpy(probe.coef_ / x.std(0))
    maps = maps_of_network(*arguments[0], steps=3)
    for key, network, direction in (("Grad-CAM, probe", encoder, weight),
                                    ("Grad-CAM, tuned", tuned[0][0], tuned[0][1].weight[0])):
        cams = boxes.grad_cam(network, direction, images)
        expected = (cams[rows] - cams[normals].mean(0)).clamp_min(0).numpy()
        np.testing.assert_allclose(maps[key], expected, rtol=0.01, atol=0.01 * expected.max())
    report = json.loads((tmp_path / "boxes.json").read_text())
    masks = boxes.read_boxes(tmp_path / "boxes.csv", data, run.parent)
    truth = np.stack([masks[name] for name in tested])
    patients = np.array(data.patients)[rows]
    assert report["checkpoint"]["prototype"] == boxes.localisation(maps["prototype"], truth,
                                                                   patients)
    assert report["random_init"]["prototype"] != report["checkpoint"]["prototype"]
    assert Image.open(tmp_path / "boxes.png").mode == "RGB"


def test_boxes_become_masks_of_the_squashed_image_or_are_refused(tmp_path):
    ramp = np.arange(48 * 96).reshape(48, 96) / 18
    tag = Image.Exif()
    tag[0x0112] = 6                                        # shown turned: 48 wide, 96 high
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "a.png", exif=tag)
    data = afire.load_radiographs(tmp_path, 24)

    def masks(header, *lines):
        file = table(tmp_path / "boxes.csv", *lines, header=f"image,finding,{header}")
        return boxes.read_boxes(file, data, tmp_path)

    expected = np.zeros((24, 24), bool)
    expected[4:12, 4:6] = True
    expected[22:, 20:] = True
    np.testing.assert_equal(masks("x,y,w,h", "b.png,c,1,1,1,1", "a.png,c,9,17,2,30",
                                  "a.png,c,41,88,7,8", "a.png,c,44,92,2,2"), {"a.png": expected})
    for header, line, message in (("x,y,w,h", "a.png,c,20,9,29,30", "29 x 30.*a.png.*48 x 96"),
                                  ("x,y,w,h", "a.png,c,20,70,9,27", "9 x 27.*a.png.*48 x 96"),
                                  ("x,y,w,h", "b.png,c,1,1,1,1", "no box"),
                                  ("x,y", "a.png,c,1,1", "columns")):
        with pytest.raises(afire.InputError, match=message):
            masks(header, line)


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


def test_localisation_is_perfect_or_scikit_learns_with_an_interval_of_patients():
    masks = np.random.default_rng(0).random((8, 6, 6)) < 0.3
    report = boxes.localisation(masks * 1.0, masks, np.arange(8))
    assert report == dict.fromkeys(["AUROC", "Dice", "pointing"], {"mean": 1, "ci95": [1, 1]})
    grids = np.random.default_rng(1).random((8, 6, 6)).round(1)        # with ties
    grids[:, 2, 3] = 2 - masks[:, 2, 3]                                # the maximum: always here
    report = boxes.localisation(grids, masks, np.array(list("aaaaaabb")))
    values = {"AUROC": [], "Dice": [], "pointing": masks[:, 2, 3]}
    for scores, mask in zip(grids.reshape(8, 36), masks.reshape(8, 36)):
        values["AUROC"].append(sklearn.metrics.roc_auc_score(mask, scores))
        values["Dice"].append(max(sklearn.metrics.f1_score(mask, scores >= threshold)
                                  for threshold in scores))
    assert 0 < masks[:, 2, 3].mean() < 1
    for measure, by_image in values.items():
        ends = sorted([np.mean(by_image[:6]), np.mean(by_image[6:])])  # one patient, drawn twice
        metric = report[measure]
        assert [metric["mean"], *metric["ci95"]] == pytest.approx([np.mean(by_image), *ends])
    report = boxes.localisation(grids, masks, np.arange(8))
    drawn = np.random.default_rng(0).integers(8, size=(1000, 8))
    for measure, by_image in values.items():
        ends = np.quantile(np.array(by_image)[drawn].mean(1), [0.025, 0.975])
        assert report[measure]["ci95"] == pytest.approx(ends)


def test_a_box_is_an_outline(tmp_path, monkeypatch):
    drawn = []
    plot = afire.plot_images
    monkeypatch.setattr(afire, "plot_images", lambda file, columns: drawn.append(columns)
                        or plot(file, columns))
    images = np.random.default_rng(0).integers(0, 200, (2, 32, 32), np.uint8)
    masks = np.zeros((2, 32, 32), bool)
    masks[:, 8:20, 10:30] = True
    expected = np.where(masks, 255, images)
    expected[:, 9:19, 11:29] = images[:, 9:19, 11:29]
    boxes.plot_boxes(tmp_path / "a.png", images, masks, {"score": np.eye(4)[None].repeat(2, 0)})
    assert list(drawn[0]) == ["image", "score"]
    np.testing.assert_array_equal(drawn[0]["image"], expected)


# ---- tables.py -----------------------------------------------------------------------------------

@pytest.fixture
def evaluations(tmp_path, monkeypatch):
    """Folders 0 to 2 of evaluations in the working folder."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    labels = np.arange(60)[:, None] % [3, 4] == 0
    masks = labels.any(1)[:, None, None] & (np.indices((8, 8)).sum(0) < 6)
    runs = []
    for i in range(3):
        runs.append({"patients": np.arange(60) // 2, "findings": np.array(["a", "b"]),
                     "images": np.arange(60), "labels": labels, "masks": masks,
                     "checkpoint/linear 1%": (random.random((5, 60, 2)) + labels / 3).round(1),
                     "random_init/prototype": random.random((60, 4, 4)) + labels[:, :1, None] / 9,
                     "random_init/restoration": random.random((60, 4, 4)) + masks[:, ::2, ::2],
                     "random_init/neighbours": random.random((60, 4, 4))})
        save(f"{i}/eval", runs[-1])
    return runs


def save(folder, arrays):
    Path(folder).mkdir(parents=True)
    np.savez(Path(folder, "predictions.npz"), **arrays)


def cells(printed):
    """-> {(number of the table, row, column): cell} of Markdown tables."""
    found = {}
    for i, part in enumerate(re.findall(r"(?:^\|.*\n)+", printed, re.M)):
        titles, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")]
                            for line in part.splitlines()]
        found |= {(i, row[0], title): cell for row in rows for title, cell in zip(titles, row)}
    return found


def probe_auroc(run, rows=slice(None)):
    return np.mean([sklearn.metrics.roc_auc_score(run["labels"][rows], draw[rows])
                    for draw in run["checkpoint/linear 1%"]])


def test_tables_are_scikit_learns_and_pair_runs_and_patients(evaluations, capsys):
    probe = [probe_auroc(run) for run in evaluations]
    pixel = []
    for run in evaluations:
        maps = torch.from_numpy(run["random_init/restoration"]).unsqueeze(1)   # the best one
        grid = F.interpolate(maps, (8, 8), mode="bilinear")
        pixel.append(sklearn.metrics.roc_auc_score(run["masks"].ravel(), grid.ravel()))
    tables.main(["A=0/eval,1/eval", "B=0/eval,2/eval"])
    printed = cells(capsys.readouterr().out)
    low, high = sorted(probe[0:3:2])
    assert printed[0, "B", "probe, 1 %"] == f"{(low + high) / 2:.3f} ({low:.3f} to {high:.3f})"
    assert printed[0, "untrained", "pixels by the best score"].startswith(
        f"{np.mean(pixel[:2]):.3f} ({min(pixel[:2]):.3f} to ")
    assert printed[1, "B", "probe, 1 %"].startswith(f"{(probe[2] - probe[1]) / 2:+.3f} (")
    tables.main(["A=0/eval", "B=0/eval"])
    assert cells(capsys.readouterr().out)[1, "B", "probe, 1 %"] == "+0.000 (+0.000 to +0.000)"
    counts = tables.draw_images(np.arange(60) // 2, 9)                 # of which the first are 1
    assert (counts[0] == 1).all() and (counts[:, ::2] == counts[:, 1::2]).all()
    labels = evaluations[0]["labels"][:, 0]
    scores = evaluations[0]["checkpoint/linear 1%"][0, :, 0]
    area = sklearn.metrics.roc_auc_score(labels, scores, sample_weight=counts[8])
    assert tables.auroc(scores, labels, counts)[8] == pytest.approx(area)
    for key in "images", "patients", "findings", "labels":
        save(f"{key}/eval", {**evaluations[0], key: evaluations[0][key][::-1]})
        with pytest.raises(SystemExit, match="2"):
            tables.main(["A=0/eval", f"B={key}/eval"])
        assert f"other {key}" in capsys.readouterr().err


def test_the_table_of_one_run_has_intervals_of_people(evaluations, capsys):
    """By a bootstrap written out: people are drawn, and all of their images are taken."""
    tables.main(["A=0/eval"])
    printed = cells(capsys.readouterr().out)[0, "untrained", "images by prototype"]
    run = evaluations[0]
    scores = np.sort(run["random_init/prototype"].reshape(60, 16))[:, 12:].mean(1)
    abnormal = run["labels"].any(1)
    random = np.random.default_rng(0)
    areas = []
    for _ in range(200):
        rows = np.concatenate([[2 * person, 2 * person + 1]
                               for person in random.integers(30, size=30)])
        areas.append(sklearn.metrics.roc_auc_score(abnormal[rows], scores[rows]))
    value = sklearn.metrics.roc_auc_score(abnormal, scores)
    low, high = np.quantile(areas, [0.025, 0.975])
    assert printed == f"{value:.3f} ({low:.3f} to {high:.3f})"


def test_tables_read_fine_tuning_and_cohesion_beside_eval_and_leave_images_out(evaluations, capsys):
    run = evaluations[0]
    tuned = {key: run[key] for key in ("images", "patients", "findings", "labels")}
    scores = np.random.default_rng(1).random((1, 60, 2))
    save("0/finetune", {**tuned, "checkpoint/finetune 100%": scores})
    save("0/published", run)
    save("1/finetune", {**tuned, "images": tuned["images"] + 1})
    Path("0/cohesion.json").write_text('{"checkpoint": 0.25, "random_init": -0.125}')
    kept = np.array([not str(image).startswith(("1", "5")) for image in run["images"]])
    for arguments, rows in ([], slice(None)), (["--without", "^[15]"], kept):
        tables.main(["A=0/eval", *arguments])
        printed = cells(capsys.readouterr().out)
        area = sklearn.metrics.roc_auc_score(run["labels"][rows], scores[0, rows])
        assert printed[0, "A", "fine-tuned, 100 %"].startswith(f"{area:.3f} (")
        assert printed[0, "A", "probe, 1 %"].startswith(f"{probe_auroc(run, rows):.3f} (")
        assert printed[0, "A", "cohesion"] == "0.250"
        assert printed[0, "A", "images by prototype"] == "-"
        assert printed[1, "untrained", "cohesion"] == "-0.375"
    tables.main(["A=0/published"])
    assert not {"fine-tuned, 100 %", "cohesion"} & {column for _, _, column in
                                                    cells(capsys.readouterr().out)}
    with pytest.raises(SystemExit, match="2"):
        tables.main(["A=1/eval"])
    assert re.search("1/finetune.* other images", capsys.readouterr().err)


def test_tables_take_what_the_other_scripts_write(run, evaluated, capsys):
    tables.main([f"AFiRe={run}/eval"])
    columns = {column for _, _, column in cells(capsys.readouterr().out)}
    assert columns == {"", *tables.COLUMNS.values()} - {"pixels by the best score"}
    tables.main([f"AFiRe={run}/lesions"])
    assert "pixels by the best score" in capsys.readouterr().out


# ---- shift.py ------------------------------------------------------------------------------------

def test_moved_films_are_those_held_out_and_the_others_stay(run, tmp_path):
    shift.main(f"--data {run.parent} --labels {run.parent}/labels.csv --out {tmp_path}/out".split())
    with open(tmp_path / "out/labels.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 150 and len(list((tmp_path / "out").iterdir())) == 151
    before = afire.load_radiographs(run.parent, 32, labels=run.parent / "labels.csv")
    moved = afire.load_radiographs(tmp_path / "out", 32, labels=tmp_path / "out/labels.csv")
    for part in "train", "test":
        members = getattr(before, part), getattr(moved, part)
        people = [sorted((data.patients[row], bool(data.labels[row, 0])) for row in part_rows)
                  for data, part_rows in zip((before, moved), members)]
        contents = [{data.hashes[row] for row in part_rows}
                    for data, part_rows in zip((before, moved), members)]
        assert people[0] == people[1]
        assert contents[0] & contents[1] == (contents[0] if part == "train" else set())


def test_a_moved_film_is_zoomed_by_up_to_a_fifth_and_repeats_its_border():
    ramp = np.tile(np.arange(100, dtype=np.uint8), (100, 1))
    zooms = []
    places = []                                            # of the middle, by x and y in turn
    for seed in range(60):
        for film, axis in (ramp, 1), (ramp.T, 0):
            image = Image.fromarray(np.ascontiguousarray(film))
            moved = np.asarray(shift.move(image, np.random.default_rng(seed))).astype(float)
            line = moved[50] if axis else moved[:, 50]
            zooms.append((line[70] - line[30]) / 40)
            places.append(line[50])
            assert moved.shape == (100, 100) and abs(line[50] - 50) <= 7
    assert 0.8 < min(zooms) < 0.87 and 0.97 < max(zooms) <= 1.03
    assert abs(np.corrcoef(places[::2], places[1::2])[0, 1]) < 0.4
