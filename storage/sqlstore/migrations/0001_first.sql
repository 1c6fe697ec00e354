-- Each statement is one recorded step and can be repeated. {words} are the
-- dialect's; {where} begins the condition of an index where an engine has that, and
-- {room} leaves room in pages for rows that grow, where that spares indexes. Times are UTC microseconds, booleans SMALLINT 0 or 1. There are
-- no foreign keys: a check of the parent locks it, and nothing cascades.

CREATE TABLE IF NOT EXISTS nano_devices (
    id                 {id} NOT NULL PRIMARY KEY,
    serial_number      {id} NOT NULL DEFAULT '',
    model              {id} NOT NULL DEFAULT '',
    model_name         {id} NOT NULL DEFAULT '',
    device_name        {id} NOT NULL DEFAULT '',
    os_version         {id} NOT NULL DEFAULT '',
    build_version      {id} NOT NULL DEFAULT '',
    product_name       {id} NOT NULL DEFAULT '',
    imei               {id} NOT NULL DEFAULT '',
    meid               {id} NOT NULL DEFAULT '',
    authenticate       {blob} NOT NULL,
    authenticate_at    BIGINT NOT NULL,
    token_update       {blob} NULL,
    token_update_at    BIGINT NULL,
    unlock_token       {blob} NULL,
    unlock_token_at    BIGINT NULL,
    bootstrap_token    {blob} NULL,
    bootstrap_token_at BIGINT NULL,
    created_at         BIGINT NOT NULL,
    updated_at         BIGINT NOT NULL
) {table} {room};
CREATE INDEX {if_not_exists} nano_devices_serial_number ON nano_devices (serial_number, id);
CREATE INDEX {if_not_exists} nano_devices_model ON nano_devices (model, id);
CREATE INDEX {if_not_exists} nano_devices_model_name ON nano_devices (model_name, id);
CREATE INDEX {if_not_exists} nano_devices_product_name ON nano_devices (product_name, id);
CREATE INDEX {if_not_exists} nano_devices_os_version ON nano_devices (os_version, id);

-- A user channel; id is the enrollment's.
CREATE TABLE IF NOT EXISTS nano_users (
    id                   {id} NOT NULL PRIMARY KEY,
    device_id            {id} NOT NULL,
    user_id              {id} NOT NULL DEFAULT '',
    user_short_name      {id} NOT NULL DEFAULT '',
    user_long_name       {id} NOT NULL DEFAULT '',
    token_update         {blob} NULL,
    token_update_at      BIGINT NULL,
    user_authenticate    {blob} NULL,
    user_authenticate_at BIGINT NULL,
    created_at           BIGINT NOT NULL,
    updated_at           BIGINT NOT NULL
) {table};
CREATE INDEX {if_not_exists} nano_users_device_id ON nano_users (device_id);
CREATE INDEX {if_not_exists} nano_users_user_short_name ON nano_users (user_short_name, id);
CREATE INDEX {if_not_exists} nano_users_user_id ON nano_users (user_id, id);

CREATE TABLE IF NOT EXISTS nano_enrollments (
    id                     {id} NOT NULL PRIMARY KEY,
    device_id              {id} NOT NULL,
    type                   {id} NOT NULL,
    topic                  {id} NOT NULL DEFAULT '',
    push_magic             {id} NOT NULL DEFAULT '',
    token                  {blob} NULL,
    token_at               BIGINT NULL,
    enabled                SMALLINT NOT NULL DEFAULT 0,
    operator_disabled      SMALLINT NOT NULL DEFAULT 0,
    token_update_tally     BIGINT NOT NULL DEFAULT 0,
    awaiting_configuration SMALLINT NOT NULL DEFAULT 0,
    renewal_until          BIGINT NULL,
    enrolled_at            BIGINT NULL,
    created_at             BIGINT NOT NULL,
    updated_at             BIGINT NOT NULL
) {table};
CREATE INDEX {if_not_exists} nano_enrollments_device_id ON nano_enrollments (device_id, id);
CREATE INDEX {if_not_exists} nano_enrollments_topic ON nano_enrollments (topic, id);
CREATE INDEX {if_not_exists} nano_enrollments_type ON nano_enrollments (type, enabled, operator_disabled, id);

-- Queue order and pushes owed: last_seq numbers queue rows, a push is owed
-- while paid_seq < owed_seq. push_at is when the sweep looks next, NULL never.
CREATE TABLE IF NOT EXISTS nano_enrollment_push (
    id               {id} NOT NULL PRIMARY KEY,
    last_seq         BIGINT NOT NULL DEFAULT 0,
    owed_seq         BIGINT NOT NULL DEFAULT 0,
    paid_seq         BIGINT NOT NULL DEFAULT 0,
    push_at          BIGINT NULL,
    attempts         BIGINT NOT NULL DEFAULT 0,
    last_push_at     BIGINT NULL,
    last_push_class  {id} NULL,
    last_push_status BIGINT NULL,
    last_push_reason {id} NULL,
    last_apns_id     {id} NULL,
    token_dead_at    BIGINT NULL
) {table};
CREATE INDEX {if_not_exists} nano_enrollment_push_push_at ON nano_enrollment_push (push_at) {where} push_at IS NOT NULL;
CREATE INDEX {if_not_exists} nano_enrollment_push_last_push_class ON nano_enrollment_push (last_push_class, id) {where} last_push_class <> 'accepted';

-- Written in batches; narrow, so that polls lock nothing else.
CREATE TABLE IF NOT EXISTS nano_enrollment_activity (
    id           {id} NOT NULL PRIMARY KEY,
    last_seen_at BIGINT NOT NULL
) {table};
CREATE INDEX {if_not_exists} nano_enrollment_activity_last_seen_at ON nano_enrollment_activity (last_seen_at);

CREATE TABLE IF NOT EXISTS nano_commands (
    command_uuid {id} NOT NULL PRIMARY KEY,
    request_type {id} NOT NULL,
    command      {blob} NOT NULL,
    created_at   BIGINT NOT NULL
) {table};
CREATE INDEX {if_not_exists} nano_commands_created_at ON nano_commands (created_at, command_uuid);
CREATE INDEX {if_not_exists} nano_commands_request_type ON nano_commands (request_type, created_at, command_uuid);

-- state holds the numbers of storage.State. not_before is NULL once the row
-- is not scheduled any more, so that its index has rows that are, and no others.
-- So has the index of ends_at those that wait and expire: most rows never do, and
-- what devices report changes neither. That of finished_at has those that have ended.
-- A command goes to thousands at once, so the keys begin with what those rows have
-- in common, and their entries are neighbours; only the next of each enrollment has
-- a place of its own, and that among those that wait. No index but the primary key
-- begins with the command: PostgreSQL takes any of them for as good while the table is
-- empty, and goes on with what it chose.
CREATE TABLE IF NOT EXISTS nano_enrollment_queue (
    id            {id} NOT NULL,
    command_uuid  {id} NOT NULL,
    seq           BIGINT NOT NULL,
    priority      BIGINT NOT NULL DEFAULT 0,
    state         SMALLINT NOT NULL,
    supersede_key {id} NULL,
    created_at    BIGINT NOT NULL,
    not_before    BIGINT NULL,
    expires_at    BIGINT NULL,
    finished_at   BIGINT NULL,
    attempts      BIGINT NOT NULL DEFAULT 0,
    notnow_count  BIGINT NOT NULL DEFAULT 0,
    notnow_at     BIGINT NULL,
    ends_at       BIGINT GENERATED ALWAYS AS (CASE WHEN state < 10 THEN expires_at END) STORED,
    PRIMARY KEY (command_uuid, id)
) {table};
CREATE INDEX {if_not_exists} nano_enrollment_queue_next ON nano_enrollment_queue (state, id, priority DESC, seq);
CREATE INDEX {if_not_exists} nano_enrollment_queue_command_uuid ON nano_enrollment_queue (state, command_uuid, id);
CREATE INDEX {if_not_exists} nano_enrollment_queue_finished_at ON nano_enrollment_queue (state, finished_at, command_uuid, id) {where} finished_at IS NOT NULL;
CREATE INDEX {if_not_exists} nano_enrollment_queue_not_before ON nano_enrollment_queue (not_before) {where} not_before IS NOT NULL;
CREATE INDEX {if_not_exists} nano_enrollment_queue_ends_at ON nano_enrollment_queue (ends_at) {where} ends_at IS NOT NULL;

-- Calls that came with an idempotency key, name. Ids up to through are done,
-- and all of them if it is finished; failed is a JSON list of ids.
CREATE TABLE IF NOT EXISTS nano_enqueue_calls (
    caller       {id} NOT NULL,
    name         {id} NOT NULL,
    digest       {id} NOT NULL,
    command_uuid {id} NOT NULL,
    ids          BIGINT NOT NULL,
    through      {id} NOT NULL DEFAULT '',
    finished     SMALLINT NOT NULL DEFAULT 0,
    failed       {blob} NULL,
    created_at   BIGINT NOT NULL,
    PRIMARY KEY (caller, name)
) {table};
CREATE INDEX {if_not_exists} nano_enqueue_calls_created_at ON nano_enqueue_calls (created_at);

-- late: the result of a row that had been cancelled, expired or superseded.
CREATE TABLE IF NOT EXISTS nano_command_results (
    id           {id} NOT NULL,
    command_uuid {id} NOT NULL,
    status       {id} NOT NULL,
    result       {blob} NOT NULL,
    late         SMALLINT NOT NULL DEFAULT 0,
    created_at   BIGINT NOT NULL,
    PRIMARY KEY (id, command_uuid)
) {table};
CREATE INDEX {if_not_exists} nano_command_results_created_at ON nano_command_results (created_at);

CREATE TABLE IF NOT EXISTS nano_push_certs (
    topic      {id} NOT NULL PRIMARY KEY,
    cert_pem   {blob} NOT NULL,
    key_pem    {blob} NOT NULL,
    not_after  BIGINT NOT NULL,
    version    BIGINT NOT NULL DEFAULT 1,
    last_class {id} NULL,
    last_at    BIGINT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL
) {table};

-- A certificate acts for the device until retired_at; it is never reused.
CREATE TABLE IF NOT EXISTS nano_cert_auth_associations (
    sha256      {id} NOT NULL PRIMARY KEY,
    id          {id} NOT NULL,
    certificate {blob} NULL,
    not_after   BIGINT NULL,
    created_at  BIGINT NOT NULL,
    retired_at  BIGINT NULL
) {table};
CREATE INDEX {if_not_exists} nano_cert_auth_associations_id ON nano_cert_auth_associations (id, retired_at);
CREATE INDEX {if_not_exists} nano_cert_auth_associations_not_after ON nano_cert_auth_associations (retired_at, not_after, id);

-- The outbox. Events that were committed together, in order, are a batch of
-- some size. seq is 0 until the holder of the events lease numbers the batch,
-- and then the number of its last event; those before it have the numbers
-- before. stamp is the order of batches that have none. newest is when the
-- last event of it came in.
CREATE TABLE IF NOT EXISTS nano_event_batches (
    batch_id {id} NOT NULL PRIMARY KEY,
    seq      BIGINT NOT NULL DEFAULT 0,
    stamp    BIGINT NOT NULL,
    size     BIGINT NOT NULL,
    newest   BIGINT NOT NULL
) {table};
CREATE INDEX {if_not_exists} nano_event_batches_seq ON nano_event_batches (seq, stamp);

-- What a batch tells: details is a JSON list of its events, with the size of
-- each one's payload, and the payloads follow each other, but for those that have
-- rows of their own, since they are sealed or large. Both are compressed, as
-- blocks of S2. PostgreSQL is not to spend time on doing it again.
CREATE TABLE IF NOT EXISTS nano_events (
    batch_id {id} NOT NULL PRIMARY KEY,
    details  {blob} NOT NULL,
    payloads {blob} NULL
) {table};
{pgsql} ALTER TABLE nano_events ALTER details SET STORAGE EXTERNAL, ALTER payloads SET STORAGE EXTERNAL;
CREATE TABLE IF NOT EXISTS nano_event_payloads (
    event_id {id} NOT NULL PRIMARY KEY,
    topic    {id} NOT NULL,
    payload  {blob} NOT NULL
) {table};

-- name seq: the last number that was given to an event.
CREATE TABLE IF NOT EXISTS nano_event_counters (
    name  {id} NOT NULL PRIMARY KEY,
    value BIGINT NOT NULL
) {table};

-- config is JSON, keys included. Events up to cursor_seq are settled. seen_at
-- is when a replica last had a configured one in its configuration.
CREATE TABLE IF NOT EXISTS nano_event_sinks (
    name       {id} NOT NULL PRIMARY KEY,
    configured SMALLINT NOT NULL DEFAULT 0,
    seen_at    BIGINT NOT NULL DEFAULT 0,
    config     {blob} NOT NULL,
    enabled    SMALLINT NOT NULL DEFAULT 1,
    reason     {text} NULL,
    cursor_seq BIGINT NOT NULL DEFAULT 0,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL
) {table};

-- What a sink has not got; state holds the numbers of storage.DeliveryState,
-- created_at is the event's.
CREATE TABLE IF NOT EXISTS nano_event_deliveries (
    sink          {id} NOT NULL,
    seq           BIGINT NOT NULL,
    batch_id      {id} NOT NULL,
    enrollment_id {id} NOT NULL,
    created_at    BIGINT NOT NULL,
    state         SMALLINT NOT NULL,
    attempts      BIGINT NOT NULL DEFAULT 0,
    next_at       BIGINT NULL,
    last_error    {text} NULL,
    updated_at    BIGINT NOT NULL,
    PRIMARY KEY (sink, seq)
) {table};
CREATE INDEX {if_not_exists} nano_event_deliveries_lane ON nano_event_deliveries (sink, state, enrollment_id, seq);
CREATE INDEX {if_not_exists} nano_event_deliveries_due ON nano_event_deliveries (sink, state, next_at);

-- Certificates whose end was announced.
CREATE TABLE IF NOT EXISTS nano_event_notices (
    name       {id} NOT NULL PRIMARY KEY,
    created_at BIGINT NOT NULL
) {table};

-- Named keys of the operators' API; sha256 is of the key. topics is a JSON
-- list of the APNs topics that the key is bound to, or * if it is not.
CREATE TABLE IF NOT EXISTS nano_api_keys (
    name       {id} NOT NULL PRIMARY KEY,
    role       {id} NOT NULL,
    topics     {blob} NOT NULL,
    sha256     {id} NOT NULL,
    created_at BIGINT NOT NULL,
    created_by {id} NOT NULL DEFAULT ''
) {table};
CREATE UNIQUE INDEX {if_not_exists} nano_api_keys_sha256 ON nano_api_keys (sha256);

-- Keys that values were sealed with, by id, each with a value to try it on.
CREATE TABLE IF NOT EXISTS nano_seal (
    id         {id} NOT NULL PRIMARY KEY,
    value      {blob} NOT NULL,
    created_at BIGINT NOT NULL
) {table};

-- What operators did, in the words of the API.
CREATE TABLE IF NOT EXISTS nano_audit (
    id         {id} NOT NULL PRIMARY KEY,
    created_at BIGINT NOT NULL,
    who        {id} NOT NULL,
    action     {id} NOT NULL,
    target     {id} NOT NULL DEFAULT '',
    detail     {text} NOT NULL,
    outcome    {id} NOT NULL DEFAULT '',
    request_id {id} NOT NULL DEFAULT ''
) {table};
CREATE INDEX {if_not_exists} nano_audit_created_at ON nano_audit (created_at, id);
CREATE INDEX {if_not_exists} nano_audit_who ON nano_audit (who, created_at, id);
CREATE INDEX {if_not_exists} nano_audit_action ON nano_audit (action, created_at, id);
CREATE INDEX {if_not_exists} nano_audit_target ON nano_audit (target, created_at, id);
