package main

import (
	"context"
	"flag"
	"fmt"
	"net/http"
	"strconv"
)

// tagCount is a tag in the server's list.
type tagCount struct {
	Tag     string `json:"tag"`
	Devices int    `json:"devices"`
}

var tagColumns = []column[tagCount]{
	{heading: "TAG", cell: func(c *tagCount) string { return c.Tag }},
	{heading: "DEVICES", cell: func(c *tagCount) string { return strconv.Itoa(c.Devices) }},
}

func tagsLsCommand() command {
	return command{
		name: "tags ls", short: "List the tags of devices", example: "nanoctl tags ls",
		prepare: func(flags *flag.FlagSet) runner {
			limit := flags.Int("limit", 0, "list no more than this many; 0 is all")
			return func(ctx context.Context, e *env, args []string) error {
				return showList(ctx, e, "/v1/tags", "tags", nil, *limit, tagColumns)
			}
		},
	}
}

func tagCommand() command {
	return changeTagsCommand("tag", "Give devices tags", "add", `A tag has up to 64 letters, digits and . _ : @ + -, and a device up to 50 tags. It keeps them when it
enrolls anew. The filter -tag of other commands selects devices by tag.`)
}

func untagCommand() command {
	return changeTagsCommand("untag", "Take tags from devices", "remove", "")
}

// changeTagsCommand is tag or untag; key is where the server has the tags.
func changeTagsCommand(name, short, key, long string) command {
	return command{
		name: name, args: "[ID|SERIAL] [TAG...]", short: short,
		long: long + map[bool]string{true: "\n", false: ""}[long != ""] +
			"With -all, -from or a filter all arguments are tags.",
		example: "nanoctl " + name + " C02XK0AAJG5H lab\nnanoctl " + name + " -model MacBookPro18,3 lab berlin",
		prepare: func(flags *flag.FlagSet) runner {
			var to targets
			to.flags(flags)
			return func(ctx context.Context, e *env, args []string) error {
				named, tags := args[:min(1, len(args))], args[min(1, len(args)):]
				if to.selects() || to.from != "" {
					named, tags = nil, args
				}
				if len(tags) == 0 {
					return usage("%s: name a device and a tag: nanoctl %s C02XK0AAJG5H lab", name, name)
				}
				chosen, err := to.resolve(ctx, e, named)
				if err != nil {
					return err
				}
				if err := e.confirmMany(len(chosen), "Tags are changed for"); err != nil {
					return err
				}
				return e.changeTags(ctx, chosen, key, tags)
			}
		},
	}
}

// tagsChanged is the server's answer to a change of tags.
type tagsChanged struct {
	Changed int      `json:"changed"`
	Full    []string `json:"full,omitempty"`
	Missing []string `json:"missing,omitempty"`
}

// changeTags adds or removes tags, a chunk of devices at a time.
func (e *env) changeTags(ctx context.Context, chosen []enrollment, key string, tags []string) error {
	var total tagsChanged
	return e.eachChunk(ctx, "changing tags", chosen, func(ctx context.Context, ids []string) error {
		a, err := e.api.do(ctx, http.MethodPost, "/v1/tags", nil, map[string]any{"ids": ids, key: tags})
		if err != nil {
			return err
		}
		var part tagsChanged
		if err := a.decode(&part); err != nil {
			return err
		}
		total.Changed += part.Changed
		total.Full, total.Missing = append(total.Full, part.Full...), append(total.Missing, part.Missing...)
		return nil
	}, func(n int) error {
		if e.format == "json" {
			if err := e.json(total); err != nil {
				return err
			}
		} else {
			fmt.Fprintf(e.out, "tags of %d of %d changed\n", total.Changed, n)
		}
		for _, id := range total.Full {
			fmt.Fprintf(e.err, "nanoctl: %s has as many tags as it can\n", printable(id))
		}
		for _, id := range total.Missing {
			fmt.Fprintf(e.err, "nanoctl: %s is a user channel: its tags are those of its device\n", printable(id))
		}
		if failed := len(total.Full) + len(total.Missing); failed > 0 {
			return &exitError{exitPartial, fmt.Errorf("%d of %d were not changed", failed, n)}
		}
		return nil
	})
}
