package sqlstore

import (
	"go/ast"
	"go/parser"
	"go/token"
	"reflect"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestEveryOperationHasARow compares the table of operations with the types of
// package storage that are one.
func TestEveryOperationHasARow(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "../storage.go", nil, parser.SkipObjectResolution)
	require.NoError(t, err)
	var want []string
	for _, decl := range file.Decls {
		if f, ok := decl.(*ast.FuncDecl); ok && f.Name.Name == "op" && f.Recv != nil {
			want = append(want, f.Recv.List[0].Type.(*ast.StarExpr).X.(*ast.Ident).Name)
		}
	}
	require.NotEmpty(t, want)
	var got []string
	for _, kind := range opKinds {
		got = append(got, reflect.TypeOf(kind.op).Elem().Name())
		require.Same(t, kind, kindOf(kind.op))
		require.False(t, kind.write != nil && kind.round != nil, "%T: round stands in place of write", kind.op)
	}
	require.ElementsMatch(t, want, got)
}
