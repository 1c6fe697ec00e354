package cryptoutil

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"sync"
)

// CertificateCache keeps parsed certificates by the hash of their bytes, so
// that a device's certificate is parsed once. It says nothing about trust. It
// is safe for concurrent use.
type CertificateCache struct {
	mu    sync.RWMutex
	size  int
	certs map[[sha256.Size]byte]*x509.Certificate
}

// NewCertificateCache returns a cache of up to size certificates, about 5 KB
// each; below 1 it keeps none. When it is full an arbitrary certificate makes
// room, so a fleet larger than the cache loses only a proportional share of the
// hits.
func NewCertificateCache(size int) *CertificateCache {
	return &CertificateCache{size: size, certs: make(map[[sha256.Size]byte]*x509.Certificate)}
}

// ParseMdmSignature is the function of that name with known certificates taken
// from the cache. The certificates are shared and must not be changed.
func (c *CertificateCache) ParseMdmSignature(header string) (*MdmSignature, error) {
	return parseMdmSignature(header, c.parse)
}

func (c *CertificateCache) parse(der []byte) (*x509.Certificate, error) {
	key := sha256.Sum256(der)
	c.mu.RLock()
	cert := c.certs[key]
	c.mu.RUnlock()
	if cert != nil {
		return cert, nil
	}
	// A parsed certificate refers to its input: without a copy it would keep
	// the whole header alive.
	cert, err := x509.ParseCertificate(bytes.Clone(der))
	if err != nil || c.size < 1 {
		return cert, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if other := c.certs[key]; other != nil { // somebody else was first
		return other, nil
	}
	if len(c.certs) >= c.size {
		for old := range c.certs {
			delete(c.certs, old)
			break
		}
	}
	c.certs[key] = cert
	return cert, nil
}
