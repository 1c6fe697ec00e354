package push

import (
	"context"
	"crypto/tls"
	"fmt"
	"strconv"
	"sync"

	"github.com/nanomdm/nanomdm/push/apns"
	"github.com/nanomdm/nanomdm/storage"
)

// certificates supplies the sender with the push certificates of the store. It
// reads a certificate again only when its version has changed.
type certificates struct {
	store storage.PushCerts

	mu    sync.Mutex
	known map[string]certificate
}

type certificate struct {
	tls     tls.Certificate
	version int64
}

func newCertificates(store storage.PushCerts) *certificates {
	return &certificates{store: store, known: make(map[string]certificate)}
}

// version returns the version of the topic's certificate that was supplied last,
// or 0.
func (c *certificates) version(topic string) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.known[topic].version
}

// PushCertificate implements apns.CertificateSource.
func (c *certificates) PushCertificate(ctx context.Context, topic string) (tls.Certificate, string, error) {
	version, err := c.store.PushCertVersion(ctx, topic)
	if err != nil {
		return tls.Certificate{}, "", c.forgetIfMissing(topic, err)
	}
	c.mu.Lock()
	known, ok := c.known[topic]
	c.mu.Unlock()
	if ok && known.version == version {
		return known.tls, strconv.FormatInt(version, 10), nil
	}
	stored, err := c.store.PushCert(ctx, topic)
	if err != nil {
		return tls.Certificate{}, "", c.forgetIfMissing(topic, err)
	}
	// Errors of X509KeyPair quote no key.
	pair, err := tls.X509KeyPair(stored.CertPEM, stored.KeyPEM)
	if err != nil {
		return tls.Certificate{}, "", fmt.Errorf("reading the stored push certificate of %s: %w", topic, err)
	}
	known = certificate{tls: pair, version: stored.Version}
	c.mu.Lock()
	c.known[topic] = known
	c.mu.Unlock()
	return known.tls, strconv.FormatInt(known.version, 10), nil
}

// forgetIfMissing forgets the certificate of a topic that has none any more.
func (c *certificates) forgetIfMissing(topic string, err error) error {
	if !missing(err) {
		return err
	}
	c.mu.Lock()
	delete(c.known, topic)
	c.mu.Unlock()
	return fmt.Errorf("topic %s: %w", topic, apns.ErrNoCertificate)
}
