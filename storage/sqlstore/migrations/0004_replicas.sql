-- Servers that share the database, each of which announces itself. id is made
-- at each start; seen_at is the last announcement.
CREATE TABLE IF NOT EXISTS nano_replicas (
    id         {id} NOT NULL PRIMARY KEY,
    name       {id} NOT NULL,
    version    {id} NOT NULL,
    listen     {id} NOT NULL,
    started_at BIGINT NOT NULL,
    seen_at    BIGINT NOT NULL
) {table};
