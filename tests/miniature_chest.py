"""Miniatures of chest radiographs and CT: see miniatures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from miniatures import PEOPLE, SIDE, Truth, Truths, blob, image, layout, pixels, relative_runs, table
from raw_files import ct_slice

# Chest radiographs

CHEXPERT = [
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
]  # fmt: skip
RAW: dict[str, int | None] = {"1.0": 1, "0.0": 0, "-1.0": -1, "": None}


def observations(i: int, labels: Sequence[str], certain: bool = False) -> dict[str, str]:
    """Cells of CheXpert's kind: 1.0, 0.0, -1.0 and nothing, in turn."""
    cells = list(RAW)[: 2 if certain else 4]
    return {label: cells[(i + k) % len(cells)] for k, label in enumerate(labels)}


@layout("chexpert", "official", "batches")
def chexpert(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    tables: dict[str, list[dict[str, str]]] = {"train": [], "valid": []}
    at = {"train": "train", "valid": "valid"}
    head = "."
    if name == "batches":
        head = "CheXpert-v1.0 batch 1 (validate & csv)"
        at = {"train": "CheXpert-v1.0 batch {batch} (train {part})", "valid": f"{head}/valid"}
    for i in range(PEOPLE + 4):
        part = "train" if i < PEOPLE else "valid"
        for study, view in ((1, "view1_frontal"), (2, "view1_frontal"), (2, "view2_lateral"))[: 1 + 2 * (i % 2)]:
            below = f"patient{i:05d}/study{study}/{view}.jpg"
            file = f"{at[part].format(batch=2 + i % 3, part=1 + i % 3)}/{below}"
            cells = observations(i + study, CHEXPERT, certain=part == "valid")
            image(folder, file, len(truths))
            frontal = view.endswith("frontal")
            tables[part].append(
                {
                    "Path": f"CheXpert-v1.0/{part}/{below}",
                    "Sex": "Female",
                    "Age": str(i),
                    "Frontal/Lateral": "Frontal" if frontal else "Lateral",
                }
                | {"AP/PA": "AP" if frontal else ""}
                | cells
            )
            truths[file] = Truth(
                {label: RAW[cell] for label, cell in cells.items()}, f"patient{i:05d}", "test" if part == "valid" else None
            )
    for part, rows in tables.items():
        table(folder, f"{head}/{part}.csv", rows)
    return truths


@layout("mimic-cxr", "official", "dicom")
def mimic(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    splits: list[dict[str, str]] = []
    metadata: list[dict[str, str]] = []
    studies: dict[str, dict[str, str]] = {}
    for i in range(PEOPLE):
        subject = f"1{i:07d}"
        part = "train" if i < 16 else "validate" if i < 20 else "test"
        for k in range(1 + i % 2):  # two images of one study
            study, dicom_id = f"5{i:07d}", f"{i:08x}-{k:08x}-0badf00d-0badf00d-0badf00d"
            file = f"files/p{subject[:2]}/p{subject}/s{study}/{dicom_id}.{'dcm' if name == 'dicom' else 'jpg'}"
            image(folder, file, len(truths))
            splits.append({"dicom_id": dicom_id, "study_id": study, "subject_id": subject, "split": part})
            metadata.append({"dicom_id": dicom_id, "subject_id": subject, "study_id": study, "ViewPosition": "PA", "StudyDate": "21800506"})
            cells = observations(i, sorted(CHEXPERT))
            if i == 3:  # a study whose report gave no labels has no row
                cells = dict.fromkeys(cells, "")
            else:
                studies[study] = {"subject_id": subject, "study_id": study} | cells
            truths[file] = Truth({label: RAW[cell] for label, cell in cells.items()}, subject, {"validate": "val"}.get(part, part))
    table(folder, "mimic-cxr-2.0.0-split.csv.gz", splits)
    table(folder, "mimic-cxr-2.0.0-metadata.csv.gz", metadata)
    table(folder, "mimic-cxr-2.0.0-chexpert.csv.gz", list(studies.values()))
    return truths


NIH = [
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax", "Consolidation", "Edema",
    "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
]  # fmt: skip


@layout("nih-cxr14", "official", "subset-256")
def nih(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    rows: list[dict[str, Any]] = []
    lists: dict[str, list[str]] = {"train_val": [], "test": []}
    for i in range(PEOPLE):
        findings = [NIH[(i + k) % 14] for k in range(i % 3)]
        labels = {label: int(label in findings) for label in NIH}
        if name == "official":
            base, part = f"{i + 1:08d}_000.png", "test" if i % 4 == 0 else "train_val"
            file = f"images_{1 + i % 12:03d}/images/{base}"
            row = {"Image Index": base, "Finding Labels": "|".join(findings) or "No Finding", "Follow-up #": 0, "Patient ID": i + 1}
            rows.append(row | {"Patient Age": 40, "Patient Gender": "F", "View Position": "PA"})
            lists[part].append(base)
            truths[file] = Truth(labels, str(i + 1), "test" if part == "test" else None)
        else:
            split = ("train", "train", "val", "test")[i % 4]
            file = f"images/{i:08d}.jpg"
            row = {"image": file, "patient_id": f"{i:08d}", "split": split, "view": "PA", "sex": "F", "age": 40, "source": "a"}
            rows.append(row | labels)
            truths[file] = Truth(labels, str(i), split)
        image(folder, file, i)
    if name == "official":
        table(folder, "Data_Entry_2017_v2020.csv", rows)
        for part, names in lists.items():
            (folder / f"{part}_list.txt").write_text("\n".join(names) + "\n")
    else:
        table(folder, "labels.csv", rows)
    return truths


VINDR = [
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation", "Edema", "Emphysema",
    "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst", "Mediastinal shift", "Nodule/Mass",
    "Pleural effusion", "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture", "Other lesion", "COPD",
    "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding",
]  # fmt: skip


@layout("vindr-cxr", "official")
def vindr(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    tables: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for i in range(PEOPLE):
        part = "test" if i % 4 == 0 else "train"
        identity = f"{i:032x}"
        readers = ["R8", "R9", "R10"] if part == "train" else [None]
        yes = {label: (i + k) % (len(readers) + 1) for k, label in enumerate(VINDR)}  # how many of them say so
        for rank, reader in enumerate(readers):
            votes = {label: str(int(rank < n)) for label, n in yes.items()}
            tables[part].append({"image_id": identity} | ({"rad_id": reader} if reader else {}) | votes)
        file = f"{part}/{identity}.dicom"
        image(folder, file, i)
        truths[file] = Truth({label: int(2 * n > len(readers)) for label, n in yes.items()}, file, "test" if part == "test" else None)
    for part, rows in tables.items():
        table(folder, f"annotations/image_labels_{part}.csv", rows)
    return truths


@layout("shenzhen", "official")
def shenzhen(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    for i in range(PEOPLE):
        file = f"CXR_png/CHNCXR_{i:04d}_{i % 2}.png"
        image(folder, file, i, 3)  # grey stored as colour
        truths[file] = Truth({"tuberculosis": i % 2}, f"{i:04d}")
    return truths


@layout("montgomery", "official", "table-512")
def montgomery(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    rows: list[dict[str, Any]] = []
    for i in range(PEOPLE):
        stem, both = f"MCUCXR_{i:04d}_{i % 2}", blob(i) | blob(i + 3)
        if name == "official":
            file = f"CXR_png/{stem}.png"
            image(folder, f"ManualMask/leftMask/{stem}.png", i, values=blob(i) * 255)
            image(folder, f"ManualMask/rightMask/{stem}.png", i, values=blob(i + 3) * 255)
            truths[file] = Truth({"tuberculosis": i % 2}, f"{i:04d}", mask=both)
        else:
            file, split = f"images/{stem}.png", ("train", "train", "val", "test")[i % 4]
            image(folder, f"masks/{stem}.png", i, values=both * 255)
            rows.append({"image": file, "mask": f"masks/{stem}.png", "tb": i % 2, "patient_id": f"p{i}", "split": split})
            truths[file] = Truth({"tuberculosis": i % 2}, f"p{i}", split, both)
        image(folder, file, i)
    if rows:
        table(folder, "labels.csv", rows)
    return truths


@layout("bimcv-covid19", "official")
def bimcv(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    for i in range(PEOPLE):
        root, positive = ("covid19_posi", 1) if i % 2 else ("covid19_neg", 0)
        stem = f"{root}/sub-S{i:05d}/ses-E{i:05d}/mod-rx/sub-S{i:05d}_ses-E{i:05d}_run-1_bp-chest"
        image(folder, f"{stem}_vp-ll_dx.png", i)  # a side view
        image(folder, f"{stem}_vp-pa_dx.png", i, values=pixels(i).astype(np.uint16) * 16)
        truths[f"{stem}_vp-pa_dx.png"] = Truth({"covid19": positive}, f"sub-S{i:05d}")
    return truths


@layout("siim-acr", "official", "stage-2")
def siim(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    rows: list[dict[str, str]] = []
    column = " EncodedPixels" if name == "official" else "EncodedPixels"
    for i in range(PEOPLE + 1):
        uid = f"1.2.276.0.7230010.3.1.4.8323329.{1000 + i}.1517875185.{345678 + i}"
        part = "test" if name == "stage-2" and i % 5 == 0 else "train"
        file = f"dicom-images-{part}/1.2.276.2.{i}/1.2.276.3.{i}/{uid}.dcm"
        image(folder, file, i)
        if i == PEOPLE:
            break  # an image that nobody annotated
        masks = [[], [blob(i)], [blob(i), np.roll(blob(i), 12, axis=1)]][i % 3]  # the second of two stands beside the first
        rows += [{"ImageId": uid, column: relative_runs(mask)} for mask in masks] or [{"ImageId": uid, column: "-1"}]
        whole = np.bitwise_or.reduce([np.zeros((SIDE, SIDE), np.uint8), *masks])
        truths[file] = Truth({"pneumothorax": int(bool(masks))}, file, mask=whole)
    table(folder, "train-rle.csv" if name == "official" else "stage_2_train.csv", rows)
    return truths


@layout("scr", "official")
def scr(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    for i in range(1, 9):  # of 8 MB each
        stem, fold = f"JPC{'LN'[i % 2]}N{i:03d}", 1 if i % 2 else 2
        image(folder, f"All247images/{stem}.IMG", i, values=np.full((2048, 2048), i * 100, ">u2"))
        side = 1024
        parts = {
            "heart": blob(0, side),
            "left clavicle": blob(1, side),
            "right clavicle": np.roll(blob(1, side), 100, 1),
            "left lung": blob(2, side),
        }
        for organ, mask in parts.items():
            image(folder, f"scratch/fold{fold}/masks/{organ}/{stem}.gif", i, values=mask * 255)
        mask = np.where(parts["left clavicle"] | parts["right clavicle"], 2, parts["heart"]).astype(np.uint8)
        truths[f"All247images/{stem}.IMG"] = Truth({}, stem, None if fold == 1 else "test", mask)
    return truths


# CT

RSNA_PE = [
    "pe_present_on_image", "negative_exam_for_pe", "qa_motion", "qa_contrast", "flow_artifact", "rv_lv_ratio_gte_1", "rv_lv_ratio_lt_1",
    "leftsided_pe", "chronic_pe", "true_filling_defect_not_pe", "rightsided_pe", "acute_and_chronic_pe", "central_pe", "indeterminate",
]  # fmt: skip


@layout("rsna-pe", "official")
def rsna_pe(folder: Path, name: str) -> Truths:
    truths: Truths = {}
    rows: list[dict[str, Any]] = []
    for i in range(PEOPLE):
        for k in range(2):
            study, series, scan = f"{i:012x}", f"{i + 4096:012x}", f"{i:06x}{k:06x}"
            labels = {label: int((i + n) % 5 == 0 and (k == 0 or n > 0)) for n, label in enumerate(RSNA_PE)}
            file = f"train/{study}/{series}/{scan}.dcm"
            image(folder, file, i, values=pixels(2 * i + k).astype(np.uint16) * 8)
            rows.append({"StudyInstanceUID": study, "SeriesInstanceUID": series, "SOPInstanceUID": scan} | labels)
            truths[file] = Truth(labels, study)
    table(folder, "train.csv", rows)
    return truths


@layout("rsna-pe-slabs", "official")
def rsna_pe_slabs(folder: Path, name: str) -> Truths:
    """Series of 25 slices each, in no order, labelled slice by slice as the challenge's table is: two slabs, from slices 0 and 1 on."""
    truths: Truths = {}
    rows: list[dict[str, Any]] = []
    exam, slices = ["negative_exam_for_pe", "indeterminate", "leftsided_pe", "rightsided_pe", "central_pe"], 25
    for i in range(PEOPLE // 2):
        study, series = f"{i:012x}", f"{i + 4096:012x}"
        of_study = {label: int((i + n) % 5 == 0) for n, label in enumerate(RSNA_PE)}
        for k in range(slices):
            scan = f"{i:06x}{k:06x}"
            values = np.full((8, 8), 1024 + 20 * k + i, np.int16)
            file = folder / f"train/{study}/{series}/{scan}.dcm"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(ct_slice(values, 3.0 * (k * 7 % slices), SeriesInstanceUID=f"1.2.5.{i + 1}"))
            rows.append({"StudyInstanceUID": study, "SeriesInstanceUID": series, "SOPInstanceUID": scan} | of_study)
            rows[-1]["pe_present_on_image"] = int(k == i)
        for first in (0, 1):
            truths[f"train/{study}/{series}/#{first}"] = Truth({label: of_study[label] for label in exam}, study)
    table(folder, "train.csv", rows)
    return truths
