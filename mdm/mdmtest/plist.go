package mdmtest

import (
	"bytes"
	"encoding/base64"
	"encoding/xml"
	"strconv"
)

// Plist writes the inside of an XML property list, piece by piece. Keys and
// strings are escaped. The zero value is empty and ready.
type Plist struct {
	buf bytes.Buffer
}

// String adds a key with a string.
func (p *Plist) String(key, value string) *Plist {
	p.key(key)
	p.StringItem(value)
	return p
}

// StringItem adds a string without a key, an item of an array.
func (p *Plist) StringItem(value string) *Plist {
	p.element("string", value)
	return p
}

// OptionalString adds a key with a string unless the string is empty.
func (p *Plist) OptionalString(key, value string) *Plist {
	if value != "" {
		p.String(key, value)
	}
	return p
}

// Bool adds a key with a truth value.
func (p *Plist) Bool(key string, value bool) *Plist {
	p.key(key)
	if value {
		p.buf.WriteString("<true/>\n")
	} else {
		p.buf.WriteString("<false/>\n")
	}
	return p
}

// Int adds a key with an integer.
func (p *Plist) Int(key string, value int64) *Plist {
	p.key(key)
	p.element("integer", strconv.FormatInt(value, 10))
	return p
}

// Real adds a key with a floating-point number.
func (p *Plist) Real(key string, value float64) *Plist {
	p.key(key)
	p.element("real", strconv.FormatFloat(value, 'f', -1, 64))
	return p
}

// Data adds a key with bytes.
func (p *Plist) Data(key string, value []byte) *Plist {
	p.key(key)
	p.element("data", base64.StdEncoding.EncodeToString(value))
	return p
}

// Dict adds a key with a dict whose inside content writes.
func (p *Plist) Dict(key string, content func(*Plist)) *Plist {
	p.key(key)
	return p.DictItem(content)
}

// DictItem adds a dict without a key, an item of an array.
func (p *Plist) DictItem(content func(*Plist)) *Plist {
	return p.wrap("dict", content)
}

// Array adds a key with an array whose items content writes.
func (p *Plist) Array(key string, content func(*Plist)) *Plist {
	p.key(key)
	return p.wrap("array", content)
}

// Raw adds keys and values that are property list XML already.
func (p *Plist) Raw(content []byte) *Plist {
	p.buf.Write(content)
	return p
}

// Content is what was added so far, for Raw of another.
func (p *Plist) Content() []byte { return p.buf.Bytes() }

// Document is a whole property list, a dict with what was added so far.
func (p *Plist) Document() []byte {
	const head = xml.Header +
		`<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">` +
		"\n<plist version=\"1.0\">\n<dict>\n"
	const tail = "</dict>\n</plist>\n"
	out := make([]byte, 0, len(head)+p.buf.Len()+len(tail))
	out = append(out, head...)
	out = append(out, p.buf.Bytes()...)
	return append(out, tail...)
}

func (p *Plist) key(key string) { p.element("key", key) }

func (p *Plist) element(name, text string) {
	p.buf.WriteString("<" + name + ">")
	// A bytes.Buffer never fails.
	_ = xml.EscapeText(&p.buf, []byte(text))
	p.buf.WriteString("</" + name + ">\n")
}

func (p *Plist) wrap(name string, content func(*Plist)) *Plist {
	p.buf.WriteString("<" + name + ">\n")
	content(p)
	p.buf.WriteString("</" + name + ">\n")
	return p
}
