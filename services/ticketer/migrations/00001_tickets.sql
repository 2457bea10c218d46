-- +goose Up
-- One row a problem that a finding event was seen of. The row is written before
-- the tracker is asked for anything.
CREATE TABLE ticketer_tickets (
    problem_key TEXT NOT NULL PRIMARY KEY,
    version     BIGINT NOT NULL, -- counts writes, so that two writers see each other
    revision    BIGINT NOT NULL, -- of the problem; the ticket says what this revision says
    state       TEXT NOT NULL CHECK (state IN ('none', 'claimed', 'creating', 'open', 'closed')),
    tracker     TEXT NOT NULL,   -- name of the configured tracker; '' while there is no ticket
    project     TEXT NOT NULL,
    ticket      TEXT NOT NULL,   -- number in the project; '' while it is not known
    slot        BIGINT NOT NULL, -- the tracker's pace: Unix milliseconds that this creation uses up
    attempt_at  BIGINT NOT NULL, -- of the last attempt at creating it, Unix milliseconds; 0: none
    recheck_at  BIGINT NOT NULL, -- when to look for doubles, Unix milliseconds; 0: never
    body        TEXT NOT NULL    -- JSON: what the ticket shows, and the claim that marks it
);
CREATE INDEX ticketer_tickets_slot ON ticketer_tickets (tracker, slot);
CREATE INDEX ticketer_tickets_recheck ON ticketer_tickets (recheck_at);

-- +goose Down
DROP TABLE ticketer_tickets;
