"""The section of the report on leakage: what was compared, what was found and left out, which cells stay out of ranks and why."""

from collections.abc import Sequence

from analysis import results
from analysis.compared import Row, Summary
from analysis.evidence import Evidence
from analysis.tables import cell, esc, table
from base import storage
from base.config import parse

PATIENTS = {
    "compared": "compared",
    "other namespace": "cannot be compared: the two datasets name patients differently",
    "other secret": "cannot be compared: packed with different secrets",
}


def leakage(evidence: Evidence) -> str:
    """HTML, or an empty string where nothing was compared and no cell is exposed."""
    where, parts = storage.join(evidence.out, "leakage.json"), []
    if (held := results.read_json(where)) is not None:
        summary = parse(held, Summary, where)
        parts += [_comparisons(summary.checks, summary.setting)] if summary.checks else []
        parts += [_own(summary.own)] if summary.own else []
    exposed: dict[tuple[str, str], int] = {}
    for c in evidence.cells:
        if c.exposed_to:
            place = (f"{c.source} on {c.task}", ", ".join(c.exposed_to))
            exposed[place] = exposed.get(place, 0) + 1
    if exposed:
        ranks = "left out of ranks" if evidence.study.get("exposed") != "ranked" else "ranked all the same, as the study asks"
        lines = "".join(f"<li>{esc(what)}: its past holds {esc(corpora)} ({n} cells).</li>" for (what, corpora), n in exposed.items())
        parts.append(f"<p>Exposed cells, {ranks}: their source may have seen the test images.</p><ul>{lines}</ul>")
    return "".join(parts)


def _own(checks: Sequence[Row]) -> str:
    """Each task's training images against its own test images: the same for every encoder, so it moves no rank, and stops nothing."""
    rows = []
    for check in checks:
        parts = [
            f'<th scope="row">{esc(check.test.dataset)}</th>',
            *(cell(f"{side.images:,}", sort=side.images) for side in (check.corpus, check.test)),
        ]
        parts += [cell(str(check.same_pixels)), cell(str(check.near_duplicate))]
        rows.append("".join([*parts, cell(str(check.corpus.unread + check.test.unread))]))
    heads = ["task's dataset", "training images", "test images", "same pixels", "near-duplicate", "not read"]
    shown = table(heads, rows, "Training images of a task that match its own test images.", cls="numbers")
    if not any(check.leaked for check in checks):
        return shown
    kinds = {"identical images": "same_pixels", "near-identical images": "near_duplicate", "images of one patient": "same_patient"}
    found = [words for words, kind in kinds.items() if any(getattr(check, kind) for check in checks)]
    note = f"The dataset itself holds {' and '.join(found)} on both sides: results on it may be too good, for every encoder alike."
    note += " Nothing was left out."
    places = ", ".join(f"analyses/{check.key}/leakage.json" for check in checks if check.leaked)
    return f'{shown}<p class="bad">{note} Which they are: {places} in the folder of the study.</p>'


def _comparisons(checks: Sequence[Row], setting: str) -> str:
    rows, notes = [], []
    for check in checks:
        corpus, test = check.corpus, check.test
        left_out = check.leaked if setting == "exclude" else 0
        parts = [f'<th scope="row">{esc(corpus.dataset)} {esc(corpus.split)} ({corpus.images:,})</th>']
        parts += [cell(f"{esc(test.dataset)} ({test.images:,})"), cell(esc(PATIENTS[check.patients]))]
        by_patient = check.patients == "compared"  # else of patients nothing is known, which is no 0
        counts = (
            check.same_patient if by_patient else "–",
            check.same_pixels,
            check.near_duplicate,
            check.follow_up if by_patient else "–",
        )
        rows.append("".join([*parts, *(cell(str(count)) for count in (*counts, left_out))]))
        notes += [f"Known overlap: {note}." for note in check.known]
        unread, names = corpus.unread + test.unread, f"{corpus.dataset} and {test.dataset}"
        notes += [f"{unread} images of {names} could not be read and were not compared."] if unread else []
        if check.known and check.patients != "compared":
            notes.append(f"Other pictures of one patient in {names} cannot be told, since the two name patients differently.")
    heads = ["pretraining corpus (images)", "test images of", "patients", "same patient", "same pixels", "near-duplicate"]
    heads += ["of them one patient's", "left out of training"]
    shown = table(heads, rows, "Pretraining images that match a test image.", cls="numbers")
    found = any(check.leaked or check.known for check in checks)
    what = "The study excludes what matches: those images were left out of pretraining." if setting == "exclude" and found else ""
    lines = "".join(f"<li>{esc(note)}</li>" for note in notes)
    return shown + (f'<p class="bad">{what}</p>' if what else "") + (f"<ul>{lines}</ul>" if lines else "")
