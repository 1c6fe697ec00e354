-- Enrollments that came to another APNs topic, and when the last time. Keys that
-- are bound to topics see no queue rows and results from before.
CREATE TABLE IF NOT EXISTS nano_topic_moves (
    id       {id} NOT NULL PRIMARY KEY,
    moved_at BIGINT NOT NULL
) {table};
