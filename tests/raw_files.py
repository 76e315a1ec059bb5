"""Raw files made for tests: DICOM and NIfTI of any content, cards that read them."""

import io
from typing import Any

import nibabel
import numpy as np
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from base.config import parse
from shards.card import Card
from shards.ingest import Stored, mask_values, merged

CARD: dict[str, Any] = {
    "schema": 2,
    "dataset": "odd",
    "title": "odd files",
    "reader": "pairs",
    "kind": "unlabelled",
    "channels": 1,
    "layouts": [{"name": "files", "requires": ["*"], "images": ["*"]}],
    "namespace": "odd",
    "split": {"val": 0, "test": 0},
    "public": True,
    "licence": "none",
    "access": "none",
    "citation": "none",
}


def card(**changes: Any) -> Card:
    """A card for a folder of files, each an image of a patient of its own."""
    return parse(CARD | changes, Card, "card")


def dicom(pixels: np.ndarray, *, ct: bool = False, deflated: bool = False, **values: Any) -> bytes:
    """An uncompressed DICOM file of pixels HW, HWC or (F, H, W); `values` are attributes by keyword, None removes one."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage if ct else DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = "2.25.1"
    meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian if deflated else ExplicitVRLittleEndian
    ds = FileDataset(None, {}, file_meta=meta, preamble=values.pop("preamble", b"\0" * 128))
    ds.SOPClassUID, ds.Modality = meta.MediaStorageSOPClassUID, "CT" if ct else "DX"
    colour = pixels.shape[-1] == 3
    ds.Rows, ds.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        ds.PlanarConfiguration = 0
    if pixels.ndim == 3 + colour:
        ds.NumberOfFrames = len(pixels)
    bits = 8 * pixels.dtype.itemsize
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits, bits - 1, int(pixels.dtype.kind == "i")
    data = pixels.tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OB" if bits == 8 else "OW"
    for name, value in values.items():
        if value is None:
            ds.pop(name, None)
        elif isinstance(value, DataElement):
            ds.add(value)
        else:
            setattr(ds, name, value)
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def item(**values: Any) -> Dataset:
    """A sequence item."""
    ds = Dataset()
    for name, value in values.items():
        setattr(ds, name, value)
    return ds


def ct_slice(pixels: np.ndarray, z: float, **values: Any) -> bytes:
    """A CT slice at height z (mm), 0.5 mm between rows and 0.25 mm between columns."""
    place = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [-10, -20, z], "PixelSpacing": [0.5, 0.25]}
    series: dict[str, Any] = {"SeriesInstanceUID": "2.25.7", "RescaleSlope": 1, "RescaleIntercept": -1024}
    return dicom(pixels, ct=True, **(series | place | values))


def mask(data: bytes, classes: int, of: Stored) -> bytes:
    """The packed mask of one mask file."""
    return merged([mask_values(data, classes, of.frame)], classes, of)


def nifti(values_XYZ: np.ndarray, affine: np.ndarray | None = None) -> bytes:
    """A .nii file."""
    return nibabel.Nifti1Image(values_XYZ, np.eye(4) if affine is None else affine).to_bytes()
