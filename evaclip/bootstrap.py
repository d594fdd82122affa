"""Where the towers of a run begin: at weights that others, or earlier runs, trained.

The files are read before the model is built, because they may decide the activation of the text tower; what was found
out is written into the run's configuration, so that resuming and scoring need the files no more.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from evaclip import checkpoint
from evaclip.config import RunConfig, load_config
from evaclip.errors import CheckpointError
from evaclip.log import say
from evaclip.models.clip import Clip
from evaclip.models.weights import Weights, load_towers, load_whole, read_weights
from evaclip.models.weights.resize import Resize


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """What a run's towers start from."""

    vision: Weights | None
    """For the image tower; None leaves it random."""
    text: Weights | None
    """For the text tower; None leaves it random."""
    resize: Resize
    """How another resolution or patch size is resampled."""

    def load(self, model: Clip) -> None:
        """Put them into the towers and print what became of every tensor. Raises CheckpointError where they differ.

        Where both towers start from one file, the projections and the logit scale fit as well and are taken.
        """
        if self.vision is not None and self.vision is self.text:
            report = load_whole(model, self.vision, self.resize)
        else:
            report = load_towers(model, vision=self.vision, text=self.text, resize=self.resize)
        for line in report.lines():
            say(line)


def initial_weights(config: RunConfig) -> tuple[RunConfig, InitialWeights | None]:
    """The weights that a run starts from, and its configuration with their hashes and the activation they ask for.

    Raises CheckpointError for weights that cannot be read or are not those of the hash that was asked for.
    """
    if config.vision_init is None and config.text_init is None:
        return config, None
    vision = _read(config.vision_init, config.vision_init_sha256, "--vision-init")
    text = vision if config.text_init == config.vision_init else None
    text = text or _read(config.text_init, config.text_init_sha256, "--text-init")
    return (
        replace(
            config,
            vision_init_sha256=vision and vision.sha256,
            text_init_sha256=text and text.sha256,
            model=_with_activation(config, text) if text is not None else config.model,
        ),
        InitialWeights(vision=vision, text=text, resize=config.init_resize),
    )


def as_begun(config: RunConfig) -> RunConfig:
    """The configuration of a run that goes on, with what its first start found out about its weights."""
    begun = load_config(config.run_dir)
    text = config.model.text
    if text.activation == "auto":
        text = replace(text, activation=begun.model.text.activation)
    return replace(
        config,
        model=replace(config.model, text=text),
        vision_init_sha256=config.vision_init_sha256 or begun.vision_init_sha256,
        text_init_sha256=config.text_init_sha256 or begun.text_init_sha256,
    )


def _read(path: Path | None, sha256: str | None, flag: str) -> Weights | None:
    if path is None:
        return None
    if (path / "checkpoints").is_dir():  # a run: its newest checkpoint that is whole
        found = checkpoint.newest(path / "checkpoints", kinds=())
        if found is None:
            raise CheckpointError(f"the run in {path}, given as {flag}, has no checkpoint yet")
        weights = replace(read_weights(found.path / "model.safetensors"), activation=_activation_of_run(path))
    else:
        weights = read_weights(path)
    if sha256 not in (None, weights.sha256):
        raise CheckpointError(
            f"{path}, given as {flag}, is not the file that was asked for: its SHA-256 is {weights.sha256[:12]}..., "
            f"{flag}-sha256 says {sha256[:12] if sha256 else ''}..."
        )
    return weights


def _activation_of_run(run_dir: Path):
    found = load_config(run_dir).model.text.activation
    return "gelu" if found == "auto" else found


def _with_activation(config: RunConfig, text: Weights):
    """The shape with the activation that the text tower's weights were trained with, unless one was asked for."""
    asked, trained = config.model.text.activation, text.activation
    if asked == "auto":
        known = "which it was trained with" if trained else "since the file does not say what it was trained with"
        say(f"text tower: {trained or 'gelu'}, {known} (--model.text.activation decides otherwise)")
        return replace(config.model, text=replace(config.model.text, activation=trained or "gelu"))
    if trained not in (None, asked):
        say(f"text tower: {asked} as asked for, although {text.path} was trained with {trained}")
    return config.model
