-- Written from capfilt/tables/contracts.py by `just schemas`; a change made here is lost.

CREATE TABLE features (
    key     BLOB NOT NULL,
    feature BLOB NOT NULL,
    shape   INTEGER[] NOT NULL,
    PRIMARY KEY (key)
);

COMMENT ON TABLE features IS 'a feature of a frozen encoder, which any stage and training reads again (contract version 1)';
COMMENT ON COLUMN features.key IS 'digest of the pixels or token ids that the encoder was given, 16 bytes';
COMMENT ON COLUMN features.feature IS 'float16 numbers in the machine''s order, as many as `shape` asks for';
COMMENT ON COLUMN features.shape IS 'shape of the feature';
