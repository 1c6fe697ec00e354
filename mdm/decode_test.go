package mdm

import (
	"bytes"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const header = `<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
`

// wrap makes a property list of the contents of its top dict.
func wrap(contents string) []byte {
	return []byte(header + "<plist version=\"1.0\">\n<dict>\n" + contents + "</dict>\n</plist>\n")
}

// str is a key with a string.
func str(key, text string) string {
	return "\t<key>" + key + "</key>\n\t<string>" + text + "</string>\n"
}

const (
	macUDID   = "564D7B3C-0A1B-4C2D-8E3F-112233445566"
	shortUDID = "00008020-000915083C80012E"
	oldUDID   = "d3b07384d113edec49eaa6238ad5ff00c1f169d6"
	topic     = "com.apple.mgmt.External.2f1c"
	udidKey   = "\t<key>UDID</key>\n\t<string>" + macUDID + "</string>\n"
)

var tokenKeys = str("MessageType", "TokenUpdate") + str("Topic", topic) + str("PushMagic", "magic") +
	"\t<key>Token</key>\n\t<data>\n\tAAEC\n\tAwQ=\n\t</data>\n"

// messages are bodies as devices send them, and what they decode to without
// their Raw.
var messages = []struct {
	name string
	body []byte
	want Message
	id   EnrollID
}{
	{
		"Authenticate of a Mac",
		wrap(str("MessageType", "Authenticate") + str("Topic", topic) + udidKey + str("Model", "Mac14,2") + str("ModelName", "MacBook Air") +
			str("DeviceName", "Anna&#8217;s Mac &amp; more") + str("OSVersion", "15.1") + str("BuildVersion", "24B83") + str("ProductName", "Mac14,2") + str("SerialNumber", "C02XYZ")),
		&Authenticate{Enrollment: Enrollment{UDID: macUDID}, Topic: topic, Model: "Mac14,2", ModelName: "MacBook Air",
			DeviceName: "Anna\u2019s Mac & more", OSVersion: "15.1", BuildVersion: "24B83", ProductName: "Mac14,2", SerialNumber: "C02XYZ"},
		EnrollID{Type: Device, ID: macUDID},
	},
	{
		"Authenticate of an iPhone, 25-character UDID",
		wrap(str("MessageType", "Authenticate") + str("Topic", topic) + str("UDID", shortUDID) + str("IMEI", "35 000000 000000 0") + str("MEID", "35000000000000")),
		&Authenticate{Enrollment: Enrollment{UDID: shortUDID}, Topic: topic, IMEI: "35 000000 000000 0", MEID: "35000000000000"},
		EnrollID{Type: Device, ID: shortUDID},
	},
	{
		"Authenticate of a User Enrollment",
		wrap(str("MessageType", "Authenticate") + str("Topic", topic) + str("EnrollmentID", "AB12")),
		&Authenticate{Enrollment: Enrollment{EnrollmentID: "AB12"}, Topic: topic},
		EnrollID{Type: UserEnrollmentDevice, ID: "AB12"},
	},
	{
		"TokenUpdate of a device, 40-hex UDID, in Setup Assistant",
		wrap(tokenKeys + str("UDID", oldUDID) + "<key>UnlockToken</key><data>dW5sb2Nr</data><key>AwaitingConfiguration</key><true/>"),
		&TokenUpdate{Enrollment: Enrollment{UDID: oldUDID}, Topic: topic, PushMagic: "magic", Token: []byte{0, 1, 2, 3, 4},
			UnlockToken: []byte("unlock"), AwaitingConfiguration: true},
		EnrollID{Type: Device, ID: oldUDID},
	},
	{
		"TokenUpdate of a Mac's user, unknown keys",
		wrap(tokenKeys + udidKey + str("UserID", "a1b2") + str("UserShortName", "anna") + str("UserLongName", "Anna A.") + str("AuthToken", "x") +
			"<key>NotOnConsole</key><true/><key>NeedSyncResponse</key><true/><key>UserConfiguration</key><false/>"),
		&TokenUpdate{Enrollment: Enrollment{UDID: macUDID, UserID: "a1b2", UserShortName: "anna", UserLongName: "Anna A."},
			Topic: topic, PushMagic: "magic", Token: []byte{0, 1, 2, 3, 4}, NotOnConsole: true},
		EnrollID{Type: User, ID: macUDID + ":a1b2", ParentID: macUDID},
	},
	{
		"TokenUpdate of a Shared iPad's user",
		wrap(tokenKeys + str("UDID", shortUDID) + str("UserID", SharediPadUserID) + str("UserShortName", "bo@example.com")),
		&TokenUpdate{Enrollment: Enrollment{UDID: shortUDID, UserID: SharediPadUserID, UserShortName: "bo@example.com"},
			Topic: topic, PushMagic: "magic", Token: []byte{0, 1, 2, 3, 4}},
		EnrollID{Type: SharediPad, ID: shortUDID + ":bo@example.com", ParentID: shortUDID},
	},
	{
		"TokenUpdate of a User Enrollment's user",
		wrap(tokenKeys + str("EnrollmentID", "AB12") + str("EnrollmentUserID", "CD34") + "<key>NotOnConsole</key><false/>"),
		&TokenUpdate{Enrollment: Enrollment{EnrollmentID: "AB12", EnrollmentUserID: "CD34"},
			Topic: topic, PushMagic: "magic", Token: []byte{0, 1, 2, 3, 4}},
		EnrollID{Type: UserEnrollment, ID: "AB12:CD34", ParentID: "AB12"},
	},
	{
		"CheckOut",
		wrap(str("MessageType", "CheckOut") + str("Topic", topic) + udidKey),
		&CheckOut{Enrollment: Enrollment{UDID: macUDID}, Topic: topic},
		EnrollID{Type: Device, ID: macUDID},
	},
	{
		"SetBootstrapToken",
		wrap(str("MessageType", "SetBootstrapToken") + udidKey + "<key>BootstrapToken</key><data>Ym9vdA==</data><key>AwaitingConfiguration</key><false/>"),
		&SetBootstrapToken{Enrollment: Enrollment{UDID: macUDID}, BootstrapToken: []byte("boot")},
		EnrollID{Type: Device, ID: macUDID},
	},
	{
		"SetBootstrapToken, empty",
		wrap(str("MessageType", "SetBootstrapToken") + udidKey + "<key>BootstrapToken</key><data>\n</data>"),
		&SetBootstrapToken{Enrollment: Enrollment{UDID: macUDID}},
		EnrollID{Type: Device, ID: macUDID},
	},
	{
		"GetBootstrapToken",
		wrap(str("MessageType", "GetBootstrapToken") + udidKey + "<key>AwaitingConfiguration</key><true/>"),
		&GetBootstrapToken{Enrollment: Enrollment{UDID: macUDID}, AwaitingConfiguration: true},
		EnrollID{Type: Device, ID: macUDID},
	},
	{
		"UserAuthenticate, first",
		wrap(str("MessageType", "UserAuthenticate") + udidKey + str("UserID", "net")),
		&UserAuthenticate{Enrollment: Enrollment{UDID: macUDID, UserID: "net"}},
		EnrollID{Type: User, ID: macUDID + ":net", ParentID: macUDID},
	},
	{
		"UserAuthenticate, second, empty digest",
		wrap(str("MessageType", "UserAuthenticate") + udidKey + str("UserID", "net") + "<key>DigestResponse</key><string/>"),
		&UserAuthenticate{Enrollment: Enrollment{UDID: macUDID, UserID: "net"}, HasDigestResponse: true},
		EnrollID{Type: User, ID: macUDID + ":net", ParentID: macUDID},
	},
	{
		"DeclarativeManagement",
		wrap(str("MessageType", "DeclarativeManagement") + udidKey + str("Endpoint", "status") + "<key>Data</key><data>eyJhIjoxfQ==</data>"),
		&DeclarativeManagement{Enrollment: Enrollment{UDID: macUDID}, Endpoint: "status", Data: []byte(`{"a":1}`)},
		EnrollID{Type: Device, ID: macUDID},
	},
	{
		"GetToken",
		wrap(str("MessageType", "GetToken") + str("UDID", shortUDID) + str("TokenServiceType", TokenServiceWatchPairing) +
			"<key>TokenParameters</key><dict>" + str("SecurityToken", "s") + str("PhoneUDID", "p") + str("WatchUDID", "w") + str("Odd", "o") + "</dict>"),
		&GetToken{Enrollment: Enrollment{UDID: shortUDID}, TokenServiceType: TokenServiceWatchPairing,
			TokenParameters: TokenParameters{SecurityToken: "s", PhoneUDID: "p", WatchUDID: "w"}},
		EnrollID{Type: Device, ID: shortUDID},
	},
	{
		"ReturnToService",
		wrap(str("MessageType", "ReturnToService") + str("UDID", shortUDID)),
		&ReturnToService{Enrollment: Enrollment{UDID: shortUDID}},
		EnrollID{Type: Device, ID: shortUDID},
	},
	{
		"Idle",
		wrap(udidKey + str("Status", "Idle")),
		&Report{Enrollment: Enrollment{UDID: macUDID}, Status: StatusIdle},
		EnrollID{Type: Device, ID: macUDID},
	},
	{
		"Acknowledged with a result that repeats wanted names",
		wrap(udidKey + str("Status", "Acknowledged") + str("CommandUUID", "0001_DeviceInformation") +
			"<key>QueryResponses</key><dict>" + str("UDID", "other") + str("CommandUUID", "other") + str("Status", "Idle") +
			"<key>Topic</key><integer>1</integer></dict><key>Model</key><array/>"),
		&Report{Enrollment: Enrollment{UDID: macUDID}, Status: StatusAcknowledged, CommandUUID: "0001_DeviceInformation"},
		EnrollID{Type: Device, ID: macUDID},
	},
	{
		"NotNow of a user",
		wrap(udidKey + str("UserID", "a1b2") + str("Status", "NotNow") + str("CommandUUID", "0002")),
		&Report{Enrollment: Enrollment{UDID: macUDID, UserID: "a1b2"}, Status: StatusNotNow, CommandUUID: "0002"},
		EnrollID{Type: User, ID: macUDID + ":a1b2", ParentID: macUDID},
	},
	{
		"Error with a chain",
		wrap(udidKey + str("Status", "Error") + str("CommandUUID", "0003") + "<key>ErrorChain</key><array><dict>" +
			"<key>ErrorCode</key><integer>12021</integer>" + str("ErrorDomain", "MCMDMErrorDomain") + str("LocalizedDescription", "Unbekannt") +
			str("USEnglishDescription", "Unknown") + "</dict><dict>" + str("ErrorDomain", "Second") + "</dict></array>"),
		&Report{Enrollment: Enrollment{UDID: macUDID}, Status: StatusError, CommandUUID: "0003", ErrorChain: []ErrorChainItem{
			{ErrorCode: 12021, ErrorDomain: "MCMDMErrorDomain", LocalizedDescription: "Unbekannt", USEnglishDescription: "Unknown"},
			{ErrorDomain: "Second"}}},
		EnrollID{Type: Device, ID: macUDID},
	},
	{
		"unknown status",
		wrap(udidKey + str("Status", "Later") + str("CommandUUID", "0004")),
		&Report{Enrollment: Enrollment{UDID: macUDID}, Status: "Later", CommandUUID: "0004"},
		EnrollID{Type: Device, ID: macUDID},
	},
}

// setRaw completes an expected message.
func setRaw(t *testing.T, m Message, raw []byte) Message {
	switch m := m.(type) {
	case *Authenticate:
		c := *m
		c.Raw = raw
		return &c
	case *TokenUpdate:
		c := *m
		c.Raw = raw
		return &c
	case *CheckOut:
		c := *m
		c.Raw = raw
		return &c
	case *SetBootstrapToken:
		c := *m
		c.Raw = raw
		return &c
	case *GetBootstrapToken:
		c := *m
		c.Raw = raw
		return &c
	case *UserAuthenticate:
		c := *m
		c.Raw = raw
		return &c
	case *DeclarativeManagement:
		c := *m
		c.Raw = raw
		return &c
	case *GetToken:
		c := *m
		c.Raw = raw
		return &c
	case *ReturnToService:
		c := *m
		c.Raw = raw
		return &c
	case *Report:
		c := *m
		c.Raw = raw
		return &c
	}
	require.FailNow(t, "unknown message")
	return nil
}

// withoutInventory forgets where a report has an inventory; see TestInventory.
func withoutInventory(m Message) Message {
	if report, ok := m.(*Report); ok {
		report.inventory = inventoryAt{}
	}
	return m
}

func TestDecode(t *testing.T) {
	for _, tt := range messages {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Decode(tt.body)
			require.NoError(t, err)
			require.Equal(t, setRaw(t, tt.want, tt.body), withoutInventory(got))
			require.Same(t, &tt.body[0], &got.RawBytes()[0], "Raw is the body, not a copy")

			var direct Message
			if got.Kind() == KindReport {
				direct, err = DecodeReport(tt.body)
			} else {
				direct, err = DecodeCheckin(tt.body)
				require.Contains(t, string(tt.body), "<string>"+string(got.Kind())+"</string>")
			}
			require.NoError(t, err)
			require.Equal(t, got, withoutInventory(direct))

			id, err := got.Identity().Resolve()
			require.NoError(t, err)
			require.Equal(t, tt.id, id)
		})
	}
}

func TestDecodeErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		body []byte
		want error
		text string
	}{
		{"neither", wrap(udidKey), ErrMissingKey, "MessageType nor Status"},
		{"unknown type", wrap(udidKey + str("MessageType", "Greet")), ErrUnknownMessageType, ""},
		{"type is no string", wrap(udidKey + "<key>MessageType</key><array/>"), ErrMalformed, "MessageType is array, not string"},
		{"empty type", wrap(str("MessageType", "")), ErrMissingKey, "MessageType"},
		{"no topic", wrap(udidKey + str("MessageType", "Authenticate")), ErrMissingKey, "Topic"},
		{"no magic", wrap(udidKey + str("MessageType", "TokenUpdate") + str("Topic", topic)), ErrMissingKey, "PushMagic"},
		{"no token", wrap(udidKey + str("MessageType", "TokenUpdate") + str("Topic", topic) + str("PushMagic", "m") + "<key>Token</key><data/>"), ErrMissingKey, "Token"},
		{"token is string", wrap(udidKey + str("MessageType", "TokenUpdate") + str("Topic", topic) + str("PushMagic", "m") + str("Token", "AAAA")), ErrMalformed, "Token is string, not data"},
		{"bad base64", wrap(udidKey + str("MessageType", "SetBootstrapToken") + "<key>BootstrapToken</key><data>AAA</data>"), ErrMalformed, "BootstrapToken"},
		{"no endpoint", wrap(udidKey + str("MessageType", "DeclarativeManagement")), ErrMissingKey, "Endpoint"},
		{"no service type", wrap(udidKey + str("MessageType", "GetToken")), ErrMissingKey, "TokenServiceType"},
		{"bootstrap token is string", wrap(udidKey + str("MessageType", "SetBootstrapToken") + str("BootstrapToken", "AAAA")), ErrMalformed, "BootstrapToken is string, not data"},
		{"illegal character in UDID", wrap(str("Status", "Idle") + str("UDID", "a\x01")), ErrMalformed, "illegal character in UDID"},
		{"latin 1 in UserID", wrap(udidKey + str("Status", "Idle") + str("UserID", "Ren\xe9")), ErrMalformed, "illegal character in UserID"},
		{"cut emoji in a Shared iPad's user", wrap(udidKey + str("Status", "Idle") + str("UserID", SharediPadUserID) + str("UserShortName", "a\xf0\x9f")), ErrMalformed, "illegal character in UserShortName"},
		{"illegal character in magic", wrap(udidKey + str("MessageType", "TokenUpdate") + str("Topic", topic) + str("PushMagic", "m&#0;")), ErrMalformed, "illegal character in PushMagic"},
		{"long topic", wrap(udidKey + str("MessageType", "Authenticate") + str("Topic", strings.Repeat("t", 256))), ErrMalformed, "more than 255 bytes in Topic"},
		{"long serial number", wrap(udidKey + str("MessageType", "Authenticate") + str("Topic", topic) + str("SerialNumber", strings.Repeat("é", 128))), ErrMalformed, "more than 255 bytes in SerialNumber"},
		{"long topic in a token update", wrap(udidKey + str("MessageType", "TokenUpdate") + str("Topic", strings.Repeat("t", 256)) + str("PushMagic", "m") + "<key>Token</key><data>AAAA</data>"), ErrMalformed, "more than 255 bytes in Topic"},
		{"long magic", wrap(udidKey + str("MessageType", "TokenUpdate") + str("Topic", topic) + str("PushMagic", strings.Repeat("m", 256)) + "<key>Token</key><data>AAAA</data>"), ErrMalformed, "more than 255 bytes in PushMagic"},
		{"status is nothing else", wrap(udidKey + str("Status", "\x01") + str("CommandUUID", "a")), ErrMalformed, "illegal character in Status"},
		{"attribute", []byte(`<plist version="1.0"><dict><key>Status</key><string xmlns="http://www.w3.org/1999/xhtml">Idle</string></dict></plist>`), ErrMalformed, "attribute"},
		{"attribute of the root", []byte(`<plist version="1.0" onload="x"><dict/></plist>`), ErrMalformed, "attribute"},
		{"UDID is data", wrap(str("Status", "Idle") + "<key>UDID</key><data/>"), ErrMalformed, "UDID is data, not string"},
		{"empty status", wrap(str("Status", "")), ErrMissingKey, "Status"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, err := Decode(tt.body)
			require.ErrorIs(t, err, tt.want)
			require.ErrorContains(t, err, tt.text)
			require.Nil(t, m)
		})
	}
	_, err := DecodeReport(wrap(str("MessageType", "CheckOut")))
	require.ErrorIs(t, err, ErrMissingKey)
	_, err = DecodeCheckin(wrap(str("Status", "Idle")))
	require.ErrorIs(t, err, ErrMissingKey)
}

func TestReportCommandUUID(t *testing.T) {
	for _, tt := range []struct {
		name, element, want string
		bad                 bool
	}{
		{"any text", "<string>0001_Lock é/:</string>", "0001_Lock é/:", false},
		{"longest", "<string>" + strings.Repeat("x", 255) + "</string>", strings.Repeat("x", 255), false},
		{"too long", "<string>" + strings.Repeat("x", 256) + "</string>", "", true},
		{"newline", "<string>a\nb</string>", "", true},
		{"C1", "<string>a&#133;b</string>", "", true},
		{"integer", "<integer> 12 </integer>", "12", false},
		{"illegal character", "<string>a\x01</string>", "", true},
		{"latin 1", "<string>\xe9</string>", "", true},
		{"dict", "<dict><key>a</key><true/></dict>", "", true},
		{"empty", "<string></string>", "", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := DecodeReport(wrap(udidKey + str("Status", "Acknowledged") + "<key>CommandUUID</key>" + tt.element))
			require.NoError(t, err)
			require.Equal(t, tt.want, r.CommandUUID)
			require.Equal(t, tt.bad, r.BadCommandUUID)
		})
	}
}

func TestReportErrorChain(t *testing.T) {
	code := func(element string) string {
		return "<array><dict><key>ErrorCode</key>" + element + "</dict></array>"
	}
	for _, tt := range []struct {
		name, chain string
		want        []ErrorChainItem
	}{
		{"negative", code("<integer>-5</integer>"), []ErrorChainItem{{ErrorCode: -5}}},
		{"spaces", code("<integer> 7\n</integer>"), []ErrorChainItem{{ErrorCode: 7}}},
		{"real", code("<real>4001.9</real>"), []ErrorChainItem{{ErrorCode: 4001}}},
		{"huge", code("<integer>99999999999999999999999</integer>"), []ErrorChainItem{{ErrorCode: 1<<63 - 1}}},
		{"huge negative", code("<integer>-99999999999999999999999</integer>"), []ErrorChainItem{{ErrorCode: -1 << 63}}},
		{"huge real", code("<real>1e999</real>"), []ErrorChainItem{{ErrorCode: 1<<63 - 1}}},
		{"small real", code("<real>-1e30</real>"), []ErrorChainItem{{ErrorCode: -1 << 63}}},
		{"not a number", code("<real>nan</real>"), []ErrorChainItem{{}}},
		{"garbage", code("<integer>x</integer>"), []ErrorChainItem{{}}},
		{"string code", code("<string>5</string>"), []ErrorChainItem{{ErrorCode: 5}}},
		{"odd items", "<array><string>x</string><dict/><array><dict/></array></array>", []ErrorChainItem{{}}},
		{"domain is integer", "<array><dict><key>ErrorDomain</key><integer>1</integer></dict></array>", []ErrorChainItem{{ErrorDomain: "1"}}},
		{"no array", "<string>x</string>", nil},
		{"dict", "<dict>" + str("ErrorDomain", "x") + "</dict>", nil},
		{"bounded", "<array>" + strings.Repeat("<dict/>", 1000) + "</array>", make([]ErrorChainItem, maxErrorChain)},
		{"the last wins", code("<integer>1</integer>") + "<key>ErrorChain</key>" + code("<integer>2</integer>"), []ErrorChainItem{{ErrorCode: 2}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := DecodeReport(wrap(udidKey + str("Status", "Error") + str("CommandUUID", "c") + "<key>ErrorChain</key>" + tt.chain))
			require.NoError(t, err)
			require.Equal(t, tt.want, r.ErrorChain)
		})
	}
}

func TestStatusTerminal(t *testing.T) {
	for s, want := range map[Status]bool{
		StatusIdle: false, StatusNotNow: false, "": false, "Later": false, "acknowledged": false,
		StatusAcknowledged: true, StatusError: true, StatusCommandFormatError: true, StatusUnreadable: true,
	} {
		require.Equal(t, want, s.Terminal(), "%q", s)
	}
}

// TestScanAccepts holds shapes of XML that mean the same list.
func TestScanAccepts(t *testing.T) {
	idle := "<key>UDID</key><string>U</string><key>Status</key><string>Idle</string>"
	for name, body := range map[string]string{
		"plain":                 "<plist><dict>" + idle + "</dict></plist>",
		"no plist element":      "<dict>" + idle + "</dict>",
		"byte order mark":       "\xef\xbb\xbf" + string(wrap(idle)),
		"leading space":         "\n " + string(wrap(idle)),
		"trailing comment":      string(wrap(idle)) + "<!-- bye -->\n",
		"single quotes":         "<?xml version='1.0' encoding='utf-8' standalone='yes' ?><!DOCTYPE plist SYSTEM 'x>y'><plist version='1.0' ><dict >" + idle + "</dict ></plist\n>",
		"comments":              "<!-- a --><plist><!-- b --><dict><!-- c --><key>UDID</key><!-- d --><string>U<!-- e --></string><!----><key>Sta<!-- f -->tus</key><string>Id<!-- g -->le</string></dict></plist>",
		"CDATA":                 "<plist><dict><key><![CDATA[UDID]]></key><string><![CDATA[U]]></string><key>Status</key><string>I<![CDATA[dl]]>e</string></dict></plist>",
		"references":            "<plist><dict><key>U&#68;I&#x44;</key><string>&#x55;</string><key>Status</key><string>&#0073;dle</string></dict></plist>",
		"empty elements":        "<plist><dict>" + idle + "<key/><string/><key>a</key><dict /><key>b</key><array></array><key>c</key><true></true><key>d</key><data/></dict></plist>",
		"the last key counts":   "<plist><dict><key>Status</key><integer>1</integer><key>UDID</key><string>V</string>" + idle + "</dict></plist>",
		"unread odd scalars":    "<plist><dict>" + idle + "<key>a</key><date>yesterday</date><key>b</key><integer>many</integer><key>c</key><data>?</data><key>d</key><real/></dict></plist>",
		"deepest":               "<plist><dict>" + idle + "<key>a</key>" + strings.Repeat("<array>", maxDepth-1) + strings.Repeat("</array>", maxDepth-1) + "</dict></plist>",
		"text that looks wrong": "<plist><dict>" + idle + "<key>a</key><string>]] ]> > \" ' &#93;]> \u00ef \ufffd</string></dict></plist>",
	} {
		t.Run(name, func(t *testing.T) {
			m, err := Decode([]byte(body))
			require.NoError(t, err)
			require.Equal(t, &Report{Enrollment: Enrollment{UDID: "U"}, Status: StatusIdle, Raw: []byte(body)}, m)
		})
	}
}

func TestScanText(t *testing.T) {
	for in, want := range map[string]string{
		" a ":                          " a ",
		"a\r\nb\rc\nd":                 "a\nb\nc\nd",
		"&#13;\n":                      "\r\n",
		"\r<!-- -->\n":                 "\n\n",
		"&lt;&gt;&amp;&quot;&apos;":    "<>&\"'",
		"<![CDATA[&lt;<b>]]]>":         "&lt;<b>]",
		"<![CDATA[\r\n]]>\r":           "\n\n",
		"&amp;lt;":                     "&lt;",
		"&#x1F600;\U0001F600":          "\U0001F600\U0001F600",
		"<![CDATA[<!-- ]]>x<!-- y -->": "<!-- x",
	} {
		r, err := DecodeReport(wrap(str("UserLongName", in) + str("Status", "Idle")))
		require.NoError(t, err, "%q", in)
		require.Equal(t, want, r.UserLongName, "%q", in)
	}
}

// oddTexts are texts that no XML document has, as devices send them, and what
// they are read as.
var oddTexts = []struct{ name, text, want string }{
	{"control character", "Notes\x01", "Notes\ufffd"},
	{"NUL", "Notes\x00", "Notes\ufffd"},
	{"reference to NUL", "Notes&#0;", "Notes\ufffd"},
	{"reference to a control character", "a&#x1F;b", "a\ufffdb"},
	{"references to surrogates", "x&#55357;&#56831;y", "x\U0001f5ffy"},
	{"hexadecimal references to surrogates", "&#xD83D;&#xDDFF;", "\U0001f5ff"},
	{"references to surrogates in the wrong order", "&#56831;&#55357;", "\ufffd\ufffd"},
	{"reference to half a character", "&#55357;&amp;", "\ufffd&"},
	{"half a character at the end", "&#55357;", "\ufffd"},
	{"cut emoji", "Anna \xf0\x9f\x98", "Anna \ufffd\ufffd\ufffd"},
	{"latin 1", "Ren\xe9e", "Ren\ufffde"},
	{"surrogate in bytes", "\xed\xa0\xbd", "\ufffd\ufffd\ufffd"},
	{"U+FFFE", "a\ufffeb", "a\ufffdb"},
	{"U+FFFF", "a\uffff", "a\ufffd"},
	{"cut U+FFFF", "a\xef\xbf", "a\ufffd\ufffd"},
	{"bare ampersand", "Mac & more", "Mac & more"},
	{"ampersand at the end", "Mac &", "Mac &"},
	{"unknown name", "&nbsp;&eacute;", "&nbsp;&eacute;"},
	{"reference without digits", "&#;&#x;", "&#;&#x;"},
	{"reference without end", "&#65", "&#65"},
	{"reference beyond Unicode", "&#x110000;&#x100000041;", "\ufffd\ufffd"},
	{"end of CDATA", "a]]>b", "a]]>b"},
	{"CDATA", "<![CDATA[&\x02<b>]]>", "&\ufffd<b>"},
	{"less than", "a < b <3 <b>c</b>", "a < b <3 <b>c</b>"},
	{"line ends", "\x01\r\n\r", "\ufffd\n\n"},
	{"comment with two dashes", "a<!-- -- \x01 -->b", "ab"},
}

func TestDecodeOddTexts(t *testing.T) {
	for _, tt := range oddTexts {
		t.Run(tt.name, func(t *testing.T) {
			body := wrap(str("MessageType", "Authenticate") + str("Topic", topic) + str("DeviceName", tt.text) + udidKey)
			m, err := Decode(body)
			require.NoError(t, err)
			require.Equal(t, &Authenticate{Enrollment: Enrollment{UDID: macUDID}, Topic: topic, DeviceName: tt.want, Raw: body}, m)

			// The odd text is one that nobody reads.
			body = wrap(str("CommandUUID", "c1") + "<key>Apps</key><array><dict>" + str("Name", tt.text) + str("Odd"+tt.text, "x") + "</dict></array>" +
				str("Status", "Acknowledged") + udidKey)
			r, err := DecodeReport(body)
			require.NoError(t, err)
			require.Equal(t, &Report{Enrollment: Enrollment{UDID: macUDID}, Status: StatusAcknowledged, CommandUUID: "c1", Raw: body}, r)

			v, err := DecodePlist(body)
			require.NoError(t, err)
			require.Equal(t, []any{map[string]any{"Name": tt.want, "Odd" + tt.want: "x"}}, v["Apps"])
		})
	}
}

// TestDecodeOddTypes holds values that are not of the type they are due in.
func TestDecodeOddTypes(t *testing.T) {
	body := wrap(str("MessageType", "Authenticate") + "<key>Topic</key><string>t</string><key>UDID</key><integer>42</integer>" +
		"<key>IMEI</key><integer>350000000000000</integer><key>OSVersion</key><real>15.1</real><key>MEID</key><array/><key>Model</key><true/>" +
		"<key>SerialNumber</key><integer>007</integer><key>DeviceName</key><dict><key>UDID</key><string>x</string></dict>")
	m, err := Decode(body)
	require.NoError(t, err)
	require.Equal(t, &Authenticate{Enrollment: Enrollment{UDID: "42"}, Topic: "t", IMEI: "350000000000000", OSVersion: "15.1",
		SerialNumber: "007", Raw: body}, m)

	for element, want := range map[string]bool{
		"<true/>": true, "<false/>": false, "<integer>1</integer>": true, "<integer>0</integer>": false, "<string>YES</string>": false,
		"<string>True</string>": true, "<string>1</string>": true, "<integer>2</integer>": false, "<array/>": false,
	} {
		m, err := Decode(wrap(tokenKeys + udidKey + "<key>AwaitingConfiguration</key>" + element + "<key>UnlockToken</key><string>x</string>"))
		require.NoError(t, err)
		require.Equal(t, want, m.(*TokenUpdate).AwaitingConfiguration, element)
		require.Nil(t, m.(*TokenUpdate).UnlockToken)
	}
	r, err := DecodeReport(wrap(udidKey + str("Status", " Idle\n")))
	require.NoError(t, err)
	require.Equal(t, StatusIdle, r.Status)
}

func TestUnreadable(t *testing.T) {
	for _, tt := range []struct {
		name, body string
		want       Report
	}{
		{"nothing", "", Report{}},
		{"garbage", "\xff\x00{}", Report{}},
		{"cut", "<plist><dict>" + str("CommandUUID", "c1") + "<key>Apps</key><array><dict>", Report{CommandUUID: "c1"}},
		{"broken in the middle", "<plist><dict>" + str("CommandUUID", "c1") + "<key>Apps</key><array></dict>" + str("Status", "Acknowledged") + udidKey + str("UserID", "u"),
			Report{CommandUUID: "c1", Enrollment: Enrollment{UDID: macUDID, UserID: "u"}}},
		{"the last one counts", str("UDID", "first") + str("UDID", "last"), Report{Enrollment: Enrollment{UDID: "last"}}},
		{"no string", "<key>UDID</key><integer>1</integer><key>CommandUUID</key>", Report{}},
		{"illegal characters and references", str("UDID", "a\x01") + str("UserID", "\xe9") + str("CommandUUID", "a&amp;b"), Report{}},
		{"too long", str("UDID", strings.Repeat("x", MaxIDLen+1)), Report{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.want.Status, tt.want.Raw = StatusUnreadable, []byte(tt.body)
			require.Equal(t, &tt.want, Unreadable([]byte(tt.body)))
		})
	}
}

// hostile are bodies that must be refused, with what the error says.
var hostile = []struct {
	name string
	body string
	text string
}{
	{"empty", "", "unexpected end at offset 0"},
	{"space", " \n", "unexpected end at offset 2"},
	{"JSON", `{"MessageType":"Authenticate"}`, "text where a tag is wanted at offset 0"},
	{"binary plist", "bplist00\xd1\x01\x02", "binary property list at offset 0"},
	{"cyclic binary plist", "bplist00\xa1\x00\x08\x00\x00\x00\x00\x00\x00\x01\x01\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x0a", "binary property list"},
	{"gzip", "\x1f\x8b\x08\x00\x00", "gzip"},
	{"UTF-16 with mark", "\xff\xfe<\x00p\x00", "UTF-16"},
	{"UTF-16 without mark", "\x00<\x00p", "UTF-16"},
	{"entity bomb", `<?xml version="1.0"?><!DOCTYPE plist [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><plist><dict><key>&b;</key><true/></dict></plist>`, "document type with declarations at offset 37"},
	{"external entity", `<!DOCTYPE plist SYSTEM "file:///etc/passwd" [ ]><plist><dict/></plist>`, "document type with declarations"},
	{"endless doctype", `<!DOCTYPE plist "`, "document type without end"},
	{"two doctypes", "<!DOCTYPE a><!DOCTYPE b><plist><dict/></plist>", "no property list element"},
	{"processing instruction", "<plist><?php echo ?><dict/></plist>", "no property list element"},
	{"second document", "<plist><dict/></plist><plist><dict/></plist>", "trailing garbage"},
	{"two values", "<plist><dict/><dict/></plist>", "</plist> wanted at offset 14"},
	{"no value", "<plist></plist>", "no property list element"},
	{"empty plist", "<plist/>", "empty plist"},
	{"array", "<plist><array/></plist>", "array where a dict is wanted"},
	{"string", "<plist><string>x</string></plist>", "string where a dict is wanted"},
	{"unknown element", "<plist><dict><key>a</key><set/></dict></plist>", "no property list element at offset 25"},
	{"HTML", "<html></html>", "no property list element at offset 0"},
	{"prefix", "<plist><x:dict/></plist>", "no property list element"},
	{"long name", "<plist><dictt/></plist>", "no property list element"},
	{"case", "<plist><Dict/></plist>", "no property list element"},
	{"key without value", "<plist><dict><key>a</key></dict></plist>", "no property list element"},
	{"two keys", "<plist><dict><key>a</key><key>b</key></dict></plist>", "key where a value is wanted"},
	{"value without key", "<plist><dict><true/></dict></plist>", "true where a key is wanted"},
	{"key in array", "<plist><dict><key>a</key><array><key>b</key></array></dict></plist>", "key where a value is wanted"},
	{"nested plist", "<plist><dict><key>a</key><plist><dict/></plist></dict></plist>", "plist where a value is wanted"},
	{"element in string", "<plist><dict><key>a</key><string><true/></string></dict></plist>", "element in string"},
	{"wrong end", "<plist><dict></array></plist>", "</dict> wanted at offset 13"},
	{"wrong scalar end", "<plist><dict><key>a</string></dict></plist>", "</key> wanted"},
	{"end too early", "<plist></dict>", "no property list element"},
	{"attribute without quotes", "<plist version=1.0><dict/></plist>", "attribute without quotes"},
	{"attribute without value", "<plist version><dict/></plist>", "attribute without value"},
	{"attribute with tag", `<plist version="<"><dict/></plist>`, "invalid character in attribute"},
	{"bad slash", "<plist><dict/ ></plist>", "malformed tag"},
	{"endless comment", "<plist><!-- ", "malformed comment"},
	{"endless CDATA", "<plist><dict><key><![CDATA[x]]", "unexpected end"},
	{"too deep", "<plist><dict><key>a</key>" + strings.Repeat("<array>", maxDepth), "more than 64 levels"},
	{"8 MB of arrays", "<plist><dict><key>a</key>" + strings.Repeat("<array>", 8<<20/7), "more than 64 levels"},
	{"8 MB of dicts", "<plist>" + strings.Repeat("<dict><key>a</key>", 8<<20/18), "more than 64 levels"},
	{"8 MB of references", "<plist><dict><key>a</key><string>" + strings.Repeat("&amp;", 8<<20/5), "unexpected end"},
	{"8 MB of comments", strings.Repeat("<!---->", 8<<20/7), "unexpected end"},
	{"8 MB of comment starts", "<plist><dict><key>" + strings.Repeat("<!--", 8<<20/4), "malformed comment"},
	{"8 MB of open strings", "<plist><dict>" + strings.Repeat("<key>a</key><string>", 8<<20/20), "element in string"},
}

// damaged are bodies that are no sound property lists, with what is wrong, and
// have one meaning all the same.
var damaged = []struct {
	name string
	body string
	text string
}{
	{"latin 1", "<plist><dict><key>a</key><string>\xe9</string></dict></plist>", "invalid UTF-8 at offset 33"},
	{"other encoding", `<?xml version="1.0" encoding="ISO-8859-1"?><plist><dict/></plist>`, "XML declaration"},
	{"other version", `<?xml version="1.1"?><plist><dict/></plist>`, "XML declaration"},
	{"undeclared entity", "<plist><dict><key>&b;</key><true/></dict></plist>", "unknown reference at offset 18"},
	{"NUL in text", "<plist><dict><key>a</key><string>\x00</string></dict></plist>", "illegal character at offset 33"},
	{"NUL between", "<plist><dict>\x00</dict></plist>", "text where a tag is wanted at offset 13"},
	{"NUL in CDATA", "<plist><dict><key><![CDATA[\x00]]></key><true/></dict></plist>", "illegal character"},
	{"NUL in comment", "<plist><!-- \x00 --><dict/></plist>", "control character in comment"},
	{"NUL after the end", "<plist><dict/></plist>\x00", "trailing garbage at offset 22"},
	{"NUL reference", "<plist><dict><key>&#0;</key><true/></dict></plist>", "unknown reference"},
	{"surrogate reference", "<plist><dict><key>&#xD800;</key><true/></dict></plist>", "unknown reference"},
	{"overflowing reference", "<plist><dict><key>&#x100000041;</key><true/></dict></plist>", "unknown reference"},
	{"empty reference", "<plist><dict><key>&#x;</key><true/></dict></plist>", "unknown reference"},
	{"bare ampersand", "<plist><dict><key>a & b</key><true/></dict></plist>", "unknown reference"},
	{"noncharacter", "<plist><dict><key>\uffff</key><true/></dict></plist>", "illegal character"},
	{"CDATA end", "<plist><dict><key>]]></key><true/></dict></plist>", "]]> in text"},
	{"garbage after the end", "<plist><dict/></plist>x", "trailing garbage"},
	{"text in true", "<plist><dict><key>a</key><true>no</true></dict></plist>", "text in true"},
	{"text in dict", "<plist><dict>x</dict></plist>", "text where a tag is wanted"},
	{"double dash in comment", "<plist><!-- -- --><dict/></plist>", "malformed comment"},
}

func TestScanDamaged(t *testing.T) {
	for _, tt := range damaged {
		t.Run(tt.name, func(t *testing.T) {
			for _, m := range []manner{usual, strict} {
				err := scan(new(document), []byte(tt.body), m)
				require.ErrorIs(t, err, ErrMalformed)
				require.ErrorContains(t, err, tt.text)
			}
			require.NoError(t, scan(new(document), []byte(tt.body), tolerant))
		})
	}
}

func TestDecodeHostile(t *testing.T) {
	for _, tt := range hostile {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Decode([]byte(tt.body))
			require.ErrorIs(t, err, ErrMalformed)
			require.ErrorContains(t, err, tt.text)
			require.Less(t, len(err.Error()), 200, "errors do not repeat the body")
		})
	}
}

func TestDecodeTruncated(t *testing.T) {
	for _, tt := range messages {
		body := bytes.TrimSpace(tt.body)
		for i := range body {
			_, err := Decode(body[:i])
			require.ErrorIs(t, err, ErrMalformed, "%s cut at %d", tt.name, i)
		}
	}
}

// TestScanGarbage bounds what a large report leaves to the collector.
func TestScanGarbage(t *testing.T) {
	body := bigReport(2 << 20)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := DecodeReport(body)
	runtime.ReadMemStats(&after)
	require.NoError(t, err)
	require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(8192))
}

// bigReport is an InstalledApplicationList of about size bytes.
func bigReport(size int) []byte {
	var b strings.Builder
	b.WriteString("<key>InstalledApplicationList</key>\n<array>\n")
	for i := 0; b.Len() < size; i++ {
		fmt.Fprintf(&b, "\t<dict>\n\t\t<key>Identifier</key>\n\t\t<string>com.example.app%d</string>\n\t\t<key>Name</key>\n\t\t<string>Tools &amp; Toys %d</string>\n"+
			"\t\t<key>BundleSize</key>\n\t\t<integer>%d</integer>\n\t\t<key>Installing</key>\n\t\t<false/>\n\t\t<key>Blob</key>\n\t\t<data>\n\t\t%s\n\t\t</data>\n\t</dict>\n",
			i, i, i*4096, strings.Repeat("QUJD", 16))
	}
	b.WriteString("</array>\n")
	return wrap(b.String() + str("CommandUUID", "b7a3f8e2-5f1d-4c6b-9a0e-2d3c4b5a6978") + str("Status", "Acknowledged") + udidKey)
}

func BenchmarkDecodeReport(b *testing.B) {
	small := bigReport(0)
	small = bytes.Replace(small, []byte("</array>\n"), []byte("\t<dict>\n\t\t<key>Identifier</key>\n\t\t<string>com.example.app</string>\n\t</dict>\n</array>\n"), 1)
	for _, bb := range []struct {
		name string
		body []byte
	}{{"700B", small}, {"2MB", bigReport(2 << 20)}} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(bb.body)))
			for b.Loop() {
				if _, err := DecodeReport(bb.body); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
