package store_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/tidewaiter/tidewaiter/libs/store/storetest"
)

func TestAlone(t *testing.T) {
	url := storetest.URL(t)
	a, b := storetest.OpenURL(t, url), storetest.OpenURL(t, url)
	errWork := errors.New("work failed")
	ran, err := a.Alone(t.Context(), "x", func(ctx context.Context) error {
		for _, db := range []interface {
			Alone(ctx context.Context, name string, work func(context.Context) error) (bool, error)
		}{a, b} {
			if ran, err := db.Alone(ctx, "x", func(context.Context) error { t.Error("two at once"); return nil }); ran || err != nil {
				t.Errorf("while it is taken: %v, %v", ran, err)
			}
		}
		if ran, err := b.Alone(ctx, "y", func(context.Context) error { return nil }); !ran || err != nil {
			t.Errorf("another name: %v, %v", ran, err)
		}
		return errWork
	})
	if !ran || !errors.Is(err, errWork) {
		t.Errorf("%v, %v", ran, err)
	}
	if ran, err := b.Alone(t.Context(), "x", func(context.Context) error { return nil }); !ran || err != nil {
		t.Errorf("after it was given back: %v, %v", ran, err)
	}
	other := storetest.Open(t)
	if ran, err := a.Alone(t.Context(), "x", func(ctx context.Context) error {
		ran, err := other.Alone(ctx, "x", func(context.Context) error { return nil })
		if !ran {
			t.Error("another database is not another one")
		}
		return err
	}); !ran || err != nil {
		t.Errorf("%v, %v", ran, err)
	}
}

// However many ask at once, and whatever becomes of their contexts: one works.
func TestAloneAtOnce(t *testing.T) {
	url := storetest.URL(t)
	var at, worked atomic.Int32
	var group sync.WaitGroup
	for range 4 {
		db := storetest.OpenURL(t, url)
		group.Go(func() {
			for range 50 {
				ctx, cancel := context.WithCancel(t.Context())
				_, err := db.Alone(ctx, "x", func(context.Context) error {
					if at.Add(1) != 1 {
						t.Error("two at once")
					}
					worked.Add(1)
					cancel() // what is held is given back nevertheless
					at.Add(-1)
					return nil
				})
				cancel()
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	if worked.Load() == 0 {
		t.Error("nobody worked")
	}
}
