-- +goose Up

-- What images consist of, one row per repository that holds them.
CREATE TABLE assembler_plans (
    registry    TEXT   NOT NULL,
    repository  TEXT   NOT NULL,
    digest      TEXT   NOT NULL,
    plan        TEXT   NOT NULL,            -- ImagePlanned, JSON
    lane        TEXT   NOT NULL DEFAULT '',
    traceparent TEXT   NOT NULL DEFAULT '',
    inventory   TEXT   NOT NULL DEFAULT '', -- digest of the last one announced; empty: none yet
    packages    BIGINT NOT NULL DEFAULT 0,  -- in that inventory
    PRIMARY KEY (registry, repository, digest)
);

-- Which plans wait for or use a layer.
CREATE TABLE assembler_plan_layers (
    layer      TEXT NOT NULL,
    registry   TEXT NOT NULL,
    repository TEXT NOT NULL,
    digest     TEXT NOT NULL,
    PRIMARY KEY (layer, registry, repository, digest)
);

CREATE INDEX assembler_plan_layers_image ON assembler_plan_layers (registry, repository, digest);

-- Which indexes wait for or use a part.
CREATE TABLE assembler_plan_parts (
    part       TEXT NOT NULL,
    registry   TEXT NOT NULL,
    repository TEXT NOT NULL,
    digest     TEXT NOT NULL,
    PRIMARY KEY (part, registry, repository, digest)
);

CREATE INDEX assembler_plan_parts_image ON assembler_plan_parts (registry, repository, digest);

-- Layer reports that are stored.
CREATE TABLE assembler_layers (
    layer    TEXT NOT NULL,
    analyzer TEXT NOT NULL,
    report   TEXT NOT NULL, -- digest of the blob
    PRIMARY KEY (layer, analyzer)
);

-- Failures to read a layer, which are a repository's and never the layer's.
CREATE TABLE assembler_failures (
    layer      TEXT   NOT NULL,
    registry   TEXT   NOT NULL,
    repository TEXT   NOT NULL,
    failures   BIGINT NOT NULL,
    permanent  BIGINT NOT NULL, -- 1: another try cannot help
    reason     TEXT   NOT NULL,
    PRIMARY KEY (layer, registry, repository)
);

-- How often a layer was asked for again.
CREATE TABLE assembler_asks (
    layer   TEXT   NOT NULL PRIMARY KEY,
    attempt BIGINT NOT NULL
);

-- Images that reached another end than an inventory.
CREATE TABLE assembler_ended (
    registry   TEXT NOT NULL,
    repository TEXT NOT NULL,
    digest     TEXT NOT NULL,
    reason     TEXT NOT NULL,
    PRIMARY KEY (registry, repository, digest)
);

-- Inventories by what they were made from, so that one image in many
-- repositories is merged once.
CREATE TABLE assembler_inventories (
    inputs    TEXT   NOT NULL PRIMARY KEY,
    inventory TEXT   NOT NULL,
    size      BIGINT NOT NULL,
    packages  BIGINT NOT NULL,
    gaps      BIGINT NOT NULL,
    analyzer  TEXT   NOT NULL
);

-- +goose Down
DROP TABLE assembler_inventories;
DROP TABLE assembler_ended;
DROP TABLE assembler_asks;
DROP TABLE assembler_failures;
DROP TABLE assembler_layers;
DROP TABLE assembler_plan_parts;
DROP TABLE assembler_plan_layers;
DROP TABLE assembler_plans;
