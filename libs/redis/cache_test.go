package redis

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestCache(t *testing.T) {
	c := open(t, backend(t))
	if _, err := c.Get(t.Context(), "a"); !errors.Is(err, ErrMiss) {
		t.Errorf("an empty cache: %v", err)
	}
	value := []byte{0, 1, 0xff, '\n'}
	if err := c.Put(t.Context(), "a", value, time.Minute); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Get(t.Context(), "a"); err != nil || !bytes.Equal(got, value) {
		t.Errorf("got %q, %v", got, err)
	}
	if err := c.Put(t.Context(), "a", make([]byte, MaxValue+1), time.Minute); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	if err := c.Put(t.Context(), "a", value, time.Millisecond); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		if _, err := c.Get(t.Context(), "a"); errors.Is(err, ErrMiss) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the entry does not expire")
		}
	}
}

// Raise returns the greatest value so far, whatever the order.
func TestRaise(t *testing.T) {
	c := open(t, backend(t))
	if held, err := c.Raise(t.Context(), "none", "", time.Minute); held != "" || err != nil {
		t.Errorf("nothing kept: %q, %v", held, err)
	}
	keys := 0
	rapid.Check(t, func(rt *rapid.T) {
		keys++
		key := fmt.Sprint("mark-", keys)
		greatest := ""
		for _, n := range rapid.SliceOfN(rapid.IntRange(0, 1_000_000), 1, 8).Draw(rt, "values") {
			value := fmt.Sprintf("%020d", n)
			greatest = max(greatest, value)
			held, err := c.Raise(t.Context(), key, value, time.Minute)
			if err != nil || held != greatest {
				rt.Fatalf("raised to %q, kept is %q (%v), want %q", value, held, err, greatest)
			}
		}
		if held, err := c.Raise(t.Context(), key, "", time.Minute); err != nil || held != greatest {
			rt.Fatalf("kept is %q (%v), want %q", held, err, greatest)
		}
	})
}
