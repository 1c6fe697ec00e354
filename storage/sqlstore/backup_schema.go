package sqlstore

import (
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"
)

// kind is the kind of a column's values.
type kind string

const (
	kindText  kind = "text"
	kindBytes kind = "bytes"
	kindInt   kind = "int"
)

// backupColumn and backupTable describe the schema in the head of a backup.
type backupColumn struct {
	Name string `json:"name"`
	Kind kind   `json:"kind"`
	// Required columns have a value in every row.
	Required bool `json:"required,omitempty"`
}

type backupTable struct {
	Name    string         `json:"name"`
	Columns []backupColumn `json:"columns"`
	Key     []string       `json:"key"`
}

func (t *backupTable) names() []string {
	names := make([]string, len(t.Columns))
	for i, c := range t.Columns {
		names[i] = c.Name
	}
	return names
}

func (t *backupTable) column(name string) int {
	return slices.IndexFunc(t.Columns, func(c backupColumn) bool { return c.Name == name })
}

var (
	createTable = regexp.MustCompile(`^CREATE TABLE IF NOT EXISTS (\w+) \($`)
	columnLine  = regexp.MustCompile(`^(\w+)\s+(\{\w+\}|\w+)`)
	keyLine     = regexp.MustCompile(`^PRIMARY KEY \(([^)]*)\)`)
	addColumn   = regexp.MustCompile(`^ALTER TABLE (\w+) ADD COLUMN (?:\{\w+\} )?(\w+)\s+(\{\w+\}|\w+)`)
)

// columnKind returns the kind of a type in the words of migrations.
func columnKind(word string) (kind, error) {
	switch word {
	case "{id}", "{text}":
		return kindText, nil
	case "{blob}":
		return kindBytes, nil
	case "BIGINT", "SMALLINT":
		return kindInt, nil
	}
	return "", fmt.Errorf("backups know no type %s", word)
}

// backupSchema returns the tables of a backup, as the migrations make them,
// without leases, which belong to running replicas, and without columns that
// the database computes.
func backupSchema() ([]backupTable, error) {
	files, err := fs.ReadDir(migrationFiles, "migrations") // sorted by name
	if err != nil {
		return nil, err
	}
	var tables []backupTable
	for _, file := range files {
		text, err := fs.ReadFile(migrationFiles, "migrations/"+file.Name())
		if err != nil {
			return nil, err
		}
		if tables, err = addTables(tables, string(text)); err != nil {
			return nil, fmt.Errorf("reading %s: %w", file.Name(), err)
		}
	}
	return tables, nil
}

// addTables reads a migration. By the rules of migrations each line is a
// column, a key or a statement.
func addTables(tables []backupTable, text string) ([]backupTable, error) {
	inside := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if found := createTable.FindStringSubmatch(line); found != nil {
			tables, inside = append(tables, backupTable{Name: found[1]}), true
			continue
		}
		if found := addColumn.FindStringSubmatch(line); found != nil {
			at := slices.IndexFunc(tables, func(t backupTable) bool { return t.Name == found[1] })
			if at < 0 {
				return nil, fmt.Errorf("there is no table %s", found[1])
			}
			if err := tables[at].add(found[2], found[3], line); err != nil {
				return nil, err
			}
			continue
		}
		switch {
		case !inside || line == "" || strings.HasPrefix(line, "--"):
		case strings.HasPrefix(line, ")"):
			inside = false
		default:
			table := &tables[len(tables)-1]
			if found := keyLine.FindStringSubmatch(line); found != nil {
				table.Key = strings.Split(found[1], ", ")
				continue
			}
			found := columnLine.FindStringSubmatch(line)
			if found == nil {
				return nil, fmt.Errorf("a line of table %s is neither a column nor its key: %s", table.Name, line)
			}
			if err := table.add(found[1], found[2], line); err != nil {
				return nil, err
			}
		}
	}
	return tables, nil
}

func (t *backupTable) add(name, word, line string) error {
	if strings.Contains(line, "GENERATED ALWAYS") {
		return nil
	}
	k, err := columnKind(word)
	if err != nil {
		return fmt.Errorf("column %s.%s: %w", t.Name, name, err)
	}
	if strings.Contains(line, "PRIMARY KEY") {
		t.Key = []string{name}
	}
	required := strings.Contains(line, "NOT NULL") || strings.Contains(line, "PRIMARY KEY")
	t.Columns = append(t.Columns, backupColumn{name, k, required})
	return nil
}
