"""Pictures, sentences and masks from disk: the released layout, anybody's own tables, and what is wrong with them."""

from pvl_adapter.data.checking import check_datasets
from pvl_adapter.data.dataset import Sample, SegmentationDataset, find_dataset
from pvl_adapter.data.download import download_dataset
from pvl_adapter.data.issues import DatasetError, DatasetIssue
from pvl_adapter.data.pictures import read_mask, read_picture
from pvl_adapter.data.tables import Row, read_table

__all__ = [
    "DatasetError",
    "DatasetIssue",
    "Row",
    "Sample",
    "SegmentationDataset",
    "check_datasets",
    "download_dataset",
    "find_dataset",
    "read_mask",
    "read_picture",
    "read_table",
]
