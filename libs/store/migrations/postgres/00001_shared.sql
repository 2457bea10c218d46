-- +goose Up
CREATE TABLE outbox (
    service    TEXT   NOT NULL,
    source     TEXT   NOT NULL,
    id         TEXT   NOT NULL,
    outputs    BYTEA  NOT NULL,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (service, source, id)
);
CREATE INDEX outbox_created_at ON outbox (created_at);

CREATE TABLE blobs (
    digest     TEXT   NOT NULL PRIMARY KEY,
    size       BIGINT NOT NULL,
    touched_at BIGINT NOT NULL,
    content    BYTEA  NOT NULL
);
CREATE INDEX blobs_touched_at ON blobs (touched_at);

-- +goose Down
DROP TABLE blobs;
DROP TABLE outbox;
