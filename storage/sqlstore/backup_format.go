package sqlstore

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/klauspost/compress/zstd"
)

// A backup is a line of text and a zstd stream. The stream holds the length of
// the head and the head as JSON; then for each table its rows, each after the
// byte 1, and the byte 0 with the number of rows; and then the SHA-256 of
// everything before it. A value is the byte 0 for NULL, or the byte 1 and the
// value: a number as a varint, or the length of bytes and the bytes.
const (
	backupMagic   = "nanomdm-backup 1\n"
	maxBackupHead = 1 << 20
	maxBackupCell = 1 << 30
)

// BackupHead describes a backup.
type BackupHead struct {
	ID        string    `json:"id"` // of this backup
	CreatedAt time.Time `json:"created_at"`
	Engine    string    `json:"engine"`
	Schema    int64     `json:"schema"`
	// SealKeys are the ids of the keys of sealed values.
	SealKeys []string      `json:"seal_keys"`
	Tables   []backupTable `json:"tables"`
}

// ErrBackup: the file is not a backup, or not a complete one.
var ErrBackup = errors.New("the file is no whole backup")

type backupWriter struct {
	zip *zstd.Encoder
	sum hash.Hash
	w   *bufio.Writer // to both
	buf [binary.MaxVarintLen64]byte
}

func newBackupWriter(to io.Writer, head BackupHead) (*backupWriter, error) {
	if _, err := io.WriteString(to, backupMagic); err != nil {
		return nil, err
	}
	zip, err := zstd.NewWriter(to)
	if err != nil {
		return nil, err
	}
	b := &backupWriter{zip: zip, sum: sha256.New()}
	b.w = bufio.NewWriterSize(io.MultiWriter(zip, b.sum), 1<<16)
	text, err := json.Marshal(head)
	if err != nil {
		return nil, err
	}
	return b, b.bytes(text)
}

func (b *backupWriter) uvarint(n uint64) error {
	_, err := b.w.Write(binary.AppendUvarint(b.buf[:0], n))
	return err
}

func (b *backupWriter) bytes(v []byte) error {
	if err := b.uvarint(uint64(len(v))); err != nil {
		return err
	}
	_, err := b.w.Write(v)
	return err
}

// row writes the values of a row: nil, an int64, a string or bytes.
func (b *backupWriter) row(values []any) error {
	if err := b.w.WriteByte(1); err != nil {
		return err
	}
	for _, v := range values {
		if v == nil {
			if err := b.w.WriteByte(0); err != nil {
				return err
			}
			continue
		}
		err := b.w.WriteByte(1)
		switch v := v.(type) {
		case int64:
			_, err = b.w.Write(binary.AppendVarint(b.buf[:0], v))
		case string:
			err = b.bytes([]byte(v))
		case []byte:
			err = b.bytes(v)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *backupWriter) endTable(rows int64) error {
	if err := b.w.WriteByte(0); err != nil {
		return err
	}
	return b.uvarint(uint64(rows))
}

// close writes the checksum.
func (b *backupWriter) close() error {
	if err := b.w.Flush(); err != nil {
		return err
	}
	if _, err := b.zip.Write(b.sum.Sum(nil)); err != nil {
		return err
	}
	return b.zip.Close()
}

type backupReader struct {
	zip *zstd.Decoder
	r   *bufio.Reader
	sum hash.Hash
}

// newBackupReader reads the head.
func newBackupReader(from io.Reader) (*backupReader, BackupHead, error) {
	var head BackupHead
	magic := make([]byte, len(backupMagic))
	if _, err := io.ReadFull(from, magic); err != nil || string(magic) != backupMagic {
		return nil, head, fmt.Errorf("%w: it does not begin as one", ErrBackup)
	}
	zip, err := zstd.NewReader(from, zstd.WithDecoderMaxMemory(1<<30))
	if err != nil {
		return nil, head, err
	}
	b := &backupReader{zip: zip, sum: sha256.New()}
	b.r = bufio.NewReaderSize(zip, 1<<16)
	text, err := b.bytes(maxBackupHead)
	if err != nil {
		b.close()
		return nil, head, err
	}
	if err := json.Unmarshal(text, &head); err != nil {
		b.close()
		return nil, head, fmt.Errorf("%w: its head cannot be read", ErrBackup)
	}
	return b, head, nil
}

func (b *backupReader) close() { b.zip.Close() }

// ReadByte reads a byte into the checksum.
func (b *backupReader) ReadByte() (byte, error) {
	c, err := b.r.ReadByte()
	if err != nil {
		return 0, fmt.Errorf("%w: it ends early or is damaged", ErrBackup)
	}
	b.sum.Write([]byte{c})
	return c, nil
}

func (b *backupReader) bytes(most uint64) ([]byte, error) {
	n, err := binary.ReadUvarint(b)
	if err != nil || n > most {
		return nil, fmt.Errorf("%w: it ends early or is damaged", ErrBackup)
	}
	// The file may lie about the length: memory grows with the bytes that are
	// read.
	v, err := io.ReadAll(io.LimitReader(b.r, int64(n)))
	if err != nil || uint64(len(v)) != n {
		return nil, fmt.Errorf("%w: it ends early or is damaged", ErrBackup)
	}
	b.sum.Write(v)
	return v, nil
}

// row reads a row; at the end of a table there is none.
func (b *backupReader) row(table *backupTable, rows int64) (values []any, err error) {
	more, err := b.ReadByte()
	if err != nil {
		return nil, err
	}
	if more == 0 {
		n, err := binary.ReadUvarint(b)
		if err != nil || n != uint64(rows) {
			return nil, fmt.Errorf("%w: table %s has another number of rows", ErrBackup, table.Name)
		}
		return nil, nil
	}
	values = make([]any, len(table.Columns))
	for i, c := range table.Columns {
		there, err := b.ReadByte()
		if err != nil {
			return nil, err
		}
		if there == 0 {
			continue
		}
		if c.Kind == kindInt {
			if values[i], err = binary.ReadVarint(b); err != nil {
				return nil, fmt.Errorf("%w: it ends early or is damaged", ErrBackup)
			}
			continue
		}
		v, err := b.bytes(maxBackupCell)
		if err != nil {
			return nil, err
		}
		if values[i] = v; c.Kind == kindText {
			values[i] = string(v)
		}
	}
	return values, nil
}

// end checks the checksum.
func (b *backupReader) end() error {
	want := b.sum.Sum(nil)
	got, err := io.ReadAll(io.LimitReader(b.r, sha256.Size+1))
	if err != nil || string(got) != string(want) {
		return fmt.Errorf("%w: its checksum is another one", ErrBackup)
	}
	return nil
}
