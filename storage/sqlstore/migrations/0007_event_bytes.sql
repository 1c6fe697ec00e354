-- Bytes of each batch of events, and of all batches that were numbered up to it;
-- 0 if that is not known. nano_event_counters has the bytes of all numbered
-- batches (log_bytes), and of those that were removed (removed_bytes).
ALTER TABLE nano_event_batches ADD COLUMN stored_bytes BIGINT NOT NULL DEFAULT 0;
ALTER TABLE nano_event_batches ADD COLUMN log_bytes BIGINT NOT NULL DEFAULT 0;

-- Users that never enrolled are removed by age.
CREATE INDEX {if_not_exists} nano_users_unenrolled ON nano_users (token_update_at, updated_at);
