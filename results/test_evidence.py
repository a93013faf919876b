"""Tests of probes.py, locate.py, tables.py and all.sh, with the helpers of test_afire.py.

Figures are compared with scikit-learn's, or with loops that resample patients and seeds.
"""

import contextlib
import functools
import io
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import afire  # noqa: E402
import boxes  # noqa: E402
import locate  # noqa: E402
import probes  # noqa: E402
import tables  # noqa: E402
from test_afire import ROOT, seeded, table, working_folder, write_images  # noqa: E402

__all__ = ["working_folder"]                               # a fixture: pytest finds it here

NAMES = [f"{i:03}.png" for i in range(150)]
HELD_OUT = NAMES[:60]


def is_normal(name):
    return int(name[:3]) % 5 not in (0, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run, in the folder of its images; two images of each patient."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder, afire.phantoms(150, 32)[0][:, 0], NAMES)
    table(folder / "labels.csv", *[
        f"{name},{'' if is_normal(name) else 'a'},{int(name[:3]) // 2},"
        f"{'test' if name in HELD_OUT else 'train'}" for name in NAMES])
    with contextlib.redirect_stdout(io.StringIO()):
        afire.main(f"pretrain --data {folder} --labels {folder}/labels.csv --out {folder}/run "
                   "--preset small --img-size 32 --batch-size 8 --epochs 4 --device cpu".split())
    return folder / "run"


def images_of(run, names):
    """As the run sees them: (n, 1, 32, 32) uint8."""
    return np.stack([afire.read_image(run.parent / name, 32, "equal") for name in names])[:, None]


def refusal(capsys, script, *arguments):
    """The script ends with status 2: -> what it prints to stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


# ---- probes.py -----------------------------------------------------------------------------------

@pytest.mark.parametrize("n, dim", [(40, 60), (60, 40), (40, 40)])
def test_the_probe_is_scikit_learns_with_the_penalty_of_the_smallest_error(n, dim):
    chosen = []
    for noise in 0.1, 1, 30:
        random = np.random.default_rng(n)
        x = random.standard_normal((n, dim)) @ random.standard_normal((dim, dim)) + 5
        x[:, 3] = 7                                        # a constant feature
        y = x[:, :2] + noise * random.standard_normal((n, 2)) > 5
        weight, bias, penalty = probes.ridge_with_chosen_penalty(torch.from_numpy(x),
                                                                 torch.from_numpy(y))
        expected = make_pipeline(StandardScaler(), RidgeCV([1, 10, 100, 1000, 10000]))
        expected.fit(x, y * 1.0)
        assert penalty == expected[1].alpha_
        np.testing.assert_allclose(torch.from_numpy(x) @ weight + bias, expected.predict(x),
                                   atol=1e-6)
        chosen.append(penalty)
    assert len(set(chosen)) > 1


def test_block_means_are_those_of_a_loop():
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 32, 32), np.uint8)
    means = probes.block_means(images, 4).view(3, 4, 4)
    for i, row, column in np.ndindex(3, 4, 4):
        block = images[i, 0, 8 * row:8 * row + 8, 8 * column:8 * column + 8]
        assert means[i, row, column].item() == pytest.approx(block.mean())


def test_pixel_anomaly_scores_are_scikit_learns():
    random = np.random.default_rng(0)
    references = (random.standard_normal((90, 64)) * np.linspace(1, 9, 64)).astype(np.float32)
    x = (20 * random.standard_normal((30, 64))).astype(np.float32)
    scores = probes.pixel_anomaly_scores(torch.from_numpy(x), torch.from_numpy(references))
    distances, _ = NearestNeighbors(n_neighbors=5).fit(references).kneighbors(x)
    np.testing.assert_allclose(scores["nearest"], distances.mean(1), rtol=1e-4)
    levels = np.sort(StandardScaler().fit(references).transform(x))[:, 48:].mean(1)
    np.testing.assert_allclose(scores["levels"], levels, rtol=1e-4)
    whitened = PCA(32, whiten=True).fit(references).transform(x)
    expected = np.sqrt((whitened ** 2).sum(1) * 90 / 89)   # by n instead of n - 1
    np.testing.assert_allclose(scores["components"], expected, rtol=1e-3)


@pytest.fixture(scope="module")
def probed(run):
    """probes.npz of the run's own images, and what the script prints."""
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        probes.main([str(run)])
    return dict(np.load(run / "eval/probes.npz")), stream.getvalue()


def test_probes_learn_from_the_subsets_of_eval_and_test_on_new_images(run, probed):
    arrays, printed = probed
    assert arrays["images"].tolist() == HELD_OUT
    assert arrays["patients"].tolist() == [str(int(name[:3]) // 2) for name in HELD_OUT]
    truth = np.array([not is_normal(name) for name in HELD_OUT])
    np.testing.assert_array_equal(arrays["labels"][:, 0], truth)
    encoder = afire.load_encoder(run / "encoder.pth").eval()
    with torch.no_grad():
        tokens = afire.features(encoder, torch.from_numpy(images_of(run, NAMES)) / 255)
    grid = tokens.unflatten(1, (2, 2, 2, 2)).mean((2, 4))              # (n, 2, 2, D)
    features = {"checkpoint/1 x 1": tokens.mean(1), "checkpoint/4 x 4": tokens.mT.flatten(1),
                "checkpoint/2 x 2": grid.flatten(1, 2).mT.flatten(1),
                "pixels/8 x 8": probes.block_means(images_of(run, NAMES), 8)}
    labels = np.array([not is_normal(name) for name in NAMES])
    random = np.random.default_rng(0)
    subsets = [60 + random.permutation(90)[:n] for n in [2] * 5 + [9] * 5 + [90]]
    for name, x in features.items():
        x = x.half().double().numpy() if "check" in name else x.double().numpy()
        fractions = [arrays[f"{name} {fraction}"] for fraction in ("1%", "10%", "100%")]
        for rows, scores in zip(subsets, np.concatenate(fractions)):
            if labels[rows].all() or not labels[rows].any():
                assert np.isnan(scores).all()
                continue
            probe = make_pipeline(StandardScaler(), RidgeCV([1, 10, 100, 1000, 10000]))
            probe.fit(x[rows], labels[rows] * 1.0)
            if len(rows) > 2:                              # ties between penalties
                np.testing.assert_allclose(scores[:, 0], probe.predict(x[:60]), atol=1e-2)
        area = roc_auc_score(truth, fractions[2][0, :, 0])
        line = re.search(rf"^{name} 100% +(\S+) +(\S+) +(\S+)$", printed, re.M)
        pixels = max(roc_auc_score(truth, arrays[f"pixels/{blocks} x {blocks} 100%"][0, :, 0])
                     for blocks in (4, 8, 16))
        assert line.groups() == (f"{area:.3f}", f"{area - pixels:+.3f}", "+0.000")
    levels = afire.auroc(arrays["pixels/levels"], truth)
    assert re.search(rf"^pixels/levels +{levels:.3f} ", printed, re.M)


def test_probes_take_other_images_without_those_of_the_pretraining(run, tmp_path, capsys):
    names = NAMES[50:75]                                   # 60 and above are in train
    write_images(tmp_path, afire.phantoms(150, 32)[0][50:75, 0], names)
    others = [f"t{i}.png" for i in range(40)]
    write_images(tmp_path, afire.phantoms(40, 32, seed=1)[0][:, 0], others)
    rows = [f"{name},{'' if is_normal(name) else 'a'},{name},test" for name in names]
    rows += [f"t{i}.png,{'a' * (i % 2)},t{i},train" for i in range(40)]
    table(tmp_path / "other.csv", *rows)
    probes.main([str(run), "--data", str(tmp_path), "--labels", f"{tmp_path}/other.csv", "--into",
                 "other", "--trained-only"])
    arrays = np.load(run / "other/probes.npz")
    seen = [name for name in names if name not in HELD_OUT and is_normal(name)]
    assert arrays["images"].tolist() == [name for name in names if name not in seen]
    assert not [key for key in arrays if key.startswith("random_init")]
    assert "both --data and --labels" in refusal(capsys, probes, run, "--data", tmp_path)


# ---- locate.py -----------------------------------------------------------------------------------

def test_ellipses_lie_in_their_mask_inside_the_image_and_depend_on_their_place_alone():
    images = np.full((60, 1, 64, 64), 100, np.uint8)
    lesioned, masks = locate.add_ellipses(images)
    change = lesioned[:, 0].astype(int) - 100
    assert (change > 0)[masks].all() and not change[~masks].any()
    assert masks[:, [0, -1]].mean() < 0.01 and masks[:, :, [0, -1]].mean() < 0.01
    assert 25 <= change.max((1, 2)).min() < 35 and 65 < change.max((1, 2)).max() <= 75
    assert 1 / 200 < masks.mean((1, 2)).min() < 0.04 and 0.08 < masks.mean((1, 2)).max() < 0.2
    assert masks.any(0)[4:-4, 4:-4].mean() > 0.85, "at all places"
    np.testing.assert_array_equal(locate.add_ellipses(images[:7])[0], lesioned[:7])
    assert (locate.add_ellipses(images[:7], seed=1)[0] != lesioned[:7]).any((1, 2, 3)).all()
    bright = np.full((9, 1, 64, 64), 250, np.uint8)
    assert locate.add_ellipses(bright)[0].min() == 250, "it is clipped at white"


def test_lesions_are_afires_in_every_batch():
    images = afire.phantoms(70, 32)[0]
    lesioned, masks = locate.add_lesions(images)
    expected, mask = afire.synthetic_lesion_mask(torch.from_numpy(images) / 255, seeded())
    np.testing.assert_array_equal(masks, mask[:, 0] > 0)
    np.testing.assert_array_equal(lesioned, (255 * expected).round().byte())


@pytest.fixture(scope="module")
def located(run):
    """locate.npz of the run, and what the script prints."""
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        locate.main([str(run), "--steps", "2"])
    return dict(np.load(run / "locate/locate.npz")), stream.getvalue()


def test_the_classifier_learns_from_lesions_in_train_and_maps_are_compared_with_masks(run, located):
    """With loops over the images, for the foreign lesions."""
    arrays, printed = located
    normals = [name for name in NAMES if is_normal(name) and name not in HELD_OUT]
    tested = [name for name in HELD_OUT if is_normal(name)]
    plain = images_of(run, normals + tested)
    lesioned, masks = locate.add_ellipses(plain)
    n = len(normals)
    masks = masks[n:]
    images = np.concatenate([plain[n:], lesioned[n:]])
    truth = np.repeat([False, True], len(tested))
    np.testing.assert_array_equal(arrays["ellipses/labels"], truth)
    np.testing.assert_array_equal(arrays["ellipses/located"], truth)
    patients = np.array([str(int(name[:3]) // 2) for name in tested])
    np.testing.assert_array_equal(arrays["ellipses/patients"], np.tile(patients, 2))

    encoder = afire.load_encoder(run / "encoder.pth").eval().requires_grad_(False)

    def mean_tokens(part):
        return afire.features(encoder, torch.from_numpy(part) / 255).mean(1)

    x = mean_tokens(np.concatenate([plain[:n], lesioned[:n]])).numpy()
    ridge = make_pipeline(StandardScaler(), Ridge(x.shape[1] / 2))
    ridge.fit(x, np.repeat([0, 1], n))
    expected = roc_auc_score(truth, ridge.predict(mean_tokens(images).numpy()))
    assert roc_auc_score(truth, arrays["ellipses/checkpoint/probe"]) == pytest.approx(expected)
    assert f"checkpoint/probe{expected:36.3f}" in printed

    weight = torch.from_numpy(ridge[1].coef_ / ridge[0].scale_).float()

    def cams(part):
        return boxes.grad_cam(encoder, 4 * weight, torch.from_numpy(part) / 255)

    minus_normals = (cams(lesioned[n:]) - cams(plain[:n]).mean(0)).clamp_min(0)
    for name, grids in ("", cams(lesioned[n:]).clamp_min(0)), (" minus normals", minus_normals):
        maps = torch.nn.functional.interpolate(grids.unsqueeze(1), (32, 32), mode="bilinear")
        row = f"ellipses/checkpoint/Grad-CAM{name}, probe"
        for i, mask in enumerate(masks[:9]):
            area = [roc_auc_score(mask.ravel(), grid.ravel()) for grid in maps.numpy()]
            others = [area[j] for j in range(len(tested)) if patients[j] != patients[i]]
            assert len(others) < len(tested)
            assert arrays[f"{row}/own map"][i] == pytest.approx(area[i], abs=2e-3)
            assert arrays[f"{row}/own minus others"][i] == pytest.approx(
                area[i] - np.mean(others), abs=2e-3)
    for i, mask in enumerate(masks):
        prior = masks[patients != patients[i]].mean(0)
        assert arrays["ellipses/static/mean mask/own map"][i] == pytest.approx(
            roc_auc_score(mask.ravel(), prior.ravel()))
    assert "lesions/random_init/tuned" in arrays and "findings/labels" not in arrays


def test_findings_with_masks_are_located_too():
    images, labels, masks, findings = afire.phantoms(60, 32)
    names = [f"phantom {i}" for i in range(60)]
    data = afire.Radiographs(names, images, labels, findings, names, names, np.arange(40),
                             np.arange(40, 60), {row: masks[row].any(0) for row in range(40, 60)})
    sets = locate.sets_of(data)
    assert list(sets) == ["lesions", "ellipses", "findings"]
    np.testing.assert_array_equal(sets["findings"].labels[:, 0], data.labels.any(1))
    lesions = sets["lesions"]
    normal_train = data.normal(data.train)
    assert len(lesions.train) == 2 * len(normal_train)
    assert not set(lesions.train) & set(lesions.test)
    assert [lesions.names[row] for row in lesions.train[:len(normal_train)]] == [
        data.names[row] for row in normal_train]
    assert set(lesions.masks) == set(lesions.test[lesions.labels[lesions.test, 0]])


# ---- tables.py -----------------------------------------------------------------------------------

def write_run(root, name, seed, images, **scores):
    """A run with these scores of the trained network in eval, {score: array}."""
    folder = Path(root, "runs", f"{name}-{seed}")
    (folder / "eval").mkdir(parents=True)
    (folder / "checkpoint.pth").touch()
    network = scores.pop("network", "checkpoint")
    np.savez(folder / "eval/probes.npz", **images, **{
        f"{network}/4 x 4 1%" if score == "probe" else score: array
        for score, array in scores.items()})


def images_of_patients(n=60, patients=25):
    random = np.random.default_rng(0)
    return {"images": np.array([f"{i}.png" for i in range(n)]),
            "patients": random.integers(patients, size=n).astype(str),
            "findings": np.array(["a", "b"]), "labels": random.random((n, 2)) < [0.3, 0.5]}


def printed_tables(text):
    """-> {(title, row, column): cell} of Markdown tables."""
    cells = {}
    for part in re.findall(r"(?:^\|.*(?:\n|$))+", text, re.M):
        rows = [[cell.strip(" *`") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
                for line in part.splitlines()]
        title, *columns = rows[0]
        cells |= {(title, row[0], column): cell for row in rows[2:]
                  for column, cell in zip(columns, row[1:])}
    return cells


def tables_of(tmp_path, capsys):
    """What tables.py prints of the runs in tmp_path."""
    tables.main(["collect", str(tmp_path), "--scores", str(tmp_path / "scores.npz")])
    capsys.readouterr()
    tables.main(["--scores", str(tmp_path / "scores.npz")])
    return printed_tables(capsys.readouterr().out)


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_ranks_have_the_auroc_of_the_scores_in_every_sample(decimals):
    random = np.random.default_rng(0)
    labels = random.random((200, 2)) < 0.3
    scores = (random.standard_normal((3, 200, 2)) + labels).round(decimals)
    scores[1, 5, 1] = np.nan
    ranks = tables.as_ranks(scores, labels)
    assert ranks.dtype == np.uint16 and (ranks[1, :, 1] == 65535).all()
    weights = random.integers(0, 4, (200, 20)).astype(np.float32)
    for repeat, f in np.ndindex(3, 2):
        if (repeat, f) != (1, 1):
            areas = tables.weighted_auroc(ranks[repeat, :, f], labels[:, f], weights)
            expected = [roc_auc_score(labels[:, f], scores[repeat, :, f], sample_weight=weight)
                        for weight in weights.T]
            np.testing.assert_allclose(areas, expected, rtol=1e-6)
    any_finding = tables.as_ranks(scores[:1, :, :1], labels)[0, :, 0]
    assert roc_auc_score(labels.any(1), any_finding) == pytest.approx(
        roc_auc_score(labels.any(1), scores[0, :, 0]))


def test_without_positives_a_sample_is_undefined():
    weights = np.array([[1, 0, 1], [1, 1, 0], [1, 1, 0]], np.float32)
    areas = tables.weighted_auroc(np.array([2, 0, 1]), np.array([True, False, False]), weights)
    np.testing.assert_array_equal(areas, [1, np.nan, np.nan])
    assert tables.with_interval({"0": np.array([0.5, 0.25, np.nan, 0.25])}) == (0.5, 0.25, 0.25)
    assert np.isnan(tables.with_interval({"0": np.array([0.5]), "1": np.array([np.nan])})[0])


def test_intervals_are_of_a_loop_that_resamples_patients_draws_and_seeds(tmp_path, capsys,
                                                                         monkeypatch):
    """Five seeds of AFiRe, three of another row, in another order; the pixels have none."""
    monkeypatch.setattr(tables, "sample_patients",
                        functools.partial(tables.sample_patients, resamples=12))
    images = images_of_patients()
    labels = images["labels"]
    random = np.random.default_rng(1)
    scores = {(name, seed): random.standard_normal((5, 60, 2)) + labels * (1 + seed / 4)
              for name, seeds in (("afire", range(5)), ("mine", (4, 1, 2)), ("4 x 4", [0]),
                                  ("8 x 8", [0]))
              for seed in seeds}
    scores["afire", 0][2] = np.nan                         # a repeat in which nothing was learned
    for (name, seed), array in scores.items():
        if " x " not in name:
            pixels = {f"pixels/{blocks} 1%": scores[blocks, 0] for blocks in ("4 x 4", "8 x 8")}
            write_run(tmp_path, name, seed, images, probe=array,
                      **(pixels if name == "afire" else {}))
    cells = tables_of(tmp_path, capsys)

    names = np.unique(images["patients"])
    random = np.random.default_rng(0)
    samples = [np.arange(60)]
    for _ in range(12):
        drawn = names[random.integers(len(names), size=len(names))]
        samples.append(np.concatenate([np.flatnonzero(images["patients"] == patient)
                                       for patient in drawn]))

    repeats = np.random.default_rng(2).integers(5, size=(5, 1, 13))[:, 0]
    repeats[:, 0] = range(5)

    @functools.cache
    def area(name, seed, sample):
        rows = samples[sample]
        drawn = [scores[name, seed][repeat] for repeat in repeats[:, sample]]
        values = [np.mean([roc_auc_score(labels[rows, f], repeat[rows, f])
                           for repeat in drawn if not np.isnan(repeat).any()])
                  for f in range(2)]
        return np.mean(values)

    def best_of_pixels(sample):
        return max(area("4 x 4", 0, sample), area("8 x 8", 0, sample))

    def cell(difference, seeds, form):
        drawn = np.random.default_rng(1).integers(len(seeds), size=(len(seeds), 12))
        value = np.mean([difference(seed, 0) for seed in seeds])
        means = [np.mean([difference(seeds[i], r + 1) for i in drawn[:, r]]) for r in range(12)]
        return "{:{form}} ({:{form}} to {:{form}})".format(
            value, *np.quantile(means, [0.025, 0.975]), form=form)

    title = "held-out patients"
    assert cells[title, "AFiRe", "probe, 1 %"] == cell(
        lambda seed, sample: area("afire", seed, sample), range(5), ".3f")
    assert cells[title, "AFiRe", "seeds"] == "5" and cells[title, "mine", "seeds"] == "3"
    assert cells[f"{title}, minus AFiRe", "mine", "probe, 1 %"] == cell(
        lambda seed, r: area("mine", seed, r) - area("afire", seed, r), [1, 2, 4], "+.3f")
    assert cells[f"{title}, minus AFiRe", "pixels, 8 x 8", "probe, 1 %"] == cell(
        lambda seed, r: area("8 x 8", 0, r) - area("afire", seed, r), range(5), "+.3f")
    assert cells[f"{title}, minus the best of the pixels", "mine", "probe, 1 %"] == cell(
        lambda seed, r: area("mine", seed, r) - best_of_pixels(r), [1, 2, 4], "+.3f")
    assert len({area("4 x 4", 0, r) > area("8 x 8", 0, r) for r in range(13)}) == 2


def test_seeds_that_only_one_row_has_are_ignored():
    one = {"0": np.zeros(3), "3": np.ones(3)}
    other = {"3": np.full(3, 0.25), "1": np.zeros(3)}
    assert_close(tables.differences(one, other), {"3": np.full(3, 0.75)})
    assert_close(tables.differences(one, {"": np.ones(3)}), {"0": -np.ones(3), "3": np.zeros(3)})
    assert_close(tables.differences({"": np.ones(3)}, other),
                 {"3": np.full(3, 0.75), "1": np.ones(3)})


def test_values_count_as_often_as_their_patient_and_nan_stays_nan():
    located = np.array([True, False, True, True])
    array = tables.as_values(np.array([0.5, 0.25, 1]), located)
    weights = np.array([[1, 2, 0], [1, 9, 1], [1, 0, 0], [1, 1, 0]], np.float32)
    figures = tables.figure_of(array, None, located, weights)
    np.testing.assert_allclose(figures, [1.75 / 3, 2 / 3, np.nan], atol=3e-5)
    array = tables.as_values(np.array([0.5, np.nan, 1]), located)
    assert np.isnan(tables.figure_of(array, None, located, weights)).all()


def test_tables_take_what_the_scripts_write(run, probed, located, tmp_path, capsys):
    """One seed: intervals of patients. MAE's prototype is a dash."""
    with contextlib.redirect_stdout(io.StringIO()):
        afire.main(f"eval --ckpt {run} --device cpu".split())
    (run / "cohesion.json").write_text('{"checkpoint": 0.25, "random_init": -0.125}')
    for name in "afire-0", "mae-0":
        shutil.copytree(run, tmp_path / "runs" / name)
    cells = tables_of(tmp_path, capsys)
    predictions = np.load(run / "eval/predictions.npz")
    truth = predictions["labels"].any(1)
    for network, row in ("checkpoint", "AFiRe"), ("random_init", "untrained"):
        tokens = np.sort(predictions[f"{network}/prototype"].reshape(len(truth), -1))
        area = roc_auc_score(truth, tokens[:, -4:].mean(1))
        assert cells["held-out patients", row, "images by prototype"].startswith(f"{area:.3f} (")
    assert cells["held-out patients", "MAE", "images by prototype"] == "–"
    assert cells["held-out patients, cohesion", "untrained", "silhouette"].startswith("-0.125")
    levels = roc_auc_score(truth, probed[0]["pixels/levels"])
    assert cells["held-out patients", "pixels, 8 x 8", "images by levels"].startswith(
        f"{levels:.3f} (")
    area = roc_auc_score(truth, probed[0]["checkpoint/2 x 2 100%"][0, :, 0])
    assert cells["held-out patients, tokens in cells", "AFiRe", "2 x 2, 100 %"].startswith(
        f"{area:.3f} (")
    arrays, _ = located
    own = arrays["ellipses/checkpoint/Grad-CAM minus normals, tuned/own minus others"].mean()
    assert cells["ellipses, own minus others", "MAE", "Grad-CAM minus normals, tuned"].startswith(
        f"{own:+.3f} (")
    classifier = roc_auc_score(arrays["lesions/labels"], arrays["lesions/checkpoint/tuned"])
    assert cells["AFiRe's lesions, images", "AFiRe", "by the tuned classifier"].startswith(
        f"{classifier:.3f} (")
    static = arrays["ellipses/static/mean mask/own map"].mean()
    assert cells["ellipses, static maps", "AUROC in the masks", "mean mask"].startswith(
        f"{static:.3f} (")
    gain = np.mean(arrays["ellipses/checkpoint/prototype/own map"]
                   - arrays["ellipses/static/nearness to the centre/own map"])
    assert cells["ellipses, own map minus nearness to the centre", "AFiRe", "prototype"].startswith(
        f"{gain:+.3f} (")


def test_fewer_seeds_are_said_and_detectors_are_chosen_on_held_out_patients(tmp_path, capsys):
    """Names that begin as MAE's keep all scores; the best score stays what it is held out."""
    images = images_of_patients()
    truth = images["labels"].any(1)
    random = np.random.default_rng(0)

    def run_of(name, seed, *scores):
        arrays = {score: truth + width * random.standard_normal(60) for score, width in scores}
        write_run(tmp_path, name, seed, images, probe=random.random((5, 60, 2)),
                  **{f"checkpoint/{score}": values for score, values in arrays.items()})
        folder = tmp_path / f"runs/{name}-{seed}/shifted"
        folder.mkdir()
        inverted = {f"checkpoint/{score}": -values for score, values in arrays.items()}
        np.savez(folder / "probes.npz", **images, **inverted)
        return {score: roc_auc_score(truth, values) for score, values in arrays.items()}

    afires = run_of("afire", 0, ("prototype", 0.5), ("neighbours", 2))
    run_of("maestro", 0)
    maestro = run_of("maestro", 1, ("prototype", 0.9), ("neighbours", 2))
    crops_0 = run_of("crops", 0, ("prototype", 1))
    lesions_0 = run_of("lesions", 0, ("prototype", 0.4))
    cells = tables_of(tmp_path, capsys)
    area = f"{maestro['prototype']:.3f}"
    assert cells["held-out patients", "maestro", "images by prototype"].startswith(f"{area} (")
    assert cells["held-out patients", "maestro", "images by prototype"].endswith("), 1 seed")
    assert cells["held-out patients", "maestro", "seeds"] == "2"
    assert not cells["held-out patients", "maestro", "probe, 1 %"].endswith("seed")
    assert cells["pre-training", "maestro", "anomaly, held out/published/reframed"] == (
        f"{area}/–/{1 - maestro['prototype']:.3f} prototype, 1 seed".replace("0.", "."))
    title = "best anomaly score on held-out patients, minus AFiRe"
    difference = crops_0["prototype"] - afires["prototype"]
    row = "structure and restoration, crops, prototype"
    assert cells[title, row, "held-out patients"].startswith(f"{difference:+.3f} (")
    assert cells[title, row, "reframed images"].startswith(f"{-difference:+.3f} (")
    assert (title, "maestro, prototype", "held-out patients") not in cells, "no seed in common"
    gain = lesions_0["prototype"] - crops_0["prototype"]
    assert cells["held-out patients, lesions minus crops", "structure and restoration",
                 "images by prototype"].startswith(f"{gain:+.3f} (")
    small = run_of("afire", 1, ("prototype", 1))
    large = run_of("afire-128", 1, ("prototype", 0.4))
    cells = tables_of(tmp_path, capsys)
    gain = large["prototype"] - small["prototype"]
    column = "images by prototype"
    assert cells["held-out patients, 128 px, minus AFiRe, 64 px", "AFiRe, 128 px",
                 column].startswith(f"{gain:+.3f} (")
    assert cells["held-out patients, 128 px, minus AFiRe, 128 px", "AFiRe, 64 px",
                 column].startswith(f"{-gain:+.3f} (")
    (tmp_path / "runs/crops-0").rename(tmp_path / "runs/crops")
    assert "runs/crops has no seed in its name" in refusal(capsys, tables, "collect", tmp_path)


def test_what_does_not_fit_is_said(tmp_path, capsys, monkeypatch):
    images = images_of_patients()
    scores = np.random.default_rng(0).standard_normal((5, 60, 2))
    write_run(tmp_path, "afire", 0, images, probe=scores, **{"checkpoint/1 x 1 1%": scores})
    cells = tables_of(tmp_path, capsys)
    assert ("held-out patients, tokens in cells", "AFiRe", "mean token, 1 %") in cells
    file = tmp_path / "scores.npz"
    size = sum(len(zlib.compress(array.tobytes())) for key, array in np.load(file).items()
               if not key.endswith("|runs"))
    monkeypatch.setattr(tables, "LIMIT", size)             # names of the runs come on top
    tables.main(["collect", str(tmp_path), "--scores", str(file)])
    assert "eval, mean token" in capsys.readouterr().out
    assert "eval|probe 1%" in np.load(file) and "eval|mean token 1%" not in np.load(file)


def test_tables_refuse_other_images_and_files_that_are_cut_off(tmp_path, capsys):
    assert "start results/all.sh" in refusal(capsys, tables, "collect", tmp_path)
    assert "cannot use" in refusal(capsys, tables, "--scores", tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    assert "has no scores" in refusal(capsys, tables, "--scores", tmp_path / "other.npz")
    images = images_of_patients()
    write_run(tmp_path, "afire", 0, images, probe=np.zeros((5, 60, 2)))
    write_run(tmp_path, "afire", 1, images | {"patients": images["images"]},
              probe=np.zeros((5, 60, 2)))
    assert "eval has other patients" in refusal(capsys, tables, "collect", tmp_path)
    file = tmp_path / "runs/afire-1/eval/probes.npz"
    file.write_bytes(file.read_bytes()[:300])
    assert "is cut off or no .npz file" in refusal(capsys, tables, "collect", tmp_path)
    file.unlink()
    write_run(tmp_path, "afire", 2, images, probe=np.zeros((2, 60, 2)))
    sentence = refusal(capsys, tables, "collect", tmp_path)
    assert "afire-2: probe 1% of eval has 2 repeats" in sentence and "--repeats" in sentence


def test_collecting_with_add_keeps_what_the_new_runs_lack(tmp_path, capsys):
    """Another method is added to a file whose runs are elsewhere; a newer score replaces an old."""
    images = images_of_patients()
    random = np.random.default_rng(0)
    scores = {name: random.standard_normal((5, 60, 2)) for name in ("old", "mean", "new", "mine")}
    pixels = {"pixels/8 x 8 1%": random.standard_normal((5, 60, 2))}
    older = tmp_path / "older"
    write_run(older, "afire", 0, images, probe=scores["old"], **pixels,
              **{"checkpoint/1 x 1 1%": scores["mean"]})
    write_run(tmp_path, "afire", 0, images, probe=scores["new"])
    write_run(tmp_path, "mine", 3, images, probe=scores["mine"])
    file = tmp_path / "scores.npz"
    tables.main(["collect", str(older), "--scores", str(file)])
    tables.main(["collect", str(tmp_path), "--add", "--scores", str(file)])
    said = capsys.readouterr().out
    assert "mine has no seed in common with AFiRe" in said and said.count("no seed") == 1
    arrays = dict(np.load(file))
    labels = images["labels"]
    for run, score, array in (("afire:0", "probe", "new"), ("mine:3", "probe", "mine"),
                              ("afire:0", "mean token", "mean")):
        kept = arrays[f"eval|{score} 1%"][list(arrays[f"eval|{score} 1%|runs"]).index(run)]
        np.testing.assert_array_equal(kept, tables.as_ranks(scores[array], labels))
    assert "pixels, 8 x 8:" in arrays["eval|probe 1%|runs"]
    before = file.read_bytes()
    tables.main(["collect", str(tmp_path), "--add", "--scores", str(file)])
    assert file.read_bytes() == before
    write_run(tmp_path, "mine", 4, images | {"images": images["patients"]}, probe=scores["mine"])
    assert "other images than" in refusal(capsys, tables, "collect", tmp_path, "--add",
                                          "--scores", file)
    assert file.read_bytes() == before


@pytest.fixture(scope="module")
def published():
    """What tables.py prints of results/scores.npz: {(title, row, column): cell}."""
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        tables.main([])
    return printed_tables(stream.getvalue())


def values_with_intervals(text):
    """-> {text: (value, low, high)} of all that look like .052 (.025 to .090)."""
    number = r"([+-]?)0?(\.\d{3})"
    found = {}
    for match in re.finditer(rf"{number} \({number} to {number}\)", text.replace("−", "-")):
        parts = match.groups()
        found[match.group()] = tuple(float(parts[i] + parts[i + 1]) for i in (0, 2, 4))
    return found


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_the_numbers_of_a_page_are_those_of_scores_npz(page, published):
    """Cells of tables that tables.py prints; elsewhere, values with intervals of either sign."""
    text = (ROOT / page).read_text(encoding="utf-8")
    titles = {title for title, _, _ in published}
    compared = {key: cell for key, cell in printed_tables(text).items() if key[0] in titles}
    assert len(compared) >= 20
    assert compared == {key: published.get(key) for key in compared}
    known = set()
    for value, low, high in values_with_intervals("\n".join(published.values())).values():
        known |= {(value, low, high), (-value, -high, -low)}
    for words, numbers in values_with_intervals(re.sub(r"\s+", " ", text)).items():
        assert numbers in known, f"no table has {words}"


# ---- all.sh --------------------------------------------------------------------------------------

PYTHON = """#!/usr/bin/env python3
import pathlib, re, sys
command = " ".join(sys.argv[1:]).replace(sys.argv[1], pathlib.Path(sys.argv[1]).name, 1)
with open("commands", "a") as stream:
    print(command, file=stream)
if "crops-0" in command:
    sys.exit(1)
out = re.search("--out (\\\\S+)", command)
run = re.search(r"runs/\\S+", command)
into = re.search("--into (\\\\S+)", command)
files = {"afire.py eval": f"{out.group(1) if out else f'{run and run.group()}/eval'}/metrics.json",
         "probes.py": f"{run and run.group()}/{into.group(1) if into else 'eval'}/probes.npz",
         "locate.py": f"{run and run.group()}/locate/locate.npz",
         "tokens.py": f"{run and run.group()}/cohesion.json",
         "finetune.py": f"{run and run.group()}/finetune/predictions.npz",
         "shift.py": "shifted/labels.csv"}
for start, file in files.items():
    if command.startswith(start):
        path = pathlib.Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
if " pretrain " in command:
    path = pathlib.Path(out.group(1), "encoder.pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_all_runs_what_is_missing_once_and_goes_on_after_a_failure(tmp_path):
    """With a python that writes its commands down, and fails for crops-0."""
    for part in "train", "test":
        (tmp_path / "data" / part).mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("#!/usr/bin/env python3", f"#!{sys.executable} -SI"))
    python.chmod(0o755)
    command = ["bash", ROOT / "results/all.sh", tmp_path / "data", "", tmp_path / "out"]
    settings = {**os.environ, "PYTHON": str(python), "SEEDS": "0", "JOBS": "4"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
    assert "crops-0 failed: see " in done.stdout
    commands = (tmp_path / "out/commands").read_text().splitlines()
    pretrained = [line for line in commands if " pretrain " in line]
    assert len(pretrained) == len(set(pretrained)) == 14
    data = f"--data {tmp_path}/data/train --labels people.csv --preset small"
    assert (f"afire.py pretrain {data} --out runs/category-0 --structure-weight 0 "
            "--restoration-weight 0 --seed 0") in pretrained
    assert "probes.py runs/afire-0" in commands
    assert "probes.py runs/mae-0 --trained-only" in commands
    assert (f"probes.py runs/mae-0 --trained-only --data {tmp_path}/data --labels published.csv "
            "--into published") in commands
    assert "afire.py eval --ckpt runs/mae-r50" in commands
    assert not [line for line in commands if "mae-r50" in line and "published" in line]
    assert commands[-2].startswith("tables.py collect") and commands[-1] == "tables.py"
    subprocess.run(command, env=settings, capture_output=True, check=True)
    again = (tmp_path / "out/commands").read_text().splitlines()[len(commands):]
    assert [line.split()[0] for line in again] == ["crops.py", "tables.py", "tables.py"]
    assert subprocess.run(command[:2], env=settings, capture_output=True).returncode == 2
    (tmp_path / "data").rename(tmp_path / "other")
    command[2] = tmp_path / "other"
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert done.returncode == 2 and "out has results of other code or other data" in done.stderr
