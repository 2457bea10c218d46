-- +goose Up

-- Which pushes a sender told of by itself, so that it can be said of what a
-- sweep finds in the registry whether a webhook came. tag or digest is empty
-- where the sender did not name it.
CREATE TABLE catalog_heard (
    registry   TEXT   NOT NULL,
    repository TEXT   NOT NULL,
    tag        TEXT   NOT NULL,
    digest     TEXT   NOT NULL,
    heard_at   BIGINT NOT NULL, -- last, by intake's clock
    PRIMARY KEY (registry, repository, tag, digest)
);

ALTER TABLE catalog_images ADD COLUMN statements TEXT NOT NULL DEFAULT ''; -- JSON, digests of what is attached with the verdict

-- +goose Down
ALTER TABLE catalog_images DROP COLUMN statements;
DROP TABLE catalog_heard;
