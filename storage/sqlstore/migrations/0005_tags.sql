-- Tags that operators gave devices.
CREATE TABLE IF NOT EXISTS nano_device_tags (
    id         {id} NOT NULL,
    tag        {id} NOT NULL,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (id, tag)
) {table};
CREATE INDEX {if_not_exists} nano_device_tags_tag ON nano_device_tags (tag, id);
