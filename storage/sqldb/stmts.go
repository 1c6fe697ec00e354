package sqldb

import (
	"context"
	"database/sql"
	"sync"
)

// stmtCache keeps statements of one pool prepared, by text. A nil cache
// prepares nothing.
type stmtCache struct {
	db *sql.DB

	mu     sync.RWMutex
	byText map[string]*sql.Stmt
}

// maxStmts bounds the cache; texts differ by the number of their arguments.
const maxStmts = 512

func newStmtCache(db *sql.DB) *stmtCache {
	return &stmtCache{db: db, byText: make(map[string]*sql.Stmt)}
}

func (c *stmtCache) get(q string) *sql.Stmt {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.byText[q]
}

// prepare returns q prepared, or nil if it cannot be or the cache is full;
// running the text then shows the error.
func (c *stmtCache) prepare(ctx context.Context, q string) *sql.Stmt {
	if stmt := c.get(q); stmt != nil {
		return stmt
	}
	c.mu.RLock()
	full := len(c.byText) >= maxStmts
	c.mu.RUnlock()
	if full {
		return nil
	}
	stmt, err := c.db.PrepareContext(ctx, q)
	if err != nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if was := c.byText[q]; was != nil {
		stmt.Close()
		return was
	}
	c.byText[q] = stmt
	return stmt
}

func (c *stmtCache) close() {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, stmt := range c.byText {
		stmt.Close()
	}
	clear(c.byText)
}
