"""Makes the table for afire.py --labels from a data set as it is published, or from your own CSV.

    python data/make_table.py SET SOURCE [options] > labels.csv
    python data/make_table.py SET --help

SET is the name of a data set, or table, folders or dicom for your own data. The help of a set says
what SOURCE is, and which options the set has. The table has one line for each image, and is meant
to be opened and checked:

    image     path with /, below SOURCE, or below the folder of --data or --images
    findings  in lower case, joined by |; empty: normal
    patient   empty: unknown, the image counts as a patient of its own
    split     train or test; empty: left out
    mask      PNG or JPEG that is white where the findings are: a path below the same folder, or
              absolute; empty: unknown

The split is the published one. Where there is none, or with --no-split, a fixed fifth of the
patients is held out as test; where there are no findings either, all images are for train.

dicom, medmnist, rsna and vindr are not PNG or JPEG: they are written as PNG below the folder of
--images, which is for one SOURCE alone. A second run skips existing files. The PNG of a DICOM file
has what a viewer shows: its modality LUT, its VOI LUT or first window, inverted for MONOCHROME1 or
INVERSE, padding at the darkest level of the rest. If at most 8 bits are stored and the levels shown
are integers from 0 to 255, they are kept in a PNG of 8 bits. Otherwise it has 16 bits, and the
darkest level becomes 0: integers are shifted if they fit, other levels are scaled linearly up to
65535.

With --masks, nih, rsna and vindr write the published boxes as masks of the images' size.

Images without a label, rows without a file, and names that the table cannot represent are left out,
and patients in test are left out of train. Counts go to stderr, with the
first file of each reason. So does bad input, in one sentence, with status 2.
"""

import argparse
import collections
import csv
import gzip
import inspect
import io
import math
import os
import re
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

Row = collections.namedtuple("Row", "image findings patient split mask", defaults=[""])
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
# Images in train, val and test. Other sets of MedMNIST have arrays of the same shape.
MEDMNIST = {(78468, 11219, 22433): CHESTXRAY14, (4708, 524, 624): ["pneumonia"]}
# What a frontal chest radiograph may have in its DICOM header. XR is not in the standard, but used.
CHEST_IMAGE = {"Modality": r"^(CR|DR|DX|RG|XR)$",
               "ViewPosition": r"(?<![A-Z])(AP|PA|FRONTAL)(?![A-Z])",
               "BodyPartExamined": r"CHEST|THORA|TORAX|LUNG"}
WITHOUT_FILE = "without a file"
BACKSLASH = "whose name contains \\"
SPACE = "whose name begins or ends with a space"
REMEDIES = {WITHOUT_FILE: "name the folder below which these paths are",
            BACKSLASH: "unpack the archive again; in a CSV, write / instead",
            SPACE: "rename the files"}
OTHERWISE = "make_table.py SET --help says what SOURCE is"


class InputError(Exception):
    """Bad input, in one sentence with the remedy."""


class CannotShow(Exception):
    """Why a DICOM file cannot become an image."""


def say(line):
    print(line, file=sys.stderr)


def is_normal(name):
    """Does a finding of this name mean that there is none?"""
    name = name.strip().lower()
    return re.fullmatch(r"((normal|no[ _-]?finding|healthy)s?)?", name) is not None


def is_normal_folder(name):
    """Does a folder's name have a word for normal in it (0_normal; not abnormal, not_normal)?"""
    return bool(NORMAL.search(name)) and not NEGATION.search(NORMAL.sub("", name))


def part_of(path):
    """train, test or val, as a folder of the path says; "test and train" if folders disagree."""
    parts = {match[1].lower() for match in PART.finditer(path.rpartition("/")[0])}
    return " and ".join(sorted(parts))


def clean(findings):
    """Findings as they are in the table: in lower case, sorted, without those that mean normal."""
    names = {" ".join(re.sub("[,;|]", " ", name).lower().split()) for name in findings}
    return "|".join(sorted(name for name in names if not is_normal(name)))


# ---- Reading -------------------------------------------------------------------------------------

def read_text(file):
    """The text of a file in UTF-8, also of one in .gz."""
    if not file.is_file():
        raise InputError(f"{file} is no file: name the one to read")
    content = file.read_bytes()
    try:
        if file.suffix == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[:error.start].count(b"\n") + 1
        raise InputError(f"{file}, line {line} is not UTF-8: save the file as UTF-8") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{file} is damaged ({error}): download it again") from error


def read_lines(file):
    """Lines of a CSV that are not empty: (number, cells without spaces around them)."""
    text = io.StringIO(read_text(file), newline="")
    reader = csv.reader(text, skipinitialspace=True, strict=True)
    number = 1                                             # the first line of a row
    width = None
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if any(cells):
                width = width or len(cells)
                if any(cells[width:]):
                    raise InputError(f"{file}, line {number} has more cells than the header: put a "
                                     "cell with a comma in quotes")
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{file}, line {number}: {error}: is a quote not closed?") from error


def read_csv(folder, names, columns):
    """The first of these files that there is: {title: cell} of each row."""
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if not file:
        raise InputError(f"{folder} has no {' or '.join(names)}: name the folder that has it")
    lines = read_lines(file)
    _, titles = next(lines, (1, []))
    for number, cells in lines:
        row = dict(zip(titles, cells))
        for column in columns:
            if column not in row:
                raise InputError(f"{file}, line {number} has no column {column}: take the file as "
                                 "published")
        yield row


def read_boxes(folder, name, image, columns):
    """Boxes of a published file: (row, left, top, right, bottom).

    The four columns are x, y and either width and height, or x and y of the opposite corner.
    Rows without a box are skipped.
    """
    for row in read_csv(folder, [name, f"annotations/{name}"], [image, *columns]):
        cells = [row[column] for column in columns]
        if not any(cells):
            continue
        try:
            left, top, right, bottom = map(float, cells)
        except ValueError as error:
            raise InputError(f"{name} has a box of {row[image]} that is not four numbers: take the "
                             "file as published") from error
        if "max" not in columns[-1]:
            right += left
            bottom += top
        yield row, (left, top, right, bottom)


def findings_in(row, columns):
    """Those of the columns that are 1; 0, -1 and blank are absent. None (unknown) if none is 1."""
    return [column for column in columns if row[column] in ("1", "1.0")] or None


def join(ours, theirs, our_name, their_name):
    """Says which names only one side has; refused if there is none on both."""
    only_ours = [name for name in ours if name not in theirs]
    only_theirs = [name for name in theirs if name not in ours]
    if len(only_ours) == len(ours):
        raise InputError(f"none of the {our_name} (the first is {next(iter(ours), 'missing')}) is "
                         f"among the {their_name} (the first is {next(iter(theirs), 'missing')}): "
                         "take the files as published")
    if only_ours:
        say(f"{len(only_ours)} of {len(ours)} {our_name} are not among the {their_name}; the first "
            f"is {only_ours[0]}")
    if only_theirs:
        say(f"{len(only_theirs)} of {len(theirs)} {their_name} are not among the {our_name}; the "
            f"first is {only_theirs[0]}")


def is_mask(path):
    """Does the path of a file contain the word mask?"""
    return "mask" in path.lower()


def is_image(file):
    return file.suffix.lower() in (".png", ".jpg", ".jpeg")


def is_dicom(file):
    """Is it a DICOM file, whatever its suffix?"""
    with open(file, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def bad_name(path):
    """Why can this name not stand in the table? Empty if it can."""
    if NOT_UTF8.search(path):
        return "whose name is not UTF-8"
    if "\\" in path:
        return BACKSLASH
    return SPACE if path != path.strip() else ""


def passed_over(file, path, wanted):
    """Why is this file below the folder not taken? Empty if it is."""
    if any(re.match(r"[.@$]|__MACOSX", name) for name in path.split("/")):
        return "hidden or of the system"
    if bad_name(path):
        return bad_name(path)
    if not (file.is_file() and os.access(file, os.R_OK)):
        return "that are links to folders, broken links or not readable"
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


def find_images(folder, wanted):
    """As find_files, without masks: files whose path contains the word mask."""
    paths, left_out = find_files(folder, wanted)
    left_out += [LeftOut(path, "with mask in their path") for path in paths
                 if is_mask(path)]
    return [path for path in paths if not is_mask(path)], left_out


def images_below(options):
    """Paths of the images below --data. The masks of an earlier start are none of them."""
    paths, _ = find_files(options.data, is_image)
    if options.masks:
        masks = options.masks.resolve()
        data = options.data.resolve()
        paths = [path for path in paths if masks not in (data / path).parents]
    return paths


def match_files(rows, files, folder):
    """Rows that have a file, and a LeftOut for each other one. Files without a row are counted."""
    rows = list(rows)
    named = {row.image for row in rows}
    unnamed = [file for file in files if file not in named and not is_mask(file)]
    if unnamed:
        say(f"{len(unnamed)} of {len(files)} files below {folder} have no row; the first is "
            f"{unnamed[0]}")
    first = f"the first file below {folder} is {files[0]}" if files else f"{folder} has no images"
    files = set(files)
    return [row if isinstance(row, LeftOut) or row.image in files or bad_name(row.image)
            else LeftOut(row.image, WITHOUT_FILE, first) for row in rows]


def place_images(paths, depth=1):
    """Paths by their last names, as many as depth: -> function that gives the path of a name.

    A name without a path is given back. Masks are no images.
    """
    places = collections.defaultdict(list)
    for path in paths:
        if not is_mask(path):
            places["/".join(path.split("/")[-depth:])].append(path)

    def place(name):
        found = places.get("/".join(name.split("/")[-depth:]), [name])
        if len(found) > 1:
            raise InputError(f"{found[0]} and {found[1]} have the same name: name the folder of "
                             "the images to use with --data")
        return found[0]

    return place


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


def by_folders(paths, all_normal, patient=""):
    """Rows of the class nearest to each file, and of its part, as the names of folders say.

    Classes are the folders beside one that means normal. stderr says what each name was taken for.
    """
    trees = {path: class_folders(path) for path in paths}
    beside = set()
    if not all_normal:
        beside = {folder.place for folders in trees.values() for folder in folders
                  if is_normal_folder(folder.stem)}
        if paths and not beside:
            names = sorted({name for path in paths for name in path.split("/")[:-1]})
            raise InputError("no folder is called normal, no finding or healthy; there are "
                             f"{', '.join(names[:5]) or 'no folders'}: rename the folder of the "
                             "normal images NORMAL, or add --all-normal if all images are normal")
    rows = []
    roles = {}
    for path, folders in trees.items():
        classes = [folder for folder in folders if folder.place in beside]
        findings = [] if all_normal else None
        meaning = {}
        if classes:
            nearest = classes[-1]
            findings = [] if is_normal_folder(nearest.stem) else [nearest.stem]
            meaning[nearest.name] = f"finding {clean(findings)}" if findings else "normal"
        rows.append(Row(path, findings, patient, part_of(path)))
        for name in path.split("/")[:-1]:
            role = ", ".join(filter(None, [part_of(f"{name}/"), meaning.get(name)]))
            names, images = roles.setdefault(role or "no class recognised", ({}, set()))
            names[name] = True
            images.add(path)
    for role, (names, images) in sorted(roles.items()):
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        say(f"{', '.join(list(names)[:5])}{more}: {role} ({len(images)} images)")
    return rows


# ---- Writing -------------------------------------------------------------------------------------

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
        if image.info.get("origin") != origin:
            raise InputError(f"{file} is there, but was made from something else: name another "
                             "folder to write to")
    return True


def write_png(file, pixels, origin):
    """Writes an image whole or not at all, so that a later run can rely on what exists."""
    from PIL import Image, PngImagePlugin
    text = PngImagePlugin.PngInfo()
    text.add_text("origin", origin)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1, pnginfo=text)   # 8 times as fast
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(buffer.getvalue())
    os.replace(partial, file)


def check_header(header):
    """Raises CannotShow if a DICOM header says that this is no frontal chest radiograph."""
    for name, wanted in CHEST_IMAGE.items():
        value = str(header.get(name) or "").strip().upper()
        if value and not re.search(wanted, value):
            raise CannotShow(f"with {name} {value}")


def convert(rows, source, images, check=lambda header: None):
    """Writes the DICOM file of each row as PATH.png below images: -> rows of these, and LeftOuts.

    A patient of None becomes the PatientID. check raises CannotShow for a header.
    """
    try:
        import pydicom.pixels
    except ImportError as error:
        raise InputError("DICOM needs pydicom 3 or later: pip install pydicom") from error
    from tqdm import tqdm

    def converted(row):
        file = source / row.image
        target = images / f"{row.image}.png"
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True,
                                     specific_tags=["SOPInstanceUID", "PatientID", *CHEST_IMAGE])
            check(header)
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
        return [row if isinstance(row, LeftOut) or row.findings is None else converted(row)
                for row in bar]


def convert_published(rows, options):
    """As convert, for the rows of a CSV: they may lack a file, and files may lack a row."""
    files, _ = find_files(options.source, lambda file: file.suffix in (".dcm", ".dicom"))
    return convert(match_files(rows, files, options.source), options.source, options.images)


def draw_mask(boxes, width, height, name):
    """White where any box touches a pixel: (H, W) uint8."""
    import numpy as np
    mask = np.zeros((height, width), np.uint8)
    for left, top, right, bottom in boxes:
        # Boxes of a scaled image are rounded, hence half a pixel.
        if not (-0.5 <= left < right <= width + 0.5 and -0.5 <= top < bottom <= height + 0.5):
            raise InputError(
                f"a box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) does not fit in {name},"
                f" which is {width} x {height}: use images of the published size")
        mask[max(math.floor(top), 0):math.ceil(bottom),
             max(math.floor(left), 0):math.ceil(right)] = 255
    return mask


def write_masks(rows, options):
    """Writes the boxes of each abnormal row as a mask: -> rows with its path."""
    from PIL import Image
    from tqdm import tqdm
    abnormal = {row.image: row for row in rows if row.findings}
    join(options.boxes, abnormal, "images with boxes", "abnormal images of the table")
    data = options.data.resolve()
    folder = options.masks.resolve()
    for name in tqdm(sorted(abnormal.keys() & options.boxes.keys()), "writing masks", delay=1):
        with Image.open(data / name) as image:
            mask = draw_mask(options.boxes[name], *image.size, name)
        file = folder / name
        origin = f"{zlib.crc32(mask.tobytes()):08x}"
        if not is_written(file, origin):
            write_png(file, mask, origin)
        path = file.relative_to(data) if folder.is_relative_to(data) else file
        abnormal[name] = abnormal[name]._replace(mask=path.as_posix())
    return [abnormal.get(row.image, row) for row in rows]


# ---- Sets ----------------------------------------------------------------------------------------

def table(options):
    """Your own CSV: image and findings and, if known, patient, split and mask.
    image,findings,patient,split,mask

    Titles may be in any case and order; other columns are ignored. Findings are joined by |, in any
    case; no finding, normal, healthy or nothing is normal. The split is train, test or val, which
    is left out. With --data, rows without a file are left out.
    """
    lines = read_lines(options.source)
    _, titles = next(lines, (1, []))
    titles = [title.lower() for title in titles]
    known = [title for title in titles if title in Row._fields]
    if not {"image", "findings"} <= set(known) or len(set(known)) < len(known):
        raise InputError(f"{options.source}, line 1 has the titles {', '.join(titles)}: it needs "
                         "image and findings, once each, with commas between them")
    ignored = [title or "without a title" for title in titles if title not in known]
    if ignored:
        say(f"ignored columns: {', '.join(ignored)}")
    seen = {}
    doubtful = []
    for number, cells in lines:
        line = f"{options.source}, line {number}"
        row = dict.fromkeys(Row._fields, "") | dict(zip(titles, cells))
        findings = row["findings"]
        split = PART.fullmatch(row["split"])
        if not row["image"]:
            raise InputError(f"{line} names no image: name it, or remove the row")
        if len(cells) < len(titles):
            raise InputError(f"{line} has {len(cells)} cells, and the header has {len(titles)}: add"
                             " the missing commas")
        if row["split"] and not split:
            raise InputError(f"{line} has the split {row['split']}: use train, test, val or "
                             "nothing")
        if re.search("[,;]", findings):
            raise InputError(f"{line} has the findings {findings}: join them by | instead")
        if re.search(r"[/+&\\]|\band\b", findings):
            doubtful.append(f"line {number} ({findings})")
        row = Row(row["image"], clean(findings.split("|")).split("|"), row["patient"],
                  split[1].lower() if split else "", row["mask"])
        first, other = seen.setdefault(row.image, (number, row))
        if other != row:
            raise InputError(f"{line} contradicts line {first} about {row.image}: "
                             "remove one of them")
    if doubtful:
        say(f"{len(doubtful)} rows have findings that may be several, which are joined by |; the "
            f"first is {doubtful[0]}")
    rows = [row for _, row in seen.values()]
    return match_files(rows, images_below(options), options.data) if options.data else rows


def nih(options):
    """ChestX-ray14: Data_Entry_2017.csv, or Data_Entry_2017_v2020.csv, and the images.
    Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,...
    Image Index,Finding Label,Bbox [x,y,w,h],,,

    The images may lie in any folders below SOURCE, or below --data; those that are not there are
    left out. The split is that of train_val_list.txt and test_list.txt, if they are there. The
    boxes for --masks are those of BBox_List_2017.csv.
    """
    source = options.source
    split = {}
    for name, part in (("train_val_list.txt", "train"), ("test_list.txt", "test")):
        if (source / name).is_file() and not options.no_split:
            split.update(dict.fromkeys(read_text(source / name).split(), part))
    if len(set(split.values())) == 1:
        raise InputError(f"{source} has only one of train_val_list.txt and test_list.txt: add the "
                         "other, or use --no-split")
    files = images_below(options)
    place = place_images(files)
    names = ["Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv"]
    rows = []
    images = {}
    for row in read_csv(source, names, ["Image Index", "Finding Labels", "Patient ID"]):
        image = row["Image Index"]
        images[image] = True
        rows.append(Row(place(image), row["Finding Labels"].split("|"), row["Patient ID"],
                        split.get(image, "")))
    if split:
        join(split, images, "images of the official lists", "images of Data_Entry_2017.csv")
    if options.masks:
        columns = ["Bbox [x", "y", "w", "h]"]
        for row, box in read_boxes(source, "BBox_List_2017.csv", "Image Index", columns):
            options.boxes[place(row["Image Index"])].append(box)
    return match_files(rows, files, options.data)


def chexpert(options):
    """CheXpert: train.csv, and valid.csv as the test part if there is to be a split.
    Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,...,Support Devices

    Frontal views. -1 (uncertain) and blank are absent. Support Devices are not a finding: an image
    with a pacemaker and nothing else is labelled No Finding. The images may lie in any folders
    below SOURCE, or below --data, such as CheXpert-v1.0 batch 2 (train 1): they are found by
    patientN/studyN/NAME. The CSV files may lie in a folder of SOURCE called CheXpert...
    """
    files = images_below(options)
    place = place_images(files, depth=3)
    rows = []
    for name, split in (("train.csv", "train"), ("valid.csv", "test")):
        found = [name, *(file.relative_to(options.source).as_posix()
                         for file in sorted(options.source.glob(f"CheXpert*/{name}")))]
        if split == "test" and not any((options.source / file).is_file() for file in found):
            continue
        for row in read_csv(options.source, found, ["Path", "Frontal/Lateral", *CHEXPERT]):
            image = place(row["Path"])
            patient = re.search(r"patient\d+(?=/)|$", row["Path"])[0]
            view = row["Frontal/Lateral"]
            if view == "Frontal":
                rows.append(Row(image, findings_in(row, CHEXPERT), patient, split))
            else:
                rows.append(LeftOut(image, f"with the view {view or 'unknown'}"))
    return match_files(rows, files, options.data)


def mimic(options):
    """MIMIC-CXR-JPG: mimic-cxr-2.0.0-{chexpert,metadata}.csv(.gz), and -split if it is to be used.
    subject_id,study_id,Atelectasis,Cardiomegaly,...,No Finding,...,Support Devices
    dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,...
    dicom_id,study_id,subject_id,split

    PA and AP views; findings as in chexpert; validate is left out. The images are
    files/pNN/pSUBJECT/sSTUDY/DICOM.jpg below SOURCE, or below --data.
    """
    source = options.source

    def read(name, columns):
        file = f"mimic-cxr-2.0.0-{name}.csv"
        return read_csv(source, [file, f"{file}.gz"], columns)

    split = {}
    if any(source.glob("mimic-cxr-2.0.0-split.csv*")) and not options.no_split:
        for row in read("split", ["dicom_id", "split"]):
            split[row["dicom_id"]] = row["split"]
    studies = {}
    for row in read("chexpert", ["study_id", *CHEXPERT]):
        studies[row["study_id"]] = findings_in(row, CHEXPERT)
    rows = {}
    known = {}
    for row in read("metadata", ["dicom_id", "subject_id", "study_id", "ViewPosition"]):
        patient = row["subject_id"]
        study = row["study_id"]
        name = row["dicom_id"]
        view = row["ViewPosition"]
        image = f"files/p{patient[:2]}/p{patient}/s{study}/{name}.jpg"
        known[study] = True
        if view in ("PA", "AP"):
            rows[name] = Row(image, studies.get(study), patient, split.get(name, ""))
        else:
            rows[name] = LeftOut(image, f"with ViewPosition {view or 'unknown'}")
    join(studies, known, "studies of the chexpert file", "studies of the metadata")
    if split:
        join(split, rows, "images of the split file", "images of the metadata")
    return match_files(rows.values(), images_below(options), options.data)


def rsna(options):
    """RSNA pneumonia challenge: stage_2_detailed_class_info.csv, in which equal rows count once.
    patientId,class
    patientId,x,y,width,height,Target

    The images are stage_2_train_images/PATIENTID.dcm. All classes but Normal are findings. There is
    no split. Each image has a patientId of its own, though they come from ChestX-ray14, so which
    images are of one patient is unknown. The boxes for --masks are those of
    stage_2_train_labels.csv.
    """
    rows = {}
    source = options.source
    for row in read_csv(source, ["stage_2_detailed_class_info.csv"], ["patientId", "class"]):
        image = f"stage_2_train_images/{row['patientId']}.dcm"
        rows[Row(image, (row["class"],), row["patientId"], "")] = True
    if options.masks:
        columns = ["x", "y", "width", "height"]
        for row, box in read_boxes(source, "stage_2_train_labels.csv", "patientId", columns):
            options.boxes[f"stage_2_train_images/{row['patientId']}.dcm.png"].append(box)
    return convert_published(rows, options)


def vindr(options):
    """VinDr-CXR: image_labels_train.csv and image_labels_test.csv, in SOURCE or its annotations.
    image_id,rad_id,Aortic enlargement,...,Other diseases,No finding
    image_id,rad_id,class_name,x_min,y_min,x_max,y_max

    The images are train/IMAGE_ID.dicom and test/IMAGE_ID.dicom. An image has every finding that any
    radiologist names. Patients are unknown. The boxes for --masks are those of
    annotations_train.csv and annotations_test.csv, of all radiologists together.
    """
    rows = []
    for split in ("train", "test"):
        name = f"image_labels_{split}.csv"
        said = {}
        files = [name, f"annotations/{name}"]
        for row in read_csv(options.source, files, ["image_id", "No finding"]):
            columns = [column for column in row if column not in ("image_id", "rad_id")]
            said.setdefault(row["image_id"], []).extend(findings_in(row, columns) or [])
        for image, findings in said.items():
            if "Other disease" in findings:      # as the test part calls Other diseases
                findings = ["Other diseases", *set(findings) - {"Other disease"}]
            rows.append(Row(f"{split}/{image}.dicom", findings or None, "", split))
        if options.masks:
            columns = ["x_min", "y_min", "x_max", "y_max"]
            name = f"annotations_{split}.csv"
            for row, box in read_boxes(options.source, name, "image_id", columns):
                options.boxes[f"{split}/{row['image_id']}.dicom.png"].append(box)
    return convert_published(rows, options)


def kermany(options):
    """Kermany et al. 2018: the folders train and test (val is left out), or what is in one of them.
    IM-0429-0001-0001, NORMAL2-IM-0246-0001, NORMAL-1003233-0001: normal
    person1000_bacteria_2931, BACTERIA-1008087-0001, VIRUS-6249454-0001: pneumonia, the one finding

    Patients are IM-0429, NORMAL2-IM-0246 and person1000, each of train or of test (person1 of train
    is not person1 of test), and the long numbers. Bacteria and virus of one number may be two
    patients, but count as one, so that no patient is in both train and test.
    """
    kinds = r"(?:NORMAL|BACTERIA|VIRUS)-(\d+)-|(?:NORMAL2-)?IM-\d+(?=-)|person\d+(?=_)"
    paths, left_out = find_images(options.source, is_image)
    yield from left_out
    for path in paths:
        match = re.match(kinds, path.split("/")[-1])
        if not match:
            raise InputError(f"{path} is not named as in this set: remove it, or use folders")
        split = part_of(path)
        findings = ["pneumonia"] if match[0].startswith(("person", "BACTERIA", "VIRUS")) else []
        patient = f"{split}/{match[0]}" if split in ("train", "test") else match[0]
        yield Row(path, findings, match[1] or patient, split)


def lists(options):
    """Lists as published with code: SOURCE is one list, TRAIN TEST, or TRAIN VAL TEST.
    relative/path 0 1 0 ...

    The paths are as in the lists; val is left out. 14 numbers after names of ChestX-ray14
    (00000165_001.png) are its findings; otherwise the findings are called finding_1, finding_2 and
    so on. Patients are known if all names are ChestX-ray14's or all paths CheXpert's
    (patient00001/). With --data, rows without a file are left out.
    """
    parts = {1: [""], 2: ["train", "test"], 3: ["train", "val", "test"]}
    lines = []
    for file, split in zip(options.source, parts[len(options.source)]):
        for line in read_text(file).splitlines():
            path, flags = re.fullmatch(r"\s*(.*?)((?:\s+[01])*)\s*", line).groups()
            if path:
                lines.append((path, flags.split(), split))
    style = r"(?:^|/)(000\d{5})_\d{3}\.\w+$|(patient\d+)/"
    matches = [re.search(style, path) for path, _, _ in lines]
    nih_names = all(match and match[1] for match in matches)
    rows = []
    for (path, flags, split), match in zip(lines, matches):
        if not flags or len(flags) != len(lines[0][1]):
            raise InputError(f"{path} is followed by {len(flags)} zeros and ones in the list, the "
                             f"first path by {len(lines[0][1])}: give every path as many")
        names = [f"finding_{i}" for i in range(1, len(flags) + 1)]
        if len(flags) == 14 and nih_names:
            names = CHESTXRAY14
        findings = [name for name, flag in zip(names, flags) if flag == "1"]
        patient = match[match.lastindex] if all(matches) else ""
        rows.append(Row(path, findings, patient, split))
    return match_files(rows, images_below(options), options.data) if options.data else rows


def medmnist(options):
    """MedMNIST: SOURCE is chestmnist_64.npz (ChestX-ray14) or pneumoniamnist_64.npz (Kermany).
    train_images (n, 64, 64) uint8, train_labels (n, 14) or (n, 1); val_ and test_ alike

    Any of the published sizes. val is left out. Patients are unknown.
    """
    import numpy as np
    from tqdm import tqdm
    source = options.source
    arrays = {}
    try:
        with np.load(source) as file:
            for part in ("train", "val", "test"):
                arrays[part] = file[f"{part}_images"], file[f"{part}_labels"]
        sizes = tuple(len(pixels) for pixels, _ in arrays.values())
        if sizes not in MEDMNIST:
            raise ValueError(f"it has {', '.join(map(str, sizes))} images in train, val, test")
        names = MEDMNIST[sizes]
        for pixels, labels in arrays.values():
            if (pixels.ndim != 3 or pixels.dtype != np.uint8
                    or labels.shape != (len(pixels), len(names)) or labels.max() > 1):
                raise ValueError(f"images {pixels.shape}, labels {labels.shape} up to "
                                 f"{labels.max()}")
    except (AttributeError, EOFError, FileNotFoundError, LookupError, TypeError, ValueError,
            zipfile.BadZipFile) as error:
        raise InputError(f"{source} is neither ChestMNIST nor PneumoniaMNIST ({error}): download "
                         "one of them") from error
    for part, (pixels, labels) in arrays.items():
        with tqdm(pixels, f"writing PNG, {part}", delay=1) as bar:
            for i, image in enumerate(bar):
                origin = f"{zlib.crc32(image.tobytes()):08x}"
                file = options.images / f"{part}/{i:06}.png"
                if not is_written(file, origin):
                    write_png(file, image, origin)
        for i, flags in enumerate(labels):
            findings = [name for name, flag in zip(names, flags) if flag]
            yield Row(f"{part}/{i:06}.png", findings, "", part)


def folders(options):
    """Class folders in any tree of PNG or JPEG files, above or below folders for train and test.

    The class is the nearest folder beside one called NORMAL, No_Finding, Healthy or the like (also
    0_normal). Without any such folder the tree is refused, unless --all-normal says that all images
    are normal; with one, images in no class are left out. A folder is for train or test if a word
    in its name begins so, and for val, which is left out, if one begins with valid or is val:
    Training, chest_test, stage_2_train_images, not contest or valve. Folders of two parts above one
    image are refused. Files called mask, and what is below a folder whose name contains mask, are
    left out. Patients are unknown without --patient.
    """
    paths, left_out = find_images(options.source, is_image)
    return left_out + by_folders(paths, options.all_normal)


def dicom(options):
    """DICOM files in any tree, known by DICM at byte 128; classes, train and test as in folders.

    The patient is the PatientID: unknown if empty, or if the same in all images. Frontal chest
    radiographs only: files whose Modality, ViewPosition or BodyPartExamined says otherwise are left
    out; one that is empty does no harm. Several frames, colours, a HighBit other than
    BitsStored - 1, a format that no installed package decodes, and damaged files are left out.
    """
    paths, left_out = find_images(options.source, is_dicom)
    rows = by_folders(paths, options.all_normal, patient=None)
    rows = convert(rows, options.source, options.images, check_header)
    patients = {row.patient for row in rows if isinstance(row, Row) and row.findings is not None}
    if len(patients) == 1 and patients != {""}:
        say(f"PatientID is {patients.pop()} in all files: patients are unknown")
        rows = [row._replace(patient="") if isinstance(row, Row) else row for row in rows]
    return left_out + rows


# ---- The table -----------------------------------------------------------------------------------

def tidy(rows, options):
    """The rules of all sets: -> one row for each image that can be used, and the LeftOuts."""
    seen = {}
    left_out = []
    for row in rows:
        if isinstance(row, LeftOut):
            left_out.append(row)
            continue
        if options.patient and row.findings is not None:
            match = re.search(options.patient, row.image)
            patient = match and match[min(1, match.re.groups)]
            if not patient:
                raise InputError(f"{row.image} does not match --patient {options.patient}: correct "
                                 "it")
            row = row._replace(patient=patient)
        if options.no_split:
            row = row._replace(split="")
        if " and " in row.split:
            raise InputError(f"{row.image} has folders for {row.split} in its path: rename one, or "
                             "use --no-split")
        if row.split not in ("train", "test"):
            row = row._replace(split="")
        if row.findings is not None:
            row = row._replace(findings=clean(row.findings))
        if seen.setdefault(row.image, row) != row:
            raise InputError(f"{row.image} has conflicting rows: remove one of them")
    rows = []
    for row in seen.values():
        if row.findings is None:
            left_out.append(LeftOut(row.image, "neither normal nor with a finding"))
        elif bad_name(row.image):
            left_out.append(LeftOut(row.image, bad_name(row.image)))
        elif NOT_UTF8.search("".join(row)):
            left_out.append(LeftOut(row.image, "with characters that are not UTF-8"))
        else:
            rows.append(row)
    return rows, left_out


def report_left_out(left_out):
    """Says how many are left out for each reason: -> the most frequent one, and the remedy."""
    by_reason = collections.defaultdict(list)
    for image in left_out:
        by_reason[image.reason].append(image)
    sentences = {}
    for reason, images in by_reason.items():
        detail = f" ({images[0].detail})" if images[0].detail else ""
        sentences[reason] = f"{len(images)} {reason}; the first is {images[0].image}{detail}"
        say(f"left out: {sentences[reason]}")
    if not sentences:
        return f": {OTHERWISE}"
    reason = max(by_reason, key=lambda reason: len(by_reason[reason]))
    return f": {sentences[reason]}: {REMEDIES.get(reason, OTHERWISE)}"


def hold_out(rows, own_split):
    """Rows with a split in which no patient is in both train and test."""
    parts = {row.split for row in rows if row.split}
    if parts == {"train"} and not own_split:               # train alone is no split
        unused = [row for row in rows if not row.split]
        if unused:
            report_left_out([LeftOut(row.image, "not in train") for row in unused])
        rows = [row for row in rows if row.split]
        parts = set()
    if not parts and not any(row.findings for row in rows):
        say("no findings: all images are for train")
        return [row._replace(split="train") for row in rows]
    if not parts:
        say("no image is in test: a fixed fifth of the patients is held out")
        numbers = [zlib.crc32(os.fsencode(row.patient or row.image)) % 1000 for row in rows]
        return [row._replace(split="test" if number < 200 else "train")
                for row, number in zip(rows, numbers)]
    tested = {row.patient for row in rows if row.split == "test" and row.patient}
    both = {row.image for row in rows if row.split == "train" and row.patient in tested}
    if both:
        say(f"left out of train: {len(both)} images of patients in test")
    return [row._replace(split="") if row.image in both else row for row in rows]


def check_patients(rows):
    """Says which patients may be one in two spellings, and which have very many images."""
    spellings = collections.defaultdict(dict)
    images = collections.Counter()
    for row in rows:
        if row.patient:
            number = re.sub(r"\.0+$", "", row.patient.lower())
            number = re.sub(r"(?<!\d)0+(?=\d)", "", number)
            spellings[number].setdefault(row.patient, row.image)
            images[row.patient] += 1
    doubtful = [names for names in spellings.values() if len(names) > 1]
    if doubtful:
        named = [f"{patient} ({image})" for patient, image in doubtful[0].items()]
        say(f"check: {len(doubtful)} patients may be spelled in more than one way; the first is "
            f"{' and '.join(named)}")
    for patient, count in images.most_common(3):
        if len(rows) >= 50 and count > len(rows) / 10:
            first = next(row.image for row in rows if row.patient == patient)
            say(f"check: patient {patient} has {count} of {len(rows)} images; the first is {first}")


def report(rows):
    """Says what is in the table."""
    findings = collections.Counter(name for row in rows if row.findings
                                   for name in row.findings.split("|"))
    listed = [f"{name} ({count})" for name, count in findings.most_common(20)]
    say(f"findings: {', '.join(listed) or 'none'}")
    for name, splits in (("all", ("train", "test", "")), ("train", ("train",)),
                         ("test (held out)", ("test",)), ("in neither", ("",))):
        part = [row for row in rows if row.split in splits]
        patients = len({row.patient or row.image for row in part})
        normal = sum(not row.findings for row in part)
        if part or name != "in neither":
            say(f"{name}: {len(part)} images of {patients} patients, {normal} of them normal")
    unknown = sum(not row.patient for row in rows)
    if unknown:
        say(f"patient unknown for {unknown} images: each counts as a patient of its own")


OPTIONS = {
    "--data": {"type": Path, "metavar": "FOLDER",
               "help": "the folder of the images; rows without a file there are left out"},
    "--images": {"type": Path, "metavar": "FOLDER", "required": True,
                 "help": "the folder to write PNG files to"},
    "--masks": {"type": Path, "metavar": "FOLDER",
                "help": "the folder to write the published boxes to, as masks"},
    "--patient": {"metavar": "REGEX", "help": "the patient in a path: the first group"},
    "--no-split": {"action": "store_true",
                   "help": "ignore the published split: hold out a fixed fifth of all patients"},
    "--all-normal": {"action": "store_true", "help": "all images are normal"},
}
SETS = {table: ["--data", "--patient", "--no-split"],
        nih: ["--data", "--masks", "--no-split"],
        chexpert: ["--data", "--no-split"],
        mimic: ["--data", "--no-split"],
        rsna: ["--images", "--masks"],
        vindr: ["--images", "--masks", "--no-split"],
        kermany: ["--no-split"],
        lists: ["--data", "--patient", "--no-split"],
        medmnist: ["--images", "--no-split"],
        folders: ["--patient", "--no-split", "--all-normal"],
        dicom: ["--images", "--patient", "--no-split", "--all-normal"]}


def parse_arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.set_defaults(data=None, images=None, masks=None, patient=None, no_split=False,
                        all_normal=False, boxes=collections.defaultdict(list))
    sets = parser.add_subparsers(dest="set", metavar="SET", required=True)
    for rule, names in SETS.items():
        description = inspect.cleandoc(rule.__doc__)
        subparser = sets.add_parser(rule.__name__, help=description.partition("\n")[0],
                                    description=description, formatter_class=raw)
        subparser.set_defaults(rule=rule)
        subparser.add_argument("source", type=Path, metavar="SOURCE",
                               nargs="+" if rule is lists else None)
        for name in names:
            subparser.add_argument(name, **OPTIONS[name])
    options = parser.parse_args()
    if options.rule is lists and len(options.source) > 3:
        parser.error("lists takes at most three lists: TRAIN VAL TEST")
    if options.images:
        options.data = options.images
    elif options.rule in (nih, chexpert, mimic):
        options.data = options.data or options.source
    if options.masks and options.data.resolve().is_relative_to(options.masks.resolve()):
        parser.error("--masks is the folder of the images: name another one")
    return options


def main():
    options = parse_arguments()
    try:
        rows, left_out = tidy(options.rule(options), options)
        reason = report_left_out(left_out)
        if not rows:
            source = options.source[0] if options.rule is lists else options.source
            raise InputError(f"{source} has no image for the table{reason}")
        rows = hold_out(rows, options.rule is table)
        if options.masks:
            rows = write_masks(rows, options)
        check_patients(rows)
        report(rows)
        sys.stdout.reconfigure(encoding="utf-8")
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)
        sys.stdout.flush()
    except (InputError, OSError, re.error) as error:
        say(f"make_table.py: {error}")
        sys.exit(2)
    except ImportError as error:
        say(f"make_table.py: {options.set} needs {error.name}: pip install -r requirements.txt")
        sys.exit(2)
    except KeyboardInterrupt:
        say("make_table.py: stopped; the same command goes on from here")
        sys.exit(130)


if __name__ == "__main__":
    main()
