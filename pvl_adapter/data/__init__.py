"""Images, sentences and masks from disk: datasets in the official layout, one's own tables, and a check of both."""

from pvl_adapter.data.checking import check_datasets
from pvl_adapter.data.dataset import PROMPT_DESIGNS, Sample, SegmentationDataset, find_dataset
from pvl_adapter.data.download import download_dataset
from pvl_adapter.data.issues import DatasetError, DatasetIssue, one_of_each_kind
from pvl_adapter.data.reading import read_image, read_mask
from pvl_adapter.data.tables import Row, read_table

__all__ = [
    "PROMPT_DESIGNS",
    "DatasetError",
    "DatasetIssue",
    "Row",
    "Sample",
    "SegmentationDataset",
    "check_datasets",
    "download_dataset",
    "find_dataset",
    "one_of_each_kind",
    "read_image",
    "read_mask",
    "read_table",
]
