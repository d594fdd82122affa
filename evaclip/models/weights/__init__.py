"""Weights that others trained: read from any of their layouts, put into our towers, and written back.

file or folder -> files -> names -> load -> a tower and the report of what it took
                               \\-> names -> a file in another layout
"""

from evaclip.models.weights.files import Weights, read_weights
from evaclip.models.weights.load import load_towers, load_whole
from evaclip.models.weights.names import LAYOUTS, Named, as_layout, canonical

__all__ = [
    "LAYOUTS",
    "Named",
    "Weights",
    "as_layout",
    "canonical",
    "load_towers",
    "load_whole",
    "read_weights",
]
