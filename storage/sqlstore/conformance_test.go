package sqlstore_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/nanomdm/nanomdm/storage/storagetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConformance(t *testing.T) { storagetest.Run(t) }

func TestConformanceBehindPgBouncer(t *testing.T) { storagetest.RunBehindPgBouncer(t) }
