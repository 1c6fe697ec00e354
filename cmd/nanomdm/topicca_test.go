package main

import (
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// A device of one tenant's CA gets into no other tenant's APNs topic: not by
// enrolling to it, and not by taking over a device there.
func TestTopicCA(t *testing.T) {
	other, err := mdmtest.NewCA()
	require.NoError(t, err)
	dir := t.TempDir()
	write := func(name string, pems ...[]byte) string {
		file := filepath.Join(dir, name)
		var all []byte
		for _, p := range pems {
			all = append(all, p...)
		}
		require.NoError(t, os.WriteFile(file, all, 0o600))
		return file
	}
	const topic = "com.example.mine"
	d := start(t, "http")
	d.stop()
	mine := write("mine.pem", d.ca.PEM())
	both := write("both.pem", d.ca.PEM(), other.PEM())
	d.launch("http", "-ca", both, "-topic-ca", topic+"="+mine)

	honest := d.device("HONEST", mdmtest.Config{Topic: topic})
	require.NoError(t, honest.Enroll(t.Context()))
	of := func(ca *mdmtest.CA, udid, topic string) *mdmtest.Device {
		id, err := ca.Issue(udid)
		require.NoError(t, err)
		dev, err := mdmtest.NewDevice(d.url+"/mdm", id, mdmtest.Config{UDID: udid, Topic: topic})
		require.NoError(t, err)
		return dev
	}
	for _, udid := range []string{"HONEST", "NEW"} {
		require.ErrorContains(t, of(other, udid, topic).Authenticate(t.Context()), "400")
	}
	_, err = honest.Poll(t.Context())
	require.NoError(t, err, "its certificate is not retired")
	require.NoError(t, of(other, "THEIRS", "com.example.theirs").Enroll(t.Context()))
	require.NoError(t, of(d.ca, "MINE", "com.example.theirs").Enroll(t.Context()), "a topic that is bound to no CA")

	_, text, _ := d.api("GET", "/v1/audit?action=enrollment.topic.refuse", "nanomdm", testKey, nil)
	require.Contains(t, text, "HONEST")
	require.Contains(t, text, "NEW")
	require.Contains(t, text, "another CA issued its certificate than enrolls devices to "+topic)
	_, text, _ = d.api("GET", "/metrics", "nanomdm", testKey, nil)
	require.Contains(t, text, `nanomdm_device_refusals_total{reason="other_topic_ca"} 2`)

	d.stop()
	var log syncBuffer
	leaf, err := d.ca.Issue("leaf")
	require.NoError(t, err)
	bad := write("leaf.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Cert.Raw}))
	require.NotZero(t, run(t.Context(), []string{"-ca", both, "-topic-ca", topic + "=" + bad, "-listen", "127.0.0.1:0",
		"-storage-dsn", filepath.Join(dir, "other.db")}, []string{"NANOMDM_API=" + testKey}, d.stdout, &log, nil))
	require.Contains(t, log.String(), "-topic-ca: "+bad+": no certificate in the file can issue device identities")
}
