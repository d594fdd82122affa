"""Class folders: `[val/]<class>/<image or video>`, on disk or in a tar."""

from pathlib import Path

import numpy as np

from evaclip.evals.card import Card
from evaclip.evals.layouts.found import LabelledImages, of_files
from evaclip.evals.layouts.tree import IMAGE_SUFFIXES, VIDEO_SUFFIXES, File, Tree, opened, places
from evaclip.evals.layouts.video import middle_frame
from evaclip.evals.names import join_folders


def class_folders(card: Card, data: Path, split: str) -> LabelledImages | None:
    """Folders are WordNet ids, names, or numbers from 0; one with another name is an error, not another class.

    Of a video benchmark the folders may hold frames that were taken beforehand, one image a video.
    """
    for tree in places(card, data, split):
        found = _in_tree(card, tree)
        if found is not None:
            return found
    return None


def of_videos(layout: str, files: list[File], labels: list[int], listed: np.ndarray | None) -> LabelledImages:
    """A data set of one video file each, or of one frame each where the files are images."""
    if files and files[0].suffix in IMAGE_SUFFIXES:
        note = "frames were taken beforehand, one each: which one is not known"
        return of_files(layout, files, labels, lambda i: opened(files[i].read()), listed=listed, notes=(note,))
    return of_files(layout, files, labels, lambda i: middle_frame(files[i]), listed=listed, video=files.__getitem__)


def _in_tree(card: Card, tree: Tree) -> LabelledImages | None:
    folders = tree.folders()
    classes = join_folders(card, folders)
    if classes is None:
        return None
    files: list[File] = []
    labels: list[int] = []
    for folder, number in zip(folders, classes, strict=True):
        if number is not None:
            inside = _of_kind(card, tree.files(folder))
            files += inside
            labels += [number] * len(inside)
    if not files:
        return None
    layout = "class_folders" + (" in a tar" if tree.packed is not None else "")
    if card.media == "video":
        return of_videos(layout, files, labels, None)
    return of_files(layout, files, labels, lambda i: opened(files[i].read()))


def _of_kind(card: Card, files: list[File]) -> list[File]:
    videos = [file for file in files if card.media == "video" and file.suffix in VIDEO_SUFFIXES]
    return videos or [file for file in files if file.suffix in IMAGE_SUFFIXES]
