"""Notices labels that were shuffled: the predictions agree with the images, under another naming of the classes.

A permutation of the classes is fitted to one half of the images and judged on the other, so that chance does not pass
for agreement. Two signs: the whole score is far better under the permutation; or a few classes are exchanged among
themselves, which is what happens when names are sorted in two ways (vissl's folder names put five of Kinetics-700's
classes elsewhere).
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

# The score under the permutation must be at least this, and twice the plain one, before the whole labelling is doubted.
LEAST_SCORE = 0.3
# Exchanged classes are those where at least the first share of images goes to the other name and at most the second to
# their own.
TO_OTHER, TO_OWN = 0.5, 0.1
# Images of a class, in each half, below which its exchange with another is no evidence.
LEAST_IMAGES = 3
# Standard errors of a share.
CERTAIN = 5.0


def permutation_alarm(labels: np.ndarray, predictions: np.ndarray, classes: tuple[str, ...]) -> str | None:
    """A sentence when the labels seem to be in another order than the card's, None when they do not.

    `labels`, `predictions`: int64, one for each image.
    """
    fitted, judged = _halves(labels)
    if not len(judged):
        return None
    count = len(classes)
    fit = _confusion(labels[fitted], predictions[fitted], count)
    # A little weight on the diagonal: where images say nothing, a class keeps its name.
    renamed = linear_sum_assignment(fit + 1e-3 * np.eye(count), maximize=True)[1]
    own, truth = predictions[judged], labels[judged]
    plain, permuted = float((own == truth).mean()), float((own == renamed[truth]).mean())
    error = np.sqrt((permuted * (1 - permuted) + plain * (1 - plain)) / len(truth))
    if permuted >= max(LEAST_SCORE, 2 * plain) and permuted - plain > CERTAIN * error:
        return (
            f"the labels are shuffled: {plain:.1%} of the predictions agree with them, {permuted:.1%} would if the "
            f"classes were named in another order ({_named(renamed, classes)}, ...)"
        )
    exchanged = _exchanged(renamed, _confusion(truth, own, count))
    if exchanged:
        shown = "; ".join(f"{classes[a]} as {classes[renamed[a]]}" for a in exchanged[:6])
        return f"the labels of {len(exchanged)} classes are exchanged: the model sees {shown}"
    return None


def _halves(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the images, every second one of each class in either half."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    even = (np.arange(len(order)) - starts) % 2 == 0
    return order[even], order[~even]


def _confusion(labels: np.ndarray, predictions: np.ndarray, count: int) -> np.ndarray:
    """int64 [true, predicted]."""
    return np.bincount(labels * count + predictions, minlength=count * count).reshape(count, count)


def _exchanged(renamed: np.ndarray, confusion: np.ndarray) -> list[int]:
    """Classes in closed rings of the permutation, in each of which every class is plainly taken for the next."""
    totals = confusion.sum(1)
    share = confusion / np.maximum(totals, 1)[:, None]
    found: list[int] = []
    seen: set[int] = set()
    for start in range(len(renamed)):
        ring, at = [], start
        while at not in seen:
            seen.add(at)
            ring.append(at)
            at = int(renamed[at])
        plain = all(
            totals[a] >= LEAST_IMAGES and share[a, renamed[a]] >= TO_OTHER and share[a, a] <= TO_OWN for a in ring
        )
        if len(ring) > 1 and plain:
            found += ring
    return found


def _named(renamed: np.ndarray, classes: tuple[str, ...]) -> str:
    moved = [a for a in range(len(renamed)) if renamed[a] != a][:2]
    return ", ".join(f"{classes[a]} as {classes[renamed[a]]}" for a in moved)
