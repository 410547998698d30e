-- Written from capfilt/tables/contracts.py by `just schemas`; a change made here is lost.

CREATE TABLE captions (
    text_id      VARCHAR NOT NULL,
    image_id     VARCHAR NOT NULL,
    text         VARCHAR,
    sample_index INTEGER NOT NULL,
    captioner    VARCHAR NOT NULL,
    decoding     VARCHAR NOT NULL,
    logprob      FLOAT,
    fold         INTEGER,
    failure      VARCHAR,
    PRIMARY KEY (text_id),
    CHECK (failure IN ('not_found', 'timeout', 'dns', 'connection', 'blocked_address', 'bad_url',
        'too_many_redirects', 'rate_limited', 'http_error', 'too_large', 'hash_mismatch', 'opted_out',
        'worker_died', 'no_image', 'not_an_image', 'truncated', 'too_many_pixels', 'too_small',
        'bad_aspect_ratio', 'decode_error', 'file_missing', 'empty_text', 'too_long', 'not_finite',
        'no_answer', 'unknown_label'))
);

COMMENT ON TABLE captions IS 'a synthetic text (contract version 1)';
COMMENT ON COLUMN captions.text_id IS '128-bit hash of (image_id, source, text, generator, sample index), 32 hex digits';
COMMENT ON COLUMN captions.image_id IS '128-bit hash of (dataset, key), 32 hex digits; unique across datasets';
COMMENT ON COLUMN captions.text IS 'the synthetic text, without the prompt; null where it failed';
COMMENT ON COLUMN captions.sample_index IS 'which of the image''s synthetic texts, from 0';
COMMENT ON COLUMN captions.captioner IS 'the part''s name: which captioner wrote the text';
COMMENT ON COLUMN captions.decoding IS 'nucleus, beam or greedy, as asked of the captioner';
COMMENT ON COLUMN captions.logprob IS 'sum of the tokens'' log-probabilities under the captioner';
COMMENT ON COLUMN captions.fold IS 'fold of the image in cross-fitting; null where one checkpoint judged all';
COMMENT ON COLUMN captions.failure IS 'why the row failed, from the closed list; null where it did not';
