"""Images per second from files to vectors: `evaclip embed` beside open_clip in a plain loop, same model, same files.

The plain loop: open, transform, stack, encode, normalise.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from loader import photos
from measure import write_result
from PIL import Image
from safetensors.torch import save_file

BATCH = 32
COUNT = 192
# A tower of 6 million parameters at 224 px: small enough that decoding matters, as it does on a GPU.
VISION = {"image_size": 224, "patch_size": 32, "width": 256, "layers": 6, "head_width": 64}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}


def write_model(folder: Path) -> Path:
    """An open_clip folder with random weights: they take as long as trained ones."""
    config = {
        "model_cfg": {"embed_dim": 256, "vision_cfg": VISION, "text_cfg": TEXT},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.model.CLIP(256, open_clip.CLIPVisionCfg(**VISION), open_clip.CLIPTextCfg(**TEXT))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def plain_loop(model: Path, files: list[Path]) -> tuple[float, np.ndarray]:
    """Seconds and vectors of open_clip's way; loading the model is not counted."""
    encoder, _, transform = open_clip.create_model_and_transforms(f"local-dir:{model}")
    encoder.eval()
    found = []
    started = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(files), BATCH):
            batch = torch.stack([transform(Image.open(path)) for path in files[start : start + BATCH]])
            found.append(F.normalize(encoder.encode_image(batch), dim=1))
    return time.perf_counter() - started, torch.cat(found).numpy()


def ours(model: Path, folder: Path, out: Path) -> tuple[float, np.ndarray]:
    """Seconds and vectors of `evaclip embed`, everything but loading the model: partitions and tables are written."""
    import evaclip.search.embed as embed

    source = embed.open_source(str(folder), out)
    command = embed.EmbedCommand(source=str(folder), out=out, model=str(model), batch=BATCH, device="cpu")
    encoder = embed.load_encoder(str(model))
    with embed.store.sole_writer(out):
        started = time.perf_counter()
        manifest, todo = embed._agreed(command, source, encoder)
        for _ in embed._embed_share((command, source, manifest["space_id"], encoder), todo, 0, 1):
            pass
    return time.perf_counter() - started, np.load(out / "part-00000.npy").astype(np.float32)


def main() -> None:
    """Photographs at two sizes."""
    rows = []
    for short in (256, 512):
        with tempfile.TemporaryDirectory() as scratch:
            folder, model = Path(scratch) / "photos", Path(scratch) / "model"
            folder.mkdir(), model.mkdir()
            write_model(model)
            for number, data in enumerate(photos(short, COUNT)):
                (folder / f"{number:05}.jpg").write_bytes(data)
            files = sorted(folder.iterdir())
            plain_loop(model, files[:BATCH])  # warm
            times: dict[str, list[float]] = {"ours": [], "theirs": []}
            for attempt in range(2):  # in turns, so that other work on the machine disturbs both
                seconds, theirs = plain_loop(model, files)
                times["theirs"].append(seconds)
                seconds, mine = ours(model, folder, Path(scratch) / f"out{attempt}")
                times["ours"].append(seconds)
            cosine = float((mine * theirs).sum(1).min())
            fast, slow = COUNT / min(times["ours"]), COUNT / min(times["theirs"])
        rows.append([f"{short} px", f"{fast:,.0f}", f"{slow:,.0f}", f"**{fast / slow:.2f}x**", f"{cosine:.6f}"])
    write_result(
        "embed",
        "Embedding image files, images per second",
        [
            "shortest side",
            "evaclip embed",
            "open_clip in a plain loop",
            "speed",
            "smallest product of the two, ours in float16",
        ],
        rows,
        f"{COUNT} photographs (scikit-learn's, cropped) as JPEG of quality 95; a ViT of 6 million parameters at 224 px "
        f"with random weights, float32, batches of {BATCH}. Best of two, in turns. Ours hashes the weights, reads "
        "and decodes in two threads beside the tower, and writes vectors and tables to the disk.",
    )


if __name__ == "__main__":
    main()
