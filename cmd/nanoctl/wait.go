package main

import (
	"context"
	"fmt"
	"net/url"
	"time"
)

const (
	// longPoll is how long the server is asked to wait at once, and shortPoll
	// how long where somebody looks at a terminal.
	longPoll  = 30 * time.Second
	shortPoll = time.Second
	// drawEvery and printEvery are how often progress shows on a terminal, and
	// in a pipe.
	drawEvery  = time.Second
	printEvery = 10 * time.Second
)

// awaitAnswers waits until a command has ended for all its enrollments and
// prints their answers.
func (e *env) awaitAnswers(ctx context.Context, uuid string, timeout time.Duration) error {
	w := &watcher{e: e, uuid: uuid, bar: e.progress(), began: time.Now(), ticker: time.NewTicker(e.drawInterval())}
	defer w.ticker.Stop()
	c, err := w.run(ctx, timeout)
	w.bar.end()
	if err != nil {
		if ctx.Err() != nil {
			return &exitError{exitInterrupted, fmt.Errorf("interrupted; the command stays queued: nanoctl status %s", uuid)}
		}
		return err
	}
	answers, err := e.answers(ctx, uuid)
	if err != nil {
		return err
	}
	if err := e.showAnswers(c, answers); err != nil {
		return err
	}
	if c.waiting() > 0 {
		return &exitError{exitTimeout, fmt.Errorf("%d of %d have not answered yet: nanoctl status %s", c.waiting(), c.total(), uuid)}
	}
	if c.failed() > 0 {
		return &exitError{exitDevice, fmt.Errorf("%d of %d did not acknowledge it: %s", c.failed(), c.total(), c.counts())}
	}
	return nil
}

// drawInterval is how often progress shows.
func (e *env) drawInterval() time.Duration {
	if e.progressOn == nil {
		return printEvery
	}
	return drawEvery
}

// watcher follows one command and shows how far it is.
type watcher struct {
	e      *env
	uuid   string
	bar    *progress
	ticker *time.Ticker
	began  time.Time
	first  int // how many had ended it when the watch began
}

// polled is what one question to the server brought.
type polled struct {
	c   *commandInfo
	err error
}

func (w *watcher) run(ctx context.Context, timeout time.Duration) (*commandInfo, error) {
	w.bar.line("waiting for answers")
	deadline := w.began.Add(timeout)
	c, err := w.ask(ctx, 0)
	if err != nil {
		return nil, err
	}
	w.first = c.total() - c.waiting()
	for w.draw(c); !c.Done; {
		left := time.Until(deadline).Truncate(time.Millisecond)
		if left <= 0 {
			break
		}
		patience := longPoll
		if w.e.progressOn != nil {
			patience = shortPoll
		}
		answer := make(chan polled, 1)
		go func() {
			c, err := w.ask(ctx, min(left, patience))
			answer <- polled{c, err}
		}()
		for got := false; !got; {
			select {
			case <-w.ticker.C:
				w.tick(c)
			case p := <-answer:
				if p.err != nil {
					return nil, p.err
				}
				c, got = p.c, true
				w.draw(c)
			}
		}
	}
	return c, nil
}

// ask reads the command, and has the server wait for its end.
func (w *watcher) ask(ctx context.Context, wait time.Duration) (*commandInfo, error) {
	query := url.Values{"limit": {"1"}}
	if wait > 0 {
		query.Set("wait", wait.String())
	}
	c := new(commandInfo)
	return c, w.e.api.get(ctx, commandPath(w.uuid), query, c)
}

// draw shows the numbers on a terminal.
func (w *watcher) draw(c *commandInfo) {
	w.bar.line(barLine("waiting", c.total()-c.waiting(), c.total(), w.numbers(c)))
}

// tick shows the numbers again: on a terminal, or as a line in a pipe.
func (w *watcher) tick(c *commandInfo) {
	if w.e.progressOn != nil {
		w.draw(c)
		return
	}
	fmt.Fprintf(w.e.err, "nanoctl: %d of %d answered, %s\n", c.total()-c.waiting(), c.total(), w.numbers(c))
}

// numbers are the rate, what is left and how long that may take.
func (w *watcher) numbers(c *commandInfo) string {
	ended := c.total() - c.waiting()
	elapsed := time.Since(w.began)
	text := fmt.Sprintf("%d left", c.waiting())
	if n := c.States["notnow"]; n > 0 {
		text += fmt.Sprintf(" (%d NotNow)", n)
	}
	if rate := float64(ended-w.first) / elapsed.Seconds(); rate > 0 && elapsed >= time.Second {
		text += fmt.Sprintf(", %.1f/s", rate)
		if c.waiting() > 0 {
			text += ", about " + shortDuration(time.Duration(float64(c.waiting())/rate*float64(time.Second))) + " more"
		}
	}
	return text + ", " + shortDuration(elapsed)
}
