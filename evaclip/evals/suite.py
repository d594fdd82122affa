"""The twelve benchmarks of EVA-CLIP together: their average, the robustness gap, and the comparison with papers."""

from collections.abc import Mapping, Sequence
from typing import Any

from evaclip.errors import InputError, did_you_mean
from evaclip.evals.card import Card, load_card

# EVA-01/clip/README.md, in the order of the EVA-CLIP papers.
TWELVE = (
    "imagenet", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet",
    "cifar10", "cifar100", "ucf101", "kinetics400", "kinetics600", "kinetics700",
)  # fmt: skip
# The gap is over these, ImageNet-1K itself among them (arithmetic of table 6a, arXiv 2402.04252).
ROBUSTNESS = TWELVE[:6]
METRICS = ("top1", "top5", "mean_top1_top5")


def chosen(dataset: str) -> list[Card]:
    """The cards of `all`, or of names and paths with commas between them. Raises InputError."""
    names = TWELVE if dataset == "all" else tuple(name for name in dataset.split(",") if name)
    if not names:
        raise InputError("no benchmark is named; --dataset takes one, several with commas between them, or all")
    return [load_card(name) for name in names]


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The headline numbers of several results in per cent, and what the papers derive from them.

    `average`: plain mean of the headlines. `gap`: ImageNet-1K's top-1 less the mean over it and its five variants;
    None unless all six are there. A figure from partial data is marked.
    """
    headlines = {record["dataset"]: 100 * record["metrics"][record["headline"]] for record in records}
    partial = [record["dataset"] for record in records if record["partial"]]
    six = [headlines[name] for name in ROBUSTNESS if name in headlines]
    return {
        "model": records[0]["model"],
        "headlines": headlines,
        "average": sum(headlines.values()) / len(headlines),
        "average_of": len(headlines),
        "is_the_twelve": set(headlines) == set(TWELVE) and not partial,
        "gap": headlines["imagenet"] - sum(six) / len(six) if len(six) == len(ROBUSTNESS) else None,
        "partial": partial,
    }


def check_reference(card: Card, model: str) -> None:
    """Raise InputError when the card knows no score of a model."""
    known = {reference.model for reference in card.reference}
    if model not in known:
        raise InputError(
            f"the card {card.name} has no published score of {model!r}; {did_you_mean(model, known)} "
            "Name one with --reference"
        )


def verified(record: Mapping[str, Any], card: Card, model: str) -> list[dict[str, Any]]:
    """A result beside the published scores of a model: metric, both in per cent, and whether they agree."""
    found = []
    for reference in (reference for reference in card.reference if reference.model == model):
        for metric in METRICS:
            theirs = getattr(reference, metric)
            if theirs is not None and metric in record["metrics"]:
                ours = 100 * record["metrics"][metric]
                found.append(
                    {
                        "metric": metric,
                        "ours": round(ours, 3),
                        "published": theirs,
                        "tolerance": card.tolerance,
                        # Published scores are rounded to at most two digits.
                        "agrees": abs(ours - theirs) <= card.tolerance + 0.005,
                        "source": reference.source,
                    }
                )
    return found


def why_different(record: Mapping[str, Any], card: Card) -> str:
    """What is known to move a score, of this data and protocol, for the end of a sentence."""
    reasons = list(record["notes"])
    if record["protocol"]["name"] != "eva":
        reasons.append(f"the protocol is {record['protocol']['name']}, the published one eva")
    if "both sides" in record["protocol"]["preprocessing"]:
        reasons.append("images are squashed, the published ones cut")
    if record["coverage"]["bad"]:
        reasons.append(f"{record['coverage']['bad']} files could not be read")
    if card.note:
        reasons.append(card.note.rstrip("."))
    return "; ".join(reasons) or "data, prompts and preprocessing are as published: suspect the weights or the decoder"
