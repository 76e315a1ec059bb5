"""The mask of a sample: of files, of one file a class, or of run lengths, in the index values of the card.

seg_png = mask_png(card, record, stored, read)        # None for an image that may go without; Unusable(reason) for a wrong one
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shards import ingest, rle
from shards.card import Card
from shards.planes import Unusable
from shards.readers import Record


def mask_png(card: Card, record: Record, stored: ingest.Stored, read: Callable[[str], bytes]) -> bytes | None:
    """The mask of a record as a PNG of the size at which it was drawn, u8: 0, the classes from 1, 255 outside the field of view.

    Args:
        card: with the layout that was found alone.
        read: the bytes of a file of the raw folder.
    Raises:
        Unusable: no mask where there must be one, one of another size, values that are no class.
    """
    layout, classes = card.layouts[0], len(card.mask_classes)
    if record.runs is not None and layout.rle is not None:
        height, width = stored.reduced_from or (stored.height, stored.width)
        masks = [rle.decode(record.runs, layout.rle.kind, height, width)]
    elif record.mask_classes:  # each file outlines one class
        files = zip(record.masks, record.mask_classes, strict=True)
        masks = [(ingest.mask_values(read(file), 1, stored.frame) != 0).astype(np.uint8) * index for file, index in files]
    else:
        masks = [ingest.mask_values(read(file), classes, stored.frame) for file in record.masks]
    if not masks:
        if layout.mask_optional:
            return None
        raise Unusable("no mask is named")
    seen = None if record.field_of_view is None else ingest.mask_values(read(record.field_of_view), 1, stored.frame) != 0
    return ingest.merged(masks, classes, stored, layout.mask_resize, seen)
