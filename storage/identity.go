package storage

import (
	"crypto/x509"
	"strings"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// Reenroll is the policy for the certificates with which Authenticate may take
// over an existing enrollment. The pinned certificate always may, and any
// certificate while a renewal window is open.
type Reenroll int

// The policies.
const (
	// ReenrollAllow: any certificate of the CA.
	ReenrollAllow Reenroll = iota
	// ReenrollSameSubject: one with the subject of the pinned certificate
	// that also names the device (see NamesDevice).
	ReenrollSameSubject
	// ReenrollDeny: none.
	ReenrollDeny
)

// Renewal is the policy for the certificates with which messages other than
// Authenticate may take over an enrollment, which keeps everything else.
type Renewal int

// The policies.
const (
	// RenewalDeny: none; a device has to enroll again.
	RenewalDeny Renewal = iota
	// RenewalWindow: any certificate of the CA while a renewal window is
	// open, also one that was retired, so that a device whose renewal failed
	// half-way can go back.
	RenewalWindow
	// RenewalSameSubject: as RenewalWindow, and at any time one with the subject
	// of the pinned certificate that also names the device (see NamesDevice).
	RenewalSameSubject
)

// minName is the least length of an identifier that NamesDevice looks for.
// Serial numbers have 10 to 14 characters; shorter ones, which virtual machines
// have, may be in many certificates by chance.
const minName = 8

// NamesDevice says whether the certificate names the device: its subject or a
// subject alternative name contains the device's id (UDID or EnrollmentID) or
// serial number as a word, in upper or lower case. It ignores an empty serial
// number.
func NamesDevice(cert *x509.Certificate, id, serial string) bool {
	var texts []string
	for _, name := range cert.Subject.Names {
		if text, ok := name.Value.(string); ok {
			texts = append(texts, text)
		}
	}
	for _, text := range append(texts, alternativeNames(cert)...) {
		if containsWord(text, id) || containsWord(text, serial) {
			return true
		}
	}
	return false
}

// containsWord looks for a word without a letter or digit next to it.
func containsWord(text, word string) bool {
	if len(word) < minName {
		return false
	}
	text, word = strings.ToUpper(text), strings.ToUpper(word)
	for from := 0; ; {
		i := strings.Index(text[from:], word)
		if i < 0 {
			return false
		}
		start, end := from+i, from+i+len(word)
		if (start == 0 || !alphanumeric(text[start-1])) && (end == len(text) || !alphanumeric(text[end])) {
			return true
		}
		from = start + 1
	}
}

func alphanumeric(c byte) bool { return c >= '0' && c <= '9' || c >= 'A' && c <= 'Z' || c >= 0x80 }

const subjectAltName = "2.5.29.17"

// alternativeNames returns every text of the subject alternative names, also of
// the kinds that package x509 leaves out: other names and directory names.
//
// Source: RFC 5280, section 4.2.1.6.
func alternativeNames(cert *x509.Certificate) (texts []string) {
	for _, ext := range cert.Extensions {
		if ext.Id.String() == subjectAltName {
			texts = appendTexts(texts, cryptobyte.String(ext.Value), maxNameDepth)
		}
	}
	return texts
}

// maxNameDepth bounds the depth of names: an other name has four levels, a
// directory name six.
const maxNameDepth = 8

func appendTexts(texts []string, der cryptobyte.String, depth int) []string {
	const constructed, contextSpecific = 0x20, 0x80
	for !der.Empty() && depth > 0 {
		var element cryptobyte.String
		var tag asn1.Tag
		if !der.ReadAnyASN1(&element, &tag) {
			return texts
		}
		switch {
		case tag&constructed != 0:
			texts = appendTexts(texts, element, depth-1)
		case tag == asn1.UTF8String, tag == asn1.PrintableString, tag == asn1.IA5String, tag == asn1.T61String,
			tag&0xc0 == contextSpecific: // email, DNS name, URI
			texts = append(texts, string(element))
		}
	}
	return texts
}
