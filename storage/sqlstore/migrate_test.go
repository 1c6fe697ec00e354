package sqlstore

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestMigrationsAreFrozen(t *testing.T) { require.NoError(t, migrations().Check()) }
