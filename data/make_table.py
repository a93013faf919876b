"""Makes the table for afire.py --labels from a data set as it is published.

    python data/make_table.py SET SOURCE [--patient REGEX] [--no-split] > labels.csv

SET is the name of a function below, which says what SOURCE holds, with the published header.
The table has a line for each image, and is there to be opened and checked:

    image     path below the folder of images, which is SOURCE where nothing else is said, with /
    findings  in lower case, joined by |; empty: normal
    patient   empty: unknown
    split     train or test; empty: left out; the whole column empty: the set has no split

Images that are neither normal nor have a finding are left out, and people in test are left out of
train. Counts go to stderr; so does bad input, in one sentence, with status 2.
"""

import argparse
import collections
import csv
import gzip
import re
import sys
import zipfile
import zlib
from pathlib import Path

Row = collections.namedtuple("Row", "image findings patient split")
PARTS = {"train": "train", "training": "train", "train_images": "train",
         "test": "test", "testing": "test", "test_images": "test",
         "val": "", "valid": "", "validation": "", "dev": ""}
CHESTXRAY14 = ("Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax "
               "Consolidation Edema Emphysema Fibrosis Pleural_Thickening Hernia").split()
CHEXPERT = ("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity",
            "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax",
            "Pleural Effusion", "Pleural Other", "Fracture")


class InputError(Exception):
    """Bad input, in one sentence with the remedy."""


def is_normal(name):
    """Does a folder or a finding of this name mean that there is none?"""
    letters = re.sub(r"[\W_]", "", name.lower())
    return letters.removesuffix("s") in ("", "normal", "nofinding", "healthy")


def read_csv(folder, names, columns):
    """The first of these files that there is: a dictionary a row, without spaces around cells."""
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if not file:
        raise InputError(f"{folder} has no {' or '.join(names)}: name the folder that has it")
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            reader = csv.DictReader(text, skipinitialspace=True)
            for row in reader:
                if any(row.pop(None, [])):
                    raise InputError(f"{file}, line {reader.line_num} has more cells than the "
                                     "header: take the file as published")
                row = {name.strip(): cell.strip() for name, cell in row.items() if cell is not None}
                missing = [column for column in columns if column not in row]
                if missing:
                    raise InputError(f"{file}, line {reader.line_num} has no column {missing[0]}: "
                                     "take the file as published")
                yield row
    except (EOFError, csv.Error, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{file} is damaged ({error}): download it again") from error


def findings_in(row, columns):
    """Those of the columns that are 1; 0, -1 and blank are absent. None (unknown) if none is 1."""
    return [column for column in columns if row[column] in ("1", "1.0")] or None


def image_files(folder):
    """Images below a folder, but what afire.py passes over: path, part (the lowest of PARTS)."""
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        hidden = any(re.match(r"[.@$]|__MACOSX$|masks$", name) for name in path.parts)
        if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".dcm", ".dicom") and not hidden:
            parts = [PARTS[name.lower()] for name in path.parts if name.lower() in PARTS]
            yield path.as_posix(), parts[-1] if parts else ""


def nih(source):
    """ChestX-ray14: Data_Entry_2017.csv, or Data_Entry_2017_v2020.csv.
    Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,...

    The split is that of train_val_list.txt and test_list.txt, if they are there. Paths are as the
    images lie below SOURCE; bare names if they lie elsewhere.
    """
    split = {}
    for name, part in (("train_val_list.txt", "train"), ("test_list.txt", "test")):
        if (source / name).is_file():
            split.update(dict.fromkeys((source / name).read_text().split(), part))
    if len(set(split.values())) == 1:
        raise InputError(f"{source} has but one of train_val_list.txt and test_list.txt: add the "
                         "other, or take it away for no split")
    places = {path.split("/")[-1]: path for path, _ in image_files(source)}
    files = ["Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv"]
    for row in read_csv(source, files, ["Image Index", "Finding Labels", "Patient ID"]):
        image = row["Image Index"]
        findings = row["Finding Labels"].split("|")
        yield Row(places.get(image, image), findings, row["Patient ID"], split.get(image, ""))


def chexpert(source):
    """CheXpert: train.csv, and valid.csv as the test part if there is to be a split.
    Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,...,Support Devices

    Frontal views. -1 (uncertain) and blank are absent. Support Devices are not a finding: a film
    with a pacemaker and nothing else is labelled No Finding. The first folder of Path is SOURCE
    itself, unless SOURCE has a folder of that name.
    """
    for name, split in (("train.csv", "train"), ("valid.csv", "test")):
        if split == "test" and not (source / name).is_file():
            return
        for row in read_csv(source, [name], ["Path", "Frontal/Lateral", *CHEXPERT]):
            first, _, image = row["Path"].partition("/")
            if (source / first).is_dir():
                image = row["Path"]
            if row["Frontal/Lateral"] == "Frontal":
                patient = re.search(r"patient\d+(?=/)|$", image)[0]
                yield Row(image, findings_in(row, CHEXPERT), patient, split)


def mimic(source):
    """MIMIC-CXR-JPG: mimic-cxr-2.0.0-{chexpert,metadata}.csv(.gz), and -split if it is to be used.
    subject_id,study_id,Atelectasis,Cardiomegaly,...,No Finding,...,Support Devices
    dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,...
    dicom_id,study_id,subject_id,split

    PA and AP views; findings as in chexpert; validate is left out.
    """
    def read(name, columns):
        file = f"mimic-cxr-2.0.0-{name}.csv"
        return read_csv(source, [file, f"{file}.gz"], columns)

    split = {}
    if any(source.glob("mimic-cxr-2.0.0-split.csv*")):
        for row in read("split", ["dicom_id", "split"]):
            split[row["dicom_id"]] = PARTS.get(row["split"], "")
    studies = {}
    for row in read("chexpert", ["study_id", *CHEXPERT]):
        studies[row["study_id"]] = findings_in(row, CHEXPERT)
    for row in read("metadata", ["dicom_id", "subject_id", "study_id", "ViewPosition"]):
        if row["ViewPosition"] in ("PA", "AP"):
            patient = row["subject_id"]
            study = row["study_id"]
            image = f"files/p{patient[:2]}/p{patient}/s{study}/{row['dicom_id']}.jpg"
            yield Row(image, studies.get(study), patient, split.get(row["dicom_id"], ""))


def rsna(source):
    """RSNA pneumonia challenge: stage_2_detailed_class_info.csv, in which equal rows count once.
    patientId,class

    All classes but Normal are findings. No split. Each film has a patientId of its own, though
    they come from ChestX-ray14: who has several films cannot be known.
    """
    for row in read_csv(source, ["stage_2_detailed_class_info.csv"], ["patientId", "class"]):
        image = f"stage_2_train_images/{row['patientId']}.dcm"
        yield Row(image, [row["class"]], row["patientId"], "")


def vindr(source):
    """VinDr-CXR: image_labels_train.csv and image_labels_test.csv, in SOURCE or its annotations.
    image_id,rad_id,Aortic enlargement,...,Other diseases,No finding

    An image has every finding that any radiologist names. Patients are unknown.
    """
    for split in ("train", "test"):
        name = f"image_labels_{split}.csv"
        said = {}
        for row in read_csv(source, [name, f"annotations/{name}"], ["image_id", "No finding"]):
            columns = [column for column in row if column not in ("image_id", "rad_id")]
            said.setdefault(row["image_id"], []).extend(findings_in(row, columns) or [])
        for image, findings in said.items():
            if "Other disease" in findings:      # as the test part calls Other diseases
                findings = ["Other diseases", *set(findings) - {"Other disease"}]
            yield Row(f"{split}/{image}.dicom", findings or None, "", split)


def kermany(source):
    """Kermany et al. 2018: the folders train and test (val is left out), or what is in one of them.
    IM-0429-0001-0001, NORMAL2-IM-0246-0001, NORMAL-1003233-0001: normal
    person1000_bacteria_2931, BACTERIA-1008087-0001, VIRUS-6249454-0001: pneumonia, the one finding

    Patients are IM-0429, NORMAL2-IM-0246 and person1000, in train and test apart (person1 of train
    is not person1 of test), and the long numbers. Bacteria and virus of one number may be two
    people, and count as one: that way nobody is on both sides.
    """
    kinds = r"(?:NORMAL|BACTERIA|VIRUS)-(\d+)-|(?:NORMAL2-)?IM-\d+(?=-)|person\d+(?=_)"
    for path, split in image_files(source):
        match = re.match(kinds, path.split("/")[-1])
        if not match:
            raise InputError(f"{path} is not named as in this set: take it away, or use folders")
        findings = ["pneumonia"] if match[0].startswith(("person", "BACTERIA", "VIRUS")) else []
        yield Row(path, findings, match[1] or f"{split}/{match[0]}".lstrip("/"), split)


def lists(*files):
    """The field's lists: SOURCE is TRAIN or TRAIN TEST, and the folder of images is theirs.
    relative/path 0 1 0 ...

    14 numbers are ChestX-ray14's findings, unless the paths are CheXpert's; else the findings are
    finding_1 and on. Patients are known if all names are ChestX-ray14's (00000165_001.png) or all
    paths CheXpert's (patient00001/).
    """
    lines = []
    for file, split in zip(files, ("train", "test")):
        for line in file.read_text("utf-8-sig", errors="surrogateescape").splitlines():
            path, flags = re.fullmatch(r"\s*(.*?)((?:\s+[01])*)\s*", line).groups()
            if path:
                lines.append((path, flags.split(), split))
    style = r"(?:^|/)(000\d{5})_\d{3}\.\w+$|(patient\d+)/"
    people = [re.search(style, path) for path, _, _ in lines]
    for (path, flags, split), person in zip(lines, people):
        if not flags or len(flags) != len(lines[0][1]):
            raise InputError(f"{path} is followed by {len(flags)} zeros and ones in the list, the "
                             f"first path by {len(lines[0][1])}: give every path as many")
        names = [f"finding_{i}" for i in range(1, len(flags) + 1)]
        if len(flags) == 14 and "patient" not in path:
            names = CHESTXRAY14
        findings = [name for name, flag in zip(names, flags) if flag == "1"]
        yield Row(path, findings, person[person.lastindex] if all(people) else "", split)


def medmnist(source, images):
    """MedMNIST: SOURCE is chestmnist_64.npz (ChestX-ray14) or pneumoniamnist_64.npz (Kermany).
    train_images (n, 64, 64) uint8, train_labels (n, 14) or (n, 1); val_ and test_ alike

    Writes PNG files below --images, which is the folder of images. val is left out. Patients are
    unknown.
    """
    import numpy as np
    from PIL import Image
    for part in ("train", "val", "test"):
        (images / part).mkdir(parents=True, exist_ok=True)
        try:
            with np.load(source) as arrays:
                pixels = arrays[f"{part}_images"]
                labels = arrays[f"{part}_labels"]
            if labels.shape not in ((len(pixels), 1), (len(pixels), 14)) or labels.max() > 1:
                raise ValueError(f"images {pixels.shape}, labels {labels.shape}")
        except (EOFError, LookupError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{source} is not one of the two ({error}): download it") from error
        names = CHESTXRAY14 if labels.shape[1] == 14 else ["pneumonia"]
        for i, flags in enumerate(labels):
            path = f"{part}/{i:06}.png"
            Image.fromarray(pixels[i]).save(images / path)
            findings = [name for name, flag in zip(names, flags) if flag]
            yield Row(path, findings, "", PARTS[part])


def folders(source):
    """Class folders in any tree: those beside one called NORMAL, No_Finding, Healthy or the like.

    Folders in PARTS, above or below them, are the split. Images outside of the class folders are
    left out; without class folders all are normal. Patients are unknown without --patient.
    """
    splits = dict(image_files(source))
    classes = {path: [name for name in path.split("/")[:-1] if name.lower() not in PARTS]
               for path in splits}
    beside = {tuple(names[:i]) for names in classes.values() for i, name in enumerate(names)
              if is_normal(name)}
    if not beside:
        print("no folder is called NORMAL or the like: all images are normal", file=sys.stderr)
    for path, names in classes.items():
        below = [name for i, name in enumerate(names) if tuple(names[:i]) in beside]
        yield Row(path, below[-1:] or (None if beside else []), "", splits[path])


def tidy(rows, patient, no_split):
    """The rules of all sets: -> one row an image, nobody in train and in test."""
    table = {}
    for row in rows:
        if patient and row.findings is not None:
            match = re.search(patient, row.image)
            person = match and match[min(1, match.re.groups)]
            if not person:
                raise InputError(f"{row.image} does not match --patient {patient}: correct it")
            row = row._replace(patient=person)
        if no_split:
            row = row._replace(split="")
        if row.findings is not None:
            names = {name.strip().lower() for name in row.findings if not is_normal(name)}
            row = row._replace(findings="|".join(sorted(names)))
        if table.setdefault(row.image, row) != row:
            raise InputError(f"{row.image} is told twice with other facts: take one of them away")
    rows = [row for row in table.values() if row.findings is not None]
    if len({row.split for row in rows if row.split}) == 1:    # train or test alone is no split
        rows = [row._replace(split="") for row in rows if row.split]
    tested = {row.patient for row in rows if row.split == "test" and row.patient}
    both = {row.image for row in rows if row.split == "train" and row.patient in tested}
    print(f"not in the table: {len(table) - len(rows)} images (neither normal nor with a finding, "
          f"or of no part); out of train: {len(both)} of people in test", file=sys.stderr)
    return [row._replace(split="") if row.image in both else row for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sets = {rule.__name__: rule for rule in (nih, chexpert, mimic, rsna, vindr, kermany, lists,
                                             medmnist, folders)}
    parser.add_argument("set", choices=sets)
    parser.add_argument("source", type=Path, nargs="+", help="lists: TRAIN [TEST]")
    parser.add_argument("--patient", metavar="REGEX", help="the patient in a path: the first group")
    parser.add_argument("--no-split", action="store_true", help="train, test and val are one")
    parser.add_argument("--images", type=Path, help="medmnist: the folder to write images to")
    args = parser.parse_args()
    if len(args.source) > 1 + (args.set == "lists"):
        parser.error(f"{args.set} takes one SOURCE")
    if (args.set == "medmnist") != bool(args.images):
        parser.error("--images FOLDER goes with medmnist, and medmnist needs it")
    sources = [*args.source, args.images] if args.images else args.source
    try:
        rows = tidy(sets[args.set](*sources), args.patient, args.no_split)
        if not rows:
            raise InputError(f"{args.source[0]} has no image for the table: see what SOURCE must "
                             f"be under {args.set} in make_table.py")
        held_out = [row for row in rows if row.split == "test"]
        for name, part in (("all", rows), ("held out (test)", held_out)):
            people = len({row.patient or row.image for row in part})
            normal = sum(not row.findings for row in part)
            unknown = sum(not row.patient for row in part)
            print(f"{name}: {len(part)} images of {people} patients, {normal} of them normal; "
                  f"{unknown} without a patient count as one each", file=sys.stderr)
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)
        sys.stdout.flush()
    except (InputError, OSError, re.error) as error:
        print(f"make_table.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
