"""How well a label is told from what is written beside an image, with no image looked at.

scores_NL = regression(train_rows, target_NL, test_rows)      rows: one mapping of column to value an image

One logistic regression a label on every column that varies in training: numbers standardized, with a flag where they are missing, words
one-hot. A network that scores no more may have learned nothing but who was examined, and where.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]
NUMERIC = 0.9  # share of a column's known values that are numbers, from which on it is one of numbers
RARE = 5  # a word that fewer training images have is one of the rare ones
MINIMUM = 8  # known training labels under which nothing is fitted


def frame_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows as a table; nothing and an empty word are missing."""
    frame = pd.DataFrame([dict(row) for row in rows], dtype=object)
    return frame.where(frame.notna() & (frame.astype(str).apply(lambda column: column.str.strip()) != ""), None)


def regression(train: Sequence[Mapping[str, Any]], target_NL: Array, test: Sequence[Mapping[str, Any]]) -> Array | None:
    """Scores (N, L) of the test rows, 0 for a label that cannot be fitted; None where no column varies.

    Args:
        target_NL: of the training rows: 0, 1, or NaN for unknown.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    known, asked = frame_of(train), frame_of(test)
    asked = asked.reindex(columns=known.columns)
    numbers, words = [], []
    for name in known.columns:
        held = known[name].dropna()
        read = pd.to_numeric(held, errors="coerce")
        if held.astype(str).nunique() + bool(known[name].isna().any()) < 2:
            continue
        if read.notna().mean() >= NUMERIC:
            numbers.append(name)
        else:
            words.append(name)
    if not numbers and not words:
        return None
    for table in (known, asked):
        for name in numbers:
            table[name] = pd.to_numeric(table[name], errors="coerce").astype(float)
        for name in words:
            table[name] = [str(value) if value is not None and value == value else "missing" for value in table[name]]
    scaled = make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler())
    hot = OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=RARE, sparse_output=False)
    columns = ColumnTransformer([("numbers", scaled, numbers), ("words", hot, words)])
    x_train, x_test = np.asarray(columns.fit_transform(known), float), np.asarray(columns.transform(asked), float)
    scores_NL = np.zeros((len(asked), target_NL.shape[1]))
    for label in range(target_NL.shape[1]):
        there = np.isfinite(target_NL[:, label])
        y = target_NL[there, label] > 0.5
        if len(y) >= MINIMUM and y.any() and not y.all():
            scores_NL[:, label] = LogisticRegression(max_iter=1000).fit(x_train[there], y).decision_function(x_test)
    return scores_NL
