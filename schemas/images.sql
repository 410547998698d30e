-- Written from capfilt/tables/contracts.py by `just schemas`; a change made here is lost.

CREATE TABLE images (
    image_id        VARCHAR NOT NULL,
    dataset         VARCHAR NOT NULL,
    key             VARCHAR NOT NULL,
    url             VARCHAR,
    source          VARCHAR NOT NULL,
    captions        VARCHAR[] NOT NULL,
    split           VARCHAR,
    status          VARCHAR NOT NULL,
    failure         VARCHAR,
    error_message   VARCHAR,
    image           STRUCT(bytes BLOB, path VARCHAR),
    width           INTEGER,
    height          INTEGER,
    original_width  INTEGER,
    original_height INTEGER,
    sha256          VARCHAR,
    phash           VARCHAR,
    license         VARCHAR,
    PRIMARY KEY (image_id),
    CHECK (source IN ('web', 'human')),
    CHECK (split IN ('train', 'val', 'test')),
    CHECK (status IN ('success', 'failed_to_download', 'failed_to_resize')),
    CHECK (failure IN ('not_found', 'timeout', 'dns', 'connection', 'blocked_address', 'bad_url',
        'too_many_redirects', 'rate_limited', 'http_error', 'too_large', 'hash_mismatch', 'opted_out',
        'worker_died', 'no_image', 'not_an_image', 'truncated', 'too_many_pixels', 'too_small',
        'bad_aspect_ratio', 'decode_error', 'file_missing', 'empty_text', 'too_long', 'not_finite',
        'no_answer', 'unknown_label'))
);

COMMENT ON TABLE images IS 'a requested image, failures too (contract version 1, open to further columns)';
COMMENT ON COLUMN images.image_id IS '128-bit hash of (dataset, key), 32 hex digits; unique across datasets';
COMMENT ON COLUMN images.dataset IS 'named source of the image, the first level under images/';
COMMENT ON COLUMN images.key IS 'the image''s key within its dataset, in img2dataset''s form where it made it';
COMMENT ON COLUMN images.url IS 'where the image was asked for; null for local files';
COMMENT ON COLUMN images.source IS 'who wrote `captions`: web or human';
COMMENT ON COLUMN images.captions IS 'the texts as found, untouched; may be empty';
COMMENT ON COLUMN images.split IS 'train, val or test; null where the source has no splits';
COMMENT ON COLUMN images.status IS 'success, failed_to_download or failed_to_resize';
COMMENT ON COLUMN images.failure IS 'why the row failed, from the closed list; null where it did not';
COMMENT ON COLUMN images.error_message IS 'the failure in words';
COMMENT ON COLUMN images.image IS 'the encoded picture; null where there is none';
COMMENT ON COLUMN images.width IS 'pixels, as stored';
COMMENT ON COLUMN images.height IS 'pixels, as stored';
COMMENT ON COLUMN images.original_width IS 'pixels, as received';
COMMENT ON COLUMN images.original_height IS 'pixels, as received';
COMMENT ON COLUMN images.sha256 IS 'SHA-256 of the body as received, hex';
COMMENT ON COLUMN images.phash IS '64-bit DCT perceptual hash of the picture, 16 hex digits';
COMMENT ON COLUMN images.license IS 'licence as stated by the source';
