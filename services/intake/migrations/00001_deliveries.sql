-- +goose Up
CREATE TABLE intake_deliveries (
    id          TEXT PRIMARY KEY,
    source      TEXT NOT NULL,
    delivery_id TEXT NOT NULL,
    received_at BIGINT NOT NULL, -- Unix milliseconds
    status      INTEGER NOT NULL,
    reason      TEXT NOT NULL,
    bytes       BIGINT NOT NULL,
    events      INTEGER NOT NULL,
    published   INTEGER NOT NULL,
    ignored     INTEGER NOT NULL,
    duplicates  INTEGER NOT NULL,
    dead        INTEGER NOT NULL,
    over_quota  INTEGER NOT NULL
);
CREATE INDEX intake_deliveries_time ON intake_deliveries (received_at);
CREATE INDEX intake_deliveries_source ON intake_deliveries (source, delivery_id);

-- +goose Down
DROP TABLE intake_deliveries;
