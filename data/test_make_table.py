"""Tests of make_table.py. The tables are asserted row by row.

Pixels are compared with what pydicom's own functions give, classes and parts with an oracle that
knows what each drawn name means, and pydicom's packaged files are read as they are.
"""

import contextlib
import csv
import gzip
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
import afire  # noqa: E402
import make_table as script  # noqa: E402

SCRIPT = Path(script.__file__)

FLAGS = ("No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,"
         "Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,"
         "Support Devices")
CHEXPERT = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{FLAGS}\n"
NIH = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
VINDR = "image_id,rad_id,Cardiomegaly,Other disease{},No finding\n"


def make_table(*arguments, status=0):
    """-> the rows as lines without the header, what is on stderr."""
    stdout = io.TextIOWrapper(io.BytesIO())
    stderr = io.StringIO()
    found = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_table.py", *map(str, arguments)])
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                script.main()
            except SystemExit as exit:
                found = exit.code
    assert found == status, stderr.getvalue()
    lines = stdout.buffer.getvalue().decode().splitlines()
    assert lines[:1] == (["image,findings,patient,split"] if status == 0 else [])
    return lines[1:], stderr.getvalue()


def left_out(stderr):
    """How many files are left out for each reason, as stderr counts them."""
    return [int(count) for count in re.findall(r"^left out: (\d+) ", stderr, re.M)]


def write(folder, files):
    """files: {path: text}."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        opener = gzip.open if path.endswith(".gz") else open
        with opener(folder / path, "wt", encoding="utf-8") as file:
            file.write(text)


# ---- Label files ---------------------------------------------------------------------------------

def test_nih(tmp_path):
    """With the official lists, person 3 would be in train and in test."""
    write(tmp_path, {"Data_Entry_2017.csv": NIH
                     + "00000001_000.png,Mass|Cardiomegaly,0,1,58,M,PA\n"
                     "00000002_000.png, No Finding ,0, 2 ,81,M,PA\n"
                     "00000003_000.png,Hernia,0,3,81,F,AP\n"
                     "00000003_001.png,Pleural_Thickening,1,3,81,F,AP\n"})
    rows = ["00000001_000.png,cardiomegaly|mass,1,", "00000002_000.png,,2,",
            "00000003_000.png,hernia,3,", "00000003_001.png,pleural_thickening,3,"]
    assert make_table("nih", tmp_path)[0] == rows
    write(tmp_path, {"train_val_list.txt": "00000001_000.png\n00000003_001.png\n"})
    assert "test_list.txt" in make_table("nih", tmp_path, status=2)[1]
    write(tmp_path, {"test_list.txt": "00000003_000.png\n",
                     "images_001/images/00000001_000.png": ""})
    split_rows, counts = make_table("nih", tmp_path)
    assert split_rows == [f"images_001/images/{rows[0]}train", rows[1], rows[2] + "test", rows[3]]
    assert "out of train: 1 of people in test" in counts
    assert "all: 4 images of 3 patients, 1 of them normal" in counts
    assert "(test): 1 images of 1 patients, 0 of them normal" in counts
    write(tmp_path, {"train_val_list.txt": "", "Data_Entry_2017.csv": NIH + ",,,,,,\n"
                     + "00000001_000.png,Mass,0,1,58,M,PA\n , ,,,,,\n"})
    (tmp_path / "test_list.txt").unlink()
    assert make_table("nih", tmp_path)[0] == ["images_001/images/00000001_000.png,mass,1,"]


def test_chexpert(tmp_path):
    def row(path, view, flags):
        return f"CheXpert-v1.0-small/{path},Female,68,{view},AP,{flags}\n"

    first = "train/patient00001/study1/view1_frontal.jpg"
    second = "train/patient00002/study1/view1_frontal.jpg"
    third = "valid/patient64541/study1/view1_frontal.jpg"
    write(tmp_path, {"train.csv": CHEXPERT + row(first, "Frontal", "1.0,,,,,,,,,,,,,1.0")
                     + row(second, "Frontal", ",,,1.0,,1.0,-1.0,,,,,,,")
                     + row(second.replace("view1", "view2"), "Lateral", ",,,1.0,,1.0,-1.0,,,,,,,")
                     + row(first.replace("1/", "3/"), "Frontal", ",,,,,,-1,,,,0.0,,,1.0")})
    rows = [f"{first},,patient00001,", f"{second},edema|lung opacity,patient00002,"]
    train_rows, counts = make_table("chexpert", tmp_path)
    assert train_rows == rows and left_out(counts) == [1]
    write(tmp_path, {"valid.csv": CHEXPERT + row(third, "Frontal", "0.0," * 12 + "1.0,0.0")})
    rows = [row + "train" for row in rows] + [f"{third},fracture,patient64541,test"]
    assert make_table("chexpert", tmp_path)[0] == rows
    (tmp_path / "CheXpert-v1.0-small").mkdir()
    assert make_table("chexpert", tmp_path)[0] == [f"CheXpert-v1.0-small/{row}" for row in rows]


@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
def test_mimic(tmp_path, suffix):
    def split(part):
        return {f"mimic-cxr-2.0.0-split.{suffix}": "dicom_id,study_id,subject_id,split\n"
                f"aa,50414267,10000032,train\ncc,57375967,10000764,{part}\n"}

    write(tmp_path, {
        f"mimic-cxr-2.0.0-chexpert.{suffix}": f"subject_id,study_id,{FLAGS}\n"
        f"10000032,50414267,1.0{13 * ','}\n10000764,57375967,,,1.0,,,,-1.0{7 * ','}\n"
        f"10000898,50771383,,-1.0{12 * ','}\n",
        f"mimic-cxr-2.0.0-metadata.{suffix}":
        "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition\n"
        "aa,10000032,50414267,CHEST,PA\nbb,10000032,50414267,CHEST,LATERAL\n"
        "cc,10000764,57375967,CHEST,AP\ndd,10000898,50771383,CHEST,PA\n"})
    rows = ["files/p10/p10000032/s50414267/aa.jpg,,10000032,",
            "files/p10/p10000764/s57375967/cc.jpg,cardiomegaly,10000764,"]
    assert make_table("mimic", tmp_path)[0] == rows
    write(tmp_path, split("validate"))
    kept, counts = make_table("mimic", tmp_path)
    assert kept == rows[:1] and left_out(counts) == [1, 1]         # train alone is no split
    write(tmp_path, split("test"))
    assert make_table("mimic", tmp_path)[0] == [rows[0] + "train", rows[1] + "test"]


def test_kermany(tmp_path):
    rows = ["test/NORMAL/NORMAL-1003233-0001.jpeg,,1003233,test",
            "test/PNEUMONIA/BACTERIA-6249454-0002.jpeg,pneumonia,6249454,test",
            "test/PNEUMONIA/person1_virus_7.jpeg,pneumonia,test/person1,test",
            "train/NORMAL/IM-0429-0001-0001.jpeg,,train/IM-0429,train",
            "train/NORMAL/IM-0429-0001.jpeg,,train/IM-0429,train",
            "train/NORMAL/NORMAL2-IM-0429-0001.jpeg,,train/NORMAL2-IM-0429,train",
            "train/PNEUMONIA/VIRUS-6249454-0001.jpeg,pneumonia,6249454,",
            "train/PNEUMONIA/person1_bacteria_1.jpeg,pneumonia,train/person1,train",
            "train/PNEUMONIA/person1_virus_6.jpeg,pneumonia,train/person1,train",
            "val/NORMAL/NORMAL2-IM-1427-0001.jpeg,,NORMAL2-IM-1427,"]
    write(tmp_path, {row.split(",")[0]: "" for row in rows})
    write(tmp_path, {"train/NORMAL/._IM-0429-0001.jpeg": ""})
    assert make_table("kermany", tmp_path)[0] == rows
    assert make_table("kermany", tmp_path, "--no-split")[0] == [
        row[:row.rindex(",") + 1] for row in rows]
    assert make_table("kermany", tmp_path / "test")[0][2] == (
        "PNEUMONIA/person1_virus_7.jpeg,pneumonia,person1,")
    write(tmp_path, {"test/NORMAL/other.png": ""})
    assert "test/NORMAL/other.png" in make_table("kermany", tmp_path, status=2)[1]


def test_lists(tmp_path):
    none = " 0" * 14
    write(tmp_path, {"train": f"00000165_001.png{none[:-4]} 1 0\na b/00000193_019.png\t{none}\n\n",
                     "test": f"x/00000218_000.png 1{none[2:-2]} 1\n",
                     "day": "20240115_001.png 0 1\n", "bare": "a.png\nb.png\n",
                     "chexpert": f"v/patient00001/study1/view1_frontal.jpg 1{none[2:]}\n",
                     "uneven": "a.png 0 1\nb.png 0 1 1\n"})
    rows = ["00000165_001.png,pleural_thickening,00000165,", "a b/00000193_019.png,,00000193,"]
    assert make_table("lists", tmp_path / "train")[0] == rows
    assert make_table("lists", tmp_path / "train", tmp_path / "test")[0] == [
        rows[0] + "train", rows[1] + "train", "x/00000218_000.png,atelectasis|hernia,00000218,test"]
    # A day's export is not a patient, and CheXpert's 14 findings are not ChestX-ray14's.
    assert make_table("lists", tmp_path / "day")[0] == ["20240115_001.png,finding_2,,"]
    assert make_table("lists", tmp_path / "chexpert")[0] == [
        "v/patient00001/study1/view1_frontal.jpg,finding_1,patient00001,"]
    assert "b.png" in make_table("lists", tmp_path / "uneven", status=2)[1]
    assert "a.png" in make_table("lists", tmp_path / "bare", status=2)[1]


@pytest.mark.parametrize("arguments, text, message", [
    (["nih"], None, "Data_Entry_2017.csv"),
    (["nih"], NIH.replace("Patient ID", "Person") + "a.png,Mass,0,1,5,M,PA\n", "Patient ID"),
    (["nih"], NIH + "a.png,Mass\n", "line 2"),
    (["nih"], NIH + "a.png,Mass,Hernia,0,1,5,M,PA\n", "line 2"),
    (["nih"], NIH + 'a.png,Mass,0,1,5,M,"PA\nb.png,Mass,0,1,5,M,PA\n', "Data_Entry_2017.csv"),
    (["nih", "--images", "x"], NIH, "--images"), (["dicom"], None, "--images"),
    (["rsna"], None, "--images"), (["vindr"], None, "--images"), (["medmnist"], None, "--images"),
    (["folders", "--images", "x"], None, "--images"),
    (["dicom", "--images", "x"], None, "no image"),
    (["nih"], NIH + "a.png,Mass,0,1,5,M,PA\na.png,Mass,0,2,5,M,PA\n", "a.png"),
    (["nih"], NIH, "no image"), (["folders"], None, "no image"),
    (["nih", "--patient", "("], NIH + "a.png,Mass,0,1,5,M,PA\n", "unterminated"),
    (["mimic"], None, "mimic-cxr-2.0.0-chexpert")])
def test_bad_input(tmp_path, arguments, text, message):
    if text:
        write(tmp_path, {"Data_Entry_2017.csv": text})
    _, sentence = make_table(arguments[0], tmp_path, *arguments[1:], status=2)
    assert message in sentence.splitlines()[-1]


def test_the_command_needs_the_standard_library_only_for_tables(tmp_path):
    write(tmp_path, {"Data_Entry_2017.csv": NIH + "\u00e4.png,Mass,0,1,5,M,PA\n"})
    command = [sys.executable, "-S", SCRIPT, "nih", tmp_path]    # -S: without installed packages
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.stdout.decode() == "image,findings,patient,split\n\u00e4.png,mass,1,\n", done.stderr


def test_rows_that_are_not_utf8_are_left_out(tmp_path):
    rows = NIH + "a.png,Mass,0,1,5,M,PA\n"
    (tmp_path / "Data_Entry_2017.csv").write_bytes(rows.encode() + b"\xe9.png,Mass,0,2,5,M,\xe9\n")
    rows, counts = make_table("nih", tmp_path)
    assert rows == ["a.png,mass,1,"] and left_out(counts) == [1]


# ---- Class folders -------------------------------------------------------------------------------

def test_folders(tmp_path):
    rows = ["Training/COVID/images/P002_x.JPG,covid,P002,train",
            "Training/No_Finding/P001/a.png,,P001,train", "testing/COVID/P003.png,covid,P003,test",
            "valid/COVID/P004.png,covid,P004,"]
    write(tmp_path, {row.split(",")[0]: "" for row in rows})
    write(tmp_path, dict.fromkeys(["Training/COVID/lung Masks/P002_x.png", "Training/@eaDir/P9.png",
                                   "P005.png", "Training/COVID/notes.txt"], ""))
    rows_of_people, counts = make_table("folders", tmp_path, "--patient", r"P\d+")
    assert rows_of_people == rows and left_out(counts) == [1, 1, 1, 1]
    assert make_table("folders", tmp_path, "--patient", r"(P\d)\d+")[0][2].endswith(",P0,test")
    unknown, counts = make_table("folders", tmp_path)
    assert unknown == [re.sub(r"P\d+,(\w*)$", r",\1", row) for row in rows]
    assert "all: 4 images of 4 patients" in counts
    assert "P002_x.JPG" in make_table("folders", tmp_path, "--patient", "P00[13]", status=2)[1]
    (tmp_path / "testing/COVID/P003.png").unlink()              # no test: no split, no valid
    assert make_table("folders", tmp_path, "--patient", r"P\d+")[0] == [
        row.removesuffix("train") for row in rows[:2]]
    rows, warning = make_table("folders", tmp_path / "Training/COVID")
    assert rows == ["images/P002_x.JPG,,,"] and "all images are normal" in warning
    assert "nowhere" in make_table("folders", tmp_path / "nowhere", status=2)[1]


@pytest.mark.parametrize("rows", [
    # The class nearest to the file, where an archive holds itself, or others' classes
    ["x/test/NORMAL/a.png,,,test", "x/train/SICK/b.png,sick,,train",
     "x/x/test/NORMAL/a.png,,,test", "x/x/train/SICK/b.png,sick,,train"],
    ["SICK/site/COVID/a.png,covid,,", "SICK/site/normal/b.png,,,", "normals/c.png,,,"],
    # Words for parts, in folders above, below or of the classes, or of none of these
    ["chest_test/COVID/a.png,covid,,test", "chest_train/Healthy/b.png,,,train"],
    ["0_normal/Train set/a.png,,,train", "1_abnormal/Test set/a.png,1_abnormal,,test"],
    ["NORMAL_train/a.png,,,train", "test_Lung_Opacity/a.png,lung_opacity,,test"],
    ["stage_2_test_images/NORMAL/a.png,,,test", "stage_2_train_images/MASS/b.png,mass,,train"],
    ["COVID/test2020/a.png,covid,,test", "NORMAL/train2020/b.png,,,train",
     "NORMAL/val2020/c.png,,,"],
    ["train/contest/a.png,contest,,train", "train/latest/a.png,latest,,train",
     "train/normal/test1.png,,,train", "train/valve/a.png,valve,,train",
     "validation/normal/b.png,,,", "x_TEST/normal/a.png,,,test"],
    # What is beside images of classes, and what only has the word
    ["normal/a.png,,,", "not_normal/b.png,not_normal,,", "viral/c.png,viral,,"],
    ["Normal_vs_COVID/COVID/a.png,covid,,", "Normal_vs_COVID/Normal/b.png,,,"]])
def test_the_class_is_the_nearest_and_a_word_names_the_part(tmp_path, rows):
    write(tmp_path, {row.split(",")[0]: "" for row in rows})
    assert make_table("folders", tmp_path)[0] == rows


def test_what_is_no_class_and_what_each_folder_was_taken_for(tmp_path):
    write(tmp_path, dict.fromkeys(
        ["NORMAL/a.png", "COVID/images/b.png", "COVID/images/c.png", "test_images/d.png",
         *(f"COVID/site{i}/a.png" for i in range(9))], ""))
    rows, said = make_table("folders", tmp_path)
    assert [row for row in rows if "site" not in row] == [
        "COVID/images/b.png,covid,,", "COVID/images/c.png,covid,,", "NORMAL/a.png,,,"]
    assert left_out(said) == [1]
    for line in ("COVID: finding covid (11 images)", "NORMAL: normal (1 images)",
                 "test_images: test (1 images)", "5 more: nothing (11 images)"):
        assert line in said
    assert sum("site" in line for line in said.splitlines()) == 1


@pytest.mark.parametrize("path", ["train/x/test/NORMAL/a.png", "train_test_split/NORMAL/a.png",
                                  "train/NORMAL/val/a.png"])
def test_two_parts_in_a_path_are_refused(tmp_path, path):
    write(tmp_path, {path: "", "train/MASS/b.png": ""})
    sentence = make_table("folders", tmp_path, status=2)[1].splitlines()[-1]
    assert path in sentence and "--no-split" in sentence
    rows = make_table("folders", tmp_path, "--no-split")[0]
    assert f"{path},,," in rows and len(rows) == 1 + ("/x/" not in path and "split" not in path)


def test_a_folder_for_test_without_one_for_train_stays_test(tmp_path):
    write(tmp_path, dict.fromkeys(["COVID/a.png", "NORMAL/b.png", "test/NORMAL/c.png"], ""))
    assert make_table("folders", tmp_path)[0] == [
        "COVID/a.png,covid,,", "NORMAL/b.png,,,", "test/NORMAL/c.png,,,test"]


@pytest.mark.parametrize("name, normal", [
    ("", True), (" ", True), ("NORMAL", True), ("Normals", True), ("No_Finding", True),
    ("no findings", True), ("nofinding", True), ("NO-FINDING", True), ("Healthy ", True),
    ("abnormal", False), ("s", False), ("?", False), ("-", False), ("not normal", False),
    ("mass", False)])
def test_one_rule_says_what_is_normal(name, normal):
    assert script.is_normal(name) == afire.is_normal(name) == normal


# What a name means is written beside it: the part, the class without words for parts, is it normal.
NAMES = {"train": ("train", "", 0), "Testing": ("test", "", 0), "test-2": ("test", "", 0),
         "valid": ("val", "", 0), "chest_test": ("test", "chest", 0),
         "Chest_train": ("train", "chest", 0), "latest": ("", "latest", 0),
         "NORMAL": ("", "normal", 1), "0_normal": ("", "0_normal", 1),
         "COVID": ("", "covid", 0), "abnormal": ("", "abnormal", 0), "images": ("", "images", 0),
         "normal_train": ("train", "normal", 1), "test_covid": ("test", "covid", 0)}
PATHS = st.tuples(st.lists(st.sampled_from(sorted(NAMES)), max_size=5),
                  st.sampled_from(["p1.png", "p2.png", "p3.png"]))


def nearest_class(path, paths):
    """The deepest folder that lies beside one that means normal; None if there is none."""
    def meanings(names):
        return [NAMES[name] for name in names if NAMES[name][1]]

    folders = meanings(path)
    for depth in reversed(range(len(folders))):
        for other in map(meanings, paths):
            beside = [stem for _, stem, _ in other[:depth]] == [f[1] for f in folders[:depth]]
            if (beside and len(other) > depth and other[depth][2]
                    and bool(other[depth][0]) == bool(folders[depth][0])):
                return "" if folders[depth][2] else folders[depth][1]
    return None


@settings(deadline=None, max_examples=300)
@given(st.lists(PATHS, min_size=1, max_size=12, unique_by=str), st.booleans())
def test_in_any_tree_no_test_folder_is_trained_on_and_the_class_is_the_nearest(drawn, people):
    files = {"/".join([*names, file]): names for names, file in drawn}
    parts = {path: {NAMES[name][0] for name in names} - {""} for path, names in files.items()}
    any_class = any(NAMES[name][2] for names in files.values() for name in names)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        rows = script.by_folders(list(files))
        classes = {row.image: row.findings for row in rows}
        if any(len(parts[path]) > 1 for path in files):
            with pytest.raises(script.InputError):
                script.tidy(rows, "", False)
        rows = [row for row in rows if len(parts[row.image]) < 2]
        table = script.tidy(rows, r"p\d" if people else "", False)
    for path, names in files.items():
        nearest = nearest_class(names, files.values()) if any_class else ""
        if nearest is None:
            assert classes[path] is None
        else:
            assert "".join(classes[path]).lower() == nearest
    for row in table:
        assert row.split in ("", *parts[row.image])
        assert row.split != "train" or "test" not in parts[row.image]
    if people:
        tested = {row.patient for row in table if row.split == "test"}
        assert not tested & {row.patient for row in table if row.split == "train"}


# ---- Sets that are written as PNG files ----------------------------------------------------------

DEEP = np.random.default_rng(2).integers(900, 3000, (24, 24), np.uint16)
RAMP = np.arange(4096) / 4095


def film(size=48):
    """A drawn chest that is not symmetric: (size, size) uint8, from 20 to 235."""
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    image = 60 + 110 * (np.hypot(x + 0.2, y) < 0.8) - 40 * (np.hypot(x, y - 0.1) < 0.4) + 0 * x
    image += 15 * np.sin(9 * y + 4 * x) + np.random.default_rng(1).normal(0, 4, x.shape)
    return image.clip(20, 235).astype(np.uint8)


def times(folder):
    """Every file below a folder, and when it was written."""
    return {file.relative_to(folder).as_posix(): file.stat().st_mtime_ns
            for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("labels, findings", [
    (np.eye(14, dtype=np.uint8), "atelectasis cardiomegaly effusion infiltration mass nodule "
     "pneumonia pneumothorax consolidation edema emphysema fibrosis pleural_thickening hernia"),
    (np.array([[1], [0]]), "pneumonia ")])
def test_medmnist(tmp_path, labels, findings):
    n = len(labels)
    images = np.random.default_rng(0).integers(0, 256, (n, 64, 64), np.uint8)
    arrays = {f"{part}_{name}": values for part in ("train", "val", "test")
              for name, values in (("images", images), ("labels", labels))}
    arguments = "medmnist", tmp_path / "set.npz", "--images", tmp_path / "png"
    np.savez(tmp_path / "set.npz", **arrays)
    rows, counts = make_table(*arguments)
    assert rows == [f"{part}/{i:06}.png,{finding},,{split}"
                    for part, split in (("train", "train"), ("val", ""), ("test", "test"))
                    for i, finding in enumerate(findings.split(" "))]
    assert f"{3 * n} without a patient" in counts
    with Image.open(tmp_path / "png/val/000001.png") as image:
        assert np.array_equal(image, images[1])
    written = times(tmp_path / "png")
    (tmp_path / "png/test/000000.png").unlink()
    assert make_table(*arguments)[0] == rows
    again = times(tmp_path / "png")
    assert again.keys() == written.keys() and len(again) == 3 * n
    assert [name for name in again if again[name] != written[name]] == ["test/000000.png"]
    np.savez(tmp_path / "set.npz", **{**arrays, "test_images": images[::-1]})    # another set
    assert "000000.png" in make_table(*arguments, status=2)[1]
    for bad in {**arrays, "test_labels": labels * 3}, {"train_images": images}:
        np.savez(tmp_path / "set.npz", **bad)
        assert "set.npz" in make_table(*arguments, status=2)[1]


def dicom(file, pixels, interpretation="MONOCHROME2", bits=12, **tags):
    """Writes a DICOM file of pixels."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = pydicom.uid.generate_uid()
    dataset.set_pixel_data(pixels.astype(np.uint16), "MONOCHROME2", bits)
    dataset.PhotometricInterpretation = interpretation
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(file, enforce_file_format=True)
    return dataset


def lut(curve):
    item = pydicom.Dataset()
    item.LUTDescriptor = [4096, 0, 12]
    item.LUTExplanation = "drawn"
    item.add_new(0x00283006, "OW", curve.astype(np.uint16).tobytes())
    return pydicom.Sequence([item])


def shown_by_pydicom(dataset, inverted=None):
    """As a viewer shows it, but for the padding: float64."""
    pixels = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
    pixels = pydicom.pixels.apply_voi_lut(pixels, dataset).astype(np.float64)
    if inverted is None:
        inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    return -pixels if inverted else pixels


def assert_same_up_to_scaling(file, shown):
    """The levels of a PNG are those shown, up to a linear scaling and half a level of 65,536."""
    with Image.open(file) as image:
        assert image.mode in ("L", "I;16", "I")
        pixels = np.asarray(image, np.float64)
    assert pixels.shape == shown.shape
    slope = np.ptp(shown) / max(np.ptp(pixels), 1)
    assert np.abs((pixels - pixels.min()) * slope - (shown - shown.min())).max() <= (
        np.ptp(shown) / 65535)
    assert (np.ptp(pixels) > 0) == (np.ptp(shown) > 0)


def convert(folder, status=0):
    """`dicom` from a folder into folder.png: -> rows, stderr."""
    return make_table("dicom", folder, "--images", f"{folder}.png", status=status)


@pytest.mark.parametrize("tags, inverted", [
    ({}, False), ({"interpretation": "MONOCHROME1"}, True),
    ({"PresentationLUTShape": "INVERSE"}, True),
    ({"interpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}, True),
    ({"interpretation": "MONOCHROME1", "PresentationLUTShape": "IDENTITY"}, True),
    ({"interpretation": "MONOCHROME1", "PresentationLUTShape": ""}, True),
    ({"PixelPaddingValue": None}, False),
    ({"RescaleSlope": 2, "RescaleIntercept": -1000}, False),
    ({"RescaleSlope": 40, "RescaleIntercept": 0}, False),           # more than 16 bits
    ({"RescaleSlope": 0.3, "RescaleIntercept": 7, "interpretation": "MONOCHROME1"}, True),
    ({"WindowCenter": 2048, "WindowWidth": 1024}, False),
    ({"WindowCenter": 2048, "WindowWidth": 1024, "VOILUTFunction": "SIGMOID"}, False),
    ({"WindowCenter": 2048, "WindowWidth": 1024, "interpretation": "MONOCHROME1"}, True),
    ({"WindowCenter": [1500, 9], "WindowWidth": [800, 9]}, False),
    ({"WindowCenter": [1500, 9], "WindowWidth": [800, 9], "bits": 16}, False),
    ({"VOILUTSequence": lut(4095 * RAMP ** 4)}, False),
    ({"VOILUTSequence": lut(4095 * (1 - RAMP))}, False)])              # it falls by itself
def test_a_png_is_what_pydicom_shows(tmp_path, tags, inverted):
    (tmp_path / "in").mkdir()
    dataset = dicom(tmp_path / "in/a", film().astype(np.uint16) * 16, **tags)
    assert convert(tmp_path / "in")[0] == ["a.png,,,"]
    assert_same_up_to_scaling(tmp_path / "in.png/a.png", shown_by_pydicom(dataset, inverted))


def test_integers_of_16_bits_are_shifted_and_not_scaled(tmp_path):
    (tmp_path / "in").mkdir()
    dicom(tmp_path / "in/a.dcm", DEEP)
    convert(tmp_path / "in")
    with Image.open(tmp_path / "in.png/a.dcm.png") as image:
        assert image.mode.startswith("I") and np.array_equal(image, DEEP - DEEP.min())


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
def test_8_bits_keep_their_levels(tmp_path, interpretation):
    pixels = film() // 2 + 40
    (tmp_path / "in").mkdir()
    dicom(tmp_path / "in/a.dcm", pixels, interpretation, bits=8)
    wide = dicom(tmp_path / "in/b", pixels, interpretation, bits=8, WindowCenter=128,
                 WindowWidth=900)                               # 256 levels in a third of the range
    bright = dicom(tmp_path / "in/c", pixels, interpretation, bits=8, RescaleSlope=2,
                   RescaleIntercept=0)                          # 114 to 276: above 255 too
    convert(tmp_path / "in")
    with Image.open(tmp_path / "in.png/a.dcm.png") as image:
        expected = 255 - pixels if interpretation == "MONOCHROME1" else pixels
        assert image.mode == "L" and np.array_equal(image, expected)
    for name, dataset in ("b", wide), ("c", bright):
        assert_same_up_to_scaling(tmp_path / f"in.png/{name}.png", shown_by_pydicom(dataset))


@pytest.mark.parametrize("padding, tags", [
    (4000, {"PixelPaddingValue": 4000}),
    (0, {"PixelPaddingValue": 0, "interpretation": "MONOCHROME1"}),
    (0, {"PixelPaddingValue": 0, "WindowCenter": 900, "WindowWidth": 500}),
    (3990, {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": 3980}),
    (3990, {"PixelPaddingValue": 3980, "PixelPaddingRangeLimit": 4000,
            "interpretation": "MONOCHROME1"}),
    (4000, {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": None}),
    (-2000, {"PixelPaddingValue": -2000, "bits": 16, "PixelRepresentation": 1}),
    (-2000, {"PixelPaddingValue": 63536, "bits": 16, "PixelRepresentation": 1})])
def test_padding_is_as_dark_as_the_darkest_of_the_rest(tmp_path, padding, tags):
    pixels = film().astype(np.int32) * 4 + 400
    pixels[:, :6] = padding
    (tmp_path / "in").mkdir()
    value = tags.pop("PixelPaddingValue")
    options = {name: tags.pop(name) for name in ("bits", "interpretation") if name in tags}
    dataset = dicom(tmp_path / "in/a.dcm", pixels, **options)
    dataset.add_new("PixelPaddingValue", "US" if value >= 0 else "SS", value)
    for name, tag in tags.items():
        setattr(dataset, name, tag)
    dataset.save_as(tmp_path / "in/a.dcm", enforce_file_format=True)
    shown = shown_by_pydicom(pydicom.dcmread(tmp_path / "in/a.dcm"))
    shown[:, :6] = shown[:, 6:].min()
    convert(tmp_path / "in")
    assert_same_up_to_scaling(tmp_path / "in.png/a.dcm.png", shown)


JPEG_LS = pydicom.uid.JPEGLSLossless


def high_bit(file):
    dicom(file, DEEP, HighBit=15)


def colours(file):
    dataset = dicom(file, DEEP)
    dataset.set_pixel_data(np.zeros((9, 9, 3), np.uint8), "RGB", 8)
    dataset.save_as(file, enforce_file_format=True)


def without_pixels(file):
    dataset = dicom(file, DEEP)
    del dataset.PixelData
    dataset.save_as(file, enforce_file_format=True)


def without_rows(file):
    dataset = dicom(file, DEEP)
    del dataset.Rows
    dataset.save_as(file, enforce_file_format=True)


def without_decoder(file):
    dataset = dicom(file, DEEP)
    dataset.PixelData = pydicom.encaps.encapsulate([bytes(50)])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEG_LS
    dataset.save_as(file, enforce_file_format=True)


def cut(file):
    dicom(file, DEEP)
    file.write_bytes(file.read_bytes()[:-100])


def not_finite(file):
    dicom(file, DEEP, RescaleSlope="1e308", RescaleIntercept=0)


@pytest.mark.parametrize("make, said", [
    (lambda file: dicom(file, np.stack([DEEP, DEEP])), "frames"),
    (lambda file: dicom(file, DEEP, "PALETTE COLOR"), "PALETTE COLOR"), (colours, "RGB"),
    (high_bit, "HighBit"),
    (without_pixels, ""), (without_rows, ""), (cut, ""), (not_finite, ""),
    (lambda file: file.write_bytes(bytes(128) + b"DICM" + bytes(range(256))), ""),
    pytest.param(without_decoder, "pip install pylibjpeg", marks=pytest.mark.skipif(
        pydicom.pixels.get_decoder(JPEG_LS).is_available, reason="there is a decoder"))])
def test_a_file_that_cannot_be_shown_is_left_out_with_its_reason(tmp_path, make, said):
    folder = tmp_path / "in"
    folder.mkdir()
    make(folder / "bad.dcm")
    make(folder / "bad2")
    dicom(folder / "good.dicom", DEEP)
    for _ in range(2):
        rows, counts = convert(folder)
        assert rows == ["good.dicom.png,,,"] and left_out(counts) == [2]
        assert "bad.dcm" in counts and said in counts
        assert list(times(tmp_path / "in.png")) == ["good.dicom.png"]


def test_dicom_is_known_by_its_content_and_its_folders_say_the_rest(tmp_path):
    paths = ["Chest_Test/NORMAL/a.dcm", "Chest_Test/NORMAL/a.dicom", "train/x/COVID/deep/IM0001",
             "train/x/NORMAL/a.png", "train/x/masks/a.dcm", "train/x/NORMAL/.a.dcm"]
    folder = tmp_path / "in"
    for i, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        dicom(folder / path, DEEP + i, PatientID=["P1", " P2 ", "P1", "P3", "P4", "P5"][i])
    write(folder, {"train/x/NORMAL/b.dcm": "no DICOM", "labels.csv": ""})
    os.rename(folder / paths[0], os.fsencode(folder / "Chest_Test/NORMAL/") + b"/\xff.dcm")
    dicom(folder / paths[0], DEEP, PatientID="P1")
    rows, counts = convert(folder)
    assert rows == [
        "Chest_Test/NORMAL/a.dcm.png,,P1,test", "Chest_Test/NORMAL/a.dicom.png,,P2,test",
        "train/x/COVID/deep/IM0001.png,covid,P1,", "train/x/NORMAL/a.png.png,,P3,train"]
    assert sorted(left_out(counts)) == [1, 1, 1, 2]             # name, mask, hidden, no DICOM
    assert "out of train: 1 of people in test" in counts
    assert sorted(times(tmp_path / "in.png")) == [row.split(",")[0] for row in rows]


@pytest.mark.parametrize("written, known", [
    (["A", "B", "A"], ["A", "B", "A"]), (["ANON", "ANON", "ANON"], ["", "", ""]),
    (["", "", ""], ["", "", ""]), (["A", "A", ""], ["A", "A", ""])])
def test_the_same_patient_in_all_files_is_unknown(tmp_path, written, known):
    (tmp_path / "in").mkdir()
    for i, patient in enumerate(written):
        dicom(tmp_path / f"in/{i}.dcm", DEEP, PatientID=patient)
    rows, said = convert(tmp_path / "in")
    assert rows == [f"{i}.dcm.png,,{patient}," for i, patient in enumerate(known)]
    assert ("ANON" in said) == (written[0] == "ANON")


def some_films(folder):
    folder.mkdir()
    for i in range(5):
        dicom(folder / f"{i}.dcm", DEEP + i, PatientID=f"P{i}")


def test_a_second_start_decodes_nothing_and_gives_the_same_table(tmp_path, monkeypatch):
    some_films(tmp_path / "in")
    first = convert(tmp_path / "in")
    written = times(tmp_path / "in.png")
    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(lambda _: pytest.fail("decoded")))
    assert convert(tmp_path / "in") == first and times(tmp_path / "in.png") == written


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (OSError(28, "full"), 2)])
def test_a_kill_or_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch, error, status):
    some_films(tmp_path / "in")
    write_bytes = Path.write_bytes

    def write_half(path, data):
        write_bytes(path, data[:len(data) // 2])
        raise error

    with monkeypatch.context() as patch:
        convert(tmp_path / "in")
        shutil.rmtree(tmp_path / "in.png")
        patch.setattr(Path, "write_bytes", lambda path, data: (
            write_half if "2.dcm" in path.name else write_bytes)(path, data))
        _, said = convert(tmp_path / "in", status=status)
    assert len(said.splitlines()[-1]) and not left_out(said)
    images = sorted((tmp_path / "in.png").rglob("*.png"))
    assert [image.name for image in images] == ["0.dcm.png", "1.dcm.png"]
    for image in images:
        Image.open(image).load()
    rows, _ = convert(tmp_path / "in")
    assert sorted(times(tmp_path / "in.png")) == [row.split(",")[0] for row in rows]
    for i in range(5):
        with Image.open(tmp_path / f"in.png/{i}.dcm.png") as image:
            assert np.array_equal(image, DEEP - DEEP.min())


def test_a_folder_with_the_images_of_another_set_is_refused(tmp_path):
    some_films(tmp_path / "in")
    convert(tmp_path / "in")
    dicom(tmp_path / "in/3.dcm", film(), PatientID="P3")
    assert "3.dcm.png" in convert(tmp_path / "in", status=2)[1].splitlines()[-1]


def test_without_pydicom_one_sentence_names_it(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    dicom(tmp_path / "in/a.dcm", DEEP)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "pip install pydicom" in convert(tmp_path / "in", status=2)[1].splitlines()[-1]


def test_rsna(tmp_path):
    images = tmp_path / "stage_2_train_images"
    images.mkdir()
    for name in ("a1", "b2", "c3"):
        dicom(images / f"{name}.dcm", film(), bits=8, PatientID="x")
    dicom(images / "d4.dcm", np.stack([DEEP, DEEP]))
    write(tmp_path, {"stage_2_detailed_class_info.csv": "patientId,class\na1,Normal\n"
                     "b2,Lung Opacity\nb2,Lung Opacity\nc3,No Lung Opacity / Not Normal\n"
                     "d4,Normal\nd4,Normal\ne5,Normal\nf6,Normal\n,\n"})
    rows, counts = make_table("rsna", tmp_path, "--images", tmp_path / "png")
    assert rows == [
        "stage_2_train_images/a1.dcm.png,,a1,", "stage_2_train_images/b2.dcm.png,lung opacity,b2,",
        "stage_2_train_images/c3.dcm.png,no lung opacity / not normal,c3,"]
    assert left_out(counts) == [1, 2] and "d4.dcm" in counts and "e5.dcm" in counts
    assert sorted(times(tmp_path / "png")) == [row.split(",")[0] for row in rows]


def test_vindr(tmp_path):
    for path in ("train/a", "train/b", "train/c", "test/d", "test/e"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        dicom(tmp_path / f"{path}.dicom", film(), bits=8, PatientID="x")
    arguments = "vindr", tmp_path, "--images", tmp_path / "png"
    write(tmp_path, {"image_labels_train.csv": VINDR.format("s") + "a,R1,0,0,1\na,R2,1,0,0\n"
                     "a,R3,0,1,0\nb,R1,0,0,1\nb,R2,0,0,1\nc,R1,0,0,0\n"})
    assert "image_labels_test.csv" in make_table(*arguments, status=2)[1]
    write(tmp_path, {"annotations/image_labels_test.csv":       # where PhysioNet has them
                     VINDR.format("").replace("rad_id,", "") + "d,0,1,0\ne,0,0,1\nf,0,0,1\n"})
    rows, counts = make_table(*arguments)
    assert rows == [
        "train/a.dicom.png,cardiomegaly|other diseases,,train", "train/b.dicom.png,,,train",
        "test/d.dicom.png,other diseases,,test", "test/e.dicom.png,,,test"]
    assert left_out(counts) == [1, 1]                           # f has no file, c no finding
    assert sorted(times(tmp_path / "png")) == sorted(row.split(",")[0] for row in rows)


@pytest.mark.filterwarnings("ignore")
def test_every_file_that_pydicom_ships_is_an_image_or_has_its_reason(tmp_path):
    """They are compressed, damaged, coloured, of several frames and of odd bits."""
    folder = tmp_path / "in"
    shutil.copytree(Path(pydicom.__file__).parent / "data", folder,
                    ignore=shutil.ignore_patterns("__pycache__"))
    rows, counts = convert(folder)
    images = [line[0] for line in csv.reader(rows)]
    assert len(images) + sum(left_out(counts)) == len(times(folder))
    assert sorted(times(tmp_path / "in.png")) == sorted(images) and len(images) > 40
    for image in images:
        dataset = pydicom.dcmread(folder / image.removesuffix(".png"))
        shown = shown_by_pydicom(dataset)
        value = dataset.get("PixelPaddingValue")
        if value is not None and (dataset.pixel_array == value).any():
            padded = dataset.pixel_array == value
            shown[padded] = shown[~padded].min()
        assert_same_up_to_scaling(tmp_path / "in.png" / image, shown)
