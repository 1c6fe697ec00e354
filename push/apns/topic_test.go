package apns

import (
	"context"
	"crypto/tls"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
)

// bareSource has no certificate, and counts the questions.
type bareSource struct{ asked int }

func (s *bareSource) PushCertificate(context.Context, string) (tls.Certificate, string, error) {
	s.asked++
	return tls.Certificate{}, "", ErrNoCertificate
}

// A device that enrolls again and again, each time with another topic, leaves
// nothing behind beyond a bound, and does not make the source be asked for each push
// of a topic that is known.
func TestTopicsWithoutCertificateAreBounded(t *testing.T) {
	src := &bareSource{}
	c, err := New(src, Config{})
	require.NoError(t, err)
	defer c.Close()
	push := func(topic string) {
		o := c.Push(t.Context(), Notification{Token: []byte("token"), Magic: "magic", Topic: topic})
		require.Equal(t, CertificateFault, o.Class)
	}
	for i := range 2 * knownTopics {
		push(fmt.Sprint("topic", i))
	}
	require.Len(t, c.topics, knownTopics)
	before := src.asked
	push("topic0")
	require.Equal(t, before, src.asked)
}
