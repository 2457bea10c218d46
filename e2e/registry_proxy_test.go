package e2e

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// misdeed is what a registry, or what stands before it, does wrong with a request.
type misdeed string

const (
	throttles     misdeed = "429"
	throttlesFor  misdeed = "429 with Retry-After"
	fails500      misdeed = "500"
	fails502      misdeed = "502"
	fails503      misdeed = "503 with Retry-After"
	resets        misdeed = "reset"           // before the request is passed on
	resetsLate    misdeed = "reset, done"     // after it had its effect
	truncates     misdeed = "truncated body"  // less than Content-Length says
	swaps         misdeed = "swapped bytes"   // of the same length
	trickles      misdeed = "trickling body"  // one byte after the other
	endlessHeader misdeed = "endless headers" // slow-loris, the other way round
	endlessBody   misdeed = "endless body"    // without Content-Length
	redirects     misdeed = "redirect loop"   // to itself
	wrongLength   misdeed = "too long a body" // Content-Length and body are larger than the blob
	notJSON       misdeed = "an HTML page"    // 200 with the page of a captive portal
	emptyAnswers  misdeed = "an empty 200"    // and nothing more
)

// troubled is a reverse proxy before a registry that can be told to misbehave.
type troubled struct {
	address string
	origin  *url.URL
	client  *http.Client
	server  *httptest.Server

	mu    sync.Mutex
	what  misdeed // "": behaves
	share share
	hit   map[string]int // since do, by what share counts
	dice  *rand.Rand
	hits  atomic.Int64
	ended chan struct{} // closed when the test ends, so that nothing trickles on
}

// trouble starts a proxy before the registry at origin (host:port).
func trouble(t *testing.T, origin string) *troubled {
	t.Helper()
	p := &troubled{
		origin: &url.URL{Scheme: "http", Host: origin}, ended: make(chan struct{}), dice: rand.New(rand.NewPCG(1, 2)),
		client: &http.Client{
			Transport:     &http.Transport{MaxIdleConnsPerHost: 32, DisableCompression: true},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
	p.server = httptest.NewServer(p)
	p.address = p.server.Listener.Addr().String()
	t.Cleanup(func() {
		close(p.ended)
		p.server.CloseClientConnections()
		p.server.Close()
		p.client.CloseIdleConnections()
	})
	return p
}

// share says of a request as what it counts, how many of these go wrong at most,
// and one of how many does. Which one is thrown, as counting could hit the same
// step of every try.
type share func(r *http.Request) (key string, most, each int)

// every request goes wrong.
func every(*http.Request) (key string, most, each int) { return "", math.MaxInt, 1 }

// passing is one in three of the reads and of the writes about each repository, up to four of either.
func passing(r *http.Request) (key string, most, each int) { return concern(r), 4, 3 }

// bearable is what whoever asks again bears for certain: a service gives up when
// it has failed four times because of what it was told (registry.RetryAt). So the
// first two reads of each blob go wrong, and one in three of the other requests
// about a repository, up to two reads and a write.
func bearable(r *http.Request) (key string, most, each int) {
	key = concern(r)
	switch {
	case key == "":
		return "", 0, 1
	case r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/"):
		return r.URL.Path, 2, 1
	case strings.HasPrefix(key, "read "):
		return key, 2, 3
	default:
		return key, 1, 3
	}
}

// concern returns whether a request reads or writes, and about which repository; "" of none.
func concern(r *http.Request) string {
	for _, part := range []string{"/blobs/", "/manifests/", "/referrers/"} {
		repository, _, found := strings.Cut(r.URL.Path, part)
		switch {
		case !found:
		case r.Method == http.MethodGet || r.Method == http.MethodHead:
			return "read " + repository
		default:
			return "write " + repository
		}
	}
	return ""
}

// do lets a share of the requests go wrong from now on.
func (p *troubled) do(what misdeed, s share) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.what, p.share, p.hit = what, s, map[string]int{}
}

// behave ends the trouble.
func (p *troubled) behave() { p.do("", every) }

func (p *troubled) next(r *http.Request) misdeed {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.what == "" {
		return ""
	}
	key, most, each := p.share(r)
	if p.hit[key] >= most || p.dice.IntN(each) != 0 {
		return ""
	}
	p.hit[key]++
	p.hits.Add(1)
	return p.what
}

func (p *troubled) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch what := p.next(r); what {
	case "":
		p.pass(w, r)
	case throttles:
		http.Error(w, `{"errors":[{"code":"TOOMANYREQUESTS"}]}`, http.StatusTooManyRequests)
	case throttlesFor:
		w.Header().Set("Retry-After", "1")
		http.Error(w, `{"errors":[{"code":"TOOMANYREQUESTS"}]}`, http.StatusTooManyRequests)
	case fails500:
		http.Error(w, "boom", http.StatusInternalServerError)
	case fails502:
		http.Error(w, "<html>bad gateway</html>", http.StatusBadGateway)
	case fails503:
		w.Header().Set("Retry-After", "1")
		http.Error(w, "later", http.StatusServiceUnavailable)
	case resets:
		reset(w)
	case resetsLate:
		answer, err := p.forward(r)
		if err == nil {
			_, _ = io.Copy(io.Discard, answer.Body) // the effect is what matters
			_ = answer.Body.Close()
		}
		reset(w)
	case endlessHeader:
		p.drip(w, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n", "X-Padding: and so on\r\n")
	case redirects:
		http.Redirect(w, r, r.URL.RequestURI(), http.StatusTemporaryRedirect)
	case notJSON:
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprint(w, "<html><body>Please log in.</body></html>")
	case emptyAnswers:
		w.WriteHeader(http.StatusOK)
	default:
		p.spoil(w, r, what)
	}
}

// forward asks the registry itself.
func (p *troubled) forward(r *http.Request) (*http.Response, error) {
	to := *r.URL
	to.Scheme, to.Host = p.origin.Scheme, p.origin.Host
	req, err := http.NewRequestWithContext(r.Context(), r.Method, to.String(), r.Body)
	if err != nil {
		return nil, err
	}
	req.Header, req.Host = r.Header.Clone(), r.Host // registries make their URLs of it
	req.ContentLength = r.ContentLength
	if r.ContentLength == 0 {
		req.Body = http.NoBody
	}
	return p.client.Do(req)
}

func (p *troubled) pass(w http.ResponseWriter, r *http.Request) {
	answer, err := p.forward(r)
	if err != nil {
		reset(w)
		return
	}
	defer answer.Body.Close()
	copyHeader(w, answer)
	w.WriteHeader(answer.StatusCode)
	_, _ = io.Copy(w, answer.Body) // who asked is gone if this fails
}

func copyHeader(w http.ResponseWriter, answer *http.Response) {
	for name, values := range answer.Header {
		w.Header()[name] = values
	}
}

// spoil passes a request on and spoils the body of its answer.
func (p *troubled) spoil(w http.ResponseWriter, r *http.Request, what misdeed) {
	answer, err := p.forward(r)
	if err != nil {
		reset(w)
		return
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		reset(w)
		return
	}
	copyHeader(w, answer)
	if len(body) == 0 || answer.StatusCode >= 300 { // there is nothing to spoil
		w.WriteHeader(answer.StatusCode)
		return
	}
	switch what {
	case truncates:
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.WriteHeader(answer.StatusCode)
		_, _ = w.Write(body[:len(body)/2])
		flush(w)
		reset(w)
	case swaps:
		body[len(body)/2] ^= 0x20
		w.WriteHeader(answer.StatusCode)
		_, _ = w.Write(body)
	case wrongLength:
		body = append(body, bytes.Repeat([]byte{'x'}, 4096)...)
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.WriteHeader(answer.StatusCode)
		_, _ = w.Write(body)
	case trickles:
		w.WriteHeader(answer.StatusCode)
		for i := range body {
			if _, err := w.Write(body[i : i+1]); err != nil || !p.wait(r, 200*time.Millisecond) {
				return
			}
			flush(w)
		}
	case endlessBody:
		w.Header().Del("Content-Length")
		w.WriteHeader(answer.StatusCode)
		_, _ = w.Write(body)
		for more := bytes.Repeat([]byte{' '}, 64<<10); ; {
			if _, err := w.Write(more); err != nil {
				return
			}
			select {
			case <-p.ended:
				return
			default:
			}
		}
	default:
		panic("no such misdeed: " + string(what))
	}
}

// drip says first, and then again and again rest, and never comes to an end.
func (p *troubled) drip(w http.ResponseWriter, first, rest string) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer func() { _ = conn.Close() }() // the client has left by then
	if _, err := io.WriteString(conn, first); err != nil {
		return
	}
	for {
		select {
		case <-p.ended:
			return
		case <-time.After(300 * time.Millisecond):
		}
		if _, err := io.WriteString(conn, rest); err != nil {
			return
		}
	}
}

// wait says whether d passed before the client left or the test ended.
func (p *troubled) wait(r *http.Request, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-r.Context().Done():
	case <-p.ended:
	}
	return false
}

func flush(w http.ResponseWriter) { _ = http.NewResponseController(w).Flush() } // fails when the client is gone

// reset ends a connection with RST, as a crash would.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // pending bytes are dropped, RST instead of FIN
	}
	_ = conn.Close()
}
