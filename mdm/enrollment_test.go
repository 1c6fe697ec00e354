package mdm

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestResolve(t *testing.T) {
	long := strings.Repeat("x", MaxIDLen)
	for _, tt := range []struct {
		name string
		in   Enrollment
		want EnrollID
		err  string
	}{
		{name: "device", in: Enrollment{UDID: "aB-1"}, want: EnrollID{Device, "aB-1", ""}},
		{name: "longest", in: Enrollment{UDID: long}, want: EnrollID{Device, long, ""}},
		{name: "trailing space is kept", in: Enrollment{UDID: "a "}, want: EnrollID{Device, "a ", ""}},
		{name: "names alone make no user", in: Enrollment{UDID: "a", UserShortName: "s", UserLongName: "l"}, want: EnrollID{Device, "a", ""}},
		{name: "user", in: Enrollment{UDID: "a", UserID: "u", UserShortName: "s"}, want: EnrollID{User, "a:u", "a"}},
		{name: "colon in user", in: Enrollment{UDID: "a", UserID: "u:v"}, want: EnrollID{User, "a:u:v", "a"}},
		{name: "Shared iPad", in: Enrollment{UDID: "a", UserID: SharediPadUserID, UserShortName: "s"}, want: EnrollID{SharediPad, "a:s", "a"}},
		{name: "UDID wins", in: Enrollment{UDID: "a", EnrollmentID: "e", EnrollmentUserID: "f"}, want: EnrollID{Device, "a", ""}},
		{name: "user enrollment, device", in: Enrollment{EnrollmentID: "e"}, want: EnrollID{UserEnrollmentDevice, "e", ""}},
		{name: "user enrollment, user", in: Enrollment{EnrollmentID: "e", EnrollmentUserID: "f", UserID: "u"}, want: EnrollID{UserEnrollment, "e:f", "e"}},
		{name: "nothing", err: "neither UDID nor EnrollmentID"},
		{name: "user only", in: Enrollment{UserID: "u", EnrollmentUserID: "f"}, err: "neither UDID nor EnrollmentID"},
		{name: "Shared iPad without name", in: Enrollment{UDID: "a", UserID: SharediPadUserID, UserLongName: "l"}, err: "Shared iPad user without UserShortName"},
		{name: "colon", in: Enrollment{UDID: "a:b"}, err: "colon in UDID"},
		{name: "colon in EnrollmentID", in: Enrollment{EnrollmentID: "a:b"}, err: "colon in EnrollmentID"},
		{name: "control character", in: Enrollment{UDID: "a\nb"}, err: "control characters in UDID"},
		{name: "delete", in: Enrollment{EnrollmentID: "a\x7f"}, err: "control characters in EnrollmentID"},
		{name: "control character in user", in: Enrollment{UDID: "a", UserID: "\u0085"}, err: "control characters in UserID"},
		{name: "control character in short name", in: Enrollment{UDID: "a", UserID: SharediPadUserID, UserShortName: "a\tb"}, err: "control characters in UserShortName"},
		{name: "too long", in: Enrollment{UDID: long + "x"}, err: "more than 255 bytes in UDID"},
		{name: "too long together", in: Enrollment{UDID: "a", UserID: long}, err: "more than 255 bytes in UDID and UserID together"},
		{name: "bytes, not characters", in: Enrollment{EnrollmentID: strings.Repeat("é", 128)}, err: "more than 255 bytes in EnrollmentID"},
		{name: "invalid UTF-8", in: Enrollment{UDID: "a\xff"}, err: "invalid UTF-8 in UDID"},
		{name: "invalid UTF-8 in user", in: Enrollment{EnrollmentID: "a", EnrollmentUserID: "\xff"}, err: "invalid UTF-8 in EnrollmentUserID"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.in.Resolve()
			if tt.err != "" {
				require.ErrorIs(t, err, ErrIdentity)
				require.ErrorContains(t, err, tt.err)
				require.Zero(t, got)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tt.want, got)
			if got.ParentID == "" {
				require.Equal(t, got.ID, got.DeviceID())
				require.False(t, got.IsUserChannel())
			} else {
				require.Equal(t, got.ParentID, got.DeviceID())
				require.True(t, got.IsUserChannel())
			}
		})
	}
}

func TestParseDMEndpoint(t *testing.T) {
	for _, tt := range []struct {
		in, path string
		want     DMEndpoint
		err      string
	}{
		{in: "tokens", path: "tokens", want: DMEndpoint{Name: DMTokens}},
		{in: "declaration-items", path: "declaration-items", want: DMEndpoint{Name: DMDeclarationItems}},
		{in: "status", path: "status", want: DMEndpoint{Name: DMStatus}},
		{in: "declaration/activation/com.example.a", path: "declaration/activation/com.example.a", want: DMEndpoint{DMDeclaration, "activation", "com.example.a"}},
		{in: "declaration/asset/a/b?c#d %2e", path: "declaration/asset/a%2Fb%3Fc%23d%20%252e", want: DMEndpoint{DMDeclaration, "asset", "a/b?c#d %2e"}},
		{in: "declaration/configuration/...", path: "declaration/configuration/...", want: DMEndpoint{DMDeclaration, "configuration", "..."}},
		{in: "declaration/management/../x", path: "declaration/management/..%2Fx", want: DMEndpoint{DMDeclaration, "management", "../x"}},
		{in: "", err: "unknown"},
		{in: "Tokens", err: "unknown"},
		{in: "tokens/", err: "unknown"},
		{in: "/tokens", err: "unknown"},
		{in: "declaration", err: "unknown"},
		{in: "declaration/", err: "without identifier"},
		{in: "declaration/asset", err: "without identifier"},
		{in: "declaration/asset/", err: "without identifier"},
		{in: "declaration/legacy/a", err: "type is none"},
		{in: "declaration/asset/.", err: "path element"},
		{in: "declaration/asset/..", err: "path element"},
		{in: "declaration/asset/a\nb", err: "control characters"},
		{in: "declaration/asset/\xff", err: "invalid UTF-8"},
		{in: "declaration/asset/" + strings.Repeat("x", 256), err: "more than 255 bytes"},
	} {
		t.Run(tt.in, func(t *testing.T) {
			got, err := ParseDMEndpoint(tt.in)
			if tt.err != "" {
				require.ErrorIs(t, err, ErrDMEndpoint)
				require.ErrorContains(t, err, tt.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tt.want, got)
			require.Equal(t, tt.path, got.Path())
		})
	}
}
