package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// openStore opens the database that is written to, and migrates it.
func openStore(ctx context.Context, o *options, now func() time.Time) (*sqlstore.Store, error) {
	cfg := sqlstore.Config{Driver: o.to, DSN: o.toDSN, Now: now, RecordActivityEvery: -1, SealCommands: o.sealCommand}
	if o.sealKeyFile != "" {
		keys, err := sealKeys(o.sealKeyFile)
		if err != nil {
			return nil, usage("-seal-key-file: %v", err)
		}
		cfg.Sealer = keys
	}
	store, err := sqlstore.Open(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("opening the target: %w", err)
	}
	return store, nil
}

func sealKeys(path string) (*cryptoutil.SealKeys, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return cryptoutil.ParseSealKeys(data)
}

// nowhere is the target of a dry run.
type nowhere struct{}

func (nowhere) ImportPushCerts(_ context.Context, certs []storage.PushCert) (storage.Imported, error) {
	return storage.Imported{Written: len(certs)}, nil
}

func (nowhere) ImportCommands(_ context.Context, commands []storage.CommandRecord) (storage.Imported, error) {
	return storage.Imported{Written: len(commands)}, nil
}

func (nowhere) ImportDevices(_ context.Context, devices []*storage.DeviceRecord) (storage.Imported, error) {
	return storage.Imported{Written: len(devices)}, nil
}

// endpoint is a migration endpoint, which takes check-ins.
type endpoint struct {
	url, key string
	client   *http.Client
	wait     func(context.Context, time.Duration) error
}

func newEndpoint(address, key string) (*endpoint, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, usage("-url is no URL of http or https")
	}
	return &endpoint{url: u.String(), key: key, client: &http.Client{Timeout: time.Minute}, wait: backoff.Sleep}, nil
}

func (*endpoint) ImportPushCerts(context.Context, []storage.PushCert) (storage.Imported, error) {
	return storage.Imported{}, nil
}

func (*endpoint) ImportCommands(context.Context, []storage.CommandRecord) (storage.Imported, error) {
	return storage.Imported{}, nil
}

// ImportDevices sends Authenticate and, of channels that are enabled,
// TokenUpdate.
func (e *endpoint) ImportDevices(ctx context.Context, devices []*storage.DeviceRecord) (done storage.Imported, err error) {
	for _, d := range devices {
		messages := [][]byte{d.Authenticate.Raw}
		if d.Channel.Enabled {
			messages = append(messages, d.TokenUpdate.Raw)
			for _, u := range d.Users {
				if u.Channel.Enabled {
					messages = append(messages, u.TokenUpdate.Raw)
				}
			}
		}
		written := true
		for _, raw := range messages {
			refused, err := e.send(ctx, raw)
			if err != nil {
				return done, err
			}
			if refused != "" {
				done.Refused = append(done.Refused, storage.Refusal{Kind: "device", Key: d.Channel.ID, Reason: refused})
				written = false
				break
			}
		}
		if written {
			done.Written++
		}
	}
	return done, nil
}

// Tries of one message, and the first pause between two of them.
const (
	sendTries = 6
	sendPause = time.Second
)

// send sends a check-in. refused is the server's reason not to take it.
func (e *endpoint) send(ctx context.Context, raw []byte) (refused string, err error) {
	if len(raw) == 0 {
		return "the source has no check-in message of it", nil
	}
	pause := sendPause
	for try := 1; ; try++ {
		status, err := e.put(ctx, raw)
		again := err != nil || status == http.StatusTooManyRequests || status >= http.StatusInternalServerError
		switch {
		case !again && status/100 == 2:
			return "", nil
		case !again && (status == http.StatusUnauthorized || status == http.StatusForbidden || status == http.StatusNotFound):
			return "", fmt.Errorf("the endpoint answered %d: check -url, -key and the server's -migration", status)
		case !again:
			return fmt.Sprintf("the endpoint answered %d", status), nil
		case try == sendTries:
			if err == nil {
				err = fmt.Errorf("the endpoint answered %d", status)
			}
			return "", err
		}
		if err := e.wait(ctx, pause); err != nil {
			return "", err
		}
		pause *= 2
	}
}

func (e *endpoint) put(ctx context.Context, raw []byte) (status int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, e.url, bytes.NewReader(raw))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", mdm.ContentTypeCheckin)
	req.SetBasicAuth("nanomdm", e.key)
	resp, err := e.client.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) { // its text may have a password of the URL
			err = u.Err
		}
		return 0, err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<16))
	return resp.StatusCode, nil
}
