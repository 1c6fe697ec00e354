package main

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/storage"
)

// loadSealer reads the keys of -seal-key-file. It is nil without them, which
// is said in the log.
func loadSealer(o options, log *slog.Logger) (storage.Sealer, error) {
	if o.sealKeyFile == "" {
		log.Warn("push keys and devices' tokens are stored unsealed: whoever reads the database has them; give -seal-key-file")
		return nil, nil
	}
	data, err := os.ReadFile(o.sealKeyFile)
	if err != nil {
		return nil, fmt.Errorf("-seal-key-file: %w", err)
	}
	keys, err := cryptoutil.ParseSealKeys(data)
	if err != nil {
		return nil, fmt.Errorf("-seal-key-file: %s: %w", o.sealKeyFile, err)
	}
	log.Info("sealing at rest", "key_id", keys.KeyIDs()[0], "keys", len(keys.KeyIDs()), "commands", o.sealCommands)
	return keys, nil
}
