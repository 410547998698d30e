"""`ingest`: its options and its record; the stage is stage.py."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.formats import FORMATS, Reading
from capfilt.options import PICTURES, REQUIRED, option
from capfilt.stages.command import StageCommand


@dataclass(frozen=True)
class IngestOptions(Reading):
    """Bring other tools' images and captions into an images part."""

    source_path: str = option(
        REQUIRED, "captions JSON, folder of images, image list, img2dataset, tars or Parquet", kind="path"
    )
    dataset: str = option(REQUIRED, "name of the images part to write")
    format: str = option("auto", "format of the source", choices=("auto", *FORMATS))
    source: str = option("human", "who wrote the texts", choices=("human", "web"))
    max_side: int = option(
        0, "shrink pictures to this longer side in pixels; 0: keep the bytes", panel=PICTURES
    )
    max_pixels: int = option(
        64_000_000, "a larger picture fails as too_many_pixels", least=1, panel=PICTURES, rare=True
    )


COMMAND = StageCommand(
    ("ingest",),
    IngestOptions,
    ("capfilt.stages.ingest.stage:Ingest",),
    (
        "capfilt ingest captions_train2017.json --images train2017 --dataset coco",
        "capfilt ingest img2dataset_output --dataset cc3m --source web",
    ),
    positional="source_path",
    out=True,
)
