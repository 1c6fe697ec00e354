-- What devices answered last to DeviceInformation, SecurityInfo (both JSON) and
-- InstalledApplicationList (JSON in a block of S2), and when.
CREATE TABLE IF NOT EXISTS nano_device_inventory (
    id              {id} NOT NULL PRIMARY KEY,
    supervised      SMALLINT NULL,
    filevault       SMALLINT NULL,
    information     {blob} NULL,
    information_at  BIGINT NULL,
    security        {blob} NULL,
    security_at     BIGINT NULL,
    applications    {blob} NULL,
    applications_at BIGINT NULL
) {table};
CREATE INDEX {if_not_exists} nano_device_inventory_supervised ON nano_device_inventory (supervised, id);
CREATE INDEX {if_not_exists} nano_device_inventory_filevault ON nano_device_inventory (filevault, id);
