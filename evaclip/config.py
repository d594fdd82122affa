"""The configuration of a run: the parts' own configurations, put together, printed and stored."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from evaclip.checkpoint import CheckpointConfig
from evaclip.data.shards import DataConfig
from evaclip.encoder.image_tower import WITHOUT_TEXT
from evaclip.engine import EngineConfig
from evaclip.errors import CheckpointError, InputError, near_path
from evaclip.evals.card import load_card
from evaclip.evals.linear_probe import Probe, ProbeConfig
from evaclip.evals.names import folder_of
from evaclip.evals.retrieval import Retrieval, RetrievalConfig, retrieval_cards
from evaclip.evals.zero_shot import ZeroShot, ZeroShotConfig
from evaclip.guard.health import GuardConfig
from evaclip.log import LogConfig
from evaclip.models.shapes import ClipShape
from evaclip.models.weights.resize import Resize
from evaclip.objectives.clip import ClipConfig
from evaclip.objectives.distillation import DistillationConfig
from evaclip.objectives.mim import MimConfig
from evaclip.optim import OptimConfig
from evaclip.records import structured


@runtime_checkable
class Evaluator(Protocol):
    """Scores a model beside the training."""

    def __call__(
        self, model: Any, device: torch.device, folder: Path, share: tuple[int, int] = (0, 1)
    ) -> Iterable[tuple[str, float]]:
        """Numbers by name; files for the report go to `folder`. `share`: this process's number, and of how many."""
        ...


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Benchmarks beside the training."""

    every: int = 0
    """Steps between two evaluations; 0 evaluates at the end only."""
    beside: bool = False
    """Leave the benchmarks to `evaclip watch`, a process of its own that scores the checkpoints. Of a model that fsdp2
    spreads, each process otherwise holds all of it in float32 while it is scored: 72 GB for 18B."""
    datasets: tuple[str, ...] = ()
    """Benchmarks by name or card, flickr30k and coco too, whose data lies in `data_root`."""
    probes: tuple[str, ...] = ()
    """Benchmarks there to fit a linear probe on."""
    data_root: Path = Path("data")
    """Folder that has a folder for each of `datasets` and `probes`."""
    batch: int = 256
    """Images of them that pass through the tower at a time."""
    workers: int = 0
    """Processes that decode their images; 0 decodes in the main process."""
    zero_shot: tuple[ZeroShotConfig, ...] = ()
    """The benchmarks of classification whose data lies elsewhere."""
    retrieval: tuple[RetrievalConfig, ...] = ()
    """The benchmarks of finding captions and images whose data lies elsewhere."""
    probe: tuple[ProbeConfig, ...] = ()
    """The benchmarks whose data lies elsewhere and whose training images a linear probe is fitted on."""

    @property
    def benchmarks(self) -> tuple[Any, ...]:
        """All that is asked for, by name or in full."""
        return (*self.datasets, *self.probes, *self.zero_shot, *self.retrieval, *self.probe)

    def build(self) -> Mapping[str, Evaluator]:
        """The evaluators by kind and name; each finds its data now, so that a wrong path is known before the work."""
        how: dict[str, Any] = {"batch": self.batch, "workers": self.workers}
        zero_shot, retrieval, probe = list(self.zero_shot), list(self.retrieval), list(self.probe)
        for name in self.datasets:
            if name.lower() in retrieval_cards():
                data = folder_of(self.data_root, [name.lower()])
                retrieval.append(RetrievalConfig(card=name, data=data, **how))
            else:
                zero_shot.append(ZeroShotConfig(card=name, data=self._images(name), **how))
        probe += [ProbeConfig(card=name, data=self._images(name), **how) for name in self.probes]
        found = (
            [("zero_shot", ZeroShot(part)) for part in zero_shot]
            + [("retrieval", Retrieval(part)) for part in retrieval]
            + [("probe", Probe(part)) for part in probe]
        )
        return {f"{kind}/{evaluator.card.name}": evaluator for kind, evaluator in found}

    def _images(self, name: str) -> Path:
        card = load_card(name)
        return folder_of(self.data_root, [card.name, *card.aliases])


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run."""

    name: str
    """What the run is called."""
    run_dir: Path
    """Folder of its configuration, logs, checkpoints, scores and report."""
    steps: int
    """Optimizer steps of the whole run."""
    batch_size: int
    """Image-text pairs of a step, over all devices."""
    seed: int = 0
    """Decides initialisation, order, crops and masks."""
    resume: Literal["never", "auto"] = "never"
    """`auto` continues the run in run_dir if there is one."""
    start_from: Path | None = None
    """Run whose weights this one starts from, as its next phase: another masking, another resolution. On the same data
    and seed it goes on with the pairs that come after those which that run has seen."""
    vision_init: Path | None = None
    """Weights that the image tower starts from, of EVA, EVA-02 or any EVA-CLIP: a file, a folder that holds one, or a
    run. Projection and logit scale stay fresh, unless --text-init is the same."""
    text_init: Path | None = None
    """Weights that the text tower starts from: OpenAI's, OpenCLIP's, Hugging Face's, an EVA-CLIP's, or a run's."""
    init_resize: Resize = "eva"
    """How position embedding and patch kernel of another resolution or patch size are resampled: `eva` as EVA-CLIP's
    published models, `timm` by antialiasing and pseudo-inverse."""
    vision_init_sha256: str | None = None
    """SHA-256 of vision_init. The run writes it down; given beforehand, it must be that."""
    text_init_sha256: str | None = None
    """SHA-256 of text_init. The run writes it down; given beforehand, it must be that."""
    allow_data_change: bool = False
    """Resume although the shards are not those of the checkpoint."""
    model: ClipShape
    """The towers."""
    data: DataConfig
    """The pairs."""
    objective: ClipConfig | MimConfig | DistillationConfig = field(default_factory=ClipConfig)
    """What is optimised."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How it is optimised."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Device and precision."""
    evals: EvalConfig = field(default_factory=EvalConfig)
    """Benchmarks beside the training."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the state is saved."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What happens when something is wrong."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is logged."""

    def __post_init__(self) -> None:
        if self.start_from is not None and (self.vision_init or self.text_init):
            raise InputError("--start-from is a whole run: --vision-init and --text-init have nothing left to start")
        if not isinstance(self.objective, ClipConfig):
            name = WITHOUT_TEXT[self.objective.kind]
            if self.start_from or self.vision_init or self.text_init:
                raise InputError(f"{name} starts from random: it takes no weights to start from")
            if self.evals.benchmarks:
                raise InputError(f"{name} has no text tower to score with; probe what a CLIP run makes of it")


def load_config(run_dir: Path) -> RunConfig:
    """The configuration of a run from its folder. Raises CheckpointError if it is no run."""
    path = run_dir / "config.json"
    if not run_dir.is_dir():
        raise CheckpointError(f"the run {run_dir} does not exist; {near_path(run_dir)}")
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run_dir} is not the folder of a run: {error}") from None
    if isinstance(record, dict) and isinstance(record.get("objective"), dict):
        record["objective"].setdefault("kind", "clip")  # the only one when older runs were written
    return structured(record, RunConfig, path)


def differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    """The fields in which two configurations differ, as `field: old -> new`."""
    if is_dataclass(before) and type(before) is type(now):
        found = []
        for part in fields(before):
            found += differences(getattr(before, part.name), getattr(now, part.name), f"{prefix}{part.name}.")
        return found
    return [] if before == now else [f"{prefix[:-1]}: {before} -> {now}"]


def described(config: Any, indent: int = 0) -> list[str]:
    """The configuration as indented lines."""
    lines = []
    for part in fields(config):
        value = getattr(config, part.name)
        if is_dataclass(value):
            lines += [f"{'  ' * indent}{part.name}:", *described(value, indent + 1)]
        else:
            lines.append(f"{'  ' * indent}{part.name}: {value}")
    return lines
