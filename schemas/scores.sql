-- Written from capfilt/tables/contracts.py by `just schemas`; a change made here is lost.

CREATE TABLE scores (
    text_id   VARCHAR NOT NULL,
    image_id  VARCHAR NOT NULL,
    itm_score FLOAT,
    itc_score FLOAT,
    fold      INTEGER,
    failure   VARCHAR,
    PRIMARY KEY (text_id),
    CHECK (failure IN ('not_found', 'timeout', 'dns', 'connection', 'blocked_address', 'bad_url',
        'too_many_redirects', 'rate_limited', 'http_error', 'too_large', 'hash_mismatch', 'opted_out',
        'worker_died', 'no_image', 'not_an_image', 'truncated', 'too_many_pixels', 'too_small',
        'bad_aspect_ratio', 'decode_error', 'file_missing', 'empty_text', 'too_long', 'not_finite',
        'no_answer', 'unknown_label'))
);

COMMENT ON TABLE scores IS 'a text under one scorer; in a plug-in''s part its own columns follow (contract version 1)';
COMMENT ON COLUMN scores.text_id IS '128-bit hash of (image_id, source, text, generator, sample index), 32 hex digits';
COMMENT ON COLUMN scores.image_id IS '128-bit hash of (dataset, key), 32 hex digits; unique across datasets';
COMMENT ON COLUMN scores.itm_score IS 'softmax(itm_logits)[1] of the image-grounded encoder fed [ENC], in [0, 1]';
COMMENT ON COLUMN scores.itc_score IS 'cosine of the unimodal image and text embeddings, in [-1, 1]';
COMMENT ON COLUMN scores.fold IS 'fold of the image in cross-fitting; null where one checkpoint judged all';
COMMENT ON COLUMN scores.failure IS 'why the row failed, from the closed list; null where it did not';
