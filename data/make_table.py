"""Makes the table for afire.py --labels from a data set as it is published.

    python data/make_table.py SET SOURCE [--patient REGEX] [--no-split] > labels.csv
    python data/make_table.py SET SOURCE --images FOLDER [...] > labels.csv

SET is the name of a function below; its description says what SOURCE holds, with the published
header. The table has one line for each image, and is meant to be opened and checked:

    image     path below SOURCE, or below FOLDER where there is one, with /
    findings  in lower case, joined by |; empty: normal
    patient   empty: unknown
    split     train or test; empty: left out; the whole column empty: the set has no split

dicom, medmnist, rsna and vindr are not PNG or JPEG: they are written as PNG below FOLDER, which is
for one SOURCE alone. A second start skips what is there. The PNG of a DICOM file has what a viewer
shows: its modality LUT, its VOI LUT or first window, inverted for MONOCHROME1 or INVERSE, padding
at the darkest level of the rest. If at most 8 bits are stored and the levels shown are integers
from 0 to 255, they are kept in a PNG of 8 bits. Otherwise it has 16 bits, and the darkest level
becomes 0: integers are shifted if they fit, other levels are scaled linearly up to 65535.

Images that are neither normal nor have a finding, and names that are not UTF-8, are left out, and
people in test are left out of train. Counts go to stderr, with the first file of each reason. So
does bad input, in one sentence, with status 2.
"""

import argparse
import collections
import csv
import gzip
import io
import os
import re
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

Row = collections.namedtuple("Row", "image findings patient split")
Folder = collections.namedtuple("Folder", "name stem place")
LeftOut = collections.namedtuple("LeftOut", "image reason detail", defaults=[""])
LETTER = r"[^\W\d_]"
# Words that begin with train, test or valid, and val itself: not contest, latest or valve.
PART = re.compile(rf"(?<!{LETTER})(train|test|val(?=id|(?!{LETTER}))){LETTER}*", re.I)
NORMAL = re.compile(rf"(?<!{LETTER})(normal|no[\W_]*finding|healthy)s?(?!{LETTER})", re.I)
NEGATION = re.compile(rf"(?<!{LETTER})(no|not|non|and|or|vs|versus)(?!{LETTER})", re.I)
NOT_UTF8 = re.compile("[\ud800-\udfff]")
CHESTXRAY14 = ("Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax "
               "Consolidation Edema Emphysema Fibrosis Pleural_Thickening Hernia").split()
CHEXPERT = ("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity",
            "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax",
            "Pleural Effusion", "Pleural Other", "Fracture")


class InputError(Exception):
    """Bad input, in one sentence with the remedy."""


class CannotShow(Exception):
    """Why a DICOM file cannot become an image."""


def is_normal(name):
    """Does a finding of this name mean that there is none? As in afire.py."""
    name = name.strip().lower()
    return re.fullmatch(r"((normal|no[ _-]?finding|healthy)s?)?", name) is not None


def is_normal_folder(name):
    """Does a folder's name have a word for normal in it (0_normal; not abnormal, not_normal)?"""
    return bool(NORMAL.search(name)) and not NEGATION.search(NORMAL.sub("", name))


def part_of(path):
    """train, test or val, as a folder of the path says; "test and train" if folders disagree."""
    parts = {match[1].lower() for match in PART.finditer(path.rpartition("/")[0])}
    return " and ".join(sorted(parts))


def read_csv(folder, names, columns):
    """The first of these files that there is: a dictionary a row, without spaces around cells."""
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if not file:
        raise InputError(f"{folder} has no {' or '.join(names)}: name the folder that has it")
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            reader = csv.DictReader(text, skipinitialspace=True, strict=True)
            for row in reader:
                if any(row.pop(None, [])):
                    raise InputError(f"{file}, line {reader.line_num} has more cells than the "
                                     "header: take the file as published")
                row = {name.strip(): cell.strip() for name, cell in row.items() if cell is not None}
                if not any(row.values()):
                    continue
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


def is_image(file):
    return file.suffix.lower() in (".png", ".jpg", ".jpeg")


def is_dicom(file):
    """Is it a DICOM file, whatever its suffix?"""
    with open(file, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def passed_over(file, path, wanted):
    """Why is this file below the folder not taken? Empty if it is."""
    names = path.split("/")
    if any(re.match(r"[.@$]|__MACOSX", name) for name in names):
        return "hidden or of the system"
    if any("mask" in name.lower() for name in names[:-1]):
        return "below a folder whose name contains mask"
    if NOT_UTF8.search(path):
        return "whose name is not UTF-8"
    if not (file.is_file() and os.access(file, os.R_OK)):
        return "that are links to folders, broken links or without access"
    if wanted(file):
        return ""
    if wanted is is_dicom:
        return "not DICOM"
    remedy = " (the set dicom reads it)" if is_dicom(file) else ""
    return f"{file.suffix.lower() or 'without a suffix'}, not PNG or JPEG{remedy}"


def find_files(folder, wanted):
    """Files below a folder: -> sorted paths of those wanted, a LeftOut for each of the others."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name the one that has the images")
    paths = []
    left_out = []
    for file in sorted(folder.rglob("*")):
        if file.is_symlink() or not file.is_dir():
            path = file.relative_to(folder).as_posix()
            reason = passed_over(file, path, wanted)
            if reason:
                left_out.append(LeftOut(path, reason))
            else:
                paths.append(path)
    return paths, left_out


def class_folders(path):
    """The folders above a file that may be classes. Those of one place lie beside each other.

    Words for train and test make no difference: train/COVID lies beside test/NORMAL, and test_covid
    beside train_normal. But test_images does not lie beside NORMAL.
    """
    folders = []
    for name in path.split("/")[:-1]:
        above = tuple(folder.stem.lower() for folder in folders)
        if not PART.search(name):
            folders.append(Folder(name, name, (above, "without a part")))
        elif re.search(LETTER, PART.sub("", name)):
            stem = PART.sub("", name).strip(" _-.")
            folders.append(Folder(name, stem, (above, "with a part")))
    return folders


def by_folders(paths, patient=""):
    """Rows of the class nearest to each file, and of its part, as the names of folders say.

    Classes are the folders beside one that means normal. stderr says what each name was taken for.
    """
    trees = {path: class_folders(path) for path in paths}
    beside = {folder.place for folders in trees.values() for folder in folders
              if is_normal_folder(folder.stem)}
    if not beside and any(NORMAL.search(name) for path in paths for name in path.split("/")[:-1]):
        raise InputError("a folder's name has a word for normal in it, but none means it: rename "
                         "the folder of normal images NORMAL")
    if paths and not beside:
        print("no folder is called NORMAL or the like: all images are normal", file=sys.stderr)
    rows = []
    roles = {}
    for path, folders in trees.items():
        classes = [folder for folder in folders if folder.place in beside]
        findings = None if beside else []
        meaning = {}
        if classes:
            nearest = classes[-1]
            findings = [] if is_normal_folder(nearest.stem) else [nearest.stem]
            meaning[nearest.name] = f"finding {nearest.stem.lower()}" if findings else "normal"
        rows.append(Row(path, findings, patient, part_of(path)))
        for name in path.split("/")[:-1]:
            role = ", ".join(filter(None, [part_of(f"{name}/"), meaning.get(name)]))
            names, images = roles.setdefault(role or "nothing", ({}, set()))
            names[name] = True
            images.add(path)
    for role, (names, images) in sorted(roles.items()):
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        print(f"{', '.join(list(names)[:5])}{more}: {role} ({len(images)} images)", file=sys.stderr)
    return rows


def read_dicom(file):
    """A DICOM file as a viewer shows it: -> (H, W), uint8 or uint16, as described above."""
    import numpy as np
    import pydicom.pixels
    dataset = pydicom.dcmread(file)
    kind = dataset.get("PhotometricInterpretation")
    bits = dataset.get("BitsStored", 16)
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise CannotShow("without pixel data")
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise CannotShow("of several frames")
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise CannotShow(f"in colour ({kind})" if kind else "without PhotometricInterpretation")
    if dataset.get("HighBit", bits - 1) != bits - 1:
        raise CannotShow("with a HighBit other than BitsStored - 1")
    try:
        stored = dataset.pixel_array
    except RuntimeError as error:
        syntax = dataset.file_meta.TransferSyntaxUID
        missing = " ".join(pydicom.pixels.get_decoder(syntax).missing_dependencies)
        packages = re.findall(r"(pylibjpeg[\w-]*)>=", missing)
        if not packages:
            raise
        raise CannotShow(f"that no installed package decodes ({syntax.name}; pip install "
                         f"{' '.join(packages)})") from error
    pixels = pydicom.pixels.apply_modality_lut(stored, dataset)
    pixels = pydicom.pixels.apply_voi_lut(pixels, dataset).astype(np.float64)
    if kind == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
        pixels = 2.0 ** bits - 1 - pixels
    padding = dataset.get("PixelPaddingValue")
    if padding is not None:
        limit = dataset.get("PixelPaddingRangeLimit")
        ends = [padding, padding if limit is None else limit]
        ends = np.array(ends).astype(stored.dtype)    # some write -2000 as the unsigned 63536
        padded = (stored >= ends.min()) & (stored <= ends.max())
        pixels[padded] = pixels[~padded].min(initial=pixels.max())
    darkest = pixels.min()
    brightest = pixels.max()
    if not np.isfinite(brightest - darkest):
        raise CannotShow("with pixels that are not finite")
    whole = np.array_equal(pixels, pixels.round())
    if whole and bits <= 8 and darkest >= 0 and brightest <= 255:
        return pixels.astype(np.uint8)
    pixels -= darkest
    if not whole or pixels.max() > 65535:
        pixels *= 65535 / max(pixels.max(), 1e-300)
    return pixels.round().astype(np.uint16)


def is_written(file, origin):
    """Is this image there already? origin is a checksum of what it is made from."""
    from PIL import Image
    if not file.exists():
        return False
    with Image.open(file) as image:
        if image.info.get("origin", origin) != origin:
            raise InputError(f"{file} was made from another set: name another folder for --images")
    return True


def write_png(file, pixels, origin):
    """Writes an image whole or not at all, so that a start after a kill can trust what is there."""
    from PIL import Image, PngImagePlugin
    text = PngImagePlugin.PngInfo()
    text.add_text("origin", origin)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1, pnginfo=text)   # 8 times as fast
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(buffer.getvalue())
    os.replace(partial, file)


def convert(rows, source, images):
    """Writes the DICOM file of each row as PATH.png below images: -> rows of these, and LeftOuts.

    A patient of None becomes the PatientID.
    """
    try:
        import pydicom.pixels
    except ImportError as error:
        raise InputError("DICOM needs pydicom 3 or later: pip install pydicom") from error
    from tqdm import tqdm

    def converted(row):
        file = source / row.image
        target = images / f"{row.image}.png"
        if not file.is_file():
            return LeftOut(row.image, "without a file")
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True,
                                     specific_tags=["SOPInstanceUID", "PatientID"])
            origin = f"{zlib.crc32(str(header.get('SOPInstanceUID')).encode()):08x}"
            patient = str(header.get("PatientID") or "").strip()
            pixels = None if is_written(target, origin) else read_dicom(file)
        except InputError:
            raise
        except CannotShow as reason:
            return LeftOut(row.image, str(reason))
        except Exception as error:    # pydicom raises all kinds for damaged files
            return LeftOut(row.image, f"damaged or unusual ({type(error).__name__})",
                           " ".join(str(error).split()))
        if pixels is not None:
            write_png(target, pixels, origin)
        return row._replace(image=f"{row.image}.png",
                            patient=patient if row.patient is None else row.patient)

    with warnings.catch_warnings(), tqdm(rows, "writing PNG", delay=1) as bar:
        warnings.simplefilter("ignore")    # pydicom's, about each odd element
        return [row if row.findings is None else converted(row) for row in bar]


def nih(source):
    """ChestX-ray14: Data_Entry_2017.csv, or Data_Entry_2017_v2020.csv.
    Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,...

    The split is that of train_val_list.txt and test_list.txt, if they are there. Images that are
    below SOURCE get their path, others their bare name.
    """
    split = {}
    for name, part in (("train_val_list.txt", "train"), ("test_list.txt", "test")):
        if (source / name).is_file():
            images = (source / name).read_text("utf-8-sig", errors="surrogateescape").split()
            split.update(dict.fromkeys(images, part))
    if len(set(split.values())) == 1:
        raise InputError(f"{source} has only one of train_val_list.txt and test_list.txt: add the "
                         "other, or remove it for no split")
    places = {path.split("/")[-1]: path for path in find_files(source, is_image)[0]}
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
            split[row["dicom_id"]] = row["split"]
    studies = {}
    for row in read("chexpert", ["study_id", *CHEXPERT]):
        studies[row["study_id"]] = findings_in(row, CHEXPERT)
    for row in read("metadata", ["dicom_id", "subject_id", "study_id", "ViewPosition"]):
        if row["ViewPosition"] in ("PA", "AP"):
            patient = row["subject_id"]
            study = row["study_id"]
            image = f"files/p{patient[:2]}/p{patient}/s{study}/{row['dicom_id']}.jpg"
            yield Row(image, studies.get(study), patient, split.get(row["dicom_id"], ""))


def rsna(source, images):
    """RSNA pneumonia challenge: stage_2_detailed_class_info.csv, in which equal rows count once.
    patientId,class

    The images are stage_2_train_images/PATIENTID.dcm. All classes but Normal are findings. There is
    no split. Each film has a patientId of its own, though they come from ChestX-ray14: which films
    are of one person is unknown.
    """
    rows = {}
    for row in read_csv(source, ["stage_2_detailed_class_info.csv"], ["patientId", "class"]):
        image = f"stage_2_train_images/{row['patientId']}.dcm"
        rows[Row(image, (row["class"],), row["patientId"], "")] = True
    return convert(rows, source, images)


def vindr(source, images):
    """VinDr-CXR: image_labels_train.csv and image_labels_test.csv, in SOURCE or its annotations.
    image_id,rad_id,Aortic enlargement,...,Other diseases,No finding

    The images are train/IMAGE_ID.dicom and test/IMAGE_ID.dicom. An image has every finding that any
    radiologist names. Patients are unknown.
    """
    rows = []
    for split in ("train", "test"):
        name = f"image_labels_{split}.csv"
        said = {}
        for row in read_csv(source, [name, f"annotations/{name}"], ["image_id", "No finding"]):
            columns = [column for column in row if column not in ("image_id", "rad_id")]
            said.setdefault(row["image_id"], []).extend(findings_in(row, columns) or [])
        for image, findings in said.items():
            if "Other disease" in findings:      # as the test part calls Other diseases
                findings = ["Other diseases", *set(findings) - {"Other disease"}]
            rows.append(Row(f"{split}/{image}.dicom", findings or None, "", split))
    return convert(rows, source, images)


def kermany(source):
    """Kermany et al. 2018: the folders train and test (val is left out), or what is in one of them.
    IM-0429-0001-0001, NORMAL2-IM-0246-0001, NORMAL-1003233-0001: normal
    person1000_bacteria_2931, BACTERIA-1008087-0001, VIRUS-6249454-0001: pneumonia, the one finding

    Patients are IM-0429, NORMAL2-IM-0246 and person1000, each of train or of test (person1 of train
    is not person1 of test), and the long numbers. Bacteria and virus of one number may be two
    people, but count as one, so that nobody is in both train and test.
    """
    kinds = r"(?:NORMAL|BACTERIA|VIRUS)-(\d+)-|(?:NORMAL2-)?IM-\d+(?=-)|person\d+(?=_)"
    paths, left_out = find_files(source, is_image)
    yield from left_out
    for path in paths:
        match = re.match(kinds, path.split("/")[-1])
        if not match:
            raise InputError(f"{path} is not named as in this set: remove it, or use folders")
        split = part_of(path)
        findings = ["pneumonia"] if match[0].startswith(("person", "BACTERIA", "VIRUS")) else []
        person = f"{split}/{match[0]}" if split in ("train", "test") else match[0]
        yield Row(path, findings, match[1] or person, split)


def lists(*files):
    """Lists as published with code: SOURCE is TRAIN or TRAIN TEST; the paths are as in the lists.
    relative/path 0 1 0 ...

    14 numbers are ChestX-ray14's findings, unless the paths are CheXpert's; otherwise the findings
    are called finding_1, finding_2 and so on. Patients are known if all names are ChestX-ray14's
    (00000165_001.png) or all paths CheXpert's (patient00001/).
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
                             f"first path by {len(lines[0][1])}: give each path the same number")
        names = [f"finding_{i}" for i in range(1, len(flags) + 1)]
        if len(flags) == 14 and "patient" not in path:
            names = CHESTXRAY14
        findings = [name for name, flag in zip(names, flags) if flag == "1"]
        yield Row(path, findings, person[person.lastindex] if all(people) else "", split)


def medmnist(source, images):
    """MedMNIST: SOURCE is chestmnist_64.npz (ChestX-ray14) or pneumoniamnist_64.npz (Kermany).
    train_images (n, 64, 64) uint8, train_labels (n, 14) or (n, 1); val_ and test_ alike

    val is left out. Patients are unknown.
    """
    import numpy as np
    from tqdm import tqdm
    for part in ("train", "val", "test"):
        try:
            with np.load(source) as arrays:
                pixels = arrays[f"{part}_images"]
                labels = arrays[f"{part}_labels"]
            shapes = (len(pixels), 1), (len(pixels), 14)
            if pixels.ndim != 3 or pixels.dtype != np.uint8 or labels.shape not in shapes:
                raise ValueError(f"images {pixels.shape}, labels {labels.shape}")
            if labels.max() > 1:
                raise ValueError(f"labels up to {labels.max()}")
        except (AttributeError, EOFError, LookupError, TypeError, ValueError,
                zipfile.BadZipFile) as error:
            raise InputError(f"{source} is not one of the two ({error}): download it") from error
        names = CHESTXRAY14 if labels.shape[1] == 14 else ["pneumonia"]
        with tqdm(pixels, f"writing PNG, {part}", delay=1) as bar:
            for i, image in enumerate(bar):
                origin = f"{zlib.crc32(image.tobytes()):08x}"
                file = images / f"{part}/{i:06}.png"
                if not is_written(file, origin):
                    write_png(file, image, origin)
        for i, flags in enumerate(labels):
            findings = [name for name, flag in zip(names, flags) if flag]
            yield Row(f"{part}/{i:06}.png", findings, "", part)


def folders(source):
    """Class folders in any tree of PNG or JPEG files, above or below folders for train and test.

    The class is the nearest folder beside one called NORMAL, No_Finding, Healthy or the like (also
    0_normal). Without any such folder all images are normal; with one, images in no class are left
    out. A folder is for train or test if a word in its name begins so, and for val, which is left
    out, if one begins with valid or is val: Training, chest_test, stage_2_train_images, not contest
    or valve. Folders of two parts above one image are refused. What is below a folder whose name
    contains mask is left out. Patients are unknown without --patient.
    """
    paths, left_out = find_files(source, is_image)
    return left_out + by_folders(paths)


def dicom(source, images):
    """DICOM files in any tree, known by DICM at byte 128; classes, train and test as in folders.

    The patient is the PatientID: unknown if empty, or if the same in all images. Several frames,
    colours, a HighBit other than BitsStored - 1, a format that no installed package decodes, and
    damaged files are left out.
    """
    paths, left_out = find_files(source, is_dicom)
    rows = convert(by_folders(paths, patient=None), source, images)
    people = {row.patient for row in rows if isinstance(row, Row) and row.findings is not None}
    if len(people) == 1 and people != {""}:
        print(f"PatientID is {people.pop()} in all files: patients are unknown", file=sys.stderr)
        rows = [row._replace(patient="") if isinstance(row, Row) else row for row in rows]
    return left_out + rows


def tidy(rows, patient, no_split):
    """The rules of all sets: -> one row an image, nobody in train and in test."""
    table = {}
    left_out = []
    for row in rows:
        if isinstance(row, LeftOut):
            left_out.append(row)
            continue
        if patient and row.findings is not None:
            match = re.search(patient, row.image)
            person = match and match[min(1, match.re.groups)]
            if not person:
                raise InputError(f"{row.image} does not match --patient {patient}: correct it")
            row = row._replace(patient=person)
        if no_split:
            row = row._replace(split="")
        if " and " in row.split:
            raise InputError(f"{row.image} has folders for {row.split} in its path: rename one, or "
                             "use --no-split")
        if row.split not in ("train", "test"):
            row = row._replace(split="")
        if row.findings is not None:
            names = {name.strip().lower() for name in row.findings if not is_normal(name)}
            row = row._replace(findings="|".join(sorted(names)))
        if table.setdefault(row.image, row) != row:
            raise InputError(f"{row.image} has conflicting rows: remove one of them")
    rows = []
    for row in table.values():
        if row.findings is None:
            left_out.append(LeftOut(row.image, "neither normal nor with a finding"))
        elif NOT_UTF8.search("".join(row)):
            left_out.append(LeftOut(row.image, "whose name is not UTF-8"))
        else:
            rows.append(row)
    if {row.split for row in rows if row.split} == {"train"}:    # train alone is no split
        left_out += [LeftOut(row.image, "not in train") for row in rows if not row.split]
        rows = [row._replace(split="") for row in rows if row.split]
    by_reason = {}
    for image in left_out:
        by_reason.setdefault(image.reason, []).append(image)
    for reason, images in by_reason.items():
        first = f"{images[0].image}: {images[0].detail}".strip(": ")
        print(f"left out: {len(images)} {reason}; the first is {first}", file=sys.stderr)
    tested = {row.patient for row in rows if row.split == "test" and row.patient}
    both = {row.image for row in rows if row.split == "train" and row.patient in tested}
    if both:
        print(f"out of train: {len(both)} of people in test", file=sys.stderr)
    return [row._replace(split="") if row.image in both else row for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sets = {rule.__name__: rule for rule in (nih, chexpert, mimic, rsna, vindr, kermany, lists,
                                             medmnist, folders, dicom)}
    convert_to_png = ("dicom", "medmnist", "rsna", "vindr")
    parser.add_argument("set", choices=sets)
    parser.add_argument("source", type=Path, nargs="+", help="lists: TRAIN [TEST]")
    parser.add_argument("--patient", metavar="REGEX", help="the patient in a path: the first group")
    parser.add_argument("--no-split", action="store_true", help="train, test and val are one")
    parser.add_argument("--images", type=Path, metavar="FOLDER",
                        help="dicom, medmnist, rsna, vindr: the folder to write PNG files to")
    args = parser.parse_args()
    if len(args.source) > 1 + (args.set == "lists"):
        parser.error(f"{args.set} takes one SOURCE")
    if args.images and args.set not in convert_to_png:
        parser.error(f"{args.set} writes no images: leave out --images")
    if not args.images and args.set in convert_to_png:
        parser.error(f"{args.set} needs --images FOLDER, the folder to write PNG files to")
    sources = [*args.source, args.images] if args.images else args.source
    try:
        rows = tidy(sets[args.set](*sources), args.patient, args.no_split)
        if not rows:
            raise InputError(f"{args.source[0]} has no image for the table: see the description "
                             f"of {args.set} in make_table.py")
        held_out = [row for row in rows if row.split == "test"]
        for name, part in (("all", rows), ("held out (test)", held_out)):
            people = len({row.patient or row.image for row in part})
            normal = sum(not row.findings for row in part)
            unknown = sum(not row.patient for row in part)
            print(f"{name}: {len(part)} images of {people} patients, {normal} of them normal; "
                  f"{unknown} without a patient count as one each", file=sys.stderr)
        sys.stdout.reconfigure(encoding="utf-8")
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)
        sys.stdout.flush()
    except (InputError, OSError, re.error) as error:
        print(f"make_table.py: {error}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        print(f"make_table.py: {args.set} needs {error.name}: pip install -r requirements.txt",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("make_table.py: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
