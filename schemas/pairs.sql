-- Written from capfilt/tables/contracts.py by `just schemas`; a change made here is lost.

CREATE TABLE pairs (
    image_id VARCHAR NOT NULL,
    image    STRUCT(bytes BLOB, path VARCHAR),
    texts    STRUCT(text VARCHAR, source VARCHAR, itm_score FLOAT, weight FLOAT)[] NOT NULL,
    split    VARCHAR,
    dataset  VARCHAR,
    key      VARCHAR,
    url      VARCHAR,
    license  VARCHAR,
    width    INTEGER,
    height   INTEGER,
    sha256   VARCHAR,
    PRIMARY KEY (image_id),
    CHECK (split IN ('train', 'val', 'test'))
);

COMMENT ON TABLE pairs IS 'a kept image with its kept texts: the corpus (contract version 2)';
COMMENT ON COLUMN pairs.image_id IS '128-bit hash of (dataset, key), 32 hex digits; unique across datasets';
COMMENT ON COLUMN pairs.image IS 'the encoded picture; never null';
COMMENT ON COLUMN pairs.texts IS 'the kept texts with source, itm_score and sampling weight';
COMMENT ON COLUMN pairs.split IS 'train, val or test; null where the source has no splits';
COMMENT ON COLUMN pairs.dataset IS 'named source of the image; null before version 2';
COMMENT ON COLUMN pairs.key IS 'the image''s key within its dataset; null before version 2';
COMMENT ON COLUMN pairs.url IS 'where the image was asked for; null for local files, and before version 2';
COMMENT ON COLUMN pairs.license IS 'licence as stated by the source; null where it states none, and before version 2';
COMMENT ON COLUMN pairs.width IS 'pixels of `image`; null before version 2';
COMMENT ON COLUMN pairs.height IS 'pixels of `image`; null before version 2';
COMMENT ON COLUMN pairs.sha256 IS 'SHA-256 of the body as received, hex; null before version 2';
