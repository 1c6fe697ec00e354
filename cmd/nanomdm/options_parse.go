package main

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"

	"github.com/nanomdm/nanomdm/storage"
)

// to returns a setter that parses a text into p, and leaves p alone on error.
func to[T any](p *T, parse func(string) (T, error)) func(string) error {
	return func(text string) error {
		v, err := parse(text)
		if err != nil {
			return err
		}
		*p = v
		return nil
	}
}

func parseText(s string) (string, error)   { return s, nil }
func parseSecret(s string) (secret, error) { return secret(s), nil }

func parseSwitch(s string) (bool, error) {
	v, err := strconv.ParseBool(s)
	if err != nil {
		return false, fmt.Errorf("%q is neither true nor false", s)
	}
	return v, nil
}

// unixPrefix begins an address that is the path of a Unix socket.
const unixPrefix = "unix:"

func parseListen(s string) (string, error) {
	if path, ok := strings.CutPrefix(s, unixPrefix); ok {
		if path == "" {
			return "", fmt.Errorf("%q names no socket: write unix:/run/nanomdm/nanomdm.sock", s)
		}
		return s, nil
	}
	if _, _, err := net.SplitHostPort(s); err != nil {
		return "", fmt.Errorf("%q is not HOST:PORT, such as :9000 or 127.0.0.1:9000, and not unix:PATH", s)
	}
	return s, nil
}

func parseReenroll(s string) (storage.Reenroll, error) {
	switch s {
	case "allow":
		return storage.ReenrollAllow, nil
	case "same-subject":
		return storage.ReenrollSameSubject, nil
	case "deny":
		return storage.ReenrollDeny, nil
	}
	return 0, fmt.Errorf("%q is not a policy: use allow, same-subject or deny", s)
}

func parseExpired(s string) (allow bool, err error) {
	switch s {
	case "refuse", "pinned":
		return s == "pinned", nil
	}
	return false, fmt.Errorf("%q is not a policy: use refuse or pinned", s)
}

func parseRenewal(s string) (storage.Renewal, error) {
	switch s {
	case "deny":
		return storage.RenewalDeny, nil
	case "window":
		return storage.RenewalWindow, nil
	case "same-subject":
		return storage.RenewalSameSubject, nil
	}
	return 0, fmt.Errorf("%q is not a policy: use deny, window or same-subject", s)
}

func parseLogFormat(s string) (string, error) {
	switch s {
	case logText, logJSON:
		return s, nil
	}
	return "", fmt.Errorf("%q is not a format: use text or json", s)
}

func parseHeaderName(s string) (string, error) {
	if s != "" && !httpguts.ValidHeaderFieldName(strings.TrimPrefix(s, ":")) {
		return "", fmt.Errorf("%q is not the name of a header", s)
	}
	return s, nil
}

// parseTopicCAs reads files by APNs topic.
func parseTopicCAs(s string) (map[string]string, error) {
	files := make(map[string]string)
	for _, field := range fields(s) {
		topic, file, _ := strings.Cut(field, "=")
		switch _, twice := files[topic]; {
		case topic == "" || file == "":
			return nil, fmt.Errorf("%q is not TOPIC=FILE, such as com.apple.mgmt.External.1=ca.pem", field)
		case twice:
			return nil, fmt.Errorf("%s is there twice: name one file with all of its CAs", topic)
		}
		files[topic] = file
	}
	return files, nil
}

// plainPath is a path that a mux takes as it is.
var plainPath = regexp.MustCompile(`^(/[A-Za-z0-9._~-]+)+$`)

// ownPaths are the daemon's, and begin those that are its own, too.
var ownPaths = []string{"/v1", "/authproxy", "/healthz", "/readyz", "/metrics", "/version", "/migration"}

// parsePaths reads paths for devices besides the daemon's own.
func parsePaths(s string) ([]string, error) {
	list := fields(s)
	for i, path := range list {
		if !plainPath.MatchString(path) || strings.Contains(path+"/", "/../") || strings.Contains(path+"/", "/./") {
			return nil, fmt.Errorf("%q is not a path such as /mdm/apple/mdm", path)
		}
		own := slices.ContainsFunc(ownPaths, func(p string) bool { return strings.HasPrefix(path+"/", p+"/") })
		if own || path == "/mdm" || path == "/checkin" {
			return nil, fmt.Errorf("%q is the daemon's own", path)
		}
		if slices.Contains(list[:i], path) {
			return nil, fmt.Errorf("%q is there twice", path)
		}
	}
	return list, nil
}

func parseNames(s string) ([]string, error) { return fields(s), nil }

func parsePrefixes(s string) ([]netip.Prefix, error) {
	var list []netip.Prefix
	for _, field := range fields(s) {
		prefix, err := netip.ParsePrefix(field)
		if err != nil {
			addr, err := netip.ParseAddr(field)
			if err != nil {
				return nil, fmt.Errorf("%q is not a network such as 10.0.0.0/8", field)
			}
			prefix = netip.PrefixFrom(addr, addr.BitLen())
		}
		list = append(list, prefix.Masked())
	}
	return list, nil
}

// parseURL does not repeat the text in its error: it may hold a password.
func parseURL(s string) (*url.URL, error) {
	if s == "" {
		return nil, nil
	}
	u, err := url.Parse(s)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Hostname() == "" {
		return nil, errors.New("not a URL with http or https and a host, such as https://mdm.example.org/")
	}
	return u, nil
}

func parseHTTPSURL(s string) (*url.URL, error) {
	u, err := parseURL(s)
	if err != nil || u == nil || u.Scheme != "https" {
		return nil, errors.New("not a URL with https and a host, such as https://api.push.apple.com")
	}
	return u, nil
}

func parseStorage(s string) (string, error) {
	switch s {
	case "sqlite", "pgsql", "mysql":
		return s, nil
	case "file", "filekv", "inmem", "dbkv":
		return "", fmt.Errorf("%s is a store of NanoMDM's that this daemon does not have: "+
			"use sqlite (or pgsql, mysql), and %s", s, howToMove)
	}
	return "", fmt.Errorf("%q is not a database: use sqlite, pgsql (PostgreSQL) or mysql (MySQL, MariaDB)", s)
}

func parseStorageOptions(s string) (storageOptions, error) {
	var o storageOptions
	var seen []string
	for _, field := range fields(s) {
		key, value, _ := strings.Cut(field, "=")
		if slices.Contains(seen, key) {
			return o, fmt.Errorf("%s is given twice: keep one", key)
		}
		seen = append(seen, key)
		var err error
		switch key {
		case "delete":
			err = to(&o.deleteAcked, parseSwitch)(value)
		case "conn_max_lifetime":
			err = to(&o.connMaxLifetime, parsePositive)(value)
		case "conn_max_idle_time":
			err = to(&o.connMaxIdleTime, parsePositive)(value)
		case "max_open_conns":
			err = to(&o.maxOpenConns, parseCount)(value)
		case "max_total_conns":
			err = to(&o.maxTotalConns, parseCount)(value)
		default:
			return o, fmt.Errorf("%q is not a setting: use delete, conn_max_lifetime, conn_max_idle_time, max_open_conns, max_total_conns", key)
		}
		if err != nil {
			return o, fmt.Errorf("%s: %w", key, err)
		}
	}
	return o, nil
}

func parseCount(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		return 0, fmt.Errorf("%q is not a number of 1 or more", s)
	}
	return n, nil
}

func parseCountOrNone(s string) (int, error) {
	if s == "0" {
		return 0, nil
	}
	n, err := parseCount(s)
	if err != nil {
		return 0, fmt.Errorf("%q is not a number of 0 or more", s)
	}
	return n, nil
}

func parseRate(s string) (float64, error) {
	r, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsNaN(r) || math.IsInf(r, 0) || r < 0 {
		return 0, fmt.Errorf("%q is not a number of 0 or more", s)
	}
	return r, nil
}

func parsePositive(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("%q is not a time above zero, such as 30s, 5m or 168h", s)
	}
	return d, nil
}

// parseDuration takes 0, too.
func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%q is not a time of 0 or more, such as 0, 15s or 1m", s)
	}
	return d, nil
}

func parseDurations(s string) ([]time.Duration, error) {
	if s == "0" {
		return nil, nil
	}
	var list []time.Duration
	for _, field := range fields(s) {
		d, err := parsePositive(field)
		if err != nil {
			return nil, err
		}
		list = append(list, d)
	}
	if len(list) == 0 {
		return nil, errors.New("empty: give times such as 3m,1h,24h, or 0 for off")
	}
	return list, nil
}

// parseSize reads bytes with a suffix: k, M or G, in either case.
func parseSize(s string) (int64, error) {
	digits, shift := s, 0
	if s != "" {
		if i := strings.IndexByte("kmg", s[len(s)-1]|0x20); i >= 0 {
			digits, shift = s[:len(s)-1], 10*(i+1)
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 1 || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("%q is not a size in bytes, such as 65536, 512k or 16M", s)
	}
	return n << shift, nil
}

// fields splits a comma list, without blanks and empty fields.
func fields(s string) []string {
	var list []string
	for field := range strings.SplitSeq(s, ",") {
		if field = strings.TrimSpace(field); field != "" {
			list = append(list, field)
		}
	}
	return list
}

var requestTypePattern = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9]*$`)

// parseRetention reads ages such as 30d,InstalledApplicationList=2d.
func parseRetention(s string) (storage.Retention, error) {
	var r storage.Retention
	hasDefault := false
	for _, field := range fields(s) {
		requestType, text, isType := strings.Cut(field, "=")
		if !isType {
			requestType, text = "", field
		}
		age, err := parseAge(text)
		if err != nil {
			return storage.Retention{}, err
		}
		switch _, twice := r.ByType[requestType]; {
		case !isType && hasDefault:
			return storage.Retention{}, fmt.Errorf("%q is a second age for all request types: keep one", text)
		case !isType:
			hasDefault, r.Default = true, age
		case !requestTypePattern.MatchString(requestType):
			return storage.Retention{}, fmt.Errorf("%q is not a request type such as InstalledApplicationList", requestType)
		case twice:
			return storage.Retention{}, fmt.Errorf("%s is given twice: keep one", requestType)
		default:
			if r.ByType == nil {
				r.ByType = make(map[string]time.Duration)
			}
			r.ByType[requestType] = age
		}
	}
	return r, nil
}

// maxDays keeps ages in what a Duration holds.
const maxDays = 36500

// parseAge reads a duration of Go's, or days as 30d; 0 is for ever.
func parseAge(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.Atoi(days)
		if err == nil && n >= 0 && n <= maxDays {
			return time.Duration(n) * 24 * time.Hour, nil
		}
	} else if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return d, nil
	}
	return 0, fmt.Errorf("%q is not an age such as 30d or 12h; 0 is for ever", s)
}

func parsePositiveAge(s string) (time.Duration, error) {
	d, err := parseAge(s)
	if err != nil || d == 0 {
		return 0, fmt.Errorf("%q is not an age above zero, such as 3d or 12h", s)
	}
	return d, nil
}
