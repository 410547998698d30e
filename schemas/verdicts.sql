-- Written from capfilt/tables/contracts.py by `just schemas`; a change made here is lost.

CREATE TABLE verdicts (
    text_id   VARCHAR NOT NULL,
    image_id  VARCHAR NOT NULL,
    source    VARCHAR NOT NULL,
    text      VARCHAR,
    itm_score FLOAT,
    itc_score FLOAT,
    keep      BOOLEAN NOT NULL,
    reason    VARCHAR NOT NULL,
    PRIMARY KEY (text_id),
    CHECK (source IN ('web', 'human', 'synthetic'))
);

COMMENT ON TABLE verdicts IS 'a text under one rule, no pixels; a plug-in''s score that was judged by follows (contract version 1)';
COMMENT ON COLUMN verdicts.text_id IS '128-bit hash of (image_id, source, text, generator, sample index), 32 hex digits';
COMMENT ON COLUMN verdicts.image_id IS '128-bit hash of (dataset, key), 32 hex digits; unique across datasets';
COMMENT ON COLUMN verdicts.source IS 'web, human or synthetic';
COMMENT ON COLUMN verdicts.text IS 'the text as found or as written';
COMMENT ON COLUMN verdicts.itm_score IS 'softmax(itm_logits)[1] of the image-grounded encoder fed [ENC], in [0, 1]';
COMMENT ON COLUMN verdicts.itc_score IS 'cosine of the unimodal image and text embeddings, in [-1, 1]';
COMMENT ON COLUMN verdicts.keep IS 'the verdict';
COMMENT ON COLUMN verdicts.reason IS 'the clause that decided, or the failure';
