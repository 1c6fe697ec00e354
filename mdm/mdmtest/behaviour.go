package mdmtest

import (
	"math/rand/v2"
	"sync"
)

// Status is the Status key of a report.
type Status string

// The statuses of Apple's command protocol.
const (
	StatusIdle               Status = "Idle"
	StatusAcknowledged       Status = "Acknowledged"
	StatusError              Status = "Error"
	StatusCommandFormatError Status = "CommandFormatError"
	StatusNotNow             Status = "NotNow"
)

// ErrorItem is one link of an ErrorChain; the first is the top level.
type ErrorItem struct {
	Code        int64
	Domain      string
	Description string
}

// Answer is what a device says to a command.
type Answer struct {
	// Status: empty is what the device finds itself, which is Acknowledged
	// unless the command makes no sense to it.
	Status Status
	// ErrorChain goes with StatusError and StatusCommandFormatError.
	ErrorChain []ErrorItem
	// Payload replaces the keys that the device would add by itself, as
	// property list XML; see Plist.Content.
	Payload []byte
}

// Behaviour decides how a device answers a command. It is called for each
// offer of the command, possibly from several goroutines at once.
type Behaviour func(*Command) Answer

// Rates are probabilities between 0 and 1.
type Rates struct {
	NotNow, Error, CommandFormatError float64
}

// Random answers by chance, the same way for the same seed and order of
// commands. It may serve many devices.
func Random(seed uint64, rates Rates) Behaviour {
	var mu sync.Mutex
	source := rand.New(rand.NewPCG(seed, 0))
	return func(*Command) Answer {
		mu.Lock()
		chance := source.Float64()
		mu.Unlock()
		if chance -= rates.NotNow; chance < 0 {
			return Answer{Status: StatusNotNow}
		}
		if chance -= rates.Error; chance < 0 {
			return Answer{Status: StatusError, ErrorChain: []ErrorItem{{
				Code: 12021, Domain: "MCMDMErrorDomain", Description: "The simulated device was told to fail.",
			}}}
		}
		if chance -= rates.CommandFormatError; chance < 0 {
			return Answer{Status: StatusCommandFormatError}
		}
		return Answer{}
	}
}
