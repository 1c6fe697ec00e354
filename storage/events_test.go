package storage

import (
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestBearsTokens(t *testing.T) {
	bears := slices.DeleteFunc(EventTopics(), func(topic string) bool { return !BearsTokens(topic) })
	require.Equal(t, []string{TopicTokenUpdate, TopicUserAuthenticate, TopicSetBootstrapToken, TopicGetToken}, bears)
	for _, unknown := range []string{"", "mdm.Unheard", "nanomdm.Unheard"} {
		require.True(t, BearsTokens(unknown), unknown)
	}
}
