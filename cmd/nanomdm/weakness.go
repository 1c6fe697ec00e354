package main

import (
	"fmt"
	"math"
	"unicode/utf8"
)

// minKeyBits is the entropy below which a key of the API is warned about.
const minKeyBits = 80

// weakness returns why a key may be guessed, or "". It estimates the entropy
// from the length, the alphabet and repetitions, and knows no dictionary, so
// that it finds short and uniform keys alone.
func weakness(key string) string {
	if key == "" {
		return ""
	}
	if bits := entropy(key); bits < minKeyBits {
		return fmt.Sprintf("it has about %d bits and should have %d", int(bits), minKeyBits)
	}
	return ""
}

// entropy estimates the bits of a random key: the lesser of what its alphabet
// and what the frequencies of its characters allow.
func entropy(key string) float64 {
	counts := make(map[rune]int)
	var digit, hexLower, hexUpper, lower, upper, other bool
	for _, r := range key {
		counts[r]++
		switch {
		case r >= '0' && r <= '9':
			digit = true
		case r >= 'a' && r <= 'f':
			hexLower = true
		case r >= 'A' && r <= 'F':
			hexUpper = true
		case r >= 'g' && r <= 'z':
			lower = true
		case r >= 'G' && r <= 'Z':
			upper = true
		default:
			other = true
		}
	}
	size := 0
	for _, class := range []struct {
		used bool
		size int
	}{
		{digit, 10}, {hexLower, 6}, {hexUpper, 6}, {lower, 20}, {upper, 20}, {other, 33},
	} {
		if class.used {
			size += class.size
		}
	}
	n := float64(utf8.RuneCountInString(key))
	alphabet := n * math.Log2(float64(size))
	repetition := 0.0
	for _, count := range counts {
		repetition -= float64(count) * math.Log2(float64(count)/n)
	}
	// A random text repeats characters, too: its frequencies show about four
	// fifths of what it has at the lengths in question.
	return min(alphabet, repetition*5/4)
}
