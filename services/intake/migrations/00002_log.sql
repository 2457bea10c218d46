-- +goose Up

-- What a call said and what was wrong with it. A refused call has no row of its
-- own: one row sums up those of a source, a reason and ten minutes.
ALTER TABLE intake_deliveries ADD COLUMN calls INTEGER NOT NULL DEFAULT 1;
ALTER TABLE intake_deliveries ADD COLUMN first_at BIGINT NOT NULL DEFAULT 0; -- Unix milliseconds, of several calls; received_at is the last
ALTER TABLE intake_deliveries ADD COLUMN filtered INTEGER NOT NULL DEFAULT 0;
ALTER TABLE intake_deliveries ADD COLUMN trouble TEXT NOT NULL DEFAULT '';
ALTER TABLE intake_deliveries ADD COLUMN subjects TEXT NOT NULL DEFAULT ''; -- one a line, the first few
CREATE INDEX intake_deliveries_source_time ON intake_deliveries (source, received_at);
CREATE INDEX intake_deliveries_reason_time ON intake_deliveries (reason, received_at);

-- Calls by source, reason and hour, so that a summary reads few rows.
CREATE TABLE intake_hours (
    source  TEXT   NOT NULL,
    reason  TEXT   NOT NULL,
    hour    BIGINT NOT NULL, -- its begin, Unix milliseconds
    calls   BIGINT NOT NULL,
    last_at BIGINT NOT NULL, -- Unix milliseconds
    PRIMARY KEY (source, reason, hour)
);
CREATE INDEX intake_hours_hour ON intake_hours (hour);
INSERT INTO intake_hours (source, reason, hour, calls, last_at)
SELECT source, reason, received_at - received_at % 3600000, COUNT(*), MAX(received_at)
FROM intake_deliveries GROUP BY source, reason, received_at - received_at % 3600000;

-- +goose Down
DROP TABLE intake_hours;
DROP INDEX intake_deliveries_reason_time;
DROP INDEX intake_deliveries_source_time;
ALTER TABLE intake_deliveries DROP COLUMN subjects;
ALTER TABLE intake_deliveries DROP COLUMN trouble;
ALTER TABLE intake_deliveries DROP COLUMN filtered;
ALTER TABLE intake_deliveries DROP COLUMN first_at;
ALTER TABLE intake_deliveries DROP COLUMN calls;
