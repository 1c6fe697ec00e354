package apns_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/url"

	"github.com/nanomdm/nanomdm/push/apns"
	"github.com/nanomdm/nanomdm/push/apnstest"
)

// oneCertificate is a CertificateSource with the certificate of one topic.
type oneCertificate struct {
	topic string
	cert  tls.Certificate
}

func (s oneCertificate) PushCertificate(_ context.Context, topic string) (tls.Certificate, string, error) {
	if topic != s.topic {
		return tls.Certificate{}, "", fmt.Errorf("topic %s: %w", topic, apns.ErrNoCertificate)
	}
	return s.cert, "1", nil
}

// A client wakes a device, and classifies the answer. The fake APNs of package
// apnstest stands for Apple's.
func ExampleClient_Push() {
	server, err := apnstest.NewServer(apnstest.Config{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer server.Close()
	certPEM, keyPEM, err := server.PushCertificate("com.apple.mgmt.External.example")
	if err != nil {
		fmt.Println(err)
		return
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		fmt.Println(err)
		return
	}

	client, err := apns.New(oneCertificate{"com.apple.mgmt.External.example", cert}, apns.Config{
		URL: server.URL(), RootCAs: server.RootCAs(),
		Proxy: func(*url.URL) (*url.URL, error) { return nil, nil },
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close()

	for _, topic := range []string{"com.apple.mgmt.External.example", "com.apple.mgmt.External.other"} {
		outcome := client.Push(context.Background(), apns.Notification{
			Token: []byte{1, 2, 3}, Magic: "the PushMagic of the same TokenUpdate", Topic: topic,
		})
		fmt.Println(outcome.Class, outcome.Status, errors.Is(outcome.Err, apns.ErrNoCertificate))
	}
	// Output:
	// accepted 200 false
	// certificate_fault 0 true
}
