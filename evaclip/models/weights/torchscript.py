"""The tensors of a TorchScript archive, such as OpenAI's CLIP, without running any of it.

Such an archive is a program with its data: `data.pkl` holds the modules as objects of the program's classes. Here those
become plain objects that only hold what is put into them, so nothing of the program is loaded, let alone called.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What the pickled modules may name besides their own classes.
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Held:
    """An object of a class of the archive's program: what is in it, and nothing that it can do."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.held = state if isinstance(state, dict) else {}


class _Reader(pickle.Unpickler):
    """Builds tensors, lists and `_Held`; names of anything else are refused."""

    def __init__(self, archive: zipfile.ZipFile, data: str) -> None:
        super().__init__(archive.open(data))
        self.archive, self.folder = archive, data.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Held
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":  # lists that know what they hold
            return _first
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} has no place among weights")

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage: (`storage`, its type, its name, its device, how many numbers)."""
        _, dtype, name, _, count = pid
        entry = self.archive.getinfo(f"{self.folder}data/{name}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < count * dtype.itemsize:
            raise ValueError(f"the storage {name} is not {count} numbers")
        content = bytearray(self.archive.read(entry))  # which compares the checksum
        return torch.frombuffer(content, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


def _first(value: Any, *_: Any) -> Any:
    return value


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors by their names, parameters and buffers and attributes alike.

    Raises UnpicklingError for anything that is not modules and tensors, ValueError or BadZipFile for damage.
    """
    with zipfile.ZipFile(path) as archive:
        data = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(data) != 1:
            raise ValueError(f"a TorchScript archive has one data.pkl, this one {len(data)}")
        try:
            root = _Reader(archive, data[0]).load()
        except (AttributeError, ImportError, IndexError, KeyError, TypeError) as error:  # pickle's, for nonsense
            raise ValueError(f"its data.pkl is not of TorchScript ({error!r})") from None
    found: dict[str, Tensor] = {}
    waiting, met = [("", root)], set()
    while waiting:
        prefix, value = waiting.pop()
        if id(value) in met:  # a module that holds itself would have no end
            continue
        met.add(id(value))
        if isinstance(value, Tensor):
            found[prefix] = value
        elif isinstance(value, _Held):
            waiting += [(f"{prefix}.{name}" if prefix else str(name), part) for name, part in value.held.items()]
    return found
