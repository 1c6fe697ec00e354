package sqldb

import (
	"context"
	"net"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/stretchr/testify/require"
)

// TestUnreplicatedCommit: a COMMIT that the server reports as done, with a
// warning that no standby confirmed it, is not acknowledged to anybody.
func TestUnreplicatedCommit(t *testing.T) {
	for name, c := range map[string]struct {
		notice *pgproto3.NoticeResponse
		want   error
	}{
		"confirmed":       {nil, nil},
		"another warning": {&pgproto3.NoticeResponse{Severity: "WARNING", Code: "01000", Routine: "EndTransactionBlock"}, nil},
		"not confirmed":   {&pgproto3.NoticeResponse{Severity: "WARNUNG", Code: "01000", Routine: "SyncRepWaitForLSN"}, ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			notice := c.notice
			pc, err := pgx.ParseConfig("postgres://user@127.0.0.1/database?sslmode=disable")
			require.NoError(t, err)
			pc.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
			pc.DialFunc = func(context.Context, string, string) (net.Conn, error) {
				client, server := net.Pipe()
				go answerCommits(server, func() *pgproto3.NoticeResponse { defer func() { notice = nil }(); return notice })
				return client, nil
			}
			noteUnreplicated(pc)
			db := stdlib.OpenDB(*pc)
			defer db.Close()
			conn, err := db.Conn(t.Context())
			require.NoError(t, err)
			defer conn.Close()
			require.ErrorIs(t, pgsqlExecBatch(t.Context(), conn, []statement{{text: "COMMIT"}}), c.want)
			require.NoError(t, pgsqlExecBatch(t.Context(), conn, []statement{{text: "COMMIT"}}), "the next transaction is another one")
		})
	}
}

// answerCommits is a server that takes every statement for a COMMIT that
// succeeds, with a notice before it if there is one.
func answerCommits(conn net.Conn, notice func() *pgproto3.NoticeResponse) {
	defer conn.Close()
	backend := pgproto3.NewBackend(conn, conn)
	if _, err := backend.ReceiveStartupMessage(); err != nil {
		return
	}
	backend.Send(&pgproto3.AuthenticationOk{})
	// pgx needs to know both for the simple protocol.
	backend.Send(&pgproto3.ParameterStatus{Name: "standard_conforming_strings", Value: "on"})
	backend.Send(&pgproto3.ParameterStatus{Name: "client_encoding", Value: "UTF8"})
	backend.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
	for backend.Flush() == nil {
		m, err := backend.Receive()
		if err != nil {
			return
		}
		if _, ok := m.(*pgproto3.Query); !ok {
			return
		}
		if n := notice(); n != nil {
			backend.Send(n)
		}
		backend.Send(&pgproto3.CommandComplete{CommandTag: []byte("COMMIT")})
		backend.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
	}
}
