"""Images per second and core, beside open_clip's own path on the same files: decoding and cropping alone, then the
whole loader with its processes."""

import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import webdataset
from measure import best_seconds, write_result
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from sklearn.datasets import load_sample_images

from evaclip import keyed
from evaclip.data.pipeline import Cursor, Stream
from evaclip.data.shards import DataConfig, ShardSet, SourceConfig
from evaclip.data.transforms import CropConfig, training_pixels
from evaclip.data.write import Pair, write_shards

SIZE = 224
WORKERS = 2
TRANSFORM = image_transform_v2(PreprocessCfg(size=SIZE), is_train=True)


def photos(short: int, count: int) -> list[bytes]:
    """Crops of scikit-learn's two photographs as JPEGs of quality 95 with a given shortest side."""
    random, files = np.random.default_rng(0), []
    originals = [Image.fromarray(image) for image in load_sample_images().images]
    for number in range(count):
        image = originals[number % 2]
        left, top = int(random.integers(100)), int(random.integers(60))
        image = image.crop((left, top, image.width - 40, image.height - 30))
        scale = short / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    return files


def decode_rates(files: list[bytes]) -> tuple[float, float]:
    """Ours and open_clip's, one thread, processor time."""

    def ours() -> None:
        for number, data in enumerate(files):
            training_pixels(data, SIZE, CropConfig(), keyed.generator(0, "crop", number))

    def theirs() -> None:
        for data in files:
            TRANSFORM(Image.open(io.BytesIO(data)))

    return tuple(len(files) / best_seconds(work, 3, time.process_time) for work in (ours, theirs))  # type: ignore[return-value]


def loader_rates(files: list[bytes], batch: int = 64, batches: int = 30) -> tuple[float, float, float]:
    """Ours and open_clip's pipeline (as its training script builds it) over the same shards, wall clock; and the share
    of our workers' stage rates that the whole loader delivers."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = [
            Pair(f"{n:06}", data, "jpg", f"a photo of thing number {n} on a table") for n, data in enumerate(files)
        ]
        paths = write_shards(pairs, Path(folder), "s", 64)
        data = ShardSet(DataConfig(sources=(SourceConfig(name="s", shards=(folder,)),), workers=WORKERS, chunk=32))
        stream = Stream(data, Cursor(data.fingerprint, 0, 0), batch_size=batch, image_size=SIZE, context=77)
        ours = rate(iter(stream), batch, batches)
        work = stream.times.read + stream.times.decode + stream.times.tokenize
        done = stream.cursor.position
        efficiency = ours / (WORKERS * done / work)
        tokenize = SimpleTokenizer()
        pipeline = webdataset.DataPipeline(
            webdataset.ResampledShards([str(path) for path in paths]),
            webdataset.tarfile_to_samples(),
            webdataset.shuffle(bufsize=256, initial=64),
            webdataset.decode("pilrgb"),
            webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
            webdataset.map_dict(image=TRANSFORM, text=lambda text: tokenize(text)[0]),
            webdataset.to_tuple("image", "text"),
            webdataset.batched(batch, partial=False),
        )
        loader = webdataset.WebLoader(
            pipeline, batch_size=None, shuffle=False, num_workers=WORKERS, persistent_workers=True
        )
        return ours, rate(iter(loader), batch, batches), efficiency


def rate(batches: object, size: int, count: int) -> float:
    """Images per second after a few batches of warming up."""
    for _ in range(8):
        next(batches)  # type: ignore[call-overload]
    start = time.perf_counter()
    for _ in range(count):
        next(batches)  # type: ignore[call-overload]
    return size * count / (time.perf_counter() - start)


def main() -> None:
    """Both parts at 256 and 512 pixels."""
    torch.set_num_threads(1)
    rows = []
    for short, target in ((256, "1.7x"), (512, "2.5x")):
        files = photos(short, 192)
        ours, theirs = decode_rates(files)
        whole, peer, efficiency = loader_rates(files)
        rows.append(
            [
                *(f"{short} px", f"{ours:,.0f}", f"{theirs:,.0f}", f"**{ours / theirs:.2f}x**", target),
                *(f"{whole:,.0f}", f"{peer:,.0f}", f"**{whole / peer:.2f}x**", f"{efficiency:.0%}"),
            ]
        )
    write_result(
        "loader",
        f"Images per second to {SIZE} px",
        ["shortest side", "decode + crop, ours, per core", "open_clip's, per core", "speed", "target",
         f"whole loader, ours, {WORKERS} workers", f"open_clip's pipeline, {WORKERS} workers", "speed", "efficiency"],
        rows,
        "Photographs of scikit-learn as JPEG, quality 95. Decoding: processor time of one thread. Whole loader: wall "
        "clock with the main process only taking batches. Efficiency is the loader's rate over what its workers would "
        "deliver if reading, decoding, cropping and tokenizing were all that they do.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
