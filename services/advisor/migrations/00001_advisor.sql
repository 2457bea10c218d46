-- +goose Up

-- What was downloaded, for conditional requests. It counts as long as the file
-- that it describes is there.
CREATE TABLE advisor_sources (
    url           TEXT   NOT NULL PRIMARY KEY,
    etag          TEXT   NOT NULL,
    last_modified TEXT   NOT NULL,
    size          BIGINT NOT NULL -- of the file, bytes
);

-- What was published.
CREATE TABLE advisor_snapshots (
    sequence BIGINT NOT NULL PRIMARY KEY,
    digest   TEXT   NOT NULL,
    location TEXT   NOT NULL,
    event    TEXT   NOT NULL, -- CloudEvent, structured JSON; empty: published before this table was made
    sent     BIGINT NOT NULL  -- 1: the event was sent
);

-- +goose Down
DROP TABLE advisor_snapshots;
DROP TABLE advisor_sources;
