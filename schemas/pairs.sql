-- Written from capfilt/tables/contracts.py by `just schemas`; a change made here is lost.

CREATE TABLE pairs (
    image_id VARCHAR NOT NULL,
    image    STRUCT(bytes BLOB, path VARCHAR),
    texts    STRUCT(text VARCHAR, source VARCHAR, itm_score FLOAT, weight FLOAT)[] NOT NULL,
    split    VARCHAR,
    PRIMARY KEY (image_id),
    CHECK (split IN ('train', 'val', 'test'))
);

COMMENT ON TABLE pairs IS 'a kept image with its kept texts: the corpus (contract version 1)';
COMMENT ON COLUMN pairs.image_id IS '128-bit hash of (dataset, key), 32 hex digits; unique across datasets';
COMMENT ON COLUMN pairs.image IS 'the encoded picture; never null';
COMMENT ON COLUMN pairs.texts IS 'the kept texts with source, itm_score and sampling weight';
COMMENT ON COLUMN pairs.split IS 'train, val or test; null where the source has no splits';
