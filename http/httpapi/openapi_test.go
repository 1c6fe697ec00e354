package httpapi_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"mime"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"
)

// document is docs/openapi.yaml, as far as it is checked.
type document struct {
	Paths      map[string]map[string]*operation
	Components struct {
		Parameters map[string]*parameter
		Responses  map[string]*response
		Schemas    map[string]*schema
	}
}

type operation struct {
	OperationID string `yaml:"operationId"`
	Summary     string
	Tags        []string
	Role        string `yaml:"x-role"`
	Unbound     bool   `yaml:"x-unbound"`
	NanoMDM     bool   `yaml:"x-nanomdm"`
	Parameters  []*parameter
	RequestBody *response `yaml:"requestBody"`
	Responses   map[string]*response
}

type parameter struct {
	Ref      string `yaml:"$ref"`
	Name, In string
	Required bool
	Schema   *schema
}

// response is one, or a request's body.
type response struct {
	Ref         string `yaml:"$ref"`
	Description string
	Content     map[string]struct{ Schema *schema }
}

// schema has the words that are checked. An object is closed unless it has
// additionalProperties.
type schema struct {
	Ref                  string `yaml:"$ref"`
	Type                 string
	Description          string
	Format               string
	Enum                 []string
	Properties           map[string]*schema
	Required             []string
	AdditionalProperties *schema `yaml:"additionalProperties"`
	Items                *schema
	Minimum, Maximum     *float64
	Default, Example     any
}

// readDocument reads the document, which must use no word that nobody checks.
var readDocument = sync.OnceValues(func() (*document, error) {
	data, err := os.ReadFile("../../docs/openapi.yaml")
	if err != nil {
		return nil, err
	}
	d := new(document)
	if err := yaml.Unmarshal(data, d); err != nil {
		return nil, err
	}
	var whole any
	if err := yaml.Unmarshal(data, &whole); err != nil {
		return nil, err
	}
	return d, unknownWords(whole, "")
})

var schemaWords = []string{"$ref", "type", "description", "format", "enum", "properties", "required",
	"additionalProperties", "items", "minimum", "maximum", "default", "example"}

// unknownWords looks through schemas, wherever they are.
func unknownWords(node any, at string) error {
	switch node := node.(type) {
	case map[string]any:
		_, typed := node["type"].(string)
		inSchema := strings.HasSuffix(at, "/schema") || strings.HasSuffix(at, "/items") || strings.HasSuffix(at, "/additionalProperties") ||
			regexp.MustCompile(`/(schemas|properties)/[^/]+$`).MatchString(at)
		for _, word := range slices.Sorted(maps.Keys(node)) {
			if inSchema && typed && !slices.Contains(schemaWords, word) {
				return fmt.Errorf("%s: the test does not know %q", at, word)
			}
			if err := unknownWords(node[word], at+"/"+strings.ReplaceAll(word, "/", "~1")); err != nil {
				return err
			}
		}
	case []any:
		for i, item := range node {
			if err := unknownWords(item, fmt.Sprint(at, "/", i)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *document) parameter(p *parameter) *parameter {
	if name, ok := strings.CutPrefix(p.Ref, "#/components/parameters/"); ok {
		return d.Components.Parameters[name]
	}
	return p
}

func (d *document) response(r *response) *response {
	if name, ok := strings.CutPrefix(r.Ref, "#/components/responses/"); ok {
		return d.Components.Responses[name]
	}
	return r
}

func (d *document) schema(s *schema) *schema {
	if name, ok := strings.CutPrefix(s.Ref, "#/components/schemas/"); ok {
		return d.Components.Schemas[name]
	}
	return s
}

// find returns the operation that a request is for. Fixed elements go before
// variable ones, as in http.ServeMux.
func (d *document) find(method, escapedPath string) *operation {
	parts := strings.Split(escapedPath, "/")
	var best *operation
	fixed := -1
	for path, operations := range d.Paths {
		op, ok := operations[strings.ToLower(method)]
		template := strings.Split(path, "/")
		if !ok || len(template) != len(parts) {
			continue
		}
		n := 0
		for i, element := range template {
			switch {
			case element == parts[i]:
				n++
			case !strings.HasPrefix(element, "{"):
				n = -len(parts)
			}
		}
		if n > fixed {
			best, fixed = op, n
		}
	}
	return best
}

// check says how a value differs from its schema.
func (d *document) check(s *schema, v any, at string) error {
	s = d.schema(s)
	if s == nil {
		return fmt.Errorf("%s: the schema that is referred to is missing", at)
	}
	wrong := func(want string) error { return fmt.Errorf("%s: %s is wanted, there is %v", at, want, v) }
	switch s.Type {
	case "": // anything
	case "object":
		return d.checkObject(s, v, at)
	case "array":
		list, ok := v.([]any)
		if !ok {
			return wrong("a list")
		}
		for i, item := range list {
			if err := d.check(s.Items, item, fmt.Sprint(at, "/", i)); err != nil {
				return err
			}
		}
	case "boolean":
		if _, ok := v.(bool); !ok {
			return wrong("true or false")
		}
	case "integer":
		n, ok := v.(json.Number)
		if !ok {
			return wrong("a number")
		}
		if _, err := n.Int64(); err != nil {
			return wrong("a whole number")
		}
	case "number":
		if _, ok := v.(json.Number); !ok {
			return wrong("a number")
		}
	case "string":
		text, ok := v.(string)
		if !ok {
			return wrong("a text")
		}
		if len(s.Enum) > 0 && !slices.Contains(s.Enum, text) {
			return wrong("one of " + strings.Join(s.Enum, ", "))
		}
		switch s.Format {
		case "":
		case "date-time":
			at, err := time.Parse(time.RFC3339, text)
			if err != nil || at.Location() != time.UTC {
				return wrong("a time in UTC")
			}
		case "byte":
			if _, err := base64.StdEncoding.DecodeString(text); err != nil {
				return wrong("base64")
			}
		default:
			return fmt.Errorf("%s: the test does not know format %s", at, s.Format)
		}
	default:
		return fmt.Errorf("%s: the test does not know type %s", at, s.Type)
	}
	return nil
}

func (d *document) checkObject(s *schema, v any, at string) error {
	object, ok := v.(map[string]any)
	if !ok {
		return fmt.Errorf("%s: an object is wanted, there is %v", at, v)
	}
	for _, name := range s.Required {
		if _, ok := object[name]; !ok {
			return fmt.Errorf("%s: %s is missing", at, name)
		}
	}
	for name, value := range object {
		property := s.Properties[name]
		if property == nil {
			property = s.AdditionalProperties
		}
		if property == nil {
			return fmt.Errorf("%s: %s is not documented", at, name)
		}
		if err := d.check(property, value, at+"/"+name); err != nil {
			return err
		}
	}
	return nil
}

// checkAnswer says how an answer differs from what is documented.
func (d *document) checkAnswer(op *operation, status int, contentType, body string) error {
	found, ok := op.Responses[strconv.Itoa(status)]
	if !ok {
		found, ok = op.Responses["default"]
	}
	if ok && status < 400 && op.Responses[strconv.Itoa(status)] == nil || !ok {
		return fmt.Errorf("%s: status %d is not documented", op.OperationID, status)
	}
	r := d.response(found)
	media, _, err := mime.ParseMediaType(contentType)
	if err != nil && len(r.Content) > 0 {
		return fmt.Errorf("%s: content type %q: %w", op.OperationID, contentType, err)
	}
	content, ok := r.Content[media]
	if !ok && len(r.Content) > 0 {
		return fmt.Errorf("%s: content type %q is not documented for status %d", op.OperationID, contentType, status)
	}
	if media != "application/json" || len(r.Content) == 0 {
		return nil
	}
	v, err := decodeNumbers(body)
	if err != nil {
		return fmt.Errorf("%s: %w", op.OperationID, err)
	}
	return d.check(content.Schema, v, op.OperationID+" "+strconv.Itoa(status))
}

func decodeNumbers(body string) (v any, err error) {
	dec := json.NewDecoder(strings.NewReader(body))
	dec.UseNumber()
	err = dec.Decode(&v)
	return v, err
}

// documented checks what a handler was asked, if it took it, and what it
// answered. Requests that no route is for are not documented.
func documented(t *testing.T, method, path, body string, status int, header http.Header, answer string) {
	t.Helper()
	d, err := readDocument()
	require.NoError(t, err)
	path, _, _ = strings.Cut(path, "?")
	op := d.find(method, path)
	if op == nil {
		if get := d.find("GET", path); get != nil && get.NanoMDM {
			return // it takes methods that are not documented
		}
		if strings.HasPrefix(path, "/v1/") {
			require.GreaterOrEqual(t, status, 400, "%s %s is not documented", method, path)
		}
		return
	}
	if status < 300 && op.RequestBody != nil && body != "" {
		if content, ok := d.response(op.RequestBody).Content["application/json"]; ok {
			v, err := decodeNumbers(body)
			require.NoError(t, err)
			require.NoError(t, d.check(content.Schema, v, op.OperationID+" request"))
		}
	}
	require.NoError(t, d.checkAnswer(op, status, header.Get("Content-Type"), answer), answer)
}

// elsewhere are the documented paths that other packages serve.
var elsewhere = []string{"/version", "/healthz", "/readyz", "/metrics", "/migration"}

var inPath = regexp.MustCompile(`\{(\w+)\}`)

func TestDocumentHasEveryRoute(t *testing.T) {
	d, err := readDocument()
	require.NoError(t, err)
	o := newOperators(t)
	served := make(map[string]bool)
	for _, r := range o.api.RoutesForTest() {
		name := r.Method + " " + r.Path
		served[name] = true
		op := d.Paths[r.Path][strings.ToLower(r.Method)]
		if !assert.NotNil(t, op, "%s is missing in docs/openapi.yaml", name) {
			continue
		}
		assert.Equal(t, r.Role, op.Role, "x-role of %s", name)
		assert.Equal(t, r.Unbound, op.Unbound, "x-unbound of %s", name)
		assert.NotEmpty(t, op.Responses, name)
		var documented []string
		for _, p := range op.Parameters {
			if p := d.parameter(p); p.In == "path" {
				assert.True(t, p.Required, "%s: %s", name, p.Name)
				documented = append(documented, p.Name)
			}
		}
		var wanted []string
		for _, m := range inPath.FindAllStringSubmatch(r.Path, -1) {
			wanted = append(wanted, m[1])
		}
		assert.ElementsMatch(t, wanted, documented, "path parameters of %s", name)
	}
	ids := make(map[string]bool)
	for path, operations := range d.Paths {
		for method, op := range operations {
			name := strings.ToUpper(method) + " " + path
			assert.NotEmpty(t, op.Summary, name)
			assert.NotEmpty(t, op.Tags, name)
			assert.False(t, ids[op.OperationID], "operationId %s is there twice", op.OperationID)
			ids[op.OperationID] = true
			if !slices.Contains(elsewhere, path) {
				assert.True(t, served[name], "%s is documented, and nobody serves it", name)
			}
		}
	}
}

// TestDocumentHasEveryParameter asks each endpoint for what it does not have:
// it answers with what it has.
func TestDocumentHasEveryParameter(t *testing.T) {
	d, err := readDocument()
	require.NoError(t, err)
	o := newOperators(t)
	for _, r := range o.api.RoutesForTest() {
		op := d.Paths[r.Path][strings.ToLower(r.Method)]
		if op == nil || op.NanoMDM {
			continue
		}
		t.Run(r.Method+" "+r.Path, func(t *testing.T) {
			var names []string
			for _, p := range op.Parameters {
				if p := d.parameter(p); p.In == "query" {
					names = append(names, p.Name)
				}
			}
			slices.Sort(names)
			want := "no-such: there are no query parameters here"
			if n := len(names); n > 0 {
				want = "no-such: there is no such query parameter here; there is " + strings.Join(names, ", ")
				if i := strings.LastIndex(want, ", "); n > 1 {
					want = want[:i] + " and " + want[i+2:]
				}
			}
			status, answer, _ := o.do(o.admin(), r.Method, inPath.ReplaceAllString(r.Path, "x")+"?no-such=1", "{}")
			require.Equal(t, 400, status, answer)
			var e struct{ Error string }
			require.NoError(t, json.Unmarshal([]byte(answer), &e))
			require.Equal(t, want, e.Error)
		})
	}
}

// TestRouteRoles tries every route with each kind of key.
func TestRouteRoles(t *testing.T) {
	o := newOperators(t)
	roles := []string{"read", "push", "enqueue", "admin"}
	keys := make(map[string]call)
	for _, role := range roles {
		keys[role] = call{key: o.makeKey(role, role)}
		keys[role+" bound"] = call{key: o.makeKey(role+"-bound", role, "topic")}
	}
	for _, r := range o.api.RoutesForTest() {
		path := inPath.ReplaceAllString(r.Path, "x")
		need := slices.Index(roles, r.Role)
		require.GreaterOrEqual(t, need, 0, r.Path)
		status, _, _ := o.do(call{}, r.Method, path, "")
		assert.Equal(t, 401, status, "%s %s without a key", r.Method, path)
		for i, role := range roles {
			status, answer, _ := o.do(keys[role], r.Method, path, "")
			assert.Equal(t, i < need, status == 403, "%s %s for %s: %s", r.Method, path, role, answer)
			status, answer, _ = o.do(keys[role+" bound"], r.Method, path, "")
			assert.Equal(t, i < need || r.Unbound, status == 403, "%s %s for %s bound to a topic: %s", r.Method, path, role, answer)
		}
	}
}

func TestNoSuchEndpoint(t *testing.T) {
	o := newOperators(t)
	status, answer, _ := o.do(call{}, "GET", "/v1/nothing", "")
	require.Equal(t, 404, status)
	require.JSONEq(t, `{"error":"there is no such endpoint"}`, answer)
	status, answer, header := o.do(call{}, "PATCH", "/v1/keys", "")
	require.Equal(t, 405, status)
	require.Equal(t, "GET, POST, HEAD", header.Get("Allow"))
	require.Contains(t, answer, "PATCH is not for this endpoint")
}

func TestCheckFindsDifferences(t *testing.T) {
	d, err := readDocument()
	require.NoError(t, err)
	op := d.find("GET", "/v1/audit")
	for body, want := range map[string]string{
		`{"audit":[]}`:            "",
		`{"audit":[],"next":"x"}`: "",
		`{}`:                      "audit is missing",
		`{"audit":{}}`:            "a list is wanted",
		`{"audit":[],"more":1}`:   "more is not documented",
		`{"audit":[],"next":1}`:   "a text is wanted",
		`{"audit":[{"id":"x"}]}`:  "at is missing",
		`{"audit":[{"id":"x","at":"today","who":"w","action":"a","outcome":"done"}]}`:                     "a time in UTC",
		`{"audit":[{"id":"x","at":"2026-03-01T12:00:00+01:00","who":"w","action":"a","outcome":"done"}]}`: "a time in UTC",
	} {
		err := d.checkAnswer(op, 200, "application/json; charset=utf-8", body)
		if want == "" {
			assert.NoError(t, err, body)
		} else {
			assert.ErrorContains(t, err, want, body)
		}
	}
	require.ErrorContains(t, d.checkAnswer(op, 201, "application/json", `{"audit":[]}`), "201 is not documented")
	require.ErrorContains(t, d.checkAnswer(op, 200, "text/plain", ``), "is not documented")
	require.NoError(t, d.checkAnswer(op, 404, "application/json", `{"error":"x"}`))
	require.ErrorContains(t, d.checkAnswer(op, 404, "application/json", `{"message":"x"}`), "error is missing")
}
