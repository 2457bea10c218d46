package statement_test

import (
	"errors"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
)

// Bundles at hand are judged as attached ones are, and none that is older than
// one seen before counts.
func TestDecide(t *testing.T) {
	older, newer := facts(contracts.VerdictPass), facts(contracts.VerdictFail)
	newer.Snapshot.Sequence = older.Snapshot.Sequence + 1
	later := newer
	later.Time = newer.Time.Add(time.Hour)
	otherImage := facts(contracts.VerdictPass)
	otherImage.Image.Digest = contracts.DigestOf([]byte("other"))
	bundle := func(f statement.Facts) statement.Bundle {
		return statement.Bundle{Digest: contracts.DigestOf([]byte(f.Report.Verdict)), Content: signVSA(t, ourKey(), f)}
	}
	seen := func(f statement.Facts) statement.Seen {
		return statement.Seen{Sequence: f.Snapshot.Sequence, Time: f.Time}
	}
	for name, test := range map[string]struct {
		bundles []statement.Bundle
		seen    statement.Seen
		want    error
		decides *statement.Facts
	}{
		"none":                  {nil, statement.Seen{}, statement.ErrNoStatement, nil},
		"good":                  {[]statement.Bundle{bundle(older)}, statement.Seen{}, nil, &older},
		"the same again":        {[]statement.Bundle{bundle(older)}, seen(older), nil, &older},
		"newest decides":        {[]statement.Bundle{bundle(older), bundle(newer)}, seen(older), statement.ErrVerdict, &newer},
		"older sequence":        {[]statement.Bundle{bundle(older)}, seen(newer), statement.ErrSuperseded, &older},
		"same sequence, before": {[]statement.Bundle{bundle(newer)}, seen(later), statement.ErrSuperseded, &newer},
		"another image":         {[]statement.Bundle{bundle(otherImage)}, statement.Seen{}, statement.ErrOtherDigest, nil},
		"another key":           {[]statement.Bundle{{Content: signVSA(t, otherKey(), older)}}, statement.Seen{}, statement.ErrForeignKey, nil},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := statement.Decide(t.Context(), image.Digest, test.bundles, statement.Options{
				Keys: []statement.Verifier{ourKey().Verifier()}, Seen: test.seen, Now: matched.Add(time.Minute),
			})
			if !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
			if d.Statement.HasVerdict != (test.decides != nil) {
				t.Fatalf("decided by %+v", d.Statement)
			}
			if test.decides != nil && (d.Statement.Seen() != seen(*test.decides) || d.Bundle.Digest != contracts.DigestOf([]byte(test.decides.Report.Verdict))) {
				t.Errorf("decided by %+v", d.Statement)
			}
			if err != nil && !errors.Is(err, statement.ErrVerdict) && !statement.NotVerifiable(err) {
				t.Errorf("%v is trouble with the registry", err)
			}
		})
	}
}
