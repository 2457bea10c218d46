package statement_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	vsa "github.com/in-toto/attestation/go/predicates/vsa/v1"
	intoto "github.com/in-toto/attestation/go/v1"
	digestpkg "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sigstore/cosign/v2/pkg/cosign"
	"github.com/sigstore/cosign/v2/pkg/cosign/attestation"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
)

// The keys of the tests. Decrypting one costs half a second, so they are made once.
var (
	ourKey   = sync.OnceValue(func() *statement.Signer { return newSigner() })
	otherKey = sync.OnceValue(func() *statement.Signer { return newSigner() })
)

func newSigner() *statement.Signer {
	private, _, err := statement.GenerateKey([]byte("hunter2"))
	if err != nil {
		panic(err)
	}
	s, err := statement.LoadSigner(private, []byte("hunter2"))
	if err != nil {
		panic(err)
	}
	return s
}

var (
	matched = time.Date(2026, 11, 23, 10, 0, 0, 0, time.UTC)
	image   = contracts.Image{Registry: "registry.example:5000", Repository: "shop/cart", Digest: contracts.DigestOf([]byte("cart"))}
)

func report(verdict string, findings ...contracts.Finding) *contracts.Report {
	r := &contracts.Report{
		Digest: image.Digest, Kind: contracts.KindImage, Inventory: contracts.DigestOf([]byte("inventory")),
		Analyzer: "1", Matcher: "1", Policy: contracts.DigestOf([]byte("policy")), Verdict: verdict,
		Packages: 42, Findings: findings,
	}
	for _, f := range findings {
		if f.Severity == contracts.SeverityCritical {
			r.Counts.Critical++
		}
		if f.KEV {
			r.Counts.KEV++
		}
	}
	return r
}

func facts(verdict string) statement.Facts {
	return statement.Facts{
		Image: image, Report: report(verdict), ReportDigest: contracts.DigestOf([]byte("report")),
		Snapshot:     contracts.SnapshotRef{Digest: contracts.DigestOf([]byte("snapshot")), Sequence: 100},
		SnapshotTime: matched.Add(-time.Hour), EventID: "event-1", Time: matched, ValidUntil: matched.Add(7 * 24 * time.Hour),
	}
}

func signVSA(t testing.TB, key *statement.Signer, f statement.Facts) []byte {
	t.Helper()
	b, err := statement.SignBundle(context.Background(), key, f.Image.Repo(), f.Image.Digest, contracts.PredicateVSA, statement.VSAPredicate(f))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func signVuln(t testing.TB, key *statement.Signer, f statement.Facts) []byte {
	t.Helper()
	b, err := statement.SignBundle(context.Background(), key, f.Image.Repo(), f.Image.Digest, contracts.PredicateVuln, statement.VulnPredicate(f))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSignedBundleVerifies(t *testing.T) {
	f := facts(contracts.VerdictWarn)
	for name, bundle := range map[string][]byte{"vsa": signVSA(t, ourKey(), f), "vuln": signVuln(t, ourKey(), f)} {
		s, err := statement.Verify(t.Context(), bundle, image.Digest, []statement.Verifier{otherKey().Verifier(), ourKey().Verifier()})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		want := statement.Statement{
			PredicateType: s.PredicateType, Subject: image.Digest, Signer: ourKey().ID(), HasVerdict: true,
			Verdict: contracts.VerdictWarn, Snapshot: f.Snapshot, SnapshotTime: f.SnapshotTime,
			Policy: f.Report.Policy, Report: f.ReportDigest, Time: matched, ValidUntil: f.ValidUntil,
		}
		if s != want {
			t.Errorf("%s: got %+v, want %+v", name, s, want)
		}
	}
}

func TestVerifyRefuses(t *testing.T) {
	good := signVSA(t, ourKey(), facts(contracts.VerdictPass))
	keys := []statement.Verifier{ourKey().Verifier()}
	otherDigest := contracts.DigestOf([]byte("another image"))
	change := func(path func(b map[string]any)) []byte {
		var b map[string]any
		if err := json.Unmarshal(good, &b); err != nil {
			t.Fatal(err)
		}
		path(b)
		out, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	envelope := func(b map[string]any) map[string]any { return b["dsseEnvelope"].(map[string]any) }
	rewrite := func(from, to string) []byte {
		return change(func(b map[string]any) {
			payload, err := base64.StdEncoding.DecodeString(envelope(b)["payload"].(string))
			if err != nil || !bytes.Contains(payload, []byte(from)) {
				t.Fatalf("payload %s: %v", payload, err)
			}
			envelope(b)["payload"] = base64.StdEncoding.EncodeToString(bytes.Replace(payload, []byte(from), []byte(to), 1))
		})
	}
	for name, c := range map[string]struct {
		bundle []byte
		digest string
		want   error
	}{
		"another key":             {signVSA(t, otherKey(), facts(contracts.VerdictPass)), image.Digest, statement.ErrForeignKey},
		"another digest":          {good, otherDigest, statement.ErrOtherDigest},
		"a changed verdict":       {rewrite(`"verdict":"pass"`, `"verdict":"warn"`), image.Digest, statement.ErrBadSignature},
		"one changed byte":        {rewrite(`"sequence":100`, `"sequence":101`), image.Digest, statement.ErrBadSignature},
		"a changed subject":       {rewrite(strings.TrimPrefix(image.Digest, "sha256:"), strings.TrimPrefix(otherDigest, "sha256:")), otherDigest, statement.ErrBadSignature},
		"a changed payload type":  {change(func(b map[string]any) { envelope(b)["payloadType"] = "text/plain" }), image.Digest, statement.ErrMalformed},
		"no signature":            {change(func(b map[string]any) { envelope(b)["signatures"] = []any{} }), image.Digest, statement.ErrBadSignature},
		"an unknown bundle":       {change(func(b map[string]any) { b["mediaType"] = "application/vnd.dev.sigstore.bundle.v9.9+json" }), image.Digest, statement.ErrMalformed},
		"a foreign key's hint":    {change(func(b map[string]any) { delete(b, "verificationMaterial") }), image.Digest, statement.ErrMalformed},
		"no JSON":                 {[]byte("sigstore"), image.Digest, statement.ErrMalformed},
		"nothing":                 {nil, image.Digest, statement.ErrMalformed},
		"too large":               {append(bytes.Clone(good), bytes.Repeat([]byte(" "), statement.MaxBundle)...), image.Digest, statement.ErrTooLarge},
		"a digest that is not":    {good, "sha256:abc", contracts.ErrInvalidImage},
		"a verdict nobody knows":  {signVSA(t, ourKey(), facts("maybe")), image.Digest, statement.ErrMalformed},
		"a verdict without times": {signVSA(t, ourKey(), statement.Facts{Image: image, Report: report(contracts.VerdictPass)}), image.Digest, statement.ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := statement.Verify(t.Context(), c.bundle, c.digest, keys)
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

// Statements of other tools, signed with the same key, are genuine and carry no verdict.
func TestOtherToolsStatements(t *testing.T) {
	foreign := contracts.VSAPredicate{Verifier: contracts.VSAVerifier{ID: "https://other.example/"}, VerificationResult: "PASSED"}
	for name, c := range map[string]struct {
		predicateType string
		predicate     any
	}{
		"provenance":                {"https://slsa.dev/provenance/v1", map[string]any{"buildDefinition": map[string]any{}}},
		"another verifier's":        {contracts.PredicateVSA, foreign},
		"another scanner's results": {contracts.PredicateVuln, map[string]any{"scanner": map[string]any{"uri": "pkg:other"}}},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := statement.SignBundle(t.Context(), ourKey(), image.Repo(), image.Digest, c.predicateType, c.predicate)
			if err != nil {
				t.Fatal(err)
			}
			s, err := statement.Verify(t.Context(), b, image.Digest, []statement.Verifier{ourKey().Verifier()})
			if err != nil || s.HasVerdict {
				t.Errorf("got %+v, %v", s, err)
			}
		})
	}
}

// What is signed has the shape that in-toto and cosign expect.
func TestPayloadShape(t *testing.T) {
	var b struct {
		MediaType    string `json:"mediaType"`
		DSSEEnvelope struct {
			Payload     []byte `json:"payload"`
			PayloadType string `json:"payloadType"`
		} `json:"dsseEnvelope"`
	}
	if err := json.Unmarshal(signVuln(t, ourKey(), facts(contracts.VerdictFail)), &b); err != nil {
		t.Fatal(err)
	}
	if b.MediaType != contracts.MediaTypeBundle || b.DSSEEnvelope.PayloadType != "application/vnd.in-toto+json" {
		t.Errorf("bundle %q with payload %q", b.MediaType, b.DSSEEnvelope.PayloadType)
	}
	var s intoto.Statement
	if err := protojson.Unmarshal(b.DSSEEnvelope.Payload, &s); err != nil {
		t.Fatal(err)
	}
	if err := s.Validate(); err != nil {
		t.Error(err)
	}
	predicate, err := s.GetPredicate().MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	var vuln attestation.CosignVulnPredicate
	if err := json.Unmarshal(predicate, &vuln); err != nil {
		t.Fatal(err)
	}
	result, ok := vuln.Scanner.Result.(map[string]any)
	if !ok || !vuln.Metadata.ScanFinishedOn.Equal(matched) || vuln.Scanner.DB.Version != "100" || result["verdict"] != "fail" {
		t.Errorf("cosign reads %+v", vuln)
	}
}

// The verification summary is what in-toto's own types read.
func TestSummaryShape(t *testing.T) {
	for verdict, result := range map[string]string{
		contracts.VerdictPass: "PASSED", contracts.VerdictWarn: "PASSED", contracts.VerdictFail: "FAILED",
	} {
		f := facts(verdict)
		body, err := json.Marshal(statement.VSAPredicate(f))
		if err != nil {
			t.Fatal(err)
		}
		var p vsa.VerificationSummary
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(body, &p); err != nil {
			t.Fatal(err)
		}
		if p.GetVerificationResult() != result || p.GetVerifier().GetId() != contracts.VerifierID || !p.GetTimeVerified().AsTime().Equal(matched) ||
			"sha256:"+p.GetPolicy().GetDigest()["sha256"] != f.Report.Policy || p.GetResourceUri() != "oci://"+image.String() {
			t.Errorf("%s: %v", verdict, &p)
		}
	}
}

// The summary holds the worst findings and stays under its limit whatever the
// findings are named.
func TestPredicateIsBounded(t *testing.T) {
	var findings []contracts.Finding
	for i := range 500 {
		findings = append(findings, contracts.Finding{
			ID: fmt.Sprintf("CVE-2020-%04d", i), Severity: contracts.SeverityHigh, Status: contracts.StatusAffected,
			Package: contracts.FindingPackage{PURL: "pkg:npm/" + strings.Repeat("é", 40<<10)},
		})
	}
	findings = append(findings,
		contracts.Finding{ID: "CVE-2021-44228", Severity: contracts.SeverityCritical, Status: contracts.StatusAffected, KEV: true, Fixed: []string{"2.15.0"}},
		contracts.Finding{ID: "CVE-2019-10744", Severity: contracts.SeverityCritical, Status: contracts.StatusAffected},
		contracts.Finding{ID: "CVE-2000-0001", Severity: contracts.SeverityCritical, Status: contracts.StatusNotAffected},
	)
	f := facts(contracts.VerdictFail)
	f.Report = report(contracts.VerdictFail, findings...)
	for range 100 {
		f.Report.Reasons = append(f.Report.Reasons, strings.Repeat("reason ", 10<<10))
	}
	p := statement.VulnPredicate(f)
	body, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	if len(body) > statement.MaxPredicate {
		t.Errorf("predicate of %d bytes", len(body))
	}
	top := p.Scanner.Result.Top
	if len(top) != statement.MaxTop || top[0].ID != "CVE-2021-44228" || top[0].Fixed != "2.15.0" || top[1].ID != "CVE-2019-10744" || top[2].ID != "CVE-2020-0000" {
		t.Errorf("top: %.300v", top)
	}
	signVuln(t, ourKey(), f)

	_, err = statement.SignBundle(t.Context(), ourKey(), image.Repo(), image.Digest, "x", strings.Repeat("x", statement.MaxPredicate))
	if !errors.Is(err, statement.ErrTooLarge) {
		t.Errorf("got %v, want ErrTooLarge", err)
	}
}

func TestKeys(t *testing.T) {
	private, public, err := statement.GenerateKey([]byte("correct"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(private, []byte("ENCRYPTED SIGSTORE PRIVATE KEY")) {
		t.Errorf("private key: %.40s", private)
	}
	signer, err := statement.LoadSigner(private, []byte("correct"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(signer.PublicPEM(), public) {
		t.Error("the public key of the loaded key is another")
	}
	verifiers, err := statement.LoadVerifiers(public, append(otherKey().PublicPEM(), ourKey().PublicPEM()...))
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, v := range verifiers {
		ids = append(ids, v.ID())
	}
	if want := []string{signer.ID(), otherKey().ID(), ourKey().ID()}; !slices.Equal(ids, want) {
		t.Errorf("got %v, want %v", ids, want)
	}
	_, err = statement.LoadSigner(private, []byte("wrong-secret"))
	if !errors.Is(err, statement.ErrKey) || strings.Contains(err.Error(), "wrong-secret") {
		t.Errorf("wrong password: %v", err)
	}
	for name, pem := range map[string]string{"nothing": "", "text": "no key", "private": string(private), "garbage": "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"} {
		if _, err := statement.LoadVerifiers([]byte(pem)); !errors.Is(err, statement.ErrKey) {
			t.Errorf("%s: got %v, want ErrKey", name, err)
		}
	}
}

// Every kind of key signs what its public half verifies; weak and odd ones are refused.
func TestKindsOfKey(t *testing.T) {
	generate := map[string]func() (any, error){
		"ECDSA P-256": func() (any, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) },
		"ECDSA P-384": func() (any, error) { return ecdsa.GenerateKey(elliptic.P384(), rand.Reader) },
		"Ed25519":     func() (any, error) { _, k, err := ed25519.GenerateKey(rand.Reader); return k, err },
		"RSA 2048":    func() (any, error) { return rsa.GenerateKey(rand.Reader, 2048) },
	}
	for name, gen := range generate {
		t.Run(name, func(t *testing.T) {
			key, err := gen()
			if err != nil {
				t.Fatal(err)
			}
			der, err := x509.MarshalPKCS8PrivateKey(key)
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(t.TempDir(), "key.pem")
			if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
				t.Fatal(err)
			}
			imported, err := cosign.ImportKeyPair(file, func(bool) ([]byte, error) { return []byte("pw"), nil })
			if err != nil {
				t.Fatal(err)
			}
			signer, err := statement.LoadSigner(imported.PrivateBytes, []byte("pw"))
			if err != nil {
				t.Fatal(err)
			}
			verifiers, err := statement.LoadVerifiers(imported.PublicBytes)
			if err != nil {
				t.Fatal(err)
			}
			s, err := statement.Verify(t.Context(), signVSA(t, signer, facts(contracts.VerdictPass)), image.Digest, verifiers)
			if err != nil || s.Signer != signer.ID() {
				t.Errorf("got %+v, %v", s, err)
			}
		})
	}
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&weak.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := statement.LoadVerifiers(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})); !errors.Is(err, statement.ErrKey) {
		t.Errorf("RSA 1024: got %v, want ErrKey", err)
	}
}

// shelf is a registry that holds bundles of one image.
type shelf struct {
	bundles [][]byte
	vanish  int // how often the first bundle is gone when it is read
	fail    error
	lists   int
}

func (s *shelf) Resolve(_ context.Context, ref registry.Ref) (ocispec.Descriptor, error) {
	if ref.Tag != "latest" {
		return ocispec.Descriptor{}, registry.ErrNotFound
	}
	return ocispec.Descriptor{Digest: digestpkg.Digest(image.Digest)}, nil
}

func (s *shelf) Referrers(context.Context, registry.Ref, string) ([]ocispec.Descriptor, error) {
	s.lists++
	var out []ocispec.Descriptor
	for _, b := range s.bundles {
		out = append(out, ocispec.Descriptor{Digest: digestpkg.FromBytes(b)})
	}
	return out, s.fail
}

func (s *shelf) ArtifactContent(_ context.Context, _, _, digest string, limit int64) (registry.Artifact, error) {
	for i, b := range s.bundles {
		if contracts.DigestOf(b) != digest {
			continue
		}
		if i == 0 && s.vanish > 0 {
			s.vanish--
			return registry.Artifact{}, registry.ErrNotFound
		}
		if int64(len(b)) > limit {
			return registry.Artifact{}, registry.ErrTooLarge
		}
		return registry.Artifact{Type: contracts.MediaTypeBundle, MediaType: contracts.MediaTypeBundle, Content: b}, nil
	}
	return registry.Artifact{}, registry.ErrNotFound
}

func ref() registry.Ref {
	return registry.Ref{Registry: image.Registry, Repository: image.Repository, Digest: image.Digest}
}

func TestVerifyImage(t *testing.T) {
	with := func(verdict string, change func(f *statement.Facts)) statement.Facts {
		f := facts(verdict)
		if change != nil {
			change(&f)
		}
		return f
	}
	pass := with(contracts.VerdictPass, nil)
	warn := with(contracts.VerdictWarn, nil)
	fail := with(contracts.VerdictFail, nil)
	failNewer := with(contracts.VerdictFail, func(f *statement.Facts) { f.Snapshot.Sequence = 101 })
	passLater := with(contracts.VerdictPass, func(f *statement.Facts) { f.Time = matched.Add(time.Hour) })
	expiredVuln := with(contracts.VerdictPass, func(f *statement.Facts) { f.ValidUntil = matched.Add(time.Minute) })
	oldSnapshot := with(contracts.VerdictPass, func(f *statement.Facts) { f.SnapshotTime = matched.Add(-48 * time.Hour) })
	noSnapshotTime := with(contracts.VerdictPass, func(f *statement.Facts) { f.SnapshotTime = time.Time{} })
	otherImage := with(contracts.VerdictPass, func(f *statement.Facts) { f.Image.Digest = contracts.DigestOf([]byte("tomcat")) })
	vsa := func(f statement.Facts) []byte { return signVSA(t, ourKey(), f) }
	vuln := func(f statement.Facts) []byte { return signVuln(t, ourKey(), f) }
	foreign := signVSA(t, otherKey(), pass)
	hour := matched.Add(time.Hour)

	for name, c := range map[string]struct {
		bundles [][]byte
		o       statement.Options
		want    error
		good    int
		ignored int
	}{
		"pass":                            {[][]byte{vsa(pass), vuln(pass)}, statement.Options{}, nil, 2, 0},
		"warn":                            {[][]byte{vsa(warn)}, statement.Options{}, nil, 1, 0},
		"warn, when only pass will do":    {[][]byte{vsa(warn)}, statement.Options{Accept: contracts.VerdictPass}, statement.ErrVerdict, 1, 0},
		"fail":                            {[][]byte{vsa(fail), vuln(fail)}, statement.Options{}, statement.ErrVerdict, 2, 0},
		"fail, when genuine is enough":    {[][]byte{vsa(fail)}, statement.Options{Accept: contracts.VerdictFail}, nil, 1, 0},
		"nothing":                         {nil, statement.Options{}, statement.ErrNoStatement, 0, 0},
		"another key":                     {[][]byte{foreign}, statement.Options{}, statement.ErrForeignKey, 0, 1},
		"another image's statement":       {[][]byte{vsa(otherImage)}, statement.Options{}, statement.ErrOtherDigest, 0, 1},
		"garbage":                         {[][]byte{[]byte("{}")}, statement.Options{}, statement.ErrMalformed, 0, 1},
		"too large":                       {[][]byte{bytes.Repeat([]byte("x"), statement.MaxBundle+1)}, statement.Options{}, statement.ErrMalformed, 0, 1},
		"bad ones beside a good one":      {[][]byte{foreign, []byte("{}"), vsa(otherImage), vsa(pass)}, statement.Options{}, nil, 1, 3},
		"expired":                         {[][]byte{vsa(pass)}, statement.Options{Now: matched.Add(7 * 24 * time.Hour)}, statement.ErrExpired, 1, 0},
		"the last moment":                 {[][]byte{vsa(pass)}, statement.Options{Now: matched.Add(7*24*time.Hour - time.Second)}, nil, 1, 0},
		"young enough":                    {[][]byte{vsa(pass)}, statement.Options{MaxAge: 2 * time.Hour, Now: hour}, nil, 1, 0},
		"too old":                         {[][]byte{vsa(pass)}, statement.Options{MaxAge: time.Hour, Now: hour.Add(time.Second)}, statement.ErrTooOld, 1, 0},
		"advisories too old":              {[][]byte{vsa(oldSnapshot)}, statement.Options{MaxAge: 24 * time.Hour, Now: hour}, statement.ErrSnapshotOld, 1, 0},
		"age of advisories unknown":       {[][]byte{vsa(noSnapshotTime)}, statement.Options{MaxAge: 24 * time.Hour, Now: hour}, statement.ErrSnapshotOld, 1, 0},
		"another policy":                  {[][]byte{vsa(pass)}, statement.Options{Policy: contracts.DigestOf([]byte("other"))}, statement.ErrOtherPolicy, 1, 0},
		"the policy":                      {[][]byte{vsa(pass)}, statement.Options{Policy: pass.Report.Policy}, nil, 1, 0},
		"the higher sequence decides":     {[][]byte{vsa(passLater), vsa(failNewer), vsa(pass)}, statement.Options{}, statement.ErrVerdict, 3, 0},
		"then the later time":             {[][]byte{vsa(fail), vsa(passLater)}, statement.Options{}, nil, 2, 0},
		"a renewed summary is enough":     {[][]byte{vuln(expiredVuln), vsa(passLater)}, statement.Options{}, nil, 2, 0},
		"a scan without its summary does": {[][]byte{vuln(pass)}, statement.Options{}, nil, 1, 0},
		"beyond the limit":                {slices.Concat(slices.Repeat([][]byte{[]byte("{}")}, statement.MaxBundles), [][]byte{vsa(pass)}), statement.Options{}, statement.ErrMalformed, 0, statement.MaxBundles + 1},
	} {
		t.Run(name, func(t *testing.T) {
			c.o.Keys = []statement.Verifier{ourKey().Verifier()}
			if c.o.Now.IsZero() {
				c.o.Now = hour
			}
			v, err := statement.VerifyImage(t.Context(), &shelf{bundles: c.bundles}, ref(), c.o)
			if !errors.Is(err, c.want) || v.Verified != (c.want == nil) || (v.Reason == "") != (c.want == nil) {
				t.Errorf("got %+v, %v; want %v", v, err, c.want)
			}
			if c.want != nil && statement.NotVerifiable(err) == errors.Is(err, statement.ErrVerdict) {
				t.Errorf("%v: is not verifiable %v", err, statement.NotVerifiable(err))
			}
			if len(v.Statements) != c.good || len(v.Ignored) != c.ignored || v.Digest != image.Digest {
				t.Errorf("got %d statements, %d ignored, digest %s", len(v.Statements), len(v.Ignored), v.Digest)
			}
		})
	}
}

// A statement that is replaced while it is read is read again.
func TestVerifyImageDuringReplacement(t *testing.T) {
	s := &shelf{bundles: [][]byte{signVSA(t, ourKey(), facts(contracts.VerdictPass))}, vanish: 1}
	o := statement.Options{Keys: []statement.Verifier{ourKey().Verifier()}, Now: matched}
	v, err := statement.VerifyImage(t.Context(), s, ref(), o)
	if err != nil || !v.Verified || s.lists != 2 {
		t.Errorf("got %+v, %v after %d lists", v, err, s.lists)
	}
}

func TestVerifyImageByTag(t *testing.T) {
	s := &shelf{bundles: [][]byte{signVSA(t, ourKey(), facts(contracts.VerdictPass))}}
	o := statement.Options{Keys: []statement.Verifier{ourKey().Verifier()}, Now: matched}
	v, err := statement.VerifyImage(t.Context(), s, registry.Ref{Registry: image.Registry, Repository: image.Repository, Tag: "latest"}, o)
	if err != nil || v.Digest != image.Digest {
		t.Errorf("got %+v, %v", v, err)
	}
	_, err = statement.VerifyImage(t.Context(), s, registry.Ref{Registry: image.Registry, Repository: image.Repository, Tag: "none"}, o)
	if !errors.Is(err, registry.ErrNotFound) || statement.NotVerifiable(err) {
		t.Errorf("got %v, want ErrNotFound of the registry", err)
	}
}

// Trouble with the registry is neither a good nor a bad verdict.
func TestVerifyImageRegistryDown(t *testing.T) {
	o := statement.Options{Keys: []statement.Verifier{ourKey().Verifier()}, Now: matched}
	v, err := statement.VerifyImage(t.Context(), &shelf{fail: registry.ErrUnavailable}, ref(), o)
	if !errors.Is(err, registry.ErrUnavailable) || v.Verified || statement.NotVerifiable(err) {
		t.Errorf("got %+v, %v", v, err)
	}
}

// keptBundle is a bundle that was signed once, with its public key: what is
// attached to images must verify with every later version of this package.
func keptBundle(t testing.TB) (bundle []byte, keys []statement.Verifier) {
	t.Helper()
	bundle, err := os.ReadFile(filepath.Join("testdata", "kept.bundle.json"))
	if err != nil {
		t.Fatal(err)
	}
	public, err := os.ReadFile(filepath.Join("testdata", "kept.pub"))
	if err != nil {
		t.Fatal(err)
	}
	if keys, err = statement.LoadVerifiers(public); err != nil {
		t.Fatal(err)
	}
	return bundle, keys
}

func TestKeptBundleVerifies(t *testing.T) {
	bundle, keys := keptBundle(t)
	s, err := statement.Verify(t.Context(), bundle, image.Digest, keys)
	if err != nil || s.Verdict != contracts.VerdictPass || s.Snapshot.Sequence != 100 || !s.Time.Equal(matched) {
		t.Errorf("got %+v, %v", s, err)
	}
}

// Whatever the bytes are: no panic, and what verifies says what was signed.
func FuzzVerify(f *testing.F) {
	good, keys := keptBundle(f)
	want, err := statement.Verify(context.Background(), good, image.Digest, keys)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := statement.Verify(context.Background(), b, image.Digest, keys)
		if err == nil && s != want {
			t.Errorf("verified %+v, which was never signed", s)
		}
	})
}

func BenchmarkSign(b *testing.B) {
	f := facts(contracts.VerdictPass)
	for b.Loop() {
		signVSA(b, ourKey(), f)
	}
}

func BenchmarkVerify(b *testing.B) {
	bundle := signVSA(b, ourKey(), facts(contracts.VerdictPass))
	keys := []statement.Verifier{ourKey().Verifier()}
	for b.Loop() {
		if _, err := statement.Verify(context.Background(), bundle, image.Digest, keys); err != nil {
			b.Fatal(err)
		}
	}
}
