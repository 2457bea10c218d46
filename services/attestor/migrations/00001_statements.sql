-- +goose Up
-- What has been said about each image, one row for what is newest. A row is
-- "pending" while its statements are signed and stored but perhaps not all attached.
CREATE TABLE attestor_statements (
    registry   TEXT NOT NULL,
    repository TEXT NOT NULL,
    digest     TEXT NOT NULL,
    sequence   BIGINT NOT NULL, -- of the advisory snapshot
    matched_at BIGINT NOT NULL, -- when the verdict was reached, Unix nanoseconds
    state      TEXT NOT NULL CHECK (state IN ('pending', 'done')),
    body       TEXT NOT NULL,   -- JSON: what is attached, and the event that says so
    PRIMARY KEY (registry, repository, digest)
);

-- +goose Down
DROP TABLE attestor_statements;
