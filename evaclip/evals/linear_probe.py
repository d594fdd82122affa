"""What an image tower's features are worth without captions: a linear classifier and nearest neighbours on top.

As in CLIP (arXiv 2103.00020, A.3): multinomial logistic regression by L-BFGS, whose weight decay is chosen on a part
of the training images and which is then fitted to all of them; the test images are looked at once. Nearest neighbours
vote with weight exp(cosine / 0.07), as in arXiv 1805.01978 and DINO. Features are unit vectors after the projection
into the common space, computed once, float32.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from evaclip import keyed
from evaclip.encoder import Encoder, encoder_of
from evaclip.errors import InputError
from evaclip.evals.blocks import ALONE, Share, in_blocks
from evaclip.evals.card import Card, load_card
from evaclip.evals.features import FeatureSource, Setting, Times
from evaclip.evals.layouts import LabelledImages, find_images
from evaclip.evals.protocol import View, view_of
from evaclip.evals.zero_shot import check_count
from evaclip.log import say
from evaclip.models.clip import Clip
from evaclip.report.results import ledger, wilson, write_result

# Powers of ten of the weight decay that are tried first; then, twice, halfway to the neighbours of the best.
EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0)
HALVINGS = (1.0, 0.5)
ITERATIONS = 1000
TEMPERATURE = 0.07
# Images whose logits are there at a time, and similarities of test to training images: 1 GB.
ROWS, SIMILARITIES = 65_536, 2**28
# Test images whose neighbours a process looks for before the next one's turn.
TEST_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A benchmark of classification with a training part, and how its probes are fitted."""

    card: str
    """Name of a benchmark, or path of a card."""
    data: Path
    """Folder of the images, both parts."""
    held_out: float = 0.2
    """Share of the training images on which the weight decay is chosen."""
    neighbours: int = 20
    """How many vote."""
    seed: int = 0
    """Decides which training images are held out."""
    batch: int = 256
    """Images that pass through the tower at a time."""
    workers: int = 0
    """Processes that decode; 0 decodes in the main process."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1 or self.neighbours < 1:
            raise InputError("a probe's held_out must lie between 0 and 1, and neighbours be at least 1")


@dataclass(frozen=True)
class ProbeResult:
    """The outcome on the test images that could be read, in their order."""

    view: View
    trained_on: int
    """Training images that could be read."""
    scored: np.ndarray
    """int64: which of the test images could be read."""
    logits: np.ndarray
    """float32 [images, classes] of the linear probe."""
    neighbours: np.ndarray
    """int64: the class that the nearest neighbours vote for."""
    decay: float
    tried: dict[float, float]
    """Accuracy on the held-out part by weight decay."""
    bad: dict[str, dict[int, str]]
    """By part, `train` and `test`: the images that could not be read, with the reason."""
    seconds: float
    times: Times


class Probe:
    """An evaluator beside the training: calling it with a model yields `(name, value)` and leaves files behind."""

    def __init__(self, config: ProbeConfig, allow_partial: bool = False) -> None:
        """Reads the card and finds the images, so that a wrong path is known before the first step."""
        self.config = config
        self.card: Card = load_card(config.card)
        self.train: LabelledImages = find_images(self.card, config.data, "train")
        self.test: LabelledImages = find_images(self.card, config.data)
        if self.train.fingerprint == self.test.fingerprint:
            raise InputError(f"{config.data} has no training part of {self.card.title}: both parts are the same images")
        check_count(self.card, self.test, allow_partial)

    def __call__(
        self, model: Clip, device: torch.device, folder: Path, share: Share = ALONE
    ) -> Iterator[tuple[str, float]]:
        """Fit and score; `folder` receives the JSON and the predictions.

        `share`: this process's number, and how many score together; all get the numbers, the first writes.
        """
        encoder = encoder_of(model.to(device), {})
        result = self.run(encoder, Setting(batch=self.config.batch, workers=self.config.workers, share=share))
        record = self.record(result, encoder)
        if share[0] == 0:
            self.save(result, record, folder)
        for name, value in record["metrics"].items():
            yield f"probe/{self.card.name}/{name}", value

    def run(self, encoder: Encoder, setting: Setting) -> ProbeResult:
        """Features of both parts, the choice of the weight decay, the fit, and the vote.

        Of processes that share the work, each gets the whole result; all of them make the last fit.
        """
        start, config, classes, times = time.perf_counter(), self.config, len(self.card.classes), Times()
        view = view_of(setting.protocol, self.card, encoder.preprocessing)
        train, test = (
            FeatureSource(encoder=encoder, images=part, view=view, setting=setting, times=times).whole(
                self.card.title, f"{name} images"
            )
            for name, part in (("training", self.train), ("test", self.test))
        )
        rows, others = train.features.to(encoder.device), test.features.to(encoder.device)
        labels = torch.from_numpy(self.train.labels[train.numbers]).to(encoder.device)
        decay, tried = chosen_decay(rows, labels, classes, config.held_out, config.seed, setting.share)
        weights = fitted(rows, labels, classes, decay)

        def voted(numbers: range) -> Tensor:
            part = others[numbers.start : numbers.stop]
            return neighbour_votes(rows, labels, part, classes, config.neighbours).argmax(1)

        votes = in_blocks(voted, len(others), TEST_ROWS, setting.share)
        return ProbeResult(
            view, len(rows), test.numbers, logits_of(weights, others).cpu().numpy(), votes.numpy(), decay, tried,
            {"train": train.bad, "test": test.bad}, time.perf_counter() - start, times.of_all(setting.share),
        )  # fmt: skip

    def record(self, result: ProbeResult, encoder: Encoder) -> dict[str, Any]:
        """Everything that is needed to trust the numbers, as JSON."""
        labels, card, view = self.test.labels[result.scored], self.card, result.view
        own = np.take_along_axis(result.logits, labels[:, None], 1)
        ranks = (result.logits > own).sum(1)  # ties of learnt float32 logits do not happen between classes
        hits = {f"linear/top{k}": int((ranks < k).sum()) for k in ((1, 5) if len(card.classes) > 5 else (1,))}
        hits["neighbours/top1"] = int((result.neighbours == labels).sum())
        return {
            "dataset": f"{card.name}_probe",
            "title": f"{card.title}, linear probe",
            "model": {"name": encoder.name} | encoder.origin,
            "images": len(labels),
            "partial": len(labels) != card.count,
            "coverage": {
                "scored": len(labels),
                "bad": sum(map(len, result.bad.values())),
                "listed": card.count,
                "trained_on": result.trained_on,
            },
            "headline": "linear/top1",
            "metrics": {name: count / len(labels) for name, count in hits.items()},
            "interval95": {name: wilson(count, len(labels)) for name, count in hits.items()},
            "protocol": view.record()
            | {
                "features": "unit vectors of the common space, float32",
                "training_images": result.trained_on,
                "weight_decay": result.decay,
                "held_out_accuracy": {f"{decay:.3g}": value for decay, value in sorted(result.tried.items())},
            }
            | {name: getattr(self.config, name) for name in ("held_out", "neighbours", "seed")},
            "data": {
                "layout": self.test.layout,
                "sha256": hashlib.sha256(f"{self.train.fingerprint}{self.test.fingerprint}".encode()).hexdigest(),
            },
            "versions": {name: version(name) for name in ("evaclip", "torch", "timm", "pillow")},
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(result.seconds, 2),
            "speed": result.times.speed(result.seconds),
        }

    def save(self, result: ProbeResult, record: dict[str, Any], folder: Path) -> Path:
        """`<benchmark>_probe.json`; beside it `.npz` with the predictions, and `.bad.jsonl` if there is need."""
        arrays = {
            "keys": np.array([self.test.keys[number] for number in result.scored], dtype=np.str_),
            "predictions": result.logits.argmax(1), "neighbours": result.neighbours,
            "labels": self.test.labels[result.scored], "classes": np.array(self.card.classes),
        }  # fmt: skip
        told = [
            {"part": name} | line
            for name, part in (("train", self.train), ("test", self.test))
            for line in ledger(part.keys, result.bad[name])
        ]
        return write_result(folder, record["dataset"], record, arrays, told)


def chosen_decay(
    features: Float[Tensor, "images dim"],
    labels: Int64[Tensor, " images"],
    classes: int,
    held_out: float,
    seed: int,
    share: Share = ALONE,
) -> tuple[float, dict[float, float]]:
    """The weight decay that is best on a held-out part, the larger of equals, and the accuracies of all tried.

    `share`: this process's number, and how many call this together; each fits in its turn.
    """
    count = len(labels)
    places = keyed.permute(np.arange(count), count, seed, "held out of a probe")
    hidden = torch.from_numpy(places < round(held_out * count)).to(labels.device)
    if not hidden.any() or hidden.all():
        raise InputError(f"{count:,} training images are too few to hold out {held_out:.0%} of them")
    tried: dict[float, float] = {}

    def best(exponents: tuple[float, ...]) -> float:
        def accuracy(one: range) -> Tensor:
            weights = fitted(features[~hidden], labels[~hidden], classes, 10 ** exponents[one.start])
            right = logits_of(weights, features[hidden]).argmax(1) == labels[hidden]
            return right.double().mean()[None]

        found = in_blocks(accuracy, len(exponents), 1, share)
        tried.update(zip(exponents, found.tolist(), strict=True))
        return max(tried, key=lambda exponent: (tried[exponent], exponent))

    found = best(EXPONENTS)
    for step in HALVINGS:
        found = best((found - step, found + step))
    say(f"weight decay 10^{found:g}: {100 * tried[found]:.2f} % of {int(hidden.sum()):,} held-out training images")
    return 10**found, {10**exponent: value for exponent, value in tried.items()}


def fitted(
    features: Float[Tensor, "images dim"], labels: Int64[Tensor, " images"], classes: int, decay: float
) -> Float[Tensor, "classes dim_and_bias"]:
    """Weights, and the bias last, that minimise mean cross-entropy + decay / 2 x |weights|^2; the bias is free."""
    weights = features.new_zeros(classes, features.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=ITERATIONS, tolerance_grad=1e-7, tolerance_change=1e-11, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        whole = 0.5 * decay * weights[:, :-1].square().sum()
        whole.backward()
        whole = whole.detach()
        for rows, right in zip(features.split(ROWS), labels.split(ROWS), strict=True):
            part = F.cross_entropy(logits_of(weights, rows), right, reduction="sum") / len(labels)
            part.backward()
            whole = whole + part.detach()
        return whole

    with torch.inference_mode(False), torch.enable_grad():
        optimizer.step(closure)
    return weights.detach()


def logits_of(
    weights: Float[Tensor, "classes dim_and_bias"], features: Float[Tensor, "images dim"]
) -> Float[Tensor, "images classes"]:
    """The linear probe's answers."""
    return features @ weights[:, :-1].T + weights[:, -1]


def neighbour_votes(
    train: Float[Tensor, "train dim"],
    labels: Int64[Tensor, " train"],
    test: Float[Tensor, "test dim"],
    classes: int,
    neighbours: int,
) -> Float[Tensor, "test classes"]:
    """The weights of the votes of each test image's nearest training images."""
    votes = test.new_zeros(len(test), classes)
    for start in range(0, len(test), rows := max(1, SIMILARITIES // len(train))):
        near, which = (test[start : start + rows] @ train.T).topk(min(neighbours, len(train)), dim=1)
        votes[start : start + rows].scatter_add_(1, labels[which], ((near - 1) / TEMPERATURE).exp())
    return votes
