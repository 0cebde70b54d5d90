"""Rows of a data set of the Hugging Face Hub."""

import os
import re

from datasets import load_dataset
from datasets.exceptions import DatasetsError

from pipelines.config.data_section import SourceSettings
from pipelines.data.sources.arrow_files import dataset_rows
from pipelines.data.sources.file_formats import KNOWN_SUFFIXES
from pipelines.data.sources.row_store import OpenedRows
from pipelines.data.sources.split_names import TRAIN
from pipelines.errors import DataError, one_line


def is_hub_id(source: str) -> bool:
    """Return whether the source has the form of a hub data set id, such as owner/name."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source, flags=re.ASCII) is not None


def open_hub(source: str, settings: SourceSettings) -> OpenedRows:
    """Load a split of a hub data set.

    Args:
        source: id of a data set, such as owner/name.
        settings: configuration, revision and split.

    Raises:
        DataError: there is none of that name, or the hub cannot be reached.
    """
    try:
        rows = load_dataset(
            source,
            name=settings.config,
            revision=settings.revision,
            split=settings.split or TRAIN,
        )
    except (DatasetsError, ValueError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        fix = "give such a file, or download the data set once while online"
        if isinstance(error, ValueError):
            fix = "correct data.config, data.split or data.revision"
        reason = one_line(error.__cause__ or error, with_type=False)
        raise DataError(
            f"data source {source!r} is not a file or folder (a file ends in {KNOWN_SUFFIXES}) "
            f"and cannot be loaded from the hub{offline}: {reason}; {fix}"
        ) from error
    return OpenedRows("hub", dataset_rows([rows], source), files=len(rows.cache_files))
