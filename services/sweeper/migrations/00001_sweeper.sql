-- +goose Up

-- One row a swept source. Times and sweeps are Unix nanoseconds; a sweep is
-- named by its start.
CREATE TABLE sweeper_sources (
    source    TEXT   NOT NULL PRIMARY KEY,
    completed BIGINT NOT NULL DEFAULT 0,  -- the last sweep that listed everything; 0: none
    next_at   BIGINT NOT NULL DEFAULT 0,  -- when the next sweep is due, or the one that was interrupted goes on
    requested TEXT   NOT NULL DEFAULT ''  -- "sweep" or "dry-run": somebody asked for one
);

CREATE TABLE sweeper_sweeps (
    source   TEXT   NOT NULL,
    sweep    BIGINT NOT NULL,
    state    TEXT   NOT NULL CHECK (state IN ('running', 'complete', 'incomplete', 'failed')),
    body     TEXT   NOT NULL, -- JSON: how far it is and what it found
    PRIMARY KEY (source, sweep)
);

CREATE TABLE sweeper_repositories (
    source     TEXT   NOT NULL,
    repository TEXT   NOT NULL,
    handle     TEXT   NOT NULL,             -- what the vendor's API calls it
    sweep      BIGINT NOT NULL,             -- the last that listed it
    listed     BIGINT NOT NULL DEFAULT 0,   -- the last that listed all of its tags
    tags       BIGINT NOT NULL DEFAULT -1,  -- how many they were; -1: unknown
    failure    TEXT   NOT NULL DEFAULT '',  -- why its tags could not be listed
    PRIMARY KEY (source, repository)
);

CREATE TABLE sweeper_tags (
    source     TEXT   NOT NULL,
    repository TEXT   NOT NULL,
    tag        TEXT   NOT NULL,
    digest     TEXT   NOT NULL,           -- as the registry had it; empty: only a dry run has looked
    looked     BIGINT NOT NULL,           -- the last sweep that listed it, dry runs too
    found      BIGINT NOT NULL DEFAULT 0, -- the sweep that found it at this digest first
    due        BIGINT NOT NULL DEFAULT 0, -- when it is decided whether its webhook was lost; 0: it is decided
    PRIMARY KEY (source, repository, tag)
);
CREATE INDEX sweeper_tags_due ON sweeper_tags (source, due) WHERE due > 0;

-- +goose Down
DROP TABLE sweeper_tags;
DROP TABLE sweeper_repositories;
DROP TABLE sweeper_sweeps;
DROP TABLE sweeper_sources;
