package store_test

import (
	"context"
	"crypto/rand"
	"database/sql"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/cloudevents/sdk-go/v2/event"

	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/libs/store/storetest"
)

// BenchmarkOnce is one event through a service with state and one output; the
// handles stand for services that share the file.
func BenchmarkOnce(b *testing.B) {
	for _, handles := range []int{1, 6} {
		b.Run(fmt.Sprintf("handles=%d", handles), func(b *testing.B) {
			url := storetest.URL(b)
			dbs := make([]*store.DB, handles)
			for i := range dbs {
				dbs[i] = storetest.OpenURL(b, url)
				if err := dbs[i].Migrate(b.Context(), "test", tables()); err != nil {
					b.Fatal(err)
				}
			}
			var n, next atomic.Int64
			b.SetParallelism(handles)
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				worker := int(next.Add(1))
				db, service := dbs[worker%handles], fmt.Sprintf("service%d", worker)
				for pb.Next() {
					_, err := db.Once(b.Context(), service, input(fmt.Sprint(n.Add(1))), func(ctx context.Context, tx *sql.Tx) ([]event.Event, error) {
						_, err := tx.ExecContext(ctx, increment, service)
						return []event.Event{output(b, "s")}, err
					})
					if err != nil {
						b.Error(err)
					}
				}
			})
		})
	}
}

// BenchmarkPutBlob stores reports of 64 KiB that do not pack.
func BenchmarkPutBlob(b *testing.B) {
	db := storetest.Open(b)
	content := make([]byte, 64<<10)
	b.SetBytes(int64(len(content)))
	for b.Loop() {
		_, _ = rand.Read(content)
		if _, err := db.PutBlob(b.Context(), content); err != nil {
			b.Fatal(err)
		}
	}
}
