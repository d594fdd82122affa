"""Dataclasses to and from plain records (JSON, TOML), strictly: an unknown, missing or wrong field is named."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import cattrs
from cattrs.errors import BaseValidationError, ForbiddenExtraKeysError
from cattrs.v import format_exception, transform_error

from evaclip.errors import InputError, did_you_mean

Kind = TypeVar("Kind")


def structured(record: Mapping[str, Any], kind: type[Kind], where: str | Path) -> Kind:
    """An instance of a dataclass from a record. Raises InputError that names `where` and the field."""
    try:
        return _CONVERTER.structure(record, kind)
    except BaseValidationError as error:
        raise InputError(f"{where}: {'; '.join(transform_error(error, format_exception=_sentence))}") from None


def unstructured(value: Any) -> dict[str, Any]:
    """The record of a dataclass, ready for JSON."""
    return _CONVERTER.unstructure(value)


def _sentence(problem: BaseException, kind: Any) -> str:
    if isinstance(problem, ForbiddenExtraKeysError):
        known = [field.name for field in fields(problem.cl)]
        strange = sorted(problem.extra_fields)[0]
        return f"unknown field {strange!r}, {did_you_mean(strange, known)}"
    if isinstance(problem, InputError):
        return str(problem)
    return format_exception(problem, kind)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(Path, lambda value, _: Path(value))
    converter.register_unstructure_hook(Path, str)
    return converter


_CONVERTER = _converter()
