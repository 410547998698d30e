-- The analyst's views, by hand. What they stand on:
--
--   raw.images, raw.captions, raw.scores, raw.signals, raw.verdicts, raw.pairs, raw.examples
--       every committed shard of every part of the table, pixels included: the columns of images.sql, captions.sql, ...
--       and those carried along, behind `part`, the name of the part's directory
--   raw.parts, raw.funnel
--       the parts' descriptions and the counts of their manifests
--   found_text_id(image_id, source, text, position)
--       the text_id of a found text, which the tables do not store (capfilt/tables/ids.py)
--
-- capfilt/catalog/views.py makes those for a workspace. A column without a comment here has its table's.

CREATE VIEW images AS SELECT * EXCLUDE (image) FROM raw.images;
COMMENT ON VIEW images IS 'a requested image, failures too; without its pixels, which are in raw.images';
COMMENT ON COLUMN images.part IS 'the images part';

CREATE VIEW captions AS SELECT * FROM raw.captions;
COMMENT ON VIEW captions IS 'a synthetic text';
COMMENT ON COLUMN captions.part IS 'the captions part';

CREATE VIEW texts AS
SELECT
    found_text_id(image_id, source, coalesce(text, ''), sample_index) AS text_id,
    image_id,
    source,
    text,
    sample_index,
    part,
    NULL::VARCHAR AS failure
FROM (
    SELECT
        part,
        image_id,
        source,
        unnest(captions) AS text,
        CAST(generate_subscripts(captions, 1) - 1 AS INTEGER) AS sample_index
    -- UNNEST reads every column of what is below it, so what is below it must be narrow.
    FROM (SELECT part, image_id, source, captions FROM raw.images)
)
UNION ALL
SELECT text_id, image_id, 'synthetic', text, sample_index, part, failure FROM raw.captions;
COMMENT ON VIEW texts IS 'a text of an image: found with it (web, human) or written by a captioner (synthetic)';
COMMENT ON COLUMN texts.source IS 'web, human or synthetic';
COMMENT ON COLUMN texts.text IS 'the text as found or as written; null where the captioner failed';
COMMENT ON COLUMN texts.sample_index IS 'which of the image''s found texts, or of this captioner''s, from 0';
COMMENT ON COLUMN texts.part IS 'the images part the text was found in, or the captions part that holds it';
COMMENT ON COLUMN texts.failure IS 'why a synthetic text failed; null where it did not';

CREATE VIEW scores AS SELECT part AS scorer, * EXCLUDE (part) FROM raw.scores;
COMMENT ON VIEW scores IS 'a text under one scorer';
COMMENT ON COLUMN scores.scorer IS 'the scores part: which filter judged';

CREATE VIEW signals AS SELECT part AS signal, * EXCLUDE (part) FROM raw.signals;
COMMENT ON VIEW signals IS 'an image (or a text) under a cheap test; the columns of all tests side by side';
COMMENT ON COLUMN signals.signal IS 'the signals part: which test';

CREATE VIEW verdicts AS SELECT part AS rule, * EXCLUDE (part) FROM raw.verdicts;
COMMENT ON VIEW verdicts IS 'a text under one rule';
COMMENT ON COLUMN verdicts.rule IS 'the verdicts part: which rule decided';

CREATE VIEW pairs AS SELECT part AS rule, * EXCLUDE (part, image) FROM raw.pairs;
COMMENT ON VIEW pairs IS 'a kept image with its kept texts; without its pixels, which are in raw.pairs';
COMMENT ON COLUMN pairs.rule IS 'the pairs part: which rule kept it';

CREATE VIEW examples AS SELECT * FROM raw.examples;
COMMENT ON VIEW examples IS 'a question or statement about one or two pictures, with its answers or its label';
COMMENT ON COLUMN examples.part IS 'the examples part';

CREATE VIEW funnel AS
SELECT * FROM raw.funnel
ORDER BY ordinal, list_position(['kept', 'dropped', 'failed'], outcome), "rows" DESC, reason;
COMMENT ON VIEW funnel IS 'where the input rows of each part went: per part, the rows add up to what its stage was given';
COMMENT ON COLUMN funnel.ordinal IS 'place of the part along the pipeline, from 0';
COMMENT ON COLUMN funnel.stage IS 'the stage that wrote the part';
COMMENT ON COLUMN funnel.table_name IS 'the part''s table';
COMMENT ON COLUMN funnel.part IS 'the part''s name';
COMMENT ON COLUMN funnel.outcome IS 'kept, dropped or failed; missing, where the part is not whole';
COMMENT ON COLUMN funnel.reason IS 'why they were dropped or failed, or which shards there are; null where kept';
COMMENT ON COLUMN funnel."rows" IS 'input rows of the stage that ended so; null where nobody knows';

CREATE VIEW parts AS SELECT * FROM raw.parts ORDER BY ordinal;
COMMENT ON VIEW parts IS 'a part of this workspace: what wrote it, from what, and how much it holds';
COMMENT ON COLUMN parts.ordinal IS 'place of the part along the pipeline, from 0';
COMMENT ON COLUMN parts.table_name IS 'the part''s table';
COMMENT ON COLUMN parts.part IS 'the part''s name';
COMMENT ON COLUMN parts.stage IS 'the stage that wrote the part';
COMMENT ON COLUMN parts.shards IS 'committed shards';
COMMENT ON COLUMN parts.planned_shards IS 'shards that the part has when it is whole';
COMMENT ON COLUMN parts.rows_in IS 'input rows of its stage';
COMMENT ON COLUMN parts.rows_out IS 'rows it holds';
COMMENT ON COLUMN parts.size IS 'bytes of its Parquet files';
COMMENT ON COLUMN parts.seconds IS 'work on its shards, summed over workers';
COMMENT ON COLUMN parts.finished IS 'when its newest shard was committed';
COMMENT ON COLUMN parts.fingerprint IS 'changes with every option, input, checkpoint and code version it was made with';
COMMENT ON COLUMN parts.identity IS 'what the fingerprint covers, as JSON';
