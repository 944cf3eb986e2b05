"""Calibration data: sources, tokenization, and disjoint splits. Pure Python; ``datasets`` is imported only for the hub."""

from kvtuner_search.data.load import default_sources, load_dataset_for, load_evaluation
from kvtuner_search.data.sources import DEFAULT_SOURCES
from kvtuner_search.data.tasks import recall_prompts
from kvtuner_search.data.types import SPLITS, Dataset, Sample, Split, SplitName

__all__ = [
    "DEFAULT_SOURCES",
    "SPLITS",
    "Dataset",
    "Sample",
    "Split",
    "SplitName",
    "default_sources",
    "load_dataset_for",
    "load_evaluation",
    "recall_prompts",
]
