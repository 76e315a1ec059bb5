"""Miniatures of fundus, skin, ultrasound and natural images, RadImageNet and MedMNIST+: see miniatures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from miniatures import PEOPLE, SIDE, Truth, Truths, archive, blob, image, jpeg, layout, pixels, table

# Fundus

GRADES = ["no-dr", "mild", "moderate", "severe", "proliferative"]


def one(labels: Sequence[str], name: str) -> dict[str, int]:
    """The labels of an image of one class."""
    return {label: int(label == name) for label in labels}


@layout("eyepacs", "official")
def eyepacs(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    tables: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for i in range(PEOPLE):
        part = "test" if i % 4 == 0 else "train"
        for k, eye in enumerate(("left", "right")):
            grade = (i + k) % 5
            image(folder, f"{part}/{i}_{eye}.jpeg", 2 * i + k, 3)
            tables[part].append({"image": f"{i}_{eye}", "level": grade} | ({"Usage": "Private"} if part == "test" else {}))
            truths[f"{part}/{i}_{eye}.jpeg"] = Truth(one(GRADES, GRADES[grade]), str(i), "test" if part == "test" else None)
    table(folder, "trainLabels.csv", tables["train"])
    table(folder, "retinopathy_solution.csv", tables["test"])
    return truths


@layout("aptos-2019", "official")
def aptos(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    rows = []
    for i in range(PEOPLE):
        identity = f"{i:012x}"
        image(folder, f"train_images/{identity}.png", i, 3)
        rows.append({"id_code": identity, "diagnosis": i % 5})
        truths[f"train_images/{identity}.png"] = Truth(one(GRADES, GRADES[i % 5]), f"train_images/{identity}.png")
    table(folder, "train.csv", rows)
    return truths


@layout("messidor-2", "official")
def messidor(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    rows, pairs = [], []
    for i in range(PEOPLE):
        # Two hospitals, two ways of naming; the eyes of a person have names that share nothing.
        eyes = [f"20051020_{n}_0100_PP.png" for n in (i, 1000 + i)] if i % 2 else [f"IM{n:06d}.JPG" for n in (i, 1000 + i)]
        pairs.append({"left": eyes[0], "right": eyes[1]})
        for k, eye in enumerate(eyes):
            grade = (i + k) % 5
            image(folder, f"IMAGES/{eye}", 2 * i + k, 3)
            values = {"image_id": eye, "adjudicated_dr_grade": grade if i else "", "adjudicated_dme": 0}
            rows.append(values | {"adjudicated_gradable": int(i > 0)})
            if i:  # two images cannot be graded
                truths[f"IMAGES/{eye}"] = Truth(one(GRADES, GRADES[grade]), f"pair {i}")
    table(folder, "messidor_data.csv", rows)
    table(folder, "messidor-2.csv", pairs, sep=";")
    return truths


@layout("drive", "official", "training-only")
def drive(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    view = np.zeros((SIDE, SIDE), np.uint8)
    view[2:-2, 2:-2] = 255
    for i in range(1, 41):
        part = "test" if i <= 20 else "training"
        labelled = part == "training" or name == "official"
        image(folder, f"{part}/images/{i:02d}_{part}.tif", i, 3)
        image(folder, f"{part}/mask/{i:02d}_{part}_mask.gif", i, values=view)
        if labelled:
            image(folder, f"{part}/1st_manual/{i:02d}_manual1.gif", i, values=blob(i) * 255)
            mask = np.where(view > 0, blob(i), 255).astype(np.uint8)
            truths[f"{part}/images/{i:02d}_{part}.tif"] = Truth({}, f"{i:02d}", "test" if part == "test" else None, mask)
        if labelled and part == "test":
            image(folder, f"test/2nd_manual/{i:02d}_manual2.gif", i, values=blob(i + 1) * 255)
    return truths


@layout("chase-db1", "official")
def chase(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    for i in range(1, 15):
        for k, eye in enumerate("LR"):
            file = f"Image_{i:02d}{eye}"
            image(folder, f"{file}.jpg", 2 * i + k, 3)
            image(folder, f"{file}_1stHO.png", i, values=blob(2 * i + k).astype(bool))  # one bit a pixel, as released
            image(folder, f"{file}_2ndHO.png", i, values=blob(2 * i + k + 1).astype(bool))
            truths[f"{file}.jpg"] = Truth({}, f"{i:02d}", mask=blob(2 * i + k))
    return truths


# Skin, ultrasound

HAM = ["mel", "nv", "bcc", "akiec", "bkl", "df", "vasc"]


@layout("ham10000", "official", "csv", "tab")
def ham10000(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    rows = []
    for i in range(2 * PEOPLE):
        lesion, dx, base = f"HAM_{i // 2:07d}", HAM[i // 2 % 7], f"ISIC_{24306 + i:07d}"
        file = f"HAM10000_images_part_{1 + i % 2}/{base}.jpg"
        image(folder, file, i, 3)
        rows.append(
            {"lesion_id": lesion, "image_id": base, "dx": dx, "dx_type": "histo", "age": "80.0", "sex": "male", "localization": "scalp"}
        )
        truths[file] = Truth(one(HAM, dx), lesion)
    suffix = {"official": "", "csv": ".csv", "tab": ".tab"}[name]
    table(folder, f"HAM10000_metadata{suffix}", rows, "\t" if name == "tab" else ",")
    return truths


@layout("breast-ultrasound", "official")
def breast(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    classes = ["normal", "benign", "malignant"]
    for i in range(PEOPLE):
        kind, number = classes[i % 3], i // 3 + 1
        file, masks = f"{kind}/{kind} ({number}).png", [blob(i) * (kind != "normal")]
        if kind == "benign" and number % 2:
            masks.append(blob(i + 4))
        image(folder, file, i, 3)
        for k, mask in enumerate(masks):
            image(folder, f"{kind}/{kind} ({number})_mask{f'_{k}' if k else ''}.png", i, values=mask * 255)
        truths[file] = Truth(one(classes, kind), file, mask=np.bitwise_or.reduce(masks))
    return truths


# Natural images, and RadImageNet, which is built like them


WNIDS = {0: "n01440764", 1: "n01443537", 2: "n01484850", 999: "n15075141"}  # numbers of four of the classes
SPECIES = ["00000_Animalia_Annelida_Clitellata", "05000_Animalia_Chordata_Aves", "09999_Plantae_Tracheophyta"]


@layout("imagenet-1k", "official", "flat", "kaggle-flat", "kaggle", "tars")
def imagenet(folder: Path, name: str) -> Truths:
    if name == "tars":
        names = {"train": "imagenet1k-train-{:04d}.tar", "val": "imagenet1k-validation-{:02d}.tar"}
        return tars(folder, {str(k): wnid for k, wnid in WNIDS.items()}, names)
    root = "ILSVRC/Data/CLS-LOC/" if name.startswith("kaggle") else ""
    flat = name.endswith("flat")
    val = "val/" if flat else "val/{0}/"
    names = {"train": root + "train/{0}/{0}_{1}.JPEG", "val": root + val + "ILSVRC2012_val_{1:08d}.JPEG"}
    truths = class_folders(folder, list(WNIDS.values()), names)
    if flat:
        boxes = {Path(file).stem: [f"{wnid} 1 2 30 4" for wnid in truth.labels] for file, truth in truths.items() if truth.split == "test"}
        rows = [{"ImageId": stem, "PredictionString": " ".join(found * (1 + n % 2)) + " "} for n, (stem, found) in enumerate(boxes.items())]
        table(folder, "LOC_val_solution.csv", rows[::-1])  # not in the order of the names
    return truths


@layout("inat2021", "official", "mini", "tars")
def inat(folder: Path, name: str) -> Truths:
    if name == "tars":
        return tars(
            folder, {species: species for species in SPECIES}, {"train": "inat2021-train-{:04d}.tar", "val": "inat2021-val-{:02d}.tar"}
        )
    train = "train" if name == "official" else "train_mini"
    names = {"train": train + "/{0}/{1:08x}-0bad-f00d.jpg", "val": "val/{0}/{1:08x}-0bad-f00d.jpg"}
    return class_folders(folder, SPECIES, names)


def class_folders(folder: Path, classes: Sequence[str], names: Mapping[str, str]) -> Truths:
    """Images in folders called like their class, below folders called like their split; the validation images are the test."""
    truths: Truths = {}
    for part, name in names.items():
        for _ in range(8 if part == "train" else 2):
            for kind in classes:
                file = name.format(kind, len(truths))
                image(folder, file, len(truths), 3)
                truths[file] = Truth({kind: 1}, file, "test" if part == "val" else None)
    return truths


def tars(folder: Path, classes: Mapping[str, str], names: Mapping[str, str]) -> Truths:
    """The same in WebDataset tars, two a split; `classes`: what .cls says -> the class."""
    truths: Truths = {}
    for part, name in names.items():
        for number in range(2):
            samples = []
            for said, kind in list(classes.items()) * (4 if part == "train" else 1):
                key = f"{part}_{len(truths):06d}"
                samples.append((key, {"cls": said.encode(), "jpg": jpeg(len(truths)), "json": json.dumps({"label": said}).encode()}))
                truths[f"{name.format(number)}/{key}.jpg"] = Truth({kind: 1}, key, "test" if part == "val" else None)
            archive(folder / name.format(number), samples)
    return truths


@layout("radimagenet", "official")
def radimagenet(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    findings = {"abd-normal": "CT/abd/normal", "knee-acl_pathology": "MR/knee/acl_pathology", "thyroid_nodule": "US/thyroid/thyroid_nodule"}
    for part, per_class in (("train", 4), ("val", 2), ("test", 2)):
        rows = []
        for label, below in findings.items():
            for _ in range(per_class):
                file = f"radiology_ai/{below}/{label}{len(truths):06d}.png"
                image(folder, file, len(truths), 3)
                rows.append({"filename": file, "label": label})
                truths[file] = Truth({label: 1}, file, part)
        table(folder, f"RadiologyAI_{part}.csv", rows)
    return truths


# MedMNIST+

MEDMNIST = {  # channels, classes (several labels at once where they are negative)
    "pathmnist": (3, 9),
    "chestmnist": (1, -14),
    "dermamnist": (3, 7),
    "octmnist": (1, 4),
    "pneumoniamnist": (1, -1),
    "retinamnist": (3, 5),
    "breastmnist": (1, -1),
    "bloodmnist": (3, 8),
    "tissuemnist": (1, 8),
    "organamnist": (1, 11),
    "organcmnist": (1, 11),
    "organsmnist": (1, 11),
}
VOLUMES = {  # their one channel is of 28 slices; of 64 slices three slabs are made, which begin at these
    "organmnist3d": (28, 11),
    "nodulemnist3d": (28, -1),
    "adrenalmnist3d": (28, -1),
    "fracturemnist3d": (28, 3),
    "vesselmnist3d": (28, -1),
    "synapsemnist3d": (28, -1),
}
BEGIN = {28: (0,), 64: (0, 18, 36)}


def medmnist(folder: Path, name: str, dataset: str, labels: Sequence[str]) -> Truths:
    """`<dataset>_<side>.npz`: arrays <split>_images (N, S, S), (N, S, S, 3) or (N, S, S, S) u8, <split>_labels (N, 1) or (N, labels)."""
    volume = dataset in VOLUMES
    channels, count = (1, VOLUMES[dataset][1]) if volume else MEDMNIST[dataset]
    side = int(name.removeprefix("px-"))
    base = f"{dataset}.npz" if side == 28 else f"{dataset}_{side}.npz"
    truths: Truths = {}
    arrays: dict[str, np.ndarray] = {}
    for part, n in (("train", 6), ("val", 3), ("test", 3)):
        one = [np.stack([pixels(100 * i + z, 1, side) for z in range(side)]) if volume else pixels(i, channels, side) for i in range(n)]
        arrays[f"{part}_images"] = np.stack(one)
        values = np.arange(n * max(1, -count)).reshape(n, -1) % (2 if count < 0 else count)
        arrays[f"{part}_labels"] = values.astype(np.uint8)
        for i, row in enumerate(values):
            named = {label: int(row[k]) if count < 0 else int(row[0] == k) for k, label in enumerate(labels)}
            for begin in [f"#{first}" for first in BEGIN[side]] if volume else [""]:
                truths[f"{base}/{part}/{i:07d}{begin}"] = Truth(named, f"{part}/{i}", part)
    np.savez(folder / base, **arrays)  # type: ignore[arg-type]
    return truths
