package storage_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
)

func TestTagFault(t *testing.T) {
	for _, tag := range []string{"lab", "1", "Berlin.3_og", "owner:anna@example.org", "a+b-c", strings.Repeat("x", storage.MaxTagLen)} {
		require.Empty(t, storage.TagFault(tag), tag)
	}
	for _, text := range []string{"", " ", "-lab", ".x", "a b", "a/b", "büro", "a\n", "\x00", "a,b", strings.Repeat("x", storage.MaxTagLen+1)} {
		require.NotEmpty(t, storage.TagFault(text), text)
	}
}
