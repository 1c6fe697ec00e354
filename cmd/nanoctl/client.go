package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/release"
)

const (
	// requestTimeout bounds a request that does not ask the server to wait.
	requestTimeout = 2 * time.Minute
	// maxAnswer bounds what is read of one answer.
	maxAnswer = 256 << 20
)

// client speaks to the API.
type client struct {
	base *url.URL
	key  string
	http *http.Client
}

func newClient(base *url.URL, key string, transport http.RoundTripper) *client {
	return &client{base: base, key: key, http: &http.Client{
		Transport: transport,
		// A redirected POST becomes a GET, and the key would go elsewhere.
		CheckRedirect: func(r *http.Request, _ []*http.Request) error {
			return fmt.Errorf("the server redirects to %s; set NANOCTL_URL to where the API is", r.URL.Redacted())
		},
	}}
}

// form is a body that is sent as a form.
type form url.Values

// answer is what the server said.
type answer struct {
	status int
	body   []byte
}

// decode reads the JSON of an answer.
func (a *answer) decode(out any) error {
	if err := json.Unmarshal(a.body, out); err != nil {
		return fmt.Errorf("the server's answer is not what this version of nanoctl expects: %w", err)
	}
	return nil
}

// get asks and decodes the JSON of the answer into out.
func (c *client) get(ctx context.Context, path string, query url.Values, out any) error {
	a, err := c.do(ctx, http.MethodGet, path, query, nil)
	if err != nil {
		return err
	}
	return a.decode(out)
}

// do sends a request. A body is sent as JSON, or as it is if it is []byte, or
// as a form. A status from 400 on is an error, and the answer comes with it.
func (c *client) do(ctx context.Context, method, path string, query url.Values, body any) (*answer, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	var reader io.Reader
	contentType := ""
	switch b := body.(type) {
	case nil:
	case []byte:
		reader = bytes.NewReader(b)
	case form:
		reader, contentType = strings.NewReader(url.Values(b).Encode()), "application/x-www-form-urlencoded"
	default:
		data, err := json.Marshal(b)
		if err != nil {
			return nil, err
		}
		reader, contentType = bytes.NewReader(data), "application/json"
	}
	target := strings.TrimSuffix(c.base.String(), "/") + path
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, target, reader)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+c.key)
	req.Header.Set("User-Agent", "nanoctl/"+release.Version())
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // without the method and the URL twice
		}
		return nil, fmt.Errorf("reaching %s: %w%s", c.base.Redacted(), err, reachHint(err, c.base))
	}
	defer resp.Body.Close()
	a := &answer{status: resp.StatusCode}
	if a.body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer)); err != nil {
		return nil, fmt.Errorf("reading the answer: %w", err)
	}
	if resp.StatusCode == http.StatusNoContent { // the call was repeated
		a.body = []byte("{}")
	}
	if resp.StatusCode >= 400 {
		return a, refusal(resp, a.body)
	}
	return a, nil
}

// statusError is an answer that says no.
type statusError struct {
	status int
	text   string
}

func (s *statusError) Error() string { return s.text }

// refusal turns an error answer into an error with the server's own words.
func refusal(resp *http.Response, body []byte) error {
	var said struct {
		Error string `json:"error"`
	}
	text := "the server answers " + resp.Status
	if json.Unmarshal(body, &said) == nil && said.Error != "" {
		text = said.Error
	}
	err := &statusError{resp.StatusCode, text}
	switch resp.StatusCode {
	case http.StatusUnauthorized:
		err.text = "the server does not accept the API key: " + text
		return &exitError{exitAccess, err}
	case http.StatusForbidden:
		return &exitError{exitAccess, err}
	case http.StatusTooManyRequests:
		if after, convErr := strconv.Atoi(resp.Header.Get("Retry-After")); convErr == nil {
			err.text += fmt.Sprintf("; try again in %d seconds", after)
		}
		return &exitError{exitAccess, err}
	case http.StatusBadRequest:
		if strings.Contains(string(body), "HTTP request to an HTTPS server") {
			err.text = "the server speaks https there: write https:// in the URL"
			return err
		}
		return &exitError{exitUsage, err}
	case http.StatusNotFound:
		if said.Error == "" {
			err.text = "there is no API at that address, or this server is too old for that: " + resp.Status
			return err
		}
		return &exitError{exitNotFound, err}
	}
	return err
}
