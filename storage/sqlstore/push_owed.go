package sqlstore

// A push is owed to an enrollment while the last number it was owed for lies
// behind the last that was accepted or answered. These texts say so, and
// nothing else does.
const (
	pushOwed = "paid_seq < owed_seq"
	// pushOwedIndexed is pushOwed by the index on push_at, where rows that are
	// owed nothing have no time.
	pushOwedIndexed = "push_at IS NOT NULL AND " + pushOwed

	// owePushAt takes a number and owes a push for it at a time. MySQL assigns
	// from left to right, so last_seq comes last.
	owePushAt = "owed_seq = last_seq + 1, push_at = ?, last_seq = last_seq + 1"
	// owePushBy is owePushAt where a nearer time stays, else a queue that grows
	// all the time would keep the sweep off. It takes the time twice.
	owePushBy = "owed_seq = last_seq + 1, push_at = CASE WHEN push_at < ? THEN push_at ELSE ? END, last_seq = last_seq + 1"
	// oweNumbersAt takes as many numbers as its first and last argument say, and
	// owes a push for the last of them.
	oweNumbersAt = "owed_seq = last_seq + ?, push_at = ?, last_seq = last_seq + ?"
	// takeNumber takes a number and owes nothing.
	takeNumber = "last_seq = last_seq + 1"
)
