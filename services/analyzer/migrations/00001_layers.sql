-- +goose Up

-- Layers that were analysed, by the analyzer's version. Redis is never believed
-- about that.
CREATE TABLE analyzer_layers (
    layer       TEXT   NOT NULL,
    analyzer    TEXT   NOT NULL,
    report      TEXT   NOT NULL, -- digest of the blob
    report_size BIGINT NOT NULL,
    diff_id     TEXT   NOT NULL,
    bytes       BIGINT NOT NULL, -- uncompressed
    packages    BIGINT NOT NULL,
    gaps        BIGINT NOT NULL,
    cpu_ms      BIGINT NOT NULL,
    token       BIGINT NOT NULL, -- the highest fencing token that was seen
    analyzed_at BIGINT NOT NULL, -- Unix milliseconds
    PRIMARY KEY (layer, analyzer)
);

-- +goose Down
DROP TABLE analyzer_layers;
