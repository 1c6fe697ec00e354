package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

func pushCommand() command {
	return command{
		name: "push", args: "[ID|SERIAL...]",
		short:   "Wake devices, so that they fetch their commands",
		example: "nanoctl push C02XK0AAJG5H\nnanoctl push -waiting true -stale 1d",
		prepare: func(flags *flag.FlagSet) runner {
			var to targets
			to.flags(flags)
			return func(ctx context.Context, e *env, args []string) error {
				chosen, err := to.resolve(ctx, e, args)
				if err != nil {
					return err
				}
				if err := e.confirmMany(len(chosen), "A push goes to"); err != nil {
					return err
				}
				query := url.Values{}
				if len(chosen) > askAbove {
					query.Set("push", "async") // the server goes on by itself
				}
				failed := 0
				return e.eachChunk(ctx, "pushing", chosen, func(ctx context.Context, ids []string) error {
					a, err := e.api.do(ctx, http.MethodPost, "/v1/push", query, map[string]any{"ids": ids})
					n, err := e.notWoken(a, err)
					failed += n
					return err
				}, func(n int) error {
					if e.format == "json" {
						if err := e.json(map[string]any{"pushed": n - failed, "failed": failed}); err != nil {
							return err
						}
					} else {
						fmt.Fprintf(e.out, "%d of %d woken\n", n-failed, n)
					}
					switch {
					case failed == 0:
						return nil
					case failed == n:
						return fmt.Errorf("none of %d was woken", n)
					}
					return &exitError{exitPartial, fmt.Errorf("%d of %d were not woken", failed, n)}
				})
			}
		},
	}
}

// notWoken counts and prints the enrollments that one call did not wake.
func (e *env) notWoken(a *answer, err error) (int, error) {
	said, err := resultOf(a, err)
	if err != nil {
		return 0, err
	}
	failed := 0
	for _, id := range sortedIDs(said.Status) {
		if why := said.Status[id].PushError; why != "" {
			fmt.Fprintf(e.err, "nanoctl: %s: %s\n", printable(id), printable(why))
			failed++
		}
	}
	return failed, nil
}

func pushCertPutCommand() command {
	return command{
		name: "pushcert put", args: "FILE [KEYFILE]",
		short:   "Upload a push certificate with its private key",
		long:    "PEM, the key without a password; both in one file in any order, or in two. - is standard input.",
		example: "nanoctl pushcert put push.pem push.key",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, args []string) error {
				var pem []byte
				for _, name := range args {
					part, err := e.readFile(name)
					if err != nil {
						return err
					}
					pem = append(append(pem, part...), '\n')
				}
				a, err := e.api.do(ctx, http.MethodPut, "/v1/pushcert", nil, pem)
				var put struct {
					pushCert
					Warning string `json:"warning"`
				}
				err = e.printSentence(a, err, &put, func() string { return "stored for " + put.Topic + ", expires " + stamp(put.NotAfter) })
				if put.Warning != "" {
					fmt.Fprintln(e.err, "nanoctl:", printable(put.Warning))
				}
				return err
			}
		},
	}
}

// pushCert is a push certificate in the answers of the server.
type pushCert struct {
	Topic       string     `json:"topic"`
	NotAfter    *time.Time `json:"not_after"`
	UpdatedAt   *time.Time `json:"updated_at"`
	Version     int        `json:"version"`
	Enrollments int        `json:"enrollments"`
	LastClass   string     `json:"last_class"`
	LastAt      *time.Time `json:"last_at"`
}

// expiresSoon is when people should have begun to renew.
const expiresSoon = 30 * 24 * time.Hour

func (p *pushCert) expiry() string {
	switch {
	case p.NotAfter == nil:
		return ""
	case time.Until(*p.NotAfter) < 0:
		return "EXPIRED " + ago(p.NotAfter)
	case time.Until(*p.NotAfter) < expiresSoon:
		return "renew it, ends " + ago(p.NotAfter)
	}
	return ago(p.NotAfter)
}

var pushCertColumns = []column[pushCert]{
	{heading: "TOPIC", cell: func(p *pushCert) string { return p.Topic }, clip: true},
	{heading: "EXPIRES", cell: (*pushCert).expiry, tone: toneOf},
	{heading: "ENROLLMENTS", cell: func(p *pushCert) string { return strconv.Itoa(p.Enrollments) }},
	{heading: "LAST PUSH", cell: (*pushCert).lastPush, tone: toneOf},
	{heading: "STORED", cell: func(p *pushCert) string { return ago(p.UpdatedAt) }, wide: true},
	{heading: "DATE", cell: func(p *pushCert) string {
		if p.NotAfter == nil {
			return ""
		}
		return p.NotAfter.UTC().Format(time.DateOnly)
	}, wide: true},
}

func (p *pushCert) lastPush() string {
	if p.LastClass == "" {
		return ""
	}
	return p.LastClass + " " + ago(p.LastAt)
}

func pushCertLsCommand() command {
	return command{
		name: "pushcert ls", short: "List push certificates, and topics that have none",
		example: "nanoctl pushcert ls",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, args []string) error {
				a, err := e.api.do(ctx, http.MethodGet, "/v1/pushcerts", nil, nil)
				var said struct{ Stranded []pushCert }
				return e.printAnswer(a, err, &said, func() error {
					err := showItems(e, a, "pushcerts", pushCertColumns)
					for _, s := range said.Stranded {
						fmt.Fprintf(e.err, "nanoctl: %d enrollments are of topic %s, which has no push certificate: nothing wakes them\n",
							s.Enrollments, printable(s.Topic))
					}
					return err
				})
			}
		},
	}
}

func pushCertRmCommand() command {
	return command{
		name: "pushcert rm", args: "TOPIC", short: "Remove a push certificate",
		long: `Without its certificate nothing wakes the devices of a topic. While there are any, -force is needed.
A certificate that is renewed needs no removal: "nanoctl pushcert put" replaces it.`,
		example: "nanoctl pushcert rm com.apple.mgmt.External.X",
		prepare: func(flags *flag.FlagSet) runner {
			force := flags.Bool("force", false, "also while enrolled devices use it")
			return func(ctx context.Context, e *env, args []string) error {
				if err := e.confirm("The push certificate of %s is removed.", printable(args[0])); err != nil {
					return err
				}
				q := url.Values{}
				if *force {
					q.Set("force", "true")
				}
				a, err := e.api.do(ctx, http.MethodDelete, "/v1/pushcerts/"+url.PathEscape(args[0]), q, nil)
				return e.printSentence(a, err, nil, func() string { return "the push certificate of " + args[0] + " is removed" })
			}
		},
	}
}

// isServerError says whether an error is the server's own and not one that it hands
// on.
func isServerError(a *answer) bool {
	var said struct {
		Error *string `json:"error"`
	}
	return json.Unmarshal(a.body, &said) == nil && said.Error != nil
}

func escrowUnlockCommand() command {
	return command{
		name: "escrow-unlock", short: "Ask Apple to remove an Activation Lock with an escrow key",
		long: `The server asks Apple with the topic's push certificate; Apple's answer is printed as it came.
The escrow key, in the form of 26 symbols with dashes, is read from a file, since other users of
the machine see command lines.`,
		example: "nanoctl escrow-unlock -serial C02XK0AAJG5H -product-type iPhone16,1 -topic com.apple.mgmt.External.X -escrow-key-file - -org-name Example -guid 1",
		prepare: func(flags *flag.FlagSet) runner {
			values := make(map[string]*string)
			for _, f := range [][3]string{
				{"topic", "topic", "APNs `topic` whose push certificate is used"}, {"serial", "serial", "serial `number` of the device"},
				{"product-type", "productType", "`product` type, such as iPhone16,1"}, {"org-name", "orgName", "`name` of your organisation"},
				{"guid", "guid", "`id` of who asks"}, {"imei", "imei", "`IMEI`, if it has one"}, {"imei2", "imei2", "second `IMEI`"}, {"meid", "meid", "`MEID`"},
			} {
				values[f[1]] = flags.String(f[0], "", f[2])
			}
			keyFile := flags.String("escrow-key-file", "", "`file` with the escrow key; - is standard input")
			return func(ctx context.Context, e *env, args []string) error {
				if *keyFile == "" {
					return usage("escrow-unlock: -escrow-key-file is missing")
				}
				key, err := e.readFile(*keyFile)
				if err != nil {
					return err
				}
				body := form{"escrowKey": {strings.TrimSpace(string(key))}}
				for name, value := range values {
					if *value != "" {
						body[name] = []string{*value}
					}
				}
				a, err := e.api.do(ctx, http.MethodPost, "/v1/escrowkeyunlock", nil, body)
				if a == nil || err != nil && isServerError(a) {
					return err
				}
				if writeErr := e.bytes(a.body); writeErr != nil {
					return writeErr
				}
				if err != nil {
					return fmt.Errorf("not unlocked: Apple answers with status %d", a.status)
				}
				return nil
			}
		},
	}
}
