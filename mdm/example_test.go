package mdm_test

import (
	"errors"
	"fmt"

	"github.com/nanomdm/nanomdm/mdm"
)

// A body is decoded, and then tells whose it is.
func ExampleDecode() {
	body := []byte(`<?xml version="1.0" encoding="UTF-8"?>
<plist version="1.0"><dict>
	<key>CommandUUID</key><string>0001_ProfileList</string>
	<key>Status</key><string>Acknowledged</string>
	<key>UDID</key><string>564D7B3C-0A1B-4C2D-8E3F-112233445566</string>
	<key>UserID</key><string>a1b2</string>
</dict></plist>`)
	message, err := mdm.Decode(body)
	if err != nil {
		fmt.Println(err)
		return
	}
	id, err := message.Identity().Resolve()
	if err != nil {
		fmt.Println(err)
		return
	}
	if report, ok := message.(*mdm.Report); ok {
		fmt.Println(report.CommandUUID, report.Status, report.Status.Terminal())
	}
	fmt.Println(id.Type, id.ID)
	// Output:
	// 0001_ProfileList Acknowledged true
	// User 564D7B3C-0A1B-4C2D-8E3F-112233445566:a1b2
}

// Errors say what is wrong with a body and never repeat its values.
func ExampleDecode_errors() {
	_, err := mdm.Decode([]byte(`<plist version="1.0"><dict><key>MessageType</key><string>Authenticate</string></dict></plist>`))
	fmt.Println(errors.Is(err, mdm.ErrMissingKey), err)
	// Output: true missing key: Topic
}
