-- Refused requests of enrollments, by cause. other is another enrollment that
-- the last one was about, and detail what the log said of it.
CREATE TABLE IF NOT EXISTS nano_enrollment_refusals (
    id       {id} NOT NULL,
    cause    {id} NOT NULL,
    count    BIGINT NOT NULL,
    other    {id} NOT NULL DEFAULT '',
    detail   {id} NOT NULL DEFAULT '',
    first_at BIGINT NOT NULL,
    last_at  BIGINT NOT NULL,
    PRIMARY KEY (id, cause)
) {table};
