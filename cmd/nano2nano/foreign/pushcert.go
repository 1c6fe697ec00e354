package foreign

import (
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/storage"
)

// pushCert checks a push certificate with its key. topic may be empty.
func (c *Config) pushCert(topic string, cert, key []byte) (storage.PushCert, bool) {
	text := slices.Concat(cert, []byte("\n"), key)
	now := c.Now()
	if parsed := parsePEM(cert); parsed != nil {
		if now.After(parsed.NotAfter) {
			c.note("push certificate", topic, "it expired at %s", parsed.NotAfter.UTC().Format(time.DateOnly))
		}
		now = parsed.NotBefore
	}
	pair, err := cryptoutil.ParsePushPair(text, now)
	if err != nil {
		c.problem("push certificate", topic, "%v", err)
		return storage.PushCert{}, false
	}
	if topic != "" && pair.Topic != topic {
		c.problem("push certificate", topic, "the certificate is of the topic %s", pair.Topic)
		return storage.PushCert{}, false
	}
	return storage.PushCert{Topic: pair.Topic, CertPEM: pair.CertPEM, KeyPEM: pair.KeyPEM, NotAfter: pair.Certificate.NotAfter}, true
}
