"""`evaclip data index`: counts and hashes of a set of shards, and the manifest that gives it its fingerprint."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from evaclip.curate.rewrite import several_cores
from evaclip.data.index import expand, index_shards
from evaclip.data.manifest import NAME, Manifest, manifest_of, read_manifest, write_record
from evaclip.errors import InputError


@dataclass(frozen=True, kw_only=True)
class IndexCommand:
    """Index shards and write their manifest. What has been indexed before, and has not changed, is not read again."""

    shards: tyro.conf.Positional[tuple[str, ...]]
    """Brace patterns, folders of .tar files, or @list files."""
    out: Path | None = None
    """The manifest; by default manifest.json in the shards' folder."""
    index_folder: Path | None = None
    """Where indexes go when the shards' folder is read-only; training needs the same as --data.index-folder."""
    skip_damaged: bool = False
    """Leave shards that are no whole tar out of the manifest, instead of refusing."""
    processes: int = several_cores()
    """Shards that are read at a time."""


def run_index(command: IndexCommand) -> None:
    """Print the counts and the fingerprint."""
    manifest, path = index(command)
    print(f"{manifest.samples:,} samples in {len(manifest.shards):,} shards, {manifest.bytes / 1e9:.3f} GB")
    print(f"fingerprint {manifest.fingerprint}: {path}")


def index(command: IndexCommand) -> tuple[Manifest, Path]:
    """The manifest of a set, and where it was written."""
    paths = expand(command.shards)
    folders = {path.parent for path in paths}
    if command.out is None and len(folders) > 1:
        raise InputError(f"the shards lie in {len(folders)} folders: name the manifest with --out")
    heads = index_shards(
        paths, index_folder=command.index_folder, skip_damaged=command.skip_damaged, processes=command.processes
    )
    manifest = manifest_of(heads, {"verb": "index"})
    out = command.out or folders.pop() / NAME
    if out.is_file() and command.out is None:
        manifest = _with_history(manifest, out)
    write_record(out, manifest)
    return manifest, out


def _with_history(manifest: Manifest, path: Path) -> Manifest:
    """The same with what an earlier manifest of the same shards says of how they were made."""
    before = read_manifest(path)
    return before if before.fingerprint == manifest.fingerprint else manifest
