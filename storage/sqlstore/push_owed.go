package sqlstore

// A push is owed to an enrollment while paid_seq < owed_seq. Only these texts
// say so.
const (
	pushOwed = "paid_seq < owed_seq"
	// pushOwedIndexed is pushOwed by the index on push_at, which is NULL in
	// rows without a push owed.
	pushOwedIndexed = "push_at IS NOT NULL AND " + pushOwed

	// owePushAt takes the next number and makes a push owed for it, due at a
	// time. MySQL assigns from left to right, so last_seq comes last.
	owePushAt = "owed_seq = last_seq + 1, push_at = ?, last_seq = last_seq + 1"
	// owePushBy is owePushAt that keeps an earlier time, since a queue that
	// grows all the time would otherwise never be due. It takes the time twice.
	owePushBy = "owed_seq = last_seq + 1, push_at = CASE WHEN push_at < ? THEN push_at ELSE ? END, last_seq = last_seq + 1"
	// oweNumbersAt takes as many numbers as its first and last arguments say,
	// and makes a push owed for the last of them.
	oweNumbersAt = "owed_seq = last_seq + ?, push_at = ?, last_seq = last_seq + ?"
	// oweNumbersBy is oweNumbersAt that keeps an earlier time.
	oweNumbersBy = "owed_seq = last_seq + ?, push_at = CASE WHEN push_at < ? THEN push_at ELSE ? END, last_seq = last_seq + ?"
	// takeNumbers takes some numbers without a push owed.
	takeNumbers = "last_seq = last_seq + ?"
	// takeNumber takes a number without a push owed.
	takeNumber = "last_seq = last_seq + 1"
)
