-- Written from capfilt/tables/contracts.py by `just schemas`; a change made here is lost.

CREATE TABLE signals (
    image_id VARCHAR NOT NULL,
    text_id  VARCHAR,
    UNIQUE (image_id, text_id)
);

COMMENT ON TABLE signals IS 'an image (or a text) under a cheap test; typed columns of the test follow (contract version 1, open to further columns)';
COMMENT ON COLUMN signals.image_id IS '128-bit hash of (dataset, key), 32 hex digits; unique across datasets';
COMMENT ON COLUMN signals.text_id IS 'the text, where the test is of a text';
