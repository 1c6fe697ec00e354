package mdm

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// ErrDMEndpoint is wrapped by every error of [ParseDMEndpoint].
var ErrDMEndpoint = errors.New("unknown declarative management endpoint")

// DMEndpointName is the first segment of a declarative management endpoint.
type DMEndpointName string

// The endpoints that Apple defines.
const (
	DMTokens           DMEndpointName = "tokens"
	DMDeclarationItems DMEndpointName = "declaration-items"
	DMStatus           DMEndpointName = "status"
	DMDeclaration      DMEndpointName = "declaration"
)

// DMEndpoint is a parsed Endpoint of a [DeclarativeManagement] message.
type DMEndpoint struct {
	Name DMEndpointName
	// Type and Identifier are set for DMDeclaration only. Type is one of
	// activation, asset, configuration and management.
	Type       string
	Identifier string
}

// ParseDMEndpoint parses the endpoint a device asks for. The identifier of a
// declaration may hold any character but control characters, slashes
// included; "." and ".." are refused because no escaping keeps them from
// being path navigation. Errors wrap [ErrDMEndpoint].
func ParseDMEndpoint(s string) (DMEndpoint, error) {
	switch name := DMEndpointName(s); name {
	case DMTokens, DMDeclarationItems, DMStatus:
		return DMEndpoint{Name: name}, nil
	}
	rest, ok := strings.CutPrefix(s, string(DMDeclaration)+"/")
	if !ok {
		return DMEndpoint{}, ErrDMEndpoint
	}
	typ, identifier, ok := strings.Cut(rest, "/")
	if !ok {
		return DMEndpoint{}, fmt.Errorf("%w: declaration without identifier", ErrDMEndpoint)
	}
	switch typ {
	case "activation", "asset", "configuration", "management":
	default:
		return DMEndpoint{}, fmt.Errorf("%w: declaration type is none of activation, asset, configuration, management", ErrDMEndpoint)
	}
	switch identifier {
	case "":
		return DMEndpoint{}, fmt.Errorf("%w: declaration without identifier", ErrDMEndpoint)
	case ".", "..":
		return DMEndpoint{}, fmt.Errorf("%w: declaration identifier is a path element", ErrDMEndpoint)
	}
	if why := badID(identifier); why != "" {
		return DMEndpoint{}, fmt.Errorf("%w: %s in declaration identifier", ErrDMEndpoint, why)
	}
	return DMEndpoint{Name: DMDeclaration, Type: typ, Identifier: identifier}, nil
}

// Path returns the endpoint as a relative URL path without a leading slash.
// The identifier is escaped into a single segment.
func (e DMEndpoint) Path() string {
	if e.Name != DMDeclaration {
		return string(e.Name)
	}
	return string(e.Name) + "/" + e.Type + "/" + url.PathEscape(e.Identifier)
}
