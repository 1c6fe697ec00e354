package push

import (
	"fmt"
	"log/slog"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/push/apns"
)

// Topics that devices made up take a bounded number of states. A topic with a
// push certificate stays stopped.
func TestTopicsWithoutCertificateAreBounded(t *testing.T) {
	certs := newCertificates(nil)
	certs.known["certified"] = certificate{version: 7}
	topics := newTopics(nil, certs, slog.New(slog.DiscardHandler))
	topics.observe("certified", 7, apns.Outcome{Class: apns.CertificateFault})
	for i := range 5 * maxTopics {
		name := fmt.Sprintf("made up %d", i)
		topics.allow(name)
		topics.observe(name, 0, apns.Outcome{Class: apns.CertificateFault})
		require.LessOrEqual(t, len(topics.names), maxTopics)
	}
	require.Contains(t, topics.stopped(), "certified")
}
