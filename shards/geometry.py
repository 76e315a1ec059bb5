"""Where a voxel lies in the patient: affines in millimetres, RAS as NIfTI has it, for columns, rows and slices as they are stored.

affine = of_dicom(orientation, position, spacing_yx, step_xyz)      # DICOM's LPS turned into RAS
affine @ (column, row, slice, 1)                                    # the voxel's centre: right, anterior, superior
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def of_dicom(orientation: Sequence[float], position: Sequence[float], spacing_yx: Sequence[float], step_LPS: np.ndarray) -> np.ndarray:
    """Affine 4 x 4 of a stack of DICOM slices (PS3.3 C.7.6.2.1.1).

    orientation: the six direction cosines. position: of the first slice's first voxel. spacing_yx: between rows, between columns.
    step_LPS: from one slice to the next.
    """
    affine = np.eye(4)
    affine[:3, 0] = np.array(orientation[:3]) * spacing_yx[1]
    affine[:3, 1] = np.array(orientation[3:]) * spacing_yx[0]
    affine[:3, 2] = step_LPS
    affine[:3, 3] = position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def normal_of(orientation: Sequence[float]) -> np.ndarray:
    """The unit vector (LPS) across the slices."""
    return np.cross(orientation[:3], orientation[3:])


def from_slice(affine: np.ndarray, start: int) -> np.ndarray:
    """The affine of the slices from `start` on."""
    shift = np.eye(4)
    shift[2, 3] = start
    return affine @ shift


def reduced(affine: np.ndarray, factor_y: float, factor_x: float) -> np.ndarray:
    """The affine after each factor_y x factor_x pixels became one; voxel centres stay where they are in the patient."""
    scale = np.diag([factor_x, factor_y, 1.0, 1.0])
    scale[0, 3], scale[1, 3] = (factor_x - 1) / 2, (factor_y - 1) / 2
    return affine @ scale


def spacing_zyx(affine: np.ndarray) -> list[float]:
    """Millimetres between slices, rows, columns."""
    return [float(np.linalg.norm(affine[:3, axis])) for axis in (2, 1, 0)]
