-- Since when a sink's receiver is down, and why; NULL while it takes events.
ALTER TABLE nano_event_sinks ADD COLUMN down_since BIGINT NULL;
ALTER TABLE nano_event_sinks ADD COLUMN down_error {text} NULL;
