-- Written from capfilt/tables/contracts.py by `just schemas`; a change made here is lost.

CREATE TABLE examples (
    example_id    VARCHAR NOT NULL,
    dataset       VARCHAR NOT NULL,
    key           VARCHAR NOT NULL,
    task          VARCHAR NOT NULL,
    image_ids     VARCHAR[] NOT NULL,
    text          VARCHAR,
    answers       STRUCT(answer VARCHAR, count INTEGER)[] NOT NULL,
    label         VARCHAR,
    split         VARCHAR,
    failure       VARCHAR,
    error_message VARCHAR,
    wrong_texts   VARCHAR[],
    category      VARCHAR,
    PRIMARY KEY (example_id),
    CHECK (task IN ('vqa', 'nlvr', 'entailment', 'classification', 'match', 'rating', 'choice')),
    CHECK (split IN ('train', 'val', 'test')),
    CHECK (failure IN ('not_found', 'timeout', 'dns', 'connection', 'blocked_address', 'bad_url',
        'too_many_redirects', 'rate_limited', 'http_error', 'too_large', 'hash_mismatch', 'opted_out',
        'worker_died', 'no_image', 'not_an_image', 'truncated', 'too_many_pixels', 'too_small',
        'bad_aspect_ratio', 'decode_error', 'file_missing', 'empty_text', 'too_long', 'not_finite',
        'no_answer', 'unknown_label'))
);

COMMENT ON TABLE examples IS 'a question or statement about one or two pictures, or a picture by itself, with its answers or its label (contract version 2)';
COMMENT ON COLUMN examples.example_id IS '128-bit hash of (dataset, key), 32 hex digits; unique across datasets';
COMMENT ON COLUMN examples.dataset IS 'named source of the example, the first level under examples/';
COMMENT ON COLUMN examples.key IS 'the example''s key within its dataset: a question''s or a sentence''s number';
COMMENT ON COLUMN examples.task IS 'what is asked of a model: vqa, nlvr, entailment, classification, match, rating or choice';
COMMENT ON COLUMN examples.image_ids IS 'the pictures, in the order the text means them (left, right), rows of images parts; empty where one of them is not there';
COMMENT ON COLUMN examples.text IS 'the question (vqa), statement (nlvr), hypothesis (entailment) or caption, as found; null in classification';
COMMENT ON COLUMN examples.answers IS 'each answer once, as found, with how many annotators gave it (rating: the numbers they gave); empty where there are none';
COMMENT ON COLUMN examples.label IS 'the right class by name: true or false (nlvr); entailment, neutral or contradiction; match or no-match; the source''s own (classification); else null';
COMMENT ON COLUMN examples.split IS 'train, val or test; null where the source has no splits';
COMMENT ON COLUMN examples.failure IS 'why the row failed, from the closed list; null where it did not';
COMMENT ON COLUMN examples.error_message IS 'the failure in words';
COMMENT ON COLUMN examples.wrong_texts IS 'texts that are wrong of the picture, to be told from `text` (choice); null elsewhere, and before version 2';
COMMENT ON COLUMN examples.category IS 'the source''s own name of the kind of example; own_caption where a rated text is one of the picture''s own; null where there is none, and before version 2';
