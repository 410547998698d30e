"""The contracts: what columns each table has, what they mean, and the closed lists their values come from.

This is the source of `schemas/*.sql`. How rows get on disk is in `shards.py`. Column names are API: img2dataset's
where it has one. A change of a column's name, type or meaning raises the contract's version.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from capfilt.errors import UserError

SOURCES = ("web", "human", "synthetic")
SPLITS = ("train", "val", "test")

STATUSES = ("success", "failed_to_download", "failed_to_resize")
"""img2dataset's three values (img2dataset README, "Output format")."""

DOWNLOAD_FAILURES = (
    "not_found", "timeout", "dns", "connection", "blocked_address", "bad_url", "too_many_redirects", "rate_limited",
    "http_error", "too_large", "hash_mismatch", "opted_out", "worker_died",
)  # fmt: skip
IMAGE_FAILURES = (
    "no_image", "not_an_image", "truncated", "too_many_pixels", "too_small", "bad_aspect_ratio", "decode_error",
    "file_missing",
)  # fmt: skip
TEXT_FAILURES = ("empty_text", "too_long", "not_finite")
EXAMPLE_FAILURES = ("no_answer", "unknown_label")
FAILURES = DOWNLOAD_FAILURES + IMAGE_FAILURES + TEXT_FAILURES + EXAMPLE_FAILURES
"""Why a row failed: the closed list of every `failure` column."""

OWN_CAPTION = "own_caption"
"""The category of a rating whose text is one of the picture's own captions."""

LABELS: dict[str, tuple[str, ...]] = {
    "vqa": (),
    "nlvr": ("false", "true"),
    "entailment": ("contradiction", "neutral", "entailment"),
    "classification": (),
    "match": ("no-match", "match"),
    "rating": (),
    "choice": (),
}
"""The tasks of examples, and the labels of each in the order of a classifier's outputs (entailment: ALBEF's order); none
where a task has no labels, or where they are the source's own (classification)."""

TASKS = tuple(LABELS)

MAX_TEXT_CHARACTERS = 10_000
"""A text longer than this is a row with the failure `too_long`; shorter ones are cut to the model's token limit."""


IDENTIFIER = re.compile(r"[a-z_][a-z0-9_]{0,62}")
"""What a further column may be called: a name that SQL and Python take as it is."""


@dataclass(frozen=True)
class Contract:
    """What one table promises: its columns in order, and which of them identify a row.

    Attributes:
        name: the table's name, the first directory under a workspace.
        version: raised whenever a column changes; part of every fingerprint.
        schema: the Arrow schema; each field's metadata has a `doc` entry.
        key: the columns that are unique together within a part.
        doc: what one row is.
        open: whether further columns may follow the contract's own.
    """

    name: str
    version: int
    schema: pa.Schema
    key: tuple[str, ...]
    doc: str
    open: bool = False

    @property
    def score_names(self) -> tuple[str, ...]:
        """The columns that are numbers to judge by: every float32."""
        return tuple(field.name for field in self.schema if field.type == pa.float32())

    @property
    def further(self) -> dict[str, str]:
        """Name and meaning of the columns that `extended` put behind the table's."""
        known = set(CONTRACTS[self.name].schema.names) if self.name in CONTRACTS else set()
        return {field.name: _doc(field) for field in self.schema if field.name not in known}

    def doc_of(self, name: str) -> str:
        """What the column `name` means."""
        return _doc(self.schema.field(name))

    def extended(self, columns: Mapping[str, str]) -> Contract:
        """This contract with nullable float32 columns (name: meaning) behind its own, which every shard of a part has.

        Raises UserError for a name that is no plain lower-case SQL identifier, or that a column has already.
        """
        for name in columns:
            if not IDENTIFIER.fullmatch(name) or name in self.schema.names:
                raise UserError(f"table {self.name}: {name!r} cannot be the name of a further column")
        fields = [_field(name, pa.float32(), doc, null=True) for name, doc in columns.items()]
        return replace(self, schema=pa.schema([*self.schema, *fields], metadata=self.schema.metadata))

    def conform(self, table: pa.Table) -> pa.Table:
        """Return `table` with this contract's columns first, in order and type.

        Nullable columns that are absent are filled with nulls. Raises UserError naming the first column that is
        missing, of a type that does not cast, or null where the contract says it never is.
        """
        arrays = []
        for field in self.schema:
            if field.name in table.column_names:
                column = table.column(field.name)
                if column.type != field.type:
                    try:
                        column = column.cast(field.type)
                    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                        raise UserError(
                            f"table {self.name}: column {field.name!r} is {column.type}, the contract says {field.type}"
                        ) from error
            elif field.nullable:
                column = pa.nulls(table.num_rows, field.type)
            else:
                raise UserError(f"table {self.name}: column {field.name!r} is missing ({_doc(field)})")
            if not field.nullable and column.null_count:
                raise UserError(f"table {self.name}: column {field.name!r} has {column.null_count} nulls")
            arrays.append(column)
        own = set(self.schema.names)
        extra = [field for field in table.schema if field.name not in own]
        if extra and not self.open:
            raise UserError(f"table {self.name}: column {extra[0].name!r} is not in the contract")
        schema = pa.schema([*self.schema, *extra], metadata=self.schema.metadata)
        return pa.Table.from_arrays([*arrays, *(table.column(field.name) for field in extra)], schema=schema)

    def table(self, rows: list[dict[str, object]]) -> pa.Table:
        """Return `rows` as an Arrow table of this contract; extra keys become extra columns where it is open."""
        known = set(self.schema.names)
        names = (
            list(dict.fromkeys(name for row in rows for name in row if name not in known))
            if self.open
            else []
        )
        columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in self.schema]
        columns += [pa.array([row.get(name) for row in rows]) for name in names]
        table = pa.table(columns, names=[*self.schema.names, *names])
        return self.conform(table)


def _doc(field: pa.Field) -> str:
    return str((field.metadata or {}).get(b"doc", b"").decode())


def _field(name: str, type_: pa.DataType, doc: str, *, null: bool = False) -> pa.Field:
    return pa.field(name, type_, nullable=null, metadata={"doc": doc})


IMAGE_TYPE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
"""The struct that `datasets` decodes as an Image feature (a plain binary column it does not)."""

TEXT_TYPE = pa.struct(
    [
        pa.field("text", pa.string()),
        pa.field("source", pa.string()),
        pa.field("itm_score", pa.float32()),
        pa.field("weight", pa.float32()),
    ]
)

ANSWER_TYPE = pa.struct([pa.field("answer", pa.string()), pa.field("count", pa.int32())])

# Without this key `datasets` shows the struct as a dict instead of decoding a picture.
_DECODES_IMAGE = {"huggingface": '{"info": {"features": {"image": {"_type": "Image"}}}}'}

_IMAGE_ID = _field(
    "image_id", pa.string(), "128-bit hash of (dataset, key), 32 hex digits; unique across datasets"
)
_TEXT_ID = _field(
    "text_id", pa.string(), "128-bit hash of (image_id, source, text, generator, sample index), 32 hex digits"
)
_FOLD = _field(
    "fold", pa.int32(), "fold of the image in cross-fitting; null where one checkpoint judged all", null=True
)
_FAILURE = _field(
    "failure", pa.string(), "why the row failed, from the closed list; null where it did not", null=True
)
_ITM = _field(
    "itm_score",
    pa.float32(),
    "softmax(itm_logits)[1] of the image-grounded encoder fed [ENC], in [0, 1]",
    null=True,
)
_ITC = _field(
    "itc_score", pa.float32(), "cosine of the unimodal image and text embeddings, in [-1, 1]", null=True
)

IMAGES = Contract(
    "images",
    1,
    pa.schema(
        [
            _IMAGE_ID,
            _field("dataset", pa.string(), "named source of the image, the first level under images/"),
            _field(
                "key",
                pa.string(),
                "the image's key within its dataset, in img2dataset's form where it made it",
            ),
            _field("url", pa.string(), "where the image was asked for; null for local files", null=True),
            _field("source", pa.string(), "who wrote `captions`: web or human"),
            _field("captions", pa.list_(pa.string()), "the texts as found, untouched; may be empty"),
            _field(
                "split", pa.string(), "train, val or test; null where the source has no splits", null=True
            ),
            _field("status", pa.string(), "success, failed_to_download or failed_to_resize"),
            _FAILURE,
            _field("error_message", pa.string(), "the failure in words", null=True),
            _field("image", IMAGE_TYPE, "the encoded picture; null where there is none", null=True),
            _field("width", pa.int32(), "pixels, as stored", null=True),
            _field("height", pa.int32(), "pixels, as stored", null=True),
            _field("original_width", pa.int32(), "pixels, as received", null=True),
            _field("original_height", pa.int32(), "pixels, as received", null=True),
            _field("sha256", pa.string(), "SHA-256 of the body as received, hex", null=True),
            _field(
                "phash", pa.string(), "64-bit DCT perceptual hash of the picture, 16 hex digits", null=True
            ),
            _field("license", pa.string(), "licence as stated by the source", null=True),
        ],
        metadata=_DECODES_IMAGE,
    ),
    ("image_id",),
    "a requested image, failures too",
    open=True,
)

CAPTIONS = Contract(
    "captions",
    1,
    pa.schema(
        [
            _TEXT_ID,
            _IMAGE_ID,
            _field(
                "text", pa.string(), "the synthetic text, without the prompt; null where it failed", null=True
            ),
            _field("sample_index", pa.int32(), "which of the image's synthetic texts, from 0"),
            _field("captioner", pa.string(), "the part's name: which captioner wrote the text"),
            _field("decoding", pa.string(), "nucleus, beam or greedy, as asked of the captioner"),
            _field(
                "logprob", pa.float32(), "sum of the tokens' log-probabilities under the captioner", null=True
            ),
            _FOLD,
            _FAILURE,
        ]
    ),
    ("text_id",),
    "a synthetic text",
)

SCORES = Contract(
    "scores",
    1,
    pa.schema(
        [
            _TEXT_ID,
            _IMAGE_ID,
            _ITM,
            _ITC,
            _FOLD,
            _FAILURE,
        ]
    ),
    ("text_id",),
    "a text under one scorer; in a plug-in's part its own columns follow",
)

SIGNALS = Contract(
    "signals",
    1,
    pa.schema(
        [_IMAGE_ID, _field("text_id", pa.string(), "the text, where the test is of a text", null=True)]
    ),
    ("image_id", "text_id"),
    "an image (or a text) under a cheap test; typed columns of the test follow",
    open=True,
)


def signal_fields(columns: Mapping[str, tuple[str, str]]) -> list[pa.Field]:
    """The columns of one test behind those of SIGNALS, from the name, Arrow type and meaning of each.

    Raises UserError for a name that is no plain lower-case SQL identifier or has another column already, and for a type
    without a plain name such as "bool", "int64", "float" or "string".
    """
    fields = []
    for name, said in columns.items():
        if not IDENTIFIER.fullmatch(name) or name in SIGNALS.schema.names:
            raise UserError(f"table signals: {name!r} cannot be the name of a further column")
        try:
            type_, doc = said
            fields.append(_field(name, pa.type_for_alias(type_), doc, null=True))
        except (ValueError, TypeError) as error:
            raise UserError(f"table signals: column {name!r} is {said!r}; give (type, meaning)") from error
    return fields


VERDICTS = Contract(
    "verdicts",
    1,
    pa.schema(
        [
            _TEXT_ID,
            _IMAGE_ID,
            _field("source", pa.string(), "web, human or synthetic"),
            _field("text", pa.string(), "the text as found or as written", null=True),
            _ITM,
            _ITC,
            _field("keep", pa.bool_(), "the verdict"),
            _field("reason", pa.string(), "the clause that decided, or the failure"),
        ]
    ),
    ("text_id",),
    "a text under one rule, no pixels; a plug-in's score that was judged by follows",
)

PAIRS = Contract(
    "pairs",
    2,
    pa.schema(
        [
            _IMAGE_ID,
            # Nullable, though never null: `datasets` decodes only a column that is nullable on disk.
            _field("image", IMAGE_TYPE, "the encoded picture; never null", null=True),
            _field("texts", pa.list_(TEXT_TYPE), "the kept texts with source, itm_score and sampling weight"),
            _field(
                "split", pa.string(), "train, val or test; null where the source has no splits", null=True
            ),
            _field("dataset", pa.string(), "named source of the image; null before version 2", null=True),
            _field(
                "key", pa.string(), "the image's key within its dataset; null before version 2", null=True
            ),
            _field(
                "url",
                pa.string(),
                "where the image was asked for; null for local files, and before version 2",
                null=True,
            ),
            _field(
                "license",
                pa.string(),
                "licence as stated by the source; null where it states none, and before version 2",
                null=True,
            ),
            _field("width", pa.int32(), "pixels of `image`; null before version 2", null=True),
            _field("height", pa.int32(), "pixels of `image`; null before version 2", null=True),
            _field(
                "sha256",
                pa.string(),
                "SHA-256 of the body as received, hex; null before version 2",
                null=True,
            ),
        ],
        metadata=_DECODES_IMAGE,
    ),
    ("image_id",),
    "a kept image with its kept texts: the corpus",
)

EXAMPLES = Contract(
    "examples",
    2,
    pa.schema(
        [
            _field(
                "example_id",
                pa.string(),
                "128-bit hash of (dataset, key), 32 hex digits; unique across datasets",
            ),
            _field("dataset", pa.string(), "named source of the example, the first level under examples/"),
            _field(
                "key",
                pa.string(),
                "the example's key within its dataset: a question's or a sentence's number",
            ),
            _field(
                "task",
                pa.string(),
                "what is asked of a model: vqa, nlvr, entailment, classification, match, rating or choice",
            ),
            _field(
                "image_ids",
                pa.list_(pa.string()),
                "the pictures, in the order the text means them (left, right), rows of images parts; empty where one of "
                "them is not there",
            ),
            _field(
                "text",
                pa.string(),
                "the question (vqa), statement (nlvr), hypothesis (entailment) or caption, as found; null in classification",
                null=True,
            ),
            _field(
                "answers",
                pa.list_(ANSWER_TYPE),
                "each answer once, as found, with how many annotators gave it (rating: the numbers they gave); empty where "
                "there are none",
            ),
            _field(
                "label",
                pa.string(),
                "the right class by name: true or false (nlvr); entailment, neutral or contradiction; match or no-match; the "
                "source's own (classification); else null",
                null=True,
            ),
            _field(
                "split", pa.string(), "train, val or test; null where the source has no splits", null=True
            ),
            _FAILURE,
            _field("error_message", pa.string(), "the failure in words", null=True),
            _field(
                "wrong_texts",
                pa.list_(pa.string()),
                "texts that are wrong of the picture, to be told from `text` (choice); null elsewhere, and before version 2",
                null=True,
            ),
            _field(
                "category",
                pa.string(),
                "the source's own name of the kind of example; own_caption where a rated text is one of the picture's own; "
                "null where there is none, and before version 2",
                null=True,
            ),
        ]
    ),
    ("example_id",),
    "a question or statement about one or two pictures, or a picture by itself, with its answers or its label",
)

FEATURES = Contract(
    "features",
    1,
    pa.schema(
        [
            _field(
                "key", pa.binary(), "digest of the pixels or token ids that the encoder was given, 16 bytes"
            ),
            _field(
                "feature", pa.binary(), "float16 numbers in the machine's order, as many as `shape` asks for"
            ),
            _field("shape", pa.list_(pa.int32()), "shape of the feature"),
        ]
    ),
    ("key",),
    "a feature of a frozen encoder, which any stage and training reads again",
)

CONTRACTS = {
    contract.name: contract
    for contract in (IMAGES, CAPTIONS, SCORES, SIGNALS, VERDICTS, PAIRS, EXAMPLES, FEATURES)
}
