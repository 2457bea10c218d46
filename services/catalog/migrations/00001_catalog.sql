-- +goose Up

-- Everything that happened, one row per event; also what makes a second
-- delivery of an event change nothing. Times are Unix nanoseconds.
CREATE TABLE catalog_timeline (
    source     TEXT   NOT NULL, -- of the CloudEvent
    id         TEXT   NOT NULL, -- of the CloudEvent
    time       BIGINT NOT NULL,
    step       TEXT   NOT NULL, -- empty: only remembered as seen
    service    TEXT   NOT NULL,
    registry   TEXT   NOT NULL,
    repository TEXT   NOT NULL,
    tag        TEXT   NOT NULL,
    digest     TEXT   NOT NULL, -- of an image
    layer      TEXT   NOT NULL, -- of a layer
    message    TEXT   NOT NULL,
    details    TEXT   NOT NULL, -- JSON object, or empty
    PRIMARY KEY (source, id)
);
CREATE INDEX catalog_timeline_digest ON catalog_timeline (digest, time);
CREATE INDEX catalog_timeline_tag ON catalog_timeline (registry, repository, tag, time);
CREATE INDEX catalog_timeline_layer ON catalog_timeline (layer, time);
CREATE INDEX catalog_timeline_time ON catalog_timeline (time);

-- Images. The state follows from the other columns, of which each keeps the
-- newest time or verdict it was told, so that the order of events is irrelevant.
CREATE TABLE catalog_images (
    registry     TEXT   NOT NULL,
    repository   TEXT   NOT NULL,
    digest       TEXT   NOT NULL,
    source       TEXT   NOT NULL DEFAULT '',
    kind         TEXT   NOT NULL DEFAULT '',
    platform     TEXT   NOT NULL DEFAULT '',
    state        TEXT   NOT NULL DEFAULT '',
    first_seen   BIGINT NOT NULL,
    planned_at   BIGINT NOT NULL DEFAULT 0,
    assembled_at BIGINT NOT NULL DEFAULT 0,
    matched_at   BIGINT NOT NULL DEFAULT 0,
    attested_at  BIGINT NOT NULL DEFAULT 0, -- when the verdict below was signed
    unsupported_at BIGINT NOT NULL DEFAULT 0,
    failed_at    BIGINT NOT NULL DEFAULT 0,
    gone_at      BIGINT NOT NULL DEFAULT 0,
    inventory    TEXT   NOT NULL DEFAULT '',
    report       TEXT   NOT NULL DEFAULT '', -- of the newest attested verdict
    sequence     BIGINT NOT NULL DEFAULT 0,
    verdict      TEXT   NOT NULL DEFAULT '',
    counts       TEXT   NOT NULL DEFAULT '',
    valid_until  BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (registry, repository, digest)
);
CREATE INDEX catalog_images_digest ON catalog_images (digest);
CREATE INDEX catalog_images_state ON catalog_images (state);

-- Where tags point now, and where they ever pointed.
CREATE TABLE catalog_tags (
    registry    TEXT   NOT NULL,
    repository  TEXT   NOT NULL,
    tag         TEXT   NOT NULL,
    digest      TEXT   NOT NULL, -- empty: the tag is gone
    observed_at BIGINT NOT NULL,
    PRIMARY KEY (registry, repository, tag)
);
CREATE INDEX catalog_tags_digest ON catalog_tags (registry, repository, digest);
CREATE TABLE catalog_tag_history (
    registry    TEXT   NOT NULL,
    repository  TEXT   NOT NULL,
    digest      TEXT   NOT NULL,
    tag         TEXT   NOT NULL,
    observed_at BIGINT NOT NULL,
    PRIMARY KEY (registry, repository, digest, tag, observed_at)
);

-- Which layers and parts an image was planned with.
CREATE TABLE catalog_layers (
    registry   TEXT NOT NULL,
    repository TEXT NOT NULL,
    digest     TEXT NOT NULL,
    layer      TEXT NOT NULL,
    PRIMARY KEY (registry, repository, digest, layer)
);
CREATE TABLE catalog_parts (
    registry   TEXT NOT NULL,
    repository TEXT NOT NULL,
    part       TEXT NOT NULL,
    digest     TEXT NOT NULL, -- of the index
    PRIMARY KEY (registry, repository, part, digest)
);

-- What problems and the fleet report need of the reports.
CREATE TABLE catalog_reports (
    report  TEXT NOT NULL PRIMARY KEY,
    summary TEXT NOT NULL -- JSON
);

CREATE TABLE catalog_problems (
    problem  TEXT   NOT NULL PRIMARY KEY, -- key
    owner    TEXT   NOT NULL,
    state    TEXT   NOT NULL,
    content  TEXT   NOT NULL, -- digest of what is said, without revision and times
    data     TEXT   NOT NULL  -- Problem, JSON
);
CREATE INDEX catalog_problems_owner ON catalog_problems (owner);
CREATE INDEX catalog_problems_state ON catalog_problems (state, problem);

-- What has been pushed or planned and must come to an end.
CREATE TABLE catalog_deadlines (
    registry   TEXT   NOT NULL,
    repository TEXT   NOT NULL,
    target     TEXT   NOT NULL, -- a digest, or ":" and a tag that is not resolved yet
    tag        TEXT   NOT NULL,
    source     TEXT   NOT NULL,
    since      BIGINT NOT NULL, -- when it was pushed
    due        BIGINT NOT NULL,
    attempt    BIGINT NOT NULL, -- how often it was pushed again
    PRIMARY KEY (registry, repository, target)
);
CREATE INDEX catalog_deadlines_due ON catalog_deadlines (due);

-- Events that are to be sent, in the order in which they were decided.
CREATE TABLE catalog_pending (
    position BIGINT NOT NULL PRIMARY KEY,
    id       TEXT   NOT NULL, -- of the CloudEvent
    event    TEXT   NOT NULL -- CloudEvent, structured JSON
);

-- +goose Down
DROP TABLE catalog_pending;
DROP TABLE catalog_deadlines;
DROP TABLE catalog_problems;
DROP TABLE catalog_reports;
DROP TABLE catalog_parts;
DROP TABLE catalog_layers;
DROP TABLE catalog_tag_history;
DROP TABLE catalog_tags;
DROP TABLE catalog_images;
DROP TABLE catalog_timeline;
