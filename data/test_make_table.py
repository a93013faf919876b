"""Tests of make_table.py. The tables are asserted row by row, and all are checked for the contract.

Pixels are compared with what pydicom's own functions give, masks with a loop over all pixels,
classes and parts with an oracle that knows what each drawn name means, and pydicom's packaged files
are read as they are.
"""

import argparse
import contextlib
import csv
import gzip
import io
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_table as script  # noqa: E402

SCRIPT = Path(script.__file__)

FLAGS = ("No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,"
         "Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,"
         "Support Devices")
CHEXPERT = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{FLAGS}\n"
NIH = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
NIH_BOXES = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
VINDR = "image_id,rad_id,Cardiomegaly,Other disease{},No finding\n"


def run(*arguments, status=0):
    """-> what is on stdout as bytes, what is on stderr."""
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
    assert (found or 0) == status, stderr.getvalue()
    stdout.flush()
    return stdout.buffer.getvalue(), stderr.getvalue()


def make_table(*arguments, status=0):
    """-> the rows as lines without the header, and without an empty mask; what is on stderr."""
    output, said = run(*arguments, status=status)
    if status:
        assert output == b"", "a table that is refused is not begun"
        return [], said
    assert_contract(output.decode())
    return [line.removesuffix(",") for line in output.decode().splitlines()[1:]], said


def assert_contract(text):
    """Is this a table that afire.py takes?"""
    rows = list(csv.DictReader(io.StringIO(text), strict=True))
    images = [row["image"] for row in rows]
    assert text.startswith("image,findings,patient,split,mask\n")
    assert len(set(images)) == len(images) and "" not in images
    parts = {}
    for row in rows:
        assert list(row) == ["image", "findings", "patient", "split", "mask"]
        assert row["split"] in ("train", "test", "")
        findings = row["findings"].split("|") if row["findings"] else []
        assert findings == sorted({finding.strip().lower() for finding in findings})
        assert not re.search("[,;]", row["findings"])
        assert not {"", "normal", "no finding", "no_finding", "healthy"} & set(findings)
        assert row["image"] == row["image"].strip() and "\\" not in row["image"]
        parts.setdefault(row["patient"] or row["image"], set()).add(row["split"])
    assert not [patient for patient, found in parts.items() if {"train", "test"} <= found]


def split(lines):
    """Lines with the split that they get where none is published."""
    rows = list(csv.reader(lines))
    any_finding = any(row[1] for row in rows)
    held_out = [any_finding and zlib.crc32((row[2] or row[0]).encode()) % 1000 < 200
                for row in rows]
    return [line + ("test" if test else "train") for line, test in zip(lines, held_out)]


def left_out(stderr):
    """How many files are left out for each reason, as stderr counts them."""
    return [int(count) for count in re.findall(r"^left out: (\d+) ", stderr, re.M)]


def counts(stderr, part):
    """The numbers of the line about a part: images, patients, normal."""
    line = next(line for line in stderr.splitlines() if re.match(rf"{part}[: ]", line))
    return [int(number) for number in re.findall(r"\d+", line)]


def refusal(*arguments):
    """The one sentence about bad input, which is the last line."""
    return make_table(*arguments, status=2)[1].splitlines()[-1]


def write(folder, files):
    """files: {path: text}."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        opener = gzip.open if path.endswith(".gz") else open
        with opener(folder / path, "wt", encoding="utf-8") as file:
            file.write(text)


def touch(folder, paths):
    write(folder, dict.fromkeys(paths, ""))


# ---- Your own CSV --------------------------------------------------------------------------------

def own(folder, text, *options, status=0):
    write(folder, {"own.csv": text})
    return make_table("table", folder / "own.csv", *options, status=status)


def test_a_table_is_tidied_and_gets_a_split(tmp_path):
    lines = [f"{i}.png,{'NO finding ' if i % 2 else ' Mass| nodule|mass|'},{i // 2},x"
             for i in range(80)]
    rows, said = own(tmp_path, "\n".join(["\ufeff Findings x, Image ,FINDINGS,Patient",
                                           *(f",{line[:-2]}" for line in lines)]))
    expected = [f"{i}.png,{'' if i % 2 else 'mass|nodule'},{i // 2}," for i in range(80)]
    assert rows == split(expected)
    assert "findings x" in said, "the ignored column is named"
    assert counts(said, "all") == [80, 40, 40]
    tests = sum(row.endswith("test") for row in rows)
    assert 8 <= tests <= 24 and tests % 2 == 0
    assert counts(said, "test") == [tests, tests // 2, tests // 2]
    assert counts(said, "train") == [80 - tests, 40 - tests // 2, 40 - tests // 2]


@pytest.mark.parametrize("text, rows", [
    ("image,findings\na.png,\nb.png,Healthy\n", ["a.png,,,train", "b.png,,,train"]),
    ("split,patient,findings,image,mask\nTrain,1, Normal,a.png,\ntesting,2,Mass,b.png,m/b.png\n"
     ",,,c.png,\nVAL,3,mass,d.png,\n",
     ["a.png,,1,train", "b.png,mass,2,test,m/b.png", "c.png,,,", "d.png,mass,3,"]),
    # The split of one's own table is taken as it is.
    ("image,findings,split\na.png,mass,train\nb.png,,train\nc.png,,\n",
     ["a.png,mass,,train", "b.png,,,train", "c.png,,,"]),
    ("image,findings,patient,split\na.png,mass,1,test\nb.png,,1,train\n",
     ["a.png,mass,1,test", "b.png,,1,"]),
    # Equal rows and empty ones count once and not at all; letters of any language stay.
    ("image,findings\na.png,Mass\n,\n\n a.png , \"mass\"\n\u00e4.png,N\u00d3DULO\n",
     split(["a.png,mass,,", "\u00e4.png,n\u00f3dulo,,"]))])
def test_what_a_table_may_say(tmp_path, text, rows):
    assert own(tmp_path, text)[0] == rows


@pytest.mark.parametrize("text, words", [
    ("picture,findings\na.png,x\n", ["picture", "image"]),
    ("image;findings\na.png;x\n", ["image;findings"]), ("", ["image"]),
    ("image,findings,Findings\na.png,x,\n", ["line 1"]),
    ("image,findings\nb.png,x\na.png\n", ["line 3"]),
    ("image,findings\n\nb.png,x\na.png,x,1\n", ["line 4"]),
    ("image,findings\n,mass\n", ["line 2"]),
    ("image,findings,split\na.png,,dev\n", ["line 2", "dev"]),
    ("image,findings,patient\na.png,Mass,1\nb.png,,\na.png,Mass,2\n",
     ["line 4", "line 2", "a.png"]),
    ("image,findings\nb.png,x\na.png,\"Mass\nc.png,\n", ["line 3", "quote"]),
    ("image,findings\nb.png,x\na.png,\"Mass\nc.png,\"x|y\"\n", ["line 3", "quote"]),
    ("image,findings\na.png,\"" + 200_000 * "x", ["line 2"]),
    ("image,findings\na.png,\"mass, edema\"\n", ["line 2", "mass, edema", "|"]),
    ("image,findings\na.png,mass;edema\n", ["line 2", "mass;edema", "|"]),
    ("image,findings\n", ["no image"]),
    ("image,findings\ntrain\\a.png,\ntrain\\b.png,\n", ["2 ", "train\\a.png", "\\", "/"])])
def test_a_table_that_cannot_be_trusted_is_refused_with_its_line(tmp_path, text, words):
    sentence = own(tmp_path, text, status=2)[1].splitlines()[-1]
    assert "own.csv" in sentence
    assert [word for word in words if word not in sentence] == []


@pytest.mark.parametrize("content, line", [
    ("image,findings\na.png,\n".encode("utf-16"), "line 1"),
    (b"image,findings\na.png,\nb.png,\xe9d\xe8me\n", "line 3")])
def test_a_source_that_is_not_utf8_says_so(tmp_path, content, line):
    (tmp_path / "own.csv").write_bytes(content)
    for arguments in ["table", tmp_path / "own.csv"], ["lists", tmp_path / "own.csv"]:
        sentence = refusal(*arguments)
        assert "own.csv" in sentence and line in sentence and "UTF-8" in sentence
    (tmp_path / "own.csv").rename(tmp_path / "Data_Entry_2017.csv")
    assert line in refusal("nih", tmp_path)
    (tmp_path / "Data_Entry_2017.csv").write_text(NIH)
    for name in "train_val_list.txt", "test_list.txt":
        (tmp_path / name).write_bytes(content)
    assert "train_val_list.txt" in refusal("nih", tmp_path)


def test_rows_of_a_table_are_matched_with_the_files(tmp_path):
    touch(tmp_path / "set", ["a.png", "deep/b.JPG", "c.png", ".d.png", "masks/e.png"])
    text = ("image,findings\na.png,\ndeep/b.JPG,mass\nb.JPG,mass\n.d.png,\nmasks/e.png,\n"
            "deep\\f.png,\n")
    rows, said = own(tmp_path, text, "--data", tmp_path / "set")
    assert rows == split(["a.png,,,", "deep/b.JPG,mass,,", "masks/e.png,,,"])
    assert sorted(left_out(said)) == [1, 2] and "b.JPG" in said and "deep\\f.png" in said
    assert re.search(r"^1 of 4 files .* c\.png$", said, re.M), "a file without a row"
    sentence = own(tmp_path, "image,findings\nx/a.png,\ny.png,\n", "--data", tmp_path / "set",
                   status=2)[1].splitlines()[-1]
    assert "x/a.png" in sentence and "a.png" in sentence.replace("x/a.png", "") and "2 " in sentence
    assert "nowhere" in own(tmp_path, text, "--data", tmp_path / "nowhere", status=2)[1]
    assert "gone.csv" in refusal("table", tmp_path / "gone.csv")


@pytest.mark.parametrize("spell, named", [
    (lambda patient, odd: str(patient), []),
    (lambda patient, odd: f"{patient}.0" if odd else patient, ["30 ", "0 (", "0.0 ("]),
    (lambda patient, odd: f"{patient:06}" if odd else patient, ["30 ", "000000 ("]),
    (lambda patient, odd: f"{'pP'[odd]}{patient}", ["30 ", "p0 (", "P0 ("]),
    (lambda patient, odd: f"p{patient:0{3 - odd}}", ["30 ", "p000 (", "p00 ("]),
    (lambda patient, odd: "nan", ["nan", "60 of 60", "000.png"]),
    (lambda patient, odd: "8.4E+17" if patient > 22 else patient, ["8.4E+17", "14 of 60"]),
    (lambda patient, odd: "x" if patient > 26 else patient, []),        # exactly a tenth
    (lambda patient, odd: "", [])])
def test_patients_that_may_be_one_or_many_are_named(tmp_path, spell, named):
    lines = [f"{i:03}.png,,{spell(i // 2, i % 2)}" for i in range(60)]
    rows, said = own(tmp_path, "\n".join(["image,findings,patient", *lines]))
    assert rows == [f"{line},train" for line in lines]
    checks = [line for line in said.splitlines() if line.startswith("check")]
    assert len(checks) == bool(named)
    assert [word for word in named if word not in checks[0]] == []


def test_few_images_of_one_patient_are_no_reason_to_ask(tmp_path):
    lines = [f"{i}.png,,1\n" for i in range(49)]
    assert "check" not in own(tmp_path, "image,findings,patient\n" + "".join(lines))[1]


def test_findings_that_may_be_several_are_named(tmp_path):
    text = "image,findings\na.png,no lung opacity\nb.png,mass/edema\nc.png,mass and edema\n"
    rows, said = own(tmp_path, text)
    assert [row.split(",")[1] for row in rows] == ["no lung opacity", "mass/edema",
                                                   "mass and edema"]
    assert re.search(r"^2 rows.*line 3 \(mass/edema\)$", said, re.M)


CELLS = st.tuples(st.sampled_from([f"{i}.png" for i in range(40)]),
                  st.sampled_from(["", "No Finding", "Mass", "mass|Nodule", "nodule | mass"]),
                  st.sampled_from(["", "1", "2", "3"]), st.sampled_from(["", "train", "test"]))


@settings(deadline=None, max_examples=60)
@given(st.lists(CELLS, min_size=1, max_size=12, unique_by=lambda cells: cells[0]))
def test_a_table_of_a_table_is_the_same(tmp_path_factory, cells):
    folder = tmp_path_factory.mktemp("own")
    text = io.StringIO()
    csv.writer(text).writerows([("image", "findings", "patient", "split"), *cells])
    rows, _ = own(folder, text.getvalue())
    assert [row.split(",")[0] for row in rows] == [image for image, *_ in cells]
    assert own(folder, "\n".join(["image,findings,patient,split", *rows]))[0] == rows


# ---- Label files ---------------------------------------------------------------------------------

def test_nih(tmp_path):
    """With the official lists, person 3 would be in train and in test."""
    write(tmp_path, {"Data_Entry_2017.csv": NIH
                     + "00000001_000.png,Mass|Cardiomegaly,0,1,58,M,PA\n"
                     "00000002_000.png, No Finding ,0, 2 ,81,M,PA\n"
                     "00000003_000.png,Hernia,0,3,81,F,AP\n"
                     "00000003_001.png,Pleural_Thickening,1,3,81,F,AP\n"
                     "00000004_000.png,Mass,1,4,81,F,AP\n"})
    rows = ["00000001_000.png,cardiomegaly|mass,1,", "00000002_000.png,,2,",
            "00000003_000.png,hernia,3,", "00000003_001.png,pleural_thickening,3,"]
    assert "00000001_000.png" in refusal("nih", tmp_path), "there is no image"
    touch(tmp_path, [*(row.split(",")[0] for row in rows), "00000009_000.png"])
    found, said = make_table("nih", tmp_path)
    assert found == split(rows)
    assert left_out(said) == [1] and "00000004_000.png" in said and "00000009_000.png" in said
    write(tmp_path, {"train_val_list.txt": "00000001_000.png\n00000003_001.png\n"})
    assert "test_list.txt" in refusal("nih", tmp_path)
    assert make_table("nih", tmp_path, "--no-split")[0] == split(rows)
    write(tmp_path, {"test_list.txt": "00000003_000.png\n00000008_000.png\n"})
    (tmp_path / "images_001/images").mkdir(parents=True)
    (tmp_path / rows[0].split(",")[0]).rename(tmp_path / "images_001/images/00000001_000.png")
    found, said = make_table("nih", tmp_path)
    assert found == [f"images_001/images/{rows[0]}train", rows[1], rows[2] + "test", rows[3]]
    assert re.search("^left out of train: 1 ", said, re.M)
    assert counts(said, "all") == [4, 3, 1] and counts(said, "train") == [1, 1, 0]
    assert counts(said, "test") == [1, 1, 0] and counts(said, "in neither") == [2, 2, 1]
    assert "patient unknown" not in said
    assert re.search("^1 of 4 .* 00000008_000.png$", said, re.M), "of the lists, not in the CSV"
    assert re.search("^2 of 5 .* 00000002_000.png$", said, re.M), "of the CSV, in no list"
    assert make_table("nih", tmp_path, "--no-split")[0] == split(
        [f"images_001/images/{rows[0]}", *rows[1:]])
    touch(tmp_path, ["copy/00000002_000.png"])
    sentence = refusal("nih", tmp_path)
    assert "copy/00000002_000.png" in sentence and "--data" in sentence
    assert make_table("nih", tmp_path, "--data", tmp_path / "copy")[0] == [
        "00000002_000.png,,2,train"]
    write(tmp_path, {"train_val_list.txt": "", "Data_Entry_2017.csv": NIH + ",,,,,,\n"
                     + "00000001_000.png,Mass,0,1,58,M,PA\n , ,,,,,\n"})
    (tmp_path / "test_list.txt").unlink()
    assert make_table("nih", tmp_path)[0] == split(["images_001/images/00000001_000.png,mass,1,"])


@pytest.mark.parametrize("line", ["images/{}\n", "{}.jpg\n", "{},\n", "{:.12}\n"])
def test_official_lists_that_match_nothing_are_refused(tmp_path, line):
    images = [f"0000000{i}_000.png" for i in range(1, 7)]
    touch(tmp_path, images)
    write(tmp_path, {"Data_Entry_2017.csv": "\ufeff" + NIH
                     + "".join(f"{image},Mass,0,{image[:8]},5,M,PA\n" for image in images),
                     "train_val_list.txt": "".join(line.format(image) for image in images[:4]),
                     "test_list.txt": "".join(line.format(image) for image in images[4:])})
    sentence = refusal("nih", tmp_path)
    assert images[0] in sentence.replace(line.format(images[0]).strip(), "", 1)
    assert line.format(images[0]).strip() in sentence


def test_chexpert(tmp_path):
    def row(path, view, flags):
        return f"CheXpert-v1.0-small/{path},Female,68,{view},AP,{flags}\n"

    first = "train/patient00001/study1/view1_frontal.jpg"
    second = "train/patient00002/study1/view1_frontal.jpg"
    third = "valid/patient64541/study1/view1_frontal.jpg"
    touch(tmp_path, [first, second, third])
    write(tmp_path, {"train.csv": CHEXPERT + row(first, "Frontal", "1.0,,,,,,,,,,,,,1.0")
                     + row(second, "Frontal", ",,,1.0,,1.0,-1.0,,,,,,,")
                     + row(second.replace("view1", "view2"), "Lateral", ",,,1.0,,1.0,-1.0,,,,,,,")
                     + row(first.replace("1/", "3/"), "Frontal", ",,,,,,-1,,,,0.0,,,1.0")})
    touch(tmp_path, [second.replace("view1", "view2"), first.replace("1/", "3/")])
    rows = [f"{first},,patient00001,", f"{second},edema|lung opacity,patient00002,"]
    train_rows, said = make_table("chexpert", tmp_path)
    assert train_rows == split(rows) and left_out(said) == [1, 1]      # lateral, without a finding
    assert f"{third}\n" in said, "a file without a row"
    write(tmp_path, {"valid.csv": CHEXPERT + row(third, "Frontal", "0.0," * 12 + "1.0,0.0")})
    rows = [row + "train" for row in rows] + [f"{third},fracture,patient64541,test"]
    assert make_table("chexpert", tmp_path)[0] == rows
    assert make_table("chexpert", tmp_path, "--no-split")[0] == split(
        [row.rpartition(",")[0] + "," for row in rows])
    # As the folder is downloaded, in parts of other depths, with the CSV files in one of them.
    batches = "CheXpert-v1.0 batch 1 (validate & csv)", "CheXpert-v1.0 batch 2 (train 1)"
    (tmp_path / "all").mkdir()
    for source, target in (("train.csv", batches[0]), ("valid.csv", batches[0]),
                           ("valid", batches[0]), ("train", batches[1])):
        (tmp_path / "all" / target).mkdir(exist_ok=True)
        shutil.move(tmp_path / source, tmp_path / "all" / target / source)
    for path in (tmp_path / "all" / batches[1] / "train").iterdir():
        path.rename(path.parent.parent / path.name)
    moved = [row.replace("train/", f"{batches[1]}/").replace("valid/", f"{batches[0]}/valid/")
             for row in rows]
    assert make_table("chexpert", tmp_path / "all")[0] == moved
    touch(tmp_path / "all", [f"small/{first}"])
    sentence = refusal("chexpert", tmp_path / "all")
    assert f"small/{first}" in sentence and "--data" in sentence


@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
def test_mimic(tmp_path, suffix):
    def published(name):
        return f"mimic-cxr-2.0.0-{name}.{suffix}"

    def split_file(*lines):
        write(tmp_path, {published("split"): "\n".join(["dicom_id,study_id,subject_id,split",
                                                        *lines])})

    write(tmp_path, {
        published("chexpert"): f"subject_id,study_id,{FLAGS}\n"
        f"10000032,50414267,1.0{13 * ','}\n10000764,57375967,,,1.0,,,,-1.0{7 * ','}\n"
        f"10000898,50771383,,-1.0{12 * ','}\n10000900,59999999{14 * ','}\n",
        published("metadata"):
        "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition\n"
        "aa,10000032,50414267,CHEST,PA\nbb,10000032,50414267,CHEST,LATERAL\n"
        "cc,10000764,57375967,CHEST,AP\ndd,10000898,50771383,CHEST,PA\n"
        "ee,10000898,50771383,CHEST,\nff,10000901,58888888,CHEST,PA\n"})
    rows = ["files/p10/p10000032/s50414267/aa.jpg,,10000032,",
            "files/p10/p10000764/s57375967/cc.jpg,cardiomegaly,10000764,"]
    assert "aa.jpg" in refusal("mimic", tmp_path), "there is no image"
    touch(tmp_path, [*(row.split(",")[0] for row in rows), "files/p10/p10000898/s50771383/dd.jpg"])
    found, said = make_table("mimic", tmp_path)
    assert found == split(rows)
    assert left_out(said) == [1, 1, 1, 1]          # lateral, unknown view, no file, no finding
    assert "59999999" in said and "58888888" in said, "a study in one of the files only"
    split_file("aa,50414267,10000032,train", "cc,57375967,10000764,validate",
               "zz,1,1,test")                                  # train alone is no split
    found, said = make_table("mimic", tmp_path)
    assert found == [rows[0] + "train"] and left_out(said) == [1, 1, 1, 1, 1] and "zz" in said
    split_file("aa,50414267,10000032,train", "cc,57375967,10000764,test")
    assert make_table("mimic", tmp_path)[0] == [rows[0] + "train", rows[1] + "test"]
    assert make_table("mimic", tmp_path, "--no-split")[0] == split(rows)
    split_file("aa.jpg,50414267,10000032,train", "cc.jpg,57375967,10000764,test")
    assert "aa.jpg" in refusal("mimic", tmp_path)
    assert make_table("mimic", tmp_path, "--no-split")[0] == split(rows)
    split_file("aa,50414267,10000032,train", "cc,57375967,10000764,test")
    write(tmp_path, {published("chexpert"): f"subject_id,study_id,{FLAGS}\n10000032,s50414267,1.0"
                     f"{13 * ','}\n"})
    sentence = refusal("mimic", tmp_path)
    assert "s50414267" in sentence and " 50414267" in sentence
    if suffix == "csv.gz":
        file = tmp_path / published("chexpert")
        file.write_bytes(file.read_bytes()[:-9])
        assert file.name in refusal("mimic", tmp_path)


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
    touch(tmp_path, [row.split(",")[0] for row in rows] + ["train/NORMAL/._IM-0429-0001.jpeg"])
    assert make_table("kermany", tmp_path)[0] == rows
    assert make_table("kermany", tmp_path, "--no-split")[0] == split(
        [row[:row.rindex(",") + 1] for row in rows])
    alone = make_table("kermany", tmp_path / "test")[0]
    assert alone[2] == split(["PNEUMONIA/person1_virus_7.jpeg,pneumonia,person1,"])[0]
    touch(tmp_path, ["test/NORMAL/other.png"])
    assert "test/NORMAL/other.png" in refusal("kermany", tmp_path)


def test_lists(tmp_path):
    none = " 0" * 14
    write(tmp_path, {"train": f"\ufeff00000165_001.png{none[:-4]} 1 0\n"
                              f"a b/00000193_019.png\t{none}\n\n",
                     "val": f"00000200_000.png{none}\n",
                     "test": f"x/00000218_000.png 1{none[2:-2]} 1\n",
                     "day": "20240115_001.png 0 1\n", "bare": "a.png\nb.png\n",
                     "chexpert": f"v/patient00001/study1/view1_frontal.jpg 1{none[2:]}\n",
                     "other": f"00000165_001.png 1{none[2:]}\nscan1.png 1{none[2:]}\n",
                     "uneven": "a.png 0 1\nb.png 0 1 1\n"})
    rows = ["00000165_001.png,pleural_thickening,00000165,", "a b/00000193_019.png,,00000193,"]
    test = "x/00000218_000.png,atelectasis|hernia,00000218,test"
    lists = [tmp_path / name for name in ("train", "val", "test")]
    assert make_table("lists", lists[0])[0] == split(rows)
    published = [rows[0] + "train", rows[1] + "train", test]
    assert make_table("lists", lists[0], lists[2])[0] == published
    published.insert(2, "00000200_000.png,,00000200,")
    assert make_table("lists", *lists)[0] == published
    assert make_table("lists", *lists, "--no-split")[0] == split(
        [row.rpartition(",")[0] + "," for row in published])
    make_table("lists", *lists, lists[0], status=2)
    # A day's export is not a patient, and 14 findings of other names are not ChestX-ray14's.
    assert make_table("lists", tmp_path / "day")[0] == split(["20240115_001.png,finding_2,,"])
    assert make_table("lists", tmp_path / "chexpert")[0] == split(
        ["v/patient00001/study1/view1_frontal.jpg,finding_1,patient00001,"])
    assert make_table("lists", tmp_path / "other")[0] == split(
        ["00000165_001.png,finding_1,,", "scan1.png,finding_1,,"])
    assert "b.png" in refusal("lists", tmp_path / "uneven")
    assert "a.png" in refusal("lists", tmp_path / "bare")
    assert "gone" in refusal("lists", tmp_path / "gone")
    touch(tmp_path / "set", ["00000165_001.png", "00000165_002.png"])
    found, said = make_table("lists", lists[0], "--data", tmp_path / "set")
    assert found == split(rows[:1]) and left_out(said) == [1] and "00000165_002.png" in said


@pytest.mark.parametrize("arguments, text, message", [
    (["nih"], None, "Data_Entry_2017.csv"),
    (["nih"], NIH.replace("Patient ID", "Person") + "a.png,Mass,0,1,5,M,PA\n", "Patient ID"),
    (["nih"], NIH + "a.png,Mass\n", "line 2"),
    (["nih"], NIH + "a.png,Mass,Hernia,0,1,5,M,PA\n", "line 2"),
    (["nih"], NIH + 'a.png,Mass,0,1,5,M,"PA\nb.png,Mass,0,1,5,M,PA\n', "Data_Entry_2017.csv"),
    (["nih", "--images", "x"], NIH, "--images"), (["dicom"], None, "--images"),
    (["rsna"], None, "--images"), (["vindr"], None, "--images"), (["medmnist"], None, "--images"),
    (["folders", "--images", "x"], None, "--images"),
    (["rsna", "--images", "x", "--no-split"], None, "--no-split"),
    (["folders", "--masks", "x"], None, "--masks"), (["nih", "--all-normal"], None, "--all-normal"),
    (["dicom", "--images", "x"], None, "no image"),
    (["nih"], NIH + "a.png,Mass,0,1,5,M,PA\na.png,Mass,0,2,5,M,PA\n", "a.png"),
    (["nih"], NIH, "no image"), (["folders"], None, "no image"),
    (["folders", "--all-normal", "--patient", "("], NIH, "unterminated"),
    (["mimic"], None, "mimic-cxr-2.0.0-chexpert")])
def test_bad_input(tmp_path, arguments, text, message):
    if text:
        write(tmp_path, {"Data_Entry_2017.csv": text, "a.png": ""})
    assert message in refusal(arguments[0], tmp_path, *arguments[1:])


def test_the_command_needs_the_standard_library_only_for_tables(tmp_path):
    write(tmp_path, {"Data_Entry_2017.csv": NIH + "\u00e4.png,Mass,0,1,5,M,PA\n",
                     "\u00e4.png": ""})
    command = [sys.executable, "-S", SCRIPT, "nih", tmp_path]    # -S: without installed packages
    done = subprocess.run(command, capture_output=True, check=False)
    row, = split(["\u00e4.png,mass,1,"])
    expected = f"image,findings,patient,split,mask\n{row},\n"
    assert done.stdout.decode() == expected, done.stderr


def test_the_help_of_a_set_is_its_description_and_its_options():
    listed = run("--help")[0].decode().partition("positional arguments")[2]
    names = [rule.__name__ for rule in script.SETS]
    assert names == re.findall(r"^    (\w+) ", listed, re.M) and len(names) == 11
    for rule in script.SETS:
        shown = run(rule.__name__, "--help")[0].decode()
        for line in rule.__doc__.splitlines():
            assert line.strip() in shown
        assert ("--masks" in shown) == (rule.__name__ in ("nih", "rsna", "vindr"))


# ---- Class folders -------------------------------------------------------------------------------

def test_folders(tmp_path):
    rows = ["Training/COVID/images/P002_x.JPG,covid,P002,train",
            "Training/No_Finding/P001/a.png,,P001,train", "testing/COVID/P003.png,covid,P003,test",
            "valid/COVID/P004.png,covid,P004,"]
    touch(tmp_path, [row.split(",")[0] for row in rows])
    touch(tmp_path, ["Training/COVID/lung Masks/P002_x.png", "Training/@eaDir/P9.png",
                     "Training/COVID/images/P002_Mask.png", "P005.png", "Training/COVID/notes.txt"])
    rows_of_people, said = make_table("folders", tmp_path, "--patient", r"P\d+")
    assert rows_of_people == rows and sorted(left_out(said)) == [1, 1, 1, 2]
    assert make_table("folders", tmp_path, "--patient", r"(P\d)\d+")[0][2].endswith(",P0,test")
    unknown, said = make_table("folders", tmp_path)
    assert unknown == [re.sub(r"P\d+,(\w*)$", r",\1", row) for row in rows]
    assert counts(said, "all") == [4, 4, 1] and counts(said, "patient unknown") == [4]
    assert "P002_x.JPG" in refusal("folders", tmp_path, "--patient", "P00[13]")
    (tmp_path / "testing/COVID/P003.png").unlink()              # no test: no split, no valid
    assert make_table("folders", tmp_path, "--patient", r"P\d+")[0] == split(
        [row.removesuffix("train") for row in rows[:2]])
    assert "nowhere" in refusal("folders", tmp_path / "nowhere")


@pytest.mark.parametrize("paths", [
    ["PNEUMONIA/a.png", "COVID/b.png"], ["good/a.png", "bad/b.png"], ["0/a.png", "1/b.png"],
    ["neg/a.png", "pos/b.png"], ["train/MASS/a.png", "test/MASS/b.png"], ["a.png", "b.png"],
    ["abnormal/a.png", "not_normal/b.png"], ["Normal_vs_COVID/COVID/a.png"],
    ["normal1.png", "images/test_2.png"]])
def test_without_a_folder_that_means_normal_a_tree_is_refused(tmp_path, paths):
    touch(tmp_path, paths)
    sentence = refusal("folders", tmp_path)
    assert "--all-normal" in sentence
    names = {name for path in paths for name in path.split("/")[:-1]}
    assert [name for name in names if name not in sentence] == []
    found = make_table("folders", tmp_path, "--all-normal")[0]
    in_test = {path for path in paths if path.startswith("test/")}
    assert found == [f"{path},,,{'test' if path in in_test else 'train'}" for path in sorted(paths)]


def test_all_normal_holds_for_classes_too(tmp_path):
    touch(tmp_path, ["NORMAL/a.png", "SICK/b.png", "c.png", "c_mask.png"])
    rows, said = make_table("folders", tmp_path, "--all-normal")
    assert rows == ["NORMAL/a.png,,,train", "SICK/b.png,,,train", "c.png,,,train"]
    assert left_out(said) == [1]


@pytest.mark.parametrize("bad", ["x\\NORMAL\\{}.png", "NORMAL/{}.png ", " {}/NORMAL/a.png"])
def test_names_that_cannot_stand_in_a_table_are_left_out(tmp_path, bad):
    touch(tmp_path, [bad.format(i) for i in range(3)])
    sentence = refusal("folders", tmp_path)
    assert bad.format(0) in sentence and "3 " in sentence
    if "\\" in bad:
        assert "\\" in sentence.replace(bad.format(0), "") and "unpack" in sentence
    touch(tmp_path, ["NORMAL/good.png"])
    rows, said = make_table("folders", tmp_path)
    assert rows == ["NORMAL/good.png,,,train"] and left_out(said) == [3]


def test_what_is_no_film_is_left_out_and_counted(tmp_path):
    """What Macs, Jupyter, NAS boxes and Windows leave, links, and other kinds of file."""
    touch(tmp_path, ["NORMAL/a.png", "COVID/.ipynb_checkpoints/1.png", "@eaDir/1.png/T.jpg",
                     ".Trash-1000/files/c.png", "$RECYCLE.BIN/x.png", "__MACOSX/Normal/1.png",
                     "NORMAL/._1.png", "NORMAL/film.tif", "notes.txt", "README"])
    (tmp_path / "NORMAL/a.dcm").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    rows, said = make_table("folders", tmp_path)
    assert rows == ["NORMAL/a.png,,,train"]
    assert sorted(left_out(said)) == [1, 1, 1, 1, 2, 6]     # tif, txt, README, DICOM, links, hidden
    assert re.search(r"^left out: 1 \.dcm.*dicom", said, re.M)


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
    touch(tmp_path, [row.split(",")[0] for row in rows])
    published = any(row.endswith("test") for row in rows)
    assert make_table("folders", tmp_path)[0] == (rows if published else split(rows))


def test_a_folder_called_after_several_findings_is_one_finding(tmp_path):
    touch(tmp_path, ["Mass, Edema; late/a.png", "no finding/b.png"])
    row, _ = csv.reader(make_table("folders", tmp_path)[0])
    assert row[:2] == ["Mass, Edema; late/a.png", "mass edema late"]


def test_what_is_no_class_and_what_each_folder_was_taken_for(tmp_path):
    touch(tmp_path, ["NORMAL/a.png", "COVID/images/b.png", "COVID/images/c.png",
                     "test_images/d.png", *(f"COVID/site{i}/a.png" for i in range(9))])
    rows, said = make_table("folders", tmp_path)
    expected = ["COVID/images/b.png,covid,,", "COVID/images/c.png,covid,,", "NORMAL/a.png,,,"]
    assert [row for row in rows if "site" not in row] == split(expected)
    assert left_out(said) == [1]
    for line in ("COVID: finding covid (11 images)", "NORMAL: normal (1 images)",
                 "test_images: test (1 images)"):
        assert line in said.splitlines()
    assert re.search(r"5 more: no .* \(11 images\)$", said, re.M)
    assert sum("site" in line for line in said.splitlines()) == 1


@pytest.mark.parametrize("path", ["train/x/test/NORMAL/a.png", "train_test_split/NORMAL/a.png",
                                  "train/NORMAL/val/a.png"])
def test_two_parts_in_a_path_are_refused(tmp_path, path):
    touch(tmp_path, [path, "train/MASS/b.png", "train/NORMAL/c.png"])
    sentence = refusal("folders", tmp_path)
    assert path in sentence and "--no-split" in sentence
    rows = make_table("folders", tmp_path, "--no-split")[0]
    assert path in [row.split(",")[0] for row in rows] and len(rows) == 3


def test_a_folder_for_test_without_one_for_train_stays_test(tmp_path):
    touch(tmp_path, ["COVID/a.png", "NORMAL/b.png", "test/NORMAL/c.png"])
    assert make_table("folders", tmp_path)[0] == [
        "COVID/a.png,covid,,", "NORMAL/b.png,,,", "test/NORMAL/c.png,,,test"]


@pytest.mark.parametrize("name, normal", [
    ("", True), (" ", True), ("NORMAL", True), ("Normals", True), ("No_Finding", True),
    ("no findings", True), ("nofinding", True), ("NO-FINDING", True), ("Healthy ", True),
    ("abnormal", False), ("s", False), ("?", False), ("-", False), ("not normal", False),
    ("mass", False)])
def test_one_rule_says_what_is_normal(tmp_path, name, normal):
    finding = "" if normal else name
    assert own(tmp_path, f"image,findings\na.png,{name}\n")[0] == split([f"a.png,{finding},,"])


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
    options = argparse.Namespace(patient=r"p\d" if people else "", no_split=False)
    with contextlib.redirect_stderr(io.StringIO()):
        if not any_class:
            with pytest.raises(script.InputError):
                script.by_folders(list(files), all_normal=False)
        rows = script.by_folders(list(files), all_normal=not any_class)
        classes = {row.image: row.findings for row in rows}
        if any(len(parts[path]) > 1 for path in files):
            with pytest.raises(script.InputError):
                script.tidy(rows, options)
        rows = [row for row in rows if len(parts[row.image]) < 2]
        rows, _ = script.tidy(rows, options)
        table = script.hold_out(rows, own_split=False)
    published = any(row.split == "test" for row in rows)
    for path, names in files.items():
        nearest = nearest_class(names, files.values()) if any_class else ""
        if nearest is None:
            assert classes[path] is None
        else:
            assert "".join(classes[path]).lower() == nearest
    for row in table:
        assert row.split in ("", *parts[row.image]) or not published
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


def medmnist(file, labels, sizes, **arrays):
    """A set of random images whose labels begin with these, repeated: -> its arrays."""
    for part, n in zip(("train", "val", "test"), sizes):
        images = np.random.default_rng(n).integers(0, 256, (n, 4, 4), np.uint8)
        arrays.setdefault(f"{part}_images", images)
        arrays.setdefault(f"{part}_labels", np.resize(labels, (n, labels.shape[1])))
    np.savez(file, **arrays)
    return arrays


@pytest.mark.parametrize("labels, findings", [
    (np.eye(14, dtype=np.uint8), "atelectasis cardiomegaly effusion infiltration mass nodule "
     "pneumonia pneumothorax consolidation edema emphysema fibrosis pleural_thickening hernia"),
    (np.array([[1], [0]]), "pneumonia ")])
def test_medmnist(tmp_path, monkeypatch, labels, findings):
    n = len(labels)
    names = next(names for names in script.MEDMNIST.values() if len(names) == labels.shape[1])
    monkeypatch.setattr(script, "MEDMNIST", {(n, n, n): names})
    arguments = "medmnist", tmp_path / "set.npz", "--images", tmp_path / "png"
    arrays = medmnist(tmp_path / "set.npz", labels, (n, n, n))
    images = arrays["val_images"]
    rows, said = make_table(*arguments)
    assert rows == [f"{part}/{i:06}.png,{finding},,{split}"
                    for part, split in (("train", "train"), ("val", ""), ("test", "test"))
                    for i, finding in enumerate(findings.split(" "))]
    assert counts(said, "patient unknown") == [3 * n]
    with Image.open(tmp_path / "png/val/000001.png") as image:
        assert np.array_equal(image, images[1])
    written = times(tmp_path / "png")
    (tmp_path / "png/test/000000.png").unlink()
    assert make_table(*arguments)[0] == rows
    again = times(tmp_path / "png")
    assert again.keys() == written.keys() and len(again) == 3 * n
    assert [name for name in again if again[name] != written[name]] == ["test/000000.png"]
    assert make_table(*arguments, "--no-split")[0] == split(
        [row.rpartition(",")[0] + "," for row in rows])
    medmnist(tmp_path / "set.npz", labels, (n, n, n), test_images=images[::-1])    # another set
    assert "000000.png" in refusal(*arguments)
    for bad in {"test_labels": labels * 3}, {"val_labels": np.hstack([labels, labels])}:
        medmnist(tmp_path / "set.npz", labels, (n, n, n), **bad)
        assert "set.npz" in refusal(*arguments)
    np.savez(tmp_path / "set.npz", train_images=images)
    assert "set.npz" in refusal(*arguments)


@pytest.mark.parametrize("name, sizes, columns, finding", [
    ("pneumoniamnist", (4708, 524, 624), 1, "pneumonia"),
    ("chestmnist", (78468, 11219, 22433), 14, "atelectasis"),
    ("breastmnist", (546, 78, 156), 1, "")])
def test_a_set_of_medmnist_is_known_by_its_numbers_and_not_by_its_name(
        tmp_path, monkeypatch, name, sizes, columns, finding):
    monkeypatch.setattr(script, "is_written", lambda file, origin: True)
    labels = np.zeros((2, columns), np.uint8)
    labels[0, 0] = 1
    medmnist(tmp_path / "pneumoniamnist_64.npz", labels, sizes)
    arguments = "medmnist", tmp_path / "pneumoniamnist_64.npz", "--images", tmp_path / "png"
    if not finding:
        assert "546" in refusal(*arguments)
    else:
        rows, _ = make_table(*arguments)
        assert len(rows) == sum(sizes) and rows[0] == f"train/000000.png,{finding},,train"
        assert rows[1] == "train/000001.png,,,train"


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


def convert(folder, *options, status=0):
    """`dicom` from a folder into folder.png: -> rows, stderr. All are normal without options."""
    options = options or ["--all-normal"]
    return make_table("dicom", folder, "--images", f"{folder}.png", *options, status=status)


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
    assert convert(tmp_path / "in")[0] == ["a.png,,,train"]
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


def nonsense(file):
    file.write_bytes(bytes(128) + b"DICM" + bytes(range(256)))


DAMAGED = without_rows, cut


@pytest.mark.parametrize("make, said", [
    (lambda file: dicom(file, np.stack([DEEP, DEEP])), "frames"),
    (lambda file: dicom(file, DEEP, "PALETTE COLOR"), "PALETTE COLOR"), (colours, "RGB"),
    (high_bit, "HighBit"),
    (without_pixels, ""), (without_rows, ""), (cut, ""), (not_finite, ""),
    (nonsense, ""),
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
        assert rows == ["good.dicom.png,,,train"] and left_out(counts) == [2]
        assert "bad.dcm" in counts and said in counts
        assert ("damaged" in counts) == (make in DAMAGED)
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
    rows, counts = make_table("dicom", folder, "--images", f"{folder}.png")
    assert rows == [
        "Chest_Test/NORMAL/a.dcm.png,,P1,test", "Chest_Test/NORMAL/a.dicom.png,,P2,test",
        "train/x/COVID/deep/IM0001.png,covid,P1,", "train/x/NORMAL/a.png.png,,P3,train"]
    assert sorted(left_out(counts)) == [1, 1, 1, 2]             # name, mask, hidden, no DICOM
    assert "left out of train: 1 images of patients in test" in counts
    assert sorted(times(tmp_path / "in.png")) == [row.split(",")[0] for row in rows]


@pytest.mark.parametrize("written, known", [
    (["A", "B", "A"], ["A", "B", "A"]), (["ANON", "ANON", "ANON"], ["", "", ""]),
    (["", "", ""], ["", "", ""]), (["A", "A", ""], ["A", "A", ""])])
def test_the_same_patient_in_all_files_is_unknown(tmp_path, written, known):
    (tmp_path / "in").mkdir()
    for i, patient in enumerate(written):
        dicom(tmp_path / f"in/{i}.dcm", DEEP, PatientID=patient)
    rows, said = convert(tmp_path / "in")
    assert rows == [f"{i}.dcm.png,,{patient},train" for i, patient in enumerate(known)]
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


@pytest.mark.parametrize("tags, reason", [
    ({}, ""), ({"Modality": "", "ViewPosition": "", "BodyPartExamined": ""}, ""),
    ({"Modality": "CR", "ViewPosition": "AP", "BodyPartExamined": "CHEST"}, ""),
    ({"Modality": "DX", "ViewPosition": "PA", "BodyPartExamined": "THORAX"}, ""),
    ({"Modality": "RG"}, ""), ({"Modality": "DR", "ViewPosition": "AP_SUPINE"}, ""),
    ({"Modality": "CT"}, "Modality CT"), ({"Modality": "MG"}, "Modality MG"),
    ({"Modality": "DX", "ViewPosition": "LATERAL"}, "ViewPosition LATERAL"),
    ({"ViewPosition": "LL"}, "ViewPosition LL"), ({"ViewPosition": "RLO"}, "ViewPosition RLO"),
    ({"Modality": "CR", "ViewPosition": "PA", "BodyPartExamined": "HAND"}, "BodyPartExamined HAND"),
    ({"BodyPartExamined": "ABDOMEN"}, "BodyPartExamined ABDOMEN")])
def test_dicom_files_that_are_no_frontal_chest_films_are_left_out(tmp_path, tags, reason):
    (tmp_path / "in").mkdir()
    dicom(tmp_path / "in/a.dcm", DEEP, **tags)
    dicom(tmp_path / "in/b.dcm", DEEP)
    rows, said = convert(tmp_path / "in")
    assert rows == ["a.dcm.png,,,train", "b.dcm.png,,,train"][bool(reason):]
    assert left_out(said) == [1] * bool(reason) and reason in said
    assert sorted(times(tmp_path / "in.png")) == [row.split(",")[0] for row in rows]


def test_dicom_without_a_normal_class_is_refused_before_anything_is_written(tmp_path):
    for name in "PNEUMONIA", "COVID":
        (tmp_path / "in" / name).mkdir(parents=True)
        dicom(tmp_path / "in" / name / "a", DEEP)
    assert "--all-normal" in refusal("dicom", tmp_path / "in", "--images", tmp_path / "png")
    assert not (tmp_path / "png").exists()


# ---- Sets of DICOM files with a CSV, and masks ---------------------------------------------------

def read_mask(file):
    with Image.open(file) as image:
        assert image.mode == "L" and image.format == "PNG"
        return np.asarray(image)


def inside(boxes, width, height):
    """255 where the square of a pixel and a box (x, y, w, h) overlap: a loop over all pixels."""
    mask = np.zeros((height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            if any(left < x + 1 and x < left + w and top < y + 1 and y < top + h
                   for left, top, w, h in boxes):
                mask[y, x] = 255
    return mask


NIH_SET = ["1_000.png,Mass,0,1", "2_000.png,No Finding,0,2", "3_000.png,Mass|Nodule,0,3",
           "4_000.png,Nodule,0,4", "5_000.png,Mass,0,5"]


def nih_set(folder, *boxes):
    """Four images of 20 x 12 pixels in three folders, and a row without a file."""
    write(folder, {"Data_Entry_2017.csv": NIH + "".join(f"{row},5,M,PA\n" for row in NIH_SET),
                   "BBox_List_2017.csv": NIH_BOXES + "".join(f"{box},,,\n" for box in boxes)})
    for i in range(1, 5):
        file = folder / f"images_{i // 2}/images/{i}_000.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 20), i, np.uint8)).save(file)


def test_masks_of_nih(tmp_path):
    nih_set(tmp_path / "set", "3_000.png,Mass,2.5,3.0,4.25,5.5", "3_000.png,Nodule,15,0,5.4,12.4",
            "1_000.png,Mass,-0.4,6,3,1", "2_000.png,Mass,1,1,2,2", "9_000.png,Mass,1,1,2,2")
    plain = split(["images_0/images/1_000.png,mass,1,", "images_1/images/2_000.png,,2,",
                   "images_1/images/3_000.png,mass|nodule,3,",
                   "images_2/images/4_000.png,nodule,4,"])
    assert make_table("nih", tmp_path / "set")[0] == plain
    for place, before in ((tmp_path / "set/boxes", "boxes"), (tmp_path / "m", tmp_path / "m")):
        arguments = "nih", tmp_path / "set", "--masks", place
        rows, said = make_table(*arguments)
        masked = {row.split(",")[0]: row.split(",")[4:] for row in rows}
        assert [",".join(row.split(",")[:4]) for row in rows] == plain
        assert masked == {"images_0/images/1_000.png": [f"{before}/images_0/images/1_000.png"],
                          "images_1/images/2_000.png": [], "images_2/images/4_000.png": [],
                          "images_1/images/3_000.png": [f"{before}/images_1/images/3_000.png"]}
        found = tmp_path / "set" / masked["images_1/images/3_000.png"][0]
        expected = inside([(2.5, 3, 4.25, 5.5), (15, 0, 5.4, 12.4)], 20, 12)
        assert np.array_equal(read_mask(found), expected)
        found = tmp_path / "set" / masked["images_0/images/1_000.png"][0]
        assert np.array_equal(read_mask(found), inside([(-0.4, 6, 3, 1)], 20, 12))
        assert re.search("^2 of 4 .* images_1/images/2_000.png$", said, re.M)
        assert re.search("^1 of 3 .* images_2/images/4_000.png$", said, re.M)
        written = times(place)
        assert len(written) == 2
        assert make_table(*arguments)[0] == rows and times(place) == written
        if place.parent == tmp_path / "set":                   # no second image of each name
            place.rename(tmp_path / "set/masks")
            again, said = make_table("nih", tmp_path / "set")
            assert again == plain and "masks/" not in said


@pytest.mark.parametrize("box, words", [
    ("15,0,5.6,5", ["20 x 12", "20.6", "3_000.png"]), ("0,0,5,12.6", ["20 x 12", "12.6"]),
    ("-0.6,0,5,5", ["20 x 12"]), ("0,-1,5,5", ["20 x 12"]), ("3,3,0,5", ["20 x 12"]),
    ("3,3,5,-1", ["20 x 12"]), ("nan,3,5,1", ["20 x 12"]), ("3,3,5,x", ["3_000.png", "numbers"])])
def test_a_box_that_does_not_fit_in_its_image_is_refused(tmp_path, box, words):
    nih_set(tmp_path / "set", f"3_000.png,Mass,{box}")
    sentence = refusal("nih", tmp_path / "set", "--masks", tmp_path / "masks")
    assert [word for word in words if word not in sentence] == []


def test_masks_that_match_no_image_or_lie_among_the_images_are_refused(tmp_path):
    nih_set(tmp_path / "set", "03_000.png,Mass,1,1,2,2")
    sentence = refusal("nih", tmp_path / "set", "--masks", tmp_path / "masks")
    assert "03_000.png" in sentence and "images_0/images/1_000.png" in sentence
    nih_set(tmp_path / "set", "3_000.png,Mass,1,1,2,2")
    before = times(tmp_path / "set")
    for folder in tmp_path / "set", tmp_path, tmp_path / "set/../set":
        assert "--masks" in refusal("nih", tmp_path / "set", "--masks", folder)
    assert times(tmp_path / "set") == before
    make_table("nih", tmp_path / "set", "--masks", tmp_path / "masks")
    nih_set(tmp_path / "set", "3_000.png,Mass,1,1,3,2")
    assert "3_000.png" in refusal("nih", tmp_path / "set", "--masks", tmp_path / "masks")
    shutil.copytree(tmp_path / "set", tmp_path / "copy")              # files of other origin
    before = times(tmp_path / "copy")
    assert "3_000.png" in refusal("nih", tmp_path / "set", "--masks", tmp_path / "copy")
    assert times(tmp_path / "copy") == before
    (tmp_path / "set/BBox_List_2017.csv").unlink()
    assert "BBox_List_2017.csv" in refusal("nih", tmp_path / "set", "--masks", tmp_path / "other")


def test_rsna(tmp_path):
    images = tmp_path / "stage_2_train_images"
    images.mkdir()
    for name in ("a1", "b2", "c3"):
        dicom(images / f"{name}.dcm", film(), bits=8, PatientID="x")
    dicom(images / "d4.dcm", np.stack([DEEP, DEEP]))
    write(tmp_path, {"stage_2_detailed_class_info.csv": "patientId,class\na1,Normal\n"
                     "b2,Lung Opacity\nb2,Lung Opacity\nc3,No Lung Opacity / Not Normal\n"
                     "d4,Normal\nd4,Normal\ne5,Normal\nf6,Normal\n,\ng7,Normal\n",
                     "stage_2_train_images/g7.dcm": "no DICOM"})
    rows, counts = make_table("rsna", tmp_path, "--images", tmp_path / "png")
    assert rows == split([
        "stage_2_train_images/a1.dcm.png,,a1,", "stage_2_train_images/b2.dcm.png,lung opacity,b2,",
        "stage_2_train_images/c3.dcm.png,no lung opacity / not normal,c3,"])
    assert sorted(left_out(counts)) == [1, 1, 2] and "d4.dcm" in counts and "e5.dcm" in counts
    assert re.search("^left out: 1 damaged .* stage_2_train_images/g7.dcm", counts, re.M)
    assert counts.count("damaged") == 1, "the others have several frames, or no file"
    assert sorted(times(tmp_path / "png")) == [row.split(",")[0] for row in rows]
    write(tmp_path, {"stage_2_train_labels.csv": "patientId,x,y,width,height,Target\na1,,,,,0\n"
                     "b2,3.0,4.0,20.0,30.0,1\nb2,1.0,40.0,47.0,8.0,1\nc3,,,,,0\n"})
    masked, _ = make_table("rsna", tmp_path, "--images", tmp_path / "png", "--masks",
                           tmp_path / "png/masks")
    name = "masks/stage_2_train_images/b2.dcm.png"
    assert masked == [rows[0], f"{rows[1]},{name}", rows[2]]
    assert np.array_equal(read_mask(tmp_path / "png" / name),
                          inside([(3, 4, 20, 30), (1, 40, 47, 8)], 48, 48))
    shutil.rmtree(images)
    images.mkdir()
    dicom(images / "b3.dcm", DEEP)
    sentence = refusal("rsna", tmp_path, "--images", tmp_path / "png")
    assert "a1.dcm" in sentence and "b3.dcm" in sentence


def test_vindr(tmp_path):
    for path in ("train/a", "train/b", "train/c", "test/d", "test/e"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        dicom(tmp_path / f"{path}.dicom", film(), bits=8, PatientID="x")
    arguments = "vindr", tmp_path, "--images", tmp_path / "png"
    write(tmp_path, {"image_labels_train.csv": VINDR.format("s") + "a,R1,0,0,1\na,R2,1,0,0\n"
                     "a,R3,0,1,0\nb,R1,0,0,1\nb,R2,0,0,1\nc,R1,0,0,0\n"})
    assert "image_labels_test.csv" in make_table(*arguments, status=2)[1]
    write(tmp_path, {"annotations/image_labels_test.csv":       # where PhysioNet has them
                     VINDR.format("").replace("rad_id,", "") + "d,1,1,0\ne,0,0,1\nf,0,0,1\n"})
    rows, counts = make_table(*arguments)
    assert rows == [
        "train/a.dicom.png,cardiomegaly|other diseases,,train", "train/b.dicom.png,,,train",
        "test/d.dicom.png,cardiomegaly|other diseases,,test", "test/e.dicom.png,,,test"]
    assert sorted(left_out(counts)) == [1, 1]                   # f has no file, c no finding
    assert sorted(times(tmp_path / "png")) == sorted(row.split(",")[0] for row in rows)
    assert make_table(*arguments, "--no-split")[0] == split(
        [row.rpartition(",")[0] + "," for row in rows])
    corners = "class_name,x_min,y_min,x_max,y_max"
    write(tmp_path, {"annotations/annotations_train.csv": f"image_id,rad_id,{corners}\n"
                     "a,R2,Cardiomegaly,3.5,4,20,30\na,R1,No finding,,,,\n"
                     "a,R3,Other disease,30,3.5,48,10\nb,R1,No finding,,,,\n",
                     "annotations/annotations_test.csv": f"image_id,{corners}\n"
                     "d,Other disease,1,2,3,4\n"})
    masked, _ = make_table(*arguments, "--masks", tmp_path / "m")
    assert masked == [f"{rows[0]},{tmp_path}/m/train/a.dicom.png", rows[1],
                      f"{rows[2]},{tmp_path}/m/test/d.dicom.png", rows[3]]
    assert np.array_equal(read_mask(tmp_path / "m/train/a.dicom.png"),
                          inside([(3.5, 4, 16.5, 26), (30, 3.5, 18, 6.5)], 48, 48))
    assert np.array_equal(read_mask(tmp_path / "m/test/d.dicom.png"),
                          inside([(1, 2, 2, 2)], 48, 48))


@pytest.mark.filterwarnings("ignore")
def test_every_file_that_pydicom_ships_is_an_image_or_has_its_reason(tmp_path, monkeypatch):
    """They are compressed, damaged, coloured, of several frames and of odd bits, few of chests."""
    monkeypatch.setattr(script, "check_header", lambda header: None)
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
